"""The exact solve: first-order conditions, brute force, and every kind of constraint."""

import time

import numpy as np
import pytest

from regmix_search.objective import Objective, duality_gap
from regmix_search.region import Group, Region
from regmix_search.simulation import simulate_top
from regmix_search.solver import pareto_front, solve
from regmix_search.space import FloatArray
from regmix_search.surrogates import Surrogate, build_surrogate

K = 4
PRIOR = np.array([0.4, 0.3, 0.2, 0.1])


def law(seed: int, k: int = K, n: int = 40) -> tuple[Surrogate, FloatArray]:
    """A fitted law and the mixtures it was fitted on."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(k, 0.6), size=n)
    return build_surrogate("effective").fit(weights, 5 - np.log(0.3 + np.sqrt(weights) @ rng.uniform(0, 2, k))), weights


def region(seed: int = 0, groups: bool = True) -> Region:
    low = np.array([0.0, 0.1, 0.0, 0.02]) if seed % 2 else np.zeros(K)
    group = Group(np.array([1.0, 1.0, 0, 0]), 0.2, 0.55)
    return Region(low, np.array([0.5, 0.9, 0.6, 0.3]), (group,) if groups else ())


def lattice(region: Region, steps: int = 50) -> FloatArray:
    """Every mixture of the region on a grid."""
    axis = np.arange(steps + 1)
    rows = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(-1, 3)
    rows = rows[rows.sum(axis=1) <= steps]
    rows = np.column_stack([rows, steps - rows.sum(axis=1)]) / steps
    inside = (rows >= region.low - 1e-9).all(axis=1) & (rows <= region.high + 1e-9).all(axis=1)
    for group in region.groups:
        inside &= (rows @ group.members >= group.low - 1e-9) & (rows @ group.members <= group.high + 1e-9)
    return rows[inside]


@pytest.mark.parametrize("kind", ["one", "mean", "worst", "kl", "worst and kl", "ceiling"])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_on_a_grid_of_all_mixtures_is_better(kind: str, seed: int) -> None:
    (one, sample), (two, _) = law(seed), law(seed + 10)
    terms = ((1.0, one),) if kind in ("one", "kl", "ceiling") else ((0.3, one), (0.7, two))
    pull = 0.1 if "kl" in kind else 0.0
    allowed = region(seed)
    limit = float(two.predict(allowed.pull_in(PRIOR[None]))[0]) + 0.02
    objective = Objective(terms, "worst" in kind, pull, PRIOR, ((two, limit),) if kind == "ceiling" else ())
    found = solve(objective, allowed, PRIOR, sample, minimum=0.0)
    assert allowed.holds(found) and objective.excess(found[None])[0] <= 1e-7
    grid = lattice(allowed)
    grid = grid[objective.excess(grid) <= 0]
    best = objective.value(grid).min()
    here = objective.value(found[None])[0]
    assert here <= best + 1e-7, "a mixture of the grid is better"
    assert here >= best - 0.02, "a grid of .02 cannot be farther off"
    gap = duality_gap(objective, allowed, found)
    assert gap is None if kind in ("worst", "worst and kl", "ceiling") else gap < 1e-5


@pytest.mark.parametrize("seed", range(8))
def test_slopes_obey_the_conditions_of_an_optimum(seed: int) -> None:
    """Karush, Kuhn, Tucker without groups: equal slopes inside, no better ones at 0, no worse ones at a cap."""
    rng = np.random.default_rng(seed)
    model, sample = law(seed, k=9, n=60)
    pull = 0.05 * (seed % 2)
    prior = rng.dirichlet(np.ones(9))
    allowed = Region(0.01 * rng.integers(0, 2, 9) * (seed % 3 > 0), np.minimum(1, rng.uniform(0.1, 0.5, 9)))
    objective = Objective(((1.0, model),), kl=pull, prior=prior)
    found = solve(objective, allowed, prior, sample, minimum=0.0)
    slope = objective.slope(found)
    low, high = found <= allowed.low + 1e-7, found >= allowed.high - 1e-7
    level = np.median(slope[~low & ~high])
    np.testing.assert_allclose(slope[~low & ~high], level, atol=2e-3)
    assert np.all(slope[low & ~high] >= level - 2e-3) and np.all(slope[high & ~low] <= level + 2e-3)


def test_the_gap_bounds_what_is_missed() -> None:
    """At any mixture the true minimum is no lower than value - gap; at the optimum the gap is nothing."""
    model, sample = law(3)
    objective, allowed = Objective(((1.0, model),)), region(1)
    best = objective.at(solve(objective, allowed, PRIOR, sample, minimum=0.0))
    for row in allowed.sample(50, np.random.default_rng(0)):
        gap = duality_gap(objective, allowed, row)
        assert gap is not None and best >= objective.at(row) - gap - 1e-9
    assert duality_gap(objective, allowed, PRIOR) > 0.01  # type: ignore[operator]


def test_the_pull_to_the_prior_pulls() -> None:
    model, sample = law(0)
    allowed = Region(np.zeros(K), np.ones(K))
    apart = []
    for kl in (0.0, 0.05, 0.5, 50.0):
        found = solve(Objective(((1.0, model),), kl=kl, prior=PRIOR), allowed, PRIOR, sample, minimum=0.0)
        apart.append(np.abs(found - PRIOR).sum())
    assert apart == sorted(apart, reverse=True) and apart[0] > 0.2 and apart[-1] < 0.01


def test_the_worst_loss_is_lower_than_at_the_best_mean() -> None:
    (one, sample), (two, _) = law(0), law(12)
    terms, allowed = ((0.5, one), (0.5, two)), Region(np.zeros(K), np.ones(K))
    worst = solve(Objective(terms, worst=True), allowed, PRIOR, sample)
    mean = solve(Objective(terms), allowed, PRIOR, sample)
    losses = {n: [float(m.predict(w[None])[0]) for m in (one, two)] for n, w in (("worst", worst), ("mean", mean))}
    assert max(losses["worst"]) < max(losses["mean"]) and sum(losses["worst"]) > sum(losses["mean"])


def test_the_front_holds_no_mixture_that_another_beats() -> None:
    (one, sample), (two, _) = law(0), law(12)
    allowed = Region(np.zeros(K), np.array([0.5, 0.9, 0.6, 0.3]))
    front = pareto_front({"one": one, "two": two}, allowed, PRIOR, sample, 12)
    losses = np.array([list(point["losses"].values()) for point in front])
    assert len(front) >= 8 and np.all(np.diff(losses[:, 0]) > 0) and np.all(np.diff(losses[:, 1]) < 0)
    grid = lattice(allowed)
    a, b = one.predict(grid), two.predict(grid)
    assert not any(np.any((a < x - 1e-6) & (b < y - 1e-6)) for x, y in losses), "a grid point beats one of the front"


class Hidden:
    """A law that shows its slopes but not that it is convex, as a Gaussian process does; or not even those."""

    def __init__(self, inner: Surrogate, slopes: bool) -> None:
        self.name, self.inner = "effective", inner
        if slopes:
            self.gradient = inner.gradient  # type: ignore[attr-defined]

    def fit(self, weights: FloatArray, losses: FloatArray, seed: int = 0) -> "Hidden":
        return self

    def predict(self, weights: FloatArray) -> FloatArray:
        return self.inner.predict(weights)


@pytest.mark.parametrize(("slopes", "missed"), [(True, 1e-5), (False, 0.02)])
@pytest.mark.parametrize("seed", range(3))
def test_surrogates_that_are_not_known_to_be_convex_end_at_the_same_optimum(
    slopes: bool, missed: float, seed: int
) -> None:
    model, sample = law(seed)
    allowed = region(seed)
    exact = solve(Objective(((1.0, model),)), allowed, PRIOR, sample, minimum=0.0)
    found = solve(Objective(((1.0, Hidden(model, slopes)),)), allowed, PRIOR, sample, minimum=0.0)
    assert allowed.holds(found)
    value, best = (float(model.predict(w[None])[0]) for w in (found, exact))
    assert best - 1e-7 <= value <= best + missed


def test_regmix_simulation_averages_the_best_draws() -> None:
    model, _ = law(0)
    objective = Objective(((1.0, model),))
    found = simulate_top(objective, PRIOR, samples=5000, top=50, seed=1)
    assert found.sum() == pytest.approx(1) and objective.at(found) < objective.at(PRIOR)
    np.testing.assert_array_equal(found, simulate_top(objective, PRIOR, samples=5000, top=50, seed=1))
    rng = np.random.default_rng(5)
    one = simulate_top(objective, PRIOR, samples=1, top=1, seed=1)
    assert one.sum() == pytest.approx(1) and not np.allclose(one, rng.dirichlet(PRIOR))
    capped = Region(np.zeros(K), np.full(K, 0.6))
    inside = simulate_top(objective, PRIOR, samples=5000, top=50, seed=1, region=capped)
    assert capped.holds(inside) and objective.at(inside) < objective.at(PRIOR)
    with pytest.raises(ValueError, match="of 200 simulated mixtures obey the bounds, 100 are averaged"):
        simulate_top(objective, PRIOR, samples=200, top=100, region=Region(np.zeros(K), np.full(K, 0.4)))


def test_a_law_of_17_domains_is_solved_in_10_milliseconds() -> None:
    model, sample = law(0, k=17, n=96)
    prior = np.full(17, 1 / 17)
    caps = Region(np.zeros(17), np.full(17, 0.2))
    took = []
    for _ in range(5):
        start = time.process_time()
        found = solve(Objective(((1.0, model),)), caps, prior, sample)
        took.append(time.process_time() - start)
    assert min(took) < 0.010 and caps.holds(found)
    assert duality_gap(Objective(((1.0, model),)), caps, found) < 1e-6  # type: ignore[operator]


def test_a_process_on_17_domains_is_solved_in_2_seconds() -> None:
    """With 256 runs, from every start the same optimum: nothing drawn or run is predicted lower."""
    rng = np.random.default_rng(0)
    sample = rng.dirichlet(np.full(17, 0.3), size=256)
    losses = 5 - np.log(0.3 + np.sqrt(sample) @ rng.uniform(0, 2, 17)) + 0.02 * rng.normal(size=256)
    objective = Objective(((1.0, build_surrogate("gp").fit(sample, losses)),))
    prior, caps = np.full(17, 1 / 17), Region(np.zeros(17), np.full(17, 0.3))
    start = time.process_time()
    found = solve(objective, caps, prior, sample)
    assert time.process_time() - start < 2 and caps.holds(found)
    drawn = np.vstack([caps.pull_in(sample), caps.sample(5000, rng)])
    assert objective.at(found) <= objective.predict(drawn).min()


class Needs:
    """A loss that falls steeply with the first crumbs of one domain."""

    name = "needs"

    def __init__(self, domain: int, level: float) -> None:
        self.domain, self.level = domain, level

    def predict(self, weights: np.ndarray) -> np.ndarray:
        return self.level - 0.1 * np.log(1e-5 + weights[:, self.domain])

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        return -0.1 / (1e-5 + weights[:, [self.domain]]) * np.eye(weights.shape[1])[self.domain]


@pytest.mark.parametrize("worst", [False, True])
def test_a_crumb_that_a_loss_would_miss_is_raised_to_the_minimum_and_others_go(worst: bool) -> None:
    """With shares of 1e-4 the best weight of domain 1 is 1e-4; without it that loss is .24 nats higher."""
    allowed = Region(np.zeros(4), np.ones(4))
    shares = (0.5, 0.5) if worst else (0.9999, 0.0001)
    terms = tuple(zip(shares, (Needs(0, 5.0), Needs(1, 4.2 if worst else 5.0)), strict=True))
    objective, prior = Objective(terms, worst), np.full(4, 0.25)
    free = solve(objective, allowed, prior, prior[None], minimum=0.0)
    assert 0 < free[1] < 1e-3
    found = solve(objective, allowed, prior, prior[None], minimum=1e-3)
    missed = objective.at(np.array([1.0, 0, 0, 0])) - objective.at(free) > 1e-3
    assert missed == worst
    assert found[1] == (pytest.approx(1e-3) if missed else 0.0)
    assert found[2] == found[3] == 0.0 and found.sum() == pytest.approx(1.0, abs=1e-12)
