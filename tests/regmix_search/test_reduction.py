"""Domains that keep their ratio: the reduced mixtures are the real ones, their caps too, and so is their optimum."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_law import draw, planted

from regmix_search.objective import Objective, duality_gap
from regmix_search.proposals import fit_runs, propose
from regmix_search.reduction import Reduction, lift
from regmix_search.solver import solve
from regmix_search.space import FloatArray, Space, build_space
from regmix_search.surrogates import Surrogate, build_surrogate
from regmix_search.tables import Runs

DOMAINS = ("web", "code", "new", "math", "books")
RATIOS = {"code": 0.5, "math": 0.3, "books": 0.2}
TOKENS = {"web": 600, "code": 150, "new": 60, "math": 90, "books": 100}


def reduction() -> Reduction:
    return Reduction(DOMAINS, RATIOS)


def space(target_tokens: int = 1000) -> Space:
    return build_space(TOKENS, target_tokens, 2.0)


@st.composite
def cases(pick) -> tuple[Reduction, FloatArray]:
    """Some of 3 to 8 domains kept, a few of them at 0, and five reduced mixtures."""
    k = pick(st.integers(3, 8))
    seed, kept = pick(st.integers(0, 10_000)), pick(st.integers(1, k - 1))
    rng = np.random.default_rng(seed)
    names = [f"d{i}" for i in range(k)]
    shares = rng.dirichlet(np.ones(kept))
    shares = np.where((shares < 0.1) & (shares < shares.max()), 0.0, shares)
    chosen = rng.permutation(names)[:kept].tolist()
    made = Reduction(tuple(names), dict(zip(chosen, (shares / shares.sum()).tolist(), strict=True)))
    return made, rng.dirichlet(np.ones(k - kept + 1), size=5)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_reduce_is_the_inverse_of_expand_and_both_keep_the_sum(case) -> None:
    made, rows = case
    real = made.expand(rows)
    np.testing.assert_allclose(real.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(made.reduce(real), rows, atol=1e-12)
    assert real.shape == (5, len(made.domains)) and all(made.holds(row) for row in real)
    np.testing.assert_allclose(made.reduce(made.expand(made.reduce(real))), made.reduce(real), atol=1e-12)


def test_a_mixture_in_another_ratio_is_not_held() -> None:
    made = reduction()
    row = made.expand(np.array([0.5, 0.4, 0.1]))
    np.testing.assert_allclose(row, [0.4, 0.25, 0.1, 0.15, 0.1])
    moved = row + np.array([0, 0.01, 0, -0.01, 0])
    assert made.holds(row) and not made.holds(moved)
    np.testing.assert_allclose(made.reduce(moved), [0.5, 0.4, 0.1])


def test_the_virtual_domain_has_the_cap_of_its_scarcest_member() -> None:
    """Olmix: min over j of k N_j / (R p_j). By hand: code 2*150/500, math 2*90/300, books 2*100/200."""
    small = reduction().space(space())
    assert small.domains == ("kept", "web", "new")
    np.testing.assert_allclose(small.caps, [min(300 / 500, 180 / 300, 200 / 200), 1.0, 0.12])
    assert small.tokens is not None and small.tokens.tolist() == [300, 600, 60], "code and math are read once in 300"
    np.testing.assert_allclose(small.prior, [0.34, 0.6, 0.06])
    at_cap, over = reduction().expand(np.array([[0.6, 0.4, 0.0], [0.61, 0.39, 0.0]]))
    region = reduction().region(space())
    assert region.holds(at_cap) and not region.holds(over) and not region.holds(np.full(5, 0.2))
    assert max(space().epochs(at_cap).values()) == pytest.approx(2.0)


@given(cases(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_reduced_mixture_under_its_caps_obeys_the_real_ones(case, seed) -> None:
    made, _ = case
    tokens = np.random.default_rng(seed).integers(1, 1000, len(made.domains))
    real = build_space(dict(zip(made.domains, tokens.tolist(), strict=True)), int(tokens.sum()), 4.0)
    try:
        region = made.region(real)
    except ValueError as error:
        assert "reuse.free" in str(error)
        return
    rows = region.sample(30, np.random.default_rng(seed))
    assert np.all(rows <= real.caps + 1e-9) and np.allclose(rows.sum(axis=1), 1)
    assert all(region.holds(row, 1e-9) for row in rows)


def test_a_scarce_member_that_leaves_no_mixture_is_named() -> None:
    with pytest.raises(ValueError, match=r"math is the scarcest of them.*Add math to reuse\.free"):
        Reduction(DOMAINS, {"web": 0.1, "math": 0.8, "books": 0.1}).space(space(1200))


def law(seed: int, name: str = "effective") -> Surrogate:
    rows = draw(60, seed)
    return build_surrogate(name).fit(rows, planted(rows, seed), seed)


@pytest.mark.parametrize("name", ["effective", "gp", "lightgbm"])
def test_the_optimum_keeps_the_ratio_obeys_the_caps_and_no_mixture_on_a_grid_beats_it(name) -> None:
    model = law(0, name)
    objective, region, prior = Objective(((1.0, model),)), reduction().region(space()), space().prior
    found = solve(objective, region, prior, np.tile(prior, (2, 1)), minimum=0.0)
    assert region.holds(found, 1e-7) and np.all(found <= space().caps + 1e-7)
    grid = [(a, b, 1 - a - b) for a in np.linspace(0, 0.6, 61) for b in np.linspace(0, 1, 101)]
    rows = reduction().expand(np.array([row for row in grid if 0 <= row[2] <= 0.12]))
    slack = {"effective": 1e-7, "gp": 1e-5, "lightgbm": 0.02}[name]
    assert objective.at(found) <= objective.predict(rows).min() + slack
    if name == "effective":
        gap = duality_gap(objective, region, found)
        assert gap is not None and gap < 1e-5


def test_bounds_and_the_pull_to_the_prior_hold_in_reduced_mixtures_too() -> None:
    """The reduced objective is the real one, KL included; a bound on a kept domain says what to do."""
    made, prior = reduction(), space().prior
    real = Objective(((0.7, law(1)), (0.3, law(2, "linear"))), kl=0.05, prior=prior, ceilings=((law(1), 4.0),))
    rows = np.random.default_rng(0).dirichlet(np.ones(3), size=20)
    small = made.reduced(real)
    np.testing.assert_allclose(small.value(rows), real.value(made.expand(rows)), rtol=1e-12)
    np.testing.assert_allclose(small.excess(rows), real.excess(made.expand(rows)), rtol=1e-12)
    step = 1e-6
    slopes = [(small.value(rows[:1] + step * e) - small.value(rows[:1] - step * e))[0] / 2 / step for e in np.eye(3)]
    np.testing.assert_allclose(small.slope(rows[0]), slopes, rtol=1e-5)
    found = solve(Objective(real.terms), made.region(space(), ["web=0.5", "new=0.05.."]), prior, prior[None])
    assert found[0] == pytest.approx(0.5) and found[2] >= 0.05 - 1e-9
    with pytest.raises(ValueError, match=r"bound 'code=0\.1': code keep their ratio; add them to reuse\.free"):
        made.region(space(), ["code=0.1"])


def test_a_lifted_surrogate_has_slopes_only_where_its_own_has() -> None:
    smooth, trees = lift(law(0), reduction().matrix), lift(law(0, "lightgbm"), reduction().matrix)
    assert hasattr(smooth, "gradient") and not hasattr(trees, "gradient")
    assert smooth.is_convex and not trees.is_convex and smooth.name == "effective"
    assert dataclasses.is_dataclass(smooth)


def test_proposals_keep_the_ratio() -> None:
    rows = draw(20, 0)
    fitted = fit_runs(Runs(tuple(range(20)), DOMAINS, rows, {"a": planted(rows, 0)}), "a")
    region = reduction().region(space())
    picked = propose(fitted, space(), 6, region=region)
    assert all(region.holds(row) for row in picked) and len(np.unique(picked.round(6), axis=0)) == 6
