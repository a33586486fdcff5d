"""Designs and proposals: farther apart, better determined, and nearer to the optimum than what is drawn at random."""

from pathlib import Path

import numpy as np
import pytest

from regmix_search import designs
from regmix_search.designs import control_mixtures, d_optimal, draw_design, embed, law_optimal, maximin
from regmix_search.goals import Goal
from regmix_search.laws import Effective
from regmix_search.proposals import Fitted, draw_pool, expected_improvement, fit_runs, propose, propose_rows
from regmix_search.region import build_region
from regmix_search.space import FloatArray, build_space, sample_mixtures
from regmix_search.tables import Runs, read_runs

TOKENS = {"web": 1000, "code": 300, "math": 200, "books": 100, "chat": 40}
SPACE = build_space(TOKENS, 1000, max_epochs=4)


def least_distance(rows: FloatArray) -> float:
    points = embed(rows)
    apart = np.linalg.norm(points[:, None] - points[None], axis=2) + 9 * np.eye(len(points))
    return float(apart.min())


def determinant(rows: FloatArray) -> float:
    x = np.hstack([np.ones((len(rows), 1)), embed(rows)])
    return float(np.linalg.slogdet(x.T @ x)[1])


@pytest.mark.parametrize("kind", ["random", "maximin", "d_optimal", "law"])
def test_designs_obey_what_draws_obey(kind: str) -> None:
    rows = draw_design(SPACE, 20, 3, kind)  # type: ignore[arg-type]
    assert rows.shape == (20, 5) and np.all(rows <= SPACE.caps + 1e-12)
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-12)
    assert np.all((rows == 0) | (rows >= 2e-4 - 1e-12)) and len(np.unique(rows, axis=0)) == 20
    np.testing.assert_array_equal(rows, draw_design(SPACE, 20, 3, kind))  # type: ignore[arg-type]


def test_a_design_is_better_at_what_it_is_for_than_draws_are() -> None:
    drawn = [draw_design(SPACE, 20, seed) for seed in range(10)]
    spread, informed = draw_design(SPACE, 20, 0, "maximin"), draw_design(SPACE, 20, 0, "d_optimal")
    assert least_distance(spread) > 1.5 * max(map(least_distance, drawn))
    assert determinant(informed) > max(map(determinant, drawn)) + 1
    assert determinant(informed) > determinant(spread) and least_distance(spread) > least_distance(informed)


def test_exchanges_reach_the_best_of_all_small_designs() -> None:
    """3 of 9 mixtures of two domains: all 84 triples are tried."""
    pool = np.array([[w, 1 - w] for w in np.linspace(0, 1, 9)])
    from itertools import combinations

    def value(rows: tuple[int, ...]) -> float:
        x = np.hstack([np.ones((3, 1)), embed(pool[list(rows)])])
        return float(np.linalg.det(x.T @ x + 1e-3 * np.eye(3)))

    best = max(combinations(range(9), 3), key=value)
    assert value(tuple(d_optimal(pool, 3))) == pytest.approx(value(best))


