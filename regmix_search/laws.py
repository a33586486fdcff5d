"""Parametric laws from mixture weights to loss: fitted in milliseconds, smooth, and solved exactly under caps.

n runs, k domains. Losses are standardised inside every fit, so that the priors below have no units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import numpy as np
from scipy.optimize import least_squares

from regmix_search.space import FloatArray, bound, fill_cheapest

FIRST_NOISE = 0.02  # noise variance of the first fit, as a share of the losses' variance
NOISE_ROUNDS = 2  # re-estimates of it; a third changes nothing
NOISE_RANGE = (1e-4, 1.0)  # below: interpolation, which no run deserves; 1: nothing but noise


def check_runs(weights: FloatArray, losses: FloatArray) -> tuple[FloatArray, FloatArray]:
    """float64 copies of weights [n, k] and losses [n]. Raises ValueError for shapes that differ, NaN, or n < 2."""
    weights, losses = np.array(weights, dtype=np.float64), np.array(losses, dtype=np.float64)
    if weights.ndim != 2 or losses.shape != weights.shape[:1]:
        raise ValueError(f"weights {weights.shape} and losses {losses.shape}: need [n, k] and [n], one row a run")
    if len(losses) < 2:
        raise ValueError(f"{len(losses)} runs: a surrogate needs at least 2, and about 5 a domain to be worth trusting")
    if not (np.isfinite(weights).all() and np.isfinite(losses).all()):
        rows = np.flatnonzero(~(np.isfinite(weights).all(axis=1) & np.isfinite(losses)))
        raise ValueError(f"rows {rows[:8].tolist()}: weights or loss not finite; leave failed runs out of the table")
    return weights, losses


def _standardise(losses: FloatArray) -> tuple[float, float, FloatArray]:
    mean = float(losses.mean())
    scale = max(float(losses.std()), 1e-9 * max(1.0, abs(mean)))  # all losses equal: nothing to scale by
    return mean, scale, (losses - mean) / scale


def _maximum_a_posteriori(
    misfit: Callable[[FloatArray], FloatArray],
    slopes: Callable[[FloatArray], FloatArray],
    starts: Sequence[FloatArray],
    prior: FloatArray,
    centre: FloatArray,
) -> FloatArray:
    """Parameters [p] that minimise |misfit|^2 / noise + |prior (p - centre)|^2, by Levenberg-Marquardt.

    The noise is learned: after each fit it is the misfit's variance over the freedom that the prior leaves (MacKay's
    evidence). With a fixed one the laws fit the noise of small proxies. The law below takes 0.1 s at n 512, k 17.
    """
    noise = FIRST_NOISE
    for _ in range(NOISE_ROUNDS + 1):
        sd = np.sqrt(noise)
        fits = [
            least_squares(
                lambda p, sd=sd: np.concatenate([misfit(p) / sd, prior @ (p - centre)]),
                start,
                lambda p, sd=sd: np.vstack([slopes(p) / sd, prior]),
                method="lm",
                max_nfev=400,
                ftol=1e-8,
                xtol=1e-8,
            )
            for start in starts
        ]
        best = min(fits, key=lambda fit: float(fit.cost))
        starts = [best.x]
        rows = best.jac[: len(best.fun) - len(prior)]
        used = np.trace(np.linalg.pinv(best.jac.T @ best.jac) @ (rows.T @ rows))  # parameters that the data determine
        noise = float(np.clip(np.sum(misfit(best.x) ** 2) / max(1.0, len(rows) - used), *NOISE_RANGE))
    return np.asarray(best.x)


class Linear:
    """loss = c + b.w: ridge, its strength chosen by leave-one-out in closed form. RegMix's baseline."""

    name: ClassVar[str] = "linear"
    PENALTIES: ClassVar[FloatArray] = np.geomspace(1e-4, 1e2, 25)  # in units of sum of squared centred weights

    def fit(self, weights: FloatArray, losses: FloatArray, seed: int = 0) -> Self:
        weights, losses = check_runs(weights, losses)
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
        return self

    def predict(self, weights: FloatArray) -> FloatArray:
        return np.asarray(self.mean + (weights - self.centre) @ self.slopes)

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
        weights, losses = check_runs(weights, losses)
        self.mean, self.scale, z = _standardise(losses)
        k = weights.shape[1]
        prior = np.zeros((k + 1, k + 1))
        prior[0, 0], prior[1:, 1:] = 1 / self.FLOOR_SD, np.sqrt(self.RIDGE) * (np.eye(k) - 1 / k)
        params = _maximum_a_posteriori(
            misfit=lambda p: p[0] + self._rise(weights, p[1:]) - z,
            slopes=lambda p: np.hstack([np.ones((len(z), 1)), weights * self._rise(weights, p[1:])[:, None]]),
            starts=[self._start(weights, z, float(z.min()) - floor) for floor in self.FLOORS],
            prior=prior,
            centre=np.zeros(k + 1),
        )
        self.floor, self.rates = float(params[0]), params[1:]
        return self

    @staticmethod
    def _start(weights: FloatArray, z: FloatArray, floor: float) -> FloatArray:
        logs, k = np.log(z - floor), weights.shape[1]
        rates = logs.mean() + np.linalg.solve(weights.T @ weights + 0.1 * np.eye(k), weights.T @ (logs - logs.mean()))
        return np.concatenate([[floor], rates])

    @staticmethod
    def _rise(weights: FloatArray, rates: FloatArray) -> FloatArray:
        return np.exp(np.clip(weights @ rates, -50.0, 50.0))  # clipped: a wild trial step must not overflow

    def predict(self, weights: FloatArray) -> FloatArray:
        return self.mean + self.scale * (self.floor + self._rise(weights, self.rates))

    def gradient(self, weights: FloatArray) -> FloatArray:
        return np.asarray(self.scale * self._rise(weights, self.rates)[:, None] * self.rates)

    def argmin(self, caps: FloatArray) -> FloatArray:
        return fill_cheapest(self.rates, caps)  # exp is monotone: the same corner as the linear program


