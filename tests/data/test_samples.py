"""Samples of a domain: true epochs, whole documents in the stream, and the same answer however one asks."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data import reference
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.indexed_writer import write_index
from megatron_lite.data.samples import DomainSamples


def epoch_stream(domain, epoch):
    """Put an epoch's windows back into one stream by their shared tokens; token ids must be unique."""
    n = domain.samples_per_epoch
    rows = domain.gather(np.arange(epoch * n, (epoch + 1) * n))
    after = {int(row[0]): row for row in rows}
    assert len(after) == n, "a window was drawn twice in one epoch"
    heads = set(after) - {int(row[-1]) for row in rows}
    assert len(heads) == 1
    row = after.pop(heads.pop())
    stream = [row]
    while int(row[-1]) in after:
        row = after.pop(int(row[-1]))
        stream.append(row[1:])
    assert not after
    return np.concatenate(stream)


@pytest.fixture
def shards(make_shard, random_lengths):
    first = make_shard("a", random_lengths(700), "int32")
    return [first, make_shard("b", random_lengths(300), "int32", first.num_tokens)]


def documents_of(shards):
    return {int(shard[i][0]): shard[i] for shard in shards for i in range(len(shard)) if len(shard[i])}


def test_an_epoch_is_every_window_of_whole_documents_once(shards, kernels):
    domain = DomainSamples(shards, 32, 0, "d", kernels=kernels)
    assert domain.num_tokens == sum(s.num_tokens for s in shards)
    assert domain.samples_per_epoch == (domain.num_tokens - 1) // 32
    documents = documents_of(shards)
    streams = [epoch_stream(domain, epoch) for epoch in (0, 1, 5)]
    for stream in streams:
        assert len(stream) == 32 * domain.samples_per_epoch + 1 == len(set(stream.tolist()))
        at = 0
        while at < len(stream):
            document = documents[int(stream[at])]
            assert np.array_equal(stream[at : at + len(document)], document[: len(stream) - at])
            at += len(document)
    assert not np.array_equal(streams[0], streams[1]) and not np.array_equal(streams[1], streams[2])


def test_documents_and_windows_are_mixed(shards, kernels):
    domain = DomainSamples(shards, 32, 0, "d", kernels=kernels)
    starts = domain.gather(np.arange(domain.samples_per_epoch))[:, 0]
    assert abs(np.corrcoef(starts[:-1], starts[1:])[0, 1]) < 4 / np.sqrt(len(starts))
    assert abs(np.corrcoef(starts, np.arange(len(starts)))[0, 1]) < 4 / np.sqrt(len(starts))
    stream = epoch_stream(domain, 0)
    assert np.mean(np.diff(stream) == 1) < 1 - 0.8 * len(documents_of(shards)) / len(stream)


def test_samples_are_a_pure_function_of_seed_name_and_ordinal(shards, kernels):
    domain = DomainSamples(shards, 128, 0, "d", kernels=kernels)
    n = 3 * domain.samples_per_epoch
    whole = domain.gather(np.arange(n))
    fresh = DomainSamples(shards, 128, 0, "d", kernels=kernels)
    order = np.random.default_rng(0).permutation(n)
    assert np.array_equal(fresh.gather(order), whole[order])
    assert np.array_equal(fresh.gather(np.array([n - 1, 0])), whole[[n - 1, 0]])
    assert fresh.gather(np.array([], dtype=np.int64)).shape == (0, 129)
    for seed, name in ((1, "d"), (0, "e")):
        other = DomainSamples(shards, 128, seed, name, kernels=kernels).gather(np.arange(n))
        assert not np.array_equal(other, whole)
    assert not np.array_equal(whole[: n // 3], whole[n // 3 : 2 * n // 3])


def test_ordinals_far_beyond_the_first_epochs(make_shard, kernels):
    domain = DomainSamples([make_shard("a", [5, 6])], 4, 0, "d", kernels=kernels)
    rows = domain.gather(np.array([2**40, 2**40 + 1]))
    assert domain.samples_per_epoch == 2 and sorted(set(rows.ravel().tolist()) - set(range(11))) == []
    assert np.array_equal(np.sort(rows[:, 0]), np.sort([rows[0, 0], rows[1, 0]])) and rows[0, 0] != rows[1, 0]


def test_the_smallest_domain(make_shard, kernels):
    domain = DomainSamples([make_shard("a", [0, 2, 3, 0])], 4, 0, "d", kernels=kernels)
    rows = domain.gather(np.arange(6))
    assert {tuple(row) for row in rows.tolist()} == {(0, 1, 2, 3, 4), (2, 3, 4, 0, 1)}


def test_too_few_tokens_or_floats_are_refused(make_shard):
    with pytest.raises(ValueError, match=r"domain 'd' \(.*/a\) has 4 tokens, one sample needs seq_length \+ 1 = 5"):
        DomainSamples([make_shard("a", [4])], 4, 0, "d", reference)
    with pytest.raises(ValueError, match=r"holds float32; tokens are integers"):
        DomainSamples([make_shard("f", [40], "float32")], 4, 0, "d", reference)


def write_sentences(tmp_path, pointers=None):
    np.arange(100, dtype="<i4").tofile(tmp_path / "s.bin")
    lengths, indices = np.full(20, 5, np.int32), np.array([0, 3, 3, 10, 11, 20, 20])
    write_index(str(tmp_path / "s.idx"), np.dtype("<i4"), lengths, indices)
    if pointers is not None:
        raw = bytearray((tmp_path / "s.idx").read_bytes())
        raw[34 + 80 : 34 + 240] = np.asarray(pointers, dtype="<i8").tobytes()
        (tmp_path / "s.idx").write_bytes(raw)
    return IndexedDataset(tmp_path / "s")


def test_sentences_of_a_document_stay_together(tmp_path, kernels):
    domain = DomainSamples([write_sentences(tmp_path)], 3, 0, "d", kernels=kernels)
    breaks = {15, 50, 55, 0}  # first tokens of the documents with any tokens
    for epoch in range(5):
        stream = epoch_stream(domain, epoch)
        assert all(after in breaks for before, after in itertools.pairwise(stream) if after != before + 1)


def test_scattered_sentences_are_refused(tmp_path):
    pointers = np.repeat(np.arange(10), 2) * 40  # each pair of sentences overlaps
    with pytest.raises(ValueError, match="sentences of a document are not end to end"):
        DomainSamples([write_sentences(tmp_path, pointers)], 3, 0, "d", reference)


def test_multimodal_shards_are_refused_by_name(make_shard, kernels):
    """Modes are not flagged in the file; its size gives them away. All 0 is text."""
    path = Path(make_shard("m", [20, 20, 20]).prefix + ".idx")
    index = path.read_bytes()
    path.write_bytes(index + bytes([0, 0, 0]))
    assert DomainSamples([IndexedDataset(path)], 4, 0, "d", kernels).samples_per_epoch == 14
    path.write_bytes(index + bytes([0, 1, 0]))
    for order in ("documents", "contiguous"):
        with pytest.raises(ValueError, match=r"domain 'd' \(.*/m\): .*/m\.idx holds modes.* it is multimodal"):
            DomainSamples([IndexedDataset(path)], 4, 0, "d", kernels, order)
