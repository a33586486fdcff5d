"""The .meta.json beside a shard: which tokenizer made the tokens, what is in the shard, and checksums of its bytes.

Its `layout` lets a reader open the shard without reading the index. The last key is a hash of all text before it, so
that a sidecar damaged anywhere is refused, not believed. Sidecars of version 1 have neither, and are still read.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_lite.data.mapped import map_file
from megatron_lite.files import atomic_write

VERSION = 2
BLOCK = 256  # documents whose tokens are counted together: what samples.py keeps together in every epoch
CHECKSUM_BLOCK = 64 << 20  # bytes under one checksum
SEAL = b',\n "meta_xxh3": "'


@dataclass(frozen=True)
class Layout:
    """With this a shard is opened without reading its index: sizes, shape, and hashes of both files."""

    bin_size: int  # bytes
    idx_size: int  # bytes
    probe: str  # xxh3-64 of four places in .idx and .bin: other files of the same sizes are noticed
    sequences_are_documents: bool  # no document is empty of sequences or has several
    contiguous: bool  # sequences lie end to end from the first byte of the .bin to its last
    max_document_length: int  # tokens
    block_tokens: str  # base64 of the tokens in each block of 256 documents, as little-endian integers of equal width
    checksum_block: int  # bytes
    bin_checksums: list[str]  # xxh3-64 of each checksum_block bytes
    idx_checksums: list[str]


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
    layout: Layout | None = None  # IndexedWriter.layout
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def block_tokens(self) -> npt.NDArray[np.int64] | None:
        """Tokens in each block of 256 documents, decoded; None without a layout."""
        return None if self.layout is None else _unpack(self.layout.block_tokens, self.num_documents, self.num_tokens)


KNOWN = [f.name for f in fields(ShardMeta) if f.name not in ("extra", "layout")]
KINDS = {f.name: str(f.type).partition("[")[0] for f in fields(Layout)}  # JSON types by key


def count_blocks(lengths: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Tokens in each block of 256 documents with these lengths."""
    return np.add.reduceat(np.append(lengths, 0), np.arange(0, len(lengths), BLOCK), dtype=np.int64)


def measure_layout(
    idx_path: str,
    bin_path: str,
    document_lengths: npt.NDArray[Any],
    bin_checksums: list[str],
    idx_checksums: list[str],
    shape: tuple[bool, bool] = (True, True),
) -> Layout:
    """The layout of two files; `shape` is (sequences_are_documents, contiguous)."""
    (idx, idx_probe), (raw, bin_probe) = map_file(idx_path), map_file(bin_path)
    probe, longest = xxhash.xxh3_64_hexdigest(idx_probe + bin_probe), int(document_lengths.max(initial=0))
    blocks = _pack(count_blocks(document_lengths))
    return Layout(raw.size, idx.size, probe, *shape, longest, blocks, CHECKSUM_BLOCK, bin_checksums, idx_checksums)


def _pack(block_tokens: npt.NDArray[np.int64]) -> str:
    """Layout.block_tokens: 100M documents of 500 tokens take 1.6 MB."""
    width = (int(block_tokens.max(initial=0)).bit_length() + 7) // 8
    octets = np.ascontiguousarray(block_tokens, dtype="<i8").view(np.uint8).reshape(-1, 8)[:, :width]
    return base64.b64encode(octets.tobytes()).decode()


