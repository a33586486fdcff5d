"""GPT with the Llama block: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Knows no engine and no data.

Shape suffixes: B batch, T sequence, D hidden, H query heads, G key/value heads, K head dim, F ffn, V vocabulary,
N = B*T tokens, S positions of one rank (T, or T/tp under sequence parallelism). H, G, F and V are those of
one rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.attention import WHOLE_ROWS, Documents, apply_rope, causal_attention, rope_tables
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
from megatron_lite.tensor_parallel.loss import VocabRows, token_losses, weighted_loss
from megatron_lite.tensor_parallel.shards import slice_whole, whole_shape


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float, tp: TensorParallel, multiplier: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.tp, self.multiplier = eps, tp, multiplier

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]; the dtype is kept."""
        weight = replicated(self.weight, self.tp)
        weight = weight if self.multiplier == 1 else weight * self.multiplier
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, shape: ModelShape, tp: TensorParallel) -> None:
        super().__init__()
        assert shape.num_kv_heads % tp.size == 0, f"{shape.num_kv_heads} key/value heads on {tp.size} ranks"
        self.heads = (shape.num_heads // tp.size, shape.num_kv_heads // tp.size)
        self.head_dim = shape.head_dim
        q, kv = shape.num_heads * self.head_dim, shape.num_kv_heads * self.head_dim
        self.qkv = ColumnParallelLinear(shape.hidden_size, (q, kv, kv), tp)
        self.out = RowParallelLinear(q, shape.hidden_size, tp)

    def forward(self, x_BSD: Tensor, cos_TK: Tensor, sin_TK: Tensor, documents: Documents) -> Tensor:
        """[B, S, D] -> [B, S, D]; inside, this rank's heads over all positions."""
        B, T = x_BSD.shape[0], cos_TK.shape[-2]
        H, G = self.heads
        packed = self.qkv(x_BSD).view(B, T, H + 2 * G, self.head_dim).transpose(1, 2)
        queries_and_keys, v_BGTK = packed.split((H + G, G), dim=1)
        q_BHTK, k_BGTK = apply_rope(queries_and_keys, cos_TK, sin_TK).split((H, G), dim=1)
        return self.out(causal_attention(q_BHTK, k_BGTK, v_BGTK, documents).transpose(1, 2).reshape(B, T, -1))


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

    def forward(self, x_BSD: Tensor, cos_TK: Tensor, sin_TK: Tensor, documents: Documents) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_TK, sin_TK, documents)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))


class GPT(nn.Module):
    """Token ids in, logits or per-token losses out; each rank of ``tp`` holds its slices and gets the same results.

    Parameters are fp32 on CPU and start from ``seed`` alone. Heads and ffn must be divisible by tp (Plan checks).
    ``recompute``: see recompute.run_block. ``loss_chunk`` may be set: VocabRows.chunk.
    """

    cos_TK: Tensor
    sin_TK: Tensor

    def __init__(
        self, shape: ModelShape, seed: int = 1234, tp: TensorParallel | None = None, recompute: str = "none"
    ) -> None:
        super().__init__()
        self.shape, self.tp, self.recompute, self.loss_chunk = shape, tp or TensorParallel(), recompute, 0
        self.embedding = VocabParallelEmbedding(shape.vocab_size, shape.hidden_size, self.tp)
        self.blocks = nn.ModuleList(Block(shape, self.tp) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps, self.tp, 1 / shape.mup_width)  # muP's output multiplier
        self.head = VocabParallelHead(shape.vocab_size, shape.hidden_size, self.tp)
        if shape.tie_embeddings:
            self.head.weight = self.embedding.weight
        cos_TK, sin_TK = rope_tables(shape.seq_length, shape.head_dim, shape.rope_theta, "cpu", shape.rope_scaling)
        both = math.sqrt(shape.attention_multiplier)  # queries and keys are rotated by the same tables
        self.register_buffer("cos_TK", cos_TK * both, persistent=False)
        self.register_buffer("sin_TK", sin_TK * both, persistent=False)
        init_params(self, seed)

    def hidden(self, tokens_BT: Tensor, documents: Documents = WHOLE_ROWS) -> Tensor:
        """Final normalised hidden states [B, T, D]; T may be shorter than the model's seq_length, not longer.

        Every rank returns all of it; gradients through it are summed over the ranks of ``tp``.
        """
        T, longest = tokens_BT.shape[1], self.shape.seq_length
        assert longest >= T, f"{T} tokens, the model was built for {longest}"
        x_BSD, places = self.embedding(tokens_BT), documents.position_ids_BT
        cos_TK, sin_TK = self.cos_TK[:T], self.sin_TK[:T]
        if places is not None:
            cos_TK, sin_TK = cos_TK[places][:, None], sin_TK[places][:, None]  # [B, 1, T, K/2]: the same for all heads
        for block in self.blocks:
            x_BSD = run_block(block, self.recompute, x_BSD, cos_TK, sin_TK, documents)
        return enter_region(compute_type(self.norm(x_BSD), self.tp), self.tp)

    def logits(self, tokens_BT: Tensor, documents: Documents = WHOLE_ROWS) -> Tensor:
        """Next-token logits [B, T, vocabulary], on every rank."""
        logits_BTV = F.linear(self.hidden(tokens_BT, documents), self.head.valid_weight)
        vocab_size = self.shape.vocab_size
        if self.tp.size == 1:
            return logits_BTV
        before = self.head.first_row
        return sum_forward(F.pad(logits_BTV, (before, vocab_size - before - logits_BTV.shape[-1])), self.tp)

    def forward(
        self, tokens_BT: Tensor, labels_BT: Tensor, weights_BT: Tensor | None = None, documents: Documents = WHOLE_ROWS
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Per-token cross-entropy in nats, fp32 [B, T]. With weights: (sum of weight * loss, the losses detached).

        Training passes weights: the head's gradient is then made in the forward, without a second pass over the
        vocabulary. The [B * T, vocabulary] logits never exist at once.
        """
        h_ND = self.hidden(tokens_BT, documents).flatten(0, 1)
        rows = VocabRows(self.head.first_row, self.head.weight.shape[0], self.tp, self.loss_chunk)
        labels_N, head_VD = labels_BT.flatten(), self.head.valid_weight
        if weights_BT is None:
            return token_losses(h_ND, head_VD, labels_N, rows).view(labels_BT.shape)
        loss, losses_N = weighted_loss(h_ND, head_VD, labels_N, weights_BT.flatten(), rows)
        return loss, losses_N.view(labels_BT.shape)


def init_params(model: GPT, seed: int) -> None:
    """TinyLlama's initialisation: N(0, 2/(5D)); projections into the residual stream N(0, 1/(D L^2)); norms at 1.

    Each tensor is drawn whole from a generator of (seed, its name) and then cut, so that a model's start does not
    depend on order, rank or tensor-parallel size. Under muP the embedding keeps its deviation at the base width and a
    head of its own starts at zero (Yang et al. 2022, Tensor Programs V, table 8 and D.2); the rest is muP's as it is.
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
        if shape.mup_base_width and not name.startswith("blocks."):
            whole *= 0.0 if name == "head.weight" else math.sqrt(shape.mup_width)
        with torch.no_grad():
            param.copy_(slice_whole(whole, param, model.tp))
