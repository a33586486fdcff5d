"""Linear layers and the embedding, each rank with its slice: Megatron's, without state outside the arguments.

Shape suffixes: B batch, T sequence, S = T/tp positions of one rank, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.mesh import TensorParallel
from megatron_lite.shape import padded_vocab_size
from megatron_lite.tensor_parallel.collectives import enter_region, leave_region
from megatron_lite.tensor_parallel.shards import Shard, sharded_parameter


class ColumnParallelLinear(nn.Module):
    """y = x W^T, each rank with its rows of W, so with its part of y. ``parts``: the packed outputs, each cut alike."""

    def __init__(self, in_features: int, parts: Sequence[int], tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = sharded_parameter((sum(parts), in_features), Shard(0, tuple(parts)), tp)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] (or [B, S, D]) -> [B, T, out/tp]."""
        return F.linear(enter_region(compute_type(x, self.tp), self.tp), self.weight)


class RowParallelLinear(nn.Module):
    """y = x W^T, each rank with its columns of W and its part of x; the partial products are summed."""

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = sharded_parameter((out_features, in_features), Shard(1, (in_features,)), tp)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, in/tp] -> [B, T, D] (or [B, S, D])."""
        return leave_region(F.linear(x, self.weight), self.tp)


class VocabParallelEmbedding(nn.Module):
    """Each rank looks up the tokens whose rows it holds and adds zeros for the rest; the sum is the embedding."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = sharded_parameter((vocab_size, hidden_size), vocab_shard(vocab_size, tp), tp)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] -> [B, T, D] (or [B, S, D])."""
        if self.tp.size == 1:
            return F.embedding(tokens_BT, self.weight)
        rows = self.weight.shape[0]
        local_BT = tokens_BT - self.tp.rank * rows
        foreign_BT = (local_BT < 0) | (local_BT >= rows)
        x_BTD = F.embedding(local_BT.masked_fill(foreign_BT, 0), self.weight)
        return leave_region(x_BTD.masked_fill(foreign_BT[..., None], 0), self.tp)


class VocabParallelHead(nn.Module):
    """The output head's weight, cut by vocabulary rows like the embedding's, which it may be."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, self.shard = tp, vocab_shard(vocab_size, tp)
        self.weight = sharded_parameter((vocab_size, hidden_size), self.shard, tp)

    @property
    def first_row(self) -> int:
        """Token id of this rank's first row; at most the vocabulary's size, where there are rows of padding alone."""
        return min(self.tp.rank * self.weight.shape[0], self.shard.parts[0])

    @property
    def valid_weight(self) -> Tensor:
        """This rank's rows without padding: what is not multiplied needs no mask, and its gradient is zero."""
        return self.weight[: self.shard.valid_size(self.tp)] if self.shard.padding else self.weight


def vocab_shard(vocab_size: int, tp: TensorParallel) -> Shard:
    """Rows of the vocabulary in equal pieces, padded at the end where tp does not divide them."""
    return Shard(0, (vocab_size,), padded_vocab_size(vocab_size, tp.size) - vocab_size)


def compute_type(x: Tensor, tp: TensorParallel) -> Tensor:
    """Under autocast, x in the type of the matmul that follows, so that collectives send half the bytes."""
    if tp.size > 1 and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
