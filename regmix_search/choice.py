"""Which surrogate to trust, by nested cross-validation on the n training runs, and how wide its intervals must be."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from regmix_search.gp import Average, GaussianProcess, LawProcess
from regmix_search.laws import Effective
from regmix_search.posterior import check_runs
from regmix_search.repeats import EffectiveRepeats
from regmix_search.space import FloatArray
from regmix_search.surrogates import SURROGATES, Surrogate, build_surrogate, group_mixtures, score
from regmix_search.trees import LightGBM

POOR_SPEARMAN = 0.5  # below this, half of the ranking is noise
COMPOUND = {LawProcess.name: 1, Average.name: 2}  # made of others, and of each other in this order
TIE = 2.0  # standard errors within which cross-validation cannot tell two candidates apart
DROP = 2.0  # standard errors behind the best after which a candidate runs no more folds: trees take most of the time
RACE_FROM = 60  # out-of-fold runs before any candidate is dropped
FEW = 128  # distinct mixtures up to which folds are drawn three times
Folds = npt.NDArray[np.int64]
Models = Mapping[str, Surrogate]


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """Out-of-fold quality of one surrogate. Scores are means over repeats; `predicted` is the first repeat's."""

    scores: dict[str, float]  # spearman, pearson, mse, rmse, coverage90
    predicted: FloatArray  # [n] each by a fit that never saw that mixture
    deviation: FloatArray  # [n] what that fit thought of its own error, before calibration
    errors: FloatArray  # [n] squared, mean over repeats


@dataclass(frozen=True, eq=False)
class Choice:
    """The surrogate that cross-validation picked, and why, in words."""

    chosen: str
    why: str
    candidates: dict[str, dict[str, float]]  # those that were dropped early lack coverage90
    nested: dict[str, float]  # scores of the choice itself: each fold by what the others alone would have chosen
    scale90: float  # a 90 % interval is prediction +- scale90 * deviation
    cv_predicted: FloatArray  # [n] out of fold, by the chosen one
    cv_deviation: FloatArray  # [n]
    nested_predicted: FloatArray  # [n] as `nested` scores them
    nested_deviation: FloatArray  # [n]
    warnings: tuple[str, ...]


def calibrate(errors: FloatArray, deviations: FloatArray) -> float:
    """How many deviations hold nine tenths of the errors [n]: split conformal's quantile, (n + 1) .9 from below."""
    ratios = np.sort(np.abs(errors) / np.maximum(deviations, 1e-300))
    return float(ratios[min(len(ratios), math.ceil((len(ratios) + 1) * 0.9)) - 1])


def coverage90(errors: FloatArray, deviations: FloatArray, fold: Folds) -> float:
    """Share of errors inside 90 % intervals that were calibrated on the other folds. NaN with fewer than two."""
    inside = np.full(len(errors), np.nan)
    for out in (fold == i for i in np.unique(fold)):
        if not out.all():
            inside[out] = np.abs(errors[out]) <= calibrate(errors[~out], deviations[~out]) * deviations[out]
    return float(np.mean(inside))


def cross_validate(
    name: str, weights: FloatArray, losses: FloatArray, folds: int = 5, repeats: int = 3, seed: int = 0
) -> CrossValidation:
    """K-fold cross-validation, `repeats` times with other folds. Runs of one mixture always share a fold.

    Raises ValueError with fewer than 2 different mixtures.
    """
    weights, losses = check_runs(weights, losses)
    trials = [_run_folds([name], weights, losses, fold, seed, None) for fold in _folds(weights, folds, repeats, seed)]
    return _gather(name, losses, trials)


@dataclass(frozen=True, eq=False)
class _Trial:
    """One repeat of cross-validation. Rows that a dropped candidate never predicted are NaN."""

    fold: Folds
    models: list[dict[str, Surrogate]]  # fold -> those fitted without it
    predicted: dict[str, FloatArray]
    deviation: dict[str, FloatArray]
    alive: list[str]


def _folds(weights: FloatArray, folds: int, repeats: int, seed: int) -> list[Folds]:
    group = group_mixtures(weights)
    count = int(group.max()) + 1
    if count < 2:
        raise ValueError("all runs have the same mixture: cross-validation needs at least 2 different ones")
    orders = [np.random.default_rng([seed, zlib.crc32(b"folds"), r]).permutation(count) for r in range(repeats)]
    return [order[group] % min(folds, count) for order in orders]


