"""Maximum a posteriori fits of parametric laws to runs, with the noise of a run learned and the posterior's covariance.

n runs, k domains, p parameters. Losses are standardised before a fit, so that priors have no units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from regmix_search.space import FloatArray

FIRST_NOISE = 0.02  # noise variance of the first fit, as a share of the losses' variance
NOISE_ROUNDS = 2  # re-estimates of it; a third changes nothing
NOISE_RANGE = (1e-4, 1.0)  # below: interpolation, which no run deserves; 1: nothing but noise
STEPS = 200  # of Levenberg-Marquardt; the laws take 20 to 40
DECREMENT = 1e-4  # stop when a step promises less: a hundredth of the posterior's sd
ROUGH = 0.1  # the same, while the noise is still to be estimated


@dataclass(frozen=True, eq=False)
class Posterior:
    """Where the log posterior is highest, its curvature's inverse there, and the noise variance of one run."""

    params: FloatArray  # [p]
    covariance: FloatArray  # [p, p]
    noise: float

    def deviation(self, slopes: FloatArray) -> FloatArray:
        """Standard deviation [m] of a new run's standardised loss, for slopes d prediction / d params [m, p]."""
        return np.asarray(np.sqrt(self.noise + np.einsum("ij,jk,ik->i", slopes, self.covariance, slopes)))


def check_runs(weights: FloatArray, losses: FloatArray) -> tuple[FloatArray, FloatArray]:
    """float64 copies of weights [n, k] and losses [n].

    Raises ValueError for shapes that differ, NaN, or n < 2.
    """
    weights, losses = np.array(weights, np.float64), np.array(losses, np.float64)
    if weights.ndim != 2 or losses.shape != weights.shape[:1]:
        raise ValueError(f"weights {weights.shape} and losses {losses.shape}: need [n, k] and [n], one row a run")
    if len(losses) < 2:
        raise ValueError(f"{len(losses)} runs: a surrogate needs at least 2, and about 5 a domain to be worth trusting")
    if not (np.isfinite(weights).all() and np.isfinite(losses).all()):
        rows = np.flatnonzero(~(np.isfinite(weights).all(axis=1) & np.isfinite(losses)))
        raise ValueError(f"rows {rows[:8].tolist()}: weights or loss not finite; leave failed runs out of the table")
    return weights, losses


def arrange(weights: FloatArray, losses: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Checked copies in an order of their own (by loss, then weights), so that a fit cannot depend on the caller's."""
    weights, losses = check_runs(weights, losses)
    order = np.lexsort((*weights.T, losses))
    return weights[order], losses[order]


def standardise(losses: FloatArray) -> tuple[float, float, FloatArray]:
    """Mean, standard deviation and standardised losses [n]."""
    mean = float(losses.mean())
    scale = max(float(losses.std()), 1e-9 * max(1.0, abs(mean)))  # all losses equal: nothing to scale by
    return mean, scale, (losses - mean) / scale


def maximum_a_posteriori(
    misfit: Callable[[FloatArray], FloatArray],
    slopes: Callable[[FloatArray], FloatArray],
    starts: Sequence[FloatArray],
    precision: FloatArray,
    centre: FloatArray,
    noise: float | None = None,
) -> Posterior:
    """Minimises |misfit|^2 / noise + (p - centre)' precision (p - centre) over parameters p.

    The noise is learned: after each fit it is the misfit's variance over the freedom that the prior leaves (MacKay's
    evidence). With a fixed one the laws fit the noise of small proxies. noise: one that a start
    comes with, nearly right.
    """
    rounds, noise = (NOISE_ROUNDS + 1, FIRST_NOISE) if noise is None else (1, noise)
    for i in reversed(range(rounds)):
        stop = ROUGH if i else DECREMENT
        fits = [_descend(misfit, slopes, start, precision, centre, noise, stop) for start in starts]
        params, _ = min(fits, key=lambda fit: fit[1])
        starts, used = [params], noise
        rows, error = slopes(params), misfit(params)
        information = rows.T @ rows
        covariance = np.linalg.pinv(information / used + precision, hermitian=True)
        freedom = float(np.sum(covariance * information)) / used  # parameters that the data determine
        noise = float(np.clip(error @ error / max(1.0, len(error) - freedom), *NOISE_RANGE))
    return Posterior(params, np.asarray(covariance, np.float64), noise)


def _descend(
    misfit: Callable[[FloatArray], FloatArray],
    slopes: Callable[[FloatArray], FloatArray],
    params: FloatArray,
    precision: FloatArray,
    centre: FloatArray,
    noise: float,
    stop: float,
) -> tuple[FloatArray, float]:
    """Levenberg-Marquardt on the normal equations (the priors keep them well-conditioned). Parameters and cost."""

    def cost(at: FloatArray, error: FloatArray) -> float:
        return float(error @ error / noise + (at - centre) @ precision @ (at - centre))

    damping, growth, error = 100.0, 2.0, misfit(params)
    lowest, rows = cost(params, error), slopes(params)
    for _ in range(STEPS):
        hessian = rows.T @ rows / noise + precision
        downhill = -(rows.T @ error / noise + precision @ (params - centre))
        weight = np.full(len(params), damping)  # in units of the priors, whose sds are about 1: 200 steps became 30
        step = np.linalg.solve(hessian + np.diag(weight), downhill)
        promised = float(step @ (downhill + weight * step))
        if promised < stop:
            break
        trial = params + step
        trial_error = misfit(trial)
        if (value := cost(trial, trial_error)) < lowest:  # Nielsen's rule: trust grows as promises are kept
            damping *= max(1 / 3, 1 - (2 * (lowest - value) / promised - 1) ** 3)
            params, error, lowest, rows, growth = trial, trial_error, value, slopes(trial), 2.0
        else:
            damping, growth = damping * growth, growth * 2
    return params, lowest
