"""Rows of a batch: both kernels fill them alike, in every order and with every mark, and stay inside the .bin."""

import contextlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data import native, reference
from megatron_lite.data.batch import DocumentOptions
from megatron_lite.data.blend import Blend
from megatron_lite.data.megatron_order import build_indices
from megatron_lite.data.samples import BLOCK, DomainSamples
from megatron_lite.data.sidecar import count_blocks

BOTH = pytest.mark.skipif(native.library() is None, reason="the library is not built: nothing to compare")
EOD, VOCAB = 3, 100
ORDERS = ["documents", "contiguous", "megatron"]
NAMES = ("tokens", "labels", "domain", "ordinal", "loss_mask", "position_ids")
DOCUMENTS = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 300)), min_size=1, max_size=2 * BLOCK + 9)
FLAGS = st.tuples(*[st.booleans()] * 3)


def shard_of(lengths, dtype="uint16", seed=0, name="shard"):
    """What an IndexedDataset gives, in arrays of its own: a sanitizer sees each byte that is read past them."""
    lengths = np.asarray(lengths, dtype=np.int32)
    tokens = np.random.default_rng(seed).integers(0, 12, lengths.sum()).astype(dtype)
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * tokens.itemsize
    return SimpleNamespace(
        prefix=name,
        dtype=tokens.dtype,
        tokens=tokens,
        lengths=lengths,
        pointers=pointers,
        num_tokens=len(tokens),
        modes=None,
        contiguous=True,
        sequences_are_documents=True,
        block_tokens=count_blocks(lengths),
    )


def domain_of(shards, seq_length, order, kernels, name="d"):
    indices = None
    if order == "megatron":
        indices = build_indices([shard.lengths for shard in shards], None, seq_length, 5, kernels)
    return DomainSamples(shards, seq_length, 1, name, kernels, order, indices)


def count_of(domain):
    """Samples that may be asked for: three epochs, or what Megatron's indices hold."""
    return 3 * domain.samples_per_epoch if domain.indices is None else len(domain.indices[2])


def same(ours, theirs):
    for name in NAMES:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and np.array_equal(a, b)), name
    assert ours.max_seqlen == theirs.max_seqlen and (ours.cu_seqlens is None) == (theirs.cu_seqlens is None)
    for a, b in zip(ours.cu_seqlens or [], theirs.cu_seqlens or [], strict=True):
        assert a.dtype == b.dtype == np.int32 and np.array_equal(a, b)


# -- both kernels ------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(DOCUMENTS, min_size=1, max_size=3),
    dtype=st.sampled_from(["uint8", "int8", "int16", "uint16", "int32", "int64"]),
    seq_length=st.integers(1, 70),
    micro=st.integers(1, 3),
    flags=FLAGS,
)
def test_rows_are_equal_for_every_order_and_mark(order, documents, dtype, seq_length, micro, flags):
    shards = [shard_of(lengths, dtype, i) for i, lengths in enumerate(documents)]
    if sum(shard.num_tokens for shard in shards) <= seq_length:
        return
    options, results = DocumentOptions(EOD, *flags), []
    for kernels in (native, reference):
        domain = domain_of(shards, seq_length, order, kernels)
        ordinals = np.random.default_rng(0).integers(0, count_of(domain), 4 * micro)
        gather = kernels.Gather([None, domain], micro, options, VOCAB)
        results.append(gather.rows(np.ones(4 * micro, dtype=np.int64), ordinals))
    same(*results)
    assert np.array_equal(results[0].tokens[:, 1:], results[0].labels[:, :-1])


@BOTH
@pytest.mark.parametrize("seq_length", [255, 256, 257, 700])
def test_marks_are_equal_where_documents_end_at_the_edges_of_strides(seq_length):
    shard = shard_of([50 * seq_length])
    shard.tokens[:] %= EOD + 1  # a quarter is EOD
    domain, call = domain_of([shard], seq_length, "contiguous", native), (np.zeros(48, np.int64), np.arange(48))
    for flags in itertools.product([False, True], repeat=3):
        options = DocumentOptions(EOD, *flags)
        same(*(kernels.Gather([domain], 3, options).rows(*call) for kernels in (native, reference)))


