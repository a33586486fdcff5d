"""What building on an earlier search costs, on RegMix's published runs: rows of `python -m benchmarks.search`.

`reuse_runs` is on the runs themselves: 96 earlier ones without a domain and 16 with it, fitted together, against 112 of
all, on the test runs; the mean over all 17 domains and three draws. `reuse_gone`: 96 earlier runs, of which some had a
domain that is gone, against those of them without it, on test runs without it. Domains that keep their ratio are in no
published run, so `reuse_1_of_17` and `reuse_5_of_17` run on a stand-in: a Gaussian process on all 768 runs, with its
residual noise. So many domains are added to a search of the others (5 runs a domain); then 5 runs a reduced domain,
together with the earlier ones, against 85 runs on everything anew. Regret is what the stand-in says the answer is above
its own optimum; caps are 4 epochs of the Pile.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from benchmarks.table import Row
from regmix_search.objective import Objective
from regmix_search.reduction import Reduction
from regmix_search.region import Region, build_region
from regmix_search.solver import solve
from regmix_search.space import FloatArray, Space, sample_mixtures
from regmix_search.surrogates import Surrogate, build_surrogate, score
from regmix_search.tables import RunId, Runs

SURROGATE = "average"  # what auto takes among ties
EARLIER, LATER, DRAWS = 96, 16, 3
EACH = 5  # runs a domain
SEEDS = range(10)


def reuse_rows(
    train: Runs, tests: dict[str, Runs], pool: Runs, target: str, pile: FloatArray, epochs: float
) -> list[Row]:
    """All rows. pool: every run of one size; pile: shares of the Pile's tokens."""
    rows = runs_rows(train, tests, target)
    for added in (1, 5):
        found = [search_again(pool, target, pile, epochs, added, seed) for seed in SEEDS]
        ours, peer = np.mean(found, axis=0).tolist()
        runs = f"nats regret, {EACH * (added + 1)} new runs against {EACH * len(pile)}"
        rows.append(Row(f"reuse_{added}_of_{len(pile)}", ours, peer, peer / max(ours, 1e-4), runs))
    return rows


def runs_rows(train: Runs, tests: dict[str, Runs], target: str) -> list[Row]:
    """Rank correlations with earlier runs: without a domain that is new, and with one that is gone."""
    added: list[list[list[float]]] = [[], []]
    gone: list[list[list[float]]] = [[], []]
    for domain in range(len(train.domains)):
        without, having = (np.flatnonzero((train.weights[:, domain] > 0) == wanted) for wanted in (False, True))
        left = {size: test.select(_without(test, domain)) for size, test in tests.items()}
        for draw in range(DRAWS):
            rng = np.random.default_rng([draw, domain])
            mixed = np.concatenate([rng.permutation(without)[:EARLIER], rng.permutation(having)[:LATER]])
            fresh = rng.permutation(len(train.index))[: EARLIER + LATER]
            earlier = fresh[:EARLIER]
            unspoilt = earlier[train.weights[earlier, domain] == 0]
            for side, (rows, some) in enumerate(((mixed, earlier), (fresh, unspoilt))):
                added[side].append(_rank(train, rows, tests, target))
                gone[side].append(_rank(train, some, left, target))
    unit = f"Spearman, {LATER} new runs against {EARLIER + LATER}"
    fewer = "Spearman without a domain, all earlier runs against those without it"
    return [*_mean_rows("reuse_runs", added, tests, unit), *_mean_rows("reuse_gone", gone, tests, fewer)]


def _without(runs: Runs, domain: int) -> list[RunId]:
    return [runs.index[row] for row in np.flatnonzero(runs.weights[:, domain] == 0)]


def _rank(train: Runs, rows: npt.NDArray[np.int64], tests: dict[str, Runs], target: str) -> list[float]:
    model = fit(train.weights[rows], train.losses[target][rows])
    return [score(model.predict(test.weights), test.losses[target])["spearman"] for test in tests.values()]


def _mean_rows(key: str, sides: list[list[list[float]]], tests: dict[str, Runs], unit: str) -> list[Row]:
    """The mean over tests, then each test."""
    means = [np.mean(side, axis=0) for side in sides]
    pairs = [[float(mean.mean()), *mean.tolist()] for mean in means]
    keys = [key, *(f"{key}.{size}" for size in tests)]
    return [Row(name, ours, peer, ours / peer, unit) for name, ours, peer in zip(keys, *pairs, strict=True)]


def search_again(
    pool: Runs, target: str, pile: FloatArray, epochs: float, added: int, seed: int
) -> tuple[float, float]:
    """(regret of a search that reuses one without `added` domains, regret of a search of all domains anew)."""
    rng, domains = np.random.default_rng([seed, added]), pool.domains
    stand_in = build_surrogate("gp").fit(pool.weights, pool.losses[target])
    noise = float(np.std(pool.losses[target] - stand_in.predict(pool.weights)))
    truth, k = Objective(((1.0, stand_in),)), len(domains)

    def run(rows: FloatArray) -> FloatArray:
        return np.asarray(stand_in.predict(rows) + noise * rng.normal(size=len(rows)))

    full = Space(domains, None, pile / pile.sum(), np.minimum(1.0, epochs * pile / pile.sum()), None, None)
    new = rng.choice(k, added, replace=False)
    old = [name for i, name in enumerate(domains) if i not in new]
    first = _widen(sample_mixtures(_part(full, old), EACH * len(old), seed), domains, old)
    losses = run(first)
    allowed = Region(np.zeros(k), np.where(np.isin(domains, old), full.caps, 0.0))
    optimum = _find(fit(first, losses), allowed, full, first)
    ratios = {name: float(optimum[domains.index(name)] / optimum.sum()) for name in old}
    reduction = Reduction(domains, ratios)
    second = reduction.expand(sample_mixtures(reduction.space(full), EACH * (added + 1), seed))
    rows, both = np.vstack([first, second]), np.concatenate([losses, run(second)])
    ours = _find(fit(rows, both), reduction.region(full), full, rows)
    anew = sample_mixtures(full, EACH * k, seed)
    peer = _find(fit(anew, run(anew)), build_region(full), full, anew)
    lowest = truth.at(solve(truth, build_region(full), full.prior, np.vstack([pool.weights[:200], ours, peer]), 0.0))
    return truth.at(ours) - lowest, truth.at(peer) - lowest


def fit(rows: FloatArray, losses: FloatArray) -> Surrogate:
    """The surrogate of both sides."""
    return build_surrogate(SURROGATE).fit(rows, losses)


def _find(model: Surrogate, region: Region, space: Space, sample: FloatArray) -> FloatArray:
    return solve(Objective(((1.0, model),)), region, space.prior, sample)


def _part(space: Space, names: Sequence[str]) -> Space:
    """The space of some domains, under the caps that they have in all of it."""
    rows = [space.domains.index(name) for name in names]
    return Space(tuple(names), None, space.prior[rows] / space.prior[rows].sum(), space.caps[rows], None, None)


def _widen(rows: FloatArray, domains: Sequence[str], names: Sequence[str]) -> FloatArray:
    wide = np.zeros((len(rows), len(domains)))
    wide[:, [domains.index(name) for name in names]] = rows
    return wide
