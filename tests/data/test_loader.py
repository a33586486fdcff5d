"""Batches: the same samples for every layout, checked tokens, honest counts, and a fingerprint that notices changes."""

import os
import re

import numpy as np
import pytest
import torch

from megatron_lite import tally
from megatron_lite.data import native
from megatron_lite.data.evalset import EvalSet
from megatron_lite.data.indexed import IndexedWriter, read_meta, write_meta
from megatron_lite.data.loader import BlendedLoader, TokenizerFacts
from megatron_lite.data.mixture import Mixture

SEQ = 16


@pytest.fixture
def mixture(tmp_path, make_shard, random_lengths):
    make_shard("train_a", random_lengths(400), "uint16", vocab_size=60_000)
    make_shard("train_b", random_lengths(90), "int32", first=30_000, vocab_size=60_000)
    make_shard("train_c", [400], "uint16", first=50_000, vocab_size=60_000)
    make_shard("train_never", [2], "uint16", vocab_size=60_000)
    make_shard("valid_a", [10, 30, 7], "uint16", vocab_size=60_000)
    return Mixture.from_weights({"a": 0.6, "b": 0.3, "c": 0.1, "never": 0}, tmp_path)


def loader(mixture, micro=1, rank=0, size=1, seed=7, **kwargs):
    return BlendedLoader(mixture, SEQ, seed, kwargs.pop("batch", 8), micro, rank, size, **kwargs)


def global_step(loaders, step):
    """All ranks' micro-batches of one step, in global order."""
    ranks = [one.step(step) for one in loaders]
    batches = [rank[m] for m in range(len(ranks[0])) for rank in ranks]
    return [torch.cat([getattr(b, name) for b in batches]) for name in ("tokens_BT", "labels_BT", "domain_B")]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_global_samples_do_not_depend_on_the_layout(mixture, size, micro):
    batch = 8 if micro * size <= 8 else 16
    whole = loader(mixture, batch=batch)
    ranks = [loader(mixture, micro, rank, size, batch=batch) for rank in range(size)]
    steps = [*range(120), 500]
    epochs = [row["epochs"] for row in tally.report(whole, len(steps))["domains"].values() if row["samples"]]
    assert min(epochs) > 1 and max(epochs) > 3
    for step in steps:
        pairs = zip(global_step(ranks, step), global_step([whole], step), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), step


def test_a_batch_is_what_it_says(mixture):
    batches = loader(mixture, micro=2, size=2, rank=1).step(5)
    assert len(batches) == 2
    for batch in batches:
        assert batch.tokens_BT.shape == batch.labels_BT.shape == batch.loss_mask_BT.shape == (2, SEQ)
        assert batch.tokens_BT.dtype == batch.labels_BT.dtype == torch.int32 and batch.domain_B.dtype == torch.int64
        assert batch.loss_mask_BT.dtype == torch.bool and batch.loss_mask_BT.all()
        assert batch.tokens_BT[0, 1].data_ptr() == batch.labels_BT[0, 0].data_ptr()  # stored once
        assert torch.equal(batch.tokens_BT[:, 1:], batch.labels_BT[:, :-1])
    whole = [batch for step in range(50) for batch in loader(mixture, micro=8).step(step)]
    domains, tokens = torch.cat([b.domain_B for b in whole]), torch.cat([b.tokens_BT for b in whole])
    low, high = torch.tensor([0, 30_000, 50_000]), torch.tensor([30_000, 50_000, 60_000])
    assert set(domains.tolist()) == {0, 1, 2}
    assert (tokens >= low[domains, None]).all() and (tokens < high[domains, None]).all()


