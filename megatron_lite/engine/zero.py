"""ZeRO-1: the optimizer's moments cut over the data-parallel ranks (Rajbhandari et al. 2020), with PyTorch alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.config import OptimConfig
from megatron_lite.mesh import Mesh
from megatron_lite.optim import build_optimizer, moments, set_moments
from megatron_lite.tensor_parallel.collectives import all_gather_single

BUCKET = 1 << 26  # elements sent at once: 256 MiB of fp32 on its way, whatever the model's size


class ZeroAdamW:
    """AdamW over slices: rank r updates the r-th piece of every parameter, then all ranks share their pieces.

    Cut by elements, not by parameters (torch's ZeroRedundancyOptimizer): a proxy is one embedding and little else, and
    whoever owned it would own the model. A slice is a view, so the update happens in the parameter itself.
    """

    def __init__(self, module: nn.Module, groups: list[dict[str, Any]], config: OptimConfig, mesh: Mesh) -> None:
        self.group, self.rank, self.size = mesh.dp_group, mesh.dp_rank, mesh.dp_size
        self.module = module
        self.slices = {param: nn.Parameter(self._mine(param.detach())) for param in module.parameters()}
        mine = [{**entry, "params": [self.slices[param] for param in entry["params"]]} for entry in groups]
        self.optimizer = build_optimizer(mine, config)
        self.param_groups = self.optimizer.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """One update; afterwards every rank holds every parameter's new value. Gradients must be reduced by now."""
        for param, piece in self.slices.items():
            piece.grad = None if param.grad is None else self._mine(param.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()  # views of the gradients would keep them
        for bucket in _buckets(self.slices):
            sent = torch.cat([self._padded(self.slices[param].detach(), param) for param in bucket])
            received = sent.new_empty(self.size * len(sent))
            all_gather_single(received, sent, group=self.group)  # each sends its pieces, receives all pieces
            widths = [self._width(param) for param in bucket]
            for param, pieces in zip(bucket, received.view(self.size, -1).split(widths, dim=1), strict=True):
                param.view(-1).copy_(pieces.reshape(-1)[: param.numel()])

    def moments(self) -> dict[str, Tensor]:
        """The logical state, gathered parameter by parameter; every rank must call."""
        out = moments(self.module, self.optimizer, self.slices)
        for name, param in self.module.named_parameters():
            for key in (f"exp_avg/{name}", f"exp_avg_sq/{name}"):
                received = param.new_empty(self.size * self._width(param))
                # each rank sends its piece of this moment and receives the whole
                all_gather_single(received, self._padded(out[key], param), group=self.group)
                out[key] = received[: param.numel()].view(param.shape)
        return out

    def set_moments(self, state: dict[str, Tensor]) -> None:
        """Keeps this rank's pieces of what ``moments`` gave, from any rank count."""
        mine = {key: tensor if key == "step" else self._mine(tensor) for key, tensor in state.items()}
        set_moments(self.module, self.optimizer, mine, self.slices)

    def _width(self, param: Tensor) -> int:
        return -(-param.numel() // self.size)

    def _mine(self, whole: Tensor) -> Tensor:
        start = self.rank * self._width(whole)
        return whole.reshape(-1)[start : start + self._width(whole)]

    def _padded(self, piece: Tensor, param: Tensor) -> Tensor:
        return nn.functional.pad(piece, (0, self._width(param) - piece.numel()))


def _buckets(params: dict[nn.Parameter, nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for param in params:
        if bucket and sum(p.numel() for p in bucket) + param.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(param)
    yield bucket
