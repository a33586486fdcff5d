"""Megatron's .bin/.idx shards: a validating reader. What is in the files is said in indexed_writer.py."""

from __future__ import annotations

import functools
import itertools
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_lite.data.indexed_writer import CHUNK, DTYPES, HEADER, MAGIC, IndexedWriter, optimal_dtype
from megatron_lite.data.mapped import map_file
from megatron_lite.data.sidecar import ShardMeta, count_blocks, read_meta, write_meta

__all__ = ["IndexedDataset", "IndexedWriter", "ShardMeta", "optimal_dtype", "read_meta", "resolve_prefix", "write_meta"]

FAIRSEQ_MAGIC = b"TNTIDX\x00\x00"


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
    """Read-only view of one shard. len() counts sequences (one a document, unless sentences were split).

    Opening takes constant time where the sidecar has a layout of these very files: then the .idx is not read, `checked`
    is False, and whoever follows pointers must keep them inside the .bin, as [i] does, or call check() first. Any other
    shard is checked whole. Arrays are mapped when first asked for and own their map, and [i] is a copy, so nothing
    dangles when the dataset is collected. GPT-NeoX swaps the two float codes: say so. `meta`: its sidecar, if read.
    """

    def __init__(
        self, path: str | os.PathLike[str], neox_float_codes: bool = False, meta: ShardMeta | None = None
    ) -> None:
        self.prefix = resolve_prefix(path)
        self._idx_path, self._bin_path = self.prefix + ".idx", self.prefix + ".bin"
        (idx, idx_probe), (raw, bin_probe) = map_file(self._idx_path), map_file(self._bin_path)
        self._idx_size, self.bin_size = idx.size, raw.size
        code, num_sequences, num_indices = self._check_header(idx)
        self.dtype = DTYPES[{6: 7, 7: 6}.get(code, code) if neox_float_codes else code]
        ends = list(itertools.accumulate([HEADER.size, 4 * num_sequences, 8 * num_sequences, 8 * num_indices]))
        self.lengths: npt.NDArray[np.int32] = idx[ends[0] : ends[1]].view("<i4")
        self.pointers: npt.NDArray[np.int64] = idx[ends[1] : ends[2]].view("<i8")
        self.document_indices: npt.NDArray[np.int64] = idx[ends[2] : ends[3]].view("<i8")
        self.modes: npt.NDArray[np.int8] | None = idx[ends[3] :].view("i1") if idx.size > ends[3] else None
        self.tokens: npt.NDArray[Any] = raw[: raw.size - raw.size % self.dtype.itemsize].view(self.dtype)
        self.meta = meta or read_meta(self.prefix)
        layout = self.meta.layout if self.meta else None
        self.checked = not (layout and layout.contiguous and layout.sequences_are_documents) or (
            (layout.bin_size, layout.idx_size) != (raw.size, idx.size)
        )
        self.num_tokens, self.contiguous, self.sequences_are_documents = (
            self._check_arrays() if self.checked else (len(self.tokens), True, True)
        )
        self._probe = xxhash.xxh3_64_hexdigest(idx_probe + bin_probe)
        self._check_meta()

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this shard from another: sizes in bytes, hashes of the content; xxh3 is "" without a sidecar."""
        facts = {"name": os.path.basename(self.prefix), "bin": self.bin_size, "idx": self._idx_size}
        return facts | {"probe": self._probe, "xxh3": self.meta.bin_xxh3 if self.meta else ""}

    def check(self) -> None:
        """Check everything that the .idx claims, also where the sidecar vouched for it. ValueError names the place."""
        if not self.checked:
            facts = (self.num_tokens, self.contiguous, self.sequences_are_documents)
            if (found := self._check_arrays()) != facts:
                raise self._fail(HEADER.size, f"tokens, contiguity, documents are {found}, the sidecar says {facts}")
            self.checked = True

    @functools.cached_property
    def document_lengths(self) -> npt.NDArray[Any]:
        """Tokens in each document [num_documents]: the file's own array where a document is one sequence."""
        if self.sequences_are_documents:
            return self.lengths
        return np.diff(np.append(0, np.cumsum(self.lengths, dtype=np.int64))[self.document_indices])

    @functools.cached_property
    def block_tokens(self) -> npt.NDArray[np.int64]:
        """Tokens in each block of 256 documents, from the sidecar if it knows."""
        try:
            known = self.meta.block_tokens if self.meta else None
        except ValueError as error:
            raise ValueError(f"{self.prefix}.meta.json: {error}; delete it, or tokenise the shard again") from error
        return count_blocks(self.document_lengths) if known is None else known

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> npt.NDArray[Any]:
        i = range(len(self))[i]
        start, end = int(self.pointers[i]), int(self.pointers[i]) + int(self.lengths[i]) * self.dtype.itemsize
        after = (self.pointers[i + 1] if i + 1 < len(self) else self.bin_size) if self.contiguous else end
        if not 0 <= start <= end <= self.bin_size or start % self.dtype.itemsize or end != after:
            raise self._fail(HEADER.size + 4 * i, f"sequence {i} is at bytes {start} to {end}, expected to {after}")
        return np.array(self.tokens[start // self.dtype.itemsize : end // self.dtype.itemsize])

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
        if num_indices == 0:
            raise self._fail(26, "no document index; even an empty shard has one, which is 0")
        return code, num_sequences, num_indices

    def _check_arrays(self) -> tuple[int, bool, bool]:
        """Reads the whole .idx; returns num_tokens, contiguous, sequences_are_documents."""
        sequences_are_documents = self._check_documents()
        return *self._check_sequences(), sequences_are_documents

    def _check_documents(self) -> bool:
        indices, n = self.document_indices, len(self.lengths)
        offset = HEADER.size + 12 * n
        if indices[0] != 0:
            raise self._fail(offset, "document indices must start with 0")
        if indices[-1] != n:
            raise self._fail(
                offset + 8 * (len(indices) - 1), f"last document index {indices[-1]}, expected {n} sequences"
            )
        backwards = np.flatnonzero(indices[1:] < indices[:-1])
        if backwards.size:
            raise self._fail(offset + 8 * (int(backwards[0]) + 1), "document indices go backwards")
        return len(indices) == n + 1 and bool((indices[1:] > indices[:-1]).all())

    def _check_sequences(self) -> tuple[int, bool]:
        """Check lengths and pointers against the .bin; returns the number of tokens and whether they are end to end."""
        n, size, total, previous, contiguous = len(self.lengths), self.dtype.itemsize, 0, 0, True
        for start in range(0, n, CHUNK):
            lengths = self.lengths[start : start + CHUNK].astype(np.int64)
            pointers = np.array(self.pointers[start : start + CHUNK])
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
            ends = total + np.cumsum(lengths)
            contiguous &= bool((pointers == (ends - lengths) * size).all())
            total = int(ends[-1])
        return total, contiguous and total * size == self.bin_size

    def _check_meta(self) -> None:
        if self.meta is None:
            return
        claimed = {**vars(self.meta), **(vars(self.meta.layout) if self.meta.layout else {})}
        found = {"num_tokens": self.num_tokens, "num_documents": self.num_documents, "dtype": self.dtype.name}
        found |= {"bin_size": self.bin_size, "idx_size": self._idx_size, "probe": self._probe}
        for key, value in found.items():
            if key in claimed and claimed[key] != value:
                raise ValueError(
                    f"{self.prefix}.meta.json: {key} is {claimed[key]!r}, but the shard has {value!r}; the sidecar "
                    "belongs to another shard, or the files changed after it was written: tokenise again, or delete it"
                )
