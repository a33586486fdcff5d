"""From a table of runs to fit.json: a surrogate chosen for every target, its honest scores, the noise of one run."""

from __future__ import annotations

import math
import multiprocessing
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from regmix_search.choice import choose
from regmix_search.goals import Goal, find_loss, parse_goal
from regmix_search.machine import cores
from regmix_search.reduction import today
from regmix_search.space import FloatArray
from regmix_search.surrogates import SURROGATES, Surrogate, build_surrogate, group_mixtures, score
from regmix_search.tables import Runs, some

Target = str | Mapping[str, float] | Goal  # one loss, or several weighed together
SPREAD = 6  # losses from which processes of their own are worth the seconds that they take to start
BETTER_RUNS = 5  # runs a domain from which the laws are at their best (RegMix's runs: 96 for 17 domains)


def fit_workers(losses: int) -> int:
    """Processes to fit so many losses in: one a core, or this one where others would take longer to start."""
    return cores() if losses >= SPREAD else 1


def check_runs_tell(runs: Runs, names: Sequence[str], fixed: Sequence[str] = ()) -> None:
    """ValueError for a domain that never varies (unless it is `fixed`), or for fewer runs than a model needs."""
    for name in names:
        build_surrogate(name)  # refuses unknown names
    still = np.ptp(runs.weights, axis=0) < 1e-9
    idle = [f"{d} (always {w:.4g})" for d, w, s in zip(runs.domains, runs.weights[0], still, strict=True) if s]
    idle = [text for text in idle if text.split(" ")[0] not in fixed]
    if idle:
        raise ValueError(
            f"domains that never vary in these {len(runs.index)} runs: {', '.join(idle)}. Nothing can be said about "
            "them: use runs in which they do, leave out domains that are always 0, or fix them "
            "(--set optimum.bounds='[NAME=W]')"
        )
    mixtures, spread = int(group_mixtures(runs.weights).max()) + 1, runs.weights - runs.weights.mean(axis=0)
    rank = int(np.linalg.matrix_rank(spread, 1e-6))  # domains that always keep one ratio count as one
    check_enough(mixtures, rank + 1 if rank < mixtures - 1 else len(runs.domains) - int(still.sum()))


def check_enough(mixtures: int, domains: int) -> None:
    """ValueError for fewer different mixtures than a model of so many domains needs."""
    if mixtures < domains + 2:
        raise ValueError(
            f"{mixtures} different mixtures for {domains} domains: a fit needs at least {domains + 2}, better "
            f"{BETTER_RUNS * domains}; add runs, or merge domains"
        )


def split_holdout(runs: Runs, n: int, seed: int) -> tuple[int, ...]:
    """Indices of n runs to hold back, picked among mixtures that were run once. ValueError when too few are left."""
    group = group_mixtures(runs.weights)
    once = np.flatnonzero(np.bincount(group)[group] == 1)
    if n < 0 or n > len(once) - 2:
        raise ValueError(
            f"cannot hold back {n} of {len(once)} mixtures that were run once: at least 2 must be left to fit"
        )
    picks = np.random.default_rng([seed, zlib.crc32(b"holdout")]).permutation(once)[:n]
    return tuple(sorted(runs.index[i] for i in picks))


def run_noise(runs: Runs) -> dict[str, float]:
    """Standard deviation of one run around its mixture's mean, per target, pooled over repeats; {} without any."""
    group = group_mixtures(runs.weights)
    counts = np.bincount(group)
    freedom = len(group) - len(counts)
    if freedom == 0:
        return {}
    noise = {}
    for target, losses in runs.losses.items():
        means = np.bincount(group, weights=losses) / counts
        noise[target] = math.sqrt(float(np.sum((losses - means[group]) ** 2)) / freedom)
    return noise


