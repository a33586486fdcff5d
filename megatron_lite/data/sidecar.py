"""The .meta.json beside a shard: which tokenizer made the tokens, how many there are, how much text is behind them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_lite.files import atomic_write


@dataclass(frozen=True)
class ShardMeta:
    """What the shard's tokens mean; stored beside it as <prefix>.meta.json. Unknown keys are kept in `extra`."""

    tokenizer_sha256: str
    vocab_size: int
    eod_id: int | None
    num_documents: int
    num_tokens: int  # EOD tokens included
    num_bytes: int  # UTF-8 bytes of text behind the tokens
    dtype: str  # numpy's name: uint16, int32
    sources: list[dict[str, Any]] = field(default_factory=list)
    bin_xxh3: str = ""  # xxh3-64 of the .bin; IndexedWriter computes it
    extra: dict[str, Any] = field(default_factory=dict)


def read_meta(prefix: str | os.PathLike[str]) -> ShardMeta | None:
    """The sidecar of a shard, or None when the shard has none. ValueError names the file and the key."""
    path = Path(f"{os.fspath(prefix)}.meta.json")
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it, or tokenise the shard again") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object; delete it, or tokenise the shard again")
    known = [f.name for f in fields(ShardMeta) if f.name != "extra"]
    for key in ("vocab_size", "eod_id", "num_documents", "num_tokens", "num_bytes"):
        value = raw.get(key)
        if not (isinstance(value, int) and not isinstance(value, bool)) and not (key == "eod_id" and value is None):
            raise ValueError(f"{path}: {key} is {value!r}, expected an integer; tokenise the shard again")
    for key in ("tokenizer_sha256", "dtype"):
        if not isinstance(raw.get(key), str):
            raise ValueError(f"{path}: {key} is {raw.get(key)!r}, expected text; tokenise the shard again")
    return ShardMeta(
        **{key: raw[key] for key in known if key in raw}, extra={k: v for k, v in raw.items() if k not in known}
    )


def write_meta(prefix: str | os.PathLike[str], meta: ShardMeta) -> None:
    """Write <prefix>.meta.json atomically. Call it last: a sidecar says that the shard is whole."""
    raw = asdict(meta)
    raw.update(raw.pop("extra"))
    atomic_write(f"{os.fspath(prefix)}.meta.json", json.dumps(raw, indent=1, ensure_ascii=False) + "\n")
