"""Pieces lose nothing, keep to their size, and deal the target fairly into two halves."""

import numpy as np

from data_tools.corpus_filter import Document
from data_tools.corpus_pieces import MIN_PIECE_BYTES, PIECE_BYTES, in_pieces, pieces_of


def document(text: str, domain: str = "prose", source: int = 0) -> Document:
    return Document(domain, "valid", source, 1000 + source, text, np.zeros(0, np.uint64))


def test_joined_pieces_are_the_text():
    lines = "".join(f"line {i} of a long file, with words\n" for i in range(1000))
    for text in (lines, "short", "x" * 20_000, "caf\u00e9 " * 4000, "a\n" * 3000 + "b" * 9000):
        pieces = pieces_of(text)
        assert "".join(pieces) == text
        assert all(len(p.encode()) <= PIECE_BYTES + MIN_PIECE_BYTES for p in pieces)
    assert len(pieces_of(lines)) > 5 and all(p.endswith("\n") for p in pieces_of(lines)), "cut at line ends"


def test_order_is_by_hash_and_does_not_depend_on_the_order_of_documents():
    documents = [document(f"text {i}\n" * 900, source=i) for i in range(6)]
    first, second = in_pieces(documents), in_pieces(documents[::-1])
    assert [d.text for d in first] == [d.text for d in second]
    assert [d.source for d in first] != sorted(d.source for d in first), "files must be interleaved"
    assert {d.split for d in first} == {"valid"}


def test_the_target_is_halved_piece_by_piece():
    pieces = in_pieces([document(f"readme {i}\n" * 3000, "readme", i) for i in range(4)])
    halves = {split: [p for p in pieces if p.split == split] for split in ("valid", "test")}
    assert abs(len(halves["valid"]) - len(halves["test"])) <= 1
    for half in halves.values():  # both halves hold something of nearly every file
        assert len({p.source for p in half}) >= 3
    assert not {id(p) for p in halves["valid"]} & {id(p) for p in halves["test"]}
