"""Docstrings into four kinds of text: prose, apiref (parameter sections), repl (`>>>` sessions) and math.

Each line of a docstring goes to one kind at most. Layout in: numpydoc (title underlined), Google (`Args:`), Sphinx
fields (`:param x:`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_API_TITLE = re.compile(
    r"arg(ument)?s|attributes|inputs|key ?word arg(ument)?s|kwargs|methods|(other )?parameters|outputs|properties"
    r"|raises|receives|returns?|warns|yields?"
)
_GOOGLE_TITLE = re.compile(
    r"(Args|Arguments|Attributes|Inputs|Keyword args|Keyword arguments|Outputs|Parameters|Raises|Returns?|Yields?"
    r"|Examples?|Notes?|Warnings?|Shape|References|See also):\s*$",
    re.IGNORECASE,
)
_UNDERLINE = re.compile(r"\s*([-=~])\1{2,}\s*$")
_FIELD = re.compile(r"\s*:(param|parameter|arg|argument|key|keyword|type|raises?|returns?|rtype|ivar|vartype|var)\b")
_MATH = re.compile(r"\.\. math::|:math:`|\\frac|\\sum_|\\int_|\\mathbb|\\left\(")
_NOT_LETTERS = re.compile(r"[^A-Za-z\s]+")
_LEGAL = re.compile(r"copyright|\(c\) \d{4}|licen[sc]ed? |all rights reserved|SPDX-|warranty", re.IGNORECASE)

MIN_WORDS = 6  # a shorter paragraph is a heading or a label
MIN_LETTERS = 0.75  # share of letters and blanks below which a paragraph is a table, a formula or code


def is_legal(text: str) -> bool:
    """Whether `text` is a licence notice: those repeat in every file and teach nothing."""
    return _LEGAL.search(text) is not None


def is_prose(text: str, min_words: int = MIN_WORDS) -> bool:
    """Whether `text` reads as English: enough words, and few characters that are not letters or blanks."""
    if len(text.split(None, min_words)) < min_words or is_legal(text):
        return False
    return len(_NOT_LETTERS.sub("", text)) >= MIN_LETTERS * len(text)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def dedent(lines: list[str]) -> str:
    """`lines` joined, without the blanks that all of them start with and without blank lines at the ends."""
    margin = min((_indent(line) for line in lines if line.strip()), default=0)
    return "\n".join(line[margin:].rstrip() for line in lines).strip("\n")


def take_repl(lines: list[str]) -> tuple[list[str], list[str]]:
    """Split off the `>>>` sessions, each up to the next blank line; a blank line stays where one was."""
    sessions, rest = [], []
    session: list[str] = []
    for line in [*lines, ""]:
        if line.lstrip().startswith(">>>") or (session and line.strip()):
            session.append(line)
            continue
        if session:
            sessions.append(dedent(session))
            session = []
        rest.append(line)
    return sessions, rest


def sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The sections of a docstring as (title in lower case or "", lines with the title line)."""
    title, block, google_indent = "", list[str](), -1
    for i, line in enumerate(lines):
        underlined = i + 1 < len(lines) and bool(line.strip()) and _UNDERLINE.match(lines[i + 1]) is not None
        google = None if underlined else _GOOGLE_TITLE.match(line.strip())
        left_google = google_indent >= 0 and line.strip() and _indent(line) <= google_indent
        if underlined or google or left_google:
            yield title, block
            block = []
            title = line.strip().rstrip(":").lower() if underlined or google else ""
            google_indent = _indent(line) if google else -1
        block.append(line)
    yield title, block


def split_fields(lines: list[str]) -> tuple[list[str], list[str]]:
    """Split off Sphinx fields (`:param x: ...` with the indented lines that follow) from the other lines."""
    fields, rest, field_indent = list[str](), list[str](), -1
    for line in lines:
        if _FIELD.match(line):
            field_indent = _indent(line)
        elif not line.strip() or _indent(line) <= field_indent:
            field_indent = -1
        (fields if field_indent >= 0 else rest).append(line)
    return fields, rest


def paragraphs(text: str) -> list[str]:
    """The pieces of `text` between blank lines."""
    return [piece.strip("\n") for piece in re.split(r"\n[ \t]*\n\s*?(?=[^\n])", text) if piece.strip()]


def split_docstring(doc: str) -> dict[str, list[str]]:
    """The pieces of one docstring (as `inspect.cleandoc` leaves it), by kind.

    A docstring with formulas gives its paragraphs to math, formulas and all; any other gives those that read as
    English to prose.
    """
    pieces: dict[str, list[str]] = {"prose": [], "apiref": [], "repl": [], "math": []}
    sessions, lines = take_repl(doc.split("\n"))
    pieces["repl"] = sessions
    body: list[str] = []
    for title, block in sections(lines):
        if _API_TITLE.fullmatch(title):
            text = dedent(block)
            if text.count("\n") >= 1 and not is_legal(text):
                pieces["apiref"].append(text)
            continue
        fields, rest = split_fields(block)
        if fields:
            pieces["apiref"].append(dedent(fields))
        body += rest
    text = "\n".join(body)
    if _MATH.search(text):
        pieces["math"] = [dedent(p.split("\n")) for p in paragraphs(text) if len(p.split()) > 2]
    else:
        pieces["prose"] = [p for p in (dedent(p.split("\n")) for p in paragraphs(text)) if is_prose(p)]
    return pieces
