"""Activation checkpointing: what a block keeps for its backward pass, and what is computed again there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# What selective keeps: matmuls and attention, nearly all of a block's work. Norms, rotations and SwiGLU, nearly all of
# its other memory, cost little to do again (Korthikanti et al. 2022; torchtitan's selective op checkpointing).
KEPT = {
    "mm", "addmm", "bmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu", "_varlen_attn",
}  # fmt: skip


def run_block(block: Callable[..., Tensor], mode: str, *inputs: Any) -> Tensor:
    """``block(*inputs)``; ``mode`` none keeps every activation, full only the inputs, selective those of KEPT as well.

    The numbers are the same to the bit. Collectives inside a block run again in the backward pass, on all ranks alike.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    extra: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
    if mode == "full":
        extra = {}
    # no dropout anywhere, so no generator's state to restore
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **extra)


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = getattr(op, "__name__", "").split(".")[0] in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
