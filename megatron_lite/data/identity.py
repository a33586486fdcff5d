"""What tells two data sets apart: the tokenizer behind shards, and what stands for a shard's content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.data.sidecar import ShardMeta, read_meta

PEEK = 1 << 16  # bytes at either end of a file that stand for its content where there is no sidecar


@dataclass(frozen=True)
class TokenizerFacts:
    """What all sidecars agree on; None where no shard says."""

    vocab_size: int | None
    eod_id: int | None
    tokenizer_sha256: str | None


def shared_facts(prefixes: Sequence[str], known: Mapping[str, ShardMeta | None]) -> TokenizerFacts:
    """The tokenizer behind these shards. ValueError names two that disagree. Shards without a sidecar are not asked.

    `known`: sidecars that were read already; the others are read here.
    """
    first: tuple[str, ShardMeta] | None = None
    for prefix in prefixes:
        meta = known[prefix] if prefix in known else read_meta(prefix)
        if meta is None:
            continue
        first = first or (prefix, meta)
        for key in ("tokenizer_sha256", "vocab_size", "eod_id"):
            ours, theirs = getattr(first[1], key), getattr(meta, key)
            if ours != theirs:
                raise ValueError(
                    f"{prefix}.meta.json says {key} {theirs!r}, {first[0]}.meta.json says {ours!r}: "
                    "all shards of a mixture need one tokenizer; tokenise one of the two again"
                )
    if first is None:
        return TokenizerFacts(None, None, None)
    return TokenizerFacts(first[1].vocab_size, first[1].eod_id, first[1].tokenizer_sha256)


def shard_identity(prefix: str) -> dict[str, Any]:
    """Sizes in bytes, and a hash of the sidecar; without one, of both ends of the two files."""
    paths = [Path(prefix + end) for end in (".bin", ".idx")]
    sidecar = Path(prefix + ".meta.json")
    digest = hashlib.sha256()
    if sidecar.is_file():
        digest.update(sidecar.read_bytes())
    else:
        for path in paths:
            with open(path, "rb") as file:
                digest.update(file.read(PEEK))
                file.seek(max(0, os.path.getsize(path) - PEEK))
                digest.update(file.read(PEEK))
    return {"name": paths[0].stem, "bin": os.path.getsize(paths[0]), "idx": os.path.getsize(paths[1])} | {
        "sha256": digest.hexdigest()
    }
