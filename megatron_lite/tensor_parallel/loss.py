"""Cross-entropy over a vocabulary that is spread over ranks, in one autograd function with the output head.

Shape suffixes: N tokens, D hidden, V this rank's vocabulary rows.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.mesh import TensorParallel
from megatron_lite.tensor_parallel.collectives import all_reduce


def vocab_parallel_losses(h_ND: Tensor, head_VD: Tensor, labels_N: Tensor, first: int, tp: TensorParallel) -> Tensor:
    """Cross-entropy of each row in nats [N], fp32 or wider, the same on every rank.

    ``head_VD``: this rank's rows of the head without padding, the first of them for token id ``first``. The gradient
    of ``h_ND`` is this rank's part of the sum over the vocabulary.
    """
    return cast(Tensor, _VocabParallelLosses.apply(h_ND, head_VD, labels_N, first, tp))


class _VocabParallelLosses(torch.autograd.Function):
    """Keeps exp(logits - max), one [N, V] buffer, and turns it into the logits' gradient in place."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head_VD: Tensor, labels_N: Tensor, first: int, tp: TensorParallel) -> Tensor:
        logits_NV = F.linear(h_ND, head_VD)
        ctx.compute_type = logits_NV.dtype
        wide = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
        exp_NV = logits_NV.to(wide)  # the logits themselves when they are wide already: nobody else holds them
        N, V = exp_NV.shape
        largest_N = exp_NV.amax(dim=1) if V else exp_NV.new_full((N,), -torch.inf)  # a rank may hold padding alone
        exp_NV.sub_(all_reduce(largest_N, tp, dist.ReduceOp.MAX)[:, None])  # ranks agree on the row's largest logit
        local_N = labels_N - first
        mine_N = (local_N >= 0) & (local_N < V)
        local_N = local_N.masked_fill(~mine_N, 0)
        label_N = exp_NV.new_zeros(N)
        if V:
            label_N = exp_NV.gather(1, local_N[:, None]).squeeze(1).masked_fill(~mine_N, 0)
        # each rank sends its part of the softmax's sum, and the label's logit if it holds that row
        sum_N, label_N = all_reduce(torch.stack((exp_NV.exp_().sum(dim=1), label_N)), tp)
        ctx.save_for_backward(h_ND, head_VD, local_N, mine_N, exp_NV, sum_N)
        return sum_N.log() - label_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """d loss / d logits = probability - [is the label], scaled by row; the matmuls run in the forward's type."""
        h_ND, head_VD, local_N, mine_N, exp_NV, sum_N = ctx.saved_tensors
        grad_NV = exp_NV.mul_((grad_N / sum_N)[:, None])
        if grad_NV.shape[1]:
            grad_NV.scatter_add_(1, local_N[:, None], -(grad_N * mine_N)[:, None])
        grad_NV = grad_NV.to(ctx.compute_type)
        grad_h_ND = grad_NV @ head_VD.to(ctx.compute_type)
        grad_head_VD = grad_NV.t() @ h_ND.to(ctx.compute_type)
        return grad_h_ND.to(h_ND.dtype), grad_head_VD.to(head_VD.dtype), None, None, None
