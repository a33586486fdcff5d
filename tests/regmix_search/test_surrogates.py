"""One contract for all surrogates: what each must do, whatever it is inside."""

import json

import numpy as np
import pytest
from planted_law import NOISE, K, draw, planted
from scipy.optimize import approx_fprime

from regmix_search.choice import calibrate
from regmix_search.surrogates import (
    SURROGATES,
    SmoothSurrogate,
    Surrogate,
    build_surrogate,
    from_json,
    score,
    to_json,
)

CONVEX = ("effective_repeats", "effective", "power", "loglinear", "linear")


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
    np.testing.assert_array_equal(first, other)


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
    if surrogate.name == "lightgbm" and n < 6:
        with pytest.raises(ValueError, match=f"{n} runs: lightgbm needs 6 to split once"):
            surrogate.fit(weights, planted(weights, 0))
        return
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
    with pytest.raises(ValueError, match="'svm' does not exist; there are effective, power, effective_repeats, log"):
        build_surrogate("svm")


def test_the_order_of_domains_does_not_matter(surrogate: Surrogate) -> None:
    weights, fresh, order = draw(60, 0), draw(30, 1), np.array([3, 0, 4, 2, 1])
    losses = planted(weights, 0)
    first = surrogate.fit(weights, losses).predict(fresh)
    other = build_surrogate(surrogate.name).fit(weights[:, order], losses).predict(fresh[:, order])
    spread = 0.03 if surrogate.name == "lightgbm" else 1e-3  # trees break ties between splits by column
    assert np.sqrt(np.mean((first - other) ** 2)) < spread


def test_the_layout_of_an_array_does_not_matter(surrogate: Surrogate) -> None:
    """Columns first in memory, as a reordered table is: BLAS sums such an array in another order."""
    weights, fresh = draw(60, 0, 17), draw(200, 1, 17)  # BLAS adds five columns in one order, whatever the layout
    losses = planted(weights[:, :K] + 0.1, 0)
    first = surrogate.fit(weights, losses).predict(fresh)
    other = build_surrogate(surrogate.name).fit(np.asfortranarray(weights), losses)
    np.testing.assert_array_equal(other.predict(fresh), first)
    np.testing.assert_array_equal(other.predict(np.asfortranarray(fresh)), first)


def test_a_fit_survives_json(surrogate: Surrogate) -> None:
    weights, fresh = draw(60, 0), draw(30, 1)
    surrogate.fit(weights, planted(weights, 0))
    back = from_json(json.loads(json.dumps(to_json(surrogate), allow_nan=False)))
    assert back.name == surrogate.name
    np.testing.assert_array_equal(back.predict(fresh), surrogate.predict(fresh))
    np.testing.assert_array_equal(back.deviation(fresh), surrogate.deviation(fresh))


def test_deviations_are_of_the_size_of_the_errors(surrogate: Surrogate) -> None:
    """Nine tenths of fresh runs within 1.645 deviations, or what one factor makes so; never below a run's noise."""
    weights, fresh = draw(80, 0), draw(400, 1)
    model = surrogate.fit(weights, planted(weights, 0))
    errors, deviations = model.predict(fresh) - planted(fresh, 7), model.deviation(fresh)
    assert deviations.shape == (400,) and deviations.min() > 0.4 * NOISE
    assert 0.3 < calibrate(errors, deviations) < 3.5


def test_slopes_are_those_of_finite_differences(surrogate: Surrogate) -> None:
    weights = draw(60, 0)
    model = surrogate.fit(weights, planted(weights, 0))
    assert hasattr(model, "gradient") == (surrogate.name != "lightgbm")
    if hasattr(model, "gradient"):
        for row in draw(10, 2) + 0.01:
            numeric = approx_fprime(row, lambda w: model.predict(w[None])[0], 1e-7)
            np.testing.assert_allclose(model.gradient(row[None])[0], numeric, rtol=1e-3, atol=1e-4)


def test_only_the_convex_laws_solve_themselves(surrogate: Surrogate) -> None:
    assert isinstance(surrogate, SmoothSurrogate) == (surrogate.name in CONVEX)
    if surrogate.name in CONVEX:
        weights = draw(60, 0)
        model = surrogate.fit(weights, planted(weights, 0))
        a, b = draw(200, 3), draw(200, 4)
        assert np.all(model.predict((a + b) / 2) <= (model.predict(a) + model.predict(b)) / 2 + 1e-12)
