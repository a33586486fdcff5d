"""How sure an optimum is: refits on resampled runs, and what they say about losses, weights, gains and near-ties."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from regmix_search.choice import calibrate
from regmix_search.goals import Goal
from regmix_search.objective import Objective
from regmix_search.reduction import today
from regmix_search.region import Region
from regmix_search.solver import solve
from regmix_search.space import FloatArray
from regmix_search.surrogates import build_surrogate
from regmix_search.tables import Runs

BOOTSTRAPS = 20
LEVELS = (0.05, 0.95)
CANDIDATES = 256  # mixtures around the optimum at each distance that near-ties are looked for in
DISTANCES = (0.03, 0.1, 0.2, 0.4, 0.7)  # of the way from the optimum to a mixture anywhere in the region
EXAMPLES = 5  # near-ties that are written out, as far from each other as they come
REFIT_STARTS = 3  # of SLSQP where a refit is not convex: its optimum is near the one that is known
SHORT_LIST = 32  # of simulated candidates averaged when a refit has no slopes to be solved with
# Besiroglu et al. 2024 (arXiv 2404.10102) on Hoffmann et al. 2022: loss = E + A / params^a + B / tokens^b
DATA_B, DATA_POWER = 2085.43, 0.3658


@dataclass(frozen=True, eq=False)
class Refits:
    """The objective fitted again to runs drawn with replacement."""

    objectives: tuple[Objective, ...]
    rivals: tuple[Objective, ...] = ()  # other surrogates, fitted to all runs, that predict about as well

    def differences(self, mixtures: FloatArray, optimum: FloatArray) -> FloatArray:
        """Loss of mixtures [m, k] above that of the optimum [k], by each refit: [b, m]."""
        return np.array([o.predict(mixtures) - o.at(optimum) for o in self.objectives])


def refit(objective: Objective, terms: Mapping[str, float], runs: Runs, seed: int, count: int = BOOTSTRAPS) -> Refits:
    """`count` refits of the objective's terms; ceilings stay as they are."""
    refits, n = [], len(runs.index)
    for i in range(count):
        rows = np.random.default_rng([seed, zlib.crc32(b"bootstrap"), i]).integers(n, size=n)
        models = [
            (
                share,
                today(
                    build_surrogate(model.name, runs.once).fit(runs.weights[rows], runs.losses[target][rows], seed),
                    runs,
                ),
            )
            for (share, model), target in zip(objective.terms, terms, strict=True)
        ]
        refits.append(replace(objective, terms=tuple(models)))
    return Refits(tuple(refits))


@dataclass(frozen=True, eq=False)
class Interval:
    """90 % intervals for the loss of a run, noise included: as wide as cross-validation says that they must be.

    prediction +- scale * the surrogates' own deviation. The scale holds nine tenths of the out-of-fold errors of the
    goal (fit.json's scale90 where it is one loss); the deviation grows away from the runs, as their form allows.
    """

    objective: Objective
    goal: Goal
    scale: float

    def at(self, weights: FloatArray) -> FloatArray:
        """Low and high [m, 2] for mixtures [m, k], around the objective's prediction."""
        spread = dict(zip(self.goal.shares, (m.deviation(weights) for _, m in self.objective.terms), strict=True))
        half = self.scale * self.goal.deviation(spread)
        return self.objective.predict(weights)[:, None] + np.outer(half, [-1.0, 1.0])


def calibrated(objective: Objective, goal: Goal, targets: Mapping[str, Any]) -> Interval:
    """Intervals for the goal from its losses' entries in fit.json."""
    true, predicted, spread = (
        {name: targets[name][key] for name in goal.shares} for key in ("true", "cv_predicted", "cv_deviation")
    )
    return Interval(objective, goal, calibrate(goal.of(predicted) - goal.of(true), goal.deviation(spread)))


def solve_again(refits: Refits, region: Region, prior: FloatArray, near: FloatArray, seed: int) -> FloatArray:
    """The optimum [b, k] of each refit. Without slopes: the mean of the best of the mixtures `near` [m, k]."""
    found = []
    for objective in refits.objectives:
        if objective.is_smooth:
            found.append(solve(objective, region, prior, near, seed=seed, starts=REFIT_STARTS))
        else:
            found.append(near[np.argsort(objective.value(near), kind="stable")[:SHORT_LIST]].mean(axis=0))
    return np.array(found).reshape(-1, len(prior))


def candidates(region: Region, optimum: FloatArray, seed: int) -> FloatArray:
    """Mixtures of the region near the optimum and farther away."""
    rng = np.random.default_rng([seed, zlib.crc32(b"ties")])
    rows = [optimum + step * (region.sample(CANDIDATES, rng) - optimum) for step in DISTANCES]
    return np.vstack(rows)


def tied(refits: Refits, mixtures: FloatArray, optimum: FloatArray) -> npt.NDArray[np.bool_]:
    """Mixtures [m, k] that the runs cannot tell from the optimum: a twentieth of the refits prefers them, or a rival.

    Refits alone are too sure: they share the surrogate's form, and the optimum is where that form is most flattering.
    """
    tie = np.zeros(len(mixtures), dtype=bool)
    if refits.objectives:
        tie |= np.quantile(refits.differences(mixtures, optimum), LEVELS[0], axis=0) <= 0
    for rival in refits.rivals:
        tie |= rival.predict(mixtures) <= rival.at(optimum)
    return tie


