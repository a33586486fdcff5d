"""Weights alone, from any folder that holds a model: a checkpoint, a run, or Hugging Face's Llama."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_lite import checkpoint
from megatron_lite.config import diff, to_dict
from megatron_lite.hf import import_hf, our_shapes
from megatron_lite.hf_config import read_json
from megatron_lite.schema import parse
from megatron_lite.shape import ModelShape, resolve_shape


@dataclass(frozen=True)
class Weights:
    """Logical tensors by our names, and what belongs to them."""

    tensors: dict[str, Tensor]
    shape: ModelShape
    tokenizer: dict[str, Any]  # vocab_size, eod_id, tokenizer_sha256 of the shards; empty where nobody says
    source: Path  # the folder that was read


def read_weights(path: str | Path) -> Weights:
    """Weights of a step_* folder, of a run folder (its newest complete checkpoint) or of a Hugging Face folder."""
    path = find_weights(Path(path))
    if (path / "config.json").is_file():
        tensors, config = import_hf(path)
        seq_length = read_json(path / "config.json").get("max_position_embeddings", 2048)  # LlamaConfig's default
        return Weights(tensors, resolve_shape(config, seq_length, None), {}, path)
    state = checkpoint.load_state(path)
    shape = parse(ModelShape, state["plan"]["shape"], str(path / "state.json"), "plan.shape.")
    tensors = checkpoint.load_tensors(path, "model.safetensors", our_shapes(shape))
    return Weights(tensors, shape, state.get("tokenizer") or {}, path)


def find_weights(path: Path) -> Path:
    """A Hugging Face folder or a verified step_* folder as it is; a run folder's newest checkpoint that verifies."""
    if (path / "config.json").is_file():
        return path
    found = checkpoint.find_checkpoint(path, str(path) if (path / "state.json").is_file() else "auto")
    if found is None:
        raise ValueError(f"{path}: no complete checkpoint here, no run folder with one, and no Hugging Face folder")
    return found


def initial_weights(path: str | Path, shape: ModelShape, key: str = "init_from") -> dict[str, Tensor]:
    """What ``key`` names: weights for a model of that shape; ValueError lists every model.* key that is not theirs."""
    weights = read_weights(path)
    # weights do not depend on the length of a sample
    there, here = (to_dict(dataclasses.replace(s, seq_length=1)) for s in (weights.shape, shape))
    if wrong := diff(here, there, "model."):
        raise ValueError(f"{key}={path}: these weights need {'; '.join(wrong)}")
    return weights.tensors
