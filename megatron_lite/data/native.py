"""The compiled kernels, loaded by ctypes: the same functions as reference.py, 10 to 40 times faster.

`MEGATRON_LITE_NATIVE=0` forces numpy. `backend()` says which one runs. The library is stateless; numpy owns all memory.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.data import reference
from megatron_lite.data.indexed import DTYPES
from megatron_lite.data.quota import QuotaTree
from megatron_lite.data.samples import DomainSamples

VERSION = 2  # of the C interface: ml_version() in native.cpp
NEEDS_EPOCH, BAD_TOKEN = 1, 2  # native.cpp, Status
NO_VOCAB = (1 << 64) - 1

I64, U64, PTR = ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p
TREE = [I64, PTR, PTR, PTR, PTR]
SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "ml_version": ([], I64),
    "ml_permute": ([PTR, I64, I64, U64, PTR], None),
    "ml_counts": ([*TREE, I64, PTR], None),
    "ml_draw": ([*TREE, U64, I64, I64, I64, PTR, PTR], None),
    "ml_block_prefix": ([PTR, I64, U64, PTR], None),
    "ml_gather": ([PTR, PTR, PTR, I64, I64, I64, U64, I64, PTR, PTR, PTR, PTR], I64),
}
IntArray = npt.NDArray[np.int64]


class _Shard(ctypes.Structure):
    _fields_ = [
        ("tokens", PTR),
        ("lengths", PTR),
        ("pointers", PTR),
        ("num_documents", I64),
        ("first_block", I64),
        ("dtype_code", I64),
    ]


class _Domain(ctypes.Structure):
    _fields_ = [
        ("shards", PTR),
        ("num_shards", I64),
        ("num_blocks", I64),
        ("samples_per_epoch", I64),
        ("key", U64),
        ("epochs", I64 * 2),
        ("prefixes", PTR * 2),
    ]


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


def _at(array: npt.NDArray[Any]) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


def permute(index: IntArray, size: int, key: int) -> IntArray:
    """reference.permute."""
    index = np.ascontiguousarray(index, dtype=np.int64)
    out = np.empty(index.size, dtype=np.int64)
    _c().ml_permute(_at(index), index.size, size, key, _at(out))
    return out


def _tree(tree: QuotaTree) -> tuple[int, int, int, int, int]:
    return tree.num_leaves, _at(tree.nodes), _at(tree.light), _at(tree.heavy), _at(tree.share)


def counts(tree: QuotaTree, totals: IntArray) -> IntArray:
    """reference.counts."""
    found = np.empty((len(totals), 2 * tree.num_leaves - 1), dtype=np.int64)
    for row, total in zip(found, totals.tolist(), strict=True):
        _c().ml_counts(*_tree(tree), total, _at(row))
    return found[:, : tree.num_leaves]


def draw(tree: QuotaTree, key: int, start: int, count: int, window: int) -> tuple[npt.NDArray[np.int32], IntArray]:
    """reference.draw."""
    leaf, ordinal = np.empty(count, dtype=np.int32), np.empty(count, dtype=np.int64)
    _c().ml_draw(*_tree(tree), key, start, count, window, _at(leaf), _at(ordinal))
    return leaf, ordinal


def block_prefix(block_tokens: IntArray, key: int) -> IntArray:
    """reference.block_prefix."""
    prefix = np.empty(len(block_tokens) + 1, dtype=np.int64)
    _c().ml_block_prefix(_at(block_tokens), len(block_tokens), key, _at(prefix))
    return prefix


class Gather:
    """reference.Gather, one C++ call for all rows; it comes back to Python only for an epoch's first prefix sums."""

    def __init__(self, domains: Sequence[DomainSamples]) -> None:
        self.domains = domains  # keeps the mapped files alive
        self._shards = [(_Shard * len(domain.shards))(*map(_describe, domain.shards)) for domain in domains]
        self._table = (_Domain * len(domains))()
        self._prefixes: dict[tuple[int, int], IntArray] = {}
        for entry, domain, shards in zip(self._table, domains, self._shards, strict=True):
            entry.shards = ctypes.addressof(shards)
            entry.num_shards, entry.num_blocks = len(domain.shards), domain.num_blocks
            entry.samples_per_epoch, entry.key = domain.samples_per_epoch, domain.key
            entry.epochs[:] = (-1, -1)

    def __call__(
        self,
        which: npt.NDArray[np.int32],
        ordinal: IntArray,
        tokens: IntArray,
        labels: IntArray | None = None,
        vocab_size: int | None = None,
    ) -> int | None:
        """reference.Gather.__call__."""
        which, ordinal = np.ascontiguousarray(which, np.int32), np.ascontiguousarray(ordinal, np.int64)
        seq_length, (count, width) = self.domains[0].seq_length, tokens.shape
        assert labels is None or labels.shape == (count, seq_length)
        row, status = np.empty(seq_length + 1, dtype=np.int64), ctypes.c_int64()
        limit = NO_VOCAB if vocab_size is None else vocab_size
        outputs = (_at(tokens), None if labels is None else _at(labels), _at(row), ctypes.addressof(status))
        done = 0
        while done < count:
            done = _c().ml_gather(
                self._table, _at(which), _at(ordinal), done, count, seq_length, limit, width, *outputs
            )
            if status.value == BAD_TOKEN:
                return done
            if status.value == NEEDS_EPOCH:
                self._prepare(int(which[done]), int(ordinal[done]))
        return None

    def _prepare(self, which: int, ordinal: int) -> None:
        domain = self.domains[which]
        epoch = ordinal // domain.samples_per_epoch
        slot = epoch & 1
        prefix = self._prefixes[which, slot] = domain.block_prefix(epoch)  # held: C++ keeps only the address
        self._table[which].epochs[slot] = epoch
        self._table[which].prefixes[slot] = _at(prefix)


def _describe(shard: Any) -> _Shard:
    code = next(code for code, dtype in DTYPES.items() if dtype == shard.tokens.dtype)
    addresses = (array.ctypes.data for array in (shard.tokens, shard.lengths, shard.pointers))
    return _Shard(*addresses, shard.num_documents, shard.first_block, code)
