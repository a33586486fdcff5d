"""What a comparison of mixtures found: differences to the first with intervals, in JSON, on the console, on a page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_lite.files import atomic_write
from regmix_search.freshness import read_record
from regmix_search.ledger import Ledger, Trial
from regmix_search.report.figures import Curve, draw_curves, draw_gains
from regmix_search.report.numerals import DASH, count, duration, fixed
from regmix_search.report.page import Rows, Section, write_html, write_markdown
from regmix_search.report.verdict import CONFIDENCE, Comparison, compare, join_names, prefers_pairs
from regmix_search.search import Search

if TYPE_CHECKING:
    from regmix_search.compare import Entry

# For draw_gains: what is positive is a loss above the first mixture's.
WORDS = "Difference of every mixture to the first", "loss minus the first's, nats per token", "better", "worse"
# verdict.compare says how the first did against another; here it is said of the other
TURNED = {"better": "worse", "worse": "better", "unclear": "unclear", "unknown": "unknown"}
Losses = Mapping[str, Sequence[float]]  # mixture -> a number for each seed


def average(losses: Mapping[str, float]) -> float:
    """Mean over the validation sets, each counting the same."""
    return sum(losses.values()) / len(losses)


def summarise(search: Search, entries: Sequence[Entry], trials: Sequence[Trial], ledger: Ledger) -> dict[str, Any]:
    """The content of compare.json. Losses in nats a token; `difference` is a mixture's loss minus the first's.

    `joint` intervals hold for all mixtures at once; by domain, for all mixtures and domains at once. ValueError when no
    run of the first mixture, or none of any other, succeeded.
    """
    runs = {e.name: _runs_of(trials[number :: len(entries)], ledger) for number, e in enumerate(entries)}
    seeds = {name: [run["seed"] for run in mine] for name, mine in runs.items()}
    first, failed = entries[0].name, {}
    for entry, trial in zip(itertools.cycle(entries), trials, strict=False):
        if trial.index in ledger.failed:
            failed[f"{entry.name}, seed {trial.seed} ({trial.name})"] = ledger.failed[trial.index]
    if not runs[first] or not any(runs[entry.name] for entry in entries[1:]):
        lost = first if not runs[first] else "any other mixture"
        raise ValueError(f"no run of {lost} succeeded: {next(iter(failed.values()), 'none was trained')}")
    described = [_describe(entry, runs[entry.name]) for entry in entries]
    every = [run for mine in runs.values() for run in mine]
    plan = read_record(search.out / every[0]["run_dir"] / "plan.json")
    content = {
        "first": first,
        "confidence": CONFIDENCE,
        "model": {"preset": search.config.train.main.model.preset, "params": plan.get("params")},
        "sets": sorted(every[0]["losses"]),
        "target": search.config.fit.target if search.config.fit.target in every[0]["losses"] else None,
        "mixtures": described,
        "differences": differences(described),
        "cost": {"runs": len(every), **{key: sum(run[key] for run in every) for key in ("tokens", "flops", "seconds")}},
        "failed": failed,
    }
    unscored = sorted({d for entry in entries for d in entry.weights} - set(search.inventory.valid))
    return content | {"warnings": _warnings(content, seeds, unscored), "verdict": verdict(content)}


def differences(mixtures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every mixture that has runs against the first: on average, in bits a byte, and in every validation set."""
    first, domains = mixtures[0]["name"], list(mixtures[0]["runs"][0]["losses"])
    values = {m["name"]: m["runs"] for m in mixtures}
    same = _aligned(mixtures)
    on_average = _against(first, {name: [run["average"] for run in runs] for name, runs in values.items()}, same)
    bits = {name: [run["average_bpb"] for run in runs] for name, runs in values.items()}
    known = all(value is not None for runs in bits.values() for value in runs)
    in_bits = _against(first, bits, same) if known else {}
    by_domain = {}
    for domain in domains:
        losses = {name: [run["losses"][domain] for run in runs] for name, runs in values.items()}
        by_domain[domain] = _against(first, losses, same, len(domains))
    return [
        {
            "name": name,
            "average": row,
            "average_bpb": in_bits.get(name),
            "sets": {domain: rows[name] for domain, rows in by_domain.items()},
        }
        for name, row in on_average.items()
    ]