@BOTH
@pytest.mark.parametrize("order", ORDERS[:2])
@pytest.mark.parametrize("window", [12, 24])
def test_one_call_draws_and_gathers_what_two_would(order, window):
    shards, micro = [shard_of([30] * 400), shard_of([50] * 90, "int32", 1)], 2
    mine = np.arange(12).reshape(3, 2, 2)[:, 1].reshape(-1)
    first, options = np.array([3, 0, 10**6]), DocumentOptions(EOD, True, True, True)
    results = []
    for kernels in (native, reference):
        domains = [domain_of([shards[0]], 16, order, kernels), None, domain_of([shards[1]], 16, order, kernels, "e")]
        gather, blend = kernels.Gather(domains, micro, options, VOCAB), Blend([0.7, 0, 0.3], 0, kernels, window)
        for start in (0, 12, 1200, 12):
            domain, ordinal = blend.draw(start, 12)
            results.append(gather.step(blend, first, start, 12, mine))
            same(results[-1], gather.rows(domain[mine], (first[domain] + ordinal)[mine]))
    for ours, theirs in zip(results[:4], results[4:], strict=True):
        same(ours, theirs)


@BOTH
def test_a_window_too_large_for_tables_is_drawn_alike():
    for size in (256 * 256, 256 * 256 + 1):
        ours, theirs = (Blend([0.9, 0.1], 0, kernels, size).draw(size - 40, 80) for kernels in (native, reference))
        assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])


@BOTH
def test_memory_is_used_again_but_never_while_somebody_holds_it():
    domain = domain_of([shard_of([30] * 400)], 16, "contiguous", native)
    gather, blend, first = (
        native.Gather([domain], 4, DocumentOptions(EOD, True, True, True)),
        Blend([1], 0, native),
        [0],
    )
    first, mine = np.array(first), np.arange(8)
    held, addresses = [], set()
    for step in range(30):
        batch = gather.step(blend, first, 8 * step, 8, mine).split(4)[1]
        addresses.add(batch.tokens_BT.data_ptr())
        parts = [batch.labels_BT[1:, 3:5], batch.loss_mask_BT, batch.position_ids_BT, batch.cu_seqlens, batch.domain_B]
        part = parts[step % 5]  # one small view keeps the whole batch from being written over
        if step % 3 == 0:
            held.append((part, part.clone()))
        del batch, parts, part
    assert all(torch.equal(part, copy) for part, copy in held) and len(held) == 10
    del held
    assert 8 < len(addresses) < 30  # ten are held; the others share


# -- contiguous --------------------------------------------------------------------------------------------------------


def test_contiguous_epochs_are_true_and_cut_at_other_places(kernels):
    shards = [shard_of([7] * 30), shard_of([]), shard_of([5] * 29), shard_of([])]
    total, first = 7 * 30 + 5 * 29, 0
    for shard in shards:  # every token is its own place in the ring
        shard.tokens = (first + np.arange(shard.num_tokens)).astype(np.int16)
        first += shard.num_tokens
    domain = domain_of(shards, 16, "contiguous", kernels)
    windows, phases = (total - 1) // 16, set()
    for epoch in range(12):
        rows = domain.gather(np.arange(epoch * windows, (epoch + 1) * windows))
        assert (np.diff(rows, axis=1) % total == 1).all()
        assert len(np.unique(rows[:, 1:])) == 16 * windows  # no label twice in an epoch
        assert not np.array_equal(np.sort(rows[:, 0]), rows[:, 0])
        phases.add(int(rows[0, 0]) % 16)
    assert len(phases) > 6


def test_contiguous_asks_for_documents_end_to_end(kernels):
    shard = shard_of([50, 60])
    shard.contiguous = False
    with pytest.raises(ValueError, match=r"domain 'd' \(shard\).*not end to end.*data.sample_order=contiguous"):
        domain_of([shard], 8, "contiguous", kernels)


# -- documents to the model, as Megatron-Core has them -----------------------------------------------------------------


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)))
def test_marks_are_megatrons(kernels, flags):
    gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="megatron-core is not installed")
    position, attention, eod_loss = flags
    shard = shard_of(np.random.default_rng(0).integers(1, 40, 300))
    shard.tokens[1000:1300] = EOD
    domain = domain_of([shard], 64, "contiguous", kernels)
    count = domain.samples_per_epoch // 4 * 4
    rows = kernels.Gather([domain], 4, DocumentOptions(EOD, *flags)).rows(np.zeros(count, np.int64), np.arange(count))
    ends = rows.tokens == EOD
    assert ends.all(axis=1).any() and (ends[:, 0] & ~ends[:, -1]).any() and (ends[:, -1] & ~ends[:, 0]).any()
    for i, row in enumerate(rows.tokens):
        mask, loss, place = gpt._get_ltor_masks_and_position_ids(
            torch.from_numpy(row), EOD, position, attention, eod_loss, True
        )
        assert torch.equal(loss, torch.ones(64) if rows.loss_mask is None else torch.from_numpy(rows.loss_mask[i]))
        ours = torch.arange(64) if rows.position_ids is None else torch.from_numpy(rows.position_ids[i])
        assert torch.equal(place, ours)
        assert torch.equal(mask[0], ~allowed(rows.cu_seqlens, i, 64, 4))


