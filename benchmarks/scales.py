"""Transfer between sizes on RegMix's published runs: how far 64 runs at 1M and 16 at 60M go at 60M, and ranks at 1B."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from benchmarks.table import Row, cost_row, rate_row
from regmix_search.laws import Power
from regmix_search.scale_law import Sample, Size
from regmix_search.scales import fit_scales
from regmix_search.study_files import draw_runs
from regmix_search.surrogates import score
from regmix_search.tables import Runs

SMALL, LARGE = 64, 16
# Parameters without embeddings and tokens, from RegMix's model_training/lit_gpt/config.py and its paper
SIZES = {"1M": Size(1.312e6, 1.05e9), "60M": Size(59e6, 1.05e9), "1B": Size(1.13e9, 26.2e9)}


def transfer_rows(small: Runs, large: Runs, seeds: Iterable[int]) -> list[Row]:
    """Means over 13 losses and seeds, on the 60M runs that no fit has seen.

    The form of the law is chosen by cross-validation on the 80 runs. `rmse` in nats, against a power law on the 16 runs
    alone; `rank` is Spearman, against one on the 64 runs at 1M alone.
    """
    found = []
    for seed in seeds:
        few, mine = draw_runs(small, SMALL, seed), draw_runs(large, LARGE, seed)
        test = large.without(mine.index)
        for name in small.losses:
            given = [
                Sample(SIZES[size], runs.weights, runs.losses[name]) for size, runs in (("1M", few), ("60M", mine))
            ]
            true, law = test.losses[name], fit_scales(given, seed).law.at(SIZES["60M"])
            ours, *alone = (
                score(model.predict(test.weights), true)
                for model in (law, *(Power().fit(sample.weights, sample.losses) for sample in given))
            )
            found.append((ours["rmse"], alone[1]["rmse"], ours["spearman"], alone[0]["spearman"]))
    rmse, lone, rank, before = np.mean(found, axis=0)
    return [cost_row("transfer.rmse", rmse, lone, "nats"), rate_row("transfer.rank", rank, before, "Spearman")]


def large_rows(train: Runs, middle: Runs, large: Runs, target: str) -> list[Row]:
    """Ranks of RegMix's 64 1B mixtures from all runs at 1M and 60M, against the 1M runs alone; no 1B run is fitted."""
    given = [Sample(SIZES[n], runs.weights, runs.losses[target]) for n, runs in (("1M", train), ("60M", middle))]
    law = fit_scales(given).law.at(SIZES["1B"])
    alone = Power().fit(given[0].weights, given[0].losses)
    ours, peer = (score(model.predict(large.weights), large.losses[target])["spearman"] for model in (law, alone))
    return [rate_row("transfer.1B", ours, peer, "Spearman")]
