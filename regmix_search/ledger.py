"""The search's memory: an append-only trials.jsonl whose replay is the state (the idea is Optuna's journal).

One JSON object a line: ``claim``, then ``finish``, ``fail`` or ``release``. A kill can tear the last line only; a torn
line is skipped, and the next append starts a new one. Several drivers may share a ledger: each takes in what the others
wrote before it writes itself, and a claim holds for as long as its driver lives (``drivers.py``).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_lite.config import diff
from megatron_lite.files import atomic_write_json
from regmix_search.drivers import Driver
from regmix_search.fingerprint import fingerprint_path, with_defaults
from regmix_search.freshness import digest_of, read_record
from regmix_search.journal import Journal

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
    """What a trials.jsonl says when it is read from the top. Where two lines contradict, the first one counts."""

    finished: dict[int, dict[str, Any]] = field(default_factory=dict)  # index -> finish event
    failures: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # index -> fail events, oldest first
    claims: dict[int, str] = field(default_factory=dict)  # index -> the driver that has it
    torn_lines: list[int] = field(default_factory=list)  # 1-based numbers of lines that a kill or a full disk tore

    def apply(self, event: dict[str, Any]) -> None:
        """Takes one event in; KeyError or TypeError for what is none.

        A trial belongs to whoever claimed it first, until that driver ends it or it is released. An end written by
        anybody else, or after another's, says nothing. A finish needs no claim: a driver that was given up for dead
        and finished all the same has a good result. Events without a driver are from before there could be several.
        """
        kind, index, driver = event["event"], int(event["trial"]), event.get("driver")
        if kind not in ("claim", "finish", "fail", "release"):
            raise KeyError(kind)
        if kind == "finish":
            event = {**event, "losses": dict(event["losses"])}
        elif kind == "fail":
            event = {"retry": True, **event, "reason": str(event["reason"])}
        holder = self.claims.get(index)
        if index in self.finished or (driver is not None and holder not in (driver, None)):
            return
        if kind == "claim":
            if driver is not None:
                self.claims[index] = driver
            return
        self.claims.pop(index, None)
        if kind == "finish":
            self.finished[index] = event
        elif kind == "fail" and (driver is None or holder is not None):
            self.failures.setdefault(index, []).append(event)


class Ledger:
    """Hands out trials and records what became of them: ``while trial := ledger.ask(): ledger.tell(trial, ...)``."""

    def __init__(
        self,
        path: str | Path,
        trials: Sequence[Trial],
        fingerprint: dict[str, Any],
        retries: int = 2,
        driver: Driver | None = None,
    ) -> None:
        """Opens or starts the ledger at ``path`` for these trials, as one of possibly several drivers.

        ``fingerprint`` is whatever makes losses comparable (proxy config, shards, how mixtures are drawn). A ledger
        begun with another one, or whose finished trials are not the planned ones, is a ValueError that lists the
        difference. More trials than before may be planned: that is how a search is extended.
        """
        self.path = Path(path)
        self.trials = {trial.index: trial for trial in trials}
        assert len(self.trials) == len(trials), "trial indices must be unique"
        self.retries, self.fingerprint = retries, json.loads(json.dumps(fingerprint))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.driver = driver or Driver(self.path.parent / "drivers")
        self.journal, self.state = Journal(self.path), Replay()
        self.stopped = False  # no further trial is handed out here; those that run may end
        with self.journal.locked():
            busy = any(map(self.driver.alive, replay(self.path).claims.values()))
            check_fingerprint(self.path, fingerprint, busy)
            stored = read_record(fingerprint_path(path))
            if not stored or diff(with_defaults(stored, self.fingerprint), self.fingerprint):
                atomic_write_json(fingerprint_path(self.path), fingerprint)
            else:
                self.fingerprint = stored  # by which its lines are known: it may lack keys that there were not yet
            self.config_hash = digest_of(self.fingerprint)
            self.refresh(locked=True)
        for index, event in self.finished.items():
            _check_same(self.path, self.trials[index], event)
        # a search in which nothing ever worked has been mended, or nobody would run it again
        failures = self.state.failures if self.state.finished else {}
        self.state.failures = {index: [*filter(_still_counts, events)] for index, events in failures.items()}
        self.failures, self.torn_lines = self.state.failures, self.state.torn_lines

    def refresh(self, locked: bool = False) -> list[bytes]:
        """Reads what was appended since, by this driver and others. ``locked``: this driver holds the lock."""
        lines = self.journal.catch_up() if locked else self.journal.read()
        for number, line in lines:
            _apply_line(self.state, self.path, number, line, self.config_hash)
        return [line for _, line in lines]

    def ask(self) -> Trial | None:
        """Claims the first waiting trial, one that has not failed yet before one to be retried; None: none waits.

        Raises ValueError when a driver with other settings has taken the ledger over.
        """
        while not self.stopped:
            with self.journal.locked():
                self.refresh(locked=True)
                if read_record(fingerprint_path(self.path)) != self.fingerprint:
                    raise ValueError(f"{self.path}: taken over by a driver with other settings; name another out_dir")
                self._release(lambda driver: not self.driver.alive(driver))
                waiting = [t for i, t in self.trials.items() if self._state(i) == "waiting"]
                if not waiting:
                    return None
                trial = min(waiting, key=lambda t: (len(self.failures.get(t.index, ())), t.index))
                self._append("claim", trial)
            if self.state.claims.get(trial.index) == self.driver.id:
                return trial
        return None

    def tell(self, trial: Trial, losses: dict[str, float], **facts: Any) -> bool:
        """Records a finished trial. losses: validation domain -> nats per token; facts: tokens, seconds, run_dir...

        False: this driver was given up for dead meanwhile, and the trial is another's; nothing is recorded twice.
        """
        with self.journal.locked():
            self.refresh(locked=True)
            self._append("finish", trial, losses=losses, **facts)
        return self.state.finished.get(trial.index, {}).get("driver") == self.driver.id

    def fail(self, trial: Trial, reason: str, retry: bool, **facts: Any) -> bool:
        """Records a failure; True when the trial will be handed out again."""
        with self.journal.locked():
            self.refresh(locked=True)
            self._append("fail", trial, reason=reason, retry=retry, **facts)
        return self._state(trial.index) == "waiting"

    def release(self) -> None:
        """Gives up what this driver has claimed and not ended: whoever asks next gets it."""
        with self.journal.locked():
            self.refresh(locked=True)
            self._release(lambda driver: driver == self.driver.id)

    @property
    def finished(self) -> dict[int, dict[str, Any]]:
        """Planned trials that are finished -> their finish event."""
        return {index: event for index, event in self.state.finished.items() if index in self.trials}

    @property
    def counts(self) -> Counts:
        """How many trials are finished, running (under any living driver), failed for good and waiting."""
        states = [self._state(index) for index in self.trials]
        return Counts(*(states.count(name) for name in ("finished", "running", "failed", "waiting")))

    @property
    def failed(self) -> dict[int, str]:
        """Trials that failed for good -> the last reason."""
        return {i: self.failures[i][-1]["reason"] for i in self.trials if self._state(i) == "failed"}

    def _state(self, index: int) -> str:
        if index in self.state.finished:
            return "finished"
        if (holder := self.state.claims.get(index)) is not None and self.driver.alive(holder):
            return "running"
        return "failed" if gave_up(self.failures.get(index, []), self.retries) else "waiting"

    def _release(self, which: Callable[[str], bool]) -> None:
        for index, holder in list(self.state.claims.items()):
            if index in self.trials and which(holder):
                self._append("release", self.trials[index], driver=holder, by=self.driver.id)

    def _append(self, event: str, trial: Trial, **facts: Any) -> None:
        """Writes one event under the lock; it is on the disk, and part of the state, when this returns."""
        named = asdict(trial)
        record = {"event": event, "trial": named.pop("index"), "time": time.time(), "pid": os.getpid()}
        record |= {"host": os.uname().nodename, "driver": self.driver.id, "config_hash": self.config_hash}
        line = json.dumps({**record, **named, **facts}, allow_nan=False).encode()
        for _ in range(3):
            self.journal.append(line)
            if line in self.refresh(locked=True):
                return
        raise OSError(f"{self.path}: what was appended is not there; several machines write, and appends get lost")


def gave_up(failures: Sequence[dict[str, Any]], retries: int) -> bool:
    """Whether a trial with these failures is not tried again."""
    return len(failures) > retries or any(not event["retry"] for event in failures)


def replay(path: str | Path, config_hash: str | None = None) -> Replay:
    """Reads a ledger from the top; a missing file is an empty ledger. ValueError names the file and line of junk.

    With ``config_hash``, events of other settings do not count: failures from before a mistake was mended.
    """
    state = Replay()
    for number, line in Journal(path).read(tail=True):
        _apply_line(state, path, number, line, config_hash)
    return state


def _apply_line(state: Replay, path: str | Path, number: int, line: bytes, config_hash: str | None) -> None:
    try:
        event = json.loads(line)
    except ValueError:
        state.torn_lines.append(number)
        return
    try:
        if config_hash is None or event["config_hash"] == config_hash:
            state.apply(event)
    except (KeyError, TypeError):
        raise ValueError(
            f"{path}, line {number}: not an event of this ledger: {line[:80].decode(errors='replace')}; "
            "remove the line or name another out_dir"
        ) from None


def check_fingerprint(path: str | Path, fingerprint: dict[str, Any], busy: bool = False) -> None:
    """ValueError when the ledger at ``path`` holds trials of other settings; keys not given are not looked at.

    ``busy``: trials of a living driver are under way, and count as if they were finished.
    """
    if not (busy or replay(path).finished):
        return  # nothing is lost by starting over
    try:
        old = json.loads(fingerprint_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"{path}: holds trials, but {fingerprint_path(path).name} beside it cannot be read, so nobody knows with "
            "which settings they were run; name another out_dir or remove the file"
        ) from None
    fingerprint = json.loads(json.dumps(fingerprint))
    old = with_defaults(old, fingerprint)
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
