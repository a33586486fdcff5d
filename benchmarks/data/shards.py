"""Synthetic shards, written at the speed of the disk: lognormal documents of random tokens, each with its EOD."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_hexdigest

from megatron_lite.data.indexed_writer import IndexedWriter, write_index
from megatron_lite.data.sidecar import CHECKSUM_BLOCK, Layout, ShardMeta, measure_layout, read_meta, write_meta

VOCAB, EOD, SEED = 32_000, 0, 1234
PIECE = 1 << 14  # documents made at once; a shard repeats its piece, so that making it costs little


@dataclass(frozen=True)
class Corpus:
    """`domains` shards named train_d<i> of `documents` documents each, of `mean` tokens on average."""

    name: str
    domains: int
    documents: int
    mean: float
    hollow: bool = False  # see write_hollow

    def prefixes(self, folder: Path) -> list[str]:
        """Where the shards are."""
        return [str(folder / self.name / f"train_d{i:04d}") for i in range(self.domains)]

    def write(self, folder: Path) -> None:
        """All shards, with sidecars."""
        for i, prefix in enumerate(self.prefixes(folder)):
            if self.hollow:
                write_hollow(prefix, self.documents, self.mean)
            else:
                _write(prefix, self.documents, self.mean, np.random.default_rng([i, self.documents]))

    def samples(self, folder: Path, seq_length: int) -> int:
        """Samples that nine tenths of an epoch of the shards hold."""
        tokens = sum(meta.num_tokens for meta in map(read_meta, self.prefixes(folder)) if meta)
        return max(self.domains, tokens * 9 // 10 // seq_length)


def _lengths(mean: float, size: int, rng: np.random.Generator) -> np.ndarray:
    return np.maximum(2, rng.lognormal(np.log(mean) - 0.5, 1.0, size)).astype(np.int64)  # sigma 1, as web text has


def write_hollow(prefix: str, documents: int, mean: float, sidecar: bool = True) -> None:
    """A shard whose .bin is one hole, so that 100 GB need no disk: for what reads an index and hardly a token."""
    rng = np.random.default_rng(documents)
    lengths = np.resize(_lengths(mean, min(documents, PIECE * 61), rng), documents).astype(np.int32)
    tokens, (idx, raw) = int(lengths.sum(dtype=np.int64)), (prefix + ".idx", prefix + ".bin")
    os.makedirs(os.path.dirname(prefix), exist_ok=True)
    with open(raw, "wb") as file:
        file.truncate(2 * tokens)
    checksums = write_index(idx, np.dtype("<u2"), lengths)
    if sidecar:
        blocks, rest = divmod(2 * tokens, CHECKSUM_BLOCK)
        zeros = [xxh3_64_hexdigest(bytes(size)) for size in (CHECKSUM_BLOCK, rest)]
        layout = measure_layout(idx, raw, lengths, blocks * zeros[:1] + zeros[1:], checksums)
        _write_meta(prefix, documents, tokens, layout)


def _write(prefix: str, documents: int, mean: float, rng: np.random.Generator) -> None:
    size = min(PIECE, documents)
    lengths = _lengths(mean, size, rng)
    tokens = rng.integers(1, VOCAB, int(lengths.sum()), dtype=np.uint16)
    tokens[np.cumsum(lengths) - 1] = EOD
    with IndexedWriter(prefix, np.uint16) as writer:
        while writer.num_documents < documents:
            take = min(size, documents - writer.num_documents)
            writer.add_documents(tokens[: lengths[:take].sum()], lengths[:take])
    _write_meta(prefix, writer.num_documents, writer.num_tokens, writer.layout)


def _write_meta(prefix: str, documents: int, tokens: int, layout: Layout) -> None:
    meta = ShardMeta(
        tokenizer_sha256="synthetic", vocab_size=VOCAB, eod_id=EOD, num_documents=documents, num_tokens=tokens,
        num_bytes=4 * tokens, dtype="uint16", layout=layout,
    )  # fmt: skip
    write_meta(prefix, meta)


def drop_cache(prefixes: list[str]) -> None:
    """Asks the kernel to forget the shards' pages."""
    for prefix in prefixes:
        for end in (".bin", ".idx"):
            with open(prefix + end, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
