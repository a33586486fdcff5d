"""The mixture of lowest predicted loss in a region: by bisection, by SLSQP, or by simulation without slopes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import minimize

from regmix_search.objective import PRICE, Objective, duality_gap, slope_of
from regmix_search.reduction import Slice
from regmix_search.region import Region
from regmix_search.simulation import simulate
from regmix_search.space import FloatArray
from regmix_search.surrogates import SmoothSurrogate, Surrogate

MINIMUM = 2e-4  # RegMix's smallest weight: below it a domain is left out
MISSED = 1e-3  # nats that leaving out a domain may cost, a thirtieth of the noise of a small run
GAP = 1e-7  # nats: a convex solution that may be farther from the optimum than this is polished
STARTS = 12  # of the candidates to start from, those of lowest value


def solve(
    objective: Objective,
    region: Region,
    prior: FloatArray,
    sample: FloatArray,
    minimum: float = MINIMUM,
    seed: int = 0,
    starts: int = STARTS,
) -> FloatArray:
    """The weights [k] of lowest value in the region; weights below `minimum` are set to 0 where bounds allow.

    One convex law under caps alone: its own exact solution. Smooth surrogates: SLSQP, from many starts unless all are
    convex. Any without slopes: simulation around the best. sample [n, k]: mixtures to start from, of which `starts`.
    """
    if isinstance(region, Slice):
        small = region.reduction
        facts = (small.reduce(prior), small.reduce(sample), minimum, seed, starts)
        return small.expand(solve(small.reduced(objective), region.inside, *facts))
    first = objective.terms[0][1]
    plain = len(objective.terms) == 1 and not objective.kl and not objective.ceilings
    if plain and region.is_capped_simplex and isinstance(first, SmoothSurrogate):
        return _drop_small(objective, region, first.argmin(region.high), minimum)
    if not objective.is_smooth:
        weights = simulate(objective, region, prior, sample, seed)
    else:
        weights = _solve_slsqp(objective, region, _starts(objective, region, prior, sample, starts))
    return _drop_small(objective, region, weights, minimum)


def pareto_front(
    models: Mapping[str, Surrogate], region: Region, prior: FloatArray, sample: FloatArray, points: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Mixtures none of which is better than another on all losses: [{shares, weights [k], losses}].

    The optimum of each loss alone, of their mean, and of weighted means drawn until there are `points`.
    """
    names, t = list(models), len(models)
    draws = np.random.default_rng([seed, zlib.crc32(b"pareto")]).dirichlet(np.ones(t), size=max(0, points - t - 1))
    found = []
    for shares in [*np.eye(t), np.full(t, 1 / t), *draws]:
        terms = tuple((float(s), models[name]) for s, name in zip(shares, names, strict=True) if s > 0)
        weights = solve(Objective(terms), region, prior, sample, 0.0, seed)
        losses = np.array([float(models[name].predict(weights[None])[0]) for name in names])
        found.append((shares, weights, losses))
    kept = [p for p in found if not any(np.all(q[2] <= p[2] + 1e-9) and np.any(q[2] < p[2] - 1e-6) for q in found)]
    kept.sort(key=lambda point: point[2][0])
    return [
        {"shares": dict(zip(names, s.tolist(), strict=True)), "weights": w, "losses": dict(zip(names, f, strict=True))}
        for s, w, f in kept
    ]


def _starts(objective: Objective, region: Region, prior: FloatArray, sample: FloatArray, count: int) -> FloatArray:
    """Prior, uniform, the mixtures known and every domain filled to its bound: the best of them, best first."""
    k = len(prior)
    corners = np.eye(k) + 1e-6 * prior  # what a bound turns away goes to the others in proportion to the prior
    rows = region.pull_in(np.vstack([prior, np.full(k, 1 / k), corners, sample + 1e-6 * prior]))
    value = objective.value(rows) + PRICE * objective.excess(rows)
    order = np.argsort(value, kind="stable")
    mixed = (rows[order[0]] + rows[0]) / 2  # inside, where slopes are finite: a better first step than from a face
    return np.vstack([mixed, rows[order[: count - 1]]])


