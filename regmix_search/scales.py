"""Do small proxies rank mixtures as large models do, and what do runs of several sizes say about the target's size?"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import norm

from regmix_search.choice import calibrate
from regmix_search.goals import Goal
from regmix_search.laws import Power
from regmix_search.objective import Objective
from regmix_search.region import Region
from regmix_search.scale_files import Scale
from regmix_search.scale_law import FORMS, Form, Sample, ScaleLaw, Size
from regmix_search.solver import solve
from regmix_search.space import FloatArray, Space
from regmix_search.surrogates import group_mixtures, score

TRUSTED = 0.8  # Spearman below which more than one in five pairs of mixtures swap (Kendall .6 for normal losses)
SHARED = 8  # mixtures run at both sizes from which these are compared; with fewer a law of the smaller stands in
RESAMPLES = 1000  # of the bootstrap of a rank correlation
FOLDS = 5
SAME = 1.01  # ratio of sizes that count as one
TIE = 2.0  # standard errors within which forms tie, as surrogates do


@dataclass(frozen=True, eq=False)
class Fitted:
    """The law of one loss over all sizes, the form that cross-validation picked, and how wide its intervals are."""

    law: ScaleLaw
    form: Form
    rmse: dict[str, float]  # of each form, out of fold, on runs of the largest size; empty: too few to judge
    factor: float  # a 90 % interval is prediction +- factor * deviation


def compare(small: Scale, large: Scale, goal: Goal, seed: int = 0) -> dict[str, Any]:
    """How alike two sizes rank mixtures: Spearman with a 90 % interval over resampled mixtures.

    On the mixtures that both have run, repeats averaged; below SHARED of them, on all of the larger's, whose ranks a
    power law on the smaller's predicts. `shared` says which; spearman is None where the larger has too few as well.
    """
    pairs = _shared(small, large, goal)
    names = {"small": small.name, "large": large.name, "shared": len(pairs)}
    if len(pairs) < SHARED:
        found = {n: Power().fit(small.runs.weights, small.runs.losses[n]) for n in goal.shares}
        predicted = goal.of({name: model.predict(large.runs.weights) for name, model in found.items()})
        pairs = np.column_stack([predicted, goal.of(large.runs.losses)])
    if len(pairs) < SHARED:
        return {**names, "mixtures": len(pairs), "spearman": None, "interval90": None}
    rng = np.random.default_rng([seed, zlib.crc32(b"scales")])
    drawn = [pairs[rng.integers(len(pairs), size=len(pairs))] for _ in range(RESAMPLES)]
    low, high = np.quantile([score(*rows.T)["spearman"] for rows in drawn], (0.05, 0.95))
    spearman = score(*pairs.T)["spearman"]
    return {**names, "mixtures": len(pairs), "spearman": spearman, "interval90": [float(low), float(high)]}


def _shared(small: Scale, large: Scale, goal: Goal) -> FloatArray:
    """Losses [n, 2] of the mixtures that both sizes have run."""
    count, group = len(small.runs.index), group_mixtures(np.vstack([small.runs.weights, large.runs.weights]))
    sides = []
    for numbers, runs in ((group[:count], small.runs), (group[count:], large.runs)):
        sums = np.bincount(numbers, goal.of(runs.losses), group.max() + 1)
        sides.append(sums / np.maximum(np.bincount(numbers, minlength=group.max() + 1), 1))
    both = np.intersect1d(group[:count], group[count:])
    return np.column_stack([side[both] for side in sides])


def fit_scales(given: Sequence[Sample], seed: int = 0, forms: Sequence[Form] = FORMS) -> Fitted:
    """The law in the form that predicts unseen mixtures best at the largest size, the first of those that tie.

    A fold leaves a mixture out at every size. With fewer than SHARED mixtures at the largest: the first form.
    """
    largest = max(range(len(given)), key=lambda i: given[i].size.flops)
    group = group_mixtures(np.vstack([sample.weights for sample in given]))
    ends = np.cumsum([0, *(len(sample.losses) for sample in given)])
    mine = group[ends[largest] : ends[largest + 1]]
    if len(judged := np.unique(mine)) < SHARED:
        return Fitted(ScaleLaw(forms[0]).fit(given), forms[0], {}, float(norm.ppf(0.95)))
    order = np.random.default_rng([seed, zlib.crc32(b"folds")]).permutation(len(judged))
    fold = np.full(group.max() + 1, -1)
    fold[judged[order]] = np.arange(len(judged)) % FOLDS
    errors = {form: np.empty(len(mine)) for form in forms}
    deviations = {form: np.empty(len(mine)) for form in forms}
    for i in range(FOLDS):
        rows = [fold[group[a:b]] != i for a, b in pairwise(ends)]
        kept = [Sample(s.size, s.weights[r], s.losses[r]) for s, r in zip(given, rows, strict=True) if r.any()]
        out = fold[mine] == i
        for form in forms:
            law = ScaleLaw(form).fit(kept).at(given[largest].size)
            errors[form][out] = law.predict(given[largest].weights[out]) - given[largest].losses[out]
            deviations[form][out] = law.deviation(given[largest].weights[out])
    form = _first_of_ties(errors)
    rmse = {str(name): float(np.sqrt(np.mean(found**2))) for name, found in errors.items()}
    return Fitted(ScaleLaw(form).fit(given), form, rmse, calibrate(errors[form], deviations[form]))


def _first_of_ties(errors: Mapping[Form, FloatArray]) -> Form:
    """The first form whose squared errors are not larger than the best's by TIE standard errors."""
    best = min(errors, key=lambda form: float(np.mean(errors[form] ** 2)))
    for form, found in errors.items():
        more = found**2 - errors[best] ** 2
        if more.mean() <= TIE * more.std(ddof=1) / np.sqrt(len(more)):
            return form
    return best


