"""The arithmetic of csrc/native.cpp in numpy, bit for bit: for machines without a compiler, and to test the C++ with.

Everything here is a pure function of its arguments. Keys come from keys.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_lite.data.keys import mix64
from megatron_lite.data.quota import QuotaTree
from megatron_lite.data.samples import BLOCK, DomainSamples

HALF_ROUNDS = 6  # three full Feistel rounds: chi-square of positions and differences like a true shuffle's

IntArray = npt.NDArray[np.int64]
KeyArray = npt.NDArray[np.uint64]


def _hash32(value: KeyArray, key: int) -> KeyArray:
    z = (value + np.uint64(key)) * np.uint64(0xFF51AFD7ED558CCD)  # murmur3's finaliser constants
    z = (z ^ (z >> np.uint64(32))) * np.uint64(0xC4CEB9FE1A85EC53)
    return z >> np.uint64(32)


def permute(index: IntArray, size: int, key: int) -> IntArray:
    """A keyed permutation of [0, size), at `index`: Feistel on a grid of a x b cells, walking past the few outside."""
    a = math.isqrt(max(size, 1) - 1) + 1  # ceil(sqrt(size))
    b = -(-size // a)
    keys = [mix64(key, r) for r in range(HALF_ROUNDS)]
    i = np.array(index, dtype=np.uint64)
    todo = np.arange(i.size)
    while todo.size:
        x, y = i[todo] // np.uint64(b), i[todo] % np.uint64(b)
        for r in range(0, HALF_ROUNDS, 2):
            x = (x + ((_hash32(y, keys[r]) * np.uint64(a)) >> np.uint64(32))) % np.uint64(a)
            y = (y + ((_hash32(x, keys[r + 1]) * np.uint64(b)) >> np.uint64(32))) % np.uint64(b)
        i[todo] = x * np.uint64(b) + y
        todo = todo[i[todo] >= size]
    return i.astype(np.int64)


def counts(tree: QuotaTree, totals: IntArray) -> IntArray:
    """Samples of every leaf [len(totals), leaves] when `totals` samples are drawn in all."""
    found = np.zeros((len(totals), 2 * tree.num_leaves - 1), dtype=np.int64)
    found[:, -1] = totals
    for node, light, heavy, share in zip(tree.nodes, tree.light, tree.heavy, tree.share, strict=True):
        part = np.floor(share * found[:, node] + 0.5).astype(np.int64)
        found[:, light] = part
        found[:, heavy] = found[:, node] - part
    return found[:, : tree.num_leaves]


def draw(tree: QuotaTree, key: int, start: int, count: int, window: int) -> tuple[npt.NDArray[np.int32], IntArray]:
    """Samples [start, start + count): which leaf each belongs to, and its ordinal within that leaf."""
    first, last = start // window, -(-(start + count) // window)
    edges = counts(tree, np.arange(first, last + 1) * window)
    leaves, ordinals = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for before, after, number in zip(edges[:-1], edges[1:], range(first, last), strict=True):
        slots = np.repeat(np.arange(tree.num_leaves), after - before)
        leaf = slots[permute(np.arange(window), window, mix64(key, number))]
        by_leaf = np.argsort(leaf, kind="stable")  # a leaf's samples come in order of position
        ordinal = np.empty(window, dtype=np.int64)
        ordinal[by_leaf] = before[slots] + np.arange(window) - np.searchsorted(slots, slots)
        leaves.append(leaf)
        ordinals.append(ordinal)
    wanted = slice(start - first * window, start - first * window + count)
    return np.concatenate(leaves)[wanted].astype(np.int32), np.concatenate(ordinals)[wanted]


def block_prefix(block_tokens: IntArray, key: int) -> IntArray:
    """Tokens before each block when blocks are taken in the order that `key` gives; one entry more than blocks."""
    order = permute(np.arange(len(block_tokens)), len(block_tokens), key)
    prefix = np.zeros(len(block_tokens) + 1, dtype=np.int64)
    np.cumsum(block_tokens[order], out=prefix[1:])
    return prefix


class Gather:
    """Fill rows of tokens for (domain, ordinal) pairs. One object serves one reader at a time."""

    def __init__(self, domains: Sequence[DomainSamples]) -> None:
        self.domains = domains

    def __call__(
        self,
        which: npt.NDArray[np.int32],
        ordinal: IntArray,
        tokens: IntArray,
        labels: IntArray | None = None,
        vocab_size: int | None = None,
    ) -> int | None:
        """Write tokens [n, seq_length or seq_length + 1] and labels [n, seq_length]; returns a row with a bad token."""
        for i, (domain, j) in enumerate(zip(which.tolist(), ordinal.tolist(), strict=True)):
            row = _read_sample(self.domains[domain], j)
            if row.min() < 0 or (vocab_size is not None and row.max() >= vocab_size):
                return i
            tokens[i] = row[: tokens.shape[1]]
            if labels is not None:
                labels[i] = row[1:]
        return None


def _read_sample(domain: DomainSamples, ordinal: int) -> IntArray:
    """Sample `ordinal` of a domain: a window of the epoch's stream of documents, seq_length + 1 tokens."""
    epoch, rank = divmod(ordinal, domain.samples_per_epoch)
    epoch_key = mix64(domain.key, epoch)
    window = permute(np.array([rank]), domain.samples_per_epoch, mix64(epoch_key, 2))[0]
    start, length = int(window) * domain.seq_length, domain.seq_length + 1
    prefix = domain.block_prefix(epoch)
    position = int(np.searchsorted(prefix, start, side="right")) - 1
    skip, pieces = start - int(prefix[position]), []
    while length > 0:
        block = int(permute(np.array([position]), domain.num_blocks, mix64(epoch_key, 0))[0])
        shard = domain.shards[np.searchsorted([s.first_block for s in domain.shards], block, side="right") - 1]
        first = (block - shard.first_block) * BLOCK
        size = min(BLOCK, shard.num_documents - first)
        documents = first + permute(np.arange(size), size, mix64(mix64(epoch_key, 1), block))
        ends = np.cumsum(shard.lengths[documents], dtype=np.int64)
        for i in range(int(np.searchsorted(ends, skip, side="right")), size):
            tokens = int(shard.lengths[documents[i]])
            offset = skip - (int(ends[i]) - tokens)
            take = min(tokens - offset, length)
            at = int(shard.pointers[documents[i]]) // shard.tokens.itemsize + offset
            pieces.append(shard.tokens[at : at + take].astype(np.int64))
            length -= take
            skip += take
            if length == 0:
                break
        skip, position = 0, position + 1
    return np.concatenate(pieces)
