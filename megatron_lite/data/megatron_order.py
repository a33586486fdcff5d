"""Megatron-Core 0.16's order of samples, for those who continue a run of it: `data.sample_order: megatron`.

The document, sample and shuffle indices of GPTDataset and the greedy blend of BlendedDataset, equal entry by entry, but
built in memory at start by every rank: no cache folder, no barrier. They take 4 bytes a document and epoch plus 12 a
sample (8 more a document and epoch while they are built). As in Megatron the order depends on the run's total number
of samples, and all epochs but perhaps the last are shuffled together, so a document may come twice before another comes
once: take it only to continue such a run.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_lite.data import native, reference
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.mixture import Mixture
from megatron_lite.data.samples import DomainSamples

SEPARATE_BELOW = 0.80  # Megatron: a last epoch of which less is needed is shuffled apart from the others
SURPLUS = 0.005  # Megatron's --mid-level-dataset-surplus: what a blend's data sets hold beyond their share
SNAPSHOT = 1 << 14  # samples between two states of the blend that are kept: 8 bytes a domain each

I64, PTR = ctypes.c_int64, ctypes.c_void_p
SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "ml_twister_size": ([], I64),
    "ml_twister_seed": ([PTR, ctypes.c_uint32], None),
    "ml_shuffle32": ([PTR, PTR, I64], None),
    "ml_shuffle64": ([PTR, PTR, I64], None),
    "ml_pair": ([PTR, I64, I64, PTR], I64),
    "ml_walk": ([PTR, I64, I64, I64, I64, PTR], None),
    "ml_greedy": ([PTR, I64, I64, I64, PTR, PTR, PTR], None),
}
AnyArray = npt.NDArray[Any]


class Indices(NamedTuple):
    """Megatron's three arrays. Sample j is at row shuffle[j] of `sample`: (place in `document`, offset in tokens)."""

    document: npt.NDArray[np.int32]  # [documents * epochs]
    sample: AnyArray  # [samples + 1, 2], int32 or int64
    shuffle: AnyArray  # [samples], uint32 or int64


