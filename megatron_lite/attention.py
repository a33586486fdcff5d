"""Causal attention: PyTorch's SDPA, which has flash kernels of its own on CPU and CUDA."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.config import RopeScaling
from megatron_lite.data.batch import Batch

# B batch, H query heads, G key/value heads (G divides H), T sequence, K head dim


@dataclass(frozen=True)
class Documents:
    """Where documents begin in a micro-batch of [B, T] tokens; None where a row is one text."""

    position_ids_BT: Tensor | None = None  # int64: place in the document
    cu_seqlens: Tensor | None = None  # int32: starts of documents in the flattened B*T, and B*T

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> Documents:
        """Those of a loader's batch, on the model's device."""
        parts = (batch.position_ids_BT, batch.cu_seqlens)
        return cls(*(None if part is None else part.to(device, non_blocking=True) for part in parts))

    def mask(self, batch_size: int) -> Tensor | None:
        """What may look at what [B, 1, T, T]: earlier tokens of the same document."""
        if self.cu_seqlens is None:
            return None
        place_N = torch.arange(int(self.cu_seqlens[-1]), device=self.cu_seqlens.device, dtype=torch.int32)
        document_BT = torch.bucketize(place_N, self.cu_seqlens, right=True).view(batch_size, -1)
        return (document_BT[:, :, None] == document_BT[:, None, :]).tril_()[:, None]


WHOLE_ROWS = Documents()


def causal_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask_B1TT: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v under ``mask_B1TT``, or a causal mask -> [B, H, T, K]; H/G queries a key."""
    grouped, causal = q_BHTK.shape[1] != k_BGTK.shape[1], mask_B1TT is None
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGTK, v_BGTK, attn_mask=mask_B1TT, is_causal=causal, enable_gqa=grouped
    )


def rope_tables(
    seq_length: int, head_dim: int, theta: float, device: torch.device | str, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position and frequency, each [T, K/2] fp32 (RoFormer, in Llama's half-split layout)."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    if scaling:
        frequency = scale_frequency(frequency, scaling)
    angle = torch.outer(torch.arange(seq_length, dtype=torch.float64, device="cpu"), frequency)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def scale_frequency(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's frequencies: fast ones stay, slow ones are divided by ``factor``, those between are interpolated."""
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)  # in the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequency / scaling.factor, frequency, kept.clamp(0, 1))


def apply_rope(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotates pairs (i, i + K/2) by position, Hugging Face Llama's convention; dtype is kept."""
    first, second = x_BHTK.chunk(2, dim=-1)
    cos, sin = cos_TK.to(x_BHTK.dtype), sin_TK.to(x_BHTK.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
