"""The pairs of collectives around a parallel region, after Megatron-LM (Shoeybi et al. 2019, Korthikanti et al. 2022).

    layer's input    tensor parallel: copy forward, all-reduce the gradient (Megatron's f)
                     sequence parallel: all-gather over T forward, reduce-scatter the gradient
    layer's output   tensor parallel: all-reduce forward, copy the gradient (g)
                     sequence parallel: reduce-scatter over T forward, all-gather the gradient

Each returns a new tensor. Every rank of the group must call them in the same order.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.mesh import TensorParallel

# torch 2.13 renamed the two; the old names go on working with a warning
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def enter_region(x_BTD: Tensor, tp: TensorParallel) -> Tensor:
    """Input of a layer cut by columns: whole on every rank. Under sequence parallelism [B, T/tp, D] -> [B, T, D]."""
    if tp.size == 1:
        return x_BTD
    return cast(Tensor, (_GatherSequence if tp.sequence_parallel else _Copy).apply(x_BTD, tp))


def leave_region(x_BTD: Tensor, tp: TensorParallel) -> Tensor:
    """Sum of the ranks' partial outputs [B, T, D]. Under sequence parallelism each keeps its T/tp positions."""
    if tp.size == 1:
        return x_BTD
    return cast(Tensor, (_ScatterSequence if tp.sequence_parallel else _Reduce).apply(x_BTD, tp))


def replicated(param: Tensor, tp: TensorParallel) -> Tensor:
    """A parameter that every rank holds whole, where each rank sees only its positions: gradients are summed."""
    return cast(Tensor, _Copy.apply(param, tp)) if tp.sequence_parallel else param


def sum_forward(x: Tensor, tp: TensorParallel) -> Tensor:
    """The ranks' tensors added up, on every rank; differentiable."""
    return x if tp.size == 1 else cast(Tensor, _Reduce.apply(x, tp))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.tp), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        return all_reduce(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return all_gather_sequence(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_sequence(grad, ctx.tp), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return reduce_scatter_sequence(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather_sequence(grad, ctx.tp), None


def all_reduce(x: Tensor, tp: TensorParallel, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Sum (or ``op``) over the group: every rank sends its tensor, every rank receives the result."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, op=op, group=tp.group)
    return out


def all_gather_sequence(x_BSD: Tensor, tp: TensorParallel) -> Tensor:
    """[B, T/tp, ...] -> [B, T, ...]: every rank sends its positions and receives everybody's, in rank order."""
    B, S, *rest = x_BSD.shape
    out = x_BSD.new_empty(tp.size * B, S, *rest)
    all_gather_single(out, x_BSD.contiguous(), group=tp.group)
    return out.view(tp.size, B, S, *rest).transpose(0, 1).reshape(B, tp.size * S, *rest)


def reduce_scatter_sequence(x_BTD: Tensor, tp: TensorParallel) -> Tensor:
    """[B, T, ...] -> [B, T/tp, ...]: every rank sends each rank its positions and receives the sum of its own."""
    B, T, *rest = x_BTD.shape
    assert T % tp.size == 0, f"{T} positions over {tp.size} ranks"
    parts = x_BTD.view(B, tp.size, T // tp.size, *rest).transpose(0, 1).contiguous()
    out = x_BTD.new_empty(B, T // tp.size, *rest)
    reduce_scatter_single(out, parts.flatten(0, 1), group=tp.group)
    return out
