"""GPT with the Llama block: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Knows no engine and no data.

Shape suffixes: B batch, T sequence, D hidden, H query heads, G key/value heads, K head dim, F ffn, V vocabulary,
N = B*T tokens, S positions of one rank (T, or T/tp under sequence parallelism). H, G, F and V are those of
one rank.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_lite.attention import apply_rope, causal_attention, rope_tables
from megatron_lite.recompute import run_block
from megatron_lite.rng import init_generator
from megatron_lite.shape import ModelShape
from megatron_lite.tensor_parallel import TensorParallel
from megatron_lite.tensor_parallel.collectives import enter_region, replicated, sum_forward
from megatron_lite.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    compute_type,
)
from megatron_lite.tensor_parallel.loss import vocab_parallel_losses
from megatron_lite.tensor_parallel.shards import slice_whole, whole_shape

# Logits held at once, in elements: 2^27 fp32 numbers are 512 MiB. Below it the loss is one matmul, above it is chunked.
LOGITS_LIMIT = 1 << 27


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.tp = eps, tp

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]; the dtype is kept."""
        return F.rms_norm(x, (x.shape[-1],), replicated(self.weight, self.tp).to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, shape: ModelShape, tp: TensorParallel) -> None:
        super().__init__()
        self.heads = (shape.num_heads // tp.size, shape.num_kv_heads // tp.size)
        self.head_dim = shape.head_dim
        q, kv = shape.num_heads * self.head_dim, shape.num_kv_heads * self.head_dim
        self.qkv = ColumnParallelLinear(shape.hidden_size, (q, kv, kv), tp)
        self.out = RowParallelLinear(q, shape.hidden_size, tp)

    def forward(self, x_BSD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]; inside, this rank's heads over all positions."""
        B, T = x_BSD.shape[0], cos_TK.shape[0]
        H, G = self.heads
        packed = self.qkv(x_BSD).view(B, T, H + 2 * G, self.head_dim).transpose(1, 2)
        queries_and_keys, v_BGTK = packed.split((H + G, G), dim=1)
        q_BHTK, k_BGTK = apply_rope(queries_and_keys, cos_TK, sin_TK).split((H, G), dim=1)
        return self.out(causal_attention(q_BHTK, k_BGTK, v_BGTK).transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, shape: ModelShape, tp: TensorParallel) -> None:
        super().__init__()
        self.gate_up = ColumnParallelLinear(shape.hidden_size, (shape.ffn_hidden_size, shape.ffn_hidden_size), tp)
        self.down = RowParallelLinear(shape.ffn_hidden_size, shape.hidden_size, tp)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]; inside, this rank's part of the ffn over all positions."""
        gate_BTF, up_BTF = self.gate_up(x_BSD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BTF) * up_BTF)


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, shape: ModelShape, tp: TensorParallel) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.hidden_size, shape.norm_eps, tp)
        self.attention = Attention(shape, tp)
        self.mlp_norm = RMSNorm(shape.hidden_size, shape.norm_eps, tp)
        self.mlp = MLP(shape, tp)

    def forward(self, x_BSD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_TK, sin_TK)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))


class GPT(nn.Module):
    """Token ids in, logits or per-token losses out; each rank of ``tp`` holds its slices and gets the same results.

    Parameters are fp32 on CPU and start from ``seed`` alone. Heads and ffn must be divisible by tp (Plan checks).
    ``recompute``: see recompute.run_block.
    """

    cos_TK: Tensor
    sin_TK: Tensor

    def __init__(
        self, shape: ModelShape, seed: int = 1234, tp: TensorParallel | None = None, recompute: str = "none"
    ) -> None:
        super().__init__()
        self.shape, self.tp, self.recompute = shape, tp or TensorParallel(), recompute
        self.embedding = VocabParallelEmbedding(shape.vocab_size, shape.hidden_size, self.tp)
        self.blocks = nn.ModuleList(Block(shape, self.tp) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps, self.tp)
        self.head = VocabParallelHead(shape.vocab_size, shape.hidden_size, self.tp)
        if shape.tie_embeddings:
            self.head.weight = self.embedding.weight
        cos_TK, sin_TK = rope_tables(shape.seq_length, shape.head_dim, shape.rope_theta, "cpu", shape.rope_scaling)
        self.register_buffer("cos_TK", cos_TK, persistent=False)
        self.register_buffer("sin_TK", sin_TK, persistent=False)
        init_params(self, seed)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Final normalised hidden states [B, T, D]; T may be shorter than the model's seq_length, not longer.

        Every rank returns all of it; gradients through it are summed over the ranks of ``tp``.
        """
        T, longest = tokens_BT.shape[1], self.shape.seq_length
        assert longest >= T, f"{T} tokens, the model was built for {longest}"
        x_BSD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BSD = run_block(block, self.recompute, x_BSD, self.cos_TK[:T], self.sin_TK[:T])
        return enter_region(compute_type(self.norm(x_BSD), self.tp), self.tp)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Next-token logits [B, T, vocabulary], on every rank."""
        logits_BTV, vocab_size = F.linear(self.hidden(tokens_BT), self.head.valid_weight), self.shape.vocab_size
        if self.tp.size == 1:
            return logits_BTV
        before = self.head.first_row
        return sum_forward(F.pad(logits_BTV, (before, vocab_size - before - logits_BTV.shape[-1])), self.tp)

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Per-token cross-entropy in nats, fp32 [B, T]. Never holds more than LOGITS_LIMIT logits."""
        h_ND, labels_N = self.hidden(tokens_BT).flatten(0, 1), labels_BT.flatten()
        rows = max(1, LOGITS_LIMIT // self.head.weight.shape[0])
        if h_ND.shape[0] <= rows:
            return self._losses(h_ND, labels_N).view(labels_BT.shape)
        chunks = zip(h_ND.split(rows), labels_N.split(rows), strict=True)
        parts = [checkpoint(self._losses, h, y, use_reentrant=False) for h, y in chunks]
        return torch.cat(parts).view(labels_BT.shape)

    def _losses(self, h_ND: Tensor, labels_N: Tensor) -> Tensor:
        if self.tp.size == 1:
            return token_losses(h_ND, self.head.weight, labels_N)
        return vocab_parallel_losses(h_ND, self.head.valid_weight, labels_N, self.head.first_row, self.tp)


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


def init_params(model: GPT, seed: int) -> None:
    """TinyLlama's initialisation: N(0, 2/(5D)); projections into the residual stream N(0, 1/(D L^2)); norms at 1.

    Each tensor is drawn whole from a generator of (seed, its name) and then cut, so that a model's start does not
    depend on order, rank or tensor-parallel size.
    """
    shape = model.shape
    std = math.sqrt(2 / (5 * shape.hidden_size))
    residual_std = 1 / math.sqrt(shape.hidden_size) / shape.num_layers
    for name, param in model.named_parameters():
        if param.dim() < 2:
            continue
        into_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        whole, generator = torch.empty(whole_shape(param)), init_generator(seed, name)
        whole.normal_(0.0, residual_std if into_residual else std, generator=generator)
        with torch.no_grad():
            param.copy_(slice_whole(whole, param, model.tp))
