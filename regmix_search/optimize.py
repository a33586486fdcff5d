"""The best mixture under the caps: solved exactly where the surrogate allows, and reported with what it is worth."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

from regmix_search.fits import Target, fit_chosen
from regmix_search.goals import parse_goal
from regmix_search.space import FloatArray, Space, bound, draw_mixtures
from regmix_search.surrogates import SmoothSurrogate, Surrogate, build_surrogate
from regmix_search.tables import Runs

MINIMUM = 2e-4  # RegMix's smallest weight: below it a domain is left out
TOP = 128  # simulated mixtures that are averaged, as in RegMix's notebook
POOL = 10_000  # simulated mixtures a round
ROUNDS = 5  # each around the last answer, 5 times narrower: one round ends .2-.5 sd of the losses too high (10 domains)
BOOTSTRAPS = 20
AT_CAP = 1e-6
NEAREST_QUANTILE = 0.95


@dataclass(frozen=True, eq=False)
class Objective:
    """A weighted mean of surrogates, shares summing to 1: what is minimised."""

    terms: tuple[tuple[float, Surrogate], ...]

    def predict(self, weights: FloatArray) -> FloatArray:
        """Losses [m] of mixtures [m, k]."""
        return np.asarray(sum(share * model.predict(weights) for share, model in self.terms))

    def at(self, weights: FloatArray) -> float:
        """Loss of one mixture [k]."""
        return float(self.predict(weights[None])[0])

    def slope(self, weights: FloatArray) -> FloatArray:
        """Gradient [k] at one mixture [k]; every term must be smooth."""
        slopes = [s * m.gradient(weights[None])[0] for s, m in self.terms if isinstance(m, SmoothSurrogate)]
        assert len(slopes) == len(self.terms), "slope of an objective with a surrogate that has none"
        return np.asarray(np.sum(slopes, axis=0))


def solve(
    objective: Objective,
    caps: FloatArray,
    prior: FloatArray,
    sample: FloatArray,
    minimum: float = MINIMUM,
    seed: int = 0,
) -> FloatArray:
    """The weights [k] of lowest predicted loss with 0 <= w <= caps and sum 1; weights below `minimum` are set to 0.

    One smooth surrogate: its own exact solution. Several: SLSQP from many starts. Any without slopes: simulation as in
    RegMix, top-128 average, repeated around the answer. sample [n, k]: mixtures to start from. Deterministic in seed.
    """
    if all(isinstance(model, SmoothSurrogate) for _, model in objective.terms):
        first = objective.terms[0][1]
        if len(objective.terms) == 1 and isinstance(first, SmoothSurrogate):
            weights = first.argmin(caps)
        else:
            weights = _solve_slsqp(objective, caps, _starts(objective, caps, prior, sample))
    else:
        weights = _simulate(objective, caps, prior, sample, seed)
    return _drop_small(weights, caps, minimum)


def _starts(objective: Objective, caps: FloatArray, prior: FloatArray, sample: FloatArray) -> FloatArray:
    """Prior, uniform, the five best mixtures known, and every domain filled to its cap."""
    k = len(caps)
    corners = np.eye(k) + 1e-6 * prior  # what the cap turns away goes to the others in proportion to the prior
    known = bound(sample + 1e-6 * prior, caps)
    best = known[np.argsort(objective.predict(known), kind="stable")[:5]]
    return np.vstack([bound(np.vstack([prior, np.full(k, 1 / k), corners]), caps), best])


def _solve_slsqp(objective: Objective, caps: FloatArray, starts: FloatArray) -> FloatArray:
    best: FloatArray = starts[0]
    lowest = np.inf
    for start in starts:
        found = minimize(
            lambda w: objective.at(w),
            start,
            jac=lambda w: objective.slope(w),
            bounds=[(0.0, cap) for cap in caps],
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones_like(w)},
            method="SLSQP",
            options={"ftol": 1e-10, "maxiter": 300},
        )
        weights = np.clip(found.x, 0.0, caps)
        if not np.isfinite(weights).all() or not _holds(weights, caps):
            continue  # SLSQP lost its way from this start
        weights = bound(weights, caps)
        if (value := objective.at(weights)) < lowest:
            best, lowest = weights, value
    return best


def _simulate(objective: Objective, caps: FloatArray, prior: FloatArray, sample: FloatArray, seed: int) -> FloatArray:
    """Mean of the best simulated mixtures: feasible because the caps are convex, and steadier than the single best."""
    rng = np.random.default_rng([seed, zlib.crc32(b"simulate")])
    pool = bound(sample + 1e-9 * prior, caps)
    centre, strengths = prior, np.geomspace(0.5, 20.0, 8)  # RegMix simulates at strength 1 around the prior
    for _ in range(ROUNDS):
        drawn = bound(draw_mixtures(centre, strengths, POOL, rng) + 1e-9 * prior, caps)
        pool = np.vstack([pool, drawn])
        pool = pool[np.argsort(objective.predict(pool), kind="stable")[:TOP]]
        centre, strengths = pool.mean(axis=0), strengths * 5
    return np.asarray(pool.mean(axis=0))


def _drop_small(weights: FloatArray, caps: FloatArray, minimum: float) -> FloatArray:
    kept = np.where(weights < minimum, 0.0, weights)
    return bound(kept if _holds(kept, caps) else weights, caps)


def _holds(weights: FloatArray, caps: FloatArray) -> bool:
    """Do the domains in use have room for a whole mixture?"""
    return bool(np.where(weights > 0, caps, 0.0).sum() >= 1 - 1e-12)


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


def interval90(
    objective: Objective, terms: Mapping[str, float], runs: Runs, residuals: FloatArray, weights: FloatArray, seed: int
) -> FloatArray:
    """90 % intervals [m, 2] for the loss that runs with these mixtures [m, k] would show, noise of one run included.

    5 % and 95 % quantiles of prediction + (refit on resampled runs - fit) + out-of-fold residual, over all pairs. The
    residuals hold noise and misfit where runs are; the refits add what the fit itself does not know at `weights`.
    Both hold some estimation error, so the interval errs wide; it knows nothing of errors outside the sampled region.
    """
    centre = objective.predict(weights)
    shifts = np.empty((BOOTSTRAPS, len(weights)))
    for i in range(BOOTSTRAPS):
        rows = np.random.default_rng([seed, zlib.crc32(b"bootstrap"), i]).integers(
            len(runs.index), size=len(runs.index)
        )
        refits = [
            (share, build_surrogate(model.name).fit(runs.weights[rows], runs.losses[target][rows], seed))
            for (share, model), target in zip(objective.terms, terms, strict=True)
        ]
        shifts[i] = Objective(tuple(refits)).predict(weights) - centre
    spread = shifts[:, None, :] + residuals[None, :, None]
    low, high = np.quantile(spread.reshape(-1, len(weights)), [0.05, 0.95], axis=0)
    return np.stack([centre + low, centre + high], axis=1)


def find_optimum(
    space: Space,
    runs: Runs,
    fit: Mapping[str, Any],
    target: Target | None = None,
    minimum: float = MINIMUM,
    seed: int = 0,
) -> dict[str, Any]:
    """The content of optimum.json: the best mixture under the caps for `target` (fit.json's when None).

    Surrogates are those that fit.json chose, fitted to the rows it names. Losses in nats per token.
    """
    if tuple(space.domains) != runs.domains:
        raise ValueError(
            f"space.json has domains {list(space.domains)}, the runs {list(runs.domains)}: same names and order"
        )
    target = fit["target"] if target is None else target
    terms = parse_goal(target, fit["targets"]).shares
    train = runs.select(fit["train_index"])
    models = {name: fit_chosen(runs, fit, name) for name in fit["targets"]}
    objective = Objective(tuple((share, models[name]) for name, share in terms.items()))
    known = train.weights.max(axis=0) > 0  # a domain that no run used gets no weight: no loss says what it does
    caps = np.where(known, space.caps, 0.0) if _holds(known * 1.0, space.caps) else space.caps
    weights = solve(objective, caps, space.prior, train.weights, minimum, seed)
    free = solve(objective, np.where(caps > 0, 1.0, 0.0), space.prior, train.weights, minimum, seed)
    prior = bound(space.prior, space.caps)
    observed = _combine(terms, train.losses)
    residuals = observed - _combine(terms, {t: np.array(fit["targets"][t]["cv_predicted"]) for t in terms})
    low, high = interval90(objective, terms, train, residuals, weights[None], seed)[0]
    nearest, usual, beyond = sampled_region(weights, train.weights)
    result = {
        "target": target if isinstance(target, str) else terms,
        "weights": space.named(weights),
        "epochs": space.epochs(weights),
        "caps": space.named(space.caps),
        "at_cap": [d for d, w, c in zip(space.domains, weights, space.caps, strict=True) if c - AT_CAP <= w and c < 1],
        "predicted": {name: float(model.predict(weights[None])[0]) for name, model in models.items()},
        "prior_predicted": {name: float(model.predict(prior[None])[0]) for name, model in models.items()},
        "objective": {"predicted": objective.at(weights), "prior": objective.at(prior)},
        "interval90": [float(low), float(high)],
        "unconstrained": {"weights": space.named(free), "predicted": objective.at(free)},
        "best_observed": _best_observed(space, train, observed),
        "second_opinion": _second_opinion(runs, fit, terms, weights, prior),
        "inside_sampled_region": nearest <= usual and not beyond,
        "beyond": {space.domains[i]: float(train.weights[:, i].max()) for i in beyond},
        "distance": nearest,
        "usual_distance": usual,
    }
    return {**result, "warnings": _warn(result, fit, terms)}


def _combine(terms: Mapping[str, float], columns: Mapping[str, FloatArray]) -> FloatArray:
    return np.asarray(sum(share * np.asarray(columns[name]) for name, share in terms.items()))


def _best_observed(space: Space, train: Runs, observed: FloatArray) -> dict[str, Any]:
    """The run of lowest loss among those that obey the caps; among all when none does."""
    obeys = np.all(train.weights <= space.caps + 1e-9, axis=1)
    row = int(np.argmin(np.where(obeys, observed, np.inf) if obeys.any() else observed))
    loss = float(observed[row])
    weights = space.named(train.weights[row])
    return {"index": train.index[row], "weights": weights, "loss": loss, "obeys_caps": bool(obeys[row])}


def _second_opinion(
    runs: Runs, fit: Mapping[str, Any], terms: Mapping[str, float], weights: FloatArray, prior: FloatArray
) -> dict[str, dict[str, float]]:
    """What every candidate surrogate predicts for the optimum and the prior: agreement is evidence, a gap a warning."""
    names = list(fit["targets"][next(iter(terms))]["candidates"])
    result = {}
    for name in names:
        objective = Objective(tuple((share, fit_chosen(runs, fit, t, name)) for t, share in terms.items()))
        result[name] = {"optimum": objective.at(weights), "prior": objective.at(prior)}
    return result


def _warn(result: Mapping[str, Any], fit: Mapping[str, Any], terms: Mapping[str, float]) -> list[str]:
    others = set(fit["targets"]) - set(terms)
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
    if result["interval90"][1] >= result["objective"]["prior"]:
        warnings.append(
            f"the prediction alone shows no significant gain: the prior's {result['objective']['prior']:.4f} is not "
            f"above the optimum's 90 % interval, {result['interval90'][0]:.4f} to {result['interval90'][1]:.4f}"
        )
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
