"""The search's memory: an append-only trials.jsonl whose replay is the state (the idea is Optuna's journal).

One JSON object a line: ``claim``, then ``finish`` or ``fail``. A line is one O_APPEND write and an fsync, so a kill
can tear the last line only; a torn line is skipped, and the next append starts a new one. Whoever opens a Ledger must
own the folder (``files.folder_lock``): a claim without an end then belongs to a dead process and is free again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_lite.config import diff
from megatron_lite.files import atomic_write_json, sync

Kind = Literal["train", "holdout", "repeat"]


@dataclass(frozen=True)
class Trial:
    """One proxy to train: what the ledger plans, an executor runs and the ledger is told about."""

    index: int
    kind: Kind
    weights: dict[str, float]
    seed: int

    @property
    def name(self) -> str:
        """The trial's folder name."""
        return f"t{self.index:04d}"


@dataclass(frozen=True)
class Counts:
    """How many trials are in which state; they sum to the number planned."""

    finished: int
    running: int
    failed: int
    waiting: int

    @property
    def total(self) -> int:
        """All planned trials."""
        return self.finished + self.running + self.failed + self.waiting


@dataclass
class Replay:
    """What a trials.jsonl says when it is read from the top."""

    finished: dict[int, dict[str, Any]] = field(default_factory=dict)  # index -> finish event
    failures: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # index -> fail events, oldest first
    torn_lines: list[int] = field(default_factory=list)  # 1-based numbers of lines that a kill or a full disk tore
    ends_torn: bool = False  # the last byte is not a newline


class Ledger:
    """Hands out trials and records what became of them: ``while trial := ledger.ask(): ledger.tell(trial, ...)``."""

    def __init__(
        self, path: str | Path, trials: Sequence[Trial], fingerprint: dict[str, Any], retries: int = 2
    ) -> None:
        """Opens or starts the ledger at ``path`` for these trials.

        ``fingerprint`` is whatever makes losses comparable (proxy config, shards, how mixtures are drawn). A ledger
        begun with another one, or whose finished trials are not the planned ones, is a ValueError that lists the
        difference. More trials than before may be planned: that is how a search is extended.
        """
        self.path = Path(path)
        self.trials = {trial.index: trial for trial in trials}
        assert len(self.trials) == len(trials), "trial indices must be unique"
        self.retries = retries
        self.path.parent.mkdir(parents=True, exist_ok=True)
        check_fingerprint(self.path, fingerprint)
        atomic_write_json(fingerprint_path(self.path), fingerprint)
        self.config_hash = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
        state = replay(self.path, self.config_hash)
        for index, event in state.finished.items():
            if index in self.trials:
                _check_same(self.path, self.trials[index], event)
        self.finished = {index: event for index, event in state.finished.items() if index in self.trials}
        # a search in which nothing ever worked has been mended, or nobody would run it again
        failures = state.failures if state.finished else {}
        self.failures = {index: [*filter(_still_counts, events)] for index, events in failures.items()}
        self.torn_lines = state.torn_lines
        self._running: set[int] = set()
        self._ends_torn = state.ends_torn

    def ask(self) -> Trial | None:
        """Claims the first waiting trial, one that has not failed yet before one to be retried; None: none waits."""
        waiting = [t for i, t in self.trials.items() if self._state(i) == "waiting"]
        if not waiting:
            return None
        trial = min(waiting, key=lambda t: (len(self.failures.get(t.index, ())), t.index))
        self._append("claim", trial)
        self._running.add(trial.index)
        return trial

    def tell(self, trial: Trial, losses: dict[str, float], **facts: Any) -> None:
        """Records a finished trial. losses: validation domain -> nats per token; facts: tokens, seconds, run_dir..."""
        self._running.discard(trial.index)
        self.finished[trial.index] = self._append("finish", trial, losses=losses, **facts)

    def fail(self, trial: Trial, reason: str, retry: bool, **facts: Any) -> bool:
        """Records a failure; True when the trial will be handed out again."""
        self._running.discard(trial.index)
        event = self._append("fail", trial, reason=reason, retry=retry, **facts)
        self.failures.setdefault(trial.index, []).append(event)
        return self._state(trial.index) == "waiting"

    @property
    def counts(self) -> Counts:
        """How many trials are finished, running, failed for good and waiting."""
        states = [self._state(index) for index in self.trials]
        return Counts(*(states.count(name) for name in ("finished", "running", "failed", "waiting")))

    @property
    def failed(self) -> dict[int, str]:
        """Trials that failed for good -> the last reason."""
        return {i: self.failures[i][-1]["reason"] for i in self.trials if self._state(i) == "failed"}

    def _state(self, index: int) -> str:
        if index in self.finished:
            return "finished"
        if index in self._running:
            return "running"
        failures = self.failures.get(index, [])
        gave_up = len(failures) > self.retries or any(not event["retry"] for event in failures)
        return "failed" if gave_up else "waiting"

    def _append(self, event: str, trial: Trial, **facts: Any) -> dict[str, Any]:
        """Writes one event; it is on the disk when this returns."""
        named = asdict(trial)
        record = {"event": event, "trial": named.pop("index"), "time": time.time(), "pid": os.getpid()}
        record |= {"host": os.uname().nodename, "config_hash": self.config_hash, **named, **facts}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        data = b"\n" + line if self._ends_torn else line
        self._ends_torn = True  # until the whole line is known to be there
        created = not self.path.exists()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
        if written != len(data):
            raise OSError(f"{self.path}: only {written} of {len(data)} bytes were written; is the disk full?")
        self._ends_torn = False
        if created:
            sync(self.path.parent)
        return record


