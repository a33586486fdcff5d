"""Scores, cross-validation, and a choice that the training runs alone make."""

import numpy as np
import pytest
from planted_law import draw, planted

from regmix_search import choice
from regmix_search.choice import Choice, calibrate, choose, coverage90, cross_validate
from regmix_search.surrogates import SURROGATES, build_surrogate, group_mixtures, score


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
    return choose(weights, losses, names, seed=0, repeats=1, larger=True)


def test_the_law_that_made_the_losses_is_chosen() -> None:
    weights = draw(60, 0)
    found = choose_planted(planted(weights, 0), weights)
    assert found.chosen == "effective" and "5-fold Spearman" in found.why
    assert set(found.candidates) == {*SURROGATES} - {"effective_repeats"} and not found.warnings
    rest = [found.candidates[n]["mse"] for n in ("loglinear", "linear", "gp", "lightgbm")]
    assert found.candidates["effective"]["mse"] < min(rest)
    np.testing.assert_allclose(
        score(found.cv_predicted, planted(weights, 0))["mse"], found.candidates["effective"]["mse"]
    )
    assert np.abs(found.cv_predicted - planted(weights)).mean() < found.scale90 * found.cv_deviation.mean()


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


def test_the_smoother_law_is_preferred_only_for_a_larger_target() -> None:
    weights = draw(60, 0)
    losses = planted(weights) + 0.2 * np.random.default_rng(0).normal(size=60)
    found = choose(weights, losses, ("linear", "effective"), repeats=1, larger=False)
    assert found.chosen == "linear" and "lowest cross-validated error" in found.why


def test_a_fold_has_no_say_in_what_predicts_it() -> None:
    """The nested prediction of a fold is the same whatever its own losses are: neither fit nor choice saw them."""
    weights, names = draw(40, 0), ("effective", "linear", "gp", "effective_gp", "average")
    losses = planted(weights, 0)
    folds = choice._folds(weights, 5, 1, 0)[0]
    first = choose(weights, losses, names, repeats=1)
    for i in range(5):
        spoilt = np.where(folds == i, np.random.default_rng(i).normal(9, 3, 40), losses)
        other = choose(weights, spoilt, names, repeats=1)
        np.testing.assert_array_equal(other.nested_predicted[folds == i], first.nested_predicted[folds == i])
        np.testing.assert_array_equal(other.nested_deviation[folds == i], first.nested_deviation[folds == i])
        assert not np.array_equal(other.nested_predicted, first.nested_predicted)


def test_a_candidate_far_behind_runs_no_more_folds() -> None:
    weights = draw(300, 0)
    found = choose(weights, planted(weights, 0), ("effective", "linear"), repeats=1)
    assert "coverage90" in found.candidates["effective"] and "coverage90" not in found.candidates["linear"]
    assert (
        found.chosen == "effective" and found.candidates["linear"]["rmse"] > 3 * found.candidates["effective"]["rmse"]
    )


@pytest.mark.parametrize("n", [64, 256])
def test_intervals_cover_nine_tenths(n: int) -> None:
    weights, fresh = draw(n, 3), draw(2000, 4)
    losses = planted(weights, 3)
    found = choose(weights, losses, ("effective", "gp"), repeats=1)
    assert 0.85 <= found.nested["coverage90"] <= 0.95
    model = build_surrogate(found.chosen).fit(weights, losses)
    inside = np.abs(model.predict(fresh) - planted(fresh, 9)) <= found.scale90 * model.deviation(fresh)
    assert 0.84 <= inside.mean() <= 0.97


def test_calibration_by_hand() -> None:
    errors = np.array([1.0, -2.0, 3.0, -4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    assert calibrate(errors, np.full(10, 2.0)) == 5.0  # the 10th of 10: ceil(11 * .9)
    assert calibrate(np.arange(1.0, 101), np.ones(100)) == 91
    fold = np.arange(10) % 2
    assert coverage90(errors, np.ones(10), fold) == 0.9  # each half by the other's largest: 10 is outside
    assert np.isnan(coverage90(errors, np.ones(10), np.zeros(10, dtype=int)))


def test_noise_is_not_sold_as_a_surrogate() -> None:
    weights = draw(40, 0)
    found = choose_planted(np.random.default_rng(1).normal(size=40), weights)
    assert any("does not beat predicting the mean" in w or "mostly noise" in w for w in found.warnings)


def test_a_single_candidate_is_said_to_be_one_and_none_is_refused() -> None:
    weights = draw(6, 0)
    assert choose_planted(planted(weights, 0), weights, ("linear",)).why.startswith("linear was the only candidate")
    with pytest.raises(ValueError, match="no surrogates"):
        choose_planted(planted(weights, 0), weights, ())
