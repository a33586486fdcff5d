"""Megatron's .bin/.idx shards (MMIDIDX, version 1): what the bytes are, and a vectorised writer.

The .idx is little-endian and unaligned: magic 9 bytes, version u64, dtype code u8, sequence count N u64,
document index count D u64, lengths i32[N] in tokens, pointers i64[N] in bytes into the .bin, document indices i64[D]
from 0 to N, and, for multimodal shards only, modes i8[N]. The .bin is the tokens and nothing else.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_lite.data.sidecar import BlockHash, Layout, measure_layout
from megatron_lite.files import sync

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
# Megatron's limit, not 65,536: vocabularies in between get int32 from every producer of this format.
UINT16_VOCAB_LIMIT = 65500
CHUNK = 1 << 20  # sequences handled at once: about 30 MB of temporaries

IntArray = npt.NDArray[np.integer[Any]]


def optimal_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """The token dtype that Megatron picks for a vocabulary: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2") if vocab_size is not None and vocab_size < UINT16_VOCAB_LIMIT else np.dtype("<i4")


class IndexedWriter:
    """Write one shard, byte-identical to Megatron's builder, visible under its name only when it is whole.

    `with IndexedWriter(prefix, dtype) as writer: writer.add_document(ids)`. An exception inside leaves nothing behind
    and an older shard of that name untouched. Afterwards it knows num_documents, num_tokens, bin_xxh3 and
    `layout`, which belong into the sidecar.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.prefix = os.path.abspath(os.fspath(prefix))
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in DTYPES.values():
            raise ValueError(f"{self.prefix}: the format has no {self.dtype.name}; take optimal_dtype(vocab_size)")
        self.num_documents = self.num_tokens = 0
        self.bin_xxh3 = ""
        self.layout: Layout | None = None
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._hash, self._blocks = xxhash.xxh3_64(), BlockHash()
        self._bin_temporary, self._idx_temporary = (f"{self.prefix}.{e}.tmp-{os.getpid()}" for e in ("bin", "idx"))
        os.makedirs(os.path.dirname(self.prefix), exist_ok=True)
        self._file: BinaryIO = open(self._bin_temporary, "wb", buffering=1 << 20)  # noqa: SIM115

    def add_document(self, tokens: Sequence[int] | npt.NDArray[Any]) -> None:
        """Append one document of one sequence."""
        array = np.asarray(tokens, dtype=None if len(tokens) else self.dtype)
        self.add_documents(array, np.array([array.size]))

    def add_documents(self, tokens: npt.NDArray[Any], lengths: Sequence[int] | IntArray) -> None:
        """Append many documents at once: their tokens end to end, and how many tokens each has."""
        counts = np.asarray(lengths, dtype=np.int64)
        if tokens.ndim != 1 or counts.ndim != 1 or counts.sum() != tokens.size or (counts < 0).any():
            raise ValueError(f"{self.prefix}: {tokens.shape} tokens do not match lengths that sum to {counts.sum()}")
        if counts.size and counts.max() > np.iinfo(np.int32).max:
            raise ValueError(f"{self.prefix}: a document of {counts.max()} tokens; the format stops at 2^31 - 1")
        payload = self._cast(tokens).tobytes()
        self._file.write(payload)
        self._hash.update(payload)
        self._blocks.update(payload)
        self._lengths.append(counts.astype(np.int32))
        self.num_documents += counts.size
        self.num_tokens += tokens.size

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            for temporary in (self._bin_temporary, self._idx_temporary):
                if os.path.exists(temporary):
                    os.unlink(temporary)

    def _finish(self) -> None:
        self._file.close()
        sync(self._bin_temporary)
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        idx_checksums = write_index(self._idx_temporary, self.dtype, lengths)
        self.bin_xxh3 = self._hash.hexdigest()
        checksums = (self._blocks.digests(), idx_checksums)
        self.layout = measure_layout(self._idx_temporary, self._bin_temporary, lengths, *checksums)
        for old in (self.prefix + ".meta.json", self.prefix + ".idx"):  # never a new .bin under an old index
            if os.path.exists(old):
                os.unlink(old)
        for temporary, path in (
            (self._bin_temporary, self.prefix + ".bin"),
            (self._idx_temporary, self.prefix + ".idx"),
        ):
            os.replace(temporary, path)
            sync(os.path.dirname(path))

    def _cast(self, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if tokens.dtype == self.dtype or self.dtype.kind == "f" or tokens.size == 0:
            return tokens.astype(self.dtype, copy=False)
        limits, low, high = np.iinfo(self.dtype), tokens.min(), tokens.max()
        if tokens.dtype.kind not in "iu" or low < limits.min or high > limits.max:
            raise ValueError(
                f"{self.prefix}: tokens {low} to {high} do not fit {self.dtype.name}; take optimal_dtype(vocab_size)"
            )
        return tokens.astype(self.dtype)


def write_index(
    path: str,
    dtype: np.dtype[Any],
    lengths: npt.NDArray[np.int32],
    document_indices: IntArray | None = None,
) -> list[str]:
    """Write an .idx to `path`, flushed to disk; returns its block checksums.

    Sequences are taken to lie end to end in the .bin, and each to be a document where no document indices are given.
    """
    code = next(code for code, known in DTYPES.items() if known == dtype)
    num_indices = lengths.size + 1 if document_indices is None else len(document_indices)
    found, offset = BlockHash(), 0
    with open(path, "wb") as file:

        def write(data: Any) -> None:
            file.write(data)
            found.update(data)

        write(HEADER.pack(MAGIC, 1, code, lengths.size, num_indices))
        write(np.ascontiguousarray(lengths, dtype="<i4").data)
        for start in range(0, lengths.size, CHUNK):
            sizes = lengths[start : start + CHUNK].astype("<i8") * dtype.itemsize
            ends = offset + np.cumsum(sizes)
            write((ends - sizes).data)
            offset = int(ends[-1])
        for start in range(0, num_indices, CHUNK):
            whole = np.arange(start, min(start + CHUNK, num_indices), dtype="<i8")
            write((whole if document_indices is None else document_indices[whole].astype("<i8")).data)
    sync(path)
    return found.digests()
