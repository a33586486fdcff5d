"""What a search left in its folder, read for the report. What is absent or broken is named, never guessed."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from regmix_search.ledger import Replay, replay

TRAIN_PREFIX = "train_"
VALID_PREFIX = "valid_"
METRIC_PREFIX = "metric/"
METRIC_SUFFIX = "_val_loss"
MIXTURES = "mixtures.csv"

WITHOUT = {
    "space.json": "no prior, caps or token counts",
    "trials.jsonl": "no proxy costs, failures or repeats",
    "losses.csv": "proxy losses come from trials.jsonl alone",
    "fit.json": "no surrogate scores and no predicted-versus-true figures",
    "optimum.json": "no predicted optimum, caps or epochs",
    "mixture.yaml": "nothing to train the real model on",
    "train.json": "no retrained models, so no verdict",
    "config.yaml": "the search's settings are not shown",
    "corpus/MANIFEST.json": "the corpus fingerprint is not shown",
}


@dataclass(frozen=True)
class Trial:
    """One proxy: what was planned in mixtures.csv, joined with what the ledger says became of it."""

    index: int
    kind: str  # "train", "holdout" or "repeat"; guessed from equal weights where there is no ledger
    status: str  # "finished", "failed", "unfinished" (claimed, no end) or "planned" (waits)
    weights: dict[str, float]
    losses: dict[str, float]  # nats per token; only finite values
    seconds: float  # this, tokens and flops: over all finished and failed attempts
    tokens: float
    flops: float
    seed: int | None
    failures: tuple[str, ...]
    spans: tuple[tuple[float, float], ...]  # (start, end), unix seconds
    stopped_at: float | None = None  # tokens at which it was ended early, its losses being estimates since


@dataclass(frozen=True)
class Run:
    """One retrained model from train.json; losses in nats per token, bpb in bits per byte of text."""

    mixture: str
    seed: int
    weights: dict[str, float]
    losses: dict[str, float]
    bpb: dict[str, float]
    curve: list[tuple[float, float]]
    valid_curve: list[tuple[float, float]]
    tokens: float
    seconds: float
    flops: float | None


@dataclass(frozen=True)
class Evidence:
    """Everything the report may draw on. A missing file leaves its dict empty and its name in `missing`."""

    run_dir: Path
    domains: tuple[str, ...]
    trials: tuple[Trial, ...]
    runs: tuple[Run, ...]
    space: dict[str, Any]
    fit: dict[str, Any]
    optimum: dict[str, Any]
    train: dict[str, Any]
    early: dict[str, Any]
    manifest: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    mixture_text: str
    missing: dict[str, str]
    problems: tuple[str, ...] = field(default=())

    @property
    def finished(self) -> list[Trial]:
        """Proxies on distinct mixtures with losses: what the fit and its held-back set are made of."""
        return [t for t in self.trials if t.losses and t.kind != "repeat"]

    @property
    def repeats(self) -> list[Trial]:
        return [t for t in self.trials if t.losses and t.kind == "repeat"]

    @property
    def targets(self) -> tuple[str, ...]:
        """Every validation domain that any proxy was scored on, in first-seen order."""
        return tuple(dict.fromkeys(name for trial in self.trials for name in trial.losses))


def read_evidence(run_dir: Path) -> Evidence:
    """Read a search folder. Only mixtures.csv is required: ValueError without it, or when it cannot be parsed."""
    planned, domains = read_mixtures(run_dir / MIXTURES)
    missing = {name: why for name, why in WITHOUT.items() if not (run_dir / name).is_file()}
    problems: list[str] = []
    space, fit, optimum, train, early, manifest = (
        _read_json(run_dir / name, problems)
        for name in ("space.json", "fit.json", "optimum.json", "train.json", "early.json", "corpus/MANIFEST.json")
    )
    mixture_text, config_text = _read_text(run_dir / "mixture.yaml"), _read_text(run_dir / "config.yaml")
    if not optimum.get("weights") and mixture_text:
        train_part = _parse_yaml(mixture_text, "mixture.yaml", problems).get("train") or {}
        weights = {name: part.get("weight") if isinstance(part, dict) else part for name, part in train_part.items()}
        optimum = {**optimum, "weights": finite_dict(weights, TRAIN_PREFIX)}
    ledger = _read_ledger(run_dir / "trials.jsonl", problems)
    losses = _read_losses(run_dir / "losses.csv", problems)
    held_back = {int(i) for t in (fit.get("targets") or {}).values() for i in (t.get("holdout") or {}).get("index", [])}
    return Evidence(
        run_dir=run_dir,
        domains=domains,
        trials=_join_trials(planned, ledger, losses, held_back),
        runs=tuple(_parse_run(run) for run in train.get("runs") or []),
        space=space,
        fit=fit,
        optimum=optimum,
        train=train,
        early=early,
        manifest=manifest,
        config=_parse_yaml(config_text, "config.yaml", problems),
        config_text=config_text,
        mixture_text=mixture_text,
        missing=missing,
        problems=tuple(problems),
    )


def finite(value: Any) -> float:
    """A float, or NaN for whatever is no finite number (null in JSON, an empty cell)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def finite_dict(values: Any, prefix: str = "") -> dict[str, float]:
    """The finite entries of a name -> number mapping, with `prefix` taken off the names."""
    pairs = ((str(name).removeprefix(prefix), finite(value)) for name, value in (values or {}).items())
    return {name: value for name, value in pairs if not math.isnan(value)}