def _aligned(mixtures: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all mixtures that have runs have the same seeds."""
    return len({tuple(run["seed"] for run in m["runs"]) for m in mixtures if m["runs"]}) == 1


def _against(first: str, losses: Losses, aligned: bool, sets: int = 1) -> dict[str, dict[str, Any]]:
    found = {}
    for c in compare(losses, {}, first, sets, aligned):
        facts = {"loss": c.control_loss, "difference": c.gain, "interval": c.interval, "joint": c.joint}
        found[c.control] = {**facts, "p_value": c.p_value, "outcome": TURNED[c.outcome]}
    return found


def _runs_of(trials: Sequence[Trial], ledger: Ledger) -> list[dict[str, Any]]:
    """What the ledger has of a mixture's finished runs, in the order of their seeds."""
    found = []
    for trial in trials:
        if (event := ledger.finished.get(trial.index)) is not None:
            bits = event["bpb"] if event["bpb"].keys() == event["losses"].keys() else {}
            means = {"average": average(event["losses"]), "average_bpb": average(bits) if bits else None}
            kept = {key: event[key] for key in ("losses", "bpb", "tokens", "flops", "seconds", "run_dir", "curve")}
            found.append({"seed": trial.seed, **means, **kept})
    return found


def _describe(entry: Entry, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"name": entry.name, "path": entry.path, "weights": entry.weights, "epochs": entry.epochs, "runs": [*runs]}


def _warnings(content: Mapping[str, Any], seeds: Mapping[str, list[int]], unscored: Sequence[str]) -> list[str]:
    found = [f"{name}: {reason}" for name, reason in content["failed"].items()]
    rows = content["differences"]
    if all(row["average"]["joint"] is None for row in rows):
        found.append("no noise estimate, so differences have no interval: train several seeds (train.seeds=3 or more)")
    if len({len(mine) for mine in seeds.values()}) > 1:
        found.append("not all have the same seeds: " + ", ".join(f"{name} {mine}" for name, mine in seeds.items()))
    if unscored:
        found.append(f"{join_names(unscored)}: trained on, but without a validation set, so nothing here counts them")
    return found


def verdict(content: Mapping[str, Any]) -> list[str]:
    """What may be said of every mixture against the first, in a sentence each."""
    first, target, said = content["first"], content["target"], []
    for row in content["differences"]:
        said.append(_sentence(first, row["name"], row["average"], "the average set"))
        if target:
            said.append(_sentence(first, row["name"], row["sets"][target], f"{target}, the target"))
    return said


def _sentence(first: str, name: str, row: Mapping[str, Any], on: str) -> str:
    numbers = f"{row['difference']:+.4f} nats on {on}{_span(row['joint'], ' (', ')')}"
    if row["outcome"] == "unknown":
        return f"{name} measured {numbers} against {first}, with no interval: nothing is claimed."
    if row["outcome"] == "unclear":
        return f"{name} shows no significant difference to {first}: {numbers}."
    return f"{name} is significantly {row['outcome']} than {first}: {numbers}."


def describe_outcome(content: Mapping[str, Any]) -> str:
    """The table of averages for the console, verdict and warnings below it."""
    rows = [[*map(str, row)] for row in _averages(content)]
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(wide[0]), *(c.rjust(w) for c, w in zip(row[1:], wide[1:], strict=True))]).rstrip()
        for row in rows
    ]
    cost = content["cost"]
    spent = f"{cost['runs']} runs, {cost['tokens']:,} tokens, {cost['flops']:.3g} FLOPs, {duration(cost['seconds'])}"
    noted = [f"warning: {text}" for text in content["warnings"]]
    return "\n  ".join([spent, *lines, *content["verdict"], *noted]).replace(DASH, "-")


def write_page(out: Path, content: Mapping[str, Any]) -> None:
    """compare.md and compare.html."""
    names = join_names([m["name"] for m in content["mixtures"]])
    notes = [f"Warning: {text}" for text in content["warnings"]]
    sets = join_names(content["sets"])
    notes.append(
        f"Average: mean over the validation sets {sets}, each counting the same. Negative differences are lower "
        f"losses. Intervals are {CONFIDENCE:.0%}, from the spread over seeds, and hold for all rows of a table at "
        f"once; by set, for all of its cells. {_pairing(content)}"
    )
    figures = [_gains(content), _curves(content)]
    drawn = [f'<div class="pair">{"".join(f"<figure>{figure}</figure>" for figure in figures if figure)}</div>']
    sections: list[Section] = [
        (f"Against {content['first']}", [_averages(content)], drawn),
        ("By validation set", [_by_set(content)], []),
        ("Bits a byte", [_bits(content)], []),
        ("Every seed", [_seeds(content)], []),
        ("Weights", [_weights(content)], []),
        ("Cost", [_cost(content)], []),
    ]
    page = (f"Compared: {names}", " ".join(content["verdict"]), notes, sections)
    atomic_write(out / "compare.html", write_html(*page, len(content["mixtures"])))
    atomic_write(out / "compare.md", write_markdown(*page))


