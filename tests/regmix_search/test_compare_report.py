"""What a comparison says: intervals against textbook and simulation, tables, what failed."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_lite.testing import write_tiny_shards
from regmix_search.compare import Entry, plan_trials
from regmix_search.config import load_search
from regmix_search.drivers import Driver
from regmix_search.ledger import Ledger
from regmix_search.report.compare import describe_outcome, differences, summarise, verdict, write_page
from regmix_search.search import Search


def described(losses: dict[str, np.ndarray[Any, Any]]) -> list[dict[str, Any]]:
    """Mixtures as compare.json has them, from [seed, set] losses of each."""
    found = []
    for name, table in losses.items():
        runs = [{"seed": i, "losses": dict(zip("abcdef", row, strict=False))} for i, row in enumerate(table.tolist())]
        for run in runs:
            mean = sum(run["losses"].values()) / len(run["losses"])
            run |= {"average": mean, "average_bpb": mean / 2, "bpb": {k: v / 2 for k, v in run["losses"].items()}}
            run |= {"tokens": 1000, "flops": 2e9, "seconds": 3.0, "curve": [], "run_dir": "models/t0000"}
        weights = {"a": 0.75, "b": 0.25}
        found.append({"name": name, "path": f"{name}.yaml", "weights": weights, "epochs": {"a": 1.5}, "runs": runs})
    return found


def content_of(mixtures: list[dict[str, Any]], warnings: list[str]) -> dict[str, Any]:
    """What summarise makes of them."""
    content = {"first": mixtures[0]["name"], "mixtures": mixtures, "differences": differences(mixtures)}
    content |= {"sets": list(mixtures[0]["runs"][0]["losses"]), "failed": {}, "warnings": warnings}
    content |= {
        "target": None,
        "cost": {"runs": 4, "tokens": 4000, "flops": 8e9, "seconds": 12.0},
        "model": {"params": 19_616},
    }
    return content | {"verdict": verdict(content)}


def test_two_mixtures_are_compared_as_by_the_textbook_t_test() -> None:
    rng = np.random.default_rng(0)
    tables = {"human": rng.normal(3.0, 0.1, (4, 1)), "regmix": rng.normal(2.8, 0.1, (3, 1))}
    [row] = differences(described(tables))
    test = stats.ttest_ind(tables["regmix"][:, 0], tables["human"][:, 0])
    assert row["average"]["joint"] == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert row["average"]["difference"] == pytest.approx(tables["regmix"].mean() - tables["human"].mean())
    assert row["average"]["p_value"] == pytest.approx(test.pvalue)
    assert row["average"]["outcome"] == "better" and test.pvalue < 0.05
    assert row["sets"]["a"]["joint"] == pytest.approx(row["average"]["joint"]), "one set is the average"
    assert row["average_bpb"]["difference"] == pytest.approx(row["average"]["difference"] / 2)


def test_several_seeds_are_compared_as_by_the_textbook_paired_t_test() -> None:
    rng = np.random.default_rng(3)
    tables = {"human": rng.normal(3.0, 0.1, (5, 1))}
    tables["regmix"] = tables["human"] - 0.03 + rng.normal(0.0, 0.01, (5, 1))
    [row] = differences(described(tables))
    test = stats.ttest_rel(tables["regmix"][:, 0], tables["human"][:, 0])
    assert row["average"]["joint"] == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert row["average"]["p_value"] == pytest.approx(test.pvalue) and row["average"]["outcome"] == "better"
    shifted = described(tables)
    for run in shifted[1]["runs"]:
        run["seed"] += 1
    [apart] = differences(shifted)
    test = stats.ttest_ind(tables["regmix"][:, 0], tables["human"][:, 0])
    assert apart["average"]["joint"] == pytest.approx(tuple(test.confidence_interval(0.95))), "other seeds: no pairs"


def test_the_target_is_judged_beside_the_average() -> None:
    content = content_of(
        described({"human": np.array([[3.0, 4.0], [3.1, 4.1]]), "x": np.array([[2.0, 4], [2.1, 4.1]])}), []
    )
    assert verdict({**content, "target": "a"})[1] == (
        "x is significantly better than human: -1.0000 nats on a, the target (-1.4388 to -0.5612)."
    )


@pytest.mark.parametrize(("seeds", "shared"), [(3, 0.0), (8, 0.1)])
def test_where_nothing_differs_a_whole_table_claims_something_once_in_twenty(seeds: int, shared: float) -> None:
    rng, tries, averages, cells = np.random.default_rng(1), 300, 0, 0
    for _ in range(tries):
        start = rng.normal(3.0, shared, (seeds, 4))  # what runs of a seed have in common
        rows = differences(described({name: start + rng.normal(0, 0.1, (seeds, 4)) for name in ("human", "x", "y")}))
        averages += any(row["average"]["outcome"] != "unclear" for row in rows)
        cells += any(cell["outcome"] != "unclear" for row in rows for cell in row["sets"].values())
    assert max(averages, cells) / tries < 0.05 + 3 * math.sqrt(0.05 * 0.95 / tries)


def test_the_same_losses_under_two_names_differ_by_nothing() -> None:
    table = np.random.default_rng(2).normal(3.0, 0.1, (3, 2))
    [row] = differences(described({"human": table, "same": table}))
    assert row["average"]["difference"] == 0 and row["average"]["outcome"] == "unclear"
    low, high = row["average"]["joint"]
    assert -low == high > 0


def test_one_seed_gives_differences_and_claims_nothing() -> None:
    mixtures = described({"human": np.array([[3.0, 4.0]]), "regmix": np.array([[2.0, 4.0]])})
    [row] = differences(mixtures)
    assert row["average"]["difference"] == -0.5 and row["average"]["joint"] is None
    assert "nothing is claimed" in verdict({"first": "human", "target": None, "differences": [row]})[0]


def test_tables_are_these(tmp_path: Path) -> None:
    tables = {"human": np.array([[3.0, 4.0], [3.1, 4.1]]), "reg|mix": np.array([[2.5, 4.0], [2.6, 4.1]])}
    content = content_of(described(tables), ["only a test"])
    assert describe_outcome(content).splitlines() == [
        "4 runs, 4,000 tokens, 8e+09 FLOPs, 12 s",
        "  mixture  average loss  bits/byte  against human            interval  outcome",
        "  human          3.5500     1.7750",
        "  reg|mix        3.3000     1.6500        -0.2500  -0.5542 to +0.0542  unclear",
        "  reg|mix shows no significant difference to human: -0.2500 nats on the average set (-0.5542 to +0.0542).",
        "  warning: only a test",
    ]
    write_page(tmp_path, content)
    text, page = (tmp_path / "compare.md").read_text(), (tmp_path / "compare.html").read_text()
    assert "| reg\\|mix | 3.3000 | 1.6500 | -0.2500 | -0.5542 to +0.0542 | unclear |" in text
    assert "| a | 3.0500 | 2.5500 (-0.5000, -0.9388 to -0.0612) better |" in text
    assert "| 1 | 3.6000 | 3.3500 |" in text and "| a | 75.00% (1.5) | 75.00% (1.5) |" in text
    assert "<td>3.6000</td><td>3.3500</td>" in page and "reg|mix: \u22120.250" in page and "<a " not in page


def test_what_failed_and_what_is_not_scored_is_said(tmp_path: Path) -> None:
    write_tiny_shards(tmp_path / "shards")
    overrides = (f"out_dir={tmp_path}", f"shards.data_dir={tmp_path}/shards")
    search = Search(load_search(None, overrides=overrides), io.StringIO())
    entries = [Entry("human", "", {"a": 1.0}, {}), Entry("regmix", "", {"a": 0.5, "web": 0.5}, {})]
    trials = plan_trials(search, entries)
    facts = {"bpb": {}, "tokens": 1, "flops": 1.0, "seconds": 1.0, "run_dir": "models/t", "curve": []}
    with Driver(tmp_path / "drivers") as driver:
        ledger = Ledger(tmp_path / "trials.jsonl", trials, {}, driver=driver)
        while (trial := ledger.ask()) is not None:
            if trial.index == 101:
                ledger.fail(trial, "FloatingPointError: step 2", retry=False)
            else:
                ledger.tell(trial, {"a": 3.0 + trial.index / 1000}, **facts)
        content = summarise(search, entries, trials, ledger)
        assert content["failed"] == {"regmix, seed 1 (t0101)": "FloatingPointError: step 2"}
        told = " ".join(content["warnings"])
        assert "human [0, 1], regmix [0]" in told and "web: trained on, but without a validation set" in told
        assert content["differences"][0]["average"]["difference"] == pytest.approx(3.001 - 3.05)
        assert content["differences"][0]["average_bpb"] is None and content["cost"]["runs"] == 3
        ledger.state.finished.clear()
        with pytest.raises(ValueError, match="no run of human succeeded"):
            summarise(search, entries, trials, ledger)
