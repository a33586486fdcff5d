"""Output head and cross-entropy in one, over a vocabulary that may be spread over ranks, a chunk of rows at a time.

The [tokens, vocabulary] logits never exist at once. A chunk's logits become their own gradient in place, in the type of
the matmuls; sums are fp32 (fp64 for fp64 models). Shape suffixes: N tokens, D hidden, V this rank's vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.mesh import TensorParallel
from megatron_lite.tensor_parallel.collectives import all_reduce

# Logits of one chunk, in elements: as many rows as keep the matmuls near their full speed (docs/decisions.md).
CHUNK = {"cpu": 1 << 25, "cuda": 1 << 27}
# Logits whose exponentials a CPU thread takes at once: 1 MiB of fp32, which stays in a core's L2 cache.
BLOCK = 1 << 18


@dataclass(frozen=True)
class VocabRows:
    """Which rows of the head are this rank's. By default all of them."""

    first: int = 0  # token id of the first
    padded: int = 0  # rows of a rank with its padding: all ranks must cut their tokens into the same chunks
    tp: TensorParallel = field(default_factory=TensorParallel)
    chunk: int = 0  # logits of one chunk; 0: CHUNK


ALL_ROWS = VocabRows()


def token_losses(h_ND: Tensor, head_VD: Tensor, labels_N: Tensor, rows: VocabRows = ALL_ROWS) -> Tensor:
    """Cross-entropy of each row in nats [N], fp32 or wider, the same on every rank.

    ``head_VD``: this rank's rows of the head without padding. The gradient of ``h_ND`` is this rank's part of the sum
    over the vocabulary. A backward computes the logits a second time.
    """
    return cast(Tensor, _TokenLosses.apply(h_ND, head_VD, labels_N, rows))