def allowed(cu_seqlens, row, seq_length, micro):
    """Which keys a query sees, out of cu_seqlens of the row's micro-batch."""
    causal = torch.ones(seq_length, seq_length).tril().bool()
    if cu_seqlens is None:
        return causal
    cu, first = cu_seqlens[row // micro], row % micro * seq_length
    assert cu[0] == 0 and cu[-1] == micro * seq_length and (np.diff(cu) > 0).all()
    assert set(range(0, micro * seq_length, seq_length)) <= set(cu.tolist())
    piece = torch.from_numpy(np.searchsorted(cu, np.arange(first, first + seq_length), side="right"))
    return causal & (piece[:, None] == piece[None, :])


def test_options_without_an_eod_id_say_what_to_do():
    with pytest.raises(ValueError, match=r"data\.reset_attention_mask needs the EOD id.*--append-eod"):
        DocumentOptions(None, reset_attention_mask=True)


# -- safety ------------------------------------------------------------------------------------------------------------

ODD = [-(2**63), -8, -2, -1, 1, 2**31, 2**62, 2**63 - 2, 2**63 - 1]


@pytest.mark.parametrize("order", ["documents", "megatron"])
@pytest.mark.parametrize("pointer", ODD)
def test_a_pointer_out_of_the_bin_names_domain_shard_and_document(kernels, order, pointer):
    shards = [shard_of([40] * 20, name="good"), shard_of([40] * 20, "int32", name="bad")]
    domain = domain_of(shards, 16, order, kernels)
    shards[1].pointers[7] = pointer
    with pytest.raises(ValueError, match=r"domain 'd' \(good, bad\): sample \d+: bad, document 7 does not lie inside"):
        domain.gather(np.arange(domain.samples_per_epoch))


@pytest.mark.parametrize("length", [-(2**31), -1, 10**6, 2**31 - 1])
def test_a_length_out_of_the_bin_names_the_document(kernels, length):
    shard = shard_of([40] * 20)
    domain = domain_of([shard], 16, "documents", kernels)
    shard.lengths[7] = length
    with pytest.raises(ValueError, match=r"sample \d+: shard, document 7 does not lie inside its \.bin"):
        domain.gather(np.arange(domain.samples_per_epoch))


def test_block_sums_that_are_not_the_indexs_are_noticed(kernels):
    domain = domain_of([shard_of([40] * (3 * BLOCK))], 16, "documents", kernels)
    for shard in domain.shards:
        shard.lengths[: 2 * BLOCK] = 1
    with pytest.raises(ValueError, match=r"the \.idx of shard changed, or is not what its sidecar says"):
        domain.gather(np.arange(domain.samples_per_epoch))
    domain = domain_of([shard_of([40] * 300)], 16, "documents", kernels)
    domain.block_tokens = np.append(domain.block_tokens, 10**6)  # a block that is not there
    domain.num_blocks, domain.samples_per_epoch = 3, 60_000
    with pytest.raises(ValueError, match="changed, or is not what its sidecar says"):
        domain.gather(np.arange(domain.samples_per_epoch))


@pytest.mark.parametrize("kernel", [pytest.param(native, marks=BOTH), reference], ids=["c++", "numpy"])
@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(["uint8", "uint16", "int32", "int64"]))
def test_no_index_reads_out_of_its_bin(kernel, order, data, dtype):
    """Anything at all in .idx and in Megatron's indices ends in a ValueError or in tokens of the .bin."""
    shard = shard_of(data.draw(st.lists(st.integers(0, 20), min_size=30, max_size=300)), dtype)
    if shard.num_tokens <= 8:
        return
    domain = domain_of([shard], 8, order, kernel)
    damaged = [shard.lengths, shard.pointers, *(() if domain.indices is None else domain.indices)]
    for array in data.draw(st.lists(st.sampled_from(damaged), min_size=1, max_size=4)):
        flat, info = array.reshape(-1), np.iinfo(array.dtype)
        value = data.draw(st.one_of(st.integers(info.min, info.max), st.sampled_from(ODD), st.integers(-9, 400)))
        flat[data.draw(st.integers(0, len(flat) - 1))] = np.clip(value, info.min, info.max)
    for ordinal in range(count_of(domain)):
        with contextlib.suppress(ValueError):
            assert set(domain.gather(np.array([ordinal])).ravel().tolist()) <= set(range(12))
