"""Megatron's .bin/.idx shards (MMIDIDX, version 1): a validating reader and a vectorised writer.

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

from megatron_lite.data.sidecar import ShardMeta, read_meta, write_meta
from megatron_lite.files import sync

__all__ = ["IndexedDataset", "IndexedWriter", "ShardMeta", "optimal_dtype", "read_meta", "resolve_prefix", "write_meta"]

MAGIC = b"MMIDIDX\x00\x00"
FAIRSEQ_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
# Megatron's limit, not 65,536: vocabularies in between get int32 from every producer of this format.
UINT16_VOCAB_LIMIT = 65500
CHECK_CHUNK = 1 << 20  # sequences validated at once: about 30 MB of temporaries

IntArray = npt.NDArray[np.integer[Any]]


def optimal_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """The token dtype that Megatron picks for a vocabulary: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2") if vocab_size is not None and vocab_size < UINT16_VOCAB_LIMIT else np.dtype("<i4")


def resolve_prefix(path: str | os.PathLike[str]) -> str:
    """Absolute shard prefix for X, X.bin, X.idx, or an X whose shard is X_text_document (Megatron's own file name)."""
    text = os.path.abspath(os.fspath(path))
    stem = text[:-4] if text.endswith((".bin", ".idx")) else text
    for prefix in (stem, stem + "_text_document"):
        if os.path.isfile(prefix + ".idx"):
            if not os.path.isfile(prefix + ".bin"):
                raise ValueError(f"{prefix}.bin is missing, but its .idx is there: copy it too, or tokenise again")
            return prefix
    raise ValueError(f"no shard at {stem}: neither {stem}.idx nor {stem}_text_document.idx exists")


class IndexedDataset:
    """Read-only view of one shard. Everything that the .idx claims is checked when it is opened.

    len() counts sequences (one a document, unless sentences were split). Arrays are memory maps that own their mapping,
    and [i] is a copy, so nothing dangles when the dataset is collected. GPT-NeoX swaps the two float codes: say so.
    """

    def __init__(self, path: str | os.PathLike[str], neox_float_codes: bool = False) -> None:
        self.prefix = resolve_prefix(path)
        self._idx_path, self._bin_path = self.prefix + ".idx", self.prefix + ".bin"
        idx = _map_bytes(self._idx_path)
        code, num_sequences, num_indices = self._check_header(idx)
        self.dtype = DTYPES[{6: 7, 7: 6}.get(code, code) if neox_float_codes else code]
        ends = np.cumsum([HEADER.size, 4 * num_sequences, 8 * num_sequences, 8 * num_indices])
        self.lengths: npt.NDArray[np.int32] = idx[ends[0] : ends[1]].view("<i4")
        self.pointers: npt.NDArray[np.int64] = idx[ends[1] : ends[2]].view("<i8")
        self.document_indices: npt.NDArray[np.int64] = idx[ends[2] : ends[3]].view("<i8")
        self.modes: npt.NDArray[np.int8] | None = idx[ends[3] :].view("i1") if idx.size > ends[3] else None
        raw = _map_bytes(self._bin_path)
        self.bin_size = raw.size
        self.tokens: npt.NDArray[Any] = raw[: raw.size - raw.size % self.dtype.itemsize].view(self.dtype)
        self._check_documents()
        self.num_tokens = self._check_sequences()
        self.meta = self._check_meta(read_meta(self.prefix))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> npt.NDArray[Any]:
        start = int(self.pointers[i]) // self.dtype.itemsize
        return np.array(self.tokens[start : start + int(self.lengths[i])])

    @property
    def num_documents(self) -> int:
        """Documents in the shard; fewer than len() when documents hold several sequences."""
        return len(self.document_indices) - 1

    def _fail(self, offset: int, what: str) -> ValueError:
        return ValueError(
            f"{self._idx_path}, offset {offset}: {what}. The shard is damaged or half copied: copy or tokenise it again"
        )

    def _check_header(self, idx: npt.NDArray[np.uint8]) -> tuple[int, int, int]:
        head = idx[: HEADER.size].tobytes()
        if head.startswith(FAIRSEQ_MAGIC):
            raise ValueError(
                f"{self._idx_path}, offset 0: fairseq's legacy TNTIDX format is not read; "
                "tokenise the text again with data_tools/preprocess_data.py"
            )
        if len(head) < HEADER.size:
            raise self._fail(0, f"{len(head)} bytes, shorter than the {HEADER.size}-byte header")
        magic, version, code, num_sequences, num_indices = HEADER.unpack(head)
        if magic != MAGIC:
            raise self._fail(0, f"magic {magic!r}, expected {MAGIC!r}: this is not a Megatron .idx")
        if version != 1:
            raise self._fail(9, f"version {version}, only version 1 exists")
        if code not in DTYPES:
            raise self._fail(17, f"dtype code {code}, known are 1 to {max(DTYPES)}")
        expected = HEADER.size + 12 * num_sequences + 8 * num_indices
        if idx.size not in (expected, expected + num_sequences):
            counts = f"{num_sequences} sequences and {num_indices} document indices"
            raise self._fail(18, f"{counts} need {expected} bytes, the file has {idx.size}")
        return code, num_sequences, num_indices

    def _check_documents(self) -> None:
        indices, n = self.document_indices, len(self.lengths)
        offset = HEADER.size + 12 * n
        if len(indices) == 0 or indices[0] != 0:
            raise self._fail(offset, "document indices must start with 0")
        if indices[-1] != n:
            raise self._fail(
                offset + 8 * (len(indices) - 1), f"last document index {indices[-1]}, expected {n} sequences"
            )
        backwards = np.flatnonzero(indices[1:] < indices[:-1])
        if backwards.size:
            raise self._fail(offset + 8 * (int(backwards[0]) + 1), "document indices go backwards")
        self.sequences_are_documents = len(indices) == n + 1 and bool((indices[1:] > indices[:-1]).all())

    def _check_sequences(self) -> int:
        """Check lengths and pointers against the .bin; returns the number of tokens."""
        n, size, total, previous = len(self.lengths), self.dtype.itemsize, 0, 0
        for start in range(0, n, CHECK_CHUNK):
            lengths = self.lengths[start : start + CHECK_CHUNK].astype(np.int64)
            pointers = np.array(self.pointers[start : start + CHECK_CHUNK])
            at = HEADER.size + 4 * n + 8 * start
            if (bad := np.flatnonzero(lengths < 0)).size:
                raise self._fail(HEADER.size + 4 * (start + int(bad[0])), f"negative length {lengths[bad[0]]}")
            if (bad := np.flatnonzero(np.diff(pointers, prepend=previous) < 0)).size:
                raise self._fail(at + 8 * int(bad[0]), f"pointer {pointers[bad[0]]} goes backwards")
            if (bad := np.flatnonzero(pointers % size)).size:
                raise self._fail(at + 8 * int(bad[0]), f"pointer {pointers[bad[0]]} splits a {size}-byte token")
            if (bad := np.flatnonzero(pointers > self.bin_size - lengths * size)).size:  # this way round: no overflow
                i = int(bad[0])
                reach = int(pointers[i]) + int(lengths[i]) * size
                raise self._fail(
                    at + 8 * i,
                    f"sequence {start + i} ends at byte {reach} of {self._bin_path}, which has {self.bin_size} bytes",
                )
            previous = int(pointers[-1])
            total += int(lengths.sum())
        return total

    def _check_meta(self, meta: ShardMeta | None) -> ShardMeta | None:
        if meta is None:
            return None
        found = {"num_tokens": self.num_tokens, "num_documents": self.num_documents, "dtype": self.dtype.name}
        for key, value in found.items():
            if getattr(meta, key) != value:
                raise ValueError(
                    f"{self.prefix}.meta.json: {key} is {getattr(meta, key)!r}, but the shard has {value!r}; "
                    "the sidecar belongs to another shard: tokenise again, or delete the sidecar"
                )
        return meta


