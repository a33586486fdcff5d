"""The compiled kernels, loaded by ctypes: the same functions as reference.py, 10 to 40 times faster.

`MEGATRON_LITE_NATIVE=0` forces numpy. `backend()` says which one runs. The library is stateless; numpy owns all memory.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.data import reference
from megatron_lite.data.batch import NO_MARKS, DocumentOptions, Rows
from megatron_lite.data.blend import Blend
from megatron_lite.data.indexed_writer import DTYPES
from megatron_lite.data.quota import QuotaTree
from megatron_lite.data.samples import NEEDS_EPOCH, DomainSamples, Shard

VERSION = 6  # of the C interface: ml_version() in gather.cpp
RANDOM_ORDER = 0  # readahead.h

I64, U64, PTR = ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p
SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "ml_version": ([], I64),
    "ml_permute": ([PTR, I64, I64, U64, PTR], None),
    "ml_counts": ([PTR, I64, PTR], None),
    "ml_draw": ([PTR, I64, I64, PTR, PTR], None),
    "ml_block_prefix": ([PTR, I64, U64, PTR], None),
    "ml_advise": ([PTR, I64, I64], None),
    "ml_batch": ([PTR], I64),
}
POOL = 4  # batches whose memory is used again: one in use, two made ahead, one being made
IntArray = npt.NDArray[np.int64]


def _fields(names: str) -> list[tuple[str, Any]]:
    """Fields of a C++ struct, each a number or an address of 8 bytes; a 2 after the name is an array of two."""
    return [(name.removesuffix("2"), I64 * 2 if name.endswith("2") else I64) for name in names.split()]


class _Shard(ctypes.Structure):
    _fields_ = _fields(
        "tokens lengths pointers num_documents num_tokens first_block first_document first_token dtype_code"
    )


class _Domain(ctypes.Structure):
    _fields_ = _fields(
        "mode shards num_shards num_tokens num_blocks samples_per_epoch key epochs2 prefixes2 "
        "document_index sample_index shuffle_index num_indexed sample_index_size shuffle_index_size"
    )


class _Blend(ctypes.Structure):
    _fields_ = _fields("num_leaves nodes light heavy share round_up key window domain first")


class _Batch(ctypes.Structure):
    _fields_ = _fields(
        "domains blend mine start step_size begin count micro_batch_size seq_length vocab_size eod domain ordinal "
        "tokens loss_mask position_ids cu_seqlens num_cu max_seqlen ahead_calls ahead_next "
        "status shard document"
    )


def backend() -> str:
    """ "c++" or "numpy": which kernels `kernels()` gives now."""
    return "numpy" if kernels() is reference else "c++"


def kernels() -> ModuleType:
    """The module to compute with: this one when the library is there and allowed, else reference.py."""
    if os.environ.get("MEGATRON_LITE_NATIVE", "1") == "0" or library() is None:
        return reference
    return sys.modules[__name__]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The shared library beside this file, or None. A stale one is refused: its interface may have changed."""
    for path in sorted(Path(__file__).parent.glob("_native*.so")):
        try:
            found = ctypes.CDLL(str(path))
            for name, (arguments, result) in SIGNATURES.items():
                function = getattr(found, name)
                function.argtypes, function.restype = arguments, result
            if found.ml_version() == VERSION:
                return found
            problem = f"version {found.ml_version()}, expected {VERSION}"
        except (OSError, AttributeError) as error:
            problem = str(error)
        warnings.warn(f"{path} is not usable ({problem}): numpy is used. Build it again: pip install -e .")
    return None


def _c() -> ctypes.CDLL:
    found = library()
    assert found is not None, "native called without its library; ask kernels()"
    return found


def _at(array: npt.NDArray[Any] | None) -> int:
    if array is None:
        return 0
    assert array.flags.c_contiguous
    return array.ctypes.data


def permute(index: IntArray, size: int, key: int) -> IntArray:
    """reference.permute."""
    index = np.ascontiguousarray(index, dtype=np.int64)
    out = np.empty(index.size, dtype=np.int64)
    _c().ml_permute(_at(index), index.size, size, key, _at(out))
    return out