def read_mixtures(path: Path) -> tuple[dict[int, dict[str, float]], tuple[str, ...]]:
    """Weights by trial, and the domains. ValueError where the file is not there or cannot be parsed."""
    if not path.is_file():
        raise ValueError(f"{path}: not found; a report needs at least the mixtures: run `--stage mixtures` first")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = [name for name in reader.fieldnames or [] if name.startswith(TRAIN_PREFIX)]
        if "index" not in (reader.fieldnames or []) or not columns:
            raise ValueError(f"{path}: needs a column `index` and columns `train_<domain>`; it has {reader.fieldnames}")
        planned = {}
        for row in reader:
            try:
                weights = {name.removeprefix(TRAIN_PREFIX): float(row[name]) for name in columns}
                planned[int(row["index"])] = weights
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}; mend or remove that line") from None
    return planned, tuple(name.removeprefix(TRAIN_PREFIX) for name in columns)


def _read_losses(path: Path, problems: list[str]) -> dict[int, dict[str, float]]:
    if not path.is_file():
        return {}
    losses = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = [n for n in reader.fieldnames or [] if n.startswith(METRIC_PREFIX) and n.endswith(METRIC_SUFFIX)]
        for row in reader:
            try:
                index = int(row["index"])
            except (KeyError, TypeError, ValueError):
                problems.append(f"losses.csv, line {reader.line_num}: no integer `index`; the line was left out.")
                continue
            named = {n.removeprefix(METRIC_PREFIX).removesuffix(METRIC_SUFFIX): row[n] for n in columns}
            losses[index] = finite_dict(named)
            if len(losses[index]) < len(columns):
                bad = [name for name in named if name not in losses[index]]
                problems.append(f"losses.csv, trial {index}: no finite loss for {', '.join(bad)}; left out.")
    return losses


def _read_ledger(path: Path, problems: list[str]) -> Replay:
    """What the ledger amounts to. A torn last line is what a kill leaves behind; a torn line elsewhere is reported."""
    try:
        state = replay(path)
    except ValueError as error:
        problems.append(f"{error}; the whole of it was taken as missing.")
        return Replay()
    whole = path.read_bytes().count(b"\n") if state.torn_lines else 0
    for number in state.torn_lines:
        if number <= whole:
            problems.append(f"{path.name}, line {number} cannot be read; the line was left out.")
    return state


def _join_trials(
    planned: dict[int, dict[str, float]], ledger: Replay, losses: dict[int, dict[str, float]], held_back: set[int]
) -> tuple[Trial, ...]:
    trials, seen = [], set()
    for index in sorted({*planned, *ledger.finished, *ledger.failures, *ledger.claims, *losses}):
        finish, failures = ledger.finished.get(index, {}), ledger.failures.get(index, [])
        ends = [*failures, *([finish] if finish else [])]
        scored = losses.get(index) or finite_dict(finish.get("losses"), VALID_PREFIX)
        weights = planned.get(index) or finite_dict(finish.get("weights"), TRAIN_PREFIX)
        mixture = tuple(weights.items())
        guess = "holdout" if index in held_back else "repeat" if mixture in seen else "train"
        seen.add(mixture)
        ended = "finished" if finish or scored else "unfinished" if index in ledger.claims else "planned"
        trials.append(
            Trial(
                index=index,
                kind=next((e["kind"] for e in reversed(ends) if e.get("kind")), guess),
                status="failed" if failures and ended == "planned" else ended,
                weights=weights,
                losses=scored,
                seconds=_total(ends, "seconds"),
                tokens=_total(ends, "tokens"),
                flops=_total(ends, "flops"),
                seed=finish.get("seed"),
                failures=tuple(event["reason"] or "no reason given" for event in failures),
                spans=tuple(_span(e) for e in ends if e.get("time")),
                stopped_at=finite(finish.get("tokens")) if finish.get("stopped") else None,
            )
        )
    return tuple(trials)


def _total(events: Sequence[dict[str, Any]], key: str) -> float:
    return sum(value for event in events if not math.isnan(value := finite(event.get(key))))


def _span(event: dict[str, Any]) -> tuple[float, float]:
    end, seconds = float(event["time"]), finite(event.get("seconds"))
    return end - (0.0 if math.isnan(seconds) else seconds), end


def _parse_run(run: dict[str, Any]) -> Run:
    def points(name: str) -> list[tuple[float, float]]:
        pairs = [(finite(p[0]), finite(p[1])) for p in run.get(name) or []]
        return [p for p in pairs if not math.isnan(p[0] + p[1])]

    flops = finite(run.get("flops"))
    return Run(
        mixture=str(run.get("mixture", "?")),
        seed=int(run.get("seed", 0)),
        weights=finite_dict(run.get("weights"), TRAIN_PREFIX),
        losses=finite_dict(run.get("losses"), VALID_PREFIX),
        bpb=finite_dict(run.get("bpb"), VALID_PREFIX),
        curve=points("curve"),
        valid_curve=points("valid_curve"),
        tokens=finite(run.get("tokens")),
        seconds=finite(run.get("seconds")),
        flops=None if math.isnan(flops) else flops,
    )


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path) or "{}")
    except ValueError as error:
        problems.append(f"{path.name} cannot be read ({error}) and was taken as missing.")
        return {}
    return value if isinstance(value, dict) else {}


def _parse_yaml(text: str, name: str, problems: list[str]) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problems.append(f"{name} cannot be read ({' '.join(str(error).split())}) and was taken as missing.")
        return {}
    return value if isinstance(value, dict) else {}


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
