"""The one form of a benchmark's result: rows of ours against the peer's, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """One measured claim; a ratio above 1 is better than the peer."""

    key: str
    ours: float
    peer: float
    ratio: float
    unit: str
    peer_name: str = ""  # which of several peers, the best of them


def rate_row(key: str, ours: float, peer: float, unit: str) -> Row:
    """A row where more is better."""
    return Row(key, ours, peer, ours / peer, unit)


def cost_row(key: str, ours: float, peer: float, unit: str) -> Row:
    """A row where less is better."""
    return Row(key, ours, peer, peer / ours, unit)


def best_of(key: str, found: Mapping[str, float], unit: str, more_is_better: bool) -> Row:
    """``ours`` in ``found`` against the best of the others."""
    peers = {name: value for name, value in found.items() if name != "ours"}
    name = (max if more_is_better else min)(peers, key=peers.__getitem__)
    ratio = found["ours"] / peers[name] if more_is_better else peers[name] / found["ours"]
    return Row(key, found["ours"], peers[name], ratio, unit, name)


def print_rows(rows: Sequence[Row], as_json: bool) -> None:
    """``{"rows": [...]}`` or an aligned table on stdout."""
    if as_json:
        print(json.dumps({"rows": [{k: v for k, v in asdict(row).items() if v != ""} for row in rows]}))
        return
    width = max([28, *(len(row.key) for row in rows)])
    print(f"{'key':<{width}} {'ours':>12} {'peer':>12} {'ratio':>7}  unit")
    for row in rows:
        unit = f"{row.unit} ({row.peer_name})" if row.peer_name else row.unit
        print(f"{row.key:<{width}} {row.ours:>12,.4g} {row.peer:>12,.4g} {row.ratio:>7.2f}  {unit}")


def parse_args(doc: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments that every benchmark takes."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser.parse_args(argv)


def pick_keys(parser: argparse.ArgumentParser, only: str, known: Iterable[str]) -> list[str]:
    """The keys of ``--only KEY,...``; a key that is not ``known`` ends the program with what there is."""
    keys, known = only.split(","), list(known)
    if unknown := set(keys) - set(known):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return keys
