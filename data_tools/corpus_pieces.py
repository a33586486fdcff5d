"""Documents cut into pieces of a few thousand bytes, in hash order: any prefix of a file is a fair sample of it.

Whole files are lumpy: two of them can be a tenth of `tables`. The target is cut before it is halved, so that the half
that the search sees and the half that judges it are the same kind of text; no piece is in both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from data_tools.corpus_filter import Document, cut_at_line

PIECE_BYTES = 4_000  # about a thousand tokens of a small vocabulary
MIN_PIECE_BYTES = 400  # a shorter rest stays with the piece before it
HALVED = "readme"  # the domain whose pieces are dealt to valid and test in turn


def pieces_of(text: str) -> list[str]:
    """The text cut at line ends into pieces of about PIECE_BYTES; joined they give the text back."""
    pieces = []
    while len(text.encode()) > PIECE_BYTES + MIN_PIECE_BYTES:
        piece = cut_at_line(text, PIECE_BYTES) or text[:PIECE_BYTES]
        pieces.append(piece)
        text = text[len(piece) :]
    return [*pieces, text]


def in_pieces(documents: Iterable[Document]) -> list[Document]:
    """One domain's documents as pieces, ordered by the hash of where they come from and what they say."""
    keyed = []
    for document in documents:
        for number, piece in enumerate(pieces_of(document.text)):
            if piece.strip():
                key = hashlib.sha256(f"{document.order}/{document.source}/{number}\n{piece}".encode()).digest()
                keyed.append((key, replace(document, text=piece)))
    keyed.sort(key=lambda pair: pair[0])
    pieces = [document for _, document in keyed]
    return _halve(pieces) if pieces and pieces[0].domain == HALVED else pieces


def _halve(pieces: Sequence[Document]) -> list[Document]:
    return [replace(piece, split=("valid", "test")[turn % 2]) for turn, piece in enumerate(pieces)]
