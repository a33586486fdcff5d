"""Bounds: what they allow, what contradicts what, and that every mixture made from them obeys them."""

import numpy as np
import pytest

from regmix_search.region import Region, build_region, fixed_domains
from regmix_search.space import Space, build_space, unlimited_space

DOMAINS = ("web", "code", "math", "books")
FREE = unlimited_space(DOMAINS)


def capped(**tokens: int) -> Space:
    """A run of 1,000 tokens, four epochs allowed: cap = 4 * tokens / 1000."""
    return build_space({d: tokens.get(d, 1000) for d in DOMAINS}, 1000, max_epochs=4)


def test_bounds_are_read() -> None:
    bounds = ("web=0.1..0.5", "code=..0.2", "math=0.05", "web+books=0.3..0.8", "code=0.1..")
    region = build_region(capped(web=100), bounds)
    np.testing.assert_allclose(region.low, [0.1, 0.1, 0.05, 0])
    np.testing.assert_allclose(region.high, [0.4, 0.2, 0.05, 1])
    (group,) = region.groups
    assert (group.members.tolist(), group.low, group.high) == ([1, 0, 0, 1], 0.3, 0.8)
    assert fixed_domains(bounds) == ["math"] and not region.is_capped_simplex
    assert build_region(capped(web=100)).is_capped_simplex


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (["wbe=0.1"], "there is no domain 'wbe'. Did you mean 'web'"),
        (["web"], "write NAME=LOW"),
        (["web=a:b"], "write NAME=LOW"),
        (["web=0.1..1.5"], "weights in 0..1"),
        (["web=0.6..0.2"], r"'web=0.6..0.2' contradicts itself: 0.6 is above 0.2"),
        (["web=0.6..", "web=..0.5"], r"each other: web=0.6.. \(at least 0.6\); web=..0.5 \(at most 0.5\); and"),
        (["web=0.6..", "code=..0.2", "math=0.7"], r"each other: web=0.6.. \(at least 0.6\); math=0.7 \(at least 0.7\)"),
        (["web+code=..0.2", "web=0.1..", "code=0.15..", "books=0.1"], r"at most 0.2\); web=0.1.. .*code=0.15.. \(at"),
    ],
)
def test_contradictions_are_named_and_nothing_else(bounds: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build_region(FREE, bounds)
    if "each other" in message:
        assert "books" not in str(error.value)


def test_a_cap_of_epochs_against_a_bound_says_so() -> None:
    with pytest.raises(ValueError, match=r"web's cap of 0.04 \(4 epochs of its text\); web=0.3.. \(at least 0.3\)"):
        build_region(capped(web=10), ["web=0.3..", "code=0.1.."])


def regions(seed: int) -> Region:
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 0.1, 4) * (rng.random(4) < 0.5)
    bounds = [f"{d}={x}.." for d, x in zip(DOMAINS, low, strict=True) if x]
    bounds += [f"web+code={rng.uniform(0.2, 0.4)}..{rng.uniform(0.5, 0.7)}"] if seed % 2 else []
    return build_region(capped(web=int(rng.integers(80, 250)), math=60), bounds)


@pytest.mark.parametrize("seed", range(12))
def test_all_that_is_drawn_or_moved_is_inside(seed: int) -> None:
    region, rng = regions(seed), np.random.default_rng(seed)
    rows = np.vstack([region.sample(50, rng), region.pull_in(rng.dirichlet(np.full(4, 0.3), size=50))])
    assert all(region.holds(row) for row in rows)
    assert np.ptp(rows, axis=0).min() > 0.01, "and they are not all the same"


@pytest.mark.parametrize("seed", range(12))
def test_the_cheapest_corner_is_cheapest(seed: int) -> None:
    region, rng = regions(seed), np.random.default_rng(seed)
    costs = rng.normal(size=4)
    corner = region.cheapest(costs)
    assert region.holds(corner)
    assert costs @ corner <= (region.sample(2000, rng) @ costs).min() + 1e-9


def test_a_mixture_inside_stays_where_it_is() -> None:
    region = build_region(FREE, ["web+code=0.2..0.7", "math=0.1.."])
    row = np.array([0.2, 0.3, 0.15, 0.35])
    np.testing.assert_allclose(region.pull_in(row[None])[0], row, atol=1e-8)


def test_a_mixture_outside_moves_no_farther_than_it_must() -> None:
    region = build_region(FREE, ["web+code=0.2..0.6"])
    moved = region.pull_in(np.array([[0.5, 0.3, 0.1, 0.1]]))[0]
    np.testing.assert_allclose(moved, [0.4, 0.2, 0.2, 0.2], atol=1e-6)


def test_domains_without_runs_are_left_out_where_bounds_allow() -> None:
    sample = np.array([[0.5, 0.5, 0, 0]])
    assert build_region(FREE).known_only(sample).high.tolist() == [1, 1, 0, 0]
    needed = build_region(FREE, ["math=0.1.."])
    assert needed.known_only(sample).high.tolist() == [1, 1, 0.1, 0], "never more of it than must be"
    tight = build_region(capped(web=100, code=100))  # .4 + .4: no mixture without the others
    assert tight.known_only(sample) is tight


def test_caps_can_be_lifted_and_bounds_stay() -> None:
    space = capped(web=100, code=100)
    assert build_region(space, ["code=..0.3"]).lift_caps(space.caps).high.tolist() == [1, 0.3, 1, 1]