def _fit_all(
    names: Sequence[str], weights: FloatArray, losses: FloatArray, seed: int, like: Models, once: FloatArray | None
) -> dict[str, Surrogate]:
    """Every surrogate fitted once; the compound ones are made of those that are there.

    like: fits to more of the same runs. Laws start from them, processes keep their hyperparameters.
    """
    models: dict[str, Any] = {}
    for name in sorted(names, key=lambda name: COMPOUND.get(name, 0)):
        lent = like.get(name)
        model = build_surrogate(name, getattr(lent, "once", once))
        if isinstance(model, Average) and {LawProcess.name, GaussianProcess.name} <= models.keys():
            model.law, model.process = models[LawProcess.name], models[GaussianProcess.name]
        elif isinstance(model, LawProcess):
            model.fit(weights, losses, seed, lent, models.get(Effective.name))  # type: ignore[arg-type]
        elif isinstance(model, Effective | GaussianProcess | Average):
            model.fit(weights, losses, seed, lent)  # type: ignore[arg-type]
        else:
            model.fit(weights, losses, seed)
        models[name] = model
    return models


def _predict_all(models: Mapping[str, Surrogate], weights: FloatArray) -> dict[str, FloatArray]:
    """Predictions [m] of every model, the average's from its parts where these are there: processes take the time."""
    found = {name: model.predict(weights) for name, model in models.items() if name != Average.name}
    if Average.name in models and {LawProcess.name, GaussianProcess.name} <= found.keys():
        found[Average.name] = Average.mix(found[LawProcess.name], found[GaussianProcess.name])
    elif Average.name in models:
        found[Average.name] = models[Average.name].predict(weights)
    return found


def _run_folds(
    names: Sequence[str], weights: FloatArray, losses: FloatArray, fold: Folds, seed: int, once: FloatArray | None
) -> _Trial:
    """Outer folds in turn. A candidate that falls behind by DROP standard errors runs no more of them."""
    predicted, deviation = ({name: np.full(len(losses), np.nan) for name in names} for _ in range(2))
    alive, models = list(names), []
    for i in range(int(fold.max()) + 1):
        out = fold == i
        models.append(_fit_all(alive, weights[~out], losses[~out], seed, {}, once))
        for name, found in _predict_all(models[-1], weights[out]).items():
            predicted[name][out], deviation[name][out] = found, models[-1][name].deviation(weights[out])
        seen = fold <= i
        if seen.sum() >= RACE_FROM:
            errors = {name: (predicted[name][seen] - losses[seen]) ** 2 for name in alive}
            best = min(errors, key=lambda name: float(np.mean(errors[name])))
            alive = [n for n in alive if n == best or _behind(errors[n], errors[best], DROP)[0] <= 0]
    return _Trial(fold, models, predicted, deviation, alive)


def _behind(errors: FloatArray, best: FloatArray, allowed: float) -> tuple[float, float, float]:
    """Mean excess of squared error beyond `allowed` standard errors; the excess; its standard error over runs."""
    difference = errors - best
    excess, error = float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return excess - allowed * error, excess, error


def _prefer(errors: Mapping[str, FloatArray], larger: bool) -> str:
    """Of those that tie with the lowest mean squared error: the smoothest for a larger target, else the average."""
    best = min(errors, key=lambda name: float(np.mean(errors[name])))
    close = [name for name in errors if name == best or _behind(errors[name], errors[best], TIE)[0] <= 0]
    if larger:
        return min(close, key=SURROGATES.index)
    return Average.name if Average.name in close else best


def _nest(
    trial: _Trial, weights: FloatArray, losses: FloatArray, seed: int, larger: bool
) -> tuple[FloatArray, FloatArray]:
    """Predictions and deviations [n] of the choice: each outer fold by what inner folds chose that never saw it."""
    predicted, deviation = np.empty(len(losses)), np.empty(len(losses))
    for i, models in enumerate(trial.models):
        out, errors = trial.fold == i, {name: np.full(len(losses), np.nan) for name in trial.alive}
        for j in range(len(trial.models)) if len(trial.alive) > 1 else ():
            inner = trial.fold == j
            train = ~out & ~inner
            if j != i and train.sum() >= 2:
                fitted = _fit_all(trial.alive, weights[train], losses[train], seed, models, None)
                for name, found in _predict_all(fitted, weights[inner]).items():
                    errors[name][inner] = (found - losses[inner]) ** 2
        judged = {name: found[np.isfinite(found)] for name, found in errors.items()}
        chosen = _prefer(judged, larger) if min(map(len, judged.values())) > 1 else trial.alive[0]
        predicted[out], deviation[out] = trial.predicted[chosen][out], trial.deviation[chosen][out]
    return predicted, deviation


def _gather(name: str, losses: FloatArray, trials: Sequence[_Trial]) -> CrossValidation:
    """Scores over what a candidate predicted; the whole of it unless it was dropped."""
    each, squares = [], []
    for trial in trials:
        predicted, seen = trial.predicted[name], np.isfinite(trial.predicted[name])
        scores = score(predicted[seen], losses[seen])
        inside = coverage90(predicted[seen] - losses[seen], trial.deviation[name][seen], trial.fold[seen])
        each.append(scores | ({} if math.isnan(inside) or not seen.all() else {"coverage90": inside}))
        squares.append((predicted - losses) ** 2)
    keys = [key for key in each[0] if all(key in scores for scores in each)]
    means = {key: float(np.mean([scores[key] for scores in each])) for key in keys}
    return CrossValidation(means, trials[0].predicted[name], trials[0].deviation[name], np.mean(squares, axis=0))


