"""The best mixture under the caps: solved exactly where the surrogate allows, and reported with what it is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from regmix_search import certainty
from regmix_search.config import OptimumConfig
from regmix_search.designs import control_mixtures
from regmix_search.fits import Target, fit_chosen
from regmix_search.goals import Goal, parse_goal
from regmix_search.objective import Objective, duality_gap
from regmix_search.reduction import Reduction, Slice
from regmix_search.region import Region, build_region
from regmix_search.simulation import simulate_top
from regmix_search.solver import MINIMUM, pareto_front, solve
from regmix_search.space import SUM_TOLERANCE, FloatArray, Space
from regmix_search.surrogates import Surrogate
from regmix_search.tables import Runs

AT_CAP = 1e-6
NEAREST_QUANTILE = 0.95
RIVAL = 1.1  # times the chosen surrogate's cross-validated RMSE: what RegMix's laws and processes differ by


def sampled_region(weights: FloatArray, sample: FloatArray) -> tuple[float, float, list[int]]:
    """(L1 distance to the nearest mixture of `sample`, its 95 % quantile inside the sample, domains beyond).

    Inside the region: no farther from a sampled mixture than they are from each other, and no domain beyond, which is
    one that is heavier than in any sampled mixture (by more than .01).
    """
    distinct = np.unique(np.round(sample, 9), axis=0)
    apart = cdist(distinct, distinct, "cityblock")
    np.fill_diagonal(apart, np.inf)
    usual = float(np.quantile(apart.min(axis=1), NEAREST_QUANTILE))
    nearest = float(np.abs(distinct - weights).sum(axis=1).min())
    return nearest, usual, np.flatnonzero(weights > distinct.max(axis=0) + 0.01).tolist()


def find_optimum(
    space: Space,
    runs: Runs,
    fit: Mapping[str, Any],
    target: Target | None = None,
    minimum: float = MINIMUM,
    seed: int = 0,
    settings: OptimumConfig | None = None,
    opinions: Sequence[str] = (),
    reduction: Reduction | None = None,
) -> dict[str, Any]:
    """The content of optimum.json: the best mixture under caps and bounds for `target` (fit.json's when None).

    Surrogates are those that fit.json chose, fitted to the rows it names. Losses in nats per token. opinions: further
    surrogates whose predictions stand beside, besides fit.json's candidates. reduction: ratios that the optimum keeps.
    """
    if tuple(space.domains) != runs.mixed.domains:
        raise ValueError(
            f"space.json has domains {list(space.domains)}, the runs {list(runs.mixed.domains)}: same names and order"
        )
    settings = settings or OptimumConfig()
    goal = parse_goal(fit["target"] if target is None else target, fit["targets"])
    train = runs.select(fit["train_index"])
    sample = train.weights[:, : len(space.domains)]  # without text that is gone: such rows sum to less than 1
    models = {name: fit_chosen(runs, fit, name) for name in fit["targets"]}
    prior = build_region(space, settings.bounds).pull_in(space.prior[None])[0]
    whole = build_region(space, settings.bounds).known_only(sample)
    region = whole if reduction is None else reduction.region(space, settings.bounds).known_only(sample)
    objective = _objective(goal, models, prior, settings)
    weights = _solve(objective, region, space.prior, sample, minimum, seed, settings)
    free = solve(objective, region.lift_caps(space.caps), space.prior, sample, minimum, seed)
    observed = goal.of(train.losses)
    interval = certainty.calibrated(objective, goal, fit["targets"])
    asked = _opinions(runs, fit, goal, opinions)
    rivals = tuple(asked[name] for name in _rivals(fit, goal))
    refits = replace(certainty.refit(objective, goal.shares, train, seed, settings.bootstraps), rivals=rivals)
    result = {
        "target": goal.to_json(),
        "weights": space.named(weights),
        "epochs": space.epochs(weights),
        "caps": space.named(space.caps),
        "at_cap": [d for d, w, c in zip(space.domains, weights, space.caps, strict=True) if c - AT_CAP <= w and c < 1],
        "predicted": {name: float(model.predict(weights[None])[0]) for name, model in models.items()},
        "prior_predicted": {name: float(model.predict(prior[None])[0]) for name, model in models.items()},
        "objective": {"predicted": objective.at(weights), "prior": objective.at(prior)},
        "interval90": interval.at(weights[None])[0].tolist(),
        "unconstrained": {"weights": space.named(free), "predicted": objective.at(free)},
        "best_observed": _best_observed(space, whole, train, observed),
        "second_opinion": {n: {"optimum": o.at(weights), "prior": o.at(prior)} for n, o in asked.items()},
        **_place(space, weights, train.weights),
        "method": settings.method,
        "duality_gap": duality_gap(objective, region, weights),
    }
    controls = {"prior": prior, **_controls(space, region, whole, objective, sample, result, seed)}
    result |= _surroundings(space, region, whole, interval, refits, weights, controls, result, seed)
    if settings.pareto:
        shown = {name: models[name] for name in goal.shares}
        front = pareto_front(shown, region, space.prior, sample, settings.pareto, seed)
        result["pareto"] = [point | {"weights": space.named(point["weights"])} for point in front]
    return {**result, "warnings": _warn(result, fit, goal, settings.max_worse)}


def _objective(goal: Goal, models: Mapping[str, Surrogate], prior: FloatArray, settings: OptimumConfig) -> Objective:
    ceilings: list[tuple[Surrogate, float]] = []
    if settings.max_worse is not None:
        ceilings = [(m, float(m.predict(prior[None])[0]) + settings.max_worse) for m in models.values()]
    terms = tuple((share, models[name]) for name, share in goal.shares.items())
    return Objective(terms, goal.worst, settings.kl, np.maximum(prior, 1e-9), tuple(ceilings))


def _solve(
    objective: Objective,
    region: Region,
    prior: FloatArray,
    sample: FloatArray,
    minimum: float,
    seed: int,
    settings: OptimumConfig,
) -> FloatArray:
    if settings.method == "simulate" and isinstance(region, Slice):
        small = region.reduction
        facts = (small.reduce(prior), small.reduce(sample), minimum, seed, settings)
        return small.expand(_solve(small.reduced(objective), region.inside, *facts))
    if settings.method == "simulate":
        return simulate_top(objective, prior, settings.samples, settings.top, seed, region)
    return solve(objective, region, prior, sample, minimum, seed)


def _controls(
    space: Space,
    region: Region,
    whole: Region,
    objective: Objective,
    sample: FloatArray,
    found: Mapping[str, Any],
    seed: int,
) -> dict[str, FloatArray]:
    """Mixtures that the optimum is compared with, beside the prior.

    Where domains keep an earlier ratio: `kept`, which has nothing else; and, if runs vary them all, the optimum with
    no ratio kept.
    """
    controls = {
        **control_mixtures(space, whole),
        "best_observed": np.array(list(found["best_observed"]["weights"].values())),
        "unconstrained": np.array(list(found["unconstrained"]["weights"].values())),
    }
    if isinstance(region, Slice):
        controls["kept"] = region.reduction.expand(np.eye(1, len(region.caps))[0])
        if np.linalg.matrix_rank(sample - sample.mean(axis=0), 1e-6) >= len(space.domains) - 1:
            controls["ratio_free"] = solve(objective, whole, space.prior, sample, seed=seed)
    return controls


def _surroundings(
    space: Space,
    region: Region,
    whole: Region,
    interval: certainty.Interval,
    refits: certainty.Refits,
    weights: FloatArray,
    controls: Mapping[str, FloatArray],
    found: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """What stands beside the optimum: its interval, mixtures that tie with it, controls, the gain over the prior."""
    near, objective = certainty.candidates(region, weights, seed), interval.objective
    again = certainty.solve_again(refits, region, space.prior, near, seed)
    spread = np.quantile(again, certainty.LEVELS, axis=0).T.tolist() if len(again) else []
    rows = np.array(list(controls.values()))
    ties, loss = certainty.tied(refits, rows, weights), objective.predict(rows)
    intervals = interval.at(rows)
    gain = certainty.predicted_gain(
        refits, weights, controls["prior"], found["objective"]["prior"] - found["objective"]["predicted"]
    )
    sure = not refits.objectives or gain["interval90"][0] > 0
    gain["significant"] = bool(sure and found["interval90"][1] < found["objective"]["prior"])
    return {
        "weights_interval90": dict(zip(space.domains, spread, strict=True)) if spread else {},
        "left_to_gain": certainty.left_to_gain(refits, again, region, space.prior, weights, seed),
        "near_ties": certainty.near_ties(objective, refits, np.vstack([near, again]), weights, space.domains),
        "controls": {
            name: {
                "weights": space.named(rows[i]),
                "predicted": float(loss[i]),
                "interval90": intervals[i].tolist(),
                "ties_with_optimum": bool(ties[i]),
                "obeys_bounds": whole.holds(rows[i], 1e-6),
            }
            for i, name in enumerate(controls)
        },
        "gain": {**gain, "tokens_saved": certainty.tokens_saved(gain["nats"], space.target_tokens)},
    }


def _best_observed(space: Space, region: Region, train: Runs, observed: FloatArray) -> dict[str, Any]:
    """The run of lowest loss among those that obey caps and bounds; among all when none does."""
    rows = train.weights[:, : len(space.domains)]
    obeys = np.array([region.holds(row) for row in rows])
    row = int(np.argmin(np.where(obeys if obeys.any() else rows.sum(axis=1) > 1 - SUM_TOLERANCE, observed, np.inf)))
    loss = float(observed[row])
    weights = space.named(rows[row])
    return {"index": train.index[row], "weights": weights, "loss": loss, "obeys_caps": bool(obeys[row])}


def _place(space: Space, weights: FloatArray, sample: FloatArray) -> dict[str, Any]:
    """Where the optimum lies among the mixtures that were run."""
    nearest, usual, beyond = sampled_region(np.append(weights, np.zeros(sample.shape[1] - len(weights))), sample)
    return {
        "inside_sampled_region": nearest <= usual and not beyond,
        "beyond": {space.domains[i]: float(sample[:, i].max()) for i in beyond},
        "distance": nearest,
        "usual_distance": usual,
    }


def _opinions(runs: Runs, fit: Mapping[str, Any], goal: Goal, more: Sequence[str]) -> dict[str, Objective]:
    """The goal by every candidate surrogate: agreement at the optimum is evidence, a gap a warning."""
    shares = goal.shares.items()
    names = dict.fromkeys([*fit["targets"][next(iter(goal.shares))]["candidates"], *more])
    return {n: Objective(tuple((s, fit_chosen(runs, fit, t, n)) for t, s in shares), goal.worst) for n in names}


def _rivals(fit: Mapping[str, Any], goal: Goal) -> list[str]:
    """Candidates that predict every loss of the goal about as well as the chosen one."""
    entries = [fit["targets"][name] for name in goal.shares]
    names = [set(entry["candidates"]) - {entry["chosen"]} for entry in entries]

    def close(name: str) -> bool:
        allowed = [RIVAL * float(entry["candidates"][entry["chosen"]]["rmse"]) for entry in entries]
        return all(entry["candidates"][name]["rmse"] <= most for entry, most in zip(entries, allowed, strict=True))

    return sorted(filter(close, set.intersection(*names)))


def _warn(result: Mapping[str, Any], fit: Mapping[str, Any], goal: Goal, max_worse: float | None) -> list[str]:
    others = set(fit["targets"]) - set(goal.shares)
    warnings = [w for w in fit["warnings"] if w.split(":")[0] not in others]
    if not result["inside_sampled_region"]:
        beyond = [f"{d} had at most {seen:.3f} in any run" for d, seen in result["beyond"].items()]
        if result["distance"] > result["usual_distance"]:
            beyond.append(f"nearest run at L1 {result['distance']:.3f}, usual {result['usual_distance']:.3f}")
        warnings.append(
            f"the optimum is outside the sampled region ({'; '.join(beyond)}): its prediction is extrapolation, run "
            "proxies near it"
        )
    if result["at_cap"]:
        cost = result["objective"]["predicted"] - result["unconstrained"]["predicted"]
        warnings.append(
            f"{', '.join(result['at_cap'])} at the cap: more text of them, or more epochs, would be worth "
            f"{cost:.4f} nats by the surrogate"
        )
    if not result["gain"]["significant"]:
        low, high = result["gain"]["interval90"]
        paired = "" if low is None else f"; refits put the gain between {low:.4f} and {high:.4f}"
        warnings.append(
            f"the prediction alone shows no significant gain: the prior's {result['objective']['prior']:.4f} against "
            f"the optimum's 90 % interval, {result['interval90'][0]:.4f} to {result['interval90'][1]:.4f}{paired}"
        )
    worse = {t: result["predicted"][t] - prior for t, prior in result["prior_predicted"].items()}
    if max_worse is not None and (broken := [t for t, by in worse.items() if by > max_worse + 1e-4]):
        warnings.append(f"{', '.join(broken)} get worse than the prior by more than {max_worse:g} all the same")
    if result["interval90"][0] > result["best_observed"]["loss"]:
        warnings.append(
            f"run {result['best_observed']['index']} was observed at {result['best_observed']['loss']:.4f}, below the "
            "optimum's whole interval: the surrogate misses something there"
        )
    against = [n for n, p in result["second_opinion"].items() if p["optimum"] >= p["prior"]]
    if against:
        warnings.append(
            f"{', '.join(against)} predicts no gain over the prior at this optimum: the surrogates disagree"
        )
    return warnings
