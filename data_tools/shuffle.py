"""Documents in random order, in bounded memory: dealt into files by the top bits of a random key, each then sorted.

The order is that of the key, and the key is a function of the seed and of the document's number alone. So it depends
neither on the number of files, nor on how many documents arrive at once, nor on who encoded them.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

FAN_BITS = 6  # 64 files a level
SORT_BYTES = 32 << 20  # of tokens that are sorted in memory; a larger file is dealt once more
PIECE_TOKENS = 1 << 20  # handed on at once

Keys = npt.NDArray[np.uint64]
Batch = tuple[Keys, npt.NDArray[np.int64], npt.NDArray[Any]]  # keys, lengths, tokens end to end


def document_keys(seed: int, first: int, count: int) -> Keys:
    """Distinct random keys of documents `first` to `first + count`: a bijection of their numbers."""
    start = _mix(np.array([seed % 2**64], dtype=np.uint64))  # mixed too: seeds 0 and 1 must not be each other's shift
    return _mix(np.arange(first, first + count, dtype=np.uint64) + start)


def _mix(z: Keys) -> Keys:
    """splitmix64 (Steele, Lea and Flood, 2014)."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class DocumentShuffler:
    """Takes documents in corpus order, gives them back in the seed's. Its folder lives as long as the `with` block."""

    def __init__(self, folder: str, dtype: str, seed: int, sort_bytes: int = SORT_BYTES) -> None:
        self._folder, self._dtype, self._seed, self._sort_bytes = Path(folder), np.dtype(dtype), seed, sort_bytes
        self._num_documents = 0
        self._top: _Deal | None = None

    def __enter__(self) -> "DocumentShuffler":
        self._folder.mkdir(parents=True)
        self._top = _Deal(self._folder / "d", 0)
        return self

    def __exit__(self, *error: object) -> None:
        if self._top is not None:
            self._top.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add_documents(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> None:
        """Take the next documents: their tokens end to end, and how many tokens each has."""
        assert self._top is not None and tokens.dtype == self._dtype
        self._top.add((document_keys(self._seed, self._num_documents, lengths.size), lengths, tokens))
        self._num_documents += lengths.size

    def drain(self) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
        """Tokens and lengths of all documents, in the new order, piece by piece."""
        assert self._top is not None
        yield from self._drain(self._top)

    def _drain(self, deal: "_Deal") -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
        for path, num_documents, num_bytes in deal.close():
            if num_bytes <= self._sort_bytes or num_documents == 1:
                yield from _sorted(list(_read(path, self._dtype)))
            else:
                deeper = _Deal(path.with_name(path.name + "d"), deal.level + 1)
                for batch in _read(path, self._dtype):
                    deeper.add(batch)
                yield from self._drain(deeper)
            path.unlink()


class _Deal:
    """One level: a file for each value of the next FAN_BITS bits of the key."""

    def __init__(self, stem: Path, level: int) -> None:
        self._stem, self.level = stem, level
        self._files: dict[int, BinaryIO] = {}
        self._counts = np.zeros((1 << FAN_BITS, 2), dtype=np.int64)  # documents, bytes of tokens

    def add(self, batch: Batch) -> None:
        keys, lengths, tokens = batch
        shift = np.uint64(64 - FAN_BITS * (self.level + 1))
        place = ((keys >> shift) & np.uint64((1 << FAN_BITS) - 1)).astype(np.int64)
        order = np.argsort(place, kind="stable")
        bounds = np.searchsorted(place[order], np.arange((1 << FAN_BITS) + 1))
        ends = np.cumsum(lengths)
        for bucket in np.unique(place).tolist():
            chosen = order[bounds[bucket] : bounds[bucket + 1]]
            mine = _gather(tokens, ends, lengths, chosen)
            file = self._files.get(bucket) or self._open(bucket)
            for array in (np.array([chosen.size, mine.size]), keys[chosen], lengths[chosen], mine):
                file.write(array.tobytes())
            self._counts[bucket] += (chosen.size, mine.nbytes)

    def _open(self, bucket: int) -> BinaryIO:
        self._files[bucket] = open(f"{self._stem}-{bucket:02d}", "wb", buffering=1 << 17)  # noqa: SIM115
        return self._files[bucket]

    def close(self) -> list[tuple[Path, int, int]]:
        """Path, documents and bytes of tokens of each file, in the order of the key."""
        for file in self._files.values():
            file.close()
        return [(Path(self._files[b].name), *self._counts[b].tolist()) for b in sorted(self._files)]


def _read(path: Path, dtype: np.dtype[Any]) -> Iterator[Batch]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        while file.tell() < size:
            count, num_tokens = np.frombuffer(file.read(16), dtype=np.int64).tolist()
            keys = np.frombuffer(file.read(8 * count), dtype=np.uint64)
            lengths = np.frombuffer(file.read(8 * count), dtype=np.int64)
            yield keys, lengths, np.frombuffer(file.read(dtype.itemsize * num_tokens), dtype=dtype)


def _sorted(batches: list[Batch]) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
    keys, lengths, tokens = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    batches.clear()
    order, ends = np.argsort(keys), np.cumsum(lengths)
    cuts = np.searchsorted(np.cumsum(lengths[order]), np.arange(PIECE_TOKENS, tokens.size, PIECE_TOKENS))
    for chosen in np.split(order, cuts):
        if chosen.size:
            yield _gather(tokens, ends, lengths, chosen), lengths[chosen]


def _gather(
    tokens: npt.NDArray[Any], ends: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]
) -> npt.NDArray[Any]:
    """The tokens of some documents, end to end; by slices, since an index array would be four times the tokens."""
    last = ends[chosen]
    return np.concatenate([tokens[a:b] for a, b in zip((last - lengths[chosen]).tolist(), last.tolist(), strict=True)])
