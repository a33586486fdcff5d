"""GPT with the Llama block: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Knows no engine and no data.

Shape suffixes: B batch, T sequence, D hidden, H query heads, G key/value heads, K head dim, F ffn, V vocabulary,
N = B*T tokens.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_lite.attention import apply_rope, causal_attention, rope_tables
from megatron_lite.rng import init_generator
from megatron_lite.shape import ModelShape

# Logits held at once, in elements: 2^27 fp32 numbers are 512 MiB. Below it the loss is one matmul, above it is chunked.
LOGITS_LIMIT = 1 << 27


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]; the dtype is kept."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.heads = (shape.num_heads, shape.num_kv_heads)
        self.head_dim = shape.head_dim
        packed_heads = shape.num_heads + 2 * shape.num_kv_heads
        self.qkv = nn.Linear(shape.hidden_size, packed_heads * self.head_dim, bias=False)
        self.out = nn.Linear(shape.num_heads * self.head_dim, shape.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        B, T, _ = x_BTD.shape
        H, G = self.heads
        packed = self.qkv(x_BTD).view(B, T, H + 2 * G, self.head_dim).transpose(1, 2)
        queries_and_keys, v_BGTK = packed.split((H + G, G), dim=1)
        q_BHTK, k_BGTK = apply_rope(queries_and_keys, cos_TK, sin_TK).split((H, G), dim=1)
        return self.out(causal_attention(q_BHTK, k_BGTK, v_BGTK).transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_up = nn.Linear(shape.hidden_size, 2 * shape.ffn_hidden_size, bias=False)
        self.down = nn.Linear(shape.ffn_hidden_size, shape.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BTF) * up_BTF)


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.attention = Attention(shape)
        self.mlp_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TK, sin_TK)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class GPT(nn.Module):
    """Token ids in, logits or per-token losses out. Parameters are fp32 on CPU and start from ``seed`` alone."""

    cos_TK: Tensor
    sin_TK: Tensor

    def __init__(self, shape: ModelShape, seed: int = 1234) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        if shape.tie_embeddings:
            self.head.weight = self.embedding.weight
        cos_TK, sin_TK = rope_tables(shape.seq_length, shape.head_dim, shape.rope_theta, "cpu", shape.rope_scaling)
        self.register_buffer("cos_TK", cos_TK, persistent=False)
        self.register_buffer("sin_TK", sin_TK, persistent=False)
        init_params(self, shape, seed)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Final normalised hidden states [B, T, D]; T may be shorter than the model's seq_length, not longer."""
        T, longest = tokens_BT.shape[1], self.shape.seq_length
        assert longest >= T, f"{T} tokens, the model was built for {longest}"
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos_TK[:T], self.sin_TK[:T])
        return self.norm(x_BTD)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Next-token logits [B, T, V]."""
        return self.head(self.hidden(tokens_BT))

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Per-token cross-entropy in nats, fp32 [B, T]. Never holds more than LOGITS_LIMIT logits."""
        h_ND = self.hidden(tokens_BT).flatten(0, 1)
        rows = max(1, LOGITS_LIMIT // self.shape.vocab_size)
        if h_ND.shape[0] <= rows:
            return token_losses(h_ND, self.head.weight, labels_BT.flatten()).view(labels_BT.shape)
        chunks = zip(h_ND.split(rows), labels_BT.flatten().split(rows), strict=True)
        parts = [checkpoint(token_losses, h, self.head.weight, y, use_reentrant=False) for h, y in chunks]
        return torch.cat(parts).view(labels_BT.shape)


class TokenLosses(torch.autograd.Function):
    """Head and cross-entropy in one: the log-probabilities are kept, and turned into their own gradient in place.

    One [N, V] buffer instead of three, and no pass to fill one with zeros: 1.4x on a whole step of a small proxy.
    The softmax is fp32 (fp64 for fp64 models) whatever the matmul's type. A second backward is an error of autograd's.
    """

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
        """Cross-entropy of each row in nats [N]."""
        logits_NV = F.linear(h_ND, head_VD)
        ctx.compute_type = logits_NV.dtype
        log_probs_NV = F.log_softmax(logits_NV, dim=-1, dtype=max_precision(logits_NV.dtype))
        ctx.save_for_backward(h_ND, head_VD, labels_N, log_probs_NV)
        return -log_probs_NV.gather(1, labels_N[:, None]).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, Tensor, None]:
        """d loss / d logits = probability - [is the label], scaled by row; the matmuls run in the forward's type."""
        h_ND, head_VD, labels_N, log_probs_NV = ctx.saved_tensors
        grad_NV = log_probs_NV.exp_().mul_(grad_N[:, None]).scatter_add_(1, labels_N[:, None], -grad_N[:, None])
        grad_NV = grad_NV.to(ctx.compute_type)
        grad_h_ND = grad_NV @ head_VD.to(ctx.compute_type)
        grad_head_VD = grad_NV.t() @ h_ND.to(ctx.compute_type)
        return grad_h_ND.to(h_ND.dtype), grad_head_VD.to(head_VD.dtype), None


def max_precision(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays, everything narrower is summed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def token_losses(h_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy of each row in nats [N], fp32 or wider."""
    return cast(Tensor, TokenLosses.apply(h_ND, head_VD, labels_N))


def init_params(model: GPT, shape: ModelShape, seed: int) -> None:
    """TinyLlama's initialisation: N(0, 2/(5D)); projections into the residual stream N(0, 1/(D L^2)); norms at 1.

    Each tensor is drawn from a generator of (seed, its name), so a model's start does not depend on order or rank.
    """
    std = math.sqrt(2 / (5 * shape.hidden_size))
    residual_std = 1 / math.sqrt(shape.hidden_size) / shape.num_layers
    for name, param in model.named_parameters():
        if param.dim() < 2:
            continue
        into_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        with torch.no_grad():
            param.normal_(0.0, residual_std if into_residual else std, generator=init_generator(seed, name))
