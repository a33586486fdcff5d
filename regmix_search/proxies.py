"""Runs the ledger's trials: a proxy is one ordinary training run, in a pool of single-threaded local processes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from megatron_lite.config import Config
from regmix_search.ledger import Ledger, Trial
from regmix_search.progress import Progress

# What a trial returns: {"losses": {domain: nats}, "tokens": int, ...}, all of it JSON. Runs in a worker process.
TrialFunction = Callable[[Trial], dict[str, Any]]

# A diverged model and a mistake in settings or data: a second try would end the same.
NOT_RETRIED = (FloatingPointError, ValueError)
# As many failures for good in a row as this, divergence apart, are one mistake and not bad luck: the search stops.
HOPELESS = 3
TRACEBACK_CHARS = 2000  # of a failure that the ledger keeps, from the end


@dataclass(frozen=True)
class Outcome:
    """What became of one try of a trial: a result, or the reason why there is none."""

    trial: Trial
    result: dict[str, Any] | None
    reason: str = ""
    retry: bool = False  # whether another try could end differently
    seconds: float = 0.0
    traceback: str = ""


class Executor(Protocol):
    """Where trials run. The local pool is one; a cluster's queue can be another."""

    def free(self) -> int:
        """How many trials may be submitted now."""

    def submit(self, trial: Trial) -> None:
        """Starts a trial; only when ``free()``."""

    def wait(self, timeout: float) -> list[Outcome]:
        """Trials that ended, after at most ``timeout`` seconds; every submitted trial comes back exactly once."""

    def close(self) -> None:
        """Ends everything that still runs."""


@dataclass(frozen=True)
class ProxyTraining:
    """Trains one proxy: called with a trial in a worker, gives losses in nats per token by validation domain."""

    config: Config
    data_dir: str
    valid: tuple[str, ...]  # validation domains to score; the retrained models' test domain is not among them
    runs_dir: str

    def __call__(self, trial: Trial) -> dict[str, Any]:
        """Raises FloatingPointError when the proxy diverges, in training or in evaluation."""
        from megatron_lite.data.mixture import Mixture
        from megatron_lite.train import train

        run_dir = Path(self.runs_dir) / trial.name
        shutil.rmtree(run_dir, ignore_errors=True)  # what a killed try left is of no use: proxies restart
        config = dataclasses.replace(self.config, name=trial.name, out_dir=str(run_dir), seed=trial.seed)
        result = train(config, Mixture.from_weights(trial.weights, self.data_dir, valid=self.valid))
        bad = [name for name, loss in result.losses.items() if not math.isfinite(loss)]
        if bad:
            raise FloatingPointError(f"validation loss of {', '.join(bad)} is not finite after {result.steps} steps")
        run_folder = os.path.join(Path(self.runs_dir).name, trial.name)  # relative to the ledger: folders may move
        facts = {"tokens": result.tokens, "seconds": result.seconds, "flops": result.flops, "run_dir": run_folder}
        return {"losses": dict(result.losses), "bpb": dict(result.bpb), **facts}


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    trial: Trial | None = None
    started: float = 0.0


class LocalPool:
    """Runs trials in ``workers`` processes of this machine; each serves many trials, so torch is imported once.

    A worker that dies (segfault, kill -9, out of memory) costs its own trial's try and is replaced. Workers ignore
    Ctrl-C (the driver decides) and end themselves when the driver is gone, however it went.
    """

    def __init__(self, function: TrialFunction, workers: int, threads: int = 1) -> None:
        self.function, self.size, self.threads = function, workers, threads
        self.context = multiprocessing.get_context("spawn")  # fork would copy torch's thread pools in unknown state
        self.workers: list[_Worker] = []

    def free(self) -> int:
        """Workers without a trial, started or not."""
        return self.size - sum(worker.trial is not None for worker in self.workers)

    def submit(self, trial: Trial) -> None:
        """Hands a trial to an idle worker, starting one if need be."""
        assert self.free(), "submit() without a free worker"
        worker = next((w for w in self.workers if w.trial is None and w.process.is_alive()), None) or self._start()
        worker.trial, worker.started = trial, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it died just now: wait() will see that
            worker.pipe.send(trial)

    def wait(self, timeout: float) -> list[Outcome]:
        """Trials that ended, after at most ``timeout`` seconds."""
        busy = [worker for worker in self.workers if worker.trial is not None]
        signs: list[Any] = [worker.pipe for worker in busy] + [worker.process.sentinel for worker in busy]
        multiprocessing.connection.wait(signs, timeout)
        outcomes = [outcome for worker in busy if (outcome := self._collect(worker)) is not None]
        self.workers = [worker for worker in self.workers if worker.process.is_alive() or worker.trial is not None]
        return outcomes

    def close(self) -> None:
        """Kills every worker. Nothing is lost: a result that was not collected is a trial to run again."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.pipe.close()
        self.workers = []

    def _start(self) -> _Worker:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(
            target=_serve, args=(theirs, self.function, self.threads), daemon=True, name="proxy"
        )
        process.start()
        theirs.close()  # so that the pipe ends when the worker does
        worker = _Worker(process, ours)
        self.workers.append(worker)
        return worker

    def _collect(self, worker: _Worker) -> Outcome | None:
        """The outcome of a worker's trial, None while it runs."""
        assert worker.trial is not None
        trial, seconds = worker.trial, time.monotonic() - worker.started
        try:
            if worker.pipe.poll():
                outcome = Outcome(trial, seconds=seconds, **worker.pipe.recv())
            elif worker.process.is_alive():
                return None
            else:
                raise EOFError
        except (EOFError, OSError):
            worker.process.join(5)  # seconds; its end of the pipe is closed, so it is going
            outcome = Outcome(trial, None, _cause_of_death(worker.process.exitcode), retry=True, seconds=seconds)
        worker.trial = None
        return outcome


