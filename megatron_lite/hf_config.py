"""The config.json of a Hugging Face Llama, from our shape and back to our config."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from megatron_lite.config import ModelConfig, RopeScaling
from megatron_lite.schema import parse
from megatron_lite.shape import ModelShape

ONLY = {  # key of config.json: the one value that our model can represent
    "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0, "quantization_config": None, "auto_map": None, "sliding_window": None,
}  # fmt: skip


def hf_config(shape: ModelShape, eod_id: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """config.json in the form that transformers 4 and 5 both read."""
    scaling = shape.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size, "intermediate_size": shape.ffn_hidden_size, "head_dim": shape.head_dim,
        "num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads, "max_position_embeddings": shape.seq_length,
        "rms_norm_eps": shape.norm_eps, "rope_theta": shape.rope_theta,
        "rope_scaling": {"rope_type": "llama3", **dataclasses.asdict(scaling)} if scaling else None,
        "tie_word_embeddings": shape.tie_embeddings, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "attention_dropout": 0.0, "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": None,
    }  # fmt: skip


def model_config(path: Path) -> ModelConfig:
    """config.json -> our model block; ValueError for what it cannot say."""
    raw = read_json(path)
    scaling = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}  # transformers 4, 5
    theta = scaling.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    try:
        hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
        sizes = {"hidden_size": hidden, "num_heads": heads, "num_layers": raw["num_hidden_layers"]}
        sizes |= {"ffn_hidden_size": raw["intermediate_size"], "vocab_size": raw["vocab_size"]}
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing; this is not a Llama's config.json") from None
    found = {**raw, "partial_rotary_factor": scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor"))}
    wrong = [f"{k}={found[k]!r}, only {v!r}" for k, v in ONLY.items() if found.get(k) not in (None, v)]
    if raw.get("head_dim") not in (None, hidden // heads):
        wrong.append(f"head_dim={raw['head_dim']}, only hidden_size / num_attention_heads = {hidden // heads}")
    if kind not in ("default", "llama3"):
        wrong.append(f"rope_type={kind!r}, only default and llama3")
    if wrong:
        raise ValueError(f"{path}: our model cannot represent {'; '.join(wrong)}")
    rope = None
    if kind == "llama3":
        scaling.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
        known = {f.name: scaling.get(f.name) for f in dataclasses.fields(RopeScaling)}
        rope = parse(RopeScaling, known, str(path), "rope_scaling.")
    extra = {"rope_theta": theta, "norm_eps": raw.get("rms_norm_eps", 1e-6), "rope_scaling": rope}
    extra |= {"num_kv_heads": raw.get("num_key_value_heads") or heads}
    extra |= {"tie_embeddings": bool(raw.get("tie_word_embeddings", False))}
    return ModelConfig(**sizes, **extra)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value
