"""One contract for all surrogates, the laws' own mathematics, and a choice that cross-validation alone makes."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from regmix_search.laws import Effective
from regmix_search.surrogates import (
    SURROGATES,
    Choice,
    SmoothSurrogate,
    Surrogate,
    build_surrogate,
    choose,
    cross_validate,
    group_mixtures,
    score,
)

SMOOTH = [name for name in SURROGATES if name != "lightgbm"]
K, NOISE = 5, 0.01
RATES, POWERS = np.array([4.0, 2.0, 1.0, 0.3, 0.05]), np.array([0.6, 0.4, 0.5, 0.7, 0.5])


def planted(weights: np.ndarray, seed: int | None = None) -> np.ndarray:
    """Losses under a known effective-data law, with the noise of a run when a seed is given."""
    clean = 5 - 0.4 * np.log(0.2 + weights**POWERS @ RATES)
    return clean if seed is None else clean + NOISE * np.random.default_rng([seed, 1]).normal(size=len(clean))


def draw(n: int, seed: int, k: int = K) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.dirichlet(np.full(k, s)) for s in rng.uniform(0.2, 1.5, n)])


@pytest.fixture(params=SURROGATES)
def surrogate(request: pytest.FixtureRequest) -> Surrogate:
    return build_surrogate(request.param)


def test_fit_returns_itself_and_predicts_finite_losses(surrogate: Surrogate) -> None:
    weights = draw(40, 0)
    assert surrogate.fit(weights, planted(weights, 0), seed=0) is surrogate
    for shape in (1, 7):
        found = surrogate.predict(draw(shape, 1))
        assert found.shape == (shape,) and found.dtype == np.float64 and np.isfinite(found).all()
    assert np.isfinite(surrogate.predict(np.eye(K))).all()


def test_beats_the_mean_on_a_planted_law(surrogate: Surrogate) -> None:
    weights, fresh = draw(80, 0), draw(200, 1)
    found = surrogate.fit(weights, planted(weights, 0)).predict(fresh)
    assert np.mean((found - planted(fresh)) ** 2) < 0.35 * np.var(planted(fresh))
    assert score(found, planted(fresh))["spearman"] > 0.8


def test_trees_split_below_40_runs() -> None:
    """LightGBM's own default leaves one leaf, a constant, at 32 runs."""
    weights, fresh = draw(32, 0), draw(200, 1)
    found = build_surrogate("lightgbm").fit(weights, planted(weights, 0)).predict(fresh)
    assert score(found, planted(fresh))["spearman"] > 0.7


def test_row_order_does_not_matter(surrogate: Surrogate) -> None:
    weights, order = draw(60, 0), np.random.default_rng(5).permutation(60)
    losses, fresh = planted(weights, 0), draw(30, 1)
    first = surrogate.fit(weights, losses).predict(fresh)
    other = build_surrogate(surrogate.name).fit(weights[order], losses[order]).predict(fresh)
    np.testing.assert_allclose(first, other, atol=1e-6)


def test_a_refit_is_bitwise_the_same(surrogate: Surrogate) -> None:
    weights, fresh = draw(60, 0), draw(30, 1)
    losses = planted(weights, 0)
    first = surrogate.fit(weights, losses, seed=3).predict(fresh)
    again = build_surrogate(surrogate.name).fit(weights, losses, seed=3).predict(fresh)
    surrogate.fit(draw(50, 9), planted(draw(50, 9)))  # another fit in between leaves nothing behind
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, surrogate.fit(weights, losses, seed=3).predict(fresh))


def test_shift_and_scale_of_the_losses_carry_over(surrogate: Surrogate) -> None:
    weights, fresh = draw(60, 0), draw(30, 1)
    losses = planted(weights, 0)
    first = surrogate.fit(weights, losses).predict(fresh)
    other = build_surrogate(surrogate.name).fit(weights, 3 * losses - 7).predict(fresh)
    np.testing.assert_allclose(other, 3 * first - 7, atol=1e-4)


def test_the_arguments_are_left_alone(surrogate: Surrogate) -> None:
    weights = draw(40, 0)
    losses = planted(weights, 0)
    before = weights.copy(), losses.copy()
    surrogate.fit(weights, losses).predict(weights)
    np.testing.assert_array_equal(weights, before[0])
    np.testing.assert_array_equal(losses, before[1])


def test_domains_that_no_run_used_are_survived(surrogate: Surrogate) -> None:
    weights = np.hstack([draw(50, 0), np.zeros((50, 2))])
    losses = planted(weights[:, :K], 0)
    found = surrogate.fit(weights, losses).predict(weights)
    assert np.isfinite(found).all() and score(found, losses)["spearman"] > 0.8