def predict_target(
    fitted: Mapping[str, Fitted], goal: Goal, size: Size, small: Size, space: Space, region: Region, sample: FloatArray
) -> dict[str, Any]:
    """The best mixture at the target's size, what it and the prior would score there, and what the smallest size costs.

    Losses in nats per token with 90 % intervals; sample [n, k] are mixtures to start from. The gain's interval knows
    that both losses share one level. cost_of_small: nats lost by the smallest size's own optimum.
    """
    objective, proxy = (
        Objective(tuple((share, fitted[name].law.at(at)) for name, share in goal.shares.items()), goal.worst)
        for at in (size, small)
    )
    best, theirs = (solve(each, region, space.prior, sample) for each in (objective, proxy))
    loss, prior = (_interval(fitted, goal, size, weights[None]) for weights in (best, space.prior))
    gain = _interval(fitted, goal, size, space.prior[None], best[None])
    return {
        "params": size.params,
        "tokens": size.tokens,
        "weights": space.named(best),
        "predicted": loss,
        "prior": prior,
        "gain": gain,
        "cost_of_small": objective.at(theirs) - objective.at(best),
        "small_weights": space.named(theirs),
    }


def _interval(
    fitted: Mapping[str, Fitted], goal: Goal, size: Size, weights: FloatArray, beside: FloatArray | None = None
) -> dict[str, Any]:
    """A loss of the goal [nats] with its 90 % interval; of the worst goal, of the worst loss. beside: of a difference.

    Deviations of several losses are added up, as if all erred together: sizes move them so.
    """
    values, widths = {}, {}
    for name, each in fitted.items():
        law = each.law.at(size)
        noise = law.scale**2 * law.posterior.noise if beside is None else 0.0
        values[name] = law.predict(weights) - (0.0 if beside is None else law.predict(beside))
        widths[name] = each.factor * np.sqrt(law.uncertainty(weights, beside) ** 2 + noise)
    value = float(goal.of(values)[0])
    width = max(float(w[0]) for w in widths.values()) if goal.worst else float(goal.of(widths)[0])
    return {"loss": value, "interval90": [value - width, value + width]}


def doubts(scales: Sequence[Scale], pairs: Sequence[Mapping[str, Any]], target: Size) -> list[str]:
    """Why the small scale may not be trusted for the target: ranks that differ, a target too far away."""
    warnings = []
    for pair in pairs:
        where = f"{pair['small']} and {pair['large']}"
        if pair["spearman"] is None:
            warnings.append(f"{where}: {pair['mixtures']} mixtures at {pair['large']} are too few to compare ranks")
        elif pair["interval90"][0] < TRUSTED:
            alike = f"Spearman {pair['spearman']:.2f}, 90 % interval from {pair['interval90'][0]:.2f}"
            warnings.append(
                f"{where} do not rank {pair['mixtures']} mixtures alike ({alike}): below {TRUSTED} more than one pair "
                f"in five swaps, so the order at {pair['small']} cannot be trusted for a larger model"
            )
    for what in ("params", "tokens"):
        seen, wanted = sorted({float(getattr(scale.size, what)) for scale in scales}), float(getattr(target, what))
        beyond, span = wanted / seen[-1], seen[-1] / seen[0]
        if beyond > SAME and span < SAME:
            warnings.append(
                f"all scales have {seen[0]:.3g} {what}, the target has {wanted:.3g}: how the loss falls with {what} is "
                "a prior (Hoffmann et al. 2022), not a measurement"
            )
        elif beyond > max(span, SAME):
            warnings.append(
                f"the target has {wanted:.3g} {what}, {beyond:.3g} times the largest scale's, and that has {span:.3g} "
                "times the smallest's: this is farther than these scales can show"
            )
    return warnings