def replay(path: str | Path, config_hash: str | None = None) -> Replay:
    """Reads a ledger from the top; a missing file is an empty ledger. ValueError names the file and line of junk.

    With ``config_hash``, events of other settings do not count: failures from before a mistake was mended.
    """
    state = Replay()
    data = Path(path).read_bytes() if Path(path).exists() else b""
    state.ends_torn = bool(data) and not data.endswith(b"\n")
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError:
            state.torn_lines.append(number)
            continue
        try:
            if config_hash is None or event["config_hash"] == config_hash:
                _apply(state, event)
        except (KeyError, TypeError):
            raise ValueError(
                f"{path}, line {number}: not an event of this ledger: {line[:80].decode(errors='replace')}; "
                "remove the line or name another out_dir"
            ) from None
    return state


def fingerprint_path(path: str | Path) -> Path:
    """Where a ledger keeps what its trials have in common."""
    return Path(path).with_suffix(".fingerprint.json")


def check_fingerprint(path: str | Path, fingerprint: dict[str, Any]) -> None:
    """ValueError when the ledger at ``path`` holds trials of other settings; keys not given are not looked at."""
    if not replay(path).finished:
        return  # nothing is lost by starting over
    try:
        old = json.loads(fingerprint_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"{path}: holds trials, but {fingerprint_path(path).name} beside it cannot be read, so nobody knows with "
            "which settings they were run; name another out_dir or remove the file"
        ) from None
    fingerprint = json.loads(json.dumps(fingerprint))
    lines = diff({key: old.get(key) for key in fingerprint}, fingerprint)
    if lines:
        raise ValueError(_refusal(path, lines))


def _check_same(path: Path, trial: Trial, event: dict[str, Any]) -> None:
    planned, found = asdict(trial), {"index": trial.index, **{k: event.get(k) for k in ("kind", "weights", "seed")}}
    if planned != found:
        raise ValueError(_refusal(path, diff({trial.name: found}, {trial.name: planned})))


def _refusal(path: str | Path, lines: list[str]) -> str:
    return (
        f"{path}: its trials were run with other settings, and the losses of both cannot be compared (old -> new):\n  "
        + "\n  ".join(lines)
        + f"\nUndo the change, name another out_dir (--out DIR), or train the proxies anew: rm {path}"
    )


def _still_counts(failure: dict[str, Any]) -> bool:
    """Whether a failure of an earlier run stands: a crash uses up a try and a diverged model stays diverged, but a
    mistake in settings or data (a ValueError, not retried at once) may have been mended since."""
    return bool(failure["retry"]) or failure["reason"].startswith("FloatingPointError")


def _apply(state: Replay, event: dict[str, Any]) -> None:
    kind, index = event["event"], int(event["trial"])
    if kind == "finish":
        state.finished[index] = {**event, "losses": dict(event["losses"])}
    elif kind == "fail":
        state.failures.setdefault(index, []).append({"retry": True, **event, "reason": str(event["reason"])})
    elif kind != "claim":
        raise KeyError(kind)
