"""Learning curves of proxies: kept for all, and the rule by which a hopeless one may be stopped and its end estimated.

The end of a run is told by a straight line in its loss at an earlier evaluation: a line for every loss and evaluation,
fitted to runs that went to their end. Who is stopped depends on nothing but these earlier losses, so the choice bends
no line, and estimates stand for losses that a fit would otherwise miss or take too high.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_lite.files import read_jsonl
from regmix_search.freshness import read_record
from regmix_search.goals import Goal
from regmix_search.ledger import Trial
from regmix_search.space import FloatArray

LEAST = 16  # runs with a curve to their end before any is stopped
SURE = 3.0  # standard deviations of the estimate that must lie between a run and the better half
SPREAD = 0.2  # of the spread of runs that the estimate's deviation may be: above it the early loss says too little
CONTROL = 5  # every fifth run is never stopped, however bad: the lines need points there too
POLL = 0.5  # seconds between looks at a run's evaluations
Point = dict[str, Any]  # {"tokens": trained so far, "losses": {loss: nats}}


def may_stop(trial: Trial) -> bool:
    """Whether the rule may ever end this trial: never one that judges or repeats, nor every fifth of the others."""
    return trial.kind == "train" and trial.index % CONTROL > 0


def read_curve(run_dir: Path) -> list[Point]:
    """A run's evaluations so far, oldest first; a torn last line is left out."""
    points = list[Point]()
    for row in read_jsonl(run_dir / "evals.jsonl"):
        losses = {key.split("/")[1]: value for key, value in row.items() if key.endswith("/loss")}
        points.append({"tokens": row["tokens"], "losses": losses})
    return points


def build_rule(events: Iterable[Mapping[str, Any]], goal: Goal, valid: Sequence[str]) -> dict[str, Any]:
    """What stopping.json holds, from finished trials: {} while nobody may be stopped.

    ``limit`` is the goal's median; ``rungs``: tokens -> the line [intercept, slope] of every loss, and the margin that
    an estimate must have above the limit. A rung is left out when its own leave-one-out estimates would have stopped
    a run that came out in the better half.
    """
    events = [event for event in events if event.get("curve")]
    whole = [event for event in events if not event.get("stopped")]
    if len(whole) < LEAST:
        return {}
    ends = {name: np.array([event["losses"][name] for event in whole]) for name in valid}
    final, rungs = goal.of(ends), {}
    limit = float(np.median(goal.of({name: [event["losses"][name] for event in events] for name in goal.shares})))
    for rung, point in enumerate(whole[0]["curve"][:-1]):
        early = {name: np.array([event["curve"][rung]["losses"][name] for event in whole]) for name in valid}
        lines = {name: np.polyfit(early[name], ends[name], 1)[::-1].tolist() for name in valid}
        told = goal.of({name: _leave_one_out(early[name], ends[name]) for name in goal.shares})
        deviation = float(np.std(told - final))
        stopped = told - SURE * deviation > limit
        if deviation <= SPREAD * np.std(final) and not np.any(stopped & (final <= limit)):
            rungs[str(point["tokens"])] = {"lines": lines, "margin": SURE * deviation}
    goal_json = {"shares": goal.shares, "worst": goal.worst}
    return {"goal": goal_json, "limit": limit, "rungs": rungs} if rungs else {}


def estimate(rule: Mapping[str, Any], point: Point) -> dict[str, float] | None:
    """Every loss at the end of the run, when the rule says that it is hopeless after this evaluation; else None."""
    rung = rule.get("rungs", {}).get(str(point["tokens"]))
    if rung is None:
        return None
    losses = {name: a + b * point["losses"][name] for name, (a, b) in rung["lines"].items()}
    goal = Goal(**rule["goal"])
    value = float(goal.of({name: [losses[name]] for name in goal.shares})[0])
    return losses if value - rung["margin"] > rule["limit"] else None


def _leave_one_out(early: FloatArray, ends: FloatArray) -> FloatArray:
    """Each end [n] by the line through all the others."""
    columns = np.stack([np.ones_like(early), early], axis=1)
    hat = columns @ np.linalg.pinv(columns)
    return np.asarray(ends - (ends - hat @ ends) / (1 - np.diag(hat)))


class Watch:
    """``with Watch(run_dir, rule) as watch: train(...)``: ends the run as SIGUSR1 does, by train's Preempted.

    Afterwards ``losses`` are the estimated ones and ``point`` the evaluation they came from, or both are None. Off the
    main thread, where no signal arrives, nothing is watched.
    """

    def __init__(self, run_dir: Path, rule: Path | None) -> None:
        self.run_dir, self.rule, self.over = run_dir, rule, threading.Event()
        self.point: Point | None = None
        self.losses: dict[str, float] | None = None
        self.thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        if self.rule is not None and threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a late one must not kill the worker
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.over.set()
        if self.thread.ident is not None:
            self.thread.join()
            signal.signal(signal.SIGUSR1, self.before)

    def _look(self) -> None:
        assert self.rule is not None
        while not self.over.wait(POLL):
            for point in read_curve(self.run_dir)[-1:]:
                losses = estimate(read_record(self.rule), point)
                if losses is not None and not self.over.is_set():
                    self.point, self.losses = point, losses
                    os.kill(os.getpid(), signal.SIGUSR1)
                    return
