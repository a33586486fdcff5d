"""Losses under a law that is known, for tests of what finds it."""

import numpy as np

K, NOISE = 5, 0.01
RATES, POWERS = np.array([4.0, 2.0, 1.0, 0.3, 0.05]), np.array([0.6, 0.4, 0.5, 0.7, 0.5])


def planted(weights: np.ndarray, seed: int | None = None) -> np.ndarray:
    """Losses under a known effective-data law, with the noise of a run when a seed is given."""
    clean = 5 - 0.4 * np.log(0.2 + weights**POWERS @ RATES)
    return clean if seed is None else clean + NOISE * np.random.default_rng([seed, 1]).normal(size=len(clean))


def draw(n: int, seed: int, k: int = K) -> np.ndarray:
    """n mixtures of k domains, from near corners to near the middle."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.dirichlet(np.full(k, s)) for s in rng.uniform(0.2, 1.5, n)])
