"""The engine owns gradients: precision, accumulation, reduction, clipping, optimizer state. The loop owns time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_lite.attention import choose_attention
from megatron_lite.config import Config, OptimConfig
from megatron_lite.data.loader import Batch
from megatron_lite.mesh import Mesh
from megatron_lite.model import GPT
from megatron_lite.optim import MOMENTS, adamw_name, is_hidden
from megatron_lite.plan import Plan
from megatron_lite.tensor_parallel.shards import whole_shape


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did: the global gradient norm before clipping, and whether the update was left out."""

    grad_norm: float
    skipped: bool = False


class Engine(Protocol):
    """The seam between the loop and what moves gradients."""

    module: GPT  # plain parameters by their own names, for weights at rest
    forward: nn.Module  # what evaluation calls: (tokens, labels) -> per-token losses
    autocast: torch.autocast  # the compute type

    def forward_backward(
        self, micro_batches: Sequence[Batch], num_loss_tokens: float, by_domain: Tensor | None = None
    ) -> Tensor:
        """Accumulates gradients of sum(loss * mask * weight) / num_loss_tokens (the global count); returns the sum.

        ``by_domain`` [3, domains], fp64 on the model's device: what ``add_by_domain`` says is added.
        """

    def step(self, lr: float) -> StepStats:
        """Clips, updates at ``lr`` and zeroes gradients; an update with a non-finite norm is left out."""

    def state_dict(self) -> dict[str, Tensor]:
        """Optimizer state: step, exp_avg/<param>, exp_avg_sq/<param>; every rank must call.

        Tensors have the shape of ``module``'s parameters, whatever the data-parallel ranks share: the loop joins the
        slices of tensor-parallel ranks.
        """

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what state_dict gave, from any engine and any rank count."""

    def close(self) -> None:
        """Ends training: lets go of the process groups, before Mesh.close destroys them."""


def add_by_domain(by_domain: Tensor, batch: Batch, losses_BT: Tensor) -> None:
    """Adds each domain's loss in nats, its tokens, and its excess over ``reference_BT``, clipped at 0 by token."""
    mask_BT, domain_B = (x.to(by_domain.device) for x in (batch.loss_mask_BT, batch.domain_B))
    over_BT = (losses_BT - (losses_BT if batch.reference_BT is None else batch.reference_BT)).clamp_min(0)
    sums_3B = torch.stack((losses_BT * mask_BT.double(), mask_BT, over_BT * mask_BT)).sum(-1)
    domains_D = torch.arange(by_domain.shape[1], device=by_domain.device)
    # a product, because index_add_ on a GPU adds in any order, and a resumed run writes the same lines to the bit
    by_domain += sums_3B @ (domain_B[:, None] == domains_D).double()


def choose_kernels(config: Config, device: torch.device) -> str:
    """Activates the kernels that the config asks for in this process, and names them; ValueError where it cannot."""
    muon = "torch's Muon with " * (config.optim.optimizer == "muon")
    return f"{choose_attention(config.attention, device)}, {muon}{adamw_name(device)}"


def build_engine(config: Config, plan: Plan, mesh: Mesh) -> Engine:
    """The engine that the plan names, with a freshly initialised model on this rank's device."""
    if plan.engine == "deepspeed":
        from megatron_lite.engine.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(config, plan, mesh)
    from megatron_lite.engine.torch_engine import TorchEngine

    return TorchEngine(config, plan, mesh)


def optim_names(module: nn.Module, config: OptimConfig) -> dict[str, torch.Size]:
    """Names and shapes of the logical optimizer state of a model."""
    names = {"step": torch.Size([])}
    for name, param in module.named_parameters():
        muon = config.optimizer == "muon" and is_hidden(name, param)
        names |= {f"{m}/{name}": whole_shape(param) for m in (MOMENTS[2:] if muon else MOMENTS[:2])}
    return names
