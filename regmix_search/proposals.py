"""Which mixtures to run next: those of largest expected improvement on the best so far, and not all in one place.

On RegMix's published runs (Pile-CC), 16 runs and four rounds of 8 find the best of all 768; the best of 48 in one go is
.05 nats worse, and with LightGBM in rounds .02.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from regmix_search.designs import IntArray, embed
from regmix_search.goals import Goal, parse_goal
from regmix_search.reduction import Slice, today
from regmix_search.region import Region
from regmix_search.space import FloatArray, Space, bound, draw_mixtures, sample_mixtures
from regmix_search.surrogates import Surrogate, build_surrogate
from regmix_search.tables import Runs

SURROGATE = "gp"  # the best of gp, effective and effective_gp in rounds; it follows what runs show near the best ones
REACH = 0.5  # of the usual distance between runs: nearer than that, two proposals say much the same
POOL = 4096  # mixtures looked at when they may be anywhere
NEAR_BEST = 5  # runs around which half of them are drawn
STRENGTHS = (20.0, 50.0, 200.0)  # of Dirichlet draws around these: from far to near


@dataclass(frozen=True, eq=False)
class Fitted:
    """What is known after some runs: a fit of every loss of the goal, and the runs."""

    models: dict[str, Surrogate]
    goal: Goal
    weights: FloatArray  # [n, k]
    losses: FloatArray  # [n] of the goal

    def predict(self, weights: FloatArray) -> FloatArray:
        """The goal [m] at mixtures [m, k]."""
        return self.goal.of({name: model.predict(weights) for name, model in self.models.items()})

    def deviation(self, weights: FloatArray) -> FloatArray:
        """Standard deviation [m] of the goal that a run would show; losses of one run taken as independent."""
        return self.goal.deviation({name: model.deviation(weights) for name, model in self.models.items()})


def fit_runs(runs: Runs, target: str | Goal, surrogate: str = SURROGATE, seed: int = 0) -> Fitted:
    """A surrogate with uncertainty for every loss of the target, fitted to all runs."""
    goal = parse_goal(target, runs.losses)
    models = {
        name: today(build_surrogate(surrogate).fit(runs.weights, runs.losses[name], seed), runs) for name in goal.shares
    }
    return Fitted(models, goal, runs.mixed.weights, goal.of(runs.mixed.losses))


def expected_improvement(fitted: Fitted, mixtures: FloatArray) -> FloatArray:
    """Nats [m] by which a run of each mixture [m, k] is expected to beat the best so far, counting none as 0."""
    deviation = np.maximum(fitted.deviation(mixtures), 1e-12)
    better = (fitted.losses.min() - fitted.predict(mixtures)) / deviation
    return np.asarray(deviation * (better * norm.cdf(better) + norm.pdf(better)))


def propose(
    fitted: Fitted, pool: FloatArray | Space, count: int, seed: int = 0, region: Region | None = None
) -> FloatArray:
    """`count` mixtures [count, k] to run next, from a pool [m, k] or from anywhere in a space (`draw_pool`)."""
    rows = draw_pool(fitted, pool, seed, region=region) if isinstance(pool, Space) else pool
    return np.asarray(rows[propose_rows(fitted, rows, count)[0]])


def propose_rows(fitted: Fitted, pool: FloatArray, count: int) -> tuple[IntArray, FloatArray]:
    """(rows [count] of a pool [m, k] to run next, expected improvement [count] of each by itself).

    Each pick is of the largest improvement left, after those near an earlier pick have lost theirs: a fall of
    1 - exp(-d^2 / 2r^2) with d in cube roots and r half the usual distance between runs. Rows that were run are out.
    """
    gains = expected_improvement(fitted, pool)
    points, tried = embed(pool), embed(fitted.weights)
    known = np.array([np.linalg.norm(tried - point, axis=1).min() < 1e-6 for point in points])
    if count > (~known).sum():
        raise ValueError(f"{count} proposals wanted, the pool has {(~known).sum()} mixtures that were not run yet")
    apart = np.linalg.norm(tried[:, None] - tried[None], axis=2)
    apart[apart < 1e-6] = np.inf  # itself, and repeats
    usual = apart.min(axis=1)
    reach = REACH * float(np.median(usual[np.isfinite(usual)])) if np.isfinite(usual).any() else 1e-6
    left, picked = np.where(known, -1.0, gains), list[int]()
    for _ in range(count):
        picked.append(int(np.argmax(left)))
        far = np.linalg.norm(points - points[picked[-1]], axis=1) / reach
        left = np.where(left < 0, left, left * -np.expm1(-0.5 * far**2))
        left[picked[-1]] = -1.0
    rows = np.array(picked)
    return rows, gains[rows]


def draw_pool(
    fitted: Fitted, space: Space, seed: int, minimum: float = 2e-4, region: Region | None = None
) -> FloatArray:
    """Mixtures [m, k] under the caps: half RegMix's draws, half around the best runs; no weight under `minimum`.

    With a region, half of all are moved into it: the optimum lies there, but mixtures outside tell of it too. All are
    where domains keep their ratio.
    """
    wide = sample_mixtures(space, POOL // 2, seed, minimum=minimum, over_cap="project")
    rng = np.random.default_rng([seed, zlib.crc32(b"proposals")])
    best = fitted.weights[np.argsort(fitted.losses, kind="stable")[:NEAR_BEST]]
    each = POOL // 2 // len(best)
    near = np.vstack([draw_mixtures(row + 0.01 * space.prior, np.array(STRENGTHS), each, rng) for row in best])
    near = np.where(near < minimum, 0.0, near)
    room = np.where(near > 0, space.caps, 0.0).sum(axis=1) >= 1
    pool = np.vstack([wide, bound(near[room], space.caps)])
    if isinstance(region, Slice):
        return region.pull_in(pool)
    if region is None or (region.is_capped_simplex and np.array_equal(region.high, space.caps)):
        return pool
    return np.vstack([pool[::2], region.pull_in(pool[1::2])])
