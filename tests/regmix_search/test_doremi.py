"""A search by DoReMi: rounds that resume and are never repeated, its mixture, its report, its refusals."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_lite.config import to_dict
from megatron_lite.data.mixture import Mixture
from megatron_lite.files import read_jsonl
from megatron_lite.testing import tiny_config, write_tiny_shards
from regmix_search import run as cli
from regmix_search.config import load_search
from regmix_search.doremi import doremi, first_weights, main_mixtures
from regmix_search.report.doremi import summarise, verdict
from regmix_search.search import Search
from regmix_search.space import build_space
from regmix_search.status import read_status

ROOT = Path(__file__).resolve().parents[2]


def config_file(folder: Path) -> Path:
    """A search by DoReMi on tiny shards, with proxies of 10 steps; written to a file, as a user would."""
    if not (folder / "shards").exists():
        write_tiny_shards(folder / "shards")
    run = to_dict(tiny_config(folder, "log.console=true"))
    search = {
        "name": "tiny",
        "method": "doremi",
        "out_dir": str(folder / "out"),
        "target_tokens": 22_500,
        "shards": {"data_dir": str(folder / "shards")},
        "corpus": {"kind": "none"},
        "doremi": {"rounds": 2, "reweighting": {"eta": 0.1}},
        "proxy": run,
        "train": {"mixtures": ["optimal", "prior"], "seeds": 1, "main": run},
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(search))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folder of a finished search that was killed once, in the middle of the first proxy."""
    folder = tmp_path_factory.mktemp("doremi")
    long = ["--set", "proxy.checkpoint.every=1", "--set", "proxy.schedule.total_tokens=6400"]
    arguments = ["--config", str(config_file(folder)), *long]
    command = [sys.executable, "-m", "regmix_search.run", *arguments]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not list((folder / "out/doremi/round-1-proxy").glob("step_*/COMPLETE")):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (folder / "out/doremi/round-1-proxy/result.json").exists()
    (folder / "killed.json").write_text(json.dumps(read_status(folder / "out")))
    assert cli.main(arguments) == 0
    return folder


