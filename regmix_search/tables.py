"""Tables of finished runs: RegMix's two CSV files, Olmix's two, or our own ledger; always joined on the run's id.

RegMix: `index,train_<domain>...` and `index,metric/<target>_val_loss...`. Olmix: ratios.csv and metrics.csv, `run` (or
`run_id`) beside `name` and `index`, which say nothing about a run. Ledger: trials.jsonl, both tables in one.
"""

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
from regmix_search.goals import METRIC_PREFIX, METRIC_SUFFIX
from regmix_search.ledger import replay
from regmix_search.space import FloatArray

RunId = int | str  # RegMix numbers its runs, Olmix names them
TRAIN_PREFIX = "train_"
OLMIX_KEYS = ("run", "run_id")
OLMIX_LABELS = ("name", "index", "")  # beside the id: a name for people, a row number, pandas' unnamed column
SUM_TOLERANCE = 0.01  # RegMix's published rows are rounded to 0.001 a domain and sum to 0.996-1.003; Olmix allows 0.01
NAMED = 8  # indices that an error message lists


@dataclass(frozen=True, eq=False)
class Runs:
    """Finished proxies: row i is the run `index[i]`. Rows of weights sum to 1; losses are finite, in nats per token."""

    index: tuple[RunId, ...]
    domains: tuple[str, ...]
    weights: FloatArray  # [n, k]
    losses: dict[str, FloatArray]  # target -> [n]
    unfinished: tuple[RunId, ...] = ()  # mixtures that had no losses, left out
    notes: tuple[str, ...] = ()  # what else was left out of the table, in words
    once: FloatArray | None = None  # [k] weights at which a run has read each domain once; None: not known
    gone: int = 0  # so many of the domains, the last ones, are text that no mixture can have any more

    @property
    def mixed(self) -> Runs:
        """The runs without text that is gone, in the domains that are left."""
        if not self.gone:
            return self
        k = len(self.domains) - self.gone
        rows = np.flatnonzero(self.weights[:, k:].sum(axis=1) == 0)
        losses = {target: values[rows] for target, values in self.losses.items()}
        index = tuple(self.index[row] for row in rows)
        return Runs(index, self.domains[:k], self.weights[rows, :k], losses, self.unfinished, self.notes)

    def select(self, index: Iterable[RunId]) -> Runs:
        """The runs with these indices, in the given order. Raises ValueError naming those that are not here."""
        wanted, rows = tuple(index), {name: row for row, name in enumerate(self.index)}
        if unknown := [i for i in wanted if i not in rows]:
            raise ValueError(f"runs {some(unknown)} have no finished losses; there are {len(self.index)} finished runs")
        picks = [rows[i] for i in wanted]
        losses = {target: values[picks] for target, values in self.losses.items()}
        more = (self.unfinished, self.notes, self.once, self.gone)
        return Runs(wanted, self.domains, self.weights[picks], losses, *more)

    def without(self, index: Iterable[RunId]) -> Runs:
        """All runs but these. Raises ValueError naming indices that are not here."""
        out = set(self.select(index).index)
        return self.select(i for i in self.index if i not in out)


def read_runs(mixtures: str | Path, losses: str | Path, partial: bool = False) -> Runs:
    """Reads and joins both files, RegMix's or Olmix's, in the order of the mixtures.

    A mixture without losses is an error unless `partial` (a search under way): then `unfinished` names it.
    Raises ValueError for duplicated or unknown ids, non-finite losses, and weights that do not sum to 1.
    """
    index, domains, weights = read_mixtures(mixtures)
    loss_index, columns = read_losses(losses)
    rows = {name: row for row, name in enumerate(loss_index)}
    if isinstance(index[0], int) != isinstance(loss_index[0], int):
        raise ValueError(f"{mixtures} and {losses}: one has run ids (`run`), the other `index`; use the same in both")
    if unknown := [i for i in loss_index if i not in set(index)]:
        raise ValueError(
            f"{losses}: index {some(unknown)} is in no row of {mixtures}; do the two files belong together?"
        )
    unfinished = tuple(i for i in index if i not in rows)
    if unfinished and not partial:
        raise ValueError(
            f"{losses}: no losses for index {some(unfinished)} of {mixtures}; finish these runs or remove them"
        )
    done = [row for row, i in enumerate(index) if i in rows]
    picks = [rows[index[row]] for row in done]
    joined = {target: values[picks] for target, values in columns.items()}
    return Runs(tuple(index[row] for row in done), domains, weights[done], joined, unfinished)


def read_ledger(path: str | Path) -> tuple[Runs, Runs]:
    """(runs to fit on, runs held back) of a search's trials.jsonl, finished ones only.

    Raises ValueError when there are none to fit on, or when they do not all have the same domains and losses.
    """
    state = replay(Path(path))
    events = dict(sorted(state.finished.items()))
    fitted = [i for i, event in events.items() if event.get("kind") != "holdout"]
    if not fitted:
        raise ValueError(f"{path}: no finished trials to fit on; is it a search's trials.jsonl?")
    first = events[fitted[0]]
    for i, event in events.items():
        for key in ("weights", "losses"):
            if odd := sorted(set(event[key]) ^ set(first[key])):
                raise ValueError(f"{path}: trials {fitted[0]} and {i} differ in their {key}: {', '.join(odd)}")
    failed = tuple(i for i in state.failures if i not in events)

    def table(index: list[int], unfinished: tuple[int, ...] = ()) -> Runs:
        rows = np.array([[events[i]["weights"][d] for d in first["weights"]] for i in index], dtype=np.float64)
        losses = {t: np.array([events[i]["losses"][t] for i in index], dtype=np.float64) for t in first["losses"]}
        return Runs(
            tuple(index), tuple(first["weights"]), rows.reshape(len(index), len(first["weights"])), losses, unfinished
        )

    return table(fitted, failed), table([i for i in events if i not in set(fitted)])


