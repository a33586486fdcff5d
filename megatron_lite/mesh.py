"""Ranks: who I am, which device is mine, who shares my samples and who shares my layers, and the loop's collectives.

Rank = dp_rank * tp_size + tp_rank, as in Megatron: the ranks that share a layer talk most, so they are neighbours.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.config import ParallelConfig

TIMEOUT = datetime.timedelta(minutes=10)  # a rank that is silent this long is taken for dead


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share every layer, as a value. Size 1 needs no group and short-circuits every collective."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    sequence_parallel: bool = False  # between the layers each rank holds T/size positions; False at size 1


@dataclass(frozen=True)
class Mesh:
    """The launch as a value: rank, size and device, and this rank's place on the grid of dp x tp."""

    rank: int
    size: int
    device: torch.device
    dp_rank: int = 0
    dp_size: int = 1
    tp: TensorParallel = TensorParallel()
    dp_group: dist.ProcessGroup | None = None  # the ranks with my shards and other samples; None: all ranks

    @classmethod
    def from_env(cls, parallel: ParallelConfig | None = None) -> Mesh:
        """Reads what torchrun or the deepspeed launcher set (RANK, WORLD_SIZE, LOCAL_RANK); starts gloo or NCCL.

        Every rank must call it with the same ``parallel``; None means that all ranks are data parallel.
        """
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        tp_size = parallel.tensor_parallel_size if parallel else 1
        dp_size = data_parallel_size(size, tp_size)
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        if parallel is None or tp_size == 1:
            return cls(rank, size, device, rank, size)
        # every rank takes part in the making of every group, its own and the others'
        tp_group, _ = dist.new_subgroups(tp_size, timeout=TIMEOUT)
        columns = [list(range(first, size, tp_size)) for first in range(tp_size)]
        dp_group, _ = dist.new_subgroups_by_enumeration(columns, timeout=TIMEOUT)
        tp = TensorParallel(tp_group, rank % tp_size, tp_size, parallel.sequence_parallel)
        return cls(rank, size, device, rank // tp_size, dp_size, tp, dp_group)

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """A new tensor: ``values`` added up over the data-parallel ranks, so that each sample counts once."""
        out = values.clone()
        if self.dp_size > 1:
            dist.all_reduce(out, group=self.dp_group)  # each sends its values and receives the sum
        return out

    def any(self, flag: bool) -> bool:
        """True on every rank of the launch as soon as it is true on one."""
        return self._sum_world(int(flag)) > 0

    def from_main(self, value: int) -> int:
        """Rank 0's whole number on every rank of the launch (exact: summed as int64, the others send zero)."""
        return self._sum_world(value if self.is_main else 0)

    def barrier(self) -> None:
        """Waits until every rank of the launch is here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Tears the process groups down, so that the launcher sees a clean exit."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _sum_world(self, value: int) -> int:
        if self.size == 1:
            return value
        out = torch.tensor(value, device=self.device)
        dist.all_reduce(out)  # every rank sends its number and receives the sum
        return int(out.item())


class MegatronUnit:
    """A Mesh under the method names of Megatron's ``mpu``, which is what ``deepspeed.initialize(mpu=...)`` reads."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.tp_start = mesh, mesh.rank - mesh.tp.rank

    def get_model_parallel_rank(self) -> int:
        """Place among the ranks that share my layers."""
        return self.mesh.tp.rank

    def get_model_parallel_world_size(self) -> int:
        """How many ranks share my layers."""
        return self.mesh.tp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that share my layers; DeepSpeed reduces over it at any size, so it must exist at size 1."""
        assert self.mesh.tp.group is not None, "tensor_parallel_size 1 needs no mpu"
        return self.mesh.tp.group

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first of them."""
        return self.tp_start

    def get_data_parallel_rank(self) -> int:
        """Place among the ranks that hold my slices."""
        return self.mesh.dp_rank

    def get_data_parallel_world_size(self) -> int:
        """How many ranks hold my slices."""
        return self.mesh.dp_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold my slices."""
        assert self.mesh.dp_group is not None, "tensor_parallel_size 1 needs no mpu"
        return self.mesh.dp_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        return list(range(self.mesh.tp.rank, self.mesh.size, self.mesh.tp.size))

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def data_parallel_size(world_size: int, tp_size: int) -> int:
    """Ranks that are left for data parallelism; ValueError when tp does not divide them."""
    if tp_size < 1 or world_size % tp_size:
        valid = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ValueError(
            f"parallel.tensor_parallel_size={tp_size} does not divide the {world_size} "
            f"rank{'s' * (world_size > 1)} of this launch; valid: {valid}"
        )
    return world_size // tp_size
