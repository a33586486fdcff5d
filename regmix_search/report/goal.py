"""A goal of several losses as one loss more, which the whole report then follows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from regmix_search.goals import Goal, parse_goal
from regmix_search.report.evidence import Evidence, finite
from regmix_search.report.verdict import pooled_sd

NAMED = 3  # losses of a weighted goal that its name lists


def follow_goal(evidence: Evidence) -> Evidence:
    """The same evidence with the goal among the losses, where the search minimises several of them together.

    Every proxy and model that has all losses of the goal gets the goal's as well; fit.json gets an entry for it, made
    of its losses' entries, optimum.json its predictions. A goal that cannot be read leaves the evidence as it is.
    """
    fitted = evidence.fit.get("targets") or {}
    sources = (evidence.fit, evidence.optimum, evidence.config.get("fit") or {})
    target = next((source["target"] for source in sources if source.get("target")), "")
    try:
        goal = parse_goal(target, fitted or evidence.targets)
    except (ValueError, AttributeError):
        return evidence
    if len(goal.shares) < 2:
        return evidence
    name = name_goal(goal)
    trials = tuple(replace(t, losses=_with_goal(t.losses, goal, name)) for t in evidence.trials)
    runs = tuple(replace(run, losses=_with_goal(run.losses, goal, name)) for run in evidence.runs)
    objective, optimum = evidence.optimum.get("objective") or {}, evidence.optimum
    if objective:
        sides = {"predicted": "predicted", "prior_predicted": "prior"}
        told = {key: {**(optimum.get(key) or {}), name: objective.get(side)} for key, side in sides.items()}
        optimum = {**optimum, **told}
    by_mixture: dict[Any, list[float]] = {}
    for trial in trials:
        if name in trial.losses and trial.kind != "holdout":
            by_mixture.setdefault(tuple(trial.weights.items()), []).append(trial.losses[name])
    noise = {**(evidence.fit.get("noise") or {}), name: pooled_sd(by_mixture)[0]}
    entries = {name: _combine(goal, fitted), **fitted} if fitted else {}
    fit = {**evidence.fit, "target": name, "targets": entries, "noise": noise}
    return replace(evidence, trials=trials, runs=runs, fit=fit, optimum=optimum)


def name_goal(goal: Goal) -> str:
    """What the report calls a goal of several losses."""
    if goal.name:
        return f"{goal.name} of {len(goal.shares)} losses"
    if len(goal.shares) > NAMED:
        return f"weighted mean of {len(goal.shares)} losses"
    return " + ".join(f"{share:.2g} {loss}" for loss, share in goal.shares.items())


def _with_goal(losses: dict[str, float], goal: Goal, name: str) -> dict[str, float]:
    """The goal first, then the losses; without it where one of its losses is not there."""
    if not goal.shares.keys() <= losses.keys():
        return losses
    return {name: float(goal.of({loss: [losses[loss]] for loss in goal.shares})[0]), **losses}


def _combine(goal: Goal, fitted: Mapping[str, Any]) -> dict[str, Any]:
    """The goal's entry in fit.json: predictions and truths combined run by run; scores stay with the losses."""
    entries = [fitted[loss] for loss in goal.shares]
    chosen = dict.fromkeys(str(entry.get("chosen") or "") for entry in entries)
    held = [entry.get("holdout") or {} for entry in entries]
    asked = entries[0].get("candidates") or {}
    return {
        "chosen": next(iter(chosen)) if len(chosen) == 1 else "",
        "why": f"for each of the {len(entries)} losses by itself",
        "candidates": {name: {} for name in asked if all(name in (entry.get("candidates") or {}) for entry in entries)},
        **{key: _column(goal, [entry.get(key) for entry in entries]) for key in ("cv_predicted", "true")},
        "holdout": {key: _column(goal, [side.get(key) for side in held]) for key in ("predicted", "true")},
    }


def _column(goal: Goal, columns: Sequence[Sequence[Any] | None]) -> list[float]:
    """The goal [n] of columns [n]; empty unless all are there."""
    if not all(columns) or len({len(column or ()) for column in columns}) > 1:
        return []
    values = [[finite(value) for value in column or ()] for column in columns]
    found: list[float] = goal.of(dict(zip(goal.shares, values, strict=True))).tolist()
    return found
