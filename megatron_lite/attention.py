"""Causal attention over rows or over the documents in them, and rotary positions.

PyTorch's SDPA has flash kernels of its own on CPU and CUDA (FlashAttention 2 on GPUs); FlashAttention 3 and 4 take
their place where they are installed. Shape suffixes: B batch, H query heads, G key/value heads (G divides H),
T sequence, K head dim, N = B*T.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.config import RopeScaling
from megatron_lite.data.batch import Batch


@dataclass(frozen=True)
class Documents:
    """Where documents begin in a micro-batch of [B, T] tokens; None where a row is one text."""

    position_ids_BT: Tensor | None = None  # int32: place in the document
    cu_seqlens: Tensor | None = None  # int32: starts of documents in the flattened B*T, and B*T
    max_seqlen: int | None = None  # tokens of the longest of them

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> Documents:
        """Those of a loader's batch, on the model's device."""
        parts = (batch.position_ids_BT, batch.cu_seqlens)
        places, cu_seqlens = (None if part is None else part.to(device, non_blocking=True) for part in parts)
        return cls(places, cu_seqlens, batch.max_seqlen)


WHOLE_ROWS = Documents()


def choose_attention(choice: str, device: torch.device) -> str:
    """Puts FlashAttention 3 or 4 under SDPA where installed (GPUs from Hopper on); returns what runs, for people.

    ``choice`` is config.attention: flash is a ValueError where there is none, auto warns once of a broken one.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    names = ("FA3", "FA4") if major == 9 else ("FA4",) if major > 9 else ()
    problems = [] if names else [f"{device.type} here is no GPU from Hopper on"]
    for name in () if choice == "sdpa" else names:
        try:
            from torch.nn.attention import activate_flash_attention_impl

            activate_flash_attention_impl(name)
            return f"SDPA with FlashAttention {name[2:]}"
        except Exception as error:  # missing, built for another torch, no kernel for this GPU: SDPA has its own
            problems.append(f"{name}: {error}")
            if choice == "auto" and not isinstance(error, ModuleNotFoundError):
                warnings.warn(f"FlashAttention {name[2:]} does not work here ({error}); using PyTorch's own kernels")
    if choice == "flash":
        way_out = "install flash-attn 3 or 4 (github.com/Dao-AILab/flash-attention), or set attention: auto"
        raise ValueError(f"attention: flash cannot be had ({'; '.join(problems)}); {way_out}")
    return "PyTorch's SDPA"


def causal_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, documents: Documents = WHOLE_ROWS) -> Tensor:
    """softmax(q k^T / sqrt(K)) v under a causal mask, within documents -> [B, H, T, K]; H/G queries a key."""
    if documents.cu_seqlens is None:
        return sdpa(q_BHTK, k_BGTK, v_BGTK)
    return within_documents(q_BHTK, k_BGTK, v_BGTK, documents)


def sdpa(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """PyTorch's causal attention."""
    grouped = q_BHTK.shape[1] != k_BGTK.shape[1]
    return F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=grouped)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # every batch has other lengths: it would compile each anew
def within_documents(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document: one varlen kernel on a GPU, document by document elsewhere."""
    kernel = varlen_kernel() if q_BHTK.is_cuda and q_BHTK.dtype in (torch.bfloat16, torch.float16) else None
    if kernel is None:
        return by_document(q_BHTK, k_BGTK, v_BGTK, documents)
    return packed(q_BHTK, k_BGTK, v_BGTK, documents, kernel)


def by_document(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, documents: Documents) -> Tensor:
    """SDPA on each document by itself: no mask is built, and nothing is computed between documents."""
    assert documents.cu_seqlens is not None
    sizes: list[int] = documents.cu_seqlens.diff().tolist()
    pieces = (x.transpose(0, 1).flatten(1, 2)[None].split(sizes, dim=2) for x in (q_BHTK, k_BGTK, v_BGTK))
    out = torch.cat([sdpa(*piece) for piece in zip(*pieces, strict=True)], dim=2)  # [1, H, N, K]
    return out.squeeze(0).unflatten(1, (q_BHTK.shape[0], -1)).transpose(0, 1)


Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def packed(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, documents: Documents, kernel: Varlen) -> Tensor:
    """All documents in one call of a varlen kernel."""
    assert documents.cu_seqlens is not None and documents.max_seqlen is not None
    q_NHK, k_NGK, v_NGK = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTK, k_BGTK, v_BGTK))
    out_NHK = kernel(q_NHK, k_NGK, v_NGK, documents.cu_seqlens, documents.max_seqlen)
    return out_NHK.unflatten(0, (q_BHTK.shape[0], -1)).transpose(1, 2)


def varlen_kernel() -> Varlen | None:
    """Causal (q, k, v [N, heads, K], cu_seqlens, max_seqlen) -> [N, H, K]: PyTorch's, flash-attn 2's, or none."""
    with contextlib.suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        if {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():  # not in every torch

            def kernel(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
                options: Any = {"window_size": (-1, 0), "enable_gqa": q.shape[1] != k.shape[1]}
                return cast(Tensor, varlen_attn(q, k, v, cu, cu, longest, longest, **options))

            return kernel
    with contextlib.suppress(ImportError):
        from flash_attn import flash_attn_varlen_func

        return lambda q, k, v, cu, longest: flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)
    return None


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
    """Rotates pairs (i, i + K/2) by position, Hugging Face Llama's convention; dtype is kept.

    cos and sin: [T, K/2], or [B, 1, T, K/2] where rows have positions of their own.
    """
    first, second = x_BHTK.chunk(2, dim=-1)
    cos, sin = cos_TK.to(x_BHTK.dtype), sin_TK.to(x_BHTK.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
