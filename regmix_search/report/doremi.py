"""The report of a search by DoReMi: weights over time, what each round cost, and the models trained on the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.files import atomic_write, atomic_write_json
from megatron_lite.plan import duration
from regmix_search.freshness import Stage, digest, read_json
from regmix_search.report.figures import Curve, draw_curves
from regmix_search.report.page import Rows, Section, write_html, write_markdown
from regmix_search.search import Search

CONTROLS = ("optimal", "prior", "uniform")


def report(search: Search) -> Stage:
    """report.html, report.md and report.json."""
    out = search.out

    def make() -> str:
        return write_report(out)

    inputs = {"doremi.json": digest(out / "doremi.json", "doremi")}
    if (out / "train.json").is_file():
        inputs["train.json"] = digest(out / "train.json", "train")
    return Stage("report", inputs, (out / "report.html", out / "report.md", out / "report.json"), make)


def write_report(out: Path) -> str:
    """Writes the three files from doremi.json and, where models were trained, train.json; returns the verdict."""
    found = read_json(out / "doremi.json")
    runs = read_json(out / "train.json")["runs"] if (out / "train.json").is_file() else []
    scores = summarise(runs, list(found["mixture"]))
    words = verdict(scores)
    sections: list[Section] = [
        ("Models trained on the answer and its controls", [_scores(scores)], []),
        ("Weights", [_weights(found)], []),
        *((f"Round {i}", [_costs(one)], [_figure(one, key) for key in ("average", "weight")])
          for i, one in enumerate(found["rounds"], 1)),
    ]  # fmt: skip
    warnings = [text for one in found["rounds"] for text in one["warnings"]]
    page = (f"DoReMi: {out.name}", f"{words}.", [f"Warning: {text}" for text in warnings], sections)
    atomic_write(out / "report.html", write_html(*page, len(found["mixture"])))
    atomic_write(out / "report.md", write_markdown(*page))
    facts = {"verdict": words, "scores": scores, "mixture": found["mixture"], "warnings": warnings}
    atomic_write_json(out / "report.json", {**facts, "rounds": found["rounds"]})
    return words


def summarise(runs: list[dict[str, Any]], domains: list[str]) -> dict[str, Any]:
    """By mixture: average and worst held-out loss over the mixed domains, for each seed; and each domain's mean."""
    scores = {}
    for name in CONTROLS:
        losses = [run["losses"] for run in runs if run["mixture"] == name]
        scored = [d for d in domains if losses and all(d in each for each in losses)]
        if scored:
            table = np.array([[each[d] for d in scored] for each in losses])
            scores[name] = {
                "average": table.mean(1).tolist(),
                "worst": table.max(1).tolist(),
                "domains": dict(zip(scored, table.mean(0).tolist(), strict=True)),
            }
    return scores


def verdict(scores: dict[str, Any]) -> str:
    """One sentence: DoReMi's weights against the prior, in nats, with the spread over seeds where there is one."""
    if not {"optimal", "prior"} <= scores.keys():
        return "DoReMi's weights are found; no models were trained on them"
    ours, theirs = scores["optimal"], scores["prior"]
    better = sum(loss < theirs["domains"][d] for d, loss in ours["domains"].items())
    gains = {key: np.mean(theirs[key]) - np.mean(ours[key]) for key in ("average", "worst")}
    spread = np.std(np.subtract(theirs["average"], ours["average"]), ddof=1) if len(ours["average"]) > 1 else np.nan
    seeds = f" (sd of the difference over {len(ours['average'])} seeds {spread:.3f})" if np.isfinite(spread) else ""
    return (
        f"Against the prior, DoReMi's weights gain {gains['average']:+.3f} nats on the average domain{seeds} and "
        f"{gains['worst']:+.3f} on the worst; {better} of {len(ours['domains'])} domains are better"
    )


def _scores(scores: dict[str, Any]) -> Rows:
    rows = [["mixture", "average loss", "worst domain's loss", "seeds"]]
    for name, one in scores.items():
        means = [f"{np.mean(one[key]):.4f}" for key in ("average", "worst")]
        rows.append([name.replace("optimal", "doremi"), *means, str(len(one["average"]))])
    return rows


def _weights(found: dict[str, Any]) -> Rows:
    rounds = found["rounds"]
    rows = [["domain", "reference", *(f"round {i}" for i in range(1, len(rounds) + 1)), "mixture (under the caps)"]]
    for name in sorted(found["mixture"], key=lambda d: -found["mixture"][d]):
        columns = [rounds[0]["reference"], *(one["weights"] for one in rounds), found["mixture"]]
        rows.append([name, *(f"{column[name]:.4f}" for column in columns)])
    return [*rows, ["largest change", "", *(f"{one['change']:.4f}" for one in rounds), ""]]


def _costs(one: dict[str, Any]) -> Rows:
    rows = [["model", "tokens", "FLOPs", "time", "average held-out loss"]]
    for name in ("reference", "proxy"):
        loss = np.mean(list(one["losses"][name].values()))
        cost = [f"{one['tokens'][name]:,}", f"{one['flops'][name]:.3g}", duration(one["seconds"][name])]
        rows.append([name, *cost, f"{loss:.4f}"])
    return rows


def _figure(one: dict[str, Any], key: str) -> str:
    curves = one["curves"]
    titles = {"average": "averaged weights: the answer", "weight": "weights of each step"}
    lines = [
        Curve(f"d{i}", name, [list(zip(curves["tokens"], curves[key][name], strict=True))])
        for i, name in enumerate(one["weights"])
    ]
    return f"<figure>{draw_curves(lines, titles[key], 0.0)}<figcaption>{titles[key].capitalize()}</figcaption></figure>"
