"""Parametric laws from mixture weights to loss: fitted in milliseconds, smooth, and solved exactly under caps.

n runs, k domains. Losses are standardised inside every fit, so that the priors below have no units.
"""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np

from regmix_search.posterior import Posterior, arrange, maximum_a_posteriori, standardise
from regmix_search.space import FloatArray, bound, fill_cheapest


class Linear:
    """loss = c + b.w: ridge, its strength chosen by leave-one-out in closed form. RegMix's baseline."""

    name: ClassVar[str] = "linear"
    PENALTIES: ClassVar[FloatArray] = np.geomspace(1e-4, 1e2, 25)  # in units of sum of squared centred weights

    def fit(self, weights: FloatArray, losses: FloatArray, seed: int = 0) -> Self:
        weights, losses = arrange(weights, losses)
        self.mean, self.centre = float(losses.mean()), weights.mean(axis=0)
        left, sizes, right = np.linalg.svd(weights - self.centre, full_matrices=False)
        project = left.T @ (losses - self.mean)
        best = np.inf
        for penalty in self.PENALTIES:
            shrink = sizes**2 / (sizes**2 + penalty)
            leverage = (left**2) @ shrink + 1 / len(losses)
            error = (losses - self.mean - left @ (shrink * project)) / np.maximum(1 - leverage, 1e-6)
            if (score := float(np.mean(error**2))) < best:
                best, self.slopes = score, right.T @ (sizes / (sizes**2 + penalty) * project)
                self.covariance = score * (right.T * (1 / (sizes**2 + penalty))) @ right
        self.noise = best * (1 + 1 / len(losses))
        return self

    def predict(self, weights: FloatArray) -> FloatArray:
        return np.asarray(self.mean + (np.ascontiguousarray(weights) - self.centre) @ self.slopes)

    def deviation(self, weights: FloatArray) -> FloatArray:
        away = weights - self.centre
        return np.asarray(np.sqrt(self.noise + np.einsum("ij,jk,ik->i", away, self.covariance, away)))

    def gradient(self, weights: FloatArray) -> FloatArray:
        return np.broadcast_to(self.slopes, weights.shape).copy()

    def argmin(self, caps: FloatArray) -> FloatArray:
        return fill_cheapest(self.slopes, caps)


class LogLinear:
    """loss = c + exp(t.w): the exponential mixing law (Ye et al. 2024, arXiv 2403.16952), Olmix's log-linear.

    Maximum a posteriori from two values of c, with a weak prior that pulls the t together.
    """

    name: ClassVar[str] = "loglinear"
    RIDGE = 0.1  # prior precision of t around its mean; more hurts below 64 of RegMix's runs, less changes nothing
    FLOOR_SD = 3.0  # prior sd of c, in sds of the losses
    FLOORS = (0.1, 1.0)  # starts of c: this far below the lowest loss

    def fit(self, weights: FloatArray, losses: FloatArray, seed: int = 0) -> Self:
        weights, losses = arrange(weights, losses)
        self.mean, self.scale, z = standardise(losses)
        k = weights.shape[1]
        precision = np.zeros((k + 1, k + 1))
        precision[0, 0], precision[1:, 1:] = self.FLOOR_SD**-2, self.RIDGE * (np.eye(k) - 1 / k)
        self.posterior = maximum_a_posteriori(
            misfit=lambda p: p[0] + self._rise(weights, p[1:]) - z,
            slopes=lambda p: self._slopes(weights, p),
            starts=[self._start(weights, z, float(z.min()) - floor) for floor in self.FLOORS],
            precision=precision,
            centre=np.zeros(k + 1),
        )
        return self

    @property
    def rates(self) -> FloatArray:
        """t [k]."""
        return self.posterior.params[1:]

    @staticmethod
    def _start(weights: FloatArray, z: FloatArray, floor: float) -> FloatArray:
        logs, k = np.log(z - floor), weights.shape[1]
        rates = logs.mean() + np.linalg.solve(weights.T @ weights + 0.1 * np.eye(k), weights.T @ (logs - logs.mean()))
        return np.concatenate([[floor], rates])

    @staticmethod
    def _rise(weights: FloatArray, rates: FloatArray) -> FloatArray:
        rise = np.clip(np.ascontiguousarray(weights) @ rates, -50.0, 50.0)  # a wild trial step must not overflow
        return np.asarray(np.exp(rise))

    def _slopes(self, weights: FloatArray, params: FloatArray) -> FloatArray:
        return np.hstack([np.ones((len(weights), 1)), weights * self._rise(weights, params[1:])[:, None]])

    def predict(self, weights: FloatArray) -> FloatArray:
        return np.asarray(self.mean + self.scale * (self.posterior.params[0] + self._rise(weights, self.rates)))

    def deviation(self, weights: FloatArray) -> FloatArray:
        return self.scale * self.posterior.deviation(self._slopes(weights, self.posterior.params))

    def gradient(self, weights: FloatArray) -> FloatArray:
        return np.asarray(self.scale * self._rise(weights, self.rates)[:, None] * self.rates)

    def argmin(self, caps: FloatArray) -> FloatArray:
        return fill_cheapest(self.rates, caps)  # exp is monotone: the same corner as the linear program