def read_mixtures(path: str | Path) -> tuple[tuple[RunId, ...], tuple[str, ...], FloatArray]:
    """(ids [n], domains [k], weights [n, k]). Rows that sum to 1 within 0.01 are normalised; others are an error."""
    index, columns, values = _read_table(Path(path), TRAIN_PREFIX)
    if np.any(values < 0):
        row, column = (int(i[0]) for i in np.nonzero(values < 0))
        raise ValueError(f"{path}: index {index[row]}, {columns[column]}: weight {values[row, column]} is negative")
    sums = values.sum(axis=1)
    off = np.flatnonzero(np.abs(sums - 1) > SUM_TOLERANCE)
    if len(off):
        named = ", ".join(f"index {index[i]}: {sums[i]:.4g}, off by {sums[i] - 1:+.4g}" for i in off[:NAMED])
        raise ValueError(f"{path}: weights of {len(off)} rows do not sum to 1 (within {SUM_TOLERANCE}): {named}")
    return index, tuple(c.removeprefix(TRAIN_PREFIX) for c in columns), values / sums[:, None]


def read_losses(path: str | Path) -> tuple[tuple[RunId, ...], dict[str, FloatArray]]:
    """(ids [n], {target: losses [n]}); `metric/x_val_loss` is the target x."""
    index, columns, values = _read_table(Path(path), METRIC_PREFIX)
    names = [column.removeprefix(METRIC_PREFIX).removesuffix(METRIC_SUFFIX) for column in columns]
    return index, {name: values[:, i] for i, name in enumerate(names)}


def write_mixtures(path: str | Path, index: Sequence[RunId], domains: Sequence[str], weights: FloatArray) -> None:
    """Writes `index,train_<domain>...`, weights [n, k] exactly as they are, atomically."""
    _write_table(path, index, [TRAIN_PREFIX + d for d in domains], weights)


def append_mixtures(path: str | Path, weights: FloatArray) -> None:
    """Adds rows [m, k] to a table of numbered mixtures, atomically; what is there stays as it is, to the bit."""
    index, domains, _ = read_mixtures(path)
    assert weights.shape[1:] == (len(domains),), f"{weights.shape} weights for {len(domains)} domains"
    first = max(int(i) for i in index) + 1
    text = Path(path).read_text(encoding="utf-8").rstrip("\n")
    lines = [",".join([str(first + i), *map(repr, row)]) for i, row in enumerate(weights.tolist())]
    atomic_write(path, "\n".join([text, *lines]) + "\n")


def write_losses(path: str | Path, index: Sequence[RunId], losses: Mapping[str, Sequence[float] | FloatArray]) -> None:
    """Writes `index,metric/<target>_val_loss...` from {target: losses [n]}, atomically."""
    values = np.array(list(losses.values()), dtype=np.float64).reshape(len(losses), len(index)).T
    _write_table(path, index, [METRIC_PREFIX + t + METRIC_SUFFIX for t in losses], values)


def _write_table(path: str | Path, index: Sequence[RunId], columns: Sequence[str], values: FloatArray) -> None:
    assert values.shape == (len(index), len(columns)), f"{values.shape} values for {len(index)} rows"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", *columns])
    writer.writerows([i, *map(repr, row)] for i, row in zip(index, values.tolist(), strict=True))
    atomic_write(path, text.getvalue())


def _read_table(path: Path, prefix: str) -> tuple[tuple[RunId, ...], list[str], FloatArray]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        key, columns = _check_header(path, header, prefix)
        where, places = header.index(key), [header.index(c) for c in columns]
        index: list[RunId] = []
        rows = []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise ValueError(f"{path}, line {reader.line_num}: {len(cells)} cells, the header has {len(header)}")
            place = f"{path}, line {reader.line_num}"
            index.append(_whole(place, cells[where]) if key == "index" else _named(place, key, cells[where]))
            rows.append([_finite(place, header[i], cells[i]) for i in places])
    if not rows:
        raise ValueError(f"{path}: no rows")
    if twice := [i for i, count in Counter(index).items() if count > 1]:
        raise ValueError(f"{path}: {key} {some(twice)} appears more than once; keep one row of each")
    return tuple(index), columns, np.array(rows, dtype=np.float64)


def _check_header(path: Path, header: list[str], prefix: str) -> tuple[str, list[str]]:
    """(column of the run's id, columns of numbers)."""
    olmix = [name for name in header if name in OLMIX_KEYS]
    key = olmix[0] if olmix else "index"
    columns = [name for name in header if name != key and not (olmix and name in OLMIX_LABELS)]
    if header.count(key) != 1 or len(olmix) > 1 or not columns:
        raise ValueError(
            f"{path}: needs one column `index` and columns `{prefix}...` (RegMix), or one column `run` and one of "
            f"numbers a name (Olmix); it has {header}"
        )
    if odd := [name for name in columns if not olmix and not name.startswith(prefix)]:
        raise ValueError(f"{path}: columns {odd} do not start with `{prefix}`; rename or remove them")
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"{path}: columns {twice} appear more than once")
    return key, columns


def _named(place: str, key: str, text: str) -> str:
    if not text.strip():
        raise ValueError(f"{place}, column {key}: no run id; mend or remove that row")
    return text.strip()


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


def some(index: Sequence[RunId]) -> str:
    """The first NAMED of them, and how many more."""
    more = f" and {len(index) - NAMED} more" if len(index) > NAMED else ""
    return ", ".join(map(str, index[:NAMED])) + more
