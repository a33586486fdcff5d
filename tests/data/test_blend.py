"""The blend: quotas within 1.5 samples at every window edge, shuffled inside, and the same for any way of asking."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data.blend import WINDOW, Blend
from megatron_lite.data.native import kernels as default_kernels
from megatron_lite.data.quota import QuotaTree

RNG = np.random.default_rng(0)
FIBONACCI = [1e-9, 1, 1, 1, 2, 3, 5, 8, 13, 21, 34]  # the worst case of a Huffman tree: 1.67
WEIGHTS = {
    "one": [1.0],
    "tiny": [1.0, 1e-9],
    "half and many equal": [0.5] + [0.5 / 999] * 999,  # Webster is off by dozens here
    "equal 1000": [1.0] * 1000,
    "zipf 1000": (1 / np.arange(1, 1001)).tolist(),
    "log-uniform 1000": (10.0 ** RNG.uniform(-9, 0, 1000)).tolist(),
    "fibonacci": FIBONACCI,
    "fibonacci 60": [1e-9, *(((1 + 5**0.5) / 2) ** n for n in range(43))],
    "powers": [2.0**-n for n in range(30)],
    "just below powers": [2.0**-n * (1 - 1e-12) for n in range(30)] + [1e-9] * 30,
    "dirichlet 17": RNG.dirichlet([0.3] * 17).tolist(),
}


def exact(weights):
    total = sum(map(Fraction, weights))
    return [Fraction(weight) / total for weight in weights]


def ratio_sum(weights):
    """Largest sum, over nodes from a leaf to below the root, of leaf weight / node weight: twice the error bound."""
    tree, total = QuotaTree.build(weights), np.zeros(2 * len(weights) - 1)
    total[: len(weights)] = weights
    for node, light, heavy in zip(tree.nodes[::-1], tree.light[::-1], tree.heavy[::-1], strict=True):
        assert total[light] <= total[heavy]
        total[node] = total[light] + total[heavy]
    inverse = np.zeros_like(total)
    for node, light, heavy in zip(tree.nodes, tree.light, tree.heavy, strict=True):
        inverse[[light, heavy]] = inverse[node] + 1 / total[[light, heavy]]
    return float((inverse[: len(weights)] * weights).max())


@pytest.mark.parametrize("name", WEIGHTS)
def test_quotas_are_within_one_and_a_half_of_exact(name, kernels):
    weights = WEIGHTS[name]
    shares, blend = exact(weights), Blend(weights, 0, kernels)
    edges = [*range(20), *(2**p // WINDOW + d for p in (20, 24, 30, 35, 40) for d in (-1, 0, 1, 2))]
    before = None
    for edge in (e * WINDOW for e in edges):
        counts = blend.counts(edge).tolist()
        assert sum(counts) == edge
        worst = max(abs(count - share * edge) for count, share in zip(counts, shares, strict=True))
        assert worst <= Fraction(3, 2), f"{name}: off by {float(worst)} at {edge}"
        assert before is None or all(a <= b for a, b in zip(before, counts, strict=True))
        before = counts


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_tree_bounds_the_error(name):
    assert ratio_sum(WEIGHTS[name]) < 3


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(1e-9, 1) | st.integers(-30, 0).map(lambda p: 2.0**p), min_size=1, max_size=40))
def test_the_tree_bounds_the_error_for_any_weights(weights):
    assert ratio_sum(weights) < 3


def test_counts_follow_the_tree_in_exact_arithmetic(kernels):
    """The recursion again, in fractions, for weights that doubles hold exactly."""
    weights = [1 / 2, 1 / 8, 1 / 8, 1 / 16, 1 / 16, 1 / 32, 3 / 32]
    tree = QuotaTree.build(weights)
    for total in (0, 1, 2, 3, 5, 1024, 12345, 2**40 + 1, 2**45 + 77):
        found = {len(tree.nodes) * 2: total}
        for node, light, heavy, share in zip(tree.nodes, tree.light, tree.heavy, tree.share, strict=True):
            found[light] = math.floor(Fraction(share) * found[node] + Fraction(1, 2))
            found[heavy] = found[node] - found[light]
        assert kernels.counts(tree, np.array([total]))[0].tolist() == [found[i] for i in range(len(weights))]


@pytest.mark.parametrize("window", [1, 8, WINDOW])
@pytest.mark.parametrize("name", ["one", "fibonacci", "dirichlet 17", "zipf 1000"])
def test_draws_do_not_depend_on_how_they_are_cut(name, window, kernels):
    blend = Blend(WEIGHTS[name], 3, kernels, window)
    for origin in (0, 2**40 - 1000):
        domains, ordinals = blend.draw(origin, 3000)
        cuts = [0, 1, 2, 7, 500, 1023, 1024, 1025, 2600, 3000]
        parts = [blend.draw(origin + a, b - a) for a, b in itertools.pairwise(cuts)]
        assert np.array_equal(domains, np.concatenate([p[0] for p in parts]))
        assert np.array_equal(ordinals, np.concatenate([p[1] for p in parts]))
        first = blend.counts(origin)
        for domain in np.unique(domains):  # in order, each once, from where the prefix ended
            mine = ordinals[domains == domain]
            assert np.array_equal(mine, first[domain] + np.arange(len(mine)))
        assert np.array_equal(blend.counts(origin + 3000) - first, np.bincount(domains, minlength=len(first)))


@pytest.mark.parametrize("window", [1, 8, 512])
def test_every_window_edge_is_on_quota(window, kernels):
    """With the global batch as the window, every optimizer step ends within 1.5 samples of the weights."""
    weights = WEIGHTS["dirichlet 17"]
    shares, (domains, _) = exact(weights), Blend(weights, 5, kernels, window).draw(0, 4096)
    counts = np.cumsum(domains[:, None] == np.arange(len(weights)), axis=0)
    for edge in range(window, 4097, window):
        assert max(abs(int(c) - s * edge) for c, s in zip(counts[edge - 1], shares, strict=True)) <= Fraction(3, 2)


def test_zero_weight_is_never_drawn(kernels):
    blend = Blend([0, 0.7, 0, 0.3], 0, kernels)
    assert set(blend.draw(0, 5000)[0].tolist()) == {1, 3}
    assert blend.counts(10**9).tolist()[0::2] == [0, 0]
    without, _ = Blend([0.7, 0.3], 0, kernels).draw(0, 5000)
    assert np.array_equal(blend.draw(0, 5000)[0], np.array([1, 3])[without])


@pytest.mark.parametrize("window", [8, 64, WINDOW])
@pytest.mark.parametrize("weights", [[1.0] * 8, [0.5, 0.25, 0.125, 0.125], [1.0] * 64])
def test_no_data_parallel_rank_sees_a_biased_mixture(weights, window):
    """dp 8, micro-batch 1: total variation distance of each rank's 25,000 samples from the weights, at most 0.03."""
    domains, _ = Blend(weights, 0, default_kernels(), window).draw(0, 200_000)
    target = np.array(weights) / np.sum(weights)
    for rank in range(8):
        mine = domains[rank::8]
        realised = np.bincount(mine, minlength=len(weights)) / len(mine)
        assert np.abs(realised - target).sum() / 2 <= 0.03


def test_a_window_holds_its_quota_and_the_seed_decides_the_order(kernels):
    domains, _ = Blend([1, 1, 2], 0, kernels).draw(0, WINDOW)
    assert np.bincount(domains).tolist() == [256, 256, 512]
    other, _ = Blend([1, 1, 2], 1, kernels).draw(0, WINDOW)
    again, _ = Blend([0.25, 0.25, 0.5], 0, kernels).draw(0, WINDOW)
    second, _ = Blend([1, 1, 2], 0, kernels).draw(WINDOW, WINDOW)
    assert np.array_equal(domains, again)
    assert not np.array_equal(domains, other) and not np.array_equal(domains, second)


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [1, math.nan], [math.inf], [[1, 2]]])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="expected finite numbers >= 0 with a positive sum"):
        Blend(weights, 0, default_kernels())
