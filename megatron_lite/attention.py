"""Causal attention: PyTorch's SDPA, which has flash kernels of its own on CPU and CUDA."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.config import RopeScaling

# B batch, H query heads, G key/value heads (G divides H), T sequence, K head dim


def causal_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v under a causal mask -> [B, H, T, K]; each key head serves H/G query heads."""
    grouped = q_BHTK.shape[1] != k_BGTK.shape[1]
    return F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=grouped)


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
