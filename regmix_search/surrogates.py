"""Surrogates: mixture weights -> loss. One protocol, one honest cross-validation, and a choice that says why.

n runs, k domains. Losses in nats per token; correlations in -1..1.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from regmix_search.laws import Effective, Linear, LogLinear, check_runs
from regmix_search.space import FloatArray
from regmix_search.trees import LightGBM

# In order of preference among surrogates that cross-validation cannot tell apart: a convex law extrapolates sanely,
# has one exact optimum, and carries over to larger models best (on RegMix's 1B runs trees fall behind it).
SURROGATES = ("effective", "loglinear", "linear", "lightgbm")
POOR_SPEARMAN = 0.5  # below this, half of the ranking is noise


class Surrogate(Protocol):
    """What the search asks of a surrogate. Equal runs in any order give equal predictions."""

    @property
    def name(self) -> str: ...

    def fit(self, weights: FloatArray, losses: FloatArray, seed: int = 0) -> Self:
        """Fits to weights [n, k] and losses [n]; returns itself."""

    def predict(self, weights: FloatArray) -> FloatArray:
        """Losses [m] of mixtures [m, k]."""


@runtime_checkable
class SmoothSurrogate(Surrogate, Protocol):
    """A surrogate with slopes and an exact solution."""

    def gradient(self, weights: FloatArray) -> FloatArray:
        """d loss / d weights at [m, k], as [m, k]."""

    def argmin(self, caps: FloatArray) -> FloatArray:
        """The weights [k] of lowest loss with 0 <= w <= caps [k] and sum 1."""


def build_surrogate(name: str) -> Surrogate:
    """An unfitted surrogate by name, one of SURROGATES. ValueError for another name."""
    match name:
        case "effective":
            return Effective()
        case "loglinear":
            return LogLinear()
        case "linear":
            return Linear()
        case "lightgbm":
            return LightGBM()
    raise ValueError(f"surrogate {name!r} does not exist; there are {', '.join(SURROGATES)} and auto (all of them)")


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """Out-of-fold quality of one surrogate. Scores are means over repeats; `predicted` is the first repeat's."""

    scores: dict[str, float]  # spearman, pearson, mse, rmse
    predicted: FloatArray  # [n] each by a fit that never saw that mixture
    errors: FloatArray  # [n] squared, mean over repeats


@dataclass(frozen=True, eq=False)
class Choice:
    """The surrogate that cross-validation picked, and why, in words."""

    chosen: str
    why: str
    candidates: dict[str, dict[str, float]]
    cv_predicted: FloatArray  # [n] out of fold, by the chosen one
    warnings: tuple[str, ...]


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


def cross_validate(
    name: str, weights: FloatArray, losses: FloatArray, folds: int = 5, repeats: int = 3, seed: int = 0
) -> CrossValidation:
    """K-fold cross-validation, `repeats` times with other folds. Runs of one mixture always share a fold.

    Raises ValueError with fewer than 2 different mixtures.
    """
    return _cross_validate(lambda: build_surrogate(name), weights, losses, folds, repeats, seed)


def _cross_validate(
    build: Callable[[], Surrogate], weights: FloatArray, losses: FloatArray, folds: int, repeats: int, seed: int
) -> CrossValidation:
    weights, losses = check_runs(weights, losses)
    group = group_mixtures(weights)
    predicted = np.empty((repeats, len(losses)))
    for repeat in range(repeats):
        fold = _assign_folds(group, folds, seed, repeat)
        for i in range(int(fold.max()) + 1):
            out = fold == i
            predicted[repeat, out] = build().fit(weights[~out], losses[~out], seed).predict(weights[out])
    each = [score(row, losses) for row in predicted]
    scores = {key: float(np.mean([s[key] for s in each])) for key in each[0]}
    return CrossValidation(scores, predicted[0], np.mean((predicted - losses) ** 2, axis=0))


def group_mixtures(weights: FloatArray) -> npt.NDArray[np.int64]:
    """A number [n] for each distinct mixture, so that repeats of one stay together."""
    _, group = np.unique(np.round(weights, 9), axis=0, return_inverse=True)
    return group.reshape(-1).astype(np.int64)


