"""What a task of a job array runs: ``python -m regmix_search.executors.task FUNCTION BATCH NUMBER``.

BATCH/batch.json names the task's trials; BATCH/outcomes/<trial>.json says what became of each. A task that is started
again does those without an outcome. It ends when its driver shows no sign of life: nobody would read what it writes.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from megatron_lite.files import atomic_write_json
from regmix_search.drivers import LEASE, silence
from regmix_search.executors import Outcome, TrialFunction
from regmix_search.executors.local import LocalPool, visible_gpus
from regmix_search.executors.slurm import outcome_path, started_path
from regmix_search.ledger import Trial

LOOK = 5.0  # seconds between looks at the driver


def run_task(function: TrialFunction, batch: Path, number: int, lease: float = LEASE) -> int:
    """Runs a task's trials in a local pool; the exit code."""
    plan = json.loads((batch / "batch.json").read_text(encoding="utf-8"))
    trials = [Trial(**facts) for facts in plan["tasks"][number]]
    waiting = [trial for trial in trials if not outcome_path(batch, trial).exists()]
    heartbeat, own = plan["heartbeat"], batch / f"{number}.alive"
    own.touch()
    left = len(waiting)
    pool = LocalPool(function, plan["parallel"], plan["threads"], visible_gpus() if plan["gpus"] else [""])
    try:
        while left:
            if heartbeat and _silent(Path(heartbeat), own) > lease:
                print(f"the driver is gone ({heartbeat}): nothing more is done", flush=True)
                return 1
            while waiting and pool.free():
                started_path(batch, waiting[0]).touch()
                pool.submit(waiting.pop(0))
            for outcome in pool.wait(LOOK):
                if outcome.reason.startswith("worker killed by SIGTERM"):
                    return 1  # Slurm ends this task, its workers first: no proxy has failed
                _write(batch, outcome)
                left -= 1
    finally:
        pool.close()
        own.unlink(missing_ok=True)
    return 0


def _silent(heartbeat: Path, own: Path) -> float:
    """Seconds since the driver's last sign of life; infinite when it is gone."""
    try:
        with open(heartbeat, encoding="utf-8") as file:  # opening asks the server; see drivers.py
            return silence(file.fileno(), own)
    except FileNotFoundError:
        return float("inf")


def _write(batch: Path, outcome: Outcome) -> None:
    facts = dataclasses.asdict(outcome)
    trial = facts.pop("trial")
    print(f"trial {trial['index']}: {outcome.reason or 'done'}, {outcome.seconds:.1f} s", flush=True)
    if outcome.traceback:
        print(outcome.traceback, flush=True)
    atomic_write_json(outcome_path(batch, outcome.trial), facts)


if __name__ == "__main__":
    from regmix_search.proxies import ProxyTraining

    sys.exit(run_task(ProxyTraining.load(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])))