def near_ties(
    objective: Objective, refits: Refits, mixtures: FloatArray, optimum: FloatArray, domains: Sequence[str]
) -> dict[str, Any]:
    """How far mixtures go that tie with the optimum: range of each weight, largest L1 distance, a few of them."""
    mine = np.vstack([optimum, mixtures[tied(refits, mixtures, optimum)]])
    apart = np.abs(mine - optimum).sum(axis=1)
    loss = objective.predict(mine)
    picked = [0]
    for _ in range(min(EXAMPLES, len(mine) - 1)):  # the one farthest from all that were picked
        gaps = np.abs(mine[:, None] - mine[picked][None]).sum(axis=2).min(axis=1)
        if gaps.max() < 0.02:
            break
        picked.append(int(np.argmax(gaps)))
    examples = [
        {"weights": _named(domains, mine[i]), "predicted": float(loss[i]), "distance": float(apart[i])}
        for i in picked[1:]
    ]
    ranges = np.stack([mine.min(axis=0), mine.max(axis=0)], axis=1).tolist()
    return {
        "looked_at": len(mixtures),
        "found": len(mine) - 1,
        "weights": dict(zip(domains, ranges, strict=True)),
        "farthest": float(apart.max()),
        "examples": examples,
    }


def predicted_gain(refits: Refits, optimum: FloatArray, prior: FloatArray, centre: float) -> dict[str, Any]:
    """Gain over the prior in nats, `centre` by the fit itself, with the 90 % interval that the refits give."""
    if not refits.objectives:
        return {"nats": centre, "interval90": [None, None]}
    low, high = np.quantile(refits.differences(prior[None], optimum)[:, 0], LEVELS).tolist()
    return {"nats": centre, "interval90": [low, high]}


def left_to_gain(
    refits: Refits, own: FloatArray, region: Region, prior: FloatArray, optimum: FloatArray, seed: int
) -> dict[str, Any]:
    """Nats by which a better mixture than the optimum [k] could still be found, if another fit of the runs is right.

    refits95: 19 of 20 refits say no more than this, each at its `own` [b, k] optimum; rivals: the one that says most.
    """
    mine = [o.at(optimum) - o.at(row) for o, row in zip(refits.objectives, own, strict=True)]
    theirs = [o.at(optimum) - o.at(solve(o, region, prior, own, seed=seed, starts=REFIT_STARTS)) for o in refits.rivals]
    return {
        "refits95": float(np.quantile(mine, LEVELS[1])) if mine else None,
        "rivals": max(theirs, default=0.0),
        "reach90": float(np.quantile(np.abs(own - optimum).sum(axis=1), 2 * LEVELS[1] - 1)) if mine else None,
    }


def tokens_saved(gain: float, tokens: int | None, curve: Sequence[tuple[float, float]] = ()) -> dict[str, Any]:
    """Share of a run's tokens after which the optimum would be where the prior ends, if its gain holds all the way.

    curve: (tokens, loss) of proxies on the prior: when were they a gain above their end? Without it Chinchilla's loss
    tells, which falls by B (d^-b - tokens^-b) from d tokens on; None when the length of the run is not known either.
    """
    if len(curve) > 1 and gain >= 0:
        passed, losses = np.array(curve).T
        lowest = np.minimum.accumulate(losses)[::-1]  # rising, as interp wants it
        left = float(np.exp(np.interp(losses[-1] + gain, lowest, np.log(passed)[::-1])))
        short = ", at least" if losses[-1] + gain > losses[0] + 1e-9 else ""
        why = f"by the learning curves of the proxies on the prior{short}, the optimum's run parallel to theirs"
        return {"share": 1 - left / passed[-1], "of_tokens": int(passed[-1]), "why": why}
    if not tokens:
        return {"share": None, "why": "the length of the run is not known: set target_tokens"}
    term = DATA_B * tokens**-DATA_POWER
    share = 1 - (1 + gain / term) ** (-1 / DATA_POWER) if gain > -term else None
    return {"share": share, "of_tokens": tokens, "why": "by the data term of Chinchilla's law (Besiroglu et al. 2024)"}


def prior_curve(events: Iterable[Mapping[str, Any]], goal: Goal) -> list[tuple[float, float]]:
    """(tokens, loss of the goal), the mean over the finished repeats of the prior; empty where they kept no curves."""
    curves = [e["curve"] for e in events if e.get("kind") == "repeat" and e.get("curve") and not e.get("stopped")]
    found: dict[float, list[float]] = {}
    for point in (point for curve in curves for point in curve if goal.shares.keys() <= point["losses"].keys()):
        found.setdefault(point["tokens"], []).append(float(goal.of({n: [point["losses"][n]] for n in goal.shares})[0]))
    return [(tokens, float(np.mean(values))) for tokens, values in sorted(found.items()) if len(values) == len(curves)]


def _named(domains: Sequence[str], weights: FloatArray) -> dict[str, float]:
    return dict(zip(domains, weights.tolist(), strict=True))