@pytest.mark.parametrize("n", [2, 3, 6])
def test_fewer_runs_than_domains_still_give_finite_losses(surrogate: Surrogate, n: int) -> None:
    weights = draw(n, 0)
    found = surrogate.fit(weights, planted(weights, 0)).predict(draw(20, 1))
    assert np.isfinite(found).all() and np.abs(found - 4.5).max() < 5


def test_equal_losses_predict_that_loss(surrogate: Surrogate) -> None:
    found = surrogate.fit(draw(30, 0), np.full(30, 4.25)).predict(draw(10, 1))
    np.testing.assert_allclose(found, 4.25, atol=0.02)


@pytest.mark.parametrize(
    ("weights", "losses", "message"),
    [
        (np.ones((3, 2)) / 2, np.ones(4), "need \\[n, k\\] and \\[n\\]"),
        (np.ones((1, 2)) / 2, np.ones(1), "1 runs"),
        (np.ones((3, 2)) / 2, np.array([1, np.nan, 2]), "rows \\[1\\]"),
        (np.array([[0.5, 0.5], [np.inf, 0]]), np.ones(2), "rows \\[1\\]"),
    ],
)
def test_bad_runs_are_refused(surrogate: Surrogate, weights: np.ndarray, losses: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        surrogate.fit(weights, losses)


def test_an_unknown_surrogate_is_named() -> None:
    with pytest.raises(ValueError, match="'svm' does not exist; there are effective, loglinear, linear, lightgbm"):
        build_surrogate("svm")


# --- the laws' mathematics


@pytest.fixture(params=SMOOTH)
def smooth(request: pytest.FixtureRequest) -> SmoothSurrogate:
    weights = draw(60, 0)
    model = build_surrogate(request.param).fit(weights, planted(weights, 0))
    assert isinstance(model, SmoothSurrogate)
    return model


def test_lightgbm_has_no_slopes() -> None:
    assert not isinstance(build_surrogate("lightgbm"), SmoothSurrogate)


def test_slopes_are_those_of_finite_differences(smooth: SmoothSurrogate) -> None:
    for row in draw(10, 2) + 0.01:
        numeric = approx_fprime(row, lambda w: smooth.predict(w[None])[0], 1e-7)
        np.testing.assert_allclose(smooth.gradient(row[None])[0], numeric, rtol=1e-3, atol=1e-5)


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


@pytest.mark.parametrize("name", SMOOTH)
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


def test_the_jacobian_of_the_effective_law_is_exact() -> None:
    logs = np.log(draw(12, 0) + Effective.SHIFT)
    params = np.random.default_rng(1).normal(0, 0.5, 4 + 2 * K)
    numeric = approx_fprime(params, lambda p: Effective()._unpack(p)._standard(logs), 1e-7)
    np.testing.assert_allclose(Effective()._unpack(params)._slopes(logs), numeric, rtol=1e-4, atol=1e-5)


def test_noisy_losses_are_not_fitted_to_the_last_digit() -> None:
    """Noise as large as the signal: what a law with a fixed small noise gets wrong by half as much again."""
    errors = []
    for seed in range(6):
        weights, fresh = draw(48, seed), draw(200, 99)
        losses = planted(weights) + 0.2 * np.random.default_rng(seed).normal(size=48)
        found = build_surrogate("effective").fit(weights, losses).predict(fresh)
        errors.append(np.sqrt(np.mean((found - planted(fresh)) ** 2)))
    assert np.mean(errors) < 0.08  # 0.097 with the noise fixed at .01 of the variance


@pytest.mark.parametrize("name", ["effective", "loglinear"])
def test_the_laws_are_convex(name: str) -> None:
    weights = draw(60, 0)
    model = build_surrogate(name).fit(weights, planted(weights, 0))
    a, b = draw(200, 3), draw(200, 4)
    assert np.all(model.predict((a + b) / 2) <= (model.predict(a) + model.predict(b)) / 2 + 1e-12)


def test_effective_recovers_the_law_that_made_the_losses() -> None:
    weights, fresh = draw(80, 0), draw(300, 1)
    found = build_surrogate("effective").fit(weights, planted(weights, 0)).predict(fresh)
    rmse = np.sqrt(np.mean((found - planted(fresh)) ** 2))
    assert rmse < NOISE, f"rmse {rmse:.4f}: worse than the noise of one run"


def test_loglinear_recovers_the_law_that_made_the_losses() -> None:
    rates = np.array([0.2, -0.5, 1.0, 0.5, -1.5])
    weights, fresh = draw(80, 0), draw(300, 1)
    losses = 3 + np.exp(weights @ rates) + NOISE * np.random.default_rng(0).normal(size=80)
    found = build_surrogate("loglinear").fit(weights, losses).predict(fresh)
    assert np.sqrt(np.mean((found - 3 - np.exp(fresh @ rates)) ** 2)) < NOISE


# --- scores, cross-validation, choice


def test_scores_by_hand() -> None:
    found = score(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0]))
    assert found["spearman"] == pytest.approx(0.5) and found["mse"] == pytest.approx(5 / 3)
    assert found["rmse"] == pytest.approx((5 / 3) ** 0.5) and found["pearson"] == pytest.approx(0.327327)
    assert score(np.ones(3), np.arange(3.0))["spearman"] == 0  # a constant ranks nothing; NaN is not JSON


