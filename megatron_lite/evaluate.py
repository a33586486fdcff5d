"""Per-domain loss and bits per byte on fixed held-out sets, the same for every run and every rank count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from megatron_lite.attention import Documents
from megatron_lite.data.loader import Batch, EvalSet
from megatron_lite.mesh import Mesh


@dataclass(frozen=True)
class EvalResult:
    """One domain: mean loss in nats a token, bits a byte (None without a sidecar), tokens scored."""

    loss: float
    bpb: float | None
    tokens: int


@torch.no_grad()
def evaluate(model: nn.Module, sets: Sequence[EvalSet], mesh: Mesh, autocast: torch.autocast) -> dict[str, EvalResult]:
    """Scores every set: data-parallel ranks take the batches in turn and add up float64 sums.

    ``model(tokens, labels, documents=...)`` returns per-token losses [B, T]. Returns set name -> EvalResult.
    """
    was_training = model.training
    model.eval()
    results = {s.name: _evaluate_one(model, s, mesh, autocast) for s in sets}
    model.train(was_training)
    return results


@torch.no_grad()
def token_losses(model: nn.Module, batch: Batch, device: torch.device, autocast: torch.autocast) -> Tensor:
    """Per-token losses [B, T] of one micro-batch."""
    with autocast:
        tokens_BT, labels_BT = batch.tokens_BT.to(device), batch.labels_BT.to(device)
        return cast(Tensor, model(tokens_BT, labels_BT, documents=Documents.of(batch, device)))


def flatten(results: dict[str, EvalResult]) -> dict[str, float]:
    """Results under the metric names valid/<domain>/loss and valid/<domain>/bpb."""
    flat = {f"valid/{name}/loss": r.loss for name, r in results.items()}
    return flat | {f"valid/{name}/bpb": r.bpb for name, r in results.items() if r.bpb is not None}


def _evaluate_one(model: nn.Module, eval_set: EvalSet, mesh: Mesh, autocast: torch.autocast) -> EvalResult:
    sums = torch.zeros(2, dtype=torch.float64)  # nats, tokens
    for i, batch in enumerate(eval_set):
        if i % mesh.dp_size != mesh.dp_rank:
            continue
        losses_BT = token_losses(model, batch, mesh.device, autocast)
        mask_BT = batch.loss_mask_BT.double()
        sums += torch.stack(((losses_BT.double().cpu() * mask_BT).sum(), mask_BT.sum()))
    nats, tokens = mesh.sum(sums.to(mesh.device)).tolist()
    loss = nats / tokens
    bytes_per_token = eval_set.bytes_per_token
    bpb = loss / math.log(2) / bytes_per_token if bytes_per_token else None
    return EvalResult(loss, bpb, int(tokens))
