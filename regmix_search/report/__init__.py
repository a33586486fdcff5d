"""Assembles report.html, report.md and report.json from whatever a search left in its folder."""

import math
import platform
import shlex
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from megatron_lite.files import atomic_write, atomic_write_json
from regmix_search.report import exhibits, figures
from regmix_search.report.early import describe_early
from regmix_search.report.evidence import Evidence, finite, read_evidence, read_mixtures
from regmix_search.report.findings import as_sentence, gather_facts, noise_sd
from regmix_search.report.goal import follow_goal
from regmix_search.report.numerals import count, markdown_cell, minus, ratio
from regmix_search.report.sizes import read_sizes
from regmix_search.report.verdict import OPTIMAL, Agreement, Comparison, tokens_to_reach

PACKAGES = ("megatron_lite", "torch", "numpy", "scipy", "lightgbm", "scikit-learn", "tokenizers")
# A running mean over this share of a training curve; its points are single noisy batches.
SMOOTHING = 0.02


def write_report(run_dir: Path) -> dict[str, Any]:
    """Write report.html, report.md and report.json into `run_dir`; return what report.json holds.

    Only mixtures.csv must exist (ValueError otherwise); any other file that is missing is named in the report.
    Losses are nats per token, `gain` is control loss minus optimal loss. Every number is finite or None.
    """
    run_dir = Path(run_dir)
    evidence = follow_goal(read_evidence(run_dir))
    facts, sizes = gather_facts(evidence), read_sizes(run_dir)
    facts["warnings"] += map(as_sentence, sizes.warnings)
    context = {"facts": facts, "evidence": evidence, "sizes": sizes, "early": describe_early(evidence)}
    context |= exhibits.build_tables(evidence, facts)
    context |= {"figures": draw_figures(evidence, facts), "reach": _reach(evidence), **_surroundings(run_dir)}
    atomic_write(run_dir / "report.html", _render("page.html.j2", context))
    atomic_write(run_dir / "report.md", _render("page.md.j2", context))
    report: dict[str, Any] = _plain(facts)
    atomic_write_json(run_dir / "report.json", report)
    return report


def draw_figures(evidence: Evidence, facts: dict[str, Any]) -> dict[str, str]:
    """Every figure that the evidence allows, as SVG text by name; the others are empty strings."""
    target, weights = facts["target"], facts["weights"]
    order = exhibits.by_weight(evidence, facts)
    losses = [t.losses[target] for t in evidence.finished if target in t.losses]
    curves = _curves(evidence)
    drawn = {
        "gains": figures.draw_gains(facts["comparisons"]) if facts["comparisons"] else "",
        "weights": figures.draw_weights(order, **weights, at_cap=evidence.optimum.get("at_cap") or []),
        "design": "",
        "noise": figures.draw_noise(_noise_rows(evidence, target)) if len(losses) > 1 else "",
        **{name: figures.draw_curves(found, name) if found else "" for name, found in curves.items()},
        **_scatters(evidence, facts),
    }
    if sampled := {t.index: t.weights for t in evidence.trials if t.weights and t.kind != "repeat"}:
        best = [t.index for t in exhibits.best_trials(evidence, target)]
        drawn["design"] = figures.draw_design(
            order, sampled, best, weights["prior"], weights["optimal"], _rounds(evidence)
        )
    return drawn


