"""Scores of several mixtures, each trained with several seeds: means, spreads, and which differences are significant.

A cell is one task (or domain) of one mixture: a value for each seed. Mixtures are compared by Welch's t over seeds.
Where one of the two has a single seed, its training noise is unknown; then the test uses what the harness says of the
items drawn (stderr), and the table says so. P-values are Holm's: over all pairs for the average, which is the question,
and over all pairs and rows for single tasks.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scipy import stats

ALPHA = 0.05
Table = Mapping[str, Mapping[str, "Cell"]]  # task or domain -> mixture -> cell


@dataclass(frozen=True)
class Cell:
    """One row of one mixture."""

    values: tuple[float, ...]  # a seed each
    stderr: float | None = None  # of one value by the items that were drawn; None where nobody says

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Over seeds; None with one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """First minus second, with a 95 % interval; p None where nothing says how far a value may be off."""

    gap: float
    low: float | None
    high: float | None
    p: float | None


@dataclass(frozen=True)
class Comparison:
    """Two mixtures: the average over rows, and the rows that differ significantly (all p-values are Holm's)."""

    first: str
    second: str
    average: Difference
    p: float | None
    higher: list[str] = field(default_factory=list)  # rows where the first is significantly higher
    lower: list[str] = field(default_factory=list)
    over: str = "seeds"  # or "items": a single seed, its training noise is not in the test


def average(cells: Sequence[Cell]) -> Cell:
    """The average over rows, seed by seed; items of different tasks are independent."""
    errors = [cell.stderr for cell in cells if cell.stderr is not None]
    error = math.hypot(*errors) / len(cells) if len(errors) == len(cells) else None
    return Cell(tuple(statistics.fmean(seed) for seed in zip(*(c.values for c in cells), strict=True)), error)


def difference(a: Cell, b: Cell) -> Difference:
    """Welch's t over seeds; by the items' errors where a mixture has one seed."""
    gap, df, error = a.mean - b.mean, math.inf, 0.0
    if a.sd is not None and b.sd is not None:
        parts = [(cell.sd or 0.0) ** 2 / len(cell.values) for cell in (a, b)]
        error = math.sqrt(sum(parts))
        if error:
            shares = zip(parts, (a, b), strict=True)
            df = error**4 / sum(part**2 / (len(cell.values) - 1) for part, cell in shares)
    elif a.stderr is not None and b.stderr is not None:
        error = math.hypot(a.stderr, b.stderr)
    if not error:
        return Difference(gap, None, None, None)
    half = float(stats.t.ppf(1 - ALPHA / 2, df)) * error
    return Difference(gap, gap - half, gap + half, float(2 * stats.t.sf(abs(gap) / error, df)))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values; None stays None and is not counted."""
    order = sorted((i for i, p in enumerate(ps) if p is not None), key=lambda i: ps[i] or 0.0)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * (ps[i] or 0.0)))
        adjusted[i] = largest
    return adjusted


def compare(table: Table) -> list[Comparison]:
    """Every pair of mixtures, in their order: the later one minus the earlier one."""
    mixtures = list(next(iter(table.values()), {}))
    pairs = [(b, a) for a, b in itertools.combinations(mixtures, 2)]
    averages = {m: average([row[m] for row in table.values()]) for m in mixtures} if table else {}
    main = [difference(averages[a], averages[b]) for a, b in pairs]
    by_row = {(pair, name): difference(row[pair[0]], row[pair[1]]) for pair in pairs for name, row in table.items()}
    adjusted = dict(zip(by_row, holm([d.p for d in by_row.values()]), strict=True))
    found = []
    for pair, whole, p in zip(pairs, main, holm([d.p for d in main]), strict=True):
        sure = [name for name in table if (value := adjusted[pair, name]) is not None and value < ALPHA]
        higher = [name for name in sure if by_row[pair, name].gap > 0]
        seeds = all(len(averages[m].values) > 1 for m in pair)
        lower = [name for name in sure if name not in higher]
        found.append(Comparison(*pair, whole, p, higher, lower, "seeds" if seeds else "items"))
    return found


def score_table(table: Table, metrics: Mapping[str, str]) -> str:
    """RegMix's table in Markdown: tasks by mixtures, percent, mean and deviation over seeds, the best in bold."""
    mixtures = list(next(iter(table.values())))
    lines = [f"| task | metric | {' | '.join(mixtures)} |", "|---|---|" + "---:|" * len(mixtures)]
    wins = dict.fromkeys(mixtures, 0)
    whole = {m: average([row[m] for row in table.values()]) for m in mixtures}
    for name, row in [*table.items(), ("**average**", whole)]:
        best = max(cell.mean for cell in row.values())
        leaders = [m for m in mixtures if row[m].mean == best and len(mixtures) > 1]
        cells = [percent(row[m], m in leaders) for m in mixtures]
        lines.append(f"| {name} | {metrics.get(name, '')} | {' | '.join(cells)} |")
        if name in table:
            wins |= {m: wins[m] + 1 for m in leaders}
    if len(mixtures) > 1:
        lines.append(f"| best on | | {' | '.join(f'{wins[m]} of {len(table)}' for m in mixtures)} |")
    return "\n".join(lines)


def comparison_table(comparisons: Sequence[Comparison], unit: str, scale: float = 1.0) -> str:
    """Differences between mixtures in Markdown; `scale` turns values into the unit."""
    lines = [
        f"| difference | average, {unit} | 95 % interval | p (Holm) | significantly higher | significantly lower |",
        "|---|---:|---|---:|---|---|",
    ]
    for c in comparisons:
        gap, low, high = (None if x is None else x * scale for x in (c.average.gap, c.average.low, c.average.high))
        interval = "unknown" if low is None else f"{low:+.3g} to {high:+.3g}"
        p = "unknown" if c.p is None else f"{c.p:.2g}{' *' if c.p < ALPHA else ''}"
        rows = " | ".join(", ".join(names) or "-" for names in (c.higher, c.lower))
        lines.append(f"| {c.first} - {c.second} | {gap:+.3g} | {interval} | {p} | {rows} |")
    if any(c.over == "items" for c in comparisons):
        lines.append(
            "\nSome mixtures have one seed: those tests know how items vary (where the harness says it), "
            "not how training does."
        )
    return "\n".join(lines)


def spread(cell: Cell, digits: int, scale: float = 1.0) -> str:
    """Mean and, with several seeds, their deviation."""
    tail = "" if cell.sd is None else f" \u00b1 {cell.sd * scale:.{digits}f}"
    return f"{cell.mean * scale:.{digits}f}{tail}"


def percent(cell: Cell, best: bool) -> str:
    """A score as RegMix's tables have it."""
    return f"**{spread(cell, 1, 100)}**" if best else spread(cell, 1, 100)