def _blend(tree: QuotaTree, key: int = 0, window: int = 1) -> _Blend:
    arrays: list[npt.NDArray[Any]] = [tree.nodes, tree.light, tree.heavy, tree.share, tree.round_up]
    return _Blend(tree.num_leaves, *(_at(array) for array in arrays), key, window)


def counts(tree: QuotaTree, totals: IntArray) -> IntArray:
    """reference.counts."""
    found, blend = np.empty((len(totals), 2 * tree.num_leaves - 1), dtype=np.int64), _blend(tree)
    for row, total in zip(found, totals.tolist(), strict=True):
        _c().ml_counts(ctypes.byref(blend), total, _at(row))
    return found[:, : tree.num_leaves]


def draw(tree: QuotaTree, key: int, start: int, count: int, window: int) -> tuple[npt.NDArray[np.int32], IntArray]:
    """reference.draw."""
    leaf, ordinal = np.empty(count, dtype=np.int32), np.empty(count, dtype=np.int64)
    _c().ml_draw(ctypes.byref(_blend(tree, key, window)), start, count, _at(leaf), _at(ordinal))
    return leaf, ordinal


def block_prefix(block_tokens: IntArray, key: int) -> IntArray:
    """reference.block_prefix."""
    prefix = np.empty(len(block_tokens) + 1, dtype=np.int64)
    _c().ml_block_prefix(_at(block_tokens), len(block_tokens), key, _at(prefix))
    return prefix