def test_repeats_of_a_mixture_never_leave_their_fold() -> None:
    """Every mixture run twice with the same odd loss: only a fold that leaks could know it."""
    weights = np.repeat(draw(30, 0), 2, axis=0)
    losses = np.repeat(np.random.default_rng(0).normal(size=30), 2)
    found = cross_validate("lightgbm", weights, losses, folds=5, repeats=2)
    assert found.scores["spearman"] < 0.4
    assert group_mixtures(weights).tolist()[::2] == group_mixtures(weights).tolist()[1::2]


def test_cross_validation_is_out_of_fold_and_seeded() -> None:
    weights = draw(40, 0)
    losses = np.random.default_rng(0).normal(size=40)  # nothing to learn
    found = cross_validate("lightgbm", weights, losses, repeats=2, seed=1)
    assert found.scores["pearson"] < 0.5  # in sample LightGBM reaches .95
    assert found.predicted.shape == found.errors.shape == (40,)
    np.testing.assert_array_equal(
        found.predicted, cross_validate("lightgbm", weights, losses, repeats=1, seed=1).predicted
    )
    other = cross_validate("lightgbm", weights, losses, repeats=1, seed=2).predicted
    assert not np.array_equal(found.predicted, other)


def test_one_mixture_cannot_be_cross_validated() -> None:
    with pytest.raises(ValueError, match="same mixture"):
        cross_validate("linear", np.full((5, 2), 0.5), np.arange(5.0))


def choose_planted(losses: np.ndarray, weights: np.ndarray, names: tuple[str, ...] = SURROGATES) -> Choice:
    return choose(weights, losses, names, seed=0, repeats=1)


def test_the_law_that_made_the_losses_is_chosen() -> None:
    weights = draw(60, 0)
    found = choose_planted(planted(weights, 0), weights)
    assert found.chosen == "effective" and "lowest cross-validated error of 4" in found.why
    assert set(found.candidates) == set(SURROGATES) and not found.warnings
    assert found.candidates["effective"]["mse"] < min(found.candidates[n]["mse"] for n in SURROGATES[1:])
    np.testing.assert_allclose(
        score(found.cv_predicted, planted(weights, 0))["mse"], found.candidates["effective"]["mse"]
    )


def test_trees_are_chosen_where_no_law_holds() -> None:
    weights = draw(120, 0)
    losses = np.where(weights[:, 0] > 0.3, 4.0, 5.0) + np.where(weights[:, 1] > 0.2, 0.7, 0.0)
    found = choose_planted(losses, weights)
    assert found.chosen == "lightgbm"


def test_within_noise_the_smoother_law_is_preferred() -> None:
    """Noise as large as the signal: the straight line happens to do best, by less than one standard error."""
    weights = draw(60, 0)
    losses = planted(weights) + 0.2 * np.random.default_rng(0).normal(size=60)
    found = choose_planted(losses, weights, ("linear", "effective"))
    best = min(found.candidates, key=lambda n: found.candidates[n]["mse"])
    assert best == "linear" and found.chosen == "effective"
    assert "is within noise of linear" in found.why and "one standard error" in found.why


def test_noise_is_not_sold_as_a_surrogate() -> None:
    weights = draw(40, 0)
    found = choose_planted(np.random.default_rng(1).normal(size=40), weights)
    assert any("does not beat predicting the mean" in w or "mostly noise" in w for w in found.warnings)


def test_too_few_mixtures_are_said_to_be_too_few() -> None:
    weights = draw(6, 0)
    found = choose_planted(planted(weights, 0), weights)
    assert any(w.startswith("6 mixtures for 5 domains") for w in found.warnings)
    assert choose_planted(planted(weights, 0), weights, ("linear",)).why.startswith("linear was the only candidate")
    with pytest.raises(ValueError, match="no surrogates"):
        choose_planted(planted(weights, 0), weights, ())
