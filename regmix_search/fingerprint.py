"""What all trials of a search have in common, so that their losses can be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lite.config import Config, to_dict
from regmix_search.config import SearchConfig

# Keys of the proxy's config that do not change what is learned or measured (its data has a digest of its own).
NOT_COMPARED = ("name", "out_dir", "seed", "mixture", "threads", "log", "checkpoint", "data")


def fingerprint_path(path: str | Path) -> Path:
    """Where a ledger keeps what its trials have in common."""
    return Path(path).with_suffix(".fingerprint.json")


def settings(config: SearchConfig, settled: Config | None = None) -> dict[str, Any]:
    """The part of the config that every loss of a search depends on: the ledger refuses trials of another.

    ``settled``: the proxy with what calibration has chosen, None before it has.
    """
    written = to_dict(config if settled is None else dataclasses.replace(config, proxy=settled))
    proxy = {key: value for key, value in written["proxy"].items() if key not in NOT_COMPARED}
    proxy["seq_length"] = config.proxy.data.seq_length
    own_text = [] if config.shards.data_dir else ["corpus", "tokenizer"]
    kept = {key: written[key] for key in ("seed", "shards", "mixtures", *own_text)}
    places = (("shards", "data_dir"), ("corpus", "dir"))  # folders may move: their content has a digest of its own
    grows = [("mixtures", key) for key in ("count", "rounds", "batch", "max_flops")]
    for section, key in (("shards", "workers"), ("corpus", "workers"), *grows, *places):
        kept.get(section, {}).pop(key, None)
    return {"settings": {**kept, "proxy": proxy, "run_tokens": config.run_tokens}}


def with_defaults(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier fingerprint as a program that knows the keys of `now` would have written it.

    A key that there was not yet was at its default. Whole sections are none: a search on your shards has no corpus.
    """
    known, old, new = to_dict(SearchConfig()), then.get("settings"), now.get("settings")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return dict(then)
    sections = [name for name in old if isinstance(old[name], dict) and isinstance(new.get(name), dict)]
    return {**then, "settings": old | {name: _fill(old[name], new[name], known[name]) for name in sections}}


def _fill(then: Mapping[str, Any], now: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """`then` with the defaults of keys that only `now` has."""
    filled = dict(then)
    for key in now.keys() & default.keys():
        if key not in then:
            filled[key] = default[key]
        elif all(isinstance(each[key], dict) for each in (then, now, default)):
            filled[key] = _fill(then[key], now[key], default[key])
    return filled
