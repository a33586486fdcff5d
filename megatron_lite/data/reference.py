"""The arithmetic of csrc/ in numpy, bit for bit: for machines without a compiler, and to test the C++ with.

Everything here is a pure function of its arguments. Keys come from keys.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.data.batch import NO_MARKS, TOKEN_LIMIT, DocumentOptions, Rows, mark_documents
from megatron_lite.data.blend import Blend
from megatron_lite.data.keys import mix64
from megatron_lite.data.quota import QuotaTree
from megatron_lite.data.samples import BAD_PIECE, BAD_STREAM, BAD_TOKEN, BLOCK, MODES, DomainSamples

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
    for node, light, heavy, share, up in zip(
        tree.nodes, tree.light, tree.heavy, tree.share, tree.round_up, strict=True
    ):
        part = np.floor(share * found[:, node] + up).astype(np.int64)
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
    """Fill rows of tokens for (domain, ordinal) pairs. One object serves one reader at a time.

    `domains` may hold None where nothing is ever drawn. All have one seq_length.
    Errors name domain, shard and document.
    """

    def __init__(
        self,
        domains: Sequence[DomainSamples | None],
        micro_batch_size: int = 1,
        options: DocumentOptions = NO_MARKS,
        vocab_size: int | None = None,
    ) -> None:
        self.domains, self.micro_batch_size = domains, micro_batch_size
        self.options, self.vocab_size = options, vocab_size
        self.limit = TOKEN_LIMIT if vocab_size is None else min(vocab_size, TOKEN_LIMIT)
        self.seq_length = next(domain.seq_length for domain in domains if domain is not None)

    def rows(self, domain: npt.NDArray[np.integer[Any]], ordinal: IntArray) -> Rows:
        """The samples `ordinal` [n] of the domains `domain` [n], an index into `domains`, with their marks."""
        tokens = np.empty((len(domain), self.seq_length + 1), dtype=np.int32)
        for row, which, j in zip(tokens, domain.tolist(), ordinal.tolist(), strict=True):
            source, filled = self.domains[which], 0
            assert source is not None
            for status, shard, document, at, count in sample_pieces(source, j):
                if status == 0:
                    piece = source.shards[shard].tokens[at : at + count]
                    status = 0 if not count or (piece.min() >= 0 and piece.max() < self.limit) else BAD_TOKEN
                if status:
                    raise self._fault(status, which, j, shard, document)
                row[filled : filled + count] = piece
                filled += count
        rows = Rows(domain.astype(np.int64), ordinal, tokens[:, :-1], tokens[:, 1:])
        if self.options.any:
            mark_documents(rows, self.options, self.micro_batch_size)
        return rows

    def step(self, blend: Blend, first: IntArray, start: int, step_size: int, mine: IntArray) -> Rows:
        """The rows `mine` (ascending) of samples start .. start + step_size - 1 of the blend, in one call.

        `first` [domains]: the ordinal at which the blend begins in each domain.
        """
        domain, ordinal = blend.draw(start, step_size)
        return self.rows(domain[mine], (first[domain] + ordinal)[mine])

    def _fault(self, status: int, which: int, ordinal: int, shard: int, document: int) -> ValueError:
        domain = self.domains[which]
        assert domain is not None
        return domain.fault(status, ordinal, shard, document, self.vocab_size)


Piece = tuple[int, int, int, int, int]  # status (0: good), shard, document in the shard or -1, first token, tokens


def sample_pieces(domain: DomainSamples, ordinal: int) -> Iterator[Piece]:
    """Where the seq_length + 1 tokens of a sample lie in the .bin files, checked against their sizes."""
    if domain.mode == MODES["megatron"]:
        yield from _index_pieces(domain, ordinal)
        return
    epoch, rank = divmod(ordinal, domain.samples_per_epoch)
    epoch_key = mix64(domain.key, epoch)
    window = permute(np.array([rank]), domain.samples_per_epoch, mix64(epoch_key, 2))[0]
    start = int(window) * domain.seq_length
    if domain.mode == MODES["contiguous"]:
        yield from _ring_pieces(domain, (mix64(epoch_key, 3) % domain.num_tokens + start) % domain.num_tokens)
    else:
        yield from _document_pieces(domain, epoch, epoch_key, start)


def _document_pieces(domain: DomainSamples, epoch: int, epoch_key: int, start: int) -> Iterator[Piece]:
    prefix, length = domain.block_prefix(epoch), domain.seq_length + 1
    position = int(np.searchsorted(prefix, start, side="right")) - 1
    skip = start - int(prefix[position])
    while length > 0:
        if position >= domain.num_blocks:
            yield BAD_STREAM, len(domain.shards) - 1, -1, 0, 0
        block = int(permute(np.array([position]), domain.num_blocks, mix64(epoch_key, 0))[0])
        s = int(np.searchsorted([s.first_block for s in domain.shards], block, side="right")) - 1
        shard = domain.shards[s]
        first = (block - shard.first_block) * BLOCK
        size = min(BLOCK, shard.num_documents - first)
        if size <= 0:
            yield BAD_STREAM, s, -1, 0, 0
        for document in (first + permute(np.arange(size), size, mix64(mix64(epoch_key, 1), block))).tolist():
            tokens, at = int(shard.lengths[document]), shard.locate(document)
            if tokens < 0 or (tokens > skip and at < 0):
                yield BAD_PIECE, s, document, 0, 0
            if tokens <= skip:
                skip -= tokens
                continue
            take = min(tokens - skip, length)
            yield 0, s, document, at + skip, take
            length, skip = length - take, 0
            if length == 0:
                return
        if skip > 0:
            yield BAD_STREAM, s, -1, 0, 0
        position += 1


def _ring_pieces(domain: DomainSamples, start: int) -> Iterator[Piece]:
    length = domain.seq_length + 1
    edges = [*(shard.first_token for shard in domain.shards), domain.num_tokens]
    s = int(np.searchsorted(edges, start, side="right")) - 1
    while length > 0:
        shard, at, take = domain.shards[s], start - edges[s], min(edges[s + 1] - start, length)
        yield BAD_PIECE if at + take > shard.num_tokens else 0, s, -1, at, take
        length, start = length - take, start + take
        if start == edges[s + 1]:
            s = (s + 1) % len(domain.shards)
            start = edges[s]


def _index_pieces(domain: DomainSamples, ordinal: int) -> Iterator[Piece]:
    assert domain.indices is not None
    (document, sample, shuffle), length = domain.indices, domain.seq_length + 1
    j = int(shuffle[ordinal]) if ordinal < len(shuffle) else -1
    if not 0 <= j < len(shuffle):
        yield BAD_STREAM, 0, -1, 0, 0
    (place, offset), last = sample[j].tolist(), int(sample[j + 1][0])
    while length > 0:
        number = int(document[place]) if 0 <= place <= last and place < len(document) else -1
        if number < 0:
            yield BAD_STREAM, 0, -1, 0, 0
        s = int(np.searchsorted([shard.first_document for shard in domain.shards], number, side="right")) - 1
        shard, number = domain.shards[s], number - domain.shards[s].first_document
        if number >= shard.num_documents:
            yield BAD_STREAM, s, -1, 0, 0
        tokens, at = int(shard.lengths[number]), shard.locate(number)
        if at < 0 or not 0 <= offset <= tokens:
            yield BAD_PIECE, s, number, 0, 0
        take = min(tokens - offset, length)
        yield 0, s, number, at + offset, take
        length, place, offset = length - take, place + 1, 0
