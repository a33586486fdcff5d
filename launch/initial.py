"""What a run takes from the folder that `init_from` names: the model's sizes, and the tokenizer that it must share."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from megatron_lite import checkpoint
from megatron_lite.config import Config, ModelConfig, diff, to_dict
from megatron_lite.data.mixture import Mixture
from megatron_lite.data.sidecar import read_meta, shared_facts
from megatron_lite.hf_config import model_config, read_json
from megatron_lite.schema import parse

PRESET = "init_from"  # of model.preset: sizes are those of the weights


def resolve(config: Config) -> Config:
    """The config with the sizes of its weights written out, where it leaves them to init_from.

    ValueError where the shards were made with another tokenizer than the weights, naming both.
    """
    if config.model.preset == PRESET:
        config = dataclasses.replace(config, model=sizes(config))
    if config.init_from and config.mixture and Path(config.init_from).is_dir():  # a run that resumes does not need it
        check_tokenizer(config, Path(config.init_from))
    return config


def sizes(config: Config) -> ModelConfig:
    """The model block of the weights in init_from; ValueError for any other model.* key that is set too."""
    if not config.init_from:
        raise ValueError("model.preset=init_from takes its sizes from a folder of weights: set init_from=DIR")
    if also := diff(to_dict(ModelConfig(preset=PRESET)), to_dict(config.model), "model."):
        keys = ", ".join(line.partition(":")[0] for line in also)
        raise ValueError(f"model.preset=init_from takes every size from {config.init_from}: remove {keys}")
    folder = Path(config.init_from)
    if (folder / "config.json").is_file():
        return model_config(folder / "config.json")
    state = our_state(folder)
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    shape = {key: value for key, value in state["plan"]["shape"].items() if key in known}
    return parse(ModelConfig, shape, str(folder), "model.")


def check_tokenizer(config: Config, folder: Path) -> None:
    """ValueError where the shards of the mixture have another tokenizer, or more token ids, than the weights."""
    assert config.mixture
    mixture = Mixture.load(config.mixture, config.data.data_dir)
    shards = shared_facts({prefix: read_meta(prefix) for domain in mixture.domains for prefix in domain.prefixes})
    theirs, rows = tokenizer_of(folder), config.model.vocab_size
    where, here = f"init_from={folder}", f"the shards of {config.mixture}"
    if rows and shards.vocab_size and shards.vocab_size > rows:
        raise ValueError(
            f"{where} has {rows} token ids, {here} have {shards.vocab_size}: tokenise the text with the tokenizer of "
            "the weights"
        )
    if theirs and shards.tokenizer_sha256 and shards.tokenizer_sha256 != theirs:
        raise ValueError(
            f"{where} was trained with the tokenizer of sha256 {theirs}, {here} were made with "
            f"{shards.tokenizer_sha256}: the same ids would mean other text. Tokenise the text with the tokenizer of "
            "the weights; or, where you know that both give the same ids, start from a copy without its tokenizer"
        )


def tokenizer_of(folder: Path) -> str | None:
    """sha256 of what defines the ids of a checkpoint, a run, an export or any Hugging Face folder; None: unknown."""
    if (folder / "megatron_lite.json").is_file():  # an export: of the tokenizer that made the shards
        return _sha256(read_json(folder / "megatron_lite.json"))
    if (folder / "config.json").is_file():
        files = [path for path in (folder / "tokenizer.json", *sorted(folder.glob("*.model"))) if path.is_file()]
        return hashlib.sha256(files[0].read_bytes()).hexdigest() if files else None
    return _sha256(our_state(folder).get("tokenizer") or {})


def our_state(folder: Path) -> dict[str, Any]:
    """state.json of a step_* folder, or of a run's newest complete one."""
    found = [folder] if (folder / "state.json").is_file() else checkpoint.complete_checkpoints(folder)
    if not found:
        raise ValueError(f"init_from={folder}: no complete checkpoint, no run with one, and no Hugging Face folder")
    return checkpoint.load_state(found[-1])


def _sha256(facts: dict[str, Any]) -> str | None:
    found = facts.get("tokenizer_sha256")
    return str(found) if found else None
