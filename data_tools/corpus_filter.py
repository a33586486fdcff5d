"""What leaves the corpus within a domain: near-duplicates, paragraphs seen before, what a full domain cannot take.

Hashes are 64-bit polynomials over bytes, computed with numpy: the same on every machine and in every process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from data_tools.corpus_docstrings import paragraphs

LINE_CHARS = 25  # a shorter line says nothing about where it came from
NEAR_DUPLICATE = 0.7  # share of such lines already seen from which a document is a copy
MIN_CHARS = 100
VALID_DOCUMENT_BYTES = 24_000  # so that a capped validation set has many documents
PARAGRAPH_DOMAINS = frozenset({"prose", "apiref", "comments", "math", "messages"})

_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
_SPACE_BYTES = np.isin(np.arange(256), list(b" \t\n\r\f\v"))


@dataclass(frozen=True)
class Document:
    """One text of one domain, and the file it came from."""

    domain: str
    split: str  # train | valid | test
    source: int  # index into the list of sources
    order: int  # the source's hash: the order of documents everywhere
    text: str
    lines: np.ndarray  # uint64, hashes of its lines of at least LINE_CHARS visible characters


@lru_cache(maxsize=32)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    both = []
    for base in (_BASE, pow(_BASE, -1, 2**64)):
        steps = np.full(count, base, np.uint64)
        steps[0] = 1
        both.append(np.cumprod(steps, dtype=np.uint64))
    return both[0], both[1]


def segment_hashes(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """uint64 hash of each `values[starts[i]:ends[i]]`, whatever its position; arithmetic is modulo 2**64."""
    power, inverse = _powers(1 << int(len(values) + 1).bit_length())
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum((values.astype(np.uint64) + np.uint64(1)) * power[: len(values)], out=sums[1:])
    mixed = (sums[ends] - sums[starts]) * inverse[starts]
    mixed ^= mixed >> np.uint64(32)
    hashes: np.ndarray = mixed * np.uint64(0xD6E8FEB86659FD93)
    return hashes


def line_hashes(text: str) -> np.ndarray:
    """Distinct hashes of the lines with at least LINE_CHARS visible characters; blanks do not count."""
    data = np.frombuffer(text.encode(), np.uint8)
    visible = ~_SPACE_BYTES[data]
    ends = np.append(np.cumsum(visible)[data == 10], visible.sum())
    starts = np.concatenate([[0], ends[:-1]])
    long = ends - starts >= LINE_CHARS
    return np.unique(segment_hashes(data[visible], starts[long], ends[long]))


def cut_at_line(text: str, max_bytes: int) -> str:
    """The start of `text`, at most `max_bytes` of UTF-8, ending at a line end if there is one, else at a blank."""
    data = text.encode()
    if len(data) <= max_bytes:
        return text
    head = data[:max_bytes]
    end = max(head.rfind(b"\n"), -1) + 1 or max(head.rfind(b" "), 0)
    return head[:end].decode("utf-8", "ignore")


def keep_unique(documents: Iterable[Document], max_bytes: dict[str, int]) -> tuple[list[Document], dict[str, int]]:
    """One domain's documents without copies, each split cut at `max_bytes[split]`; and counts of what went.

    Held-out documents come first, so a training document that copies one is the one to go; inside a split the order is
    the hash of the path. A split that is full takes no more.
    """
    rank = {"valid": 0, "test": 1, "train": 2}
    seen_lines: set[int] = set()
    seen_paragraphs: set[bytes] = set()
    kept: list[Document] = []
    used = dict.fromkeys(max_bytes, 0)
    gone = {"near_duplicates": 0, "repeated_paragraphs": 0, "too_short": 0, "over_cap": 0}
    for document in sorted(documents, key=lambda d: (rank[d.split], d.order, d.source)):
        room = max_bytes[document.split] - used[document.split]
        if room < MIN_CHARS:
            gone["over_cap"] += 1
            continue
        lines = document.lines.tolist() or [int.from_bytes(hashlib.sha256(document.text.encode()).digest()[:8], "big")]
        if sum(line in seen_lines for line in lines) >= NEAR_DUPLICATE * len(lines):
            gone["near_duplicates"] += 1
            continue
        text = document.text
        if document.domain in PARAGRAPH_DOMAINS:
            pieces = paragraphs(text)
            fresh = _new_paragraphs(pieces, seen_paragraphs)
            gone["repeated_paragraphs"] += len(pieces) - len(fresh)
            text = "\n\n".join(fresh) + "\n"
        if document.split != "train" and document.domain != "readme":
            room = min(room, VALID_DOCUMENT_BYTES)
        text = cut_at_line(text, room)
        if len(text) < MIN_CHARS:
            gone["too_short"] += 1
            continue
        seen_lines.update(lines)
        used[document.split] += len(text.encode())
        kept.append(replace(document, text=text))
    return kept, gone


def _new_paragraphs(pieces: list[str], seen: set[bytes]) -> list[str]:
    """Those of `pieces` that are not in `seen`, which learns them; case and blanks do not count."""
    fresh = []
    for paragraph in pieces:
        digest = hashlib.sha256(" ".join(paragraph.lower().split()).encode()).digest()[:12]
        if digest not in seen:
            seen.add(digest)
            fresh.append(paragraph)
    return fresh
