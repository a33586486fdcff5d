"""Surrogates: mixture weights -> loss. One protocol, their names, their scores, and their form in JSON.

n runs, k domains. Losses in nats per token; correlations in -1..1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from regmix_search.gp import Average, GaussianProcess, LawProcess, Residual
from regmix_search.laws import Effective, Linear, LogLinear, Power
from regmix_search.posterior import Posterior
from regmix_search.repeats import EffectiveRepeats
from regmix_search.space import FloatArray
from regmix_search.trees import LightGBM

# In order of preference among surrogates that cross-validation cannot tell apart: a convex law extrapolates sanely,
# has one exact optimum, and carries over to larger models best (on RegMix's 1B runs processes and trees fall behind).
SURROGATES = (
    "effective",
    "power",
    "effective_repeats",
    "loglinear",
    "linear",
    "effective_gp",
    "average",
    "gp",
    "lightgbm",
)


class Surrogate(Protocol):
    """What the search asks of a surrogate. Equal runs in any order give equal predictions."""

    @property
    def name(self) -> str: ...

    def fit(self, weights: FloatArray, losses: FloatArray, seed: int = 0) -> Self:
        """Fits to weights [n, k] and losses [n]; returns itself."""

    def predict(self, weights: FloatArray) -> FloatArray:
        """Losses [m] of mixtures [m, k]."""

    def deviation(self, weights: FloatArray) -> FloatArray:
        """Standard deviations [m] of what runs with these mixtures would show, noise included, before calibration."""


@runtime_checkable
class SmoothSurrogate(Surrogate, Protocol):
    """A convex law: with slopes, and an exact solution of its own. Processes have slopes alone."""

    def gradient(self, weights: FloatArray) -> FloatArray:
        """d loss / d weights at [m, k], as [m, k]."""

    def argmin(self, caps: FloatArray) -> FloatArray:
        """The weights [k] of lowest loss with 0 <= w <= caps [k] and sum 1."""


def build_surrogate(name: str, once: FloatArray | None = None) -> Surrogate:
    """An unfitted surrogate by name, one of SURROGATES. ValueError for another name.

    once [k]: weights at which a run has read each domain once, for effective_repeats.
    """
    match name:
        case "effective":
            return Effective()
        case "power":
            return Power()
        case "effective_repeats":
            return EffectiveRepeats(once)
        case "loglinear":
            return LogLinear()
        case "linear":
            return Linear()
        case "effective_gp":
            return LawProcess()
        case "average":
            return Average()
        case "gp":
            return GaussianProcess()
        case "lightgbm":
            return LightGBM()
    raise ValueError(f"surrogate {name!r} does not exist; there are {', '.join(SURROGATES)} and auto (all of them)")


def to_json(model: Surrogate) -> dict[str, Any]:
    """A fitted surrogate as JSON values."""
    if isinstance(model, LightGBM):
        return {"surrogate": model.name, **model.state()}
    public = {key: value for key, value in vars(model).items() if not key.startswith("_")}
    return {"surrogate": model.name, **{key: _encode(value) for key, value in public.items()}}


def from_json(content: Mapping[str, Any]) -> Surrogate:
    """Inverse of to_json: the same predictions, bit by bit. Raises ValueError for a surrogate that does not exist."""
    state = dict(content)
    name = state.pop("surrogate")
    model = Residual() if name == Residual.name else build_surrogate(name)
    if isinstance(model, LightGBM):
        return model.restore(state)
    vars(model).update({key: _decode(value) for key, value in state.items()})
    return model


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Posterior):
        return {"params": value.params.tolist(), "covariance": value.covariance.tolist(), "noise": value.noise}
    return float(value) if isinstance(value, float) else to_json(value)


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return np.array(value, dtype=np.float64)
    if isinstance(value, dict) and "surrogate" not in value:
        return Posterior(np.array(value["params"]), np.array(value["covariance"]), value["noise"])
    return from_json(value) if isinstance(value, dict) else value


def score(predicted: FloatArray, true: FloatArray) -> dict[str, float]:
    """spearman, pearson (0 when either side is constant), mse and rmse of predictions [n]."""
    predicted, true = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    mse = float(np.mean((predicted - true) ** 2))
    spearman = _correlation(rankdata(predicted), rankdata(true))
    return {"spearman": spearman, "pearson": _correlation(predicted, true), "mse": mse, "rmse": math.sqrt(mse)}


def _correlation(a: FloatArray, b: FloatArray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(np.clip(a @ b / size, -1, 1)) if size > 1e-12 else 0.0


def group_mixtures(weights: FloatArray) -> npt.NDArray[np.int64]:
    """A number [n] for each distinct mixture, so that repeats of one stay together."""
    _, group = np.unique(np.round(weights, 9), axis=0, return_inverse=True)
    return group.reshape(-1).astype(np.int64)