def _rounds(evidence: Evidence) -> dict[int, int]:
    """The round that proposed each proxy: those that mixtures.csv has beyond design.csv, a batch at a time."""
    design, batch = evidence.run_dir / "design.csv", finite((evidence.config.get("mixtures") or {}).get("batch"))
    if not design.is_file() or not batch >= 1:
        return {}
    drawn = read_mixtures(design)[0]
    later = [trial.index for trial in evidence.trials if trial.index not in drawn]
    return {index: 1 + int(place // batch) for place, index in enumerate(later)}


def _scatters(evidence: Evidence, facts: dict[str, Any]) -> dict[str, str]:
    fitted = (evidence.fit.get("targets") or {}).get(facts["target"]) or {}
    held, estimates = fitted.get("holdout") or {}, {t.index for t in evidence.trials if t.stopped_at is not None}
    hollow = {place for place, index in enumerate(evidence.fit.get("train_index") or ()) if index in estimates}
    drawn: dict[str, str] = {}
    sources = {
        "cross_validation": (fitted.get("cv_predicted"), fitted.get("true"), "prior", "cross-validated"),
        "holdout": (held.get("predicted"), held.get("true"), "optimal", "held back, never fitted"),
    }
    given = [finite(v) for predicted, true, *_ in sources.values() for v in (*(predicted or ()), *(true or ()))]
    limits = [v for v in given if math.isfinite(v)]
    for name, (predicted, true, style, words) in sources.items():
        score: Agreement | None = facts[name]
        drawn[name] = ""
        if score:
            lines = [f"{score.n} proxies, {words}", f"Spearman {score.spearman:.2f}", f"Pearson {score.pearson:.2f}"]
            lines.append(f"RMSE {score.rmse:.3f} nats")
            pairs = [(finite(p), finite(t)) for p, t in zip(predicted or (), true or (), strict=False)]
            label = f"Predicted and true: {words}"
            drawn[name] = figures.draw_scatter(
                pairs, limits, facts["noise_sd"], lines, style, label, hollow if name == "cross_validation" else set()
            )
    return drawn


def _curves(evidence: Evidence) -> dict[str, list[figures.Curve]]:
    labels = exhibits.short_labels(evidence)
    names = dict.fromkeys(run.mixture for run in evidence.runs)
    found: dict[str, list[figures.Curve]] = {"train_curves": [], "target_curves": []}
    for name in names:
        runs = [run for run in evidence.runs if run.mixture == name]
        train = [figures.smooth(r.curve, max(1, round(SMOOTHING * len(r.curve)))) for r in runs if r.curve]
        valid = [r.valid_curve for r in runs if r.valid_curve]
        for key, seeds in (("train_curves", train), ("target_curves", valid)):
            if seeds:
                found[key].append(figures.Curve(name, labels.get(name, name), seeds))
    return found


def _noise_rows(evidence: Evidence, target: str) -> list[tuple[str, list[float], list[float], str]]:
    rows = []
    for name in sorted(evidence.targets, key=lambda t: t != target):
        losses = [t.losses[name] for t in evidence.finished if name in t.losses]
        repeats = [t.losses[name] for t in evidence.repeats if name in t.losses]
        if len(losses) > 1:
            spread = float(np.std(losses, ddof=1))
            rows.append((name, losses, repeats, ratio(spread, noise_sd(evidence, name))))
    return rows


def _reach(evidence: Evidence) -> str:
    """How many tokens the optimal mixture took to the loss at which the prior ended; empty when it never did."""
    seeds = {name: [r.valid_curve for r in evidence.runs if r.mixture == name] for name in (OPTIMAL, "prior")}
    optimal, prior = (figures.mean_curve(seeds[name]) for name in (OPTIMAL, "prior"))
    if not optimal or not prior or (tokens := tokens_to_reach(optimal, prior[-1][1])) is None:
        return ""
    return f"{count(tokens)} of {count(prior[-1][0])} tokens ({tokens / prior[-1][0]:.0%})"


def _surroundings(run_dir: Path) -> dict[str, Any]:
    """Versions, the time of writing and the commands: all that comes from neither the evidence nor the facts."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    mixture = run_dir / "mixture.yaml"
    here = Path.cwd()
    shown = mixture.relative_to(here) if mixture.is_absolute() and mixture.is_relative_to(here) else mixture
    tail = f"launch/pretrain.py --config configs/pretrain.yaml --mixture {shlex.quote(str(shown))}"
    commands = (f"python {tail}", f"torchrun --nproc-per-node 8 {tail}", f"deepspeed {tail}")
    return {"versions": versions, "commands": commands, "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}


def _render(template: str, context: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(cell=markdown_cell, minus=minus)
    environment.globals["count"] = count
    return environment.get_template(template).render(context)


def _plain(value: Any) -> Any:
    """The same value in JSON's terms: dataclasses to dicts, numpy to Python, NaN and infinity to None."""
    if isinstance(value, Comparison | Agreement):
        return {name: _plain(item) for name, item in vars(value).items()}
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