def _unpack(text: str, num_documents: int, num_tokens: int) -> npt.NDArray[np.int64]:
    num_blocks = -(-num_documents // BLOCK)
    raw = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    width = raw.size // max(num_blocks, 1)
    if raw.size != width * num_blocks or width > 8:
        raise ValueError(f"block_tokens has {raw.size} bytes, not a multiple of {num_blocks} blocks")
    octets = np.zeros((num_blocks, 8), dtype=np.uint8)
    octets[:, :width] = raw.reshape(num_blocks, width)
    values = octets.view("<i8").reshape(-1)
    if values.sum() != num_tokens or values.min(initial=0) < 0:
        raise ValueError(f"block_tokens sum to {values.sum()}, num_tokens is {num_tokens}")
    return values


class BlockHash:
    """xxh3-64 of every `block` bytes of a stream."""

    def __init__(self, block: int = CHECKSUM_BLOCK) -> None:
        self.block, self.size, self._parts = block, 0, list[xxhash.xxh3_64]()

    def update(self, data: Any) -> None:
        """Take in the next bytes: any buffer."""
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        while view:
            if self.size % self.block == 0:
                self._parts.append(xxhash.xxh3_64())
            piece = view[: self.block - self.size % self.block]
            self._parts[-1].update(piece)
            self.size, view = self.size + len(piece), view[len(piece) :]

    def digests(self) -> list[str]:
        """The checksums so far, that of a last partial block included."""
        return [part.hexdigest() for part in self._parts]


def read_meta(prefix: str | os.PathLike[str]) -> ShardMeta | None:
    """The sidecar of a shard, or None when the shard has none. ValueError names the file and the key."""
    path = f"{os.fspath(prefix)}.meta.json"
    try:
        with open(path, "rb") as file:
            text = file.read()
    except FileNotFoundError:
        return None
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it, or tokenise the shard again") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object; delete it, or tokenise the shard again")
    for problem in _problems(raw, text):
        raise ValueError(f"{path}: {problem}; tokenise the shard again, or let data_tools/inspect_data.py write it")
    layout = raw.pop("layout", None)
    return ShardMeta(
        **{key: raw[key] for key in KNOWN if key in raw},
        layout=Layout(**layout) if layout else None,
        extra={k: v for k, v in raw.items() if k not in KNOWN and k not in ("version", "meta_xxh3")},
    )


def _problems(raw: dict[str, Any], text: bytes) -> Iterator[str]:
    """What is wrong with a sidecar, first thing first."""
    body, seal, rest = text.rpartition(SEAL)
    if ("version" in raw or "meta_xxh3" in raw) and not (seal and rest[:16] == xxhash.xxh3_64_hexdigest(body).encode()):
        yield "its own checksum is wrong: it was edited or damaged"
    if raw.get("version", VERSION) != VERSION:
        yield f"version is {raw['version']!r}, this program knows {VERSION}"
    for key in ("vocab_size", "eod_id", "num_documents", "num_tokens", "num_bytes"):
        if type(raw.get(key)) is not int and not (key == "eod_id" and raw.get(key) is None):
            yield f"{key} is {raw.get(key)!r}, expected an integer"
    for key in ("tokenizer_sha256", "dtype"):
        if not isinstance(raw.get(key), str):
            yield f"{key} is {raw.get(key)!r}, expected text"
    layout = raw.get("layout") or {}
    if layout and (not isinstance(layout, dict) or {k: type(v).__name__ for k, v in layout.items()} != KINDS):
        yield f"layout does not hold what version {VERSION} has in it"


def write_meta(prefix: str | os.PathLike[str], meta: ShardMeta) -> None:
    """Write <prefix>.meta.json atomically. Call it last: a sidecar says that the shard is whole."""
    raw = {"version": VERSION, **asdict(meta)}
    raw.update(raw.pop("extra"))
    body = json.dumps(raw, indent=1, ensure_ascii=False).removesuffix("\n}").encode()
    seal = SEAL + xxhash.xxh3_64_hexdigest(body).encode() + b'"\n}\n'
    atomic_write(f"{os.fspath(prefix)}.meta.json", body + seal)


@dataclass(frozen=True)
class TokenizerFacts:
    """What all sidecars agree on; None where no shard says."""

    vocab_size: int | None
    eod_id: int | None
    tokenizer_sha256: str | None


def shared_facts(metas: Mapping[str, ShardMeta | None]) -> TokenizerFacts:
    """The tokenizer behind shards, from their sidecars by prefix (None: has none). ValueError names two that differ."""
    known = [(prefix, meta) for prefix, meta in metas.items() if meta]
    for prefix, meta in known:
        for key in ("tokenizer_sha256", "vocab_size", "eod_id"):
            ours, theirs = getattr(known[0][1], key), getattr(meta, key)
            if ours != theirs:
                raise ValueError(
                    f"{prefix}.meta.json says {key} {theirs!r}, {known[0][0]}.meta.json says {ours!r}: "
                    "all shards of a mixture need one tokenizer; tokenise one of the two again"
                )
    facts = [TokenizerFacts(meta.vocab_size, meta.eod_id, meta.tokenizer_sha256) for _, meta in known[:1]]
    return facts[0] if facts else TokenizerFacts(None, None, None)
