"""Runs the ledger's trials: a proxy is one ordinary training run, and an executor says where it runs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_lite.config import Config, dump, load_config
from megatron_lite.files import atomic_write, atomic_write_json
from regmix_search.config import ProxiesConfig
from regmix_search.executors import Executor, Outcome
from regmix_search.executors.local import LocalPool, visible_gpus
from regmix_search.ledger import Ledger, Trial
from regmix_search.machine import cores
from regmix_search.progress import Progress

if TYPE_CHECKING:
    from regmix_search.curves import Watch

# As many failures for good in a row as this, divergence apart, are one mistake and not bad luck: the search stops.
HOPELESS = 3


@dataclass(frozen=True)
class ProxyTraining:
    """Trains one proxy: called with a trial in a worker, gives losses in nats per token by validation domain."""

    config: Config
    data_dir: str
    valid: tuple[str, ...]  # validation domains to score; the retrained models' test domain is not among them
    runs_dir: str
    stops: bool = False  # whether stopping.json beside runs_dir may end a hopeless trial

    def __call__(self, trial: Trial) -> dict[str, Any]:
        """Raises FloatingPointError when the proxy diverges, in training or in evaluation."""
        from megatron_lite.data.mixture import Mixture
        from megatron_lite.train import Preempted, train
        from regmix_search.curves import Watch, may_stop, read_curve

        run_dir = Path(self.runs_dir) / trial.name
        if not self.config.checkpoint.every:  # what a killed try left is of no use: it starts again
            shutil.rmtree(run_dir, ignore_errors=True)
        config = dataclasses.replace(self.config, name=trial.name, out_dir=str(run_dir), seed=trial.seed)
        rule = Path(self.runs_dir).parent / "stopping.json" if self.stops and may_stop(trial) else None
        with Watch(run_dir, rule) as watch:
            try:
                result = train(config, Mixture.from_weights(trial.weights, self.data_dir, valid=self.valid))
            except Preempted:
                if watch.losses is None:
                    raise  # somebody else's signal
                return self._stopped(run_dir, watch)
        bad = [name for name, loss in result.losses.items() if not math.isfinite(loss)]
        if bad:
            raise FloatingPointError(f"validation loss of {', '.join(bad)} is not finite after {result.steps} steps")
        facts = {"tokens": result.tokens, "flops": result.flops}
        facts |= {"seconds": result.seconds, "eval_seconds": result.eval_seconds}
        kept = {"run_dir": self._folder(run_dir), "curve": read_curve(run_dir)}
        return {"losses": dict(result.losses), "bpb": dict(result.bpb), **facts, **kept}

    def _stopped(self, run_dir: Path, watch: Watch) -> dict[str, Any]:
        """Of a trial that was ended early: the losses that its end is estimated to have, and where they come from."""
        from regmix_search.curves import read_curve

        for folder in run_dir.glob("step_*"):
            shutil.rmtree(folder)  # saved for a resume that will not come
        plan = json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))
        curve = read_curve(run_dir)
        tokens = curve[-1]["tokens"]
        facts = {"tokens": tokens, "flops": plan["total_flops"] * tokens / plan["total_tokens"], "stopped": watch.point}
        return {"losses": watch.losses, **facts, "run_dir": self._folder(run_dir), "curve": curve}

    def _folder(self, run_dir: Path) -> str:
        return os.path.join(Path(self.runs_dir).name, run_dir.name)  # relative to the ledger: folders may move

    def save(self, folder: Path) -> None:
        """Writes everything about it into a folder, for a process on another machine."""
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "proxy.yaml", dump(self.config))
        facts = {"data_dir": self.data_dir, "valid": self.valid, "runs_dir": self.runs_dir, "stops": self.stops}
        atomic_write_json(folder / "proxy.json", facts)

    @classmethod
    def load(cls, folder: Path) -> ProxyTraining:
        """What ``save`` wrote."""
        facts = json.loads((folder / "proxy.json").read_text(encoding="utf-8"))
        config = load_config(Config, folder / "proxy.yaml")
        return cls(config, facts["data_dir"], tuple(facts["valid"]), facts["runs_dir"], facts["stops"])


class Portable(Protocol):
    """A trial function that a process on another machine can be given as files."""

    def __call__(self, trial: Trial) -> dict[str, Any]:
        """Runs a trial."""

    def save(self, folder: Path) -> None:
        """Writes what ``module`` needs to build it again."""


def build_executor(
    function: Portable,
    config: ProxiesConfig,
    workers: int,
    threads: int,
    folder: Path,
    heartbeat: Path,
    module: str = "regmix_search.executors.task",
    on_gpus: bool = True,
) -> Executor:
    """The executor that the config names. ``workers``: trials at a time, 0: as many as fit; ``threads``: of each.

    ``folder``: on a file system that all machines see; ``heartbeat``: touched while this driver lives; ``module``: what
    ``python -m`` runs on another machine; ``on_gpus``: False for trials that would leave a GPU idle.
    """
    sharing = config.per_gpu or 1
    if config.executor == "slurm":
        from regmix_search.executors.slurm import SlurmQueue

        function.save(folder / "slurm")
        command = (sys.executable, "-m", module, str((folder / "slurm").resolve()))
        return SlurmQueue(command, folder / "slurm", config.slurm, workers, threads, sharing, heartbeat)
    if config.executor == "ray":
        from regmix_search.executors.ray_tasks import RayTasks

        return RayTasks(function, workers, threads, sharing * on_gpus, config.ray.address)
    gpus = visible_gpus() if on_gpus else ()
    fitting = len(gpus) * sharing or max(1, cores() // threads)
    return LocalPool(function, workers or fitting, threads, gpus)


def run_trials(ledger: Ledger, executor: Executor, progress: Progress) -> Generator[Outcome]:
    """Runs every waiting trial and records each the moment it ends, then yields its outcome to whoever wants to look.

    Nothing runs until it is iterated; closing it, like anything raised in it, ends all work: what still ran is a
    trial to run again. Iterate inside ``contextlib.closing`` where the loop's body may raise.
    Raises ValueError when HOPELESS trials in a row fail for good, or as many diverge and none ever succeeded.
    """
    tokens = streak = 0
    try:
        _submit_waiting(ledger, executor)
        while ledger.counts.running or (ledger.counts.waiting and not ledger.stopped):  # also others': they may die
            progress.update(ledger.counts, tokens)
            outcomes = executor.wait(timeout=0.5)
            for outcome in outcomes:
                tokens += _record(ledger, outcome, progress)
                failed = ledger.failed.get(outcome.trial.index, "")
                diverged = failed.startswith("FloatingPointError")
                streak = streak + (bool(failed) and not diverged) if outcome.result is None else 0
            if streak >= HOPELESS or (len(ledger.failed) >= HOPELESS and not ledger.finished):
                reason = list(ledger.failed.values())[-1]
                raise ValueError(f"{ledger.path}: no {progress.one} succeeds: {reason}. Mend it and run this again")
            ledger.refresh()
            _submit_waiting(ledger, executor)  # before anybody looks at outcomes: no worker waits for that
            yield from outcomes
        progress.update(ledger.counts, tokens)
    finally:
        executor.close()
        ledger.release()


def _submit_waiting(ledger: Ledger, executor: Executor) -> None:
    while executor.free() and (trial := ledger.ask()) is not None:
        executor.submit(trial)


def _record(ledger: Ledger, outcome: Outcome, progress: Progress) -> int:
    """Writes an outcome into the ledger; the tokens that it adds."""
    trial = outcome.trial
    if outcome.result is not None:
        if not ledger.tell(trial, **{"seconds": outcome.seconds, **outcome.result}):
            progress.say(f"{progress.one} {trial.name}: another driver has it, which thought that this one was dead")
            return 0
        return int(outcome.result.get("tokens", 0))
    facts = {"seconds": outcome.seconds} | ({"traceback": outcome.traceback} if outcome.traceback else {})
    again = ledger.fail(trial, outcome.reason, outcome.retry, **facts)
    then = "it will be tried again" if again else "given up"
    progress.say(f"{progress.one} {trial.name} failed: {outcome.reason}; {then}")
    return 0
