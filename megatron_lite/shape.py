"""The sizes of a model and what follows from them by arithmetic: parameters and FLOPs. No torch in here.

RegMix's presets are its TinyLlama family (model_training/lit_gpt/config.py of sail-sg/regmix): untied embeddings,
multi-head attention, SwiGLU. DoReMi's (Xie et al. 2023, table 5) are GELU blocks with ffn 4 d; SwiGLU at 8/3 d has as
many weights. Its 120M and 280M differ in the vocabulary alone, which configs/model/ sets, with the tied embeddings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_lite.config import ModelConfig, RopeScaling
from megatron_lite.schema import nearest

DEFAULT_VOCAB_SIZE = 50432  # GPT-NeoX's 50,277 tokens padded to 64, as RegMix has it

# name: (num_layers, num_heads, num_kv_heads, hidden_size, ffn_hidden_size)
PRESETS: dict[str, tuple[int, int, int, int, int]] = {
    "tinyllama_1M": (2, 8, 8, 256, 512),
    "tinyllama_60M": (10, 8, 8, 768, 1536),
    "tinyllama_1_1b": (22, 16, 16, 2048, 5632),
    "doremi_120M": (12, 12, 12, 768, 2048),
    "doremi_280M": (12, 12, 12, 768, 2048),
    "doremi_8B": (32, 32, 32, 4096, 11008),  # 8/3 d rounded up to a multiple of 256, as Llama does
    # CPU sizes of the demo: the proxy trains in seconds, the target has over four times its body.
    "demo_proxy": (2, 4, 4, 64, 128),
    "demo_target": (4, 4, 4, 128, 320),
}


@dataclass(frozen=True)
class ModelShape:
    """Every size of a GPT, resolved."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    vocab_size: int
    seq_length: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    rope_scaling: RopeScaling | None = None
    mup_base_width: int | None = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mup_width(self) -> float:
        """Hidden size in units of ``mup_base_width``; 1 under the standard parametrisation."""
        return self.hidden_size / self.mup_base_width if self.mup_base_width else 1.0

    @property
    def attention_multiplier(self) -> float:
        """Of attention logits, over 1 / sqrt(K). muP: 8 / K in all, which is the standard at K = 64 (microsoft/mup)."""
        return 8 / math.sqrt(self.head_dim) if self.mup_base_width else 1.0

    @property
    def body_matmul_params(self) -> int:
        """Weights of the blocks that multiply activations (attention and SwiGLU)."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.ffn_hidden_size)

    @property
    def non_embedding_params(self) -> int:
        """Parameters without the input embedding and the output head (what RegMix's sizes count)."""
        return self.body_matmul_params + (2 * self.num_layers + 1) * self.hidden_size

    @property
    def params(self) -> int:
        """All parameters."""
        tables = 1 if self.tie_embeddings else 2
        return self.non_embedding_params + tables * self.vocab_size * self.hidden_size

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs a token, forward and backward: 6 N_matmul + 12 L d S (PaLM, appendix B), head included.

        The attention term counts the full S x S square, the convention in which most MFU figures are published.
        """
        matmul = self.body_matmul_params + self.vocab_size * self.hidden_size
        return 6 * matmul + 12 * self.num_layers * self.hidden_size * self.seq_length


def resolve_shape(config: ModelConfig, seq_length: int, vocab_size: int | None) -> ModelShape:
    """Preset + overrides + the shards' vocabulary -> sizes; ValueError names the key that does not fit."""
    if config.preset not in PRESETS:
        raise ValueError(f"model.preset: no preset {config.preset!r}.{nearest(config.preset, PRESETS)}")
    layers, heads, kv_heads, hidden, ffn = PRESETS[config.preset]
    heads = config.num_heads or heads
    shape = ModelShape(
        num_layers=config.num_layers or layers,
        hidden_size=config.hidden_size or hidden,
        num_heads=heads,
        num_kv_heads=config.num_kv_heads or (heads if config.num_heads else kv_heads),
        ffn_hidden_size=config.ffn_hidden_size or ffn,
        vocab_size=_vocab_size(config.vocab_size, vocab_size),
        seq_length=seq_length,
        rope_theta=config.rope_theta,
        norm_eps=config.norm_eps,
        tie_embeddings=config.tie_embeddings,
        rope_scaling=config.rope_scaling,
        mup_base_width=config.mup_base_width,
    )
    _check(shape)
    return shape


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding and the head over all tensor-parallel ranks.

    The vocabulary itself where tp divides it. Otherwise up to a multiple of 64 * tp: rows must be added anyway, and
    matmuls are fastest in multiples of 128 bytes (NVIDIA, Matrix Multiplication Background, for A100), 64 in bf16.
    """
    multiple = 64 * tp_size
    return vocab_size if vocab_size % tp_size == 0 else -(-vocab_size // multiple) * multiple


def _vocab_size(configured: int | None, in_shards: int | None) -> int:
    if configured is None:
        return in_shards or DEFAULT_VOCAB_SIZE
    if in_shards is not None and configured < in_shards:
        raise ValueError(
            f"model.vocab_size={configured} is below the shards' vocabulary, {in_shards}; leave it out or raise it"
        )
    return configured


def _check(shape: ModelShape) -> None:
    h, n, kv = shape.hidden_size, shape.num_heads, shape.num_kv_heads
    if h % n:
        raise ValueError(f"model.hidden_size={h} is not divisible by model.num_heads={n}")
    if shape.head_dim % 2:
        raise ValueError(f"model: head size {h}/{n}={shape.head_dim} must be even for rotary embeddings")
    if n % kv:
        raise ValueError(f"model.num_heads={n} is not divisible by model.num_kv_heads={kv}")
    scaling = shape.rope_scaling
    if scaling and not (scaling.factor >= 1 and 0 < scaling.low_freq_factor < scaling.high_freq_factor):
        raise ValueError(f"model.rope_scaling={scaling}: needs factor >= 1 and 0 < low_freq_factor < high_freq_factor")
    for name in ("num_layers", "ffn_hidden_size", "vocab_size", "seq_length", "mup_base_width"):
        if (size := getattr(shape, name)) is not None and size < 1:
            raise ValueError(f"model: {name}={getattr(shape, name)} must be at least 1")
