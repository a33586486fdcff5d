"""One process, or DDP: PyTorch alone."""

from __future__ import annotations

import contextlib
import gc
import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megatron_lite import optim
from megatron_lite.attention import Documents
from megatron_lite.config import Config
from megatron_lite.data.loader import Batch
from megatron_lite.engine import StepStats, add_by_domain
from megatron_lite.engine.zero import ZeroAdamW
from megatron_lite.mesh import Mesh
from megatron_lite.model import GPT
from megatron_lite.plan import Plan


class TorchEngine:
    """fp32 parameters and moments, autocast compute, fused AdamW (its moments sharded at ZeRO 1), gradients by DDP."""

    def __init__(self, config: Config, plan: Plan, mesh: Mesh) -> None:
        self.mesh, self.stage, self.clip_grad = mesh, plan.zero_stage, config.optim.clip_grad
        self.module = GPT(plan.shape, config.seed, mesh.tp, config.activation_checkpointing).to(mesh.device)
        self.forward: nn.Module = self.module
        self.graphs, self.module.loss_chunk = config.cuda_graphs, config.loss_chunk
        if config.compile:
            compile_in_place(self.module, "reduce-overhead" if self.graphs else None)
        self.autocast = torch.autocast(mesh.device.type, torch.bfloat16, enabled=plan.precision == "bf16")
        scale = optim.hidden_lr_scale(config.optim, plan.shape.mup_width)
        groups = optim.param_groups(self.module, config.optim.weight_decay, scale)
        self.wrapped, self.optimizer = self._wrap(groups, config, plan)
        for param in self.module.parameters() if self.graphs else ():
            param.grad = torch.zeros_like(param)

    def _wrap(self, groups: list[dict[str, Any]], config: Config, plan: Plan) -> tuple[Any, Any]:
        """What training calls in the module's place, and the optimizer."""
        mesh, wrapped = self.mesh, cast(nn.Module, self.module)
        if mesh.dp_size > 1:
            wrapped = DistributedDataParallel(self.module, process_group=mesh.dp_group, gradient_as_bucket_view=True)
        if plan.zero_stage and mesh.dp_size > 1:
            return wrapped, ZeroAdamW(self.module, groups, config.optim, mesh)
        return wrapped, optim.build_optimizer(groups, config.optim)

    def forward_backward(
        self, micro_batches: Sequence[Batch], num_loss_tokens: float, by_domain: Tensor | None = None
    ) -> Tensor:
        """DDP averages over ranks, hence the factor ``dp_size``: what is left is the sum over the global count."""
        total = torch.zeros((), device=self.mesh.device)
        for i, batch in enumerate(micro_batches):
            if self.graphs:
                torch.compiler.cudagraph_mark_step_begin()  # what the graphs of before gave may be overwritten
            with self._micro_batch(last=i == len(micro_batches) - 1):
                loss = summed_loss(self.wrapped, batch, self.mesh.device, self.autocast, by_domain)
                self._backward(loss * (self.mesh.dp_size / num_loss_tokens))
            total += loss.detach()
        return total

    def step(self, lr: float) -> StepStats:
        """See Engine.step. The norm is the same on every rank, so all of them skip or none."""
        norm = optim.clip_grad_norm(self.module, self.clip_grad, self.mesh.tp)
        skipped = not math.isfinite(norm)
        if not skipped:
            optim.set_learning_rate(self.optimizer.param_groups, lr)
            self.optimizer.step()
        self.module.zero_grad(set_to_none=not self.graphs)  # a graph's own memory is no place to add up gradients
        return StepStats(norm, skipped)

    def state_dict(self) -> dict[str, Tensor]:
        """See Engine.state_dict."""
        if isinstance(self.optimizer, ZeroAdamW):
            return self.optimizer.moments()
        return optim.moments(self.module, self.optimizer)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See Engine.load_state_dict."""
        if isinstance(self.optimizer, ZeroAdamW):
            self.optimizer.set_moments(state)
        else:
            optim.set_moments(self.module, self.optimizer, state)

    def close(self) -> None:
        """See Engine.close. A DDP freed later can hang: it joins gloo's threads with the GIL, which they may want."""
        if self.wrapped is not self.module:
            self.wrapped = self.module
            gc.collect()  # DDP is a cycle of references

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if last or self.mesh.dp_size == 1:
            return contextlib.nullcontext()
        return cast(DistributedDataParallel, self.wrapped).no_sync()  # ranks reduce in the step's last one


def summed_loss(
    model: nn.Module, batch: Batch, device: torch.device, autocast: torch.autocast, by_domain: Tensor | None
) -> Tensor:
    """sum(loss * mask * weight) of one micro-batch in nats, fp32, with its graph; for ``by_domain`` see Engine."""
    tokens_BT, labels_BT, mask_BT = (
        x.to(device, non_blocking=True) for x in (batch.tokens_BT, batch.labels_BT, batch.loss_mask_BT)
    )
    weights_BT = mask_BT.float() if batch.weight_B is None else mask_BT * batch.weight_B.to(device)[:, None]
    with autocast:
        loss, losses_BT = model(tokens_BT, labels_BT, weights_BT, Documents.of(batch, device))
    if by_domain is not None:
        add_by_domain(by_domain, batch, losses_BT)
    return cast(Tensor, loss)


def compile_in_place(module: GPT, mode: str | None = None) -> None:
    """torch.compile with static shapes, parameter names unchanged; where that fails, one warning and no compilation."""
    module.compile(dynamic=False, mode=mode)
    try:
        length = min(8 * module.tp.size, module.shape.seq_length)
        tokens = torch.zeros(1, length, dtype=torch.int32, device=next(module.parameters()).device)
        with torch.no_grad():
            module(tokens, tokens)
    except Exception as error:
        # the compiler can fail in many ways, and none is a reason not to train
        warnings.warn(f"compile=true does not work here ({type(error).__name__}: {error}); training without it")
        module._compiled_call_impl = None