def _assign_folds(group: npt.NDArray[np.int64], folds: int, seed: int, repeat: int) -> npt.NDArray[np.int64]:
    count = int(group.max()) + 1
    if count < 2:
        raise ValueError("all runs have the same mixture: cross-validation needs at least 2 different ones")
    order = np.random.default_rng([seed, zlib.crc32(b"folds"), repeat]).permutation(count)
    return order[group] % min(folds, count)


class _Mean:
    """Predicts the mean loss whatever the weights: what every surrogate must beat."""

    name = "mean"

    def fit(self, weights: FloatArray, losses: FloatArray, seed: int = 0) -> Self:
        self.mean = float(losses.mean())
        return self

    def predict(self, weights: FloatArray) -> FloatArray:
        return np.full(len(weights), self.mean)


def choose(
    weights: FloatArray,
    losses: FloatArray,
    names: Sequence[str] = SURROGATES,
    seed: int = 0,
    folds: int = 5,
    repeats: int = 3,
) -> Choice:
    """Picks a surrogate by cross-validated squared error alone: the best, or a smoother one within a standard error.

    Preference is the order of SURROGATES; the standard error is that of the paired difference over runs.
    """
    if not names:
        raise ValueError(f"no surrogates to choose from; there are {', '.join(SURROGATES)}")
    results = {name: cross_validate(name, weights, losses, folds, repeats, seed) for name in names}
    best = min(results, key=lambda name: results[name].scores["mse"])
    close = {name: _excess(results[name], results[best]) for name in sorted(names, key=SURROGATES.index)}
    chosen = next(name for name, (excess, error) in close.items() if excess <= error)
    baseline = _cross_validate(_Mean, weights, losses, folds, repeats, seed)
    return Choice(
        chosen=chosen,
        why=_explain(chosen, best, close[chosen], results, folds),
        candidates={name: result.scores for name, result in results.items()},
        cv_predicted=results[chosen].predicted,
        warnings=_doubts(np.asarray(weights), chosen, results[chosen].scores, baseline.scores),
    )


def _excess(one: CrossValidation, best: CrossValidation) -> tuple[float, float]:
    """How much larger the mean squared error of one is than that of the best, and the standard error of that."""
    difference = one.errors - best.errors
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def _explain(
    chosen: str, best: str, excess: tuple[float, float], results: dict[str, CrossValidation], folds: int
) -> str:
    scores = results[chosen].scores
    quality = f"{folds}-fold Spearman {scores['spearman']:.3f}, RMSE {scores['rmse']:.4f} nats"
    if len(results) == 1:
        return f"{chosen} was the only candidate ({quality})"
    if chosen == best:
        return f"{chosen} has the lowest cross-validated error of {len(results)} candidates ({quality})"
    return (
        f"{chosen} ({quality}) is within noise of {best} (RMSE {results[best].scores['rmse']:.4f}): squared error "
        f"larger by {excess[0]:.2g}, one standard error {excess[1]:.2g}; preferred because it extrapolates better"
    )


def _doubts(weights: FloatArray, chosen: str, scores: dict[str, float], baseline: dict[str, float]) -> tuple[str, ...]:
    n, k = int(group_mixtures(weights).max()) + 1, weights.shape[1]
    warnings = []
    if n < k + 2:
        warnings.append(f"{n} mixtures for {k} domains: a law of {k} slopes needs at least {k + 2}, better {5 * k}")
    if scores["mse"] >= baseline["mse"]:
        warnings.append(
            f"{chosen} does not beat predicting the mean (cross-validated RMSE {scores['rmse']:.4f} against "
            f"{baseline['rmse']:.4f} nats): the runs do not show that the mixture matters for this target"
        )
    elif scores["spearman"] < POOR_SPEARMAN:
        warnings.append(
            f"cross-validated Spearman of {chosen} is {scores['spearman']:.2f}: its ranking is mostly noise"
        )
    return tuple(warnings)
