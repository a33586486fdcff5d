"""Fit and optimize from tables of finished runs, whoever trained them: no shards, no training.

`fit_stage` and `optimize_stage` are what `--stage fit` and `--stage optimize` do with --mixtures and --losses;
`read_study`, `study_fit` and `optimize.find_optimum` are the same in Python.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import yaml

from megatron_lite.files import atomic_write, atomic_write_json
from regmix_search.choice import coverage90
from regmix_search.config import SearchConfig
from regmix_search.exports import name_shards, write_exports
from regmix_search.fits import fit_chosen, fit_targets, fit_workers
from regmix_search.freshness import Stage, digest
from regmix_search.goals import Goal, parse_goal
from regmix_search.region import fixed_domains
from regmix_search.solution import provenance, solve_runs
from regmix_search.space import FloatArray
from regmix_search.study_files import StudyFiles, read_space, read_study
from regmix_search.surrogates import SURROGATES, score
from regmix_search.tables import Runs, write_losses, write_mixtures


def study_fit(
    runs: Runs,
    target: str | Mapping[str, float] | Goal,
    surrogates: Sequence[str] = (),
    test: Runs | None = None,
    seed: int = 0,
    folds: int = 5,
    extra: Sequence[str] = (),
    fixed: Sequence[str] = (),
    larger: bool = False,
    workers: int = 1,
) -> dict[str, Any]:
    """The content of fit.json, with `summary` as --json prints it; surrogates empty: chosen by cross-validation.

    Each loss of the target is fitted by itself (the mean fitted directly is far worse); extra: losses to fit beside;
    fixed: domains that need not vary. larger and workers are fit_targets'.
    """
    names, start = tuple(surrogates) or SURROGATES, time.perf_counter()
    goal = parse_goal(target, runs.losses)
    wanted = [*goal.shares, *(name for name in extra if name not in goal.shares)]
    how: dict[str, Any] = {"seed": seed, "folds": folds, "larger": larger, "workers": workers, "fixed": fixed}
    fit = fit_targets(runs, goal, wanted, names=names, **how)
    seconds = time.perf_counter() - start
    fit["summary"] = summarise(fit, goal, runs, test, seconds)
    return fit


def summarise(fit: Mapping[str, Any], goal: Goal, runs: Runs, test: Runs | None, seconds: float) -> dict[str, Any]:
    """What --json prints about a fit: correlations in -1..1, squared errors in nats^2, regret in nats.

    cv is nested: the score of choosing and fitting, not of the choice. Coverage of several losses together is CV+.
    """
    entries = {name: fit["targets"][name] for name in goal.shares}
    chosen = {name: entry["chosen"] for name, entry in entries.items()}
    true = goal.of({name: entry["true"] for name, entry in entries.items()})
    predicted = goal.of({name: entry["nested_predicted"] for name, entry in entries.items()})
    scores = score(predicted, true)
    n = len(true)  # several losses: each run's interval from all the others' out-of-fold errors (CV+, Barber 2021)
    inside = coverage90(predicted - true, np.ones(n), np.arange(n))
    if len(entries) == 1:
        inside = next(iter(entries.values()))["nested"]["coverage90"]
    result: dict[str, Any] = {
        "surrogate": chosen[next(iter(chosen))] if len(set(chosen.values())) == 1 else chosen,
        "target": goal.to_json(),
        "n_train": fit["n_train"],
        "cv": {key: scores[key] for key in ("spearman", "pearson", "mse")}
        | {"coverage90": inside if math.isfinite(inside) else None},
        "test": None,
        "seconds": round(seconds, 3),
        "why": {name: entry["why"] for name, entry in entries.items()},
        "warnings": fit["warnings"],
    }
    if test is not None and test.index:
        found = goal.of({name: fit_chosen(runs, fit, name).predict(test.weights) for name in goal.shares})
        result["test"] = judge(found, goal.of({name: _column(test, name) for name in goal.shares}))
    return result


def judge(predicted: FloatArray, true: FloatArray) -> dict[str, float]:
    """Scores of predictions [n]; regret_at_1: loss of the run that is predicted best, above the best run's."""
    scores = score(predicted, true)
    regret = float(true[int(np.argmin(predicted))] - true.min())
    return {key: scores[key] for key in ("spearman", "pearson", "mse")} | {"regret_at_1": regret}


