"""Which slice of a logical tensor a rank holds: said once here, read by initialisation, checkpoints and clipping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.mesh import TensorParallel


@dataclass(frozen=True)
class Shard:
    """How a logical tensor is dealt out: its ``parts`` along ``dim`` are each cut into tp equal pieces.

    A packed tensor has several parts (q, k and v; gate and up), so that a rank gets whole heads of each, and not a
    plain chunk. ``padding`` zero rows after the last part make it divisible; they exist in no checkpoint.
    """

    dim: int
    parts: tuple[int, ...]
    padding: int = 0

    def local_size(self, tp_size: int) -> int:
        """Rows (or columns) that each rank holds, padding included."""
        return (sum(self.parts) + self.padding) // tp_size

    def valid_size(self, tp: TensorParallel) -> int:
        """Of those on this rank, the ones that are not padding."""
        size = self.local_size(tp.size)
        return max(0, min(size, sum(self.parts) - tp.rank * size)) if self.padding else size

    def slice(self, whole: Tensor, tp: TensorParallel) -> Tensor:
        """This rank's piece of the logical tensor."""
        if tp.size == 1:
            return whole
        if self.padding:
            whole = F.pad(whole, (0, 0) * (whole.dim() - 1 - self.dim) + (0, self.padding))
        pieces = [part.chunk(tp.size, self.dim)[tp.rank] for part in whole.split(self._padded(), self.dim)]
        return torch.cat(pieces, self.dim)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The logical tensor from all ranks' pieces, in order; the inverse of ``slice``."""
        if len(pieces) == 1:
            return pieces[0]
        sizes = [part // len(pieces) for part in self._padded()]
        parts = zip(*(piece.split(sizes, self.dim) for piece in pieces), strict=True)
        whole = torch.cat([piece for part in parts for piece in part], self.dim)
        return whole.narrow(self.dim, 0, sum(self.parts))

    def _padded(self) -> list[int]:
        return [*self.parts[:-1], self.parts[-1] + self.padding]


def sharded_parameter(shape: Sequence[int], shard: Shard, tp: TensorParallel) -> nn.Parameter:
    """An empty parameter, this rank's slice of ``shape``, marked as DeepSpeed and Megatron expect."""
    local = list(shape)
    local[shard.dim] = shard.local_size(tp.size)
    param = nn.Parameter(torch.empty(local))
    cast(Any, param).tensor_model_parallel = True
    cast(Any, param).shard = shard
    return param


def shard_of(param: Tensor) -> Shard | None:
    """How a parameter is dealt out over the tensor-parallel ranks; None where each holds all of it."""
    return getattr(param, "shard", None)


def shards_by_name(module: nn.Module) -> dict[str, Shard]:
    """``shard_of`` every parameter that has one."""
    found = ((name, shard_of(param)) for name, param in module.named_parameters())
    return {name: shard for name, shard in found if shard is not None}


def whole_shape(param: Tensor) -> torch.Size:
    """Shape of the logical tensor that a parameter is a slice of."""
    shape, shard = list(param.shape), shard_of(param)
    if shard is not None:
        shape[shard.dim] = sum(shard.parts)
    return torch.Size(shape)


def whole_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Shape of every logical tensor of a module by parameter name."""
    return {name: whole_shape(param) for name, param in module.named_parameters()}


def gather_whole(tensors: Mapping[str, Tensor], module: nn.Module, tp: TensorParallel) -> dict[str, Tensor]:
    """Logical tensors on the CPU of tp rank 0, nothing on the others; every tp rank must call.

    A name is a parameter's, or ends in one after a slash (``exp_avg/<param>``); other names are replicated.
    """
    shards, out = shards_by_name(module), {}
    for name, tensor in tensors.items():
        shard = shards.get(name.rpartition("/")[2])
        tensor, pieces = tensor.detach(), [tensor.detach()]
        if shard is not None and tp.size > 1:
            pieces = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(tp.size)]
            # every rank sends its slice to the group's rank 0
            dist.gather(tensor.contiguous(), pieces if tp.rank == 0 else None, group=tp.group, group_dst=0)
        if tp.rank == 0:
            out[name] = shard.join(pieces).cpu() if shard is not None else tensor.cpu()
    return out


def slice_whole(whole: Tensor, param: Tensor, tp: TensorParallel) -> Tensor:
    """This rank's slice of the logical tensor of ``param``."""
    shard = shard_of(param)
    return whole if shard is None else shard.slice(whole, tp)


def slicer(module: nn.Module, tp: TensorParallel) -> Callable[[str, Tensor], Tensor]:
    """The function (name, logical tensor) -> this rank's slice, by the names of ``gather_whole``."""
    shards = shards_by_name(module)

    def cut(name: str, whole: Tensor) -> Tensor:
        shard = shards.get(name.rpartition("/")[2])
        return whole if shard is None else shard.slice(whole, tp)

    return cut