class Effective:
    """loss = c - A log(b + sum_i a_i ((w_i + e)^g_i - e^g_i)): domains add up to effective data, each at its own rate.

    A, b, a_i > 0 and 0 < g_i < 1, so the loss is convex in w. Maximum a posteriori with priors that tie the domains:
    g_i = sigmoid(g + SPREAD d_i) with d_i ~ N(0, 1). One start is enough: random ones found nothing
    lower in 170 fits to RegMix's runs. A domain that no run used keeps its prior (a = 1): that is not evidence.
    """

    name: ClassVar[str] = "effective"
    SHAPE = 0  # parameters of the curve from effective data to loss beyond c and A
    SPREAD = 0.3  # sd of logit g_i around the shared g; .1 to .4 predict alike, .5 stalls at times
    SHIFT = 3e-4  # e: keeps the slope finite at w = 0, about the smallest weight a proxy can tell from none
    FLOOR_SD = 3.0  # prior sd of c, in sds of the losses
    # prior mean and sd of log A (in sds of the losses), of log a_i and of g. 24 of RegMix's training runs rank the rest
    # better by .008 (13 losses) than with sds of 1: domains differ tenfold in worth, and all powers are near a half
    DROP: ClassVar[tuple[float, float]] = (-0.5, 0.5)
    RATE: ClassVar[tuple[float, float]] = (0.0, 2.0)
    POWER: ClassVar[tuple[float, float]] = (0.0, 0.25)
    posterior: Posterior

    def fit(self, weights: FloatArray, losses: FloatArray, seed: int = 0, like: Self | None = None) -> Self:
        """As every surrogate; `like` is a fit to most of these runs, to start from."""
        weights, losses = arrange(weights, losses)
        self.mean, self.scale, z = standardise(losses)
        logs = np.log(weights + self.SHIFT)
        centre, spread = self._prior(weights.shape[1])
        self.posterior = maximum_a_posteriori(
            misfit=lambda p: self._standard(p, logs) - z,
            slopes=lambda p: self._slopes(p, logs),
            starts=[centre if like is None else like.posterior.params],
            precision=np.diag(spread**-2),
            centre=centre,
            noise=None if like is None else like.posterior.noise,
        )
        return self

    def prior_slopes(self, weights: FloatArray) -> FloatArray:
        """d standardised loss / d parameters [n, p] at the prior's centre, in the prior's standard deviations."""
        centre, spread = self._prior(weights.shape[1])
        return np.asarray(self._slopes(centre, self._logs(weights)) * spread)

    def _prior(self, k: int) -> tuple[FloatArray, FloatArray]:
        """Centres and standard deviations of c, log A, log b, log a_i, g, d_i and the curve's own."""
        drawn = [(0.0, self.FLOOR_SD), self.DROP, (0.0, 1.0), *[self.RATE] * k, self.POWER]
        centre, spread = np.array([*drawn, *[(0.0, 1.0)] * (k + self.SHAPE)]).T
        return centre, spread

    def _domains(self, params: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Rates a [k] and powers g [k]."""
        params = np.clip(params, -30.0, 30.0)  # a wild trial step must not overflow
        k = (len(params) - 4 - self.SHAPE) // 2
        powers = 1 / (1 + np.exp(-(params[3 + k] + self.SPREAD * params[4 + k : 4 + 2 * k])))
        return np.exp(params[3 : 3 + k]), powers

    def _raise(self, params: FloatArray, logs: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(w + e)^g [n, k], e^g [k] and the effective data [n], for logs = log(w + e)."""
        rates, powers = self._domains(params)
        raised, zero = np.exp(logs * powers), np.exp(np.log(self.SHIFT) * powers)
        return raised, zero, np.exp(np.clip(params[2], -30.0, 30.0)) + (raised - zero) @ rates

    def _curve(self, params: FloatArray, data: FloatArray) -> tuple[FloatArray, FloatArray, list[FloatArray]]:
        """For log effective data [n]: standardised losses over A, their slope in it, columns for SHAPE parameters."""
        return -data, -np.ones_like(data), []

    def _standard(self, params: FloatArray, logs: FloatArray) -> FloatArray:
        """Standardised losses [n]."""
        curve = self._curve(params, np.log(self._raise(params, logs)[2]))[0]
        return np.asarray(params[0] + np.exp(np.clip(params[1], -30.0, 30.0)) * curve)

    def _slopes(self, params: FloatArray, logs: FloatArray) -> FloatArray:
        """d standardised loss / d parameters [n, p]."""
        (rates, powers), (raised, zero, data) = self._domains(params), self._raise(params, logs)
        drop, base = np.exp(np.clip(params[1:3], -30.0, 30.0))
        curve, fall, shape = self._curve(params, np.log(data))
        slope = (drop * fall / data)[:, None] * rates
        bend = slope * (raised * logs - zero * np.log(self.SHIFT)) * (powers * (1 - powers))
        columns = [np.ones_like(data), drop * curve, drop * fall * base / data, slope * (raised - zero)]
        return np.column_stack([*columns, bend.sum(axis=1), self.SPREAD * bend, *(drop * s for s in shape)])

    def _logs(self, weights: FloatArray) -> FloatArray:
        return np.asarray(np.log(np.maximum(np.ascontiguousarray(weights), 0.0) + self.SHIFT))

    def predict(self, weights: FloatArray) -> FloatArray:
        return self.mean + self.scale * self._standard(self.posterior.params, self._logs(weights))

    def deviation(self, weights: FloatArray) -> FloatArray:
        return self.scale * self.posterior.deviation(self._slopes(self.posterior.params, self._logs(weights)))

    def gradient(self, weights: FloatArray) -> FloatArray:
        params, logs = self.posterior.params, self._logs(weights)
        (rates, powers), data = self._domains(params), self._raise(params, logs)[2]
        fall = self._curve(params, np.log(data))[1] * np.exp(params[1]) / data
        return np.asarray(self.scale * fall[:, None] * rates * powers * np.exp(logs * (powers - 1)))

    def argmin(self, caps: FloatArray) -> FloatArray:
        """Exact: at the optimum every uncapped domain has one marginal return m, found by bisection on log m."""
        rates, powers = self._domains(self.posterior.params)
        gains = np.log(rates * powers)

        def spend(level: float) -> FloatArray:
            logs = np.minimum((gains - level) / (1 - powers), 1.0)  # e^1 is above any cap
            return np.asarray(np.clip(np.exp(logs) - self.SHIFT, 0.0, caps))

        # returns at w = 1 and at w = 0 enclose every level at which some domain is between 0 and its cap
        low, high = float(np.min(gains)) - 1.0, float(np.max(gains + (powers - 1) * np.log(self.SHIFT))) + 1.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if spend(middle).sum() > 1 else (low, middle)
        # low spends at least 1, by less than float64 noise
        return bound(np.maximum(spend(low), 0.0), caps)


class Power(Effective):
    """loss = c + A (D^-beta - 1) / beta with effective data D as above: a power law, the log law where beta is small.

    log beta ~ N(0, 1). Convex too, and the optimum is the log law's: both only want the most effective data.
    """

    name: ClassVar[str] = "power"
    SHAPE = 1

    def _curve(self, params: FloatArray, data: FloatArray) -> tuple[FloatArray, FloatArray, list[FloatArray]]:
        power = np.exp(np.clip(params[-1], -7.0, 3.0))
        left = np.exp(np.clip(-power * data, -50.0, 50.0))
        curve = np.expm1(np.clip(-power * data, -50.0, 50.0)) / power
        return curve, -left, [-data * left - curve]
