"""Who holds which slice: packed tensors by heads and halves, padding nowhere but in memory, a start without ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config import ModelConfig
from megatron_lite.model import GPT
from megatron_lite.shape import padded_vocab_size, resolve_shape
from megatron_lite.tensor_parallel import TensorParallel
from megatron_lite.tensor_parallel.shards import Shard, shard_of, whole_shapes


def ranks(size: int) -> list[TensorParallel]:
    return [TensorParallel(None, rank, size) for rank in range(size)]


@settings(max_examples=50, deadline=None)
@given(
    size=st.sampled_from([1, 2, 3, 4, 8]),
    parts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    missing=st.integers(0, 7),
    dim=st.integers(0, 1),
)
def test_join_undoes_slice_and_every_element_is_held_once(size, parts, missing, dim):
    sizes = [part * size for part in parts]
    padding = min(missing, sizes[-1] - 1)
    shard = Shard(dim, (*sizes[:-1], sizes[-1] - padding), padding)
    shape = [3, 3]
    shape[dim] = sum(shard.parts)
    whole = torch.arange(1.0, 1 + shape[0] * shape[1]).view(shape)
    pieces = [shard.slice(whole, tp) for tp in ranks(size)]
    assert size == 1 or all(piece.shape[dim] == shard.local_size(size) for piece in pieces)
    assert torch.equal(shard.join(pieces), whole)
    held = torch.cat([piece.flatten() for piece in pieces])
    assert torch.equal(held[held > 0].sort().values, whole.flatten()), "each element on one rank, the rest is zeros"


def test_a_model_is_not_built_with_heads_that_ranks_cannot_share():
    shape = resolve_shape(ModelConfig(hidden_size=64, num_heads=8, num_kv_heads=4), 16, 97)
    with pytest.raises(AssertionError, match="4 key/value heads on 8 ranks"):
        GPT(shape, 3, ranks(8)[0])


def test_a_rank_holds_whole_heads_of_each_kind():
    q, k, v = 4, 2, 2  # heads of width 3
    packed = torch.cat([torch.full((3,), i) for i in range(q + k + v)])[:, None]
    shard = Shard(0, (3 * q, 3 * k, 3 * v))
    held = [shard.slice(packed, tp).flatten()[::3].tolist() for tp in ranks(2)]
    assert held == [[0, 1, 4, 6], [2, 3, 5, 7]], "queries 0 and 1 go with key 0 (4) and value 0 (6)"


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_concatenated_shards_are_the_single_process_initialisation(size, tied):
    sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 16, "num_kv_heads": 8, "ffn_hidden_size": 96}
    shape = resolve_shape(ModelConfig(**sizes, vocab_size=97, tie_embeddings=tied), 16, None)
    whole = dict(GPT(shape, seed=3).named_parameters())
    parts = [dict(GPT(shape, 3, tp).named_parameters()) for tp in ranks(size)]
    sharded = 0
    for name, param in whole.items():
        shard = shard_of(parts[0][name])
        pieces = [rank[name].detach() for rank in parts]
        assert torch.equal(shard.join(pieces) if shard else pieces[-1], param), name
        assert (shard is not None) == getattr(pieces[0], "tensor_model_parallel", shard is not None)
        sharded += pieces[0].numel() < param.numel() or "norm" not in name
    assert sharded == len(whole) - 5 and all(
        getattr(p, "tensor_model_parallel", False) for n, p in parts[0].items() if "norm" not in n
    ), "all but the norms"
    assert whole_shapes(GPT(shape, 3, ranks(size)[0])) == {n: p.shape for n, p in whole.items()}


@pytest.mark.parametrize(
    ("vocab_size", "tp_size", "rows"),
    [(97, 1, 97), (50432, 8, 50432), (97, 2, 128), (50257, 2, 50304), (50257, 8, 50688)],
)
def test_a_vocabulary_is_padded_only_where_tp_does_not_divide_it(vocab_size, tp_size, rows):
    assert padded_vocab_size(vocab_size, tp_size) == rows
