"""What an optimum minimises: surrogates weighed together, a pull to the prior, ceilings that no loss may pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from regmix_search.region import Region
from regmix_search.space import FloatArray
from regmix_search.surrogates import Surrogate

TINY = 1e-12  # where log w stops: the slope of w log w is infinite at 0
PRICE = 100.0  # of a nat above a ceiling, where ceilings are not constraints


@dataclass(frozen=True, eq=False)
class Objective:
    """A weighted mean of surrogates, shares summing to 1, or their largest; with a pull to a prior, under ceilings."""

    terms: tuple[tuple[float, Surrogate], ...]
    worst: bool = False  # minimise the largest prediction instead of the weighted mean
    kl: float = 0.0  # nats of loss for one nat of KL(weights | prior)
    prior: FloatArray | None = None  # [k] what kl pulls to
    ceilings: tuple[tuple[Surrogate, float], ...] = ()  # predictions that may not be above a number

    def predict(self, weights: FloatArray) -> FloatArray:
        """Losses [m] of mixtures [m, k]: the mean or the worst, without the pull."""
        if self.worst:
            return np.asarray(np.max([model.predict(weights) for _, model in self.terms], axis=0))
        return np.asarray(sum(share * model.predict(weights) for share, model in self.terms))

    def value(self, weights: FloatArray) -> FloatArray:
        """What is minimised [m]: losses and the pull to the prior, at mixtures [m, k]."""
        return np.asarray(self.predict(weights) + self.penalty(weights))

    def penalty(self, weights: FloatArray) -> FloatArray:
        """The pull to the prior [m]: kl * KL(weights | prior)."""
        if not self.kl or self.prior is None:
            return np.zeros(len(weights))
        return np.asarray(self.kl * np.sum(weights * np.log(np.maximum(weights, TINY) / self.prior), axis=-1))

    def at(self, weights: FloatArray) -> float:
        """Loss of one mixture [k]."""
        return float(self.predict(weights[None])[0])

    def slope(self, weights: FloatArray) -> FloatArray:
        """Gradient [k] of the value at one mixture [k] (of the mean, not of the worst); every term must be smooth."""
        slope = sum(share * slope_of(model, weights) for share, model in self.terms)
        return np.asarray(slope + self.pull(weights))

    def pull(self, weights: FloatArray) -> FloatArray:
        """Gradient [k] of that at one mixture [k]."""
        if not self.kl or self.prior is None:
            return np.zeros_like(weights)
        return np.asarray(self.kl * (np.log(np.maximum(weights, TINY) / self.prior) + 1))

    def excess(self, weights: FloatArray) -> FloatArray:
        """Nats [m] above the ceilings, summed over them."""
        over = [np.maximum(model.predict(weights) - limit, 0.0) for model, limit in self.ceilings]
        return np.asarray(np.sum(over, axis=0)) if over else np.zeros(len(weights))

    @property
    def models(self) -> list[Surrogate]:
        """Every surrogate in it, ceilings included."""
        return [model for _, model in self.terms] + [model for model, _ in self.ceilings]

    @property
    def is_smooth(self) -> bool:
        """Does every surrogate in it have slopes?"""
        return all(callable(getattr(model, "gradient", None)) for model in self.models)

    @property
    def is_convex(self) -> bool:
        """Is every surrogate one of the convex laws?"""
        own = [getattr(model, "is_convex", callable(getattr(model, "argmin", None))) for model in self.models]
        return self.is_smooth and all(own)


def slope_of(model: Any, weights: FloatArray) -> FloatArray:
    """Gradient [k] of one smooth surrogate at one mixture [k]."""
    return np.asarray(model.gradient(weights[None])[0])


def duality_gap(objective: Objective, region: Region, weights: FloatArray) -> float | None:
    """Nats by which the true minimum can be lower, at most, when the objective is convex: slope.(w - cheapest corner).

    For a surrogate that is not convex, 0 means that no small step helps. None: worst case, ceilings, no slopes.
    """
    if objective.worst or objective.ceilings or not objective.is_smooth:
        return None
    slope = objective.slope(weights)
    return max(0.0, float(slope @ (weights - region.cheapest(slope))))