class Effective:
    """loss = c - A log(b + sum_i a_i ((w_i + e)^g_i - e^g_i)): domains add up to effective data, each at its own rate.

    A, b, a_i > 0 and 0 < g_i < 1, so the loss is convex in w. Maximum a posteriori with priors that tie the domains:
    log a_i ~ N(0, 1), g_i = sigmoid(g + SPREAD d_i) with d_i ~ N(0, 1). One start is enough: random ones found nothing
    lower in 170 fits to RegMix's runs. A domain that no run used keeps its prior (a = 1): that is not evidence.
    """

    name: ClassVar[str] = "effective"
    SPREAD = 0.3  # sd of logit g_i around the shared g; .1 to .4 predict alike, .5 stalls at times
    SHIFT = 3e-4  # e: keeps the slope finite at w = 0, about the smallest weight a proxy can tell from none
    FLOOR_SD = 3.0  # prior sd of c, in sds of the losses

    def fit(self, weights: FloatArray, losses: FloatArray, seed: int = 0) -> Self:
        weights, losses = check_runs(weights, losses)
        self.mean, self.scale, z = _standardise(losses)
        logs = np.log(weights + self.SHIFT)
        size = 4 + 2 * weights.shape[1]  # c, log A, log b, log a_i, g, d_i: all centred on 0, all but c with sd 1
        params = _maximum_a_posteriori(
            misfit=lambda p: self._unpack(p)._standard(logs) - z,
            slopes=lambda p: self._unpack(p)._slopes(logs),
            starts=[np.zeros(size)],
            prior=np.diag([1 / self.FLOOR_SD, *np.ones(size - 1)]),
            centre=np.zeros(size),
        )
        return self._unpack(params)

    def _unpack(self, params: FloatArray) -> Self:
        params = np.clip(params, -30.0, 30.0)  # a wild trial step must not overflow
        k = (len(params) - 4) // 2
        self.floor, self.drop, self.base = params[0], np.exp(params[1]), np.exp(params[2])
        self.rates = np.exp(params[3 : 3 + k])
        self.powers = 1 / (1 + np.exp(-(params[3 + k] + self.SPREAD * params[4 + k :])))
        return self

    def _raise(self, logs: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(w + e)^g [n, k], e^g [k] and the effective data [n], for logs = log(w + e)."""
        raised, zero = np.exp(logs * self.powers), np.exp(np.log(self.SHIFT) * self.powers)
        return raised, zero, self.base + (raised - zero) @ self.rates

    def _standard(self, logs: FloatArray) -> FloatArray:
        """Standardised losses [n]."""
        return np.asarray(self.floor - self.drop * np.log(self._raise(logs)[2]))

    def _slopes(self, logs: FloatArray) -> FloatArray:
        """d standardised loss / d parameters [n, 4 + 2k]."""
        raised, zero, data = self._raise(logs)
        slope = (-self.drop / data)[:, None] * self.rates
        bend = slope * (raised * logs - zero * np.log(self.SHIFT)) * (self.powers * (1 - self.powers))
        first = [np.ones_like(data), -self.drop * np.log(data), -self.drop * self.base / data]
        return np.column_stack([*first, slope * (raised - zero), bend.sum(axis=1), self.SPREAD * bend])

    def predict(self, weights: FloatArray) -> FloatArray:
        return self.mean + self.scale * self._standard(np.log(np.maximum(weights, 0.0) + self.SHIFT))

    def gradient(self, weights: FloatArray) -> FloatArray:
        logs = np.log(np.maximum(weights, 0.0) + self.SHIFT)
        data = self._raise(logs)[2]
        slopes = self.rates * self.powers * np.exp(logs * (self.powers - 1))
        return np.asarray(-self.scale * self.drop * slopes / data[:, None])

    def argmin(self, caps: FloatArray) -> FloatArray:
        """Exact: at the optimum every uncapped domain has one marginal return m, found by bisection on log m."""
        gains = np.log(self.rates * self.powers)

        def spend(level: float) -> FloatArray:
            logs = np.minimum((gains - level) / (1 - self.powers), 1.0)  # e^1 is above any cap
            return np.asarray(np.clip(np.exp(logs) - self.SHIFT, 0.0, caps))

        # returns at w = 1 and at w = 0 enclose every level at which some domain is between 0 and its cap
        low, high = float(np.min(gains)) - 1.0, float(np.max(gains + (self.powers - 1) * np.log(self.SHIFT))) + 1.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if spend(middle).sum() > 1 else (low, middle)
        # low spends at least 1, by less than float64 noise
        return bound(np.maximum(spend(low), 0.0), caps)
