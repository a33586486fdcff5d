"""LightGBM with RegMix's settings. It knows no smoothness, so it needs runs by the hundred and sampling to optimise."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np

from regmix_search.laws import check_runs
from regmix_search.space import FloatArray


class LightGBM:
    """1,000 trees at learning rate 0.01, as in RegMix's notebook, but without its early stopping on the test runs.

    min_data_in_leaf is n / 10 between 3 and LightGBM's 20: with 20 it predicts a constant below 40 runs
    (Spearman on Pile-CC at 48 runs .94 instead of .77); from 200 runs on it is RegMix's model.
    """

    name: ClassVar[str] = "lightgbm"
    TREES = 1000
    LEARNING_RATE = 0.01

    def fit(self, weights: FloatArray, losses: FloatArray, seed: int = 0) -> Self:
        weights, losses = check_runs(weights, losses)
        settings = {
            "objective": "l2",
            "learning_rate": self.LEARNING_RATE,
            "min_data_in_leaf": int(np.clip(len(losses) // 10, 3, 20)),
            "seed": seed,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": 1,  # more threads are slower on tables this small, and change the sums
            "verbosity": -1,
        }
        lightgbm = _import_lightgbm()
        data = lightgbm.Dataset(weights, losses)
        self.model = lightgbm.train(settings, data, self.TREES, keep_training_booster=True)  # no copy through text
        return self

    def predict(self, weights: FloatArray) -> FloatArray:
        return np.asarray(self.model.predict(np.asarray(weights, dtype=np.float64), num_threads=1), dtype=np.float64)


def _import_lightgbm() -> Any:
    try:
        import lightgbm
    except ImportError as error:
        raise ImportError(
            "the surrogate lightgbm needs the package lightgbm: pip install lightgbm, or leave it out"
        ) from error
    return lightgbm
