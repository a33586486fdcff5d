"""A law over (weights, model size, tokens): what swarms of several sizes say about a size that nobody has trained.

    L(w, N, D) = c + m(N, D) f(w) + P (N^-a - 1) / a + Q (D^-b - 1) / b,   m = N^kappa D^lambda

with N and D relative to the largest scale, and f the power law on effective data, repeats discounted. Three forms:
`additive` has m = 1: sizes only shift the losses (Shukor et al. 2025, arXiv 2507.09404, the additive law; a, b as in
Hoffmann et al. 2022). `amplitude` lets differences between mixtures grow or shrink, and keeps their order. `drift` also
lets each domain's rate change with compute, a_i C^s_i, so that the best mixture moves with size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from regmix_search.posterior import Posterior, maximum_a_posteriori
from regmix_search.repeats import EffectiveRepeats
from regmix_search.space import FloatArray

Form = Literal["additive", "amplitude", "drift"]
# In order of preference among those that tie: `amplitude` ranks as `additive` does and admits what it does not know.
FORMS: tuple[Form, ...] = ("amplitude", "additive", "drift")
ALPHA, BETA = 0.34, 0.28  # Hoffmann et al. 2022 (arXiv 2203.15556), approach 3: centres of the priors of a and b
AMPLITUDE_SD = 0.1  # of kappa and lambda: over a factor of 60 differences change by half
DRIFT_SD = 0.1  # of s_i: over a factor of 60 a domain's rate changes by half
HEIGHT_SD = 1.5  # of log P and log Q: how much of the loss falls with size is nobody's prior knowledge
OFF = 1e4  # sds become this much smaller for what a form leaves out
SIZES = 6  # parameters of size: log P, log a / .34, log Q, log b / .28, kappa, lambda; then s_i [k]


@dataclass(frozen=True)
class Size:
    """How large a run is: parameters without embeddings, tokens, and what each domain holds ([k] tokens, if known)."""

    params: float
    tokens: float
    held: tuple[float, ...] | None = None

    @property
    def flops(self) -> float:
        """6 N D."""
        return 6 * self.params * self.tokens

    @property
    def once(self) -> FloatArray | None:
        """Weights [k] at which a run of this size has read each domain once."""
        return None if self.held is None else np.array(self.held) / self.tokens


@dataclass(frozen=True, eq=False)
class Sample:
    """Runs of one size: weights [n, k] and one loss [n]."""

    size: Size
    weights: FloatArray
    losses: FloatArray


class ScaleLaw:
    """The law, fitted to samples of one or more sizes; `at` is the law of one size, a surrogate like any other."""

    def __init__(self, form: Form = "drift") -> None:
        self.form = form

    def fit(self, samples: Sequence[Sample]) -> Self:
        """Maximum a posteriori over all runs at once. Runs of one size give no more than the priors say of others."""
        self.largest = max((sample.size for sample in samples), key=lambda size: size.flops)
        self.k = samples[0].weights.shape[1]
        largest = [sample.losses for sample in samples if sample.size == self.largest]
        spread = [np.sum((sample.losses - sample.losses.mean()) ** 2) for sample in samples]
        self.mean = float(np.mean(np.concatenate(largest)))
        self.scale = max(float(np.sqrt(sum(spread) / sum(len(s.losses) for s in samples))), 1e-9)
        z = np.concatenate([(sample.losses - self.mean) / self.scale for sample in samples])
        centre, sds = self._prior()
        self.posterior = maximum_a_posteriori(
            misfit=lambda p: np.concatenate([self._losses(p, s) for s in samples]) - z,
            slopes=lambda p: np.vstack([self._slopes(p, s) for s in samples]),
            starts=[centre],
            precision=np.diag(sds**-2),
            centre=centre,
        )
        return self

    def at(self, size: Size) -> EffectiveRepeats:
        """The law of one size: predicts, has slopes, solves itself; its deviations know how far the size is away."""
        law = EffectiveRepeats(size.once)
        rows = self._transfer(self.posterior.params, size)
        params, covariance = self._of_size(self.posterior.params, size), rows @ self.posterior.covariance @ rows.T
        law.mean, law.scale = self.mean, self.scale
        law.posterior = Posterior(params, covariance, self.posterior.noise)
        return law

    @property
    def _core(self) -> int:
        """Parameters of f: c, log A, log b, log a_i, g, d_i, log R*, log beta."""
        return 4 + 2 * int(self.k) + EffectiveRepeats.SHAPE

    def _prior(self) -> tuple[FloatArray, FloatArray]:
        """Centres and standard deviations of all parameters: f's own, then those of size, which are zero as it is."""
        centre, spread = EffectiveRepeats().prior(self.k)
        sds = np.array([HEIGHT_SD, 1.0, HEIGHT_SD, 1.0, AMPLITUDE_SD, AMPLITUDE_SD, *[DRIFT_SD] * self.k])
        sds[4:6] /= OFF if self.form == "additive" else 1
        sds[6:] /= 1 if self.form == "drift" else OFF
        return np.append(centre, np.zeros(len(sds))), np.append(spread, sds)

    def _away(self, size: Size) -> tuple[float, float]:
        """log N and log D relative to the largest scale."""
        return float(np.log(size.params / self.largest.params)), float(np.log(size.tokens / self.largest.tokens))

    def _of_size(self, params: FloatArray, size: Size) -> FloatArray:
        """Parameters of f at one size; c holds the offset."""
        (n, d), core, more = self._away(size), params[: self._core].copy(), params[self._core :]
        offset = sum(_rise(more[i], more[i + 1], centre, x)[0] for i, centre, x in ((0, ALPHA, n), (2, BETA, d)))
        core[0] += offset
        core[1] += np.clip(more[4] * n + more[5] * d, -5.0, 5.0)
        core[3 : 3 + self.k] += np.clip(more[SIZES:] * (n + d), -10.0, 10.0)
        return core

    def _transfer(self, params: FloatArray, size: Size) -> FloatArray:
        """d parameters of f at one size / d parameters [core, all]."""
        (n, d), more = self._away(size), params[self._core :]
        rows = np.eye(self._core, len(params))
        for i, centre, x in ((0, ALPHA, n), (2, BETA, d)):
            rows[0, self._core + i : self._core + i + 2] = _rise(more[i], more[i + 1], centre, x)[1:]
        rows[1, self._core + 4 : self._core + 6] = n, d
        rows[3 : 3 + self.k, self._core + SIZES :] = (n + d) * np.eye(self.k)
        return rows

    def _losses(self, params: FloatArray, sample: Sample) -> FloatArray:
        return EffectiveRepeats(sample.size.once).standard(self._of_size(params, sample.size), sample.weights)

    def _slopes(self, params: FloatArray, sample: Sample) -> FloatArray:
        core = EffectiveRepeats(sample.size.once).slopes(self._of_size(params, sample.size), sample.weights)
        return np.asarray(core @ self._transfer(params, sample.size))


def _rise(log_height: float, log_power: float, centre: float, x: float) -> tuple[float, float, float]:
    """P (e^(-a x) - 1) / a with P = e^log_height, a = centre e^log_power; its slopes in both logs."""
    height, power = np.exp(np.clip(log_height, -10.0, 10.0)), centre * np.exp(np.clip(log_power, -3.0, 3.0))
    left = np.exp(np.clip(-power * x, -30.0, 30.0))
    value = height * (left - 1) / power
    return float(value), float(value), float(-height * x * left - value)
