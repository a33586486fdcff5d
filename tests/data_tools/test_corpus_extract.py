"""What each extractor takes out of a file: one literal example for each kind of text."""

import pytest

from data_tools.corpus_docstrings import split_docstring
from data_tools.corpus_extract import extract

DOCSTRING = """Fit a line to the points that were given.

The slope is found by least squares, and ties are broken in favour of
the smaller intercept.

Parameters
----------
x : array_like
    Where the points are.

Notes
-----
Points that are not finite are left out before anything else happens.

Examples
--------
>>> fit([0, 1], [1, 3])
(2.0, 1.0)
"""


def test_docstring_gives_each_line_to_one_kind() -> None:
    pieces = split_docstring(DOCSTRING)
    assert pieces["repl"] == [">>> fit([0, 1], [1, 3])\n(2.0, 1.0)"]
    assert pieces["apiref"] == ["Parameters\n----------\nx : array_like\n    Where the points are."]
    assert pieces["prose"] == [
        "Fit a line to the points that were given.",
        "The slope is found by least squares, and ties are broken in favour of\nthe smaller intercept.",
        "Notes\n-----\nPoints that are not finite are left out before anything else happens.",
    ]
    assert pieces["math"] == []


def test_docstring_in_google_and_sphinx_layout() -> None:
    google = split_docstring(
        "Add.\n\nArgs:\n    x: the first\n    y: the second\n\nThis line is back in the body of it."
    )
    assert google["apiref"] == ["Args:\n    x: the first\n    y: the second"]
    assert google["prose"] == ["This line is back in the body of it."]
    sphinx = split_docstring(":param x: what to add, and\n    what to leave\n:returns: the sum\n")
    assert sphinx["apiref"] == [":param x: what to add, and\n    what to leave\n:returns: the sum"]


def test_docstring_with_formulas_goes_to_math() -> None:
    pieces = split_docstring(
        "The mean of the values is\n\n.. math:: \\frac{1}{n} \\sum_i x_i\n\nand nothing else at all."
    )
    assert pieces["prose"] == []
    assert pieces["math"][1] == ".. math:: \\frac{1}{n} \\sum_i x_i"


PYTHON = '''# Copyright 2020 Somebody. All rights reserved.
"""The module says what it is for in one line."""
TEXT = """
# this is a line of a string and it is not a comment at all
"""

# The order matters here because the second
# call reads what the first one wrote.
def f(x):
    """Return twice the number that the caller handed in."""
    # short note
    if x < 0:
        raise ValueError(f"x must not be negative, but it is {x}" + " here")
    raise TypeError("expected %s and got nothing" % x)
'''


def test_python_file_is_shared_out_among_domains() -> None:
    found = extract("python", "a/b.py", PYTHON.encode())
    assert found["comments"] == "The order matters here because the second\ncall reads what the first one wrote.\n"
    assert found["prose"] == (
        "The module says what it is for in one line.\n\nReturn twice the number that the caller handed in.\n"
    )
    assert found["messages"] == ("x must not be negative, but it is {x} here\n\nexpected %s and got nothing\n")
    code = found["python"]
    assert "# this is a line of a string" in code and "# short note" in code and "if x < 0:" in code
    for gone in ("Copyright", "order matters", "says what it is for", "Return twice"):
        assert gone not in code


def test_documentation_handed_to_a_call_is_a_docstring() -> None:
    text = 'add_docstr(torch.abs, r"""\n' + "Compute the absolute value of every element of the input.\n" * 3 + '""")\n'
    found = extract("python", "a.py", text.encode())
    assert found["prose"].startswith("Compute the absolute value") and "Compute" not in found["python"]


def test_an_f_string_is_never_a_docstring() -> None:
    # CPython 3.11 and 3.12 give its parts other positions: taking them would make the corpus depend on the interpreter.
    text = 'x = 1\nregister(f"""' + "Compute the absolute value of every element of {x} the input.\n" * 4 + '""")\n'
    found = extract("python", "a.py", text.encode())
    assert "prose" not in found and found["python"] == text


def test_c_file_is_split_into_code_and_comments() -> None:
    text = (
        "/* Copyright 2020 Somebody.\n * All rights reserved. */\n"
        "// Walks over the list once and frees every\n// node that nobody owns any more.\n"
        'int f(void) { return g("/* not a comment but a string literal of nine words */"); }  // short\n'
        "/**\n * The caller keeps the ownership of the buffer that it hands in.\n */\nint h(char *b);\n"
    )
    found = extract("cpp", "a.h", text.encode())
    assert found["comments"] == (
        "Walks over the list once and frees every\nnode that nobody owns any more.\n\n"
        "The caller keeps the ownership of the buffer that it hands in.\n"
    )
    kept = 'int f(void) { return g("/* not a comment but a string literal of nine words */"); }  // short'
    assert found["cpp"] == kept + "\n\nint h(char *b);\n"


def test_tables_are_mostly_numbers_and_readmes_have_no_headers() -> None:
    assert extract("tables", "a.csv", b"1,2,3\n4,5,6\n") == {"tables": "1,2,3\n4,5,6\n"}
    assert extract("tables", "a.txt", b"words and words only, with 1 number") == {}
    meta = b"Name: x\nVersion: 1\n\n# Title\n[![badge](https://img.shields.io/x)](y)\nIt does things.\n"
    assert extract("readme", "x-1.dist-info/METADATA", meta) == {"readme": "# Title\nIt does things.\n"}


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"def f(:\n", b"# @generated by a tool\nx = 1\n"])
def test_a_python_file_that_is_no_use_gives_nothing(data: bytes) -> None:
    assert extract("python", "a.py", data) == {}