def _pairing(content: Mapping[str, Any]) -> str:
    """Which intervals are of pairs: said, because runs of one seed begin alike."""
    trained = [m for m in content["mixtures"] if m["runs"]]
    seeds, rows = len(trained[0]["runs"]), len(trained) - 1
    families = {"in the averages": rows, "by set": rows * len(content["sets"])}
    paired = [name for name, family in families.items() if prefers_pairs(seeds, len(trained), family)]
    if not paired or not _aligned(trained):
        return "Seeds count as unpaired, which is conservative: runs of one seed begin alike."
    return f"Runs of one seed begin alike and count as pairs {join_names(paired)}."


def _averages(content: Mapping[str, Any]) -> Rows:
    head = ["mixture", "average loss", "bits/byte", f"against {content['first']}", "interval", "outcome"]
    rows, found = [head], {row["name"]: row["average"] for row in content["differences"]}
    for m in content["mixtures"]:
        means = [_mean([run[key] for run in m["runs"]]) for key in ("average", "average_bpb")]
        row = found.get(m["name"])
        last = [f"{row['difference']:+.4f}", _span(row["joint"]) or DASH, row["outcome"]] if row else [""] * 3
        rows.append([m["name"], *means, *last])
    return rows


def _by_set(content: Mapping[str, Any]) -> Rows:
    first = content["mixtures"][0]
    rows = [["set", first["name"], *(row["name"] for row in content["differences"])]]
    for name in content["sets"]:
        cells = [_mean([run["losses"][name] for run in first["runs"]])]
        for one in (row["sets"][name] for row in content["differences"]):
            span = f" ({one['difference']:+.4f}{_span(one['joint'], ', ')})"
            cells.append(
                f"{one['loss']:.4f}{span}" + (f" {one['outcome']}" if one["outcome"] in ("better", "worse") else "")
            )
        rows.append([name, *cells])
    return rows


def _bits(content: Mapping[str, Any]) -> Rows:
    mixtures = content["mixtures"]
    rows = [["set", *(m["name"] for m in mixtures)]]
    for name in content["sets"]:
        rows.append([name, *(_mean([run["bpb"].get(name) for run in m["runs"]]) for m in mixtures)])
    return rows


def _seeds(content: Mapping[str, Any]) -> Rows:
    mixtures = content["mixtures"]
    losses = {m["name"]: {run["seed"]: run["average"] for run in m["runs"]} for m in mixtures}
    seeds = sorted({seed for mine in losses.values() for seed in mine})
    rows = [[str(seed), *(fixed(mine.get(seed), 4) for mine in losses.values())] for seed in seeds]
    return [["seed", *losses], *rows]


def _weights(content: Mapping[str, Any]) -> Rows:
    mixtures = content["mixtures"]
    rows = [["domain", *(f"{m['name']} (epochs)" for m in mixtures)]]
    for domain in sorted({d for m in mixtures for d in m["weights"]}):
        cells = [f"{m['weights'].get(domain, 0):.2%} ({m['epochs'].get(domain, 0):.3g})" for m in mixtures]
        rows.append([domain, *cells])
    return rows


def _cost(content: Mapping[str, Any]) -> Rows:
    cost, model = content["cost"], content["model"]
    each = [cost[key] / cost["runs"] for key in ("tokens", "flops", "seconds")]
    rows = [["", "runs", "tokens", "FLOPs", "time"]]
    rows.append([f"a run of {count(model['params'] or math.nan)} parameters", "1", *_amounts(*each)])
    return [*rows, ["all", str(cost["runs"]), *_amounts(cost["tokens"], cost["flops"], cost["seconds"])]]


def _amounts(tokens: float, flops: float, seconds: float) -> list[str]:
    return [count(tokens), f"{flops:.3g}", duration(seconds)]


def _gains(content: Mapping[str, Any]) -> str:
    rows = []
    for number, row in enumerate(content["differences"], 1):
        one = row["average"]
        first = one["loss"] - one["difference"]
        spans = one["interval"], one["joint"]
        rows.append(
            Comparison(
                f"d{number}", row["name"], first, one["loss"], one["difference"], *spans, one["p_value"], one["outcome"]
            )
        )
    return draw_gains(rows, WORDS)


def _curves(content: Mapping[str, Any]) -> str:
    """Average held-out loss against tokens; empty where eval.every is 0."""
    curves = []
    for number, m in enumerate(content["mixtures"]):
        seeds = [[(p["tokens"], average(p["losses"])) for p in run["curve"]] for run in m["runs"]]
        if any(len(seed) > 1 for seed in seeds):
            curves.append(Curve(f"d{number}", m["name"], seeds))
    return draw_curves(curves, "Average held-out loss against tokens") if curves else ""


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.4f}" if known and len(known) == len(values) else DASH


def _span(interval: Sequence[float] | None, before: str = "", after: str = "") -> str:
    return f"{before}{interval[0]:+.4f} to {interval[1]:+.4f}{after}" if interval else ""
