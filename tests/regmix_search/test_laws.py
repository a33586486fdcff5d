"""The laws' own mathematics: exact slopes, exact optima under caps, recovery of what made the losses."""

import numpy as np
import pytest
from planted_law import NOISE, RATES, K, draw, planted
from scipy.optimize import approx_fprime

from regmix_search.laws import Effective, Power
from regmix_search.surrogates import SmoothSurrogate, build_surrogate

CONVEX = ("effective", "power", "effective_repeats", "loglinear", "linear")


@pytest.fixture(params=CONVEX)
def smooth(request: pytest.FixtureRequest) -> SmoothSurrogate:
    weights = draw(60, 0)
    model = build_surrogate(request.param).fit(weights, planted(weights, 0))
    assert isinstance(model, SmoothSurrogate)
    return model


def caps_of(seed: int, k: int) -> np.ndarray:
    """No caps at seed 0, then from nearly forced to loose."""
    rng = np.random.default_rng(seed)
    caps = np.minimum(1, rng.dirichlet(np.ones(k)) * [1.05, 1.5, 4][seed % 3])
    return np.ones(k) if seed == 0 else np.minimum(1, caps + max(0.0, 1.01 - caps.sum()) / k)


@pytest.mark.parametrize("seed", range(30))
def test_argmin_meets_the_optimality_conditions(smooth: SmoothSurrogate, seed: int) -> None:
    """Convex, so Kuhn-Tucker is enough: moving weight to a domain with room lowers nothing."""
    caps = caps_of(seed, K)
    found = smooth.argmin(caps)
    assert abs(found.sum() - 1) < 1e-12 and np.all(found <= caps + 1e-12) and np.all(found >= 0)
    slope = smooth.gradient(found[None])[0]
    can_give, can_take = found > 1e-9, found < caps - 1e-9
    if can_take.any():
        assert slope[can_take].min() >= slope[can_give].max() - 1e-6


@pytest.mark.parametrize("name", CONVEX)
@pytest.mark.parametrize("seed", range(4))
def test_argmin_beats_a_grid_over_three_domains(name: str, seed: int) -> None:
    weights = draw(40, 0, k=3)
    model = build_surrogate(name).fit(weights, 5 - np.log(0.3 + weights**0.5 @ [1, 0.5, 0.2]))
    assert isinstance(model, SmoothSurrogate)
    caps, steps = caps_of(seed, 3), np.linspace(0, 1, 401)
    grid = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    grid = np.column_stack([grid, 1 - grid.sum(axis=1)])
    grid = grid[(grid >= 0).all(axis=1) & (grid <= caps).all(axis=1)]
    best = model.predict(model.argmin(caps)[None])[0]
    lowest = model.predict(grid).min()
    assert lowest - 0.005 * np.abs(model.gradient(model.argmin(caps)[None])).max() <= best <= lowest + 1e-12


@pytest.mark.parametrize("law", [Effective, Power])
def test_the_jacobian_of_an_effective_law_is_exact(law: type[Effective]) -> None:
    logs = np.log(draw(12, 0) + Effective.SHIFT)
    params = np.random.default_rng(1).normal(0, 0.5, 4 + 2 * K + law.SHAPE)
    numeric = approx_fprime(params, lambda p: law()._standard(p, logs), 1e-7)
    np.testing.assert_allclose(law()._slopes(params, logs), numeric, rtol=1e-4, atol=1e-5)


def test_noisy_losses_are_not_fitted_to_the_last_digit() -> None:
    """Noise as large as the signal: what a law with a fixed small noise gets wrong by half as much again."""
    errors = []
    for seed in range(6):
        weights, fresh = draw(48, seed), draw(200, 99)
        losses = planted(weights) + 0.2 * np.random.default_rng(seed).normal(size=48)
        found = build_surrogate("effective").fit(weights, losses).predict(fresh)
        errors.append(np.sqrt(np.mean((found - planted(fresh)) ** 2)))
    assert np.mean(errors) < 0.08  # 0.097 with the noise fixed at .01 of the variance


def test_effective_recovers_the_law_that_made_the_losses() -> None:
    weights, fresh = draw(80, 0), draw(300, 1)
    found = build_surrogate("effective").fit(weights, planted(weights, 0)).predict(fresh)
    rmse = np.sqrt(np.mean((found - planted(fresh)) ** 2))
    assert rmse < NOISE, f"rmse {rmse:.4f}: worse than the noise of one run"


def test_power_recovers_the_law_that_made_the_losses() -> None:
    """A power of 1.5, where a log is far off."""
    weights, fresh = draw(80, 0), draw(300, 1)

    def clean(rows: np.ndarray) -> np.ndarray:
        return 3 + 2 * (1 + rows**0.5 @ RATES) ** -1.5

    losses = clean(weights) + NOISE * np.random.default_rng(0).normal(size=80)
    error = {n: build_surrogate(n).fit(weights, losses).predict(fresh) - clean(fresh) for n in ("power", "effective")}
    rmse = {name: float(np.sqrt(np.mean(e**2))) for name, e in error.items()}
    assert rmse["power"] < 2.5 * NOISE and rmse["power"] < 0.6 * rmse["effective"], rmse


def test_a_start_from_a_fit_to_more_runs_ends_where_a_fresh_one_does() -> None:
    weights, fresh = draw(80, 0), draw(100, 1)
    losses = planted(weights, 0)
    for law in (Effective, Power):
        warm = law().fit(weights[:60], losses[:60], like=law().fit(weights, losses))
        cold = law().fit(weights[:60], losses[:60])
        np.testing.assert_allclose(warm.predict(fresh), cold.predict(fresh), atol=0.2 * NOISE)


def test_loglinear_recovers_the_law_that_made_the_losses() -> None:
    rates = np.array([0.2, -0.5, 1.0, 0.5, -1.5])
    weights, fresh = draw(80, 0), draw(300, 1)
    losses = 3 + np.exp(weights @ rates) + NOISE * np.random.default_rng(0).normal(size=80)
    found = build_surrogate("loglinear").fit(weights, losses).predict(fresh)
    assert np.sqrt(np.mean((found - 3 - np.exp(fresh @ rates)) ** 2)) < NOISE
