"""The C++ and the numpy kernels are the same functions, and which one runs is known."""

import numpy as np
import pytest

from megatron_lite.data import keys, native, reference
from megatron_lite.data.quota import QuotaTree
from megatron_lite.data.samples import DomainSamples

BOTH = pytest.mark.skipif(native.library() is None, reason="the library is not built: nothing to compare")


@BOTH
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 17, 255, 256, 1000, 1024, 99991])
def test_permutations_are_equal_and_complete(size):
    index = np.arange(size)
    for key in (0, 1, 2**63 + 12345, 2**64 - 1):
        ours = native.permute(index, size, key)
        assert np.array_equal(ours, reference.permute(index, size, key))
        assert np.array_equal(np.sort(ours), index)


@BOTH
def test_permutations_of_huge_ranges_are_equal():
    rng = np.random.default_rng(0)
    for size in (2**31 - 1, 2**32 + 5, 2**40 + 1, 2**52):
        index = rng.integers(0, size, 1000)
        ours = native.permute(index, size, 77)
        assert np.array_equal(ours, reference.permute(index, size, 77)) and ours.min() >= 0 and ours.max() < size


@pytest.mark.parametrize("size", [5, 64, 1000])
def test_permutations_look_random(kernels, size):
    """Where two neighbours land, over many keys: chi-square of the first and of their distance, within 4 sigma."""
    landed = np.array([kernels.permute(np.array([0, 1]), size, keys.mix64(1, key)) for key in range(4000)])
    distance = (landed[:, 1] - landed[:, 0]) % size
    for values, cells in ((landed[:, 0], size), (distance - 1, size - 1)):
        expected = len(values) / cells
        chi2 = (np.square(np.bincount(values, minlength=cells) - expected) / expected).sum()
        assert abs(chi2 - (cells - 1)) < 4 * np.sqrt(2 * (cells - 1))
    assert abs(np.corrcoef(landed.T)[0, 1] + 1 / (size - 1)) < 4 / np.sqrt(4000)


@BOTH
@pytest.mark.parametrize("k", [1, 2, 3, 17, 100, 1000])
def test_quotas_and_draws_are_equal(k):
    weights = np.random.default_rng(k).lognormal(0, 3, k)
    tree = QuotaTree.build(weights.tolist())
    totals = np.array([0, 1, 1024, 99_999, 2**40, 2**48])
    assert np.array_equal(native.counts(tree, totals), reference.counts(tree, totals))
    for start, count, window in ((0, 0, 1024), (0, 1, 1), (5, 3000, 1024), (1023, 2, 1024), (2**40 - 7, 500, 24)):
        both = native.draw(tree, 9, start, count, window), reference.draw(tree, 9, start, count, window)
        for ours, theirs in zip(*both, strict=True):
            assert np.array_equal(ours, theirs) and ours.dtype == theirs.dtype


@BOTH
@pytest.mark.parametrize("blocks", [1, 2, 999])
def test_prefix_sums_are_equal(blocks):
    tokens = np.random.default_rng(0).integers(0, 1000, blocks)
    ours = native.block_prefix(tokens, 5)
    assert np.array_equal(ours, reference.block_prefix(tokens, 5)) and ours[0] == 0 and ours[-1] == tokens.sum()


@BOTH
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "int64"])
def test_gathers_are_equal_for_every_dtype(make_shard, random_lengths, dtype):
    lengths = [7, 0, 3, 30, 1, 9] if dtype in ("uint8", "int8") else random_lengths(700)
    datasets = [make_shard("a", lengths, dtype)]
    ours, theirs = (DomainSamples(datasets, 11, 3, "d", kernels=kernels) for kernels in (native, reference))
    ordinals = np.random.default_rng(1).integers(0, 5 * ours.samples_per_epoch, 100)
    assert np.array_equal(ours.gather(ordinals), theirs.gather(ordinals))


@BOTH
def test_gathers_are_equal_over_several_domains_and_shards(make_shard, random_lengths):
    shards = [make_shard("a", random_lengths(600), "uint16"), make_shard("b", random_lengths(300), "int32", 70_000)]
    empty = make_shard("c", [], "uint16")
    domains = [
        [DomainSamples(datasets, 16, 3, name, kernels=kernels) for name, datasets in named]
        for named in [[("both", [shards[0], empty, shards[1]]), ("one", [shards[1]])]]
        for kernels in (native, reference)
    ]
    rng = np.random.default_rng(1)
    which, ordinals = rng.integers(0, 2, 64).astype(np.int32), rng.integers(0, 5000, 64)
    results = []
    for kernels, sources in zip((native, reference), domains, strict=True):
        rows = kernels.Gather(sources, vocab_size=200_000).rows(which, ordinals)
        assert np.array_equal(rows.tokens[:, 1:], rows.labels[:, :-1])
        results.append((rows.tokens, rows.labels))
    assert np.array_equal(results[0], results[1])


def test_gather_names_the_first_row_outside_the_vocabulary(make_shard, kernels):
    domain = DomainSamples([make_shard("a", [100], "uint16")], 10, 0, "d", kernels=kernels)
    ordinals = np.arange(domain.samples_per_epoch)
    highest = domain.gather(ordinals).max(axis=1)
    limit = int(np.sort(highest)[-3])  # two windows reach past it
    first = np.flatnonzero(highest > limit)[0]
    gather = kernels.Gather([domain], vocab_size=limit + 1)
    with pytest.raises(ValueError, match=rf"sample {first} holds a token outside the vocabulary of {limit + 1}.*/a, "):
        gather.rows(np.zeros(len(ordinals), np.int64), ordinals)
    gather.rows(np.zeros(first, np.int64), ordinals[:first])


@pytest.mark.parametrize(("dtype", "first"), [("int32", -3), ("int64", 2**31 - 40)])
def test_tokens_that_are_negative_or_need_more_than_31_bits_are_refused(make_shard, kernels, dtype, first):
    domain = DomainSamples([make_shard("a", [50], dtype, first=first)], 10, 0, "d", kernels=kernels)
    with pytest.raises(ValueError, match=r"'d' .*sample [0-9]+ holds a token below 0 or from 2.31 on.*document 0"):
        domain.gather(np.arange(domain.samples_per_epoch))


def test_the_backend_can_be_asked_and_forced(monkeypatch):
    monkeypatch.setenv("MEGATRON_LITE_NATIVE", "0")
    assert native.backend() == "numpy" and native.kernels() is reference
    monkeypatch.setenv("MEGATRON_LITE_NATIVE", "1")
    assert native.backend() == ("numpy" if native.library() is None else "c++")


@BOTH
def test_a_stale_library_is_refused_with_a_warning(monkeypatch):
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    with pytest.warns(UserWarning, match="is not usable .*numpy is used"):
        assert native.library.__wrapped__() is None


def test_keys_do_not_depend_on_the_process():
    """If these change, every run draws in another order. mix64's are splitmix64's published values for seed 0."""
    assert keys.key_of(0, "blend") == 1142395463468156093
    assert [keys.mix64(0, value) for value in (0, 1)] == [16294208416658607535, 7960286522194355700]
    assert reference.permute(np.arange(8), 8, 1).tolist() == [3, 4, 2, 1, 6, 7, 0, 5]
