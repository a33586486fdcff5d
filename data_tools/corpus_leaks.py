"""Keeps the targets unseen: no training text may share a run of 13 words with them.

For readme the training paragraph goes, or the readme itself if too much of it is in the training text. For messages,
which are cut out of code, the message goes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_tools.corpus_filter import MIN_CHARS, Document, segment_hashes

NGRAM = 13  # words: GPT-3's decontamination length (Brown et al. 2020, appendix C)
LEAKED = 0.2  # share of its n-grams in the training text above which a target document is dropped
CHUNK_BYTES = 3_000_000

_LOWER = bytes(range(256)).lower()
_WORD_BYTES = np.array([b if b >= 128 or chr(b).isalnum() else 0 for b in _LOWER], np.uint8)  # 0 between words


def ngram_hashes(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hash, start byte and end byte of each NGRAM-word window; words are lower-case runs of letters and digits."""
    data = _WORD_BYTES[np.frombuffer(text.encode(), np.uint8)]
    inside = np.concatenate([[0], (data != 0).astype(np.int8), [0]])
    edges = np.diff(inside)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    words = segment_hashes(data, starts, ends)
    first = np.arange(max(len(words) - NGRAM + 1, 0))
    return segment_hashes(words, first, first + NGRAM), starts[first], ends[first + NGRAM - 1]


def find_overlaps(texts: Sequence[str], target: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(index, the distinct n-grams of `target` that it contains) for each of `texts` that contains one.

    `target` is sorted. A table over 22 bits of the hash rejects almost all n-grams before the exact look-up.
    """
    table = np.zeros(1 << 22, bool)
    table[target >> np.uint64(42)] = True
    hits: list[tuple[int, np.ndarray]] = []
    if not len(target):
        return hits
    for i, text in enumerate(texts):
        grams = ngram_hashes(text)[0]
        grams = grams[table[grams >> np.uint64(42)]]
        found = np.unique(grams[target[np.searchsorted(target[:-1], grams)] == grams])
        if len(found):
            hits.append((i, found))
    return hits


def drop_paragraphs(text: str, banned: np.ndarray) -> str:
    """`text` without the paragraphs (lines between blank lines) that any n-gram of `banned` touches."""
    while True:
        grams, starts, ends = ngram_hashes(text)
        hit = np.isin(grams, banned)
        if not hit.any():
            return text
        data = text.encode()
        breaks = np.array([*(match.start() for match in re.finditer(rb"\n\n", data)), len(data)])
        touched = set[int]()
        for start, end in zip(starts[hit].tolist(), ends[hit].tolist(), strict=True):
            touched.update(range(int(np.searchsorted(breaks, start)), int(np.searchsorted(breaks, end - 1)) + 1))
        edges = [0, *breaks.tolist()]
        pieces = [data[edges[i] : edges[i + 1]] for i in range(len(breaks)) if i not in touched]
        text = b"".join(pieces).decode().strip("\n") + "\n"


def _text_chunks(documents: Sequence[Document]) -> Iterator[tuple[int, list[str]]]:
    """(index of the first, texts) of runs of about CHUNK_BYTES characters."""
    first, texts, total = 0, list[str](), 0
    for i, document in enumerate(documents):
        texts.append(document.text)
        total += len(document.text)
        if total >= CHUNK_BYTES:
            yield first, texts
            first, texts, total = i + 1, [], 0
    if texts:
        yield first, texts


@dataclass(frozen=True)
class FindOverlaps:
    """`find_overlaps` with its target bound, so that a pool of processes can map it over chunks."""

    target: np.ndarray

    def __call__(self, chunk: tuple[int, list[str]]) -> list[tuple[int, np.ndarray]]:
        return [(chunk[0] + i, found) for i, found in find_overlaps(chunk[1], self.target)]


def _union(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *arrays]))


def remove_leaks(
    kept: dict[str, list[Document]], in_order: Callable[[Callable[..., Any], list[Any]], list[Any]]
) -> tuple[dict[str, list[Document]], dict[str, dict[str, int]]]:
    """`kept` (domain -> documents) with no NGRAM of a target left in a training document, and counts of what went.

    in_order(function, items) is `map` as a list, in as many processes as the caller likes.
    """
    training = [d for some in kept.values() for d in some if d.split == "train"]
    grams = {t: [ngram_hashes(d.text)[0] for d in kept.get(t, [])] for t in ("readme", "messages")}
    target = _union([g for some in grams.values() for g in some])
    results = in_order(FindOverlaps(target), list(_text_chunks(training)))
    overlaps = [hit for result in results for hit in result]
    seen = _union([found for _, found in overlaps])
    shared = [np.isin(g, seen).mean() if len(g) else 0.0 for g in grams["readme"]]
    readmes = [d for d, share in zip(kept.get("readme", []), shared, strict=True) if share <= LEAKED]
    banned = _union([g for g, share in zip(grams["readme"], shared, strict=True) if share <= LEAKED])
    cut = {}
    for i, found in overlaps:
        if np.isin(found, banned).any():
            cut[id(training[i])] = drop_paragraphs(training[i].text, banned)
    told = [replace(d, text=drop_paragraphs(d.text, seen)) for d in kept.get("messages", [])]
    report = {
        "readme": {
            "ngrams": len(_union(grams["readme"])),
            "ngrams_in_training_text": int(np.isin(_union(grams["readme"]), seen).sum()),
            "documents_dropped": len(shared) - len(readmes),
            "training_documents_cut": len(cut),
            "training_characters_cut": sum(len(d.text) - len(cut[id(d)]) for d in training if id(d) in cut),
        },
        "messages": {
            "ngrams": len(_union(grams["messages"])),
            "ngrams_in_training_text": int(np.isin(_union(grams["messages"]), seen).sum()),
            "characters_cut": sum(len(d.text) for d in kept.get("messages", [])) - sum(len(d.text) for d in told),
        },
    }
    clean = {name: [replace(d, text=cut.get(id(d), d.text)) for d in some] for name, some in kept.items()}
    clean |= {"readme": readmes, "messages": told}
    return {n: [d for d in some if len(d.text) >= MIN_CHARS] for n, some in clean.items()}, report
