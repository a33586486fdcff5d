"""Documents of one domain -> fixed-length samples, without an index on disk or one entry per document in memory.

An epoch is a stream: the documents of the domain in a keyed order, end to end. Sample windows are seq_length + 1 tokens
long and start every seq_length tokens, so the last token of one is the first of the next; they too are taken in a keyed
order. Every window of an epoch comes once before any of the next epoch. The order of documents is a permutation of
blocks of 256 and a permutation inside each block: documents near each other in the file may share a sample more often
than chance, but where samples fall in the epoch is fully mixed. All of it is a function of (seed, domain name, epoch).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.keys import key_of, mix64

BLOCK = 256  # documents that stay neighbours in every epoch; one prefix sum is kept for each block


@dataclass(frozen=True, eq=False)
class Shard:
    """One .bin seen by document; `first_block` is the number of blocks in the shards before it."""

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]  # bytes
    first_block: int

    @property
    def num_documents(self) -> int:
        """Documents in this shard."""
        return len(self.lengths)


class DomainSamples:
    """The samples of one domain, by ordinal: sample j is in epoch j // samples_per_epoch. Not for concurrent use."""

    def __init__(
        self,
        datasets: Sequence[IndexedDataset],
        seq_length: int,
        seed: int,
        name: str,
        kernels: ModuleType,
    ) -> None:
        self.name, self.seq_length = name, seq_length
        self.num_tokens = sum(dataset.num_tokens for dataset in datasets)
        self.samples_per_epoch = (self.num_tokens - 1) // seq_length
        where = f"domain {name!r} ({', '.join(dataset.prefix for dataset in datasets)})"
        if self.samples_per_epoch < 1:
            raise ValueError(
                f"{where} has {self.num_tokens} tokens, one sample needs seq_length + 1 = {seq_length + 1}: "
                "give it weight 0, add data, or lower seq_length"
            )
        self.key = key_of(seed, "samples", name)
        self.shards: list[Shard] = []
        block_tokens = [np.zeros(0, dtype=np.int64)]
        for dataset in datasets:
            if dataset.dtype.kind == "f":
                raise ValueError(f"{where}: {dataset.prefix}.idx holds {dataset.dtype.name}; tokens are integers")
            dataset.check()  # the gather follows pointers without looking where they lead
            lengths, pointers = _documents(dataset)
            self.shards.append(Shard(dataset.tokens, lengths, pointers, sum(map(len, block_tokens))))
            if len(lengths):
                block_tokens.append(np.add.reduceat(lengths, np.arange(0, len(lengths), BLOCK), dtype=np.int64))
        self.block_tokens = np.concatenate(block_tokens)
        self.num_blocks = len(self.block_tokens)
        self._kernels = kernels
        self._prefixes: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}

    @functools.cached_property
    def _gather(self) -> Any:
        return self._kernels.Gather([self])

    def gather(self, ordinals: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens [n, seq_length + 1] of the samples with these ordinals; any ordinal from 0 on, in any order."""
        ordinals = np.asarray(ordinals, dtype=np.int64)
        assert ordinals.ndim == 1 and (ordinals >= 0).all()
        tokens = np.empty((len(ordinals), self.seq_length + 1), dtype=np.int64)
        bad = self._gather(np.zeros(len(ordinals), dtype=np.int32), ordinals, tokens)
        if bad is not None:
            raise ValueError(
                f"domain {self.name!r}: sample {ordinals[bad]} holds a negative token: the .bin is damaged"
            )
        return tokens

    def block_prefix(self, epoch: int) -> npt.NDArray[np.int64]:
        """Tokens before each block in that epoch's order [num_blocks + 1]; two neighbouring epochs are kept."""
        held, prefix = self._prefixes.get(epoch & 1, (None, None))
        if held != epoch or prefix is None:
            prefix = self._kernels.block_prefix(self.block_tokens, mix64(mix64(self.key, epoch), 0))
            self._prefixes[epoch & 1] = (epoch, prefix)
        return prefix


def _documents(dataset: IndexedDataset) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Lengths (tokens) and pointers (bytes) by document: the file's own arrays where a document is one sequence."""
    if dataset.sequences_are_documents:
        return dataset.lengths, dataset.pointers
    size = dataset.dtype.itemsize
    ends = dataset.pointers + dataset.lengths.astype(np.int64) * size
    first, after = dataset.document_indices[:-1], dataset.document_indices[1:]
    inner = np.setdiff1d(np.arange(1, len(dataset)), first)  # sequences that continue a document
    if (dataset.pointers[inner] != ends[inner - 1]).any():
        raise ValueError(
            f"{dataset.prefix}.idx: the sentences of a document are not end to end in the .bin; tokenise it again"
        )
    pointers = np.append(dataset.pointers, dataset.bin_size)[first]
    lengths = np.where(after > first, np.append(0, ends)[after] - pointers, 0) // size
    if lengths.size and lengths.max() > np.iinfo(np.int32).max:
        raise ValueError(f"{dataset.prefix}.idx: a document of {lengths.max()} tokens; the limit is 2^31 - 1")
    return lengths.astype(np.int32), np.ascontiguousarray(pointers)