@pytest.mark.slow
def test_rounds_go_on_from_where_they_were_killed(made):
    assert "resumed at step" in (made / "out/doremi/round-1-proxy.log").read_text()
    found = json.loads((made / "out/doremi.json").read_text())
    for number, one in enumerate(found["rounds"], 1):
        rows = read_jsonl(made / f"out/doremi/round-{number}-proxy/metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, 51)), "every step once"
        answer = {name: rows[-1][f"average/{name}"] for name in "abc"}
        assert one["weights"] == answer and sum(answer.values()) == pytest.approx(1)
        weights = np.array([[row[f"weight/{name}"] for name in "abc"] for row in rows])
        np.testing.assert_allclose(weights.mean(0), list(answer.values()), rtol=1e-12)
        assert one["change"] == max(abs(answer[d] - one["reference"][d]) for d in "abc")
        assert one["curves"]["tokens"] == [128 * step for step in range(1, 51)]
        assert one["flops"]["proxy"] == pytest.approx(one["flops"]["reference"] * 4 / 3)


@pytest.mark.slow
def test_status_follows_the_rounds(made):
    killed, ended = json.loads((made / "killed.json").read_text())["rounds"], read_status(made / "out")["rounds"]
    assert [run["run"] for run in killed] == ["round-1-reference", "round-1-proxy"]
    assert killed[0]["state"] == "done" and killed[0]["step"] == killed[0]["steps"] == 50
    assert 0 < killed[1]["step"] <= 50 and sum(killed[1]["weights"].values()) == pytest.approx(1)
    rounds = json.loads((made / "out/doremi.json").read_text())["rounds"]
    assert [run["state"] for run in ended] == ["done"] * 4
    assert [run["change"] for run in ended[1::2]] == pytest.approx([one["change"] for one in rounds])
    assert ended[3]["weights"] == rounds[1]["weights"]


@pytest.mark.slow
def test_the_next_reference_is_trained_on_the_answer_and_proxies_sample_uniformly(made):
    first, second = json.loads((made / "out/doremi.json").read_text())["rounds"]
    assert second["reference"] == first["weights"]
    on, sampled = (
        yaml.safe_load((made / f"out/doremi/round-2-{who}.mixture.yaml").read_text())["train"]
        for who in ("reference", "proxy")
    )
    assert {k.removeprefix("train_"): v for k, v in on.items()} == pytest.approx(first["weights"])
    assert list(sampled.values()) == pytest.approx([1 / 3] * 3)
    seeds = [yaml.safe_load((made / f"out/doremi/round-2-{who}/config.yaml").read_text())["seed"] for who in RUNS]
    assert seeds[0] != seeds[1], "the proxy does not see what the reference has just seen"


RUNS = ("reference", "proxy")


@pytest.mark.slow
def test_the_mixture_is_the_answer_under_the_caps_and_models_are_trained_on_it(made):
    found, written = json.loads((made / "out/doremi.json").read_text()), Mixture.load(made / "out/mixture.yaml")
    answer = found["rounds"][-1]["weights"]
    assert dict(zip(written.names, written.weights, strict=True)) == pytest.approx(found["mixture"])
    assert max(written.epochs.values()) <= 4 * (1 + 1e-9), "mixtures.max_epochs"
    free = [name for name, epochs in written.epochs.items() if epochs < 3.999]
    assert 0 < len(free) < 3, "a cap binds"
    ratios = {found["mixture"][name] / answer[name] for name in free}
    assert max(ratios) == pytest.approx(min(ratios)), "domains below their caps keep their ratios"
    run = json.loads((made / "out/train.json").read_text())["runs"][0]
    assert run["mixture"] == "optimal" and run["weights"] == found["mixture"]


@pytest.mark.slow
def test_a_second_run_repeats_nothing_and_another_eta_repeats_the_proxies_alone(made, tmp_path, capsys):
    shutil.copytree(made, tmp_path / "copy")
    text = (made / "search.yaml").read_text().replace(str(made), str(tmp_path / "copy"))
    (tmp_path / "copy/search.yaml").write_text(text)
    long = ["--set", "proxy.checkpoint.every=1", "--set", "proxy.schedule.total_tokens=6400"]
    arguments = ["--config", str(tmp_path / "copy/search.yaml"), *long, "--set", "train.enabled=false"]
    assert cli.main([*arguments, "--set", "doremi.rounds=1"]) == 0
    capsys.readouterr()
    kept = (tmp_path / "copy/out/doremi/round-1-reference/result.json").stat().st_mtime_ns
    assert cli.main([*arguments, "--set", "doremi.rounds=1"]) == 0
    assert "doremi: up to date" in capsys.readouterr().out
    before = json.loads((tmp_path / "copy/out/doremi.json").read_text())["rounds"][0]["weights"]
    assert cli.main([*arguments, "--set", "doremi.rounds=1", "--set", "doremi.reweighting.eta=0.2"]) == 0
    after = json.loads((tmp_path / "copy/out/doremi.json").read_text())["rounds"][0]["weights"]
    assert after != before
    assert (tmp_path / "copy/out/doremi/round-1-reference/result.json").stat().st_mtime_ns == kept


@pytest.mark.slow
def test_the_report_shows_weights_over_time_and_the_verdict(made):
    page, facts = (made / "out/report.html").read_text(), json.loads((made / "out/report.json").read_text())
    assert page.count("<svg") == 4, "averaged and momentary weights of two rounds"
    assert facts["verdict"] in page.replace("&#x27;", "'") and facts["scores"].keys() == {"optimal", "prior"}
    assert "| domain | reference | round 1 | round 2 |" in (made / "out/report.md").read_text()


def test_the_verdict_counts_domains_and_says_the_spread():
    losses = {"optimal": [[1.0, 2.0], [1.1, 2.1]], "prior": [[1.2, 2.1], [1.2, 2.3]]}
    runs = [
        {"mixture": name, "losses": {"a": a, "b": b, "unmixed": 9.0}} for name, rows in losses.items() for a, b in rows
    ]
    scores = summarise(runs, ["a", "b"])
    assert scores["prior"]["average"] == pytest.approx([1.65, 1.75]) and scores["prior"]["worst"] == [2.1, 2.3]
    text = verdict(scores)
    assert "gain +0.150 nats on the average domain (sd of the difference over 2 seeds 0.000)" in text
    assert "+0.150 on the worst; 2 of 2 domains" in text
    assert "no models were trained" in verdict({})


def search_of(folder: Path, *overrides: str) -> Search:
    return Search(load_search(config_file(folder), None, overrides), sys.stdout)


def test_the_first_reference_is_the_prior_uniform_or_a_file(tmp_path):
    search = search_of(tmp_path)
    tokens = {name: shard.tokens for name, shard in search.inventory.train.items()}
    space = build_space(tokens, 3000)
    assert first_weights(search, space) == pytest.approx({k: v / sum(tokens.values()) for k, v in tokens.items()})
    weights = {"c": 0.5, "b": 0.3, "a": 0.2}
    Mixture.from_weights(weights, tmp_path / "shards").save(tmp_path / "mine.yaml")
    found = first_weights(search_of(tmp_path, f"doremi.reference={tmp_path}/mine.yaml"), space)
    assert found == pytest.approx(weights) and list(found) == ["a", "b", "c"]
    assert set(first_weights(search_of(tmp_path, "doremi.reference=uniform"), space).values()) == {1 / 3}
    with pytest.raises(ValueError, match=r"doremi.reference=unifrom: write prior, uniform, or the path"):
        first_weights(search_of(tmp_path, "doremi.reference=unifrom"), space)
    Mixture.from_weights({"a": 1.0, "b": 1.0}, tmp_path / "shards").save(tmp_path / "two.yaml")
    with pytest.raises(ValueError, match="has the domains a, b, mixed are a, b, c"):
        first_weights(search_of(tmp_path, f"doremi.reference={tmp_path}/two.yaml"), space)


def test_what_the_method_has_not_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="best_single is a surrogate's choice"):
        search_of(tmp_path, "train.mixtures=[optimal, best_single]")
    assert cli.main(["--config", str(tmp_path / "search.yaml"), "--stage", "fit"]) == 2
    assert "method=doremi has the stages corpus, tokenizer, shards, doremi, train, report" in capsys.readouterr().err
    with pytest.raises(ValueError, match="run `--stage doremi` first"):
        main_mixtures(search_of(tmp_path))


def test_the_stage_is_made_again_when_what_it_depends_on_changes(tmp_path):
    one = doremi(search_of(tmp_path)).inputs
    assert doremi(search_of(tmp_path)).inputs == one
    for change in (
        "doremi.rounds=3",
        "doremi.reweighting.eta=1",
        "proxy.optim.lr=1e-3",
        "seed=5",
        "target_tokens=9000",
    ):
        assert doremi(search_of(tmp_path, change)).inputs != one, change


def test_a_dry_run_says_what_a_round_costs(tmp_path, capsys):
    config_file(tmp_path)
    assert cli.main(["--config", str(tmp_path / "search.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "doremi: at most 2 rounds of a reference and a proxy" in said and "models: 2 = optimal, prior x 1" in said
    assert not (tmp_path / "out").exists()
