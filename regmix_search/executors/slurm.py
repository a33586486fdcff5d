"""Trials as tasks of Slurm job arrays. sbatch, squeue and scancel are all that is asked of the cluster, not sacct.

A task (``task.py``) writes what became of its trials into files, on a file system that all machines see. squeue is only
asked whether a task without an outcome can still write one. A task that is preempted and put back into the queue goes
on with what it has not finished. Tasks end when their driver is dead, as the processes of the local pool do.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_lite.files import atomic_write, atomic_write_json
from regmix_search.config import SlurmConfig
from regmix_search.executors import Outcome
from regmix_search.ledger import Trial

MOST = 1000  # trials in the queue: Slurm's MaxArraySize is 1001 unless somebody changed it
ASK = 10.0  # seconds between questions to the controller, which everybody on the cluster shares
SETTLE = 60.0  # seconds from a task's end until its files must be seen: acdirmax, NFS's cache of folders
TRY_AGAIN = 60.0  # seconds until sbatch is tried again when the controller did not answer
# States from which a task does not come back by itself (squeue(1)); one that is requeued is PENDING again.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
ENDED |= {"REVOKED", "TIMEOUT"}


@dataclass
class _Task:
    batch: Path
    number: int  # in the array
    trials: list[Trial]  # without an outcome so far
    state: str = "PENDING"
    gone: float | None = None  # when squeue first had it no more, or in a state of ENDED


class SlurmQueue:
    """Runs trials by ``command BATCH NUMBER`` on the cluster; see ``task.py`` for what such a program does."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        config: SlurmConfig,
        workers: int = 0,
        threads: int = 1,
        per_gpu: int = 1,
        heartbeat: Path | None = None,
        ask: float = ASK,
        settle: float = SETTLE,
    ) -> None:
        """``folder``: for batches, their logs and outcomes. ``workers``: trials at a time, 0: the cluster decides."""
        self.command, self.folder, self.config = command, folder.resolve(), config
        self.threads, self.heartbeat = threads, heartbeat.resolve() if heartbeat else None
        self.parallel = min(config.chunk, config.gpus * per_gpu or 1)  # trials at a time in a task
        self.throttle = -(-workers // self.parallel)
        self.ask, self.settle = ask, settle
        self.name = "proxies-" + re.sub(r"[^\w.-]", "_", self.folder.parent.name)  # of the jobs: squeue --name
        self.queued: list[Trial] = []  # not told to sbatch yet: what comes together becomes one array
        self.tasks: dict[str, _Task] = {}  # "<job>_<number>" -> its task
        self.asked = self.submit_after = -float("inf")
        self.submitted = False  # sbatch has worked before

    def free(self) -> int:
        """How many more trials may wait in Slurm's queue."""
        return MOST - len(self.queued) - sum(len(task.trials) for task in self.tasks.values())

    def submit(self, trial: Trial) -> None:
        """Takes a trial in; the next ``wait`` hands all of them to sbatch as one array."""
        self.queued.append(trial)

    def wait(self, timeout: float) -> list[Outcome]:
        """Trials that ended. ValueError when sbatch refuses the first array: a wrong partition, account or option."""
        if self.queued and time.monotonic() >= self.submit_after:
            self._submit_queued()
        outcomes = self._collect()
        if not outcomes:
            time.sleep(timeout)
            outcomes = self._collect()
        return outcomes

    def close(self) -> None:
        """Cancels every task, and waits until none runs any more, or for as long as Slurm gives one to end."""
        jobs, self.queued = {name.split("_")[0] for name in self.tasks}, []
        if not jobs:
            return
        _slurm("scancel", *jobs)
        end = time.monotonic() + self.settle
        while time.monotonic() < end and set((self._states() or {}).values()) - ENDED:
            time.sleep(min(1.0, self.ask))
        self.tasks = {}

    def _submit_queued(self) -> None:
        chunks = [self.queued[i : i + self.config.chunk] for i in range(0, len(self.queued), self.config.chunk)]
        self.folder.mkdir(parents=True, exist_ok=True)
        batch = Path(tempfile.mkdtemp(prefix=time.strftime("%m%d-%H%M%S-"), dir=self.folder))
        plan: dict[str, Any] = {
            "tasks": [[asdict(trial) for trial in chunk] for chunk in chunks],
            "parallel": self.parallel,
        }
        heartbeat = str(self.heartbeat) if self.heartbeat else None
        plan |= {"threads": self.threads, "gpus": self.config.gpus, "heartbeat": heartbeat}
        atomic_write_json(batch / "batch.json", plan)
        (batch / "outcomes").mkdir()
        for number, chunk in enumerate(chunks):
            for trial in chunk:
                (batch / f"{trial.name}.log").symlink_to(f"{number}.log")
        task = " ".join(map(shlex.quote, [*self.command, str(batch)]))
        atomic_write(batch / "job.sh", f'#!/bin/bash\nexec {task} "$SLURM_ARRAY_TASK_ID"\n')
        done = _slurm("sbatch", *self._options(batch, len(chunks)), str(batch / "job.sh"))
        if done is None or done.returncode:
            said = done.stderr.strip() if done else "no answer"
            if not self.submitted:
                raise ValueError(f"proxies.slurm: sbatch refused the proxies: {said}")
            self.submit_after = time.monotonic() + TRY_AGAIN
            return
        job, self.queued, self.submitted = done.stdout.strip().split(";")[0], [], True
        self.tasks |= {f"{job}_{number}": _Task(batch, number, chunk) for number, chunk in enumerate(chunks)}
        self.asked = time.monotonic()  # the controller knows the array, but need not list it at once

    def _options(self, batch: Path, tasks: int) -> list[str]:
        config = self.config
        options = {"partition": config.partition, "account": config.account, "time": config.time, "mem": config.mem}
        options |= {
            "job-name": self.name,
            "array": f"0-{tasks - 1}" + (f"%{self.throttle}" if self.throttle else ""),
            "output": str(batch).replace("%", "%%") + "/%a.log",
            "open-mode": "append",  # a requeued task goes on in the same log
            "ntasks": "1",
            "cpus-per-task": str(self.threads * self.parallel),
            "gres": f"gpu:{config.gpus}" if config.gpus else None,
            "chdir": os.getcwd(),
        }
        return ["--parsable", "--requeue", *(f"--{k}={v}" for k, v in options.items() if v), *config.options]

    def _collect(self) -> list[Outcome]:
        """What has come out since the last time, losses included."""
        batches = {task.batch for task in self.tasks.values()}
        there = {batch: {path.name for path in (batch / "outcomes").iterdir()} for batch in batches}
        outcomes = [found for task in self.tasks.values() for found in _read_outcomes(task, there[task.batch])]
        if self.tasks and time.monotonic() - self.asked >= self.ask:
            self._ask_for_states()
        for name, task in self.tasks.items():
            if task.trials and task.gone is not None and time.monotonic() - task.gone >= self.settle:
                # what it had not come to goes into another array; if it came to nothing, that is no way out
                lost = [trial for trial in task.trials if started_path(task.batch, trial).exists()] or task.trials
                outcomes += [Outcome(trial, None, _why_lost(name, task), retry=True) for trial in lost]
                self.queued += [trial for trial in task.trials if trial not in lost]
                task.trials = []
        self.tasks = {name: task for name, task in self.tasks.items() if task.trials}
        return outcomes

    def _ask_for_states(self) -> None:
        self.asked = time.monotonic()
        states = self._states()
        if states is None:
            return  # the controller does not answer: that says nothing about the tasks
        for name, task in self.tasks.items():
            task.state = states.get(name, "GONE")
            over = task.state in ENDED or name not in states
            task.gone = (task.gone or self.asked) if over else None

    def _states(self) -> dict[str, str] | None:
        """Task -> state, of those that the controller still knows; None when it does not answer."""
        done = _slurm("squeue", "-h", "-r", "--states=all", f"--name={self.name}", "-o", "%F_%K %T")
        if done is None or done.returncode:
            return None
        states = dict(line.split() for line in done.stdout.splitlines())
        return {name: state for name, state in states.items() if name in self.tasks}


def outcome_path(batch: Path, trial: Trial) -> Path:
    """Where a task writes what became of a trial."""
    return batch / "outcomes" / f"{trial.name}.json"


def started_path(batch: Path, trial: Trial) -> Path:
    """Is there from when a task has begun with a trial."""
    return batch / "outcomes" / f"{trial.name}.started"


def _read_outcomes(task: _Task, there: set[str]) -> list[Outcome]:
    """Outcomes of a task's trials that have been written meanwhile; those are no longer among its trials."""
    ended = [trial for trial in task.trials if outcome_path(task.batch, trial).name in there]
    task.trials = [trial for trial in task.trials if trial not in ended]
    return [Outcome(trial, **json.loads(outcome_path(task.batch, trial).read_text())) for trial in ended]


def _why_lost(name: str, task: _Task) -> str:
    log = task.batch / f"{task.number}.log"
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    last = f"; its log ends: {lines[-1][:200]}" if lines else ""
    return f"Slurm task {name} ended without a result ({task.state.lower()}){last} ({log})"


def _slurm(program: str, *arguments: str) -> subprocess.CompletedProcess[str] | None:
    """Runs one of Slurm's programs; None when it hung. ValueError when there is no Slurm here."""
    # variables of a job that this driver may itself be in would be taken for options of the new one
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k in ("SLURM_CONF", "SLURM_CLUSTERS")}
    try:
        return subprocess.run([program, *arguments], env=kept, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    except FileNotFoundError:
        raise ValueError(
            f"proxies.executor=slurm: there is no {program} here; run this where jobs are submitted, or set local"
        ) from None
