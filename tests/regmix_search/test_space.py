"""The capped simplex: bounds, controls and sampling, against brute force and RegMix's own statistics."""

import numpy as np
import pytest
from scipy.optimize import linprog

from regmix_search.space import (
    Space,
    bound,
    build_space,
    controls,
    draw_mixtures,
    fill_cheapest,
    sample_mixtures,
    unlimited_space,
)

TOKENS = {"web": 6_000_000, "code": 3_000_000, "prose": 200_000, "math": 100_000}
# token shares of the Pile in RegMix's synthesize_mixture.py
PILE = {
    "arxiv": 0.113285273,
    "freelaw": 0.079608651,
    "nih_exporter": 0.003913491,
    "pubmed_central": 0.185375901,
    "wikipedia_en": 0.051081359,
    "dm_mathematics": 0.015962925,
    "github": 0.101750772,
    "philpapers": 0.003707518,
    "stackexchange": 0.066529351,
    "enron_emails": 0.001750772,
    "gutenberg_pg_19": 0.027085479,
    "pile_cc": 0.236869207,
    "ubuntu_irc": 0.01184346,
    "europarl": 0.007929969,
    "hackernews": 0.008032956,
    "pubmed_abstracts": 0.038825953,
    "uspto_backgrounds": 0.046446962,
}


def random_caps(seed: int, k: int) -> np.ndarray:
    """Caps that leave room for a mixture, some very tight."""
    rng = np.random.default_rng(seed)
    caps = rng.uniform(0.01, 1, k) ** 2
    return np.minimum(1, caps * max(1.0, rng.uniform(1.02, 4) / caps.sum()))


def pile_space() -> Space:
    return build_space({d: int(1e12 * p) for d, p in PILE.items()}, 10**9, max_epochs=None, maximum_usage=15)


def test_caps_and_prior_come_from_token_counts() -> None:
    space = build_space(TOKENS, target_tokens=4_000_000, max_epochs=4)
    assert space.named(space.caps) == {"web": 1.0, "code": 1.0, "prose": 0.2, "math": 0.1}
    np.testing.assert_allclose(space.prior, np.array(list(TOKENS.values())) / 9_300_000)
    assert space.epochs(space.caps)["math"] == pytest.approx(4)
    assert space.epochs(np.array([0.5, 0, 0, 0.05]))["web"] == pytest.approx(0.5 * 4 / 6)


def test_caps_that_no_mixture_obeys_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"9,300,000 tokens .* 18,600,000, but target_tokens is 37,200,000.*\(to 4 at"):
        build_space(TOKENS, target_tokens=37_200_000, max_epochs=2)
    build_space(TOKENS, target_tokens=37_200_000, max_epochs=4.0)  # the way out that the message names


def test_maximum_usage_is_a_multiple_of_the_prior() -> None:
    space = pile_space()
    caps = space.named(space.caps)
    # the caps that RegMix prints for its 17 domains
    assert [round(caps[d], 3) for d in ("enron_emails", "philpapers", "nih_exporter", "pile_cc")] == [
        0.026,
        0.056,
        0.059,
        1,
    ]
    assert caps["gutenberg_pg_19"] == pytest.approx(0.406, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": {"a": 0, "b": 5}}, "every domain needs some text"),
        ({"target_tokens": 0}, "target_tokens is 0"),
        ({"max_epochs": float("nan")}, "max_epochs is nan"),
        ({"tokens": {"a": 5}}, "two or more"),
        ({"prior": {"a": 1.0}}, r"differ in \['b'\]"),
        ({"prior": {"a": 1.0, "b": -0.5}}, "positive shares"),
    ],
)
def test_bad_spaces_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_space(**{"tokens": {"a": 5, "b": 5}, "target_tokens": 5, **change})


@pytest.mark.parametrize("space", [build_space(TOKENS, 4_000_000), unlimited_space(("a", "b"))])
def test_space_survives_json(space: Space) -> None:
    again = Space.from_json(space.to_json())
    assert again.to_json() == space.to_json()
    np.testing.assert_array_equal(again.caps, space.caps)
    assert (again.tokens is None) == (space.tokens is None)
    with pytest.raises(ValueError, match="no 'caps'"):
        Space.from_json({k: v for k, v in space.to_json().items() if k != "caps"})


def test_bound_is_water_filling() -> None:
    """Against bisection on the scale, for many caps; exact sums, no cap passed, zeros kept."""
    for seed in range(300):
        k = 2 + seed % 15
        caps = random_caps(seed, k)
        weights = np.random.default_rng(seed).dirichlet(np.full(k, 0.5)) + 1e-9
        if seed % 3 == 0:
            weights[np.argsort(caps)[0]] = 0.0
            if caps[weights > 0].sum() < 1:
                continue
        result = bound(weights, caps)
        low, high = 0.0, 1e12
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if np.minimum(caps, middle * weights).sum() < 1 else (low, middle)
        np.testing.assert_allclose(result, np.minimum(caps, high * weights), atol=1e-9)
        assert abs(result.sum() - 1) < 1e-12
        assert np.all(result <= caps) and np.all(result[weights == 0] == 0)


