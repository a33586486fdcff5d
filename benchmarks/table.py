"""The one form of a benchmark's result: rows of ours against the peer's, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """One measured claim; a ratio above 1 is better than the peer."""

    key: str
    ours: float
    peer: float
    ratio: float
    unit: str


def rate_row(key: str, ours: float, peer: float, unit: str) -> Row:
    """A row where more is better."""
    return Row(key, ours, peer, ours / peer, unit)


def cost_row(key: str, ours: float, peer: float, unit: str) -> Row:
    """A row where less is better."""
    return Row(key, ours, peer, peer / ours, unit)


def print_rows(rows: Sequence[Row], as_json: bool) -> None:
    """``{"rows": [...]}`` or an aligned table on stdout."""
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))
        return
    print(f"{'key':<28} {'ours':>12} {'peer':>12} {'ratio':>7}  unit")
    for row in rows:
        print(f"{row.key:<28} {row.ours:>12,.4g} {row.peer:>12,.4g} {row.ratio:>7.2f}  {row.unit}")


def parse_args(doc: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments that every benchmark takes."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser.parse_args(argv)
