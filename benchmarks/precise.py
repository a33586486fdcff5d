"""--until-precise on RegMix's published runs: how many it takes in random order, and what its mixture is worth then."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from benchmarks.table import Row, cost_row
from regmix_search.config import FitConfig, SearchConfig
from regmix_search.early import GROWTH, EarlyFit, fit_early, is_precise
from regmix_search.objective import Objective
from regmix_search.region import build_region
from regmix_search.solver import solve
from regmix_search.space import FloatArray, Space
from regmix_search.study_files import draw_runs
from regmix_search.surrogates import build_surrogate
from regmix_search.tables import Runs

NOISE = 0.029  # nats between runs of one mixture: none was run twice; what a process fitted to all 512 says


def fit_as_they_arrive(runs: Runs, target: str, space: Space, noise: float = NOISE) -> list[EarlyFit]:
    """The early fits of a search whose runs end in this order, up to the one after which it starts no more."""
    config = SearchConfig(fit=FitConfig(target=target))
    fits, count = list[EarlyFit](), len(runs.domains) + 2
    while count <= len(runs.index) and not is_precise(fits):
        some = runs.select(runs.index[:count])
        fits.append(replace(fit_early(some, space, config, fits[-1] if fits else None), noise=noise))
        count = math.ceil(GROWTH * count)
    return fits


def precise_rows(
    runs: Runs, pool: Runs, target: str, space: Space, peer: FloatArray, seeds: Iterable[int]
) -> list[Row]:
    """Means over random orders of the runs: how many were taken, and the regret of the mixture that they gave, in nats.

    Regret: above the optimum of the average of law and process, fitted to the `pool`. The peer is a mixture [k] from
    all the runs.
    """
    truth = Objective(((1.0, build_surrogate("average").fit(pool.weights, pool.losses[target])),))
    least = truth.at(solve(truth, build_region(space), space.prior, pool.weights))
    stops = [fit_as_they_arrive(draw_runs(runs, len(runs.index), seed), target, space)[-1] for seed in seeds]
    regret = float(np.mean([truth.at(np.array(list(fit.weights.values()))) - least for fit in stops]))
    taken = cost_row("until_precise", float(np.mean([fit.runs for fit in stops])), len(runs.index), "runs")
    return [taken, cost_row("until_precise.regret", regret, truth.at(peer) - least, "nats regret")]