def test_bound_does_many_rows_as_it_does_one() -> None:
    caps = random_caps(3, 6)
    rows = np.random.default_rng(0).dirichlet(np.ones(6), size=20)
    np.testing.assert_array_equal(bound(rows, caps), np.stack([bound(row, caps) for row in rows]))


def test_bound_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"sum to 0\.3, below 1"):
        bound(np.array([1.0, 0.0, 0.0]), np.array([0.3, 0.6, 0.6]))


@pytest.mark.parametrize("seed", range(20))
def test_fill_cheapest_solves_the_linear_program(seed: int) -> None:
    caps = random_caps(seed, 7)
    costs = np.random.default_rng(seed).normal(size=7)
    ours = fill_cheapest(costs, caps)
    reference = linprog(costs, A_eq=np.ones((1, 7)), b_eq=[1], bounds=[(0, c) for c in caps])
    assert costs @ ours == pytest.approx(reference.fun, abs=1e-9)
    assert abs(ours.sum() - 1) < 1e-12 and np.all(ours <= caps)


def test_controls_obey_the_caps_except_single_domains() -> None:
    space = build_space(TOKENS, target_tokens=4_000_000, max_epochs=4)
    found = controls(space)
    assert list(found) == ["prior", "uniform", *(f"single({d})" for d in TOKENS)]
    np.testing.assert_allclose(found["prior"], space.prior)  # shares of the tokens always fit under caps from tokens
    np.testing.assert_allclose(found["uniform"], [0.35, 0.35, 0.2, 0.1])
    np.testing.assert_array_equal(found["single(math)"], [0, 0, 0, 1])


@pytest.mark.parametrize("over_cap", ["reject", "project"])
@pytest.mark.parametrize("minimum", [2e-4, 0.01, 3e-4, 0.0])
def test_sampled_mixtures_are_exact(over_cap: str, minimum: float) -> None:
    """Sums, caps, steps and distinctness, over seeds and over caps from loose to tight."""
    for seed in range(12):
        target = [2_000_000, 6_000_000, 12_000_000][seed % 3]
        space = build_space(TOKENS, target, max_epochs=4)
        rows = sample_mixtures(space, 30, seed, minimum=minimum, over_cap=over_cap, multiplier=2000)
        assert rows.shape == (30, 4) and np.isfinite(rows).all()
        assert np.abs(rows.sum(axis=1) - 1).max() < 1e-12
        assert np.all(rows <= space.caps + 1e-12) and np.all(rows >= 0)
        if minimum:
            assert rows[rows > 0].min() >= minimum * 0.99
            steps = rows * round(1 / minimum)
            np.testing.assert_allclose(steps, np.rint(steps), atol=1e-8)
        apart = np.abs(rows[:, None] - rows[None]).sum(axis=2) + 9 * np.eye(30)
        assert apart.min() >= 1e-5


def test_sampling_is_seeded_and_grows_without_changing() -> None:
    space = build_space(TOKENS, 4_000_000)
    first = sample_mixtures(space, 40, seed=1)
    np.testing.assert_array_equal(first, sample_mixtures(space, 300, seed=1)[:40])
    assert not np.array_equal(first, sample_mixtures(space, 40, seed=2))


def test_tight_caps_name_the_domain_and_project_is_a_way_out() -> None:
    tokens = {f"d{i}": 1_000_000 for i in range(12)}
    space = build_space(tokens, target_tokens=11_000_000, max_epochs=1)
    with pytest.raises(ValueError, match=r"only 0 of 8 mixtures .* d\d+ \(cap 0\.09091\) \d+%.*over_cap to project"):
        sample_mixtures(space, 8, seed=0)
    rows = sample_mixtures(space, 8, seed=0, over_cap="project", minimum=1e-3)
    assert np.all(rows <= space.caps + 1e-12) and np.abs(rows.sum(axis=1) - 1).max() < 1e-12


def test_ignore_samples_beyond_the_caps() -> None:
    space = build_space(TOKENS, 12_000_000, max_epochs=4)
    assert np.any(sample_mixtures(space, 60, 0, over_cap="ignore") > space.caps)


@pytest.mark.parametrize("wrong", [{"minimum": 1.0}, {"min_strength": 0.0}, {"min_strength": 9.0}, {"n": 0}])
def test_bad_sampling_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="needs n >= 1, 0 <= minimum < 1"):
        sample_mixtures(build_space(TOKENS, 4_000_000), **{"n": 4, "seed": 0, **wrong})


def test_extreme_strengths_stay_finite() -> None:
    centre = np.array([1 - 2e-11, 1e-11, 1e-11])
    rows = draw_mixtures(centre, np.array([1e-3, 1.0, 1e4]), 3000, np.random.default_rng(0))
    assert np.isfinite(rows).all() and np.abs(rows.sum(axis=1) - 1).max() < 1e-9


def test_regmix_defaults_give_regmix_mixtures() -> None:
    """RegMix's own script draws 6.3 non-zero domains, mean largest weight .652 and 49 of 512 at 99 % of one domain."""
    rows = sample_mixtures(pile_space(), 512, seed=42)
    assert np.mean(np.count_nonzero(rows, axis=1)) == pytest.approx(6.3, abs=0.4)
    assert rows.max(axis=1).mean() == pytest.approx(0.652, abs=0.04)
    assert 25 <= np.count_nonzero(rows.max(axis=1) >= 0.99) <= 80