def fit_stage(config: SearchConfig, files: StudyFiles) -> Stage:
    """fit.json from tables. Nothing is held back: what is not in --test-mixtures is fitted and cross-validated."""
    out = config.run_dir

    def make() -> str:
        runs, test = read_study(files, config.seed)
        extra, fixed = runs.losses if config.optimum.max_worse is not None else (), fixed_domains(config.optimum.bounds)
        names, folds = config.fit.surrogates, config.fit.folds
        larger = config.train.main.model != config.proxy.model
        losses = len({*parse_goal(config.fit.target, runs.losses).shares, *extra})
        how = (config.seed, folds, list(extra), fixed, larger, fit_workers(losses))
        fit = study_fit(runs, config.fit.target, names, test, *how)
        atomic_write_json(out / "fit.json", fit)
        return describe(fit["summary"])

    inputs = {**files.digests(), "seed": config.seed, **asdict(config.fit)}
    inputs |= {"max_worse": config.optimum.max_worse, "bounds": config.optimum.bounds}
    return Stage("fit", inputs, (out / "fit.json",), make)


def optimize_stage(config: SearchConfig, files: StudyFiles) -> Stage:
    """optimum.json, mixture.yaml and exports/; see `read_space` for what bounds the weights."""
    out = config.run_dir

    def make() -> str:
        runs, _ = read_study(files, config.seed)
        space, mixed = read_space(files.space, runs.mixed, config), runs.mixed
        optimum, text = solve_runs(out, space, runs, config)
        named = any(isinstance(name, str) for name in mixed.index)
        numbers = range(len(mixed.index)) if named else mixed.index
        write_mixtures(out / "mixtures.csv", numbers, mixed.domains, mixed.weights)  # what the report is drawn from
        write_losses(out / "losses.csv", numbers, mixed.losses)
        atomic_write_json(out / "space.json", space.to_json())
        train = {f"train_{domain}": weight for domain, weight in optimum["weights"].items()}
        facts = provenance(config, optimum, out / "fit.json")
        content = {"version": 1, "train": train, "epochs": optimum["epochs"], "provenance": facts}
        atomic_write(out / "mixture.yaml", yaml.safe_dump(content, sort_keys=False))
        tokens = {} if space.tokens is None else {name: int(n) for name, n in space.named(space.tokens).items()}
        where = config.shards.data_dir or ""
        write_exports(name_shards(optimum["weights"], where, None, tokens, space.target_tokens), out / "exports")
        return text

    inputs = {**files.digests(), "seed": config.seed, "minimum": config.mixtures.minimum}
    inputs |= {"target_tokens": config.target_tokens, "max_epochs": config.mixtures.max_epochs}
    inputs |= {"fit": digest(out / "fit.json", "fit"), "optimum": asdict(config.optimum)}
    names = ("optimum.json", "mixture.yaml", "exports/epochs.csv", "mixtures.csv", "losses.csv", "space.json")
    outputs = tuple(out / name for name in names)
    return Stage("optimize", inputs, outputs, make)


def report_stage(config: SearchConfig) -> Stage:
    """report.html, with the design, the fit and the optimum; runs that have names are numbered there."""
    out = config.run_dir

    def make() -> str:
        from regmix_search.report import write_report

        return str(write_report(out).get("verdict", ""))

    names = ("fit.json", "optimum.json", "space.json", "mixtures.csv", "losses.csv")
    inputs = {name: digest(out / name, "optimize") for name in names}
    return Stage("report", inputs, (out / "report.html", out / "report.md"), make)


def describe(summary: Mapping[str, Any]) -> str:
    """A summary in a few lines, for people."""
    cv, test = summary["cv"], summary["test"]
    names = summary["surrogate"] if isinstance(summary["surrogate"], str) else "one surrogate a loss"
    text = f"{summary['target']}: {names} on {summary['n_train']} runs, cross-validated Spearman {cv['spearman']:.4f}, "
    text += f"MSE {cv['mse']:.3g}"
    text += "" if cv["coverage90"] is None else f", 90 % intervals cover {cv['coverage90']:.0%}"
    if test is not None:
        text += f"; test runs: Spearman {test['spearman']:.4f}, regret {test['regret_at_1']:.4f} nats"
    why = [f"\n  {why}" for why in summary["why"].values()] if len(summary["why"]) == 1 else []
    return "".join([text, *why, *(f"\n  warning: {warning}" for warning in summary["warnings"])])


def _column(test: Runs, name: str) -> FloatArray:
    if name not in test.losses:
        raise ValueError(f"the test runs have no loss {name!r}; they have {', '.join(test.losses)}")
    return test.losses[name]
