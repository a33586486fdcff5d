"""Tokens of one domain -> fixed-length samples, without an index on disk or one entry per document in memory.

An epoch is a stream. Sample windows are seq_length + 1 tokens long and start every seq_length tokens, so the last token
of one is the first of the next; they are taken in a keyed order. Every window of an epoch comes once before any of the
next epoch. All of it is a function of (seed, domain name, epoch). There are three orders of the stream:

documents: whole documents in a keyed order, end to end: a permutation of blocks of 256 and a permutation inside each
block. Documents near each other in the file may share a sample more often than chance, but where samples fall in the
epoch is fully mixed. contiguous: the .bin files as they are, taken as a ring that each epoch cuts at another place; for
shards whose documents were shuffled when they were written, and several times faster. megatron: Megatron-Core's own
order, from its indices; no epochs of ours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.keys import key_of, mix64

SampleOrder = Literal["documents", "contiguous", "megatron"]
MODES: dict[str, int] = {"documents": 0, "contiguous": 1, "megatron": 2}  # csrc/sources.h
NEEDS_EPOCH, BAD_TOKEN, BAD_PIECE, BAD_STREAM = 1, 2, 3, 4  # csrc/sources.h, Status
BLOCK = 256  # documents that stay neighbours in every epoch; one prefix sum is kept for each block


@dataclass(frozen=True, eq=False)
class Shard:
    """One .bin seen by document. `first_...` counts what is in the shards before it."""

    prefix: str
    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]  # by document; empty in the order "contiguous", like pointers
    pointers: npt.NDArray[np.int64]  # bytes
    first_block: int
    first_document: int
    first_token: int

    @property
    def num_documents(self) -> int:
        """Documents in this shard."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens that the .bin has room for."""
        return len(self.tokens)

    def locate(self, document: int) -> int:
        """The first token of a document in the .bin, or -1 when the document does not lie inside it."""
        at, rest = divmod(int(self.pointers[document]), self.tokens.itemsize)
        length = int(self.lengths[document])
        return at if rest == 0 <= at and 0 <= length <= self.num_tokens - at else -1


class DomainSamples:
    """The samples of one domain, by ordinal: sample j is in epoch j // samples_per_epoch. Not for concurrent use.

    `indices` (document, sample, shuffle) are Megatron's arrays, for the order "megatron" alone.
    """

    def __init__(
        self,
        datasets: Sequence[IndexedDataset],
        seq_length: int,
        seed: int,
        name: str,
        kernels: ModuleType,
        order: SampleOrder = "documents",
        indices: tuple[npt.NDArray[Any], ...] | None = None,
    ) -> None:
        self.name, self.seq_length, self.mode, self.indices = name, seq_length, MODES[order], indices
        assert (order == "megatron") == (indices is not None)
        self.num_tokens = sum(dataset.num_tokens for dataset in datasets)
        self.datasets = datasets
        self.samples_per_epoch = (self.num_tokens - 1) // seq_length
        self._where = f"domain {name!r} ({', '.join(dataset.prefix for dataset in datasets)})"
        if self.samples_per_epoch < 1:
            raise ValueError(
                f"{self._where} has {self.num_tokens} tokens, one sample needs seq_length + 1 = {seq_length + 1}: "
                "give it weight 0, add data, or lower seq_length"
            )
        self.key = key_of(seed, "samples", name)
        self.shards: list[Shard] = []
        self.block_tokens = np.zeros(0, dtype=np.int64)
        self._open(datasets, order)
        self.num_blocks = len(self.block_tokens)
        self._kernels = kernels
        self._prefixes: dict[int, tuple[int, npt.NDArray[np.int64]]] = {}

    def _open(self, datasets: Sequence[IndexedDataset], order: SampleOrder) -> None:
        first_block = first_document = first_token = 0
        counted = [self.block_tokens]
        for dataset in datasets:
            if dataset.dtype.kind == "f":
                raise ValueError(f"{self._where}: {dataset.prefix}.idx holds {dataset.dtype.name}; tokens are integers")
            if dataset.modes is not None and dataset.modes.any():
                raise ValueError(
                    f"{self._where}: {dataset.prefix}.idx holds modes: it is multimodal, and only text is read"
                )
            if order == "contiguous":
                if not dataset.contiguous:
                    raise ValueError(
                        f"{self._where}: the documents of {dataset.prefix} are not end to end in its .bin, as data."
                        "sample_order=contiguous needs: use documents, or write it again with data_tools/merge_data.py"
                    )
                lengths, pointers = np.zeros(0, np.int32), np.zeros(0, np.int64)
            elif order == "megatron":  # GPTDataset counts sequences
                lengths, pointers = dataset.lengths, dataset.pointers
            else:
                lengths, pointers = _documents(dataset)
            if order == "documents":
                counted.append(dataset.block_tokens)
            firsts = (first_block, first_document, first_token)
            self.shards.append(Shard(dataset.prefix, dataset.tokens, lengths, pointers, *firsts))
            first_block += len(counted[-1])
            first_document += len(lengths)
            first_token += dataset.num_tokens
        self.block_tokens = np.concatenate(counted)

    @functools.cached_property
    def _gather(self) -> Any:
        return self._kernels.Gather([self])

    def gather(self, ordinals: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Tokens [n, seq_length + 1] of the samples with these ordinals; any ordinal from 0 on, in any order."""
        ordinals = np.asarray(ordinals, dtype=np.int64)
        assert ordinals.ndim == 1 and (ordinals >= 0).all()
        rows = self._gather.rows(np.zeros(len(ordinals), dtype=np.int64), ordinals)
        return np.concatenate([rows.tokens, rows.labels[:, -1:]], axis=1)

    def block_prefix(self, epoch: int) -> npt.NDArray[np.int64]:
        """Tokens before each block in that epoch's order [num_blocks + 1]; two neighbouring epochs are kept."""
        held, prefix = self._prefixes.get(epoch & 1, (None, None))
        if held != epoch or prefix is None:
            prefix = self._kernels.block_prefix(self.block_tokens, mix64(mix64(self.key, epoch), 0))
            self._prefixes[epoch & 1] = (epoch, prefix)
        return prefix

    def fault(self, status: int, ordinal: int, shard: int, document: int, vocab_size: int | None) -> ValueError:
        """The error for a sample that cannot be read; the arguments are what the kernels found."""
        where = f"{self._where}: sample {ordinal}"
        place = self.shards[shard].prefix + (f", document {document}" if document >= 0 else "")
        if status == BAD_TOKEN and vocab_size is None:
            return ValueError(f"{where} holds a token below 0 or from 2^31 on: the .bin is damaged ({place})")
        if status == BAD_TOKEN:
            return ValueError(
                f"{where} holds a token outside the vocabulary of {vocab_size} (of its sidecar, or model.vocab_size); "
                f"the shard was made with another tokenizer or is damaged: tokenise it again ({place})"
            )
        if status == BAD_PIECE:
            return ValueError(f"{where}: {place} does not lie inside its .bin; the .idx is damaged: tokenise it again")
        assert status == BAD_STREAM
        if self.indices is not None and ordinal >= len(self.indices[2]):
            return ValueError(
                f"{where} is beyond the {len(self.indices[2])} samples that Megatron's order was built for; "
                "it depends on the length of the run: set schedule.total_tokens to all that will be trained"
            )
        return ValueError(f"{where}: the .idx of {place} changed, or is not what its sidecar says: tokenise it again")


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
