"""Which mixtures to run: designs that fill the space of mixtures, and controls that a search must beat.

Designs pick rows of a pool that `space.sample_mixtures` drew, so that caps, rounding and sums hold for them too. They
measure in cube roots of weights, where losses are closest to linear (on RegMix's runs; 24 designed runs do what 32 to
48 random ones do).
"""

from __future__ import annotations

import zlib
from typing import Literal

import numpy as np
import numpy.typing as npt

from regmix_search.laws import Effective
from regmix_search.region import Region
from regmix_search.space import FloatArray, OverCap, Space, bound, sample_mixtures

IntArray = npt.NDArray[np.int64]

Design = Literal["random", "maximin", "d_optimal", "law"]
POOL = 16  # mixtures drawn for each that a design keeps: 64 gain less than 2 % of the smallest distance
LEAST_POOL = 1024
RIDGE = 1e-3  # of D-optimality: makes the first few rows comparable
LAW_NOISE = 0.1  # variance of a run, as a share of the losses': the law is not quite right either; .02 does alike
PASSES = 3  # of exchanges; a fourth changed nothing


def draw_design(
    space: Space,
    n: int,
    seed: int,
    kind: Design = "random",
    temperature: float = 0.5,
    min_strength: float = 0.1,
    max_strength: float = 5.0,
    minimum: float = 2e-4,
    over_cap: OverCap = "reject",
    given: FloatArray | None = None,
    skip: int = 0,
) -> FloatArray:
    """n mixtures [n, k]: RegMix's draws as they come, or the n of a larger pool that fill the space best.

    given [m, k]: mixtures that are run anyhow, which the design need not repeat. skip: leaves out the first draws of
    this seed, which serve elsewhere. Other arguments as sample_mixtures.
    """
    shape = (temperature, min_strength, max_strength, minimum, over_cap)
    if kind == "random":
        return sample_mixtures(space, skip + n, seed, *shape)[skip:]
    pool = sample_mixtures(space, skip + max(LEAST_POOL, POOL * n), seed, *shape)[skip:]
    pick = {"maximin": maximin, "d_optimal": d_optimal, "law": law_optimal}[kind]
    return np.asarray(pool[pick(pool, n, seed, given)])


def embed(weights: FloatArray) -> FloatArray:
    """Cube roots of weights [n, k]."""
    return np.asarray(np.cbrt(weights))


def maximin(pool: FloatArray, n: int, seed: int = 0, given: FloatArray | None = None) -> IntArray:
    """Rows [n] of a pool [m, k], each as far as can be from those before and from `given`, in cube roots.

    The greedy answer is at least half as far apart as the best one (Gonzalez 1985). The first row is drawn.
    """
    _check(pool, n)
    points = embed(pool)
    if given is None or not len(given):
        first = int(np.random.default_rng([seed, zlib.crc32(b"maximin")]).integers(len(pool)))
        picked, nearest = [first], np.linalg.norm(points - points[first], axis=1)
    else:
        picked = []
        nearest = np.min([np.linalg.norm(points - point, axis=1) for point in embed(given)], axis=0)
    while len(picked) < n:
        nearest[picked] = -1.0
        picked.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, np.linalg.norm(points - points[picked[-1]], axis=1))
    return np.array(picked)


def d_optimal(pool: FloatArray, n: int, seed: int = 0, given: FloatArray | None = None) -> IntArray:
    """Rows [n] of a pool [m, k] that determine a linear model of the cube roots best: largest |X'X|.

    Greedy, then exchanges of one row for another while the determinant grows (Fedorov 1972).
    """
    _check(pool, n)
    rows = np.hstack([np.ones((len(pool), 1)), embed(pool)])
    known = RIDGE * np.eye(rows.shape[1])
    if given is not None and len(given):
        fixed = np.hstack([np.ones((len(given), 1)), embed(given)])
        known = known + fixed.T @ fixed
    picked: list[int] = []
    for _ in range(n):
        picked.append(_best_row(rows, known + rows[picked].T @ rows[picked], picked))
    for _ in range(PASSES):
        before = list(picked)
        for place in range(n):
            rest = picked[:place] + picked[place + 1 :]
            picked[place] = _best_row(rows, known + rows[rest].T @ rows[rest], rest)
        if picked == before:
            break
    return np.array(picked)


def law_optimal(pool: FloatArray, n: int, seed: int = 0, given: FloatArray | None = None) -> IntArray:
    """Rows [n] of a pool [m, k] that leave an effective-data law least unsure of the pool, on average.

    Greedy, by the law's own prior, linear around its centre. The first row is drawn, unless some are given. For 24 of
    RegMix's runs as good as maximin; for 64 worse (training rows, mean over 13 losses .9874 against .9888), because it
    trusts the law and seeks corners.
    """
    _check(pool, n)
    rows = pool if given is None else np.vstack([pool, given])
    slopes = Effective().prior_slopes(rows)
    unsure = slopes @ slopes.T
    picked = list(range(len(pool), len(rows))) or [
        int(np.random.default_rng([seed, zlib.crc32(b"law")]).integers(len(pool)))
    ]
    for row in picked:
        unsure -= np.outer(unsure[:, row], unsure[row]) / (unsure[row, row] + LAW_NOISE)
    while len(picked) < n + len(rows) - len(pool):
        gain = np.sum(unsure[: len(pool)] ** 2, axis=0) / (np.diag(unsure) + LAW_NOISE)
        gain[picked] = -1.0
        row = int(np.argmax(gain))
        unsure -= np.outer(unsure[:, row], unsure[row]) / (unsure[row, row] + LAW_NOISE)
        picked.append(row)
    return np.array([row for row in picked if row < len(pool)])


def _best_row(rows: FloatArray, information: FloatArray, taken: list[int]) -> int:
    """The row not taken that adds most to the determinant: |M + xx'| = |M| (1 + x'M^-1 x)."""
    gain = np.sum(rows * np.linalg.solve(information, rows.T).T, axis=1)
    gain[taken] = -1.0
    return int(np.argmax(gain))


def _check(pool: FloatArray, n: int) -> None:
    if not 1 <= n <= len(pool):
        raise ValueError(f"a design of {n} mixtures from a pool of {len(pool)}: ask for 1 to {len(pool)}")


def control_mixtures(space: Space, region: Region | None = None) -> dict[str, FloatArray]:
    """The mixtures that a search must beat: {name: weights [k]}.

    natural: shares of the tokens that exist (the prior when they are not known). uniform: all domains alike, caps or
    not, which others call stratified. unimax: all alike as far as caps go (Chung et al. 2023). tempered: prior^0.5,
    the centre of RegMix's draws. All but uniform obey the caps, and `region` where it is given.
    """
    k = len(space.domains)
    even, tempered = np.full(k, 1 / k), np.sqrt(space.prior) / np.sqrt(space.prior).sum()
    natural = space.prior if space.tokens is None else space.tokens / space.tokens.sum()
    allowed = {"natural": natural, "unimax": even, "tempered": tempered}
    inside = {
        name: bound(row, space.caps) if region is None else region.pull_in(row[None])[0]
        for name, row in allowed.items()
    }
    return {**inside, "uniform": even}
