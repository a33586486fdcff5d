"""The power law with epochs as a feature: tokens that a run repeats add less to its effective data, at a fitted rate.

n runs, k domains. Weights become epochs where it is known how much a run can read before it repeats.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from regmix_search.laws import Power
from regmix_search.space import FloatArray, bound

REPEATS = 15.4  # R*_D as Muennighoff et al. 2023 (arXiv 2305.16264) fit it: the prior's centre
STEP = 1e-4  # of a finite difference in log R*
HALVINGS = 50  # of the bisections for the optimum


class EffectiveRepeats(Power):
    """The power law on u(w) instead of w: u = w up to one epoch, then U + U R* (1 - exp(-(w / U - 1) / R*)).

    U is the weight at which a run has read a domain once (`once` [k]); R*, shared by the domains, is fitted, with
    log(R* / 15.4) ~ N(0, 1). u is concave, so the law stays convex. Without `once` nothing is known to repeat.
    """

    name: ClassVar[str] = "effective_repeats"
    SHAPE = 2  # log(R* / 15.4), then the power law's own

    def __init__(self, once: npt.ArrayLike | None = None) -> None:
        self.once = np.full(1, 1e9) if once is None else np.asarray(once, dtype=np.float64)

    def standard(self, params: FloatArray, weights: FloatArray) -> FloatArray:
        """Standardised losses [n] under any parameters; for laws that are made of this one."""
        return self._standard(params, self._logs(weights))

    def slopes(self, params: FloatArray, weights: FloatArray) -> FloatArray:
        """Their slopes in the parameters [n, p]."""
        return self._slopes(params, self._logs(weights))

    def prior(self, k: int) -> tuple[FloatArray, FloatArray]:
        """Centres and standard deviations of the parameters for k domains."""
        return self._prior(k)

    def uncertainty(self, weights: FloatArray, beside: FloatArray | None = None) -> FloatArray:
        """Standard deviations [m] of what is predicted, noise left out; beside [m, k]: of the difference from these."""
        slopes = self.slopes(self.posterior.params, weights)
        if beside is not None:
            slopes = slopes - self.slopes(self.posterior.params, beside)
        variance = np.einsum("ij,jk,ik->i", slopes, self.posterior.covariance, slopes)
        return np.asarray(self.scale * np.sqrt(np.maximum(variance, 0.0)))

    @property
    def saturation(self) -> float:
        """R*: the further epochs after which repeating is worth next to nothing."""
        return float(self._saturation(self.posterior.params))

    @staticmethod
    def _saturation(params: FloatArray) -> FloatArray:
        return np.asarray(REPEATS * np.exp(np.clip(params[-2], -6.0, 6.0)))

    def _worth(self, weights: FloatArray, saturation: FloatArray) -> tuple[FloatArray, FloatArray]:
        """u [n, k] and du / dw [n, k]."""
        more = np.maximum(weights / self.once - 1, 0.0)
        left = np.exp(-more / saturation)
        return np.minimum(weights, self.once) + self.once * saturation * (1 - left), left

    def _stretch(self, params: FloatArray, logs: FloatArray) -> FloatArray:
        """log(u + e) from log(w + e)."""
        return np.asarray(np.log(self._worth(np.exp(logs) - self.SHIFT, self._saturation(params))[0] + self.SHIFT))

    def _curve(self, params: FloatArray, data: FloatArray) -> tuple[FloatArray, FloatArray, list[FloatArray]]:
        curve, fall, shape = super()._curve(params, data)
        return curve, fall, [np.zeros_like(data), *shape]

    def _standard(self, params: FloatArray, logs: FloatArray) -> FloatArray:
        return super()._standard(params, self._stretch(params, logs))

    def _slopes(self, params: FloatArray, logs: FloatArray) -> FloatArray:
        slopes, step = super()._slopes(params, self._stretch(params, logs)), np.zeros_like(params)
        step[-2] = STEP
        slopes[:, -2] = (self._standard(params + step, logs) - self._standard(params - step, logs)) / (2 * STEP)
        return slopes

    def gradient(self, weights: FloatArray) -> FloatArray:
        params, logs = self.posterior.params, self._logs(weights)
        (rates, powers), stretched = self._domains(params), self._stretch(params, logs)
        data = self._raise(params, stretched)[2]
        fall = self._curve(params, np.log(data))[1] * np.exp(params[1]) / data
        left = self._worth(weights, self._saturation(params))[1]
        return np.asarray(self.scale * fall[:, None] * rates * powers * np.exp(stretched * (powers - 1)) * left)

    def argmin(self, caps: FloatArray) -> FloatArray:
        """As the power law's, but what a domain takes at a marginal return is found by bisection too."""
        params = self.posterior.params
        (rates, powers), saturation = self._domains(params), self._saturation(params)

        def returns(weights: FloatArray) -> FloatArray:
            worth, left = self._worth(weights, saturation)
            return np.asarray(np.log(rates * powers * left) + np.log(worth + self.SHIFT) * (powers - 1))

        def spend(level: float) -> FloatArray:
            low, high = np.zeros_like(caps), caps
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                more = returns(middle) > level
                low, high = np.where(more, middle, low), np.where(more, high, middle)
            return high

        low, high = float(returns(caps).min()) - 1, float(returns(np.zeros_like(caps)).max()) + 1
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if spend(middle).sum() > 1 else (low, middle)
        return bound(spend(low), caps)
