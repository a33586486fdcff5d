"""Reading a mixture.yaml with errors that say where: file, line or key, value, and what to write instead."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

OUR_KEYS = ("train", "valid", "data_dir", "epochs", "provenance", "version")
# Everything that RegMix's generator and trainer put beside the weights. Ours come from the training config.
REGMIX_SAMPLING = "seed temperature min_strength max_strength minimum sample_multiplier maximum_usage"
REGMIX_TRAINING = (
    "model_name name out_dir total_devices num_of_devices num_of_nodes global_batch_size micro_batch_size batch_size "
    "block_size max_step warmup_steps learning_rate min_lr decay_lr weight_decay beta1 beta2 grad_clip "
    "eval_iters log_step_interval save_step_interval eval_step_interval "
    "reset_embedding group_level_sampling only_save_model load_from"
)
KNOWN_KEYS = frozenset((*OUR_KEYS, *REGMIX_SAMPLING.split(), *REGMIX_TRAINING.split()))
ENTRY_KEYS = ("weight", "path", "paths", "max_epochs")


def read_yaml(where: str) -> dict[str, Any]:
    """safe_load, but a key given twice is an error: YAML keeps the last one without a word."""
    try:
        text = Path(where).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise ValueError(f"{where}: no such mixture file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not valid YAML: {error}") from error
    _refuse_duplicates(where, root)
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise ValueError(f"{where}: expected a mapping with a `train:` section")
    for key in raw:
        if key not in KNOWN_KEYS:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, OUR_KEYS)}; known are {', '.join(OUR_KEYS)}")
    if raw.get("version", 1) != 1:
        raise ValueError(f"{where}: version is {raw['version']!r}, this program reads version 1")
    return raw


def _refuse_duplicates(where: str, node: yaml.Node | None) -> None:
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in first:
                raise ValueError(f"{where}, line {line}: {name} was already given on line {first[name]}; keep one")
            first[name] = line
            _refuse_duplicates(where, value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(where, item)


def section(where: str, raw: dict[str, Any], key: str) -> dict[str, Any]:
    """One top-level mapping of the file; empty when it is absent."""
    found = raw.get(key) or {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{where}: {key} is {found!r}, expected a mapping of names")
    return found


def read_entry(where: str, section: str, key: str, value: Any) -> dict[str, Any]:
    """One line of train: or valid: as {weight, paths, max_epochs}."""
    entry = value if isinstance(value, Mapping) else {"weight": value}
    for name in entry:
        if name not in ENTRY_KEYS:
            known = ", ".join(ENTRY_KEYS)
            raise ValueError(
                f"{where}: {section}.{key}: unknown key {name!r}{nearest(str(name), ENTRY_KEYS)}; known are {known}"
            )
    if "path" in entry and "paths" in entry:
        raise ValueError(f"{where}: {section}.{key} has both path and paths; keep one")
    paths = [entry["path"]] if "path" in entry else entry.get("paths", [])
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{where}: {section}.{key}.paths is {paths!r}, expected shard prefixes")
    if "paths" in entry and len(set(paths)) != max(1, len(paths)):
        raise ValueError(f"{where}: {section}.{key}.paths is empty or names a shard twice: {paths}")
    weight = number(where, f"{section}.{key}", entry.get("weight"))
    if weight < 0:
        raise ValueError(f"{where}: {section}.{key} is {weight:g}; a weight is 0 (never) or positive")
    cap = entry.get("max_epochs")
    if cap is not None and (cap := number(where, f"{section}.{key}.max_epochs", cap)) <= 0:
        raise ValueError(f"{where}: {section}.{key}.max_epochs is {cap:g}; give a positive number, or leave it out")
    return {"weight": weight, "paths": paths, "max_epochs": cap}


def number(where: str, key: str, value: Any) -> float:
    """A finite float. YAML reads 1e-5 as text, and RegMix's collector dropped such weights: take them as numbers."""
    if isinstance(value, int | float | np.number | str) and not isinstance(value, bool):
        try:
            found = float(value)
        except (ValueError, OverflowError):
            found = math.nan
        if math.isfinite(found):
            return found
    raise ValueError(f"{where}: {key} is {value!r}, expected a finite number")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name, or nothing when no name is close."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]}?)" if match else ""
