"""Parametric laws from mixture weights to loss: fitted in milliseconds, smooth, and solved exactly under caps.

n runs, k domains. Losses are standardised inside every fit, so that the priors below have no units.
"""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np
from scipy.optimize import least_squares

from regmix_search.space import FloatArray, bound, fill_cheapest


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
    mean, scale = float(losses.mean()), float(losses.std())
    scale = scale if scale > 1e-12 * max(1.0, abs(mean)) else 1.0  # all losses equal: nothing to scale
    return mean, scale, (losses - mean) / scale


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

    Least squares by Levenberg-Marquardt from two values of c, with a ridge that pulls the t together.
    """

    name: ClassVar[str] = "loglinear"
    NOISE = 0.03  # misfit variance as a share of the losses': about half of what this law leaves on RegMix's runs
    RIDGE = 0.1  # prior precision of t around its mean; .001 to 1 differ only below 64 runs
    FLOOR_SD = 3.0  # prior sd of c, in sds of the losses
    FLOORS = (0.1, 1.0)  # starts of c: this far below the lowest loss

    def fit(self, weights: FloatArray, losses: FloatArray, seed: int = 0) -> Self:
        weights, losses = check_runs(weights, losses)
        self.mean, self.scale, z = _standardise(losses)
        best = np.inf
        for floor in self.FLOORS:
            start = self._start(weights, z, float(z.min()) - floor)
            fit = least_squares(
                self._residuals,
                start,
                self._jacobian,
                method="lm",
                args=(weights, z),
                max_nfev=200,
                ftol=1e-8,
                xtol=1e-8,
            )
            if fit.cost < best:
                best, self.floor, self.rates = fit.cost, float(fit.x[0]), fit.x[1:]
        return self

    @staticmethod
    def _start(weights: FloatArray, z: FloatArray, floor: float) -> FloatArray:
        logs, k = np.log(z - floor), weights.shape[1]
        rates = logs.mean() + np.linalg.solve(weights.T @ weights + 0.1 * np.eye(k), weights.T @ (logs - logs.mean()))
        return np.concatenate([[floor], rates])

    @staticmethod
    def _rise(weights: FloatArray, rates: FloatArray) -> FloatArray:
        return np.exp(np.clip(weights @ rates, -50.0, 50.0))  # clipped: a wild trial step must not overflow

    def _residuals(self, params: FloatArray, weights: FloatArray, z: FloatArray) -> FloatArray:
        floor, rates = params[0], params[1:]
        misfit = (floor + self._rise(weights, rates) - z) / np.sqrt(self.NOISE)
        return np.concatenate([misfit, np.sqrt(self.RIDGE) * (rates - rates.mean()), [floor / self.FLOOR_SD]])

    def _jacobian(self, params: FloatArray, weights: FloatArray, z: FloatArray) -> FloatArray:
        n, k = weights.shape
        result = np.zeros((n + k + 1, k + 1))
        result[:n, 0] = 1 / np.sqrt(self.NOISE)
        result[:n, 1:] = weights * self._rise(weights, params[1:])[:, None] / np.sqrt(self.NOISE)
        result[n : n + k, 1:] = np.sqrt(self.RIDGE) * (np.eye(k) - 1 / k)
        result[n + k, 0] = 1 / self.FLOOR_SD
        return result

    def predict(self, weights: FloatArray) -> FloatArray:
        return self.mean + self.scale * (self.floor + self._rise(weights, self.rates))

    def gradient(self, weights: FloatArray) -> FloatArray:
        return np.asarray(self.scale * self._rise(weights, self.rates)[:, None] * self.rates)

    def argmin(self, caps: FloatArray) -> FloatArray:
        return fill_cheapest(self.rates, caps)  # exp is monotone: the same corner as the linear program


class Effective:
    """loss = c - A log(b + sum_i a_i ((w_i + e)^g_i - e^g_i)): domains add up to effective data, each at its own rate.

    A, b, a_i > 0 and 0 < g_i < 1, so the loss is convex in w. Maximum a posteriori with priors that tie the domains:
    log a_i ~ N(0, 1), g_i = sigmoid(g + SPREAD d_i) with d_i ~ N(0, 1). Every prior is Gaussian, so the whole is one
    least-squares problem: Levenberg-Marquardt solves it in 0.02-0.1 s (n 512, k 17), from one start, because random
    ones found nothing lower in 170 fits. A domain that no run used keeps its prior (a = 1): that is not evidence.
    """

    name: ClassVar[str] = "effective"
    NOISE = 0.01  # misfit variance as a share of the losses'; .003 to .02 predict RegMix's training runs alike
    SPREAD = 0.3  # sd of logit g_i around the shared g; .1 to .4 are alike, above .5 some fits stall
    SHIFT = 3e-4  # e: keeps the slope finite at w = 0, about the smallest weight a proxy can tell from none
    BASE = 0.0  # prior mean of log b; -3 to 0 are alike

    def fit(self, weights: FloatArray, losses: FloatArray, seed: int = 0) -> Self:
        weights, losses = check_runs(weights, losses)
        self.mean, self.scale, z = _standardise(losses)
        logs, k = np.log(weights + self.SHIFT), weights.shape[1]
        self.centre = np.concatenate([[0.0, 0.0, self.BASE], np.zeros(2 * k + 1)])
        self.spread = np.concatenate([[3.0], np.ones(2 * k + 3)])  # c may be a few sds off; the rest is in prior sds
        fit = least_squares(
            self._residuals,
            self.centre,
            self._jacobian,
            method="lm",
            args=(logs, z),
            max_nfev=400,
            ftol=1e-8,
            xtol=1e-8,
        )
        self._unpack(fit.x)
        return self

    def _unpack(self, params: FloatArray) -> None:
        k = (len(params) - 4) // 2
        self.floor, self.drop, self.base = params[0], np.exp(params[1]), np.exp(params[2])
        self.rates = np.exp(params[3 : 3 + k])
        self.powers = 1 / (1 + np.exp(-(params[3 + k] + self.SPREAD * params[4 + k :])))

    def _raise(self, logs: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(w + e)^g [n, k], e^g [k] and the effective data [n], for logs = log(w + e)."""
        raised, zero = np.exp(logs * self.powers), np.exp(np.log(self.SHIFT) * self.powers)
        return raised, zero, self.base + (raised - zero) @ self.rates

    def _residuals(self, params: FloatArray, logs: FloatArray, z: FloatArray) -> FloatArray:
        self._unpack(np.clip(params, -30.0, 30.0))  # a wild trial step must not overflow
        misfit = self.floor - self.drop * np.log(self._raise(logs)[2]) - z
        return np.concatenate([misfit / np.sqrt(self.NOISE), (params - self.centre) / self.spread])

    def _jacobian(self, params: FloatArray, logs: FloatArray, z: FloatArray) -> FloatArray:
        self._unpack(np.clip(params, -30.0, 30.0))
        raised, zero, data = self._raise(logs)
        k = len(self.rates)
        slope = (-self.drop / data)[:, None] * self.rates
        bend = slope * (raised * logs - zero * np.log(self.SHIFT)) * (self.powers * (1 - self.powers))
        misfit = np.empty((len(z), len(params)))
        misfit[:, 0], misfit[:, 1], misfit[:, 2] = 1, -self.drop * np.log(data), -self.drop * self.base / data
        misfit[:, 3 : 3 + k] = slope * (raised - zero)
        misfit[:, 3 + k], misfit[:, 4 + k :] = bend.sum(axis=1), self.SPREAD * bend
        return np.vstack([misfit / np.sqrt(self.NOISE), np.diag(1 / self.spread)])

    def predict(self, weights: FloatArray) -> FloatArray:
        data = self._raise(np.log(np.maximum(weights, 0.0) + self.SHIFT))[2]
        return np.asarray(self.mean + self.scale * (self.floor - self.drop * np.log(data)))

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