class Gather(reference.Gather):
    """reference.Gather in one C++ call; it comes back to Python only for an epoch's first prefix sums."""

    def __init__(
        self,
        domains: Sequence[DomainSamples | None],
        micro_batch_size: int = 1,
        options: DocumentOptions = NO_MARKS,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(domains, micro_batch_size, options, vocab_size)
        self._table = (_Domain * len(domains))()
        self._held: list[Any] = [
            _fill(entry, domain) for entry, domain in zip(self._table, domains, strict=True) if domain
        ]
        self._prefixes: dict[tuple[int, int], IntArray] = {}
        self._asked: tuple[Any, ...] = (None, None, None)  # blend, first, mine, and what C++ makes of them
        self._pool: list[tuple[npt.NDArray[np.uint8], Callable[[], Any], int]] = []
        self._cu = np.zeros((0, 0), dtype=np.int32)
        self._call = _Batch(
            domains=ctypes.addressof(self._table),
            micro_batch_size=micro_batch_size,
            seq_length=self.seq_length,
            vocab_size=self.limit,
            eod=-1 if options.eod_id is None else options.eod_id,
        )

    def rows(self, domain: npt.NDArray[np.integer[Any]], ordinal: IntArray) -> Rows:
        """reference.Gather.rows."""
        rows = self._allocate(len(domain))
        rows.domain[:], rows.ordinal[:] = domain, ordinal
        return self._run(rows)

    def step(self, blend: Blend, first: IntArray, start: int, step_size: int, mine: IntArray) -> Rows:
        """reference.Gather.step."""
        if not isinstance(blend, Blend):  # Megatron's: drawn by itself
            return super().step(blend, first, start, step_size, mine)
        call = self._call
        if self._asked[0] is not blend or self._asked[1] is not first or self._asked[2] is not mine:
            leaves = first[blend.domains]
            described = _blend(blend.tree, blend.key, blend.window)
            described.domain, described.first = _at(blend.domains), _at(leaves)
            self._asked = (blend, first, mine, described, leaves, ctypes.addressof(described), _at(mine))
        rows = self._allocate(len(mine))
        *_, call.blend, call.mine = self._asked
        call.start, call.step_size = start, step_size
        return self._run(rows)

    def _allocate(self, count: int) -> Rows:
        """Rows in memory that was given out before and that nobody holds any more, if there is such."""
        call, options, shape = self._call, self.options, (count, self.seq_length)
        plane, end = 4 * count * self.seq_length, 16 * count  # bytes
        marks = plane * options.reset_position_ids + plane // 4 * options.eod_mask_loss
        flat, base = self._borrow(end + plane + 4 * count + marks)
        call.domain, call.ordinal = base, base + 8 * count
        domain, ordinal = np.ndarray((2, count), np.int64, flat)
        call.tokens, tokens = base + end, np.ndarray((count, self.seq_length + 1), np.int32, flat, end)
        end += tokens.nbytes
        position_ids = loss_mask = None
        if options.reset_position_ids:
            position_ids, call.position_ids = np.ndarray(shape, np.int32, flat, end), base + end
            end += plane
        if options.eod_mask_loss:
            loss_mask, call.loss_mask = np.ndarray(shape, np.bool_, flat, end), base + end
        return Rows(domain, ordinal, tokens[:, :-1], tokens[:, 1:], loss_mask, position_ids)

    def _borrow(self, size: int) -> tuple[npt.NDArray[np.uint8], int]:
        free = [i for i, (memory, user, _) in enumerate(self._pool) if user() is None and len(memory) == size]
        memory = self._pool.pop(free[0])[0] if free else np.empty(size, dtype=np.uint8)
        flat = np.frombuffer(memory.data, dtype=np.uint8)  # lives as long as any view or tensor made from it
        self._pool = [*self._pool[1 - POOL :], (memory, weakref.ref(flat), _at(memory))]
        return flat, self._pool[-1][2]

    def _run(self, rows: Rows) -> Rows:
        call, count = self._call, len(rows.domain)
        micros = count // self.micro_batch_size
        if self.options.reset_attention_mask and len(self._cu) < micros:
            self._cu = np.empty((micros, self.micro_batch_size * self.seq_length + 1), dtype=np.int32)
            self._num_cu, self._longest = np.empty((2, micros), dtype=np.int64)
            call.cu_seqlens, call.num_cu, call.max_seqlen = _at(self._cu), _at(self._num_cu), _at(self._longest)
        call.begin, call.count = 0, count
        while (done := _c().ml_batch(ctypes.byref(call))) < count:
            domain, ordinal = int(rows.domain[done]), int(rows.ordinal[done])
            call.begin, call.blend = done, 0
            if call.status != NEEDS_EPOCH:
                raise self._fault(call.status, domain, ordinal, call.shard, call.document)
            self._prepare(domain, ordinal)
        call.blend = 0
        if self.options.reset_attention_mask:
            sizes = self._num_cu[:micros].tolist()
            rows.cu_seqlens = [self._cu[i, :size].copy() for i, size in enumerate(sizes)]
            rows.max_seqlen = self._longest[:micros].tolist()
        return rows

    def _prepare(self, which: int, ordinal: int) -> None:
        domain = self.domains[which]
        assert domain is not None
        epoch = ordinal // domain.samples_per_epoch
        slot = epoch & 1
        prefix = self._prefixes[which, slot] = domain.block_prefix(epoch)  # held: C++ keeps only the address
        self._table[which].epochs[slot] = epoch
        self._table[which].prefixes[slot] = _at(prefix)


def _fill(entry: _Domain, domain: DomainSamples) -> Any:
    """Describe a domain; returns what must stay alive as long as the description."""
    shards = (_Shard * len(domain.shards))(*map(_describe, domain.shards))
    entry.shards, entry.num_shards = ctypes.addressof(shards), len(shards)
    for name in ("mode", "num_tokens", "num_blocks", "samples_per_epoch", "key"):
        setattr(entry, name, getattr(domain, name))
    entry.epochs[:] = (-1, -1)
    if domain.indices is not None:
        document, sample, shuffle = domain.indices
        entry.document_index, entry.sample_index, entry.shuffle_index = _at(document), _at(sample), _at(shuffle)
        entry.num_indexed, entry.samples_per_epoch = len(document), len(shuffle)
        entry.sample_index_size, entry.shuffle_index_size = sample.itemsize, shuffle.itemsize
    return shards, domain


def _describe(shard: Shard) -> _Shard:
    code = next(code for code, dtype in DTYPES.items() if dtype == shard.tokens.dtype)
    for array in (shard.tokens, shard.lengths, shard.pointers):
        if array.nbytes:
            _c().ml_advise(array.ctypes.data, array.nbytes, RANDOM_ORDER)
    addresses = (array.ctypes.data for array in (shard.tokens, shard.lengths, shard.pointers))
    places = (shard.num_tokens, shard.first_block, shard.first_document, shard.first_token)
    return _Shard(*addresses, shard.num_documents, *places, code)
