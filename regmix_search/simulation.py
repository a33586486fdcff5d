"""The best of many simulated mixtures: RegMix's own way, and what is left for surrogates that have no slopes."""

from __future__ import annotations

import zlib

import numpy as np

from regmix_search.objective import PRICE, Objective
from regmix_search.region import Region
from regmix_search.space import FloatArray, draw_mixtures

TOP = 128  # simulated mixtures that are averaged, as in RegMix's notebook
POOL = 10_000  # simulated mixtures a round
ROUNDS = 5  # each around the last answer, 5 times narrower: one round ends .2-.5 sd of the losses too high (10 domains)
BATCH = 20_000  # simulated mixtures that are scored at a time


def simulate_top(
    objective: Objective,
    prior: FloatArray,
    samples: int = 1_000_000,
    top: int = 100,
    seed: int = 0,
    region: Region | None = None,
) -> FloatArray:
    """RegMix's answer: the mean of the `top` best of `samples` draws from Dirichlet(prior), as in its paper.

    Draws outside the region are left out, as RegMix's generator does. ValueError when fewer than `top` are left.
    """
    rng = np.random.default_rng([seed, zlib.crc32(b"regmix")])
    best, values = np.empty((0, len(prior))), np.empty(0)
    for start in range(0, samples, BATCH):
        rows = rng.dirichlet(prior, size=min(BATCH, samples - start))
        if region is not None:
            rows = rows[[region.holds(row) for row in rows]]
        if not len(rows):
            continue
        best, values = np.vstack([best, rows]), np.concatenate([values, objective.value(rows)])
        keep = np.argsort(values, kind="stable")[:top]
        best, values = best[keep], values[keep]
    if len(best) < top:
        raise ValueError(
            f"only {len(best)} of {samples:,} simulated mixtures obey the bounds, {top} are averaged: raise "
            "optimum.samples, widen the bounds, or take optimum.method exact"
        )
    return np.asarray(best.mean(axis=0))


def simulate(objective: Objective, region: Region, prior: FloatArray, sample: FloatArray, seed: int) -> FloatArray:
    """Mean of the best simulated mixtures, drawn around the best so far in ever narrower rounds.

    It is inside because regions are convex, and steadier than the single best. sample [n, k]: mixtures to begin with.
    """
    rng = np.random.default_rng([seed, zlib.crc32(b"simulate")])
    pool = region.pull_in(sample)
    centre, strengths = prior, np.geomspace(0.5, 20.0, 8)  # RegMix simulates at strength 1 around the prior
    for i in range(ROUNDS):
        if region.groups:
            inside = region.sample(POOL, rng)
            drawn = inside if i == 0 else pool[0] + (inside - pool[0]) * 0.4**i
        else:
            drawn = region.pull_in(draw_mixtures(centre, strengths, POOL, rng))
        pool = np.vstack([pool, drawn])
        value = objective.value(pool) + PRICE * objective.excess(pool)
        pool = pool[np.argsort(value, kind="stable")[:TOP]]
        centre, strengths = pool.mean(axis=0), strengths * 5
    return np.asarray(pool.mean(axis=0))