def _solve_slsqp(objective: Objective, region: Region, starts: FloatArray) -> FloatArray:
    best: FloatArray | None = None
    lowest = np.inf
    for start in starts:
        weights = start
        for _ in range(4 if objective.is_convex else 2):  # SLSQP stops early on flat ground: begin again there
            found = _slsqp(objective, region, weights)
            if found is None:
                break
            weights = found
            if (gap := duality_gap(objective, region, weights)) is None or gap <= GAP:
                break
        value = float(objective.value(weights[None])[0] + PRICE * objective.excess(weights[None])[0])
        if value < lowest - 1e-12 and region.holds(weights):
            best, lowest = weights, value
        gap = duality_gap(objective, region, weights)
        if objective.is_convex and best is not None and gap is not None and gap <= 100 * GAP:
            break
    assert best is not None, "every start is inside the region"
    return best


def _slsqp(objective: Objective, region: Region, start: FloatArray) -> FloatArray | None:
    """One descent from a mixture [k]; with the worst case an upper bound of all losses is one more variable."""
    k, extra = len(start), 1 if objective.worst else 0
    pad = np.zeros(extra)

    def value(x: FloatArray) -> float:
        return float(x[k] + objective.penalty(x[None, :k])[0] if extra else objective.value(x[None])[0])

    def slope(x: FloatArray) -> FloatArray:
        return np.append(objective.pull(x[:k]), 1.0) if extra else objective.slope(x)

    rules: list[dict[str, Any]] = [_rule("eq", lambda x: x[:k].sum() - 1, lambda x: np.append(np.ones(k), pad))]
    matrix, limits = region.rows()
    if matrix is not None and limits is not None:
        wide = np.hstack([matrix, np.zeros((len(matrix), extra))])
        rules.append(_rule("ineq", lambda x: limits - wide @ x, lambda x: -wide))
    for model in (model for _, model in objective.terms if extra):
        rules.append(_below(model, k, None))
    rules += [_below(model, k, limit, extra) for model, limit in objective.ceilings]
    box = [*zip(region.low, region.high, strict=True), *([(None, None)] * extra)]
    first = np.append(start, objective.at(start)) if extra else start
    found = minimize(
        value, first, jac=slope, bounds=box, constraints=rules, method="SLSQP", options={"ftol": 1e-11, "maxiter": 300}
    )
    weights = np.clip(found.x[:k], region.low, region.high)
    return weights if np.isfinite(weights).all() and region.holds(weights, 1e-7) else None


def _rule(kind: str, function: Any, slopes: Any) -> dict[str, Any]:
    return {"type": kind, "fun": function, "jac": slopes}


def _below(model: Surrogate, k: int, limit: float | None, extra: int = 1) -> dict[str, Any]:
    """The rule that a prediction is below a number, or below the last variable when `limit` is None."""

    def room(x: FloatArray) -> float:
        return float((x[k] if limit is None else limit) - model.predict(x[None, :k])[0])

    def slopes(x: FloatArray) -> FloatArray:
        return np.append(-slope_of(model, x[:k]), np.full(extra, 1.0 if limit is None else 0.0))

    return _rule("ineq", room, slopes)


def _drop_small(objective: Objective, region: Region, weights: FloatArray, minimum: float) -> FloatArray:
    """No weight between 0 and `minimum`: to 0, or up to it where a loss would miss the domain; the rest is scaled.

    Kept as they are where bounds or ceilings would be broken.
    """
    small = (weights < minimum) & (region.low <= 0)
    missed = np.zeros_like(small)
    for i in np.flatnonzero(small & (weights > 0)):
        none = np.where(np.arange(len(weights)) == i, 0.0, weights)
        missed[i] = np.subtract(*objective.value(np.stack([none, weights]))) > MISSED
    small &= ~missed
    rest = replace(region.without(small), low=np.where(missed, np.minimum(minimum, region.high), region.low))
    if not (small | missed).any() or rest.is_empty():
        return _exact_sum(region, weights)
    kept = rest.pull_in(np.where(small, 0.0, weights)[None])[0]
    kept[small] = 0.0
    over = objective.ceilings and objective.excess(kept[None])[0] > 1e-6
    return _exact_sum(rest, kept) if region.holds(kept) and not over else _exact_sum(region, weights)


def _exact_sum(region: Region, weights: FloatArray) -> FloatArray:
    """The weights with a sum of 1 to the last digits: what is missing goes where there is room."""
    if region.groups:
        return np.asarray(weights / weights.sum())
    return np.asarray(region.pull_in(weights[None])[0])