def test_steps_are_pure_and_follow_the_seed(mixture):
    ours, again = loader(mixture, 8), loader(mixture, 8)
    forward = [ours.step(step)[0].tokens_BT for step in range(40)]
    backward = [again.step(step)[0].tokens_BT for step in reversed(range(40))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(loader(mixture, 8, seed=8).step(0)[0].tokens_BT, forward[0])
    assert not torch.equal(forward[0], forward[1])


def test_numpy_draws_the_same_batches(mixture, monkeypatch):
    ours = loader(mixture, 8).step(3)[0]
    monkeypatch.setenv("MEGATRON_LITE_NATIVE", "0")
    assert native.backend() == "numpy"
    theirs = loader(mixture, 8).step(3)[0]
    assert torch.equal(ours.tokens_BT, theirs.tokens_BT) and torch.equal(ours.domain_B, theirs.domain_B)


def test_realised_counts_and_epochs(mixture):
    ours = loader(mixture, 8)
    drawn = torch.cat([batch.domain_B for step in range(40) for batch in ours.step(step)])
    assert list(ours.realised(320).values()) == torch.bincount(drawn, minlength=4).tolist()
    rows = tally.report(ours, 40)["domains"]
    assert rows["never"]["epochs"] == 0 and rows["c"]["epochs"] == ours.realised(320)["c"] * SEQ / 400
    assert ours.realised(0) == {"a": 0, "b": 0, "c": 0, "never": 0}


def test_an_epoch_of_a_domain_is_seen_once_before_any_of_it_twice(mixture):
    ours = loader(mixture.with_weights({"c": 1}), 8)
    windows = (400 - 1) // SEQ  # 24: three steps
    for epoch in range(3):
        starts = torch.cat([ours.step(3 * epoch + i)[0].tokens_BT[:, 0] for i in range(3)])
        assert len(starts) == windows and sorted(starts.tolist()) == [50_000 + SEQ * i for i in range(windows)]


@pytest.mark.parametrize("sizes", [{"batch": 6, "micro": 4}, {"batch": 8, "micro": 4, "size": 4}])
def test_batch_sizes_must_divide(mixture, sizes):
    with pytest.raises(ValueError, match=r"global_batch_size \d is not a multiple of micro_batch_size 4"):
        loader(mixture, **sizes)


@pytest.mark.parametrize("batch, micro, size", [(0, 1, 1), (8, 0, 1), (8, 1, 0)])
def test_sizes_must_be_positive(mixture, batch, micro, size):
    with pytest.raises(ValueError, match="must be at least 1"):
        loader(mixture, micro, 0, size, batch=batch)


def test_a_domain_too_small_for_one_sample(mixture):
    with pytest.raises(ValueError, match=r"domain 'never' .* has 2 tokens, one sample needs seq_length \+ 1 = 17"):
        loader(mixture.with_weights({"a": 1, "never": 1}))


# -- tokenizers and vocabularies ---------------------------------------------------------------------------------------


def change_meta(prefix, **changes):
    meta = read_meta(prefix)
    write_meta(prefix, type(meta)(**{**meta.__dict__, **changes}))


@pytest.mark.parametrize("name", ["train_b", "train_never", "valid_a"])
@pytest.mark.parametrize("key, value", [("tokenizer_sha256", "cd" * 32), ("vocab_size", 50), ("eod_id", None)])
def test_shards_of_two_tokenizers_are_refused(mixture, tmp_path, name, key, value):
    change_meta(tmp_path / name, **{key: value})
    with pytest.raises(ValueError, match=rf"{name}\.meta\.json says {key} {value!r}, .*train_a\.meta\.json says "):
        loader(mixture)


def test_facts_come_from_the_sidecars_that_are_there(mixture, tmp_path):
    assert loader(mixture).meta == TokenizerFacts(60_000, 0, "ab" * 32)
    (tmp_path / "train_a.meta.json").unlink()
    assert loader(mixture).meta == TokenizerFacts(60_000, 0, "ab" * 32)
    for sidecar in tmp_path.glob("*.meta.json"):
        sidecar.unlink()
    assert loader(mixture).meta == TokenizerFacts(None, None, None)


@pytest.mark.parametrize("backend", ["0", "1"])
def test_a_token_outside_the_vocabulary_names_the_domain(mixture, tmp_path, monkeypatch, backend):
    monkeypatch.setenv("MEGATRON_LITE_NATIVE", backend)
    for sidecar in tmp_path.glob("*.meta.json"):
        change_meta(str(sidecar).removesuffix(".meta.json"), vocab_size=50_100)
    message = r"domain 'c' \(.*train_c\): sample \d+ holds a token outside the vocabulary of 50100"
    with pytest.raises(ValueError, match=message):
        [loader(mixture, 8).step(step) for step in range(40)]
    for sidecar in tmp_path.glob("*.meta.json"):
        sidecar.unlink()
    loader(mixture, 8).step(0)
    with pytest.raises(ValueError, match=message):
        [loader(mixture, 8, vocab_size=50_100).step(step) for step in range(40)]


# -- repetition --------------------------------------------------------------------------------------------------------


def test_max_epochs_is_enforced_with_a_way_out(mixture, tmp_path):
    capped = Mixture.from_weights({"a": 0.6, "b": 0.3, "c": 0.1}, tmp_path, max_epochs={"c": 2})
    tally.check_epochs(loader(capped), 400)  # 0.1 * 400 * 16 = 640 tokens of 400: 1.6 epochs
    with pytest.raises(ValueError) as caught:
        tally.check_epochs(loader(capped), 1000)
    message = str(caught.value)
    for fact in ("train_c has 400 tokens and weight 0.1", "need 4.00 epochs", "max_epochs is 2"):
        assert fact in message
    allowed = float(re.search(r"largest weight allowed is ([0-9.e-]+)", message).group(1))
    assert allowed == 0.05
    tally.check_epochs(loader(capped.with_weights({"a": 0.65, "b": 0.3, "c": allowed})), 1000)
    tally.check_epochs(loader(mixture), 10**9)  # no cap, no error


# -- fingerprint -------------------------------------------------------------------------------------------------------


def test_the_fingerprint_ignores_the_layout_and_notices_everything_else(mixture, tmp_path):
    base = loader(mixture).fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", base)
    assert base == loader(mixture, 2, 1, 2).fingerprint()
    assert base == loader(Mixture.from_weights({"a": 6, "b": 3, "c": 1, "never": 0}, tmp_path)).fingerprint()
    others = [
        loader(mixture, seed=8),
        loader(mixture.with_weights({"a": 1, "b": 1})),
        BlendedLoader(mixture, 8, 7, 8, 1),
        loader(mixture, batch=16),  # quotas are exact at step boundaries, so the batch is part of the order
    ]
    assert len({base, *(other.fingerprint() for other in others)}) == 5
    change_meta(tmp_path / "train_b", bin_xxh3="0")
    assert loader(mixture).fingerprint() != base


def test_the_fingerprint_notices_new_data_without_a_sidecar(mixture, tmp_path):
    (tmp_path / "train_c.meta.json").unlink()
    base = loader(mixture).fingerprint()
    with IndexedWriter(tmp_path / "train_c", "uint16") as writer:
        writer.add_document(range(50_001, 50_401))  # the same size, other tokens
    assert loader(mixture).fingerprint() != base


def test_moving_the_folder_keeps_the_fingerprint(mixture, tmp_path):
    base = loader(mixture).fingerprint()
    os.rename(tmp_path, tmp_path.with_name("moved"))
    moved = Mixture.from_weights({"a": 0.6, "b": 0.3, "c": 0.1, "never": 0}, tmp_path.with_name("moved"))
    assert loader(moved).fingerprint() == base


# -- held-out sets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit, expected", [(None, 46), (46, 46), (1000, 46), (20, 20), (16, 16), (1, 1)])
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_an_eval_set_counts_every_label_once(make_shard, limit, expected, micro):
    shard = make_shard("valid_a", [10, 30, 0, 7], "uint16", first=100, num_bytes=94)
    held_out = EvalSet("a", [shard.prefix], SEQ, limit, micro)
    batches = list(held_out)
    assert held_out.num_tokens == expected and len(held_out) == len(batches) and held_out.bytes_per_token == 2.0
    mask = torch.cat([b.loss_mask_BT for b in batches]).bool()
    tokens, labels = torch.cat([b.tokens_BT for b in batches]), torch.cat([b.labels_BT for b in batches])
    assert tokens.shape == (-(-expected // SEQ), SEQ) and max(len(b.tokens_BT) for b in batches) <= micro
    assert tokens[mask].tolist() == list(range(100, 100 + expected))
    assert labels[mask].tolist() == list(range(101, 101 + expected)) and (labels[~mask] == 0).all()
    assert torch.equal(torch.cat([b.tokens_BT for b in held_out]), tokens)


def test_an_eval_set_over_several_shards_and_scattered_documents(make_shard, tmp_path):
    first, second = make_shard("valid_a", [5, 6], "uint16"), make_shard("valid_b", [4, 3], "int32", first=11)
    raw = bytearray((tmp_path / "valid_b.idx").read_bytes())
    raw[34 + 8 : 34 + 8 + 16] = np.array([8, 16], dtype="<i8").tobytes()  # overlapping, but in bounds
    (tmp_path / "valid_b.idx").write_bytes(raw)
    held_out = EvalSet("a", [first.prefix, second.prefix], 4, None, 8)
    (batch,) = held_out
    stream = [*range(11), 13, 14, 15, 16, 15, 16, 17]
    mask = batch.loss_mask_BT.bool()
    assert batch.tokens_BT[mask].tolist() == stream[:-1] and batch.labels_BT[mask].tolist() == stream[1:]
    assert held_out.num_tokens == 17 and held_out.bytes_per_token is None


def test_eval_sets_refuse_nothing_and_foreign_tokens(make_shard):
    with pytest.raises(ValueError, match=r"validation set 'a' \(.*valid_a\) has 1 tokens"):
        EvalSet("a", [make_shard("valid_a", [1]).prefix], SEQ, None, 1)
    with pytest.raises(ValueError, match=r"validation set 'b' .* tokens from 0 to 39, outside the vocabulary of 39"):
        EvalSet("b", [make_shard("valid_b", [40], vocab_size=39).prefix], SEQ, None, 1)
    with pytest.raises(ValueError, match=rf"tokens from {2**31 - 9} to {2**31}, outside the vocabulary of {2**31}"):
        EvalSet("c", [make_shard("valid_c", [10], "int64", 2**31 - 9).prefix], SEQ, None, 1)