def test_exchanges_improve_on_the_greedy_design(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = [np.random.default_rng(seed).dirichlet(np.full(4, 0.5), size=40) for seed in range(8)]
    exchanged = [determinant(pool[d_optimal(pool, 6)]) for pool in pools]
    monkeypatch.setattr(designs, "PASSES", 0)
    greedy = [determinant(pool[d_optimal(pool, 6)]) for pool in pools]
    assert np.all(np.array(exchanged) >= np.array(greedy) - 1e-3) and np.mean(exchanged) > np.mean(greedy) + 0.01


def test_designs_keep_away_from_what_is_run_anyhow() -> None:
    pool = sample_mixtures(SPACE, 200, 0)
    given = pool[:5]
    for pick in (maximin, d_optimal, law_optimal):
        rows = pick(pool, 10, 0, given)
        assert len(set(rows.tolist())) == 10
    assert not set(maximin(pool, 10, 0, given).tolist()) & set(range(5))
    with pytest.raises(ValueError, match="a design of 201 mixtures from a pool of 200"):
        maximin(pool, 201)


def test_draws_that_serve_elsewhere_are_left_out() -> None:
    held = sample_mixtures(SPACE, 12, 1)
    for kind in ("random", "maximin", "d_optimal", "law"):
        rows = draw_design(SPACE, 30, 1, kind, skip=12)  # type: ignore[arg-type]
        assert np.abs(rows[:, None] - held[None]).sum(axis=2).min() > 1e-6


def test_controls_by_hand() -> None:
    found = control_mixtures(SPACE)
    np.testing.assert_allclose(found["natural"], np.array(list(TOKENS.values())) / 1640)
    np.testing.assert_allclose(found["uniform"], np.full(5, 0.2))
    # chat exists 40 times, four epochs of it are .16 of 1,000 tokens; the others share the rest
    np.testing.assert_allclose(found["unimax"], [0.21, 0.21, 0.21, 0.21, 0.16])
    region = build_region(SPACE, ["web=0.5.."])
    assert all(region.holds(row) for name, row in control_mixtures(SPACE, region).items() if name != "uniform")


class Bowl:
    """A fit that is known everywhere: lowest at `centre`, with a deviation of choice."""

    name = "bowl"

    def __init__(self, centre: FloatArray, deviation: float) -> None:
        self.centre, self.sd = centre, deviation

    def fit(self, weights: FloatArray, losses: FloatArray, seed: int = 0) -> "Bowl":
        return self

    def predict(self, weights: FloatArray) -> FloatArray:
        return np.asarray(((weights - self.centre) ** 2).sum(axis=1))

    def deviation(self, weights: FloatArray) -> FloatArray:
        return np.full(len(weights), self.sd)


def bowl(deviation: float = 0.01, n: int = 20) -> Fitted:
    weights = sample_mixtures(SPACE, n, 5)
    model = Bowl(np.array([0.4, 0.2, 0.2, 0.1, 0.1]), deviation)
    return Fitted({"a": model}, Goal({"a": 1.0}), weights, model.predict(weights))


def test_expected_improvement_by_hand() -> None:
    """At the best so far it is sd / sqrt(2 pi); far better mixtures give the difference, far worse ones nothing."""
    fitted = bowl(0.01)
    at = fitted.weights[[int(np.argmin(fitted.losses))]]
    assert expected_improvement(fitted, at)[0] == pytest.approx(0.01 / np.sqrt(2 * np.pi))
    sure = bowl(1e-9)
    rows = np.vstack([sure.models["a"].centre, [0, 0, 0, 0, 1.0]])  # type: ignore[attr-defined]
    np.testing.assert_allclose(expected_improvement(sure, rows), [sure.losses.min(), 0], atol=1e-8)


def test_proposals_are_good_and_not_all_in_one_place() -> None:
    fitted, centre = bowl(), np.array([0.4, 0.2, 0.2, 0.1, 0.1])
    crowd = np.random.default_rng(0).dirichlet(500 * centre, size=200)
    pool = np.vstack([sample_mixtures(SPACE, 400, 9), crowd])
    rows, gains = propose_rows(fitted, pool, 8)
    assert rows[0] == np.argmax(expected_improvement(fitted, pool)) and gains[0] == gains.max()
    best = np.argsort(fitted.predict(pool))[:8]
    assert least_distance(pool[rows]) > 1.5 * least_distance(pool[best]), "the eight best crowd together"
    assert fitted.predict(pool[rows]).mean() < np.quantile(fitted.predict(pool[:400]), 0.2)


def test_what_was_run_is_not_proposed_again() -> None:
    fitted = bowl()
    pool = np.vstack([fitted.weights, sample_mixtures(SPACE, 30, 9)[20:]])
    assert sorted(propose_rows(fitted, pool, 10)[0]) == list(range(20, 30))
    with pytest.raises(ValueError, match="11 proposals wanted, the pool has 10"):
        propose_rows(fitted, pool, 11)


def test_proposals_from_anywhere_obey_the_caps() -> None:
    fitted = bowl()
    rows = propose(fitted, SPACE, 8, seed=1)
    assert np.all(rows <= SPACE.caps + 1e-9) and np.abs(rows.sum(axis=1) - 1).max() < 1e-9
    assert np.all((rows == 0) | (rows >= 1e-4))
    assert fitted.predict(rows).min() < fitted.losses.min(), "something better than all that was run"
    np.testing.assert_array_equal(rows, propose(fitted, SPACE, 8, seed=1))
    assert len(draw_pool(fitted, SPACE, 1)) > 2000


def test_proposals_know_the_bounds() -> None:
    """The bowl is lowest at .4 of web; where .6 at least is asked for, that is where they go."""
    fitted, region = bowl(), build_region(SPACE, ["web=0.6.."])
    pool = draw_pool(fitted, SPACE, 1, region=region)
    inside = np.array([region.holds(row) for row in pool])
    assert 0.5 <= inside.mean() < 1 and np.all(pool <= SPACE.caps + 1e-9)
    grouped = build_region(SPACE, ["web+code=..0.3"])
    assert np.mean([grouped.holds(row) for row in draw_pool(fitted, SPACE, 1, region=grouped)]) >= 0.5


def test_goals_of_several_losses_have_a_deviation() -> None:
    two = {"a": Bowl(np.full(5, 0.2), 3.0), "b": Bowl(np.full(5, 0.2), 4.0)}
    rows = np.full((1, 5), 0.2)
    assert Fitted(two, Goal({"a": 0.5, "b": 0.5}), rows, np.ones(1)).deviation(rows)[0] == pytest.approx(2.5)
    assert Fitted(two, Goal({"a": 0.5, "b": 0.5}, worst=True), rows, np.ones(1)).deviation(rows)[0] == 4


def test_rounds_find_the_best_of_the_published_runs(shared_dir: Path) -> None:
    """48 runs of RegMix's 768 (Pile-CC): 16 drawn at random, then four rounds of 8. LightGBM in rounds: .021 nats."""
    folder = shared_dir / "data/regmix"
    if not folder.is_dir():
        pytest.skip(f"no published runs at {folder}")
    train = read_runs(folder / "train_mixture_1m.csv", folder / "train_pile_loss_1m.csv")
    test = read_runs(folder / "test_mixture_1m.csv", folder / "test_pile_loss_1m.csv")
    target = "the_pile_pile_cc"
    order = [test.domains.index(d) for d in train.domains]
    pool = np.vstack([train.weights, test.weights[:, order]])
    losses = np.concatenate([train.losses[target], test.losses[target]])
    regrets = []
    for seed in range(4):
        rows = np.random.default_rng(seed).permutation(len(pool))[:16]
        while len(rows) < 48:
            runs = Runs(tuple(rows.tolist()), train.domains, pool[rows], {target: losses[rows]})
            rows = np.append(rows, propose_rows(fit_runs(runs, target), pool, 8)[0])
        regrets.append(losses[rows].min() - losses.min())
    print("regret of 48 adaptive runs:", np.round(regrets, 4))
    assert np.mean(regrets) <= 0.003


def test_the_law_is_less_unsure_after_a_design_of_its_own() -> None:
    """Mean variance over the pool that the law's prior leaves after runs, against random rows and given ones."""
    rng = np.random.default_rng(0)
    pool = np.vstack([rng.dirichlet(np.full(5, s), size=100) for s in (0.2, 0.6, 2.0)])
    slopes = Effective().prior_slopes(pool)

    def left(rows: np.ndarray) -> float:
        known = slopes[rows].T @ slopes[rows] / 0.5 + np.eye(slopes.shape[1])
        return float(np.mean(np.sum(slopes * np.linalg.solve(known, slopes.T).T, axis=1)))

    drawn = [left(rng.permutation(300)[:10]) for _ in range(20)]
    designed = [left(law_optimal(pool, 10, seed)) for seed in range(5)]
    assert max(designed) < min(drawn)
    again = law_optimal(pool, 7, 0, given=pool[law_optimal(pool, 3, 0)])
    assert not set(again.tolist()) & set(law_optimal(pool, 3, 0).tolist()) and len(set(again.tolist())) == 7