def fit_targets(
    runs: Runs,
    target: Target,
    targets: Sequence[str] | None = None,
    names: Sequence[str] = SURROGATES,
    holdout: Sequence[int] = (),
    seed: int = 0,
    folds: int = 5,
    repeats: int | None = None,
    larger: bool = False,
    workers: int = 1,
    fixed: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of fit.json: for each of `targets` (all losses when None) a choice made without the held-back runs.

    target is what the search minimises; holdout are run indices that neither the choice nor any fit may see. A
    mixture that is both held back and fitted is an error: its score would be flattering. Losses are fitted one by one,
    to be combined afterwards: fitting a mean directly ranks far worse. repeats and larger are `choose`'s; workers are
    processes, which change no figure; fixed are domains that need not vary.
    """
    goal = parse_goal(target, runs.losses)
    others = [find_loss(name, runs.losses) for name in (runs.losses if targets is None else targets)]
    held, train = runs.select(holdout), runs.without(holdout)
    _check_disjoint(train, held)
    check_runs_tell(train, names, fixed)
    wanted, warnings = list(dict.fromkeys([*goal.shares, *others])), []

    tasks = [(train, held, name, (names, seed, folds, repeats, larger, train.once)) for name in wanted]
    if min(workers, len(wanted)) > 1:
        spawn = multiprocessing.get_context("spawn")  # fork would copy thread pools in unknown state
        with ProcessPoolExecutor(min(workers, len(wanted)), spawn, _use_one_thread) as pool:
            found = dict(zip(wanted, pool.map(_fit_target, *zip(*tasks, strict=True)), strict=True))
    else:
        found = {task[2]: _fit_target(*task) for task in tasks}
    fits = {name: entry for name, (entry, _) in found.items()}
    for name, (_, doubts) in found.items():
        warnings += [f"{name}: {doubt}" for doubt in doubts]
    noise, warnings = run_noise(train), [*warnings, *train.notes]
    if not noise:
        warnings.append("no mixture was run twice: the noise of one run is unknown, and so is whether a gain is real")
    if runs.unfinished:
        warnings.append(f"{len(runs.unfinished)} mixtures have no losses and were left out: {some(runs.unfinished)}")
    return {
        "target": goal.to_json(),
        "n_train": len(train.index),
        "n_holdout": len(held.index),
        "seed": seed,
        "train_index": list(train.index),
        "domains": list(runs.domains),
        "noise": noise,
        "targets": fits,
        "warnings": warnings,
    }


def _use_one_thread() -> None:
    """In a worker: more of them would wait for each other. It is of this module so that numpy is there to be told."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for what is loaded later
    threadpool_limits(1)


def fit_chosen(runs: Runs, fit: Mapping[str, Any], name: str, surrogate: str | None = None) -> Surrogate:
    """The surrogate that fit.json chose for a target (or another, by name), fitted to the rows it was chosen on.

    It predicts mixtures of today's domains, without text that is gone.
    """
    train = runs.select(fit["train_index"])
    built = build_surrogate(surrogate or fit["targets"][name]["chosen"], runs.once)
    return today(built.fit(train.weights, train.losses[name], fit["seed"]), runs)


def _fit_target(train: Runs, held: Runs, name: str, how: tuple[Any, ...]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A target's entry in fit.json, and its warnings. how: what `choose` takes after the losses."""
    losses = train.losses[name]
    choice = choose(train.weights, losses, *how)
    model = build_surrogate(choice.chosen, train.once).fit(train.weights, losses, how[1])
    entry = {
        "chosen": choice.chosen,
        "why": choice.why,
        "candidates": choice.candidates,
        "nested": choice.nested,
        "scale90": choice.scale90,
        "holdout": _judge(model, held, name),
        "cv_predicted": choice.cv_predicted.tolist(),
        "cv_deviation": choice.cv_deviation.tolist(),
        "nested_predicted": choice.nested_predicted.tolist(),
        "nested_deviation": choice.nested_deviation.tolist(),
        "true": losses.tolist(),
    }
    return entry, choice.warnings


def _judge(model: Surrogate, held: Runs, name: str) -> dict[str, Any]:
    """Scores on held-back runs; correlations are null below 3 of them, where they say nothing."""
    empty: dict[str, float | None] = dict.fromkeys(("spearman", "pearson", "mse", "rmse"))
    predicted: FloatArray = model.predict(held.weights) if held.index else np.empty(0)
    scores = score(predicted, held.losses[name]) if held.index else empty
    if len(held.index) < 3:
        scores = {**scores, "spearman": None, "pearson": None}
    true = held.losses[name].tolist()
    return {**scores, "index": list(held.index), "predicted": predicted.tolist(), "true": true}


def _check_disjoint(train: Runs, held: Runs) -> None:
    group = group_mixtures(np.vstack([train.weights, held.weights]))
    fitted = set(group[: len(train.index)].tolist())
    both = [i for i, g in zip(held.index, group[len(train.index) :].tolist(), strict=True) if g in fitted]
    if both:
        raise ValueError(f"held-back runs {both} have a mixture that is also fitted; hold back all of its runs or none")