def choose(
    weights: FloatArray,
    losses: FloatArray,
    names: Sequence[str] = SURROGATES,
    seed: int = 0,
    folds: int = 5,
    repeats: int | None = None,
    larger: bool = False,
    once: FloatArray | None = None,
) -> Choice:
    """Picks a surrogate by cross-validated squared error: the best, or a safer one that ties with it.

    larger: the mixture is for a larger model than these runs, to which the detail that a process learns does not carry
    over: then the smoothest that ties, by the order of SURROGATES. Standard errors are of paired differences over runs.
    once [k]: weights at which a run has read each domain once; without runs above it no candidate counts epochs.
    repeats None: 3 up to 128 mixtures, 1 above. ValueError for no names, or runs of a single mixture.
    """
    weights, losses = check_runs(weights, losses)
    mixtures = int(group_mixtures(weights).max()) + 1
    names = _affordable(names, mixtures, once is not None and bool((weights > once).any()))
    repeats = repeats or (3 if mixtures <= FEW else 1)
    trials, left = [], list(names)
    for fold in _folds(weights, folds, repeats, seed):
        trials.append(_run_folds(left, weights, losses, fold, seed, once))
        left = trials[-1].alive
    results = {n: _gather(n, losses, [t for t in trials if n in t.predicted]) for n in names}
    errors = {n: results[n].errors for n in left}
    chosen, best = _prefer(errors, larger), min(errors, key=lambda name: float(np.mean(errors[name])))
    found = results[chosen]
    behind = _behind(errors[chosen], errors[best], TIE)[1:]
    others = {n: result.scores for n, result in results.items()}
    predicted, deviation = _nest(trials[0], weights, losses, seed, larger)
    inside = coverage90(predicted - losses, deviation, trials[0].fold)
    return Choice(
        chosen=chosen,
        why=_explain(chosen, best, behind, others, folds),
        candidates=others,
        nested={**score(predicted, losses), "coverage90": inside},
        scale90=calibrate(found.predicted - losses, found.deviation),
        cv_predicted=found.predicted,
        cv_deviation=found.deviation,
        nested_predicted=predicted,
        nested_deviation=deviation,
        warnings=_doubts(chosen, found.scores, _mean_error(losses, trials[0].fold)),
    )


def _affordable(names: Sequence[str], mixtures: int, repeated: bool) -> Sequence[str]:
    """Without trees where folds are too small, and epochs where nothing repeats, unless nothing else was asked for."""
    if not names:
        raise ValueError(f"no surrogates to choose from; there are {', '.join(SURROGATES)}")
    few = mixtures * 3 // 5 < LightGBM.NEEDS  # two of five folds are out
    idle = {LightGBM.name: few, EffectiveRepeats.name: not repeated}
    return [n for n in names if not idle.get(n)] or names


def _mean_error(losses: FloatArray, fold: Folds) -> float:
    """Root mean squared error of predicting the other folds' mean: what every surrogate must beat."""
    means = np.array([losses[fold != i].mean() for i in range(int(fold.max()) + 1)])
    return float(np.sqrt(np.mean((means[fold] - losses) ** 2)))


def _explain(
    chosen: str, best: str, behind: tuple[float, float], candidates: Mapping[str, Mapping[str, float]], folds: int
) -> str:
    scores = candidates[chosen]
    quality = f"{folds}-fold Spearman {scores['spearman']:.3f}, RMSE {scores['rmse']:.4f} nats"
    if len(candidates) == 1:
        return f"{chosen} was the only candidate ({quality})"
    if chosen == best:
        return f"{chosen} has the lowest cross-validated error of {len(candidates)} candidates ({quality})"
    reason = (
        "averages err least on new mixtures" if chosen == Average.name else "smooth laws carry over to larger models"
    )
    return (
        f"{chosen} ({quality}) is within noise of {best} (RMSE {candidates[best]['rmse']:.4f}): squared error larger "
        f"by {behind[0]:.2g}, one standard error {behind[1]:.2g}; preferred because {reason}"
    )


def _doubts(chosen: str, scores: Mapping[str, float], mean_rmse: float) -> tuple[str, ...]:
    warnings = []
    if scores["rmse"] >= mean_rmse:
        warnings.append(
            f"{chosen} does not beat predicting the mean (cross-validated RMSE {scores['rmse']:.4f} against "
            f"{mean_rmse:.4f} nats): the runs do not show that the mixture matters for this target"
        )
    elif scores["spearman"] < POOR_SPEARMAN:
        warnings.append(
            f"cross-validated Spearman of {chosen} is {scores['spearman']:.2f}: its ranking is mostly noise"
        )
    return tuple(warnings)
