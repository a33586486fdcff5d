"""The next step's batch, drawn by one thread while the model computes: C++ draws it without the interpreter's lock."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from megatron_lite.data.batch import Batch
from megatron_lite.data.loader import BlendedLoader
from megatron_lite.data.stages import Stage

CPU = torch.device("cpu")


class Prefetch:
    """`loader.step` one step ahead, the same batches: `step(s)` gives step s, and begins s + 1 if that is below `end`.

    What was drawn ahead is dropped when another step is asked for, or the loader's stages changed. An error comes out
    of the `step` that asks for that batch. With a GPU as `device` batches are in pinned memory, which the GPU
    reads by itself. The thread lives as long as the `with` block.
    """

    def __init__(self, loader: BlendedLoader, end: int, device: torch.device = CPU) -> None:
        self.loader, self.end, self.pinned = loader, end, device.type == "cuda"
        start = (torch.cuda.set_device, (device,)) if self.pinned else (None, ())  # a thread's own device, or it is 0
        self._thread = ThreadPoolExecutor(1, "prefetch", *start)
        self._ahead: tuple[int, tuple[Stage, ...], Future[list[Batch]]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of global step `step`."""
        ahead, self._ahead = self._ahead, None
        known = ahead and ahead[0] == step and ahead[1] is self.loader.stages
        batches = ahead[2].result() if ahead and known else self._draw(step)
        if step + 1 < self.end:
            self._ahead = (step + 1, self.loader.stages, self._thread.submit(self._draw, step + 1))
        return batches

    def _draw(self, step: int) -> list[Batch]:
        batches = self.loader.step(step)
        return [pin(batch) for batch in batches] if self.pinned else batches


def pin(batch: Batch) -> Batch:
    """The batch with every tensor in pinned memory; a number that stands for a whole mask is written out."""
    found = [(field.name, getattr(batch, field.name)) for field in fields(batch)]
    pinned: dict[str, Any] = {name: x.contiguous().pin_memory() for name, x in found if isinstance(x, Tensor)}
    return replace(batch, **pinned)