class IndexedWriter:
    """Write one shard, byte-identical to Megatron's builder, visible under its name only when it is whole.

    `with IndexedWriter(prefix, dtype) as writer: writer.add_document(ids)`. An exception inside leaves nothing behind
    and an older shard of that name untouched. Afterwards it knows num_documents, num_tokens and bin_xxh3.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike) -> None:
        self.prefix = os.path.abspath(os.fspath(prefix))
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in DTYPES.values():
            raise ValueError(f"{self.prefix}: the format has no {self.dtype.name}; take optimal_dtype(vocab_size)")
        self.num_documents = self.num_tokens = 0
        self.bin_xxh3 = ""
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._hash = xxhash.xxh3_64()
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
        self.bin_xxh3 = self._hash.hexdigest()
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        write_index(self._idx_temporary, self.dtype, lengths, np.arange(lengths.size + 1))
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


def write_index(path: str, dtype: np.dtype[Any], lengths: npt.NDArray[np.int32], document_indices: IntArray) -> None:
    """Write an .idx to `path`, flushed to disk. Sequences are taken to lie end to end in the .bin."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    pointers = np.zeros(lengths.size, dtype=np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    pointers *= dtype.itemsize
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, lengths.size, len(document_indices)))
        for array, form in ((lengths, "<i4"), (pointers, "<i8"), (document_indices, "<i8")):
            file.write(np.ascontiguousarray(array, dtype=form).data)
    sync(path)


def _map_bytes(path: str) -> npt.NDArray[np.uint8]:
    """The file as a read-only map that keeps itself alive; an empty file cannot be mapped and is an empty array."""
    return np.memmap(path, dtype=np.uint8, mode="r") if os.path.getsize(path) else np.zeros(0, dtype=np.uint8)
