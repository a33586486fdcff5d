"""A fixed held-out set: the first tokens of its shards, in file order, the same for every run that is compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.data.batch import NO_MARKS, TOKEN_LIMIT, Batch, DocumentOptions, Rows, mark_documents
from megatron_lite.data.indexed import IndexedDataset


class EvalSet:
    """Iterate for batches of windows of seq_length tokens. Each of the `num_tokens` labels counts exactly once.

    The last window is padded with token 0 and loss mask 0. `bytes_per_token` turns nats a token into bits a byte;
    it is None when a shard has no sidecar.
    """

    def __init__(
        self,
        name: str,
        prefixes: Sequence[str],
        seq_length: int,
        max_tokens: int | None,
        micro_batch_size: int,
        options: DocumentOptions = NO_MARKS,
    ) -> None:
        self.name, self.seq_length, self.micro_batch_size, self.options = name, seq_length, micro_batch_size, options
        datasets = [IndexedDataset(prefix) for prefix in prefixes]
        available = sum(dataset.num_tokens for dataset in datasets) - 1  # the first token is never a label
        self.num_tokens = available if max_tokens is None else min(available, max_tokens)
        if self.num_tokens < 1:
            raise ValueError(
                f"validation set {name!r} ({', '.join(prefixes)}) has {available + 1} tokens and max_tokens is "
                f"{max_tokens}: nothing to predict; add text or drop it from `valid:`"
            )
        self._stream = _stream(datasets, self.num_tokens + 1)[: self.num_tokens + 1]
        metas = [dataset.meta for dataset in datasets]
        self.bytes_per_token: float | None = None
        if all(meta is not None for meta in metas):
            known = [meta for meta in metas if meta is not None]
            self.bytes_per_token = sum(m.num_bytes for m in known) / sum(m.num_tokens for m in known)
        self._check_vocabulary(min([TOKEN_LIMIT, *(meta.vocab_size for meta in metas if meta is not None)]), prefixes)

    def __len__(self) -> int:
        """Batches."""
        return -(-self.num_windows // self.micro_batch_size)

    @property
    def num_windows(self) -> int:
        """Rows over all batches."""
        return -(-self.num_tokens // self.seq_length)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, self.num_windows, self.micro_batch_size):
            rows = min(self.micro_batch_size, self.num_windows - first)
            start, size = first * self.seq_length, rows * self.seq_length
            piece = self._stream[start : start + size + 1].astype(np.int32)
            missing = size + 1 - len(piece)
            piece = np.pad(piece, (0, missing))
            mask = np.ones(size, dtype=np.bool_)
            mask[size - missing :] = False
            tokens, labels = (part.reshape(rows, -1).copy() for part in (piece[:-1], piece[1:]))
            found = Rows(np.zeros(rows, dtype=np.int64), np.arange(rows), tokens, labels)
            mark_documents(found, self.options, rows)
            found.loss_mask = mask.reshape(rows, -1) & (True if found.loss_mask is None else found.loss_mask)
            yield from found.split(rows)

    def _check_vocabulary(self, vocab_size: int, prefixes: Sequence[str]) -> None:
        low, high = int(self._stream.min()), int(self._stream.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"validation set {self.name!r} ({', '.join(prefixes)}): tokens from {low} to {high}, outside the "
                f"vocabulary of {vocab_size}; the shard was made with another tokenizer or is damaged"
            )


def _stream(datasets: Sequence[IndexedDataset], length: int) -> npt.NDArray[Any]:
    """At least the first `length` tokens, documents end to end; a view of the file where it holds them in order."""
    pieces: list[npt.NDArray[Any]] = []
    for dataset in datasets:
        if dataset.contiguous:
            pieces.append(dataset.tokens[: min(length, dataset.num_tokens)])
        else:
            enough = int(np.searchsorted(np.cumsum(dataset.lengths, dtype=np.int64), length)) + 1
            pieces.extend(dataset[i] for i in range(min(enough, len(dataset))))
        length -= min(length, dataset.num_tokens)
        if length == 0:
            break
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