def weighted_loss(
    h_ND: Tensor, head_VD: Tensor, labels_N: Tensor, weights_N: Tensor, rows: VocabRows = ALL_ROWS
) -> tuple[Tensor, Tensor]:
    """(sum of weight * loss with its graph, ``token_losses`` without): the gradient is made in the forward."""
    return cast(tuple[Tensor, Tensor], _WeightedLoss.apply(h_ND, head_VD, labels_N, weights_N, rows))


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head_VD: Tensor, labels_N: Tensor, rows: VocabRows) -> Tensor:
        ctx.args = (rows, compute_type(h_ND))
        ctx.save_for_backward(h_ND, head_VD, labels_N)
        return losses_and_gradients(h_ND, head_VD, labels_N, None, *ctx.args)[0]

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        """A row's incoming gradient is its weight."""
        _, grad_h_ND, grad_head_VD = losses_and_gradients(*ctx.saved_tensors, grad_N, *ctx.args)
        return grad_h_ND, grad_head_VD, None, None


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head_VD: Tensor, labels_N: Tensor, weights_N: Tensor, rows: VocabRows) -> Any:
        losses_N, *gradients = losses_and_gradients(h_ND, head_VD, labels_N, weights_N, rows, compute_type(h_ND))
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(losses_N)
        return (losses_N * weights_N).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scales in place what the forward left; autograd refuses a second backward, which would scale it twice."""
        grad_h_ND, grad_head_VD = ctx.saved_tensors
        return grad_h_ND.mul_(grad), grad_head_VD.mul_(grad), None, None, None


def compute_type(h_ND: Tensor) -> torch.dtype:
    """The type in which autocast would multiply."""
    kind = h_ND.device.type  # meta, where shapes alone are computed, has no autocast
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else h_ND.dtype


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled, its loops would be unrolled
def losses_and_gradients(
    h_ND: Tensor, head_VD: Tensor, labels_N: Tensor, weights_N: Tensor | None, rows: VocabRows, compute: torch.dtype
) -> tuple[Tensor, ...]:
    """Losses [N] and, with weights, the gradients of sum(weight * loss) by h [N, D] and by the head [V, D].

    With e = exp(logit - m) for any m, and q the sum of e over the vocabulary, d loss / d logit is (e - q * [is the
    label]) / q. weight / q is left out of the [rows, V] buffer: it scales the rows of h on either side of the matmuls.
    """
    wide, V = torch.float64 if h_ND.dtype == torch.float64 else torch.float32, len(head_VD)
    size = max(1, (rows.chunk or CHUNK.get(h_ND.device.type, CHUNK["cuda"])) // max(V, rows.padded, 1))
    size = -(-len(h_ND) // max(1, -(-len(h_ND) // size)))  # rows of a chunk, alike: a short last one is slow
    h_compute, head_compute = h_ND.to(compute), head_VD.to(compute)
    losses_N, buffer_NV = h_ND.new_empty(len(h_ND), dtype=wide), h_compute.new_empty(min(size, len(h_ND)), V)
    grad_h_ND, grad_head_VD = (torch.zeros_like(x) if weights_N is not None else x[:0] for x in (h_ND, head_VD))
    for start in range(0, len(h_ND), size):
        chunk = slice(start, start + size)
        labels = labels_N[chunk, None].long() - rows.first
        mine = (labels >= 0) & (labels < V)
        labels = labels.masked_fill(~mine, 0)
        logits = torch.mm(h_compute[chunk], head_compute.t(), out=buffer_NV[: len(labels)])
        at_label, largest, total = exponentials_(logits, labels, wide)
        losses, exp_label = total.log() - at_label, at_label.exp()
        if rows.tp.size > 1:
            losses, total = across_ranks(at_label, largest, total, mine, rows.tp)
        losses_N[chunk] = losses.squeeze(1)
        if weights_N is None:
            continue
        if V:  # where the label is another rank's, this writes what is there; scatter_ copies all logits twice in bf16
            place = torch.arange(len(labels), device=labels.device), labels.squeeze(1)
            logits[place] = (exp_label - total * mine).squeeze(1).to(compute)
        scale = weights_N[chunk, None] / total
        torch.mul(logits @ head_compute, scale, out=grad_h_ND[chunk])
        scaled = (h_ND[chunk] * scale).to(compute)
        if compute == grad_head_VD.dtype:
            grad_head_VD.addmm_(logits.t(), scaled)
        else:
            grad_head_VD += logits.t() @ scaled  # chunks add up in the parameter's type
    return losses_N, grad_h_ND, grad_head_VD


def exponentials_(logits_NV: Tensor, labels_N1: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logit - the row's largest) in place; returns (label's logit - largest, largest, sum of the exponentials)."""
    rows, V = logits_NV.shape
    at_label, largest, total = (torch.full_like(labels_N1, x, dtype=wide) for x in (0, -torch.inf, 0))
    rows = max(1, BLOCK * torch.get_num_threads() // max(1, V)) if logits_NV.device.type == "cpu" else rows
    for start in range(0, len(logits_NV) if V else 0, rows):  # a rank may hold padding alone
        block = slice(start, start + rows)
        logits = logits_NV[block].to(wide)  # a copy only where they are narrower
        largest[block] = logits.amax(1, keepdim=True)
        logits -= largest[block]
        at_label[block] = logits.gather(1, labels_N1[block])
        torch.sum(logits.exp_(), 1, keepdim=True, out=total[block])
        if wide != logits_NV.dtype:
            logits_NV[block] = logits
    return at_label, largest, total


def across_ranks(
    at_label: Tensor, largest: Tensor, total: Tensor, mine: Tensor, tp: TensorParallel
) -> tuple[Tensor, Tensor]:
    """(loss of each row, sum over the whole vocabulary of exp(logit - this rank's largest)), [N, 1] each."""
    top = all_reduce(largest, tp, dist.ReduceOp.MAX)  # ranks agree on the row's largest logit
    # a rank whose logits are all far below the top has no part in the sum, but its label's gradient must stay finite
    factor = (largest - top).exp().clamp_min(1e-30)
    at_label = (at_label + largest - top).where(mine, torch.zeros_like(top))
    # each rank sends its part of the sum, and the label's logit if it holds that row
    total, at_label = all_reduce(torch.stack((total * factor, at_label)), tp)
    return total.log() - at_label, total / factor
