"""Gaussian processes over mixtures: alone, on what a law leaves over, and the average of the two.

n runs, k domains. In numpy and LAPACK: an evaluation of the evidence with all its slopes takes 0.3 ms at 64 runs and
2 ms at 256, less than the overhead of a library that knows every kernel.
"""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, Self

import numpy as np
from scipy.linalg import cho_solve, lapack
from scipy.optimize import minimize

from regmix_search.laws import Effective
from regmix_search.posterior import arrange, standardise
from regmix_search.space import FloatArray

JITTER = 1e-8  # on the diagonal, so that equal runs without noise can be factored


class GaussianProcess:
    """A Matern-5/2 process on w^(1/5), with a length for every domain (ARD) and the noise of a run, all learned.

    Maximum a posteriori over log length_i = l + SPREAD d_i, log variance and log noise. Roots tell a missing
    domain from a rare one; plain weights lose .07 of Spearman at 64 of RegMix's runs.
    """

    name: ClassVar[str] = "gp"
    LEARNING = ((96, 60), (192, 8))  # (runs, steps of L-BFGS): then the last steps on more; all runs gain 1 % of error
    POWER = 1 / 5  # 1/3 loses .0004 of Spearman from 64 to 410 of RegMix's training runs, 1/6 is no better
    SHIFT = 3e-4  # as in the laws: a finite slope at w = 0
    SPREAD = 0.7  # sd of log length around the shared one; .4 to 1 predict alike
    # prior mean and sd of l, d_i, log variance and log noise; losses have variance 1
    VARIANCE = (0.0, 1.5)
    NOISE = (float(np.log(0.01)), 1.5)

    def fit(self, weights: FloatArray, losses: FloatArray, seed: int = 0, like: Self | None = None) -> Self:
        """As every surrogate; `like` lends its hyperparameters instead of learning them."""
        weights, losses = arrange(weights, losses)
        self.mean, self.scale, z = standardise(losses)
        return self.condition(weights, z, None if like is None else like.params)

    def condition(self, weights: FloatArray, z: FloatArray, params: FloatArray | None = None) -> Self:
        """Fits to standardised losses z [n]; learns the hyperparameters [3 + k] unless they are given."""
        k = weights.shape[1]
        self.weights, self.z = weights, z
        if params is None:
            params = self._prior(k)[0]
            seen = 0
            for most, steps in self.LEARNING:
                rows = np.unique(np.linspace(0, len(z) - 1, min(len(z), most)).astype(int))  # evenly over the losses
                if len(rows) > seen:
                    data, seen = (self._roots(weights[rows]), z[rows]), len(rows)
                    found = minimize(self._evidence, params, data, "L-BFGS-B", True, options={"maxiter": steps})
                    params = found.x
        self.params = np.asarray(params)
        self.__dict__.pop("_solved", None)
        return self

    def _prior(self, k: int) -> tuple[FloatArray, FloatArray]:
        """Centres and standard deviations of l, d_i, log variance and log noise."""
        (variance, its_sd), (noise, sd_of_that), lengths = self.VARIANCE, self.NOISE, np.zeros(k + 1)
        return np.array([*lengths, variance, noise]), np.array([*lengths + 1, its_sd, sd_of_that])

    def _roots(self, weights: FloatArray) -> FloatArray:
        return np.asarray(
            (np.maximum(np.ascontiguousarray(weights), 0.0) + self.SHIFT) ** self.POWER - self.SHIFT**self.POWER
        )

    def _unpack(self, params: FloatArray) -> tuple[FloatArray, float, float]:
        """Lengths [k], variance, noise."""
        params = np.clip(params, -15.0, 15.0)
        lengths = np.exp(params[0] + self.SPREAD * params[1:-2])
        return lengths, float(np.exp(params[-2])), float(np.exp(params[-1]))

    def _evidence(self, params: FloatArray, roots: FloatArray, z: FloatArray) -> tuple[float, FloatArray]:
        """Negative log posterior of the hyperparameters and its slopes."""
        lengths, variance, noise = self._unpack(params)
        x = roots / lengths
        kernel, weight = _matern(x, x, variance)
        noisy = kernel.copy()
        noisy.flat[:: len(z) + 1] += noise + JITTER
        lower, failed = lapack.dpotrf(noisy.T, lower=1, overwrite_a=1)
        if failed:
            return 1e10, np.zeros_like(params)
        alpha, volume = lapack.dpotrs(lower, z, lower=1)[0], float(np.log(np.diag(lower)).sum())
        half = lapack.dpotri(lower, lower=1, overwrite_c=1)[0]  # the lower triangle of the inverse
        pull = half + half.T
        pull.flat[:: len(z) + 1] /= 2
        pull -= alpha[:, None] * alpha
        weight *= pull
        # sum_ij weight_ij (x_i - x_j)^2 a domain, by matrix products alone
        by_length = weight.sum(axis=1) @ x**2 - np.sum((weight @ x) * x, axis=0)
        centre, spread = self._prior(len(lengths))
        offset = (params - centre) / spread
        value = z @ alpha / 2 + volume + offset @ offset / 2
        by_size = [np.vdot(pull, kernel) / 2, noise * np.trace(pull) / 2]
        slopes = np.array([by_length.sum(), *(self.SPREAD * by_length), *by_size])
        return float(value), slopes + offset / spread

    @cached_property
    def _solved(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Scaled roots [n, k], Cholesky factor [n, n] and K^-1 z [n]."""
        lengths, variance, noise = self._unpack(self.params)
        x = self._roots(self.weights) / lengths
        lower = np.linalg.cholesky(_matern(x, x, variance)[0] + (noise + JITTER) * np.eye(len(x)))
        return x, np.asarray(lower, np.float64), np.asarray(cho_solve((lower, True), self.z))

    def _kernel(self, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
        lengths, variance, _ = self._unpack(self.params)
        return _matern(self._roots(weights) / lengths, self._solved[0], variance)

    def predict(self, weights: FloatArray) -> FloatArray:
        return np.asarray(self.mean + self.scale * (self._kernel(weights)[0] @ self._solved[2]))

    def deviation(self, weights: FloatArray) -> FloatArray:
        _, variance, noise = self._unpack(self.params)
        kernel, _ = self._kernel(weights)
        known = np.sum(kernel * cho_solve((self._solved[1], True), kernel.T).T, axis=1)
        return np.asarray(self.scale * np.sqrt(np.maximum(variance - known, 0.0) + noise))

    def gradient(self, weights: FloatArray) -> FloatArray:
        lengths, (x, _, alpha) = self._unpack(self.params)[0], self._solved
        pull = -self._kernel(weights)[1] * alpha
        at = self._roots(weights) / lengths
        steep = self.POWER * (np.maximum(weights, 0.0) + self.SHIFT) ** (self.POWER - 1) / lengths
        return np.asarray(self.scale * (pull.sum(axis=1)[:, None] * at - pull @ x) * steep)


def _matern(a: FloatArray, b: FloatArray, variance: float) -> tuple[FloatArray, FloatArray]:
    """Matern-5/2 covariances [m, n] of rows, and their slope in minus half the squared distance.

    In place, since a fresh [n, n] array costs more than the arithmetic on it.
    """
    far = a @ b.T
    far *= -2
    far += np.sum(a**2, axis=1)[:, None]
    far += np.sum(b**2, axis=1)
    np.maximum(far, 0.0, out=far)
    far *= 5
    np.sqrt(far, out=far)
    decay = np.negative(far)
    np.exp(decay, out=decay)
    decay *= variance
    slope = far + 1
    slope *= decay
    far *= far
    far *= decay
    far /= 3
    far += slope
    slope *= 5 / 3
    return far, slope


class Residual(GaussianProcess):
    """The process with a prior for what a law leaves over: a twentieth of the losses' variance."""

    name: ClassVar[str] = "residual"
    VARIANCE = (-3.0, 1.5)


class LawProcess:
    """The effective-data law plus a Gaussian process on its residuals: smooth far from the runs, exact near them."""

    name: ClassVar[str] = "effective_gp"
    law: Effective
    residual: Residual

    def fit(
        self,
        weights: FloatArray,
        losses: FloatArray,
        seed: int = 0,
        like: Self | None = None,
        law: Effective | None = None,
    ) -> Self:
        """As every surrogate; `like` lends the process's hyperparameters, `law` is one fitted to these runs."""
        weights, losses = arrange(weights, losses)
        self.law = law or Effective().fit(weights, losses, seed, None if like is None else like.law)
        self.residual = Residual()
        self.residual.mean, self.residual.scale = 0.0, self.law.scale
        left = (losses - self.law.predict(weights)) / self.law.scale
        self.residual.condition(weights, left, None if like is None else like.residual.params)
        return self

    def predict(self, weights: FloatArray) -> FloatArray:
        return self.law.predict(weights) + self.residual.predict(weights)

    def deviation(self, weights: FloatArray) -> FloatArray:
        return np.asarray(np.hypot(self.law.deviation(weights), self.residual.deviation(weights)))

    def gradient(self, weights: FloatArray) -> FloatArray:
        return self.law.gradient(weights) + self.residual.gradient(weights)


class Average:
    """The law with its process twice and the process alone once: their errors differ, and the law's are smaller.

    On RegMix's training runs it ranks the rest better than either from 24 runs to 512.
    """

    name: ClassVar[str] = "average"
    law: LawProcess
    process: GaussianProcess

    def fit(self, weights: FloatArray, losses: FloatArray, seed: int = 0, like: Self | None = None) -> Self:
        """As every surrogate; `like` lends the processes' hyperparameters instead of learning them."""
        self.law = LawProcess().fit(weights, losses, seed, None if like is None else like.law)
        self.process = GaussianProcess().fit(weights, losses, seed, None if like is None else like.process)
        return self

    @staticmethod
    def mix(law: FloatArray, process: FloatArray) -> FloatArray:
        """The average of what the two say."""
        return np.asarray((2 * law + process) / 3)

    def predict(self, weights: FloatArray) -> FloatArray:
        return self.mix(self.law.predict(weights), self.process.predict(weights))

    def deviation(self, weights: FloatArray) -> FloatArray:
        return self.mix(self.law.deviation(weights), self.process.deviation(weights))

    def gradient(self, weights: FloatArray) -> FloatArray:
        return self.mix(self.law.gradient(weights), self.process.gradient(weights))