def run_trials(ledger: Ledger, executor: Executor, progress: Progress) -> Generator[Outcome]:
    """Runs every waiting trial and records each the moment it ends, then yields its outcome to whoever wants to look.

    Nothing runs until it is iterated; closing it, like anything raised in it, ends all work: what still ran is a
    trial to run again. Iterate inside ``contextlib.closing`` where the loop's body may raise.
    Raises ValueError when HOPELESS trials in a row fail for good, or as many diverge and none ever succeeded.
    """
    tokens = streak = 0
    try:
        _submit_waiting(ledger, executor)
        while ledger.counts.running or (
            ledger.counts.waiting and not ledger.stopped
        ):  # other drivers' too: they may die
            progress.update(ledger.counts, tokens)
            outcomes = executor.wait(timeout=0.5)
            for outcome in outcomes:
                tokens += _record(ledger, outcome, progress)
                failed = ledger.failed.get(outcome.trial.index, "")
                diverged = failed.startswith("FloatingPointError")
                streak = streak + (bool(failed) and not diverged) if outcome.result is None else 0
            if streak >= HOPELESS or (len(ledger.failed) >= HOPELESS and not ledger.finished):
                reason = list(ledger.failed.values())[-1]
                raise ValueError(f"{ledger.path}: no proxy succeeds: {reason}. Mend it and run this again")
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
            progress.say(f"proxy {trial.name}: another driver has it, which thought that this one was dead")
            return 0
        return int(outcome.result.get("tokens", 0))
    facts = {"seconds": outcome.seconds} | ({"traceback": outcome.traceback} if outcome.traceback else {})
    again = ledger.fail(trial, outcome.reason, outcome.retry, **facts)
    progress.say(f"proxy {trial.name} failed: {outcome.reason}; {'it will be tried again' if again else 'given up'}")
    return 0


def _serve(pipe: Connection, function: TrialFunction, threads: int) -> None:
    """A worker: trials in, outcomes out, until the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)  # read when torch and numpy are first imported, which is later
    threading.Thread(target=_die_with_parent, daemon=True).start()
    for trial in _received(pipe):
        pipe.send(_attempt(function, trial))


def _received(pipe: Connection) -> Iterator[Trial]:
    with contextlib.suppress(EOFError, OSError):
        while True:
            yield pipe.recv()


def _attempt(function: TrialFunction, trial: Trial) -> dict[str, Any]:
    """Calls the function; the fields of an Outcome that only the worker knows."""
    try:
        return {"result": function(trial)}
    except Exception as error:  # whatever it is, it belongs into the ledger and must not end the search
        text = f"{type(error).__name__}: {error}"
        retry = not isinstance(error, NOT_RETRIED)
        return {"result": None, "reason": text, "retry": retry, "traceback": traceback.format_exc()[-TRACEBACK_CHARS:]}


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are started by multiprocessing"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _cause_of_death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        with contextlib.suppress(ValueError):
            hint = " (often: out of memory)" if exitcode == -signal.SIGKILL and sys.platform == "linux" else ""
            return f"worker killed by {signal.Signals(-exitcode).name}{hint}"
    return f"worker died with exit code {exitcode}"
