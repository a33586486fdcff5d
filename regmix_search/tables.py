"""RegMix's two CSV files, joined on `index`: `index,train_<domain>...` and `index,metric/<target>_val_loss...`."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_lite.files import atomic_write
from regmix_search.space import FloatArray

TRAIN_PREFIX = "train_"
METRIC_PREFIX = "metric/"
METRIC_SUFFIX = "_val_loss"
SUM_TOLERANCE = 0.01  # RegMix's published rows are rounded to 0.001 a domain and sum to 0.996-1.003; Olmix allows 0.01
NAMED = 8  # indices that an error message lists


@dataclass(frozen=True, eq=False)
class Runs:
    """Finished proxies: row i is the run `index[i]`. Rows of weights sum to 1; losses are finite, in nats per token."""

    index: tuple[int, ...]
    domains: tuple[str, ...]
    weights: FloatArray  # [n, k]
    losses: dict[str, FloatArray]  # target -> [n]
    unfinished: tuple[int, ...] = ()  # mixtures that had no losses, left out

    def select(self, index: Iterable[int]) -> Runs:
        """The runs with these indices, in the given order. Raises ValueError naming those that are not here."""
        wanted, rows = tuple(index), {name: row for row, name in enumerate(self.index)}
        if unknown := [i for i in wanted if i not in rows]:
            raise ValueError(
                f"runs {_some(unknown)} have no finished losses; there are {len(self.index)} finished runs"
            )
        picks = [rows[i] for i in wanted]
        losses = {target: values[picks] for target, values in self.losses.items()}
        return Runs(wanted, self.domains, self.weights[picks], losses, self.unfinished)

    def without(self, index: Iterable[int]) -> Runs:
        """All runs but these. Raises ValueError naming indices that are not here."""
        out = set(self.select(index).index)
        return self.select(i for i in self.index if i not in out)


def read_runs(mixtures: str | Path, losses: str | Path, partial: bool = False) -> Runs:
    """Reads and joins both files, in the order of the mixtures.

    A mixture without losses is an error unless `partial` (a search under way): then `unfinished` names it.
    Raises ValueError for duplicated or unknown indices, non-finite losses, and weights that do not sum to 1.
    """
    index, domains, weights = read_mixtures(mixtures)
    loss_index, columns = read_losses(losses)
    rows = {name: row for row, name in enumerate(loss_index)}
    if unknown := sorted(set(loss_index) - set(index)):
        raise ValueError(
            f"{losses}: index {_some(unknown)} is in no row of {mixtures}; do the two files belong together?"
        )
    unfinished = tuple(i for i in index if i not in rows)
    if unfinished and not partial:
        raise ValueError(
            f"{losses}: no losses for index {_some(unfinished)} of {mixtures}; finish these runs or remove them"
        )
    done = [row for row, i in enumerate(index) if i in rows]
    picks = [rows[index[row]] for row in done]
    joined = {target: values[picks] for target, values in columns.items()}
    return Runs(tuple(index[row] for row in done), domains, weights[done], joined, unfinished)


def read_mixtures(path: str | Path) -> tuple[tuple[int, ...], tuple[str, ...], FloatArray]:
    """(index [n], domains [k], weights [n, k]). Rows that sum to 1 within 0.01 are normalised; others are an error."""
    index, columns, values = _read_table(Path(path), TRAIN_PREFIX)
    if np.any(values < 0):
        row, column = (int(i[0]) for i in np.nonzero(values < 0))
        raise ValueError(f"{path}: index {index[row]}, {columns[column]}: weight {values[row, column]} is negative")
    sums = values.sum(axis=1)
    off = np.flatnonzero(np.abs(sums - 1) > SUM_TOLERANCE)
    if len(off):
        named = ", ".join(f"index {index[i]}: {sums[i]:.4g}" for i in off[:NAMED])
        raise ValueError(f"{path}: weights of {len(off)} rows do not sum to 1 (within {SUM_TOLERANCE}): {named}")
    return index, tuple(c.removeprefix(TRAIN_PREFIX) for c in columns), values / sums[:, None]


def read_losses(path: str | Path) -> tuple[tuple[int, ...], dict[str, FloatArray]]:
    """(index [n], {target: losses [n]}); `metric/x_val_loss` is the target x."""
    index, columns, values = _read_table(Path(path), METRIC_PREFIX)
    names = [column.removeprefix(METRIC_PREFIX).removesuffix(METRIC_SUFFIX) for column in columns]
    return index, {name: values[:, i] for i, name in enumerate(names)}


def write_mixtures(path: str | Path, index: Sequence[int], domains: Sequence[str], weights: FloatArray) -> None:
    """Writes `index,train_<domain>...`, weights [n, k] exactly as they are, atomically."""
    _write_table(path, index, [TRAIN_PREFIX + d for d in domains], weights)


def write_losses(path: str | Path, index: Sequence[int], losses: Mapping[str, Sequence[float] | FloatArray]) -> None:
    """Writes `index,metric/<target>_val_loss...` from {target: losses [n]}, atomically."""
    values = np.array(list(losses.values()), dtype=np.float64).reshape(len(losses), len(index)).T
    _write_table(path, index, [METRIC_PREFIX + t + METRIC_SUFFIX for t in losses], values)


def _write_table(path: str | Path, index: Sequence[int], columns: Sequence[str], values: FloatArray) -> None:
    assert values.shape == (len(index), len(columns)), f"{values.shape} values for {len(index)} rows"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", *columns])
    writer.writerows([int(i), *map(repr, row)] for i, row in zip(index, values.tolist(), strict=True))
    atomic_write(path, text.getvalue())


def _read_table(path: Path, prefix: str) -> tuple[tuple[int, ...], list[str], FloatArray]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        columns = _check_header(path, header, prefix)
        where = header.index("index")
        index, rows = [], []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise ValueError(f"{path}, line {reader.line_num}: {len(cells)} cells, the header has {len(header)}")
            place = f"{path}, line {reader.line_num}"
            index.append(_whole(place, cells[where]))
            rows.append([_finite(place, c, v) for c, v in zip(header, cells, strict=True) if c != "index"])
    if not rows:
        raise ValueError(f"{path}: no rows")
    if twice := sorted(i for i, count in Counter(index).items() if count > 1):
        raise ValueError(f"{path}: index {_some(twice)} appears more than once; keep one row of each")
    return tuple(index), columns, np.array(rows, dtype=np.float64)


def _check_header(path: Path, header: list[str], prefix: str) -> list[str]:
    columns = [name for name in header if name != "index"]
    if header.count("index") != 1 or not columns:
        raise ValueError(f"{path}: needs one column `index` and columns `{prefix}...`; it has {header}")
    if odd := [name for name in columns if not name.startswith(prefix)]:
        raise ValueError(f"{path}: columns {odd} do not start with `{prefix}`; rename or remove them")
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"{path}: columns {twice} appear more than once")
    return columns


def _whole(place: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{place}, column index: {text!r} is not a whole number; mend or remove that row") from None


def _finite(place: str, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{place}, column {column}: {text!r} is not a finite number; mend or remove that row")
    return value


def _some(index: Sequence[int]) -> str:
    more = f" and {len(index) - NAMED} more" if len(index) > NAMED else ""
    return ", ".join(map(str, index[:NAMED])) + more