def plan_epochs(num_tokens: int, num_samples: int | None, seq_length: int) -> tuple[int, int | None]:
    """Whole epochs with at least `num_samples` samples (None: one), and the samples before the last if it is apart."""
    num_epochs = max(1, -(-((num_samples or 0) * seq_length + 1) // num_tokens))
    if num_epochs == 1:
        return 1, None
    before = ((num_epochs - 1) * num_tokens - 1) // seq_length
    assert num_samples is not None
    apart = num_samples - before < int(SEPARATE_BELOW * ((num_tokens - 1) // seq_length))
    return num_epochs, before if apart else None


def build_indices(
    lengths: Sequence[npt.NDArray[np.int32]],
    num_samples: int | None,
    seq_length: int,
    seed: int,
    kernels: ModuleType,
    drop_last: bool = True,
) -> Indices:
    """GPTDataset's indices over documents of these lengths (one array a shard, taken as one after the other).

    `drop_last` False keeps the partial sample at the end, as Megatron can for validation, with its float32 count.
    """
    documents, num_tokens = sum(map(len, lengths)), sum(int(part.sum(dtype=np.int64)) for part in lengths)
    num_epochs, before = plan_epochs(num_tokens, num_samples, seq_length)
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed {seed}: Megatron's order takes numpy's RandomState seeds, 0 to 2^32 - 1")
    if documents * num_epochs >= 1 << 32:
        raise ValueError(f"{documents} documents * {num_epochs} epochs: Megatron's order is built for less than 2^32")
    tokens = num_tokens * num_epochs - 1
    total = tokens // seq_length if drop_last else math.ceil(np.float32(tokens) / np.float32(seq_length))
    documents_apart, samples_apart = (0, 0) if before is None else (documents, total - before)
    library = _library(kernels)
    pairs = _pairs(library, lengths, num_epochs)
    shuffle = np.random.RandomState(seed).shuffle if library is None else _random_state(library, seed)
    for part in np.split(pairs, [len(pairs) - documents_apart]):
        shuffle(part)
    sample = np.empty((total + 1, 2), dtype=np.int32 if len(pairs) < 1 << 31 else np.int64)
    document = _walk(library, pairs, seq_length, sample)
    del pairs
    order: AnyArray = np.arange(total, dtype=np.uint32 if total < (1 << 32) - 2 else np.int64)
    for part in np.split(order, [total - samples_apart]):
        shuffle(part)
    return Indices(document, sample, order)


def _pairs(library: ctypes.CDLL | None, lengths: Sequence[AnyArray], num_epochs: int) -> AnyArray:
    """Documents in file order, each with its length in the upper half, so that the walk need not look lengths up."""
    documents, first = sum(map(len, lengths)), 0
    pairs = np.empty(documents * num_epochs, dtype=np.uint64)
    for part in lengths:
        assert part.dtype == np.int32
        mine = pairs[first : first + len(part)]
        if library is None:
            mine[:] = part.astype(np.uint64) << np.uint64(32) | np.arange(first, first + len(part), dtype=np.uint64)
        else:
            library.ml_pair(part.ctypes.data, first, len(part), mine.ctypes.data)
        first += len(part)
    for epoch in range(1, num_epochs):
        pairs[epoch * documents : (epoch + 1) * documents] = pairs[:documents]
    return pairs


def _random_state(library: ctypes.CDLL, seed: int) -> Callable[[AnyArray], None]:
    """RandomState(seed).shuffle for arrays of 4- and 8-byte entries."""
    state = np.empty(library.ml_twister_size(), dtype=np.uint8)
    library.ml_twister_seed(state.ctypes.data, seed)

    def shuffle(array: AnyArray) -> None:
        assert array.flags.c_contiguous
        getattr(library, f"ml_shuffle{8 * array.itemsize}")(state.ctypes.data, array.ctypes.data, len(array))

    return shuffle


def _walk(library: ctypes.CDLL | None, pairs: npt.NDArray[np.uint64], seq_length: int, sample: AnyArray) -> AnyArray:
    """Fill the sample index; returns the document index. `pairs` is used up."""
    if library is not None:
        wide = sample.itemsize == 8
        library.ml_walk(pairs.ctypes.data, len(pairs), seq_length, len(sample) - 1, wide, sample.ctypes.data)
        return pairs.view(np.int32)[: len(pairs)].copy()
    lengths = (pairs >> np.uint64(32)).astype(np.int64)
    ends, starts = np.cumsum(lengths), np.arange(len(sample), dtype=np.int64) * seq_length
    place = np.searchsorted(ends, starts, side="right")
    past = place == len(ends)  # a last, partial sample ends with the last document
    place[past] = len(ends) - 1
    sample[:, 0] = place
    sample[:, 1] = np.where(past, lengths[place] - 1, starts - (ends[place] - lengths[place]))
    sample[0] = 0  # sample 0 starts at the first document, an empty one too
    return pairs.astype(np.uint32).astype(np.int32)


class MegatronBlend:
    """The order in which Megatron's BlendedDataset draws: Blend's interface. Weight 0 is never drawn.

    Each draw depends on all before it: a state is kept every 16,384 samples, and the first call far into a run walks
    there, at 10 to 300 ns a sample.
    """

    def __init__(self, weights: Sequence[float] | npt.NDArray[np.float64], kernels: ModuleType) -> None:
        array = np.asarray(weights, dtype=np.float64)
        assert array.ndim == 1 and np.isfinite(array).all() and (array >= 0).all() and array.sum() > 0
        self.num_domains = len(array)
        self.domains = np.flatnonzero(array).astype(np.int32)
        # the builder normalises, and BlendedDataset once more: other roundings would swap neighbours now and then
        self.shares = array[self.domains] / array[self.domains].sum()
        self._weights = self.shares / self.shares.sum()
        self._library = _library(kernels)
        self._states = [np.zeros(len(self.domains))]

    def targets(self, num_samples: int, surplus: float = SURPLUS) -> npt.NDArray[np.int64]:
        """Samples that each domain's indices are built for [num_domains]; 0 where the weight is 0."""
        found = np.zeros(self.num_domains, dtype=np.int64)
        wanted = [math.ceil(num_samples * share) for share in self.shares.tolist()]
        found[self.domains] = [math.ceil(size * (1 + surplus)) for size in wanted]
        return found

    def draw(self, start: int, count: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Samples start .. start + count - 1: their domain [count] and their ordinal within it [count]."""
        which, ordinal = np.empty(count, dtype=np.int32), np.empty(count, dtype=np.int64)
        self._step(self._state(start), start, which, ordinal, count)
        return self.domains[which], ordinal

    def counts(self, consumed: int) -> npt.NDArray[np.int64]:
        """Samples of each domain among the first `consumed` [num_domains]."""
        found = np.zeros(self.num_domains, dtype=np.int64)
        found[self.domains] = self._state(consumed).astype(np.int64)
        return found

    def _state(self, position: int) -> npt.NDArray[np.float64]:
        """Samples drawn from each domain before `position`; the caller's own."""
        while len(self._states) <= position // SNAPSHOT:
            drawn = self._states[-1].copy()
            self._step(drawn, (len(self._states) - 1) * SNAPSHOT, None, None, SNAPSHOT)
            self._states.append(drawn)
        drawn, edge = self._states[position // SNAPSHOT].copy(), position // SNAPSHOT * SNAPSHOT
        self._step(drawn, edge, None, None, position - edge)
        return drawn

    def _step(self, drawn: AnyArray, start: int, which: AnyArray | None, ordinal: AnyArray | None, count: int) -> None:
        if self._library is not None:
            outputs = (None if array is None else array.ctypes.data for array in (which, ordinal))
            weights, k = self._weights.ctypes.data, len(self._weights)
            self._library.ml_greedy(weights, k, start, count, drawn.ctypes.data, *outputs)
            return
        for t in range(start, start + count):
            winner = int(np.argmax(self._weights * max(t, 1) - drawn))
            if which is not None and ordinal is not None:
                which[t - start], ordinal[t - start] = winner, drawn[winner]
            drawn[winner] += 1


class MegatronOptions(NamedTuple):
    """What the order depends on beside shards, weights, seed and seq_length: Megatron's flags of the run."""

    num_samples: int  # that Megatron was asked for: --train-samples, or --train-iters * --global-batch-size
    split: str | None = None  # --split; None: every document is for training
    surplus: float | None = None  # --mid-level-dataset-surplus; None: SURPLUS for a blend, none for a single prefix


def build_megatron(
    mixture: Mixture, seq_length: int, window: int, seed: int, options: MegatronOptions, kernels: ModuleType
) -> tuple[MegatronBlend, dict[str, DomainSamples]]:
    """The blend and, by domain name, the samples of a Megatron run; weight 0 is never opened.

    A domain is one prefix of Megatron's --data-path; several shards of a domain are read as if merged into one.
    ValueError where whole steps of `window` samples need more than Megatron's indices hold.
    """
    blend = MegatronBlend([d.weight if d.written is None else d.written for d in mixture.domains], kernels)
    surplus = options.surplus if options.surplus is not None else SURPLUS * (len(blend.shares) > 1)
    sizes, samples, held = blend.targets(options.num_samples, surplus).tolist(), {}, {}
    for domain, size in zip(mixture.domains, sizes, strict=True):
        if not size:
            continue
        datasets = [IndexedDataset(prefix) for prefix in domain.prefixes]
        kept, lengths = split_documents(options.split, sum(map(len, datasets))), []
        for dataset in datasets:
            dataset.check()  # all lengths are read here, so none is believed
            lengths.append(dataset.lengths[:kept])
            kept -= len(lengths[-1])
        if not any(part.any() for part in lengths):
            raise ValueError(f"train_{domain.name}: no documents to train on with data.split {options.split!r}")
        indices = build_indices(lengths, size, seq_length, seed, kernels)
        found = DomainSamples(datasets, seq_length, seed, domain.name, kernels, "megatron", indices)
        found.num_tokens = sum(int(part.sum(dtype=np.int64)) for part in lengths)
        samples[domain.name], held[domain.name] = found, len(indices.shuffle)
    total = -(-options.num_samples // window) * window
    if (np.array([*held.values()]) < blend.shares * total + 1).any():  # none is ever drawn more often than that
        for (name, has), needs in zip(held.items(), blend.counts(total)[blend.domains].tolist(), strict=True):
            if needs > has:
                raise ValueError(
                    f"train_{name}: {total} samples in whole steps take {needs} of it, Megatron's order holds {has}: "
                    "set schedule.total_tokens to a multiple of data.seq_length * batch.global_batch_size"
                )
    return blend, samples


def split_documents(split: str | None, documents: int) -> int:
    """Documents of the train part of Megatron's --split ("99,1,0": the first 99 %); all of them for None."""
    numbers = [1.0] if split is None else [float(number) for number in re.findall(r"[.0-9]+", split)]
    if not 1 <= len(numbers) <= 3 or not numbers[0] > 0:
        raise ValueError(f'data.split {split!r}: expected Megatron\'s --split, such as "99,1,0", with a train part')
    return round((np.array(numbers) / np.sum(numbers)).tolist()[0] * float(documents))


def _library(kernels: ModuleType) -> ctypes.CDLL | None:
    found = None if kernels is reference else native.library()
    for name, signature in SIGNATURES.items() if found is not None else ():
        function = getattr(found, name)
        function.argtypes, function.restype = signature
    return found
