"""Ranks: who I am, which device is mine, and the few collectives that the loop needs. Plain data parallelism so far."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = datetime.timedelta(minutes=10)  # a rank that is silent this long is taken for dead


@dataclass(frozen=True)
class Mesh:
    """The launch as a value: rank, size and device. Size 1 needs no process group and short-circuits every call."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def from_env(cls) -> Mesh:
        """Reads what torchrun or the deepspeed launcher set (RANK, WORLD_SIZE, LOCAL_RANK); starts gloo or NCCL."""
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        return cls(rank, size, device)

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """A new tensor: every rank's ``values`` added up, on every rank."""
        out = values.clone()
        if self.size > 1:
            dist.all_reduce(out)  # every rank sends its values, every rank receives the sum
        return out

    def any(self, flag: bool) -> bool:
        """True on every rank as soon as it is true on one."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item() > 0)

    def from_main(self, value: int) -> int:
        """Rank 0's whole number on every rank (exact: summed as int64, the others send zero)."""
        return int(self.sum(torch.tensor(value if self.is_main else 0, device=self.device)).item())

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Tears the process group down, so that the launcher sees a clean exit."""
        if dist.is_initialized():
            dist.destroy_process_group()
