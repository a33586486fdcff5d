"""docs/acceptance.md is true of this tree: every test that it names exists, and every row names one."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = {*(f"A{i}" for i in range(1, 7)), *(f"B{i}" for i in range(1, 7)), *(f"C{i}" for i in range(1, 8))}
ROWS |= {*(f"D{i}" for i in range(1, 6)), *(f"E{i}" for i in range(1, 7)), "F3"}


def missing(table: str) -> list[str]:
    """Rows that name no test, rows that are not there, and tests that do not exist."""
    problems, found = [], set()
    for line in table.splitlines():
        if not re.match(r"\| [A-Z]\d", line):
            continue
        row, _, tests, tolerance = (cell.strip() for cell in line.strip("|").split("|"))
        found |= set(row.split())
        names = [name.strip() for name in tests.split(",")]
        problems += [f"{row}: {name!r} is no test" for name in names if not exists(name)]
        problems += [] if tolerance else [f"{row}: no tolerance"]
    return problems + sorted(f"{row}: no such row" for row in ROWS - found)


def exists(test: str) -> bool:
    """Whether path::name is a function of that file that pytest would run."""
    path, _, name = test.partition("::")
    if not name.startswith("test_") or not (ROOT / path).is_file():
        return False
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


def test_every_row_names_tests_that_exist():
    table = (ROOT / "docs" / "acceptance.md").read_text(encoding="utf-8")
    assert missing(table) == []
    assert missing(table.replace("test_no_token_sees_the_future", "test_no_token_sees_the_past")) == [
        "C7: 'tests/test_model.py::test_no_token_sees_the_past' is no test"
    ]
    assert missing(table.replace("| C7 |", "| X |")) == ["C7: no such row"]
