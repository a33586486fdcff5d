"""The local pool: trials in processes of this machine, on its cores or its GPUs."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from regmix_search.executors import Outcome, TrialFunction, attempt, limit_threads
from regmix_search.ledger import Trial


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, by their names for CUDA_VISIBLE_DEVICES."""
    written = os.environ.get("CUDA_VISIBLE_DEVICES")
    if written is not None:
        return tuple(name for name in written.split(",") if name and name != "-1")
    if not os.path.exists("/proc/driver/nvidia"):  # torch takes seconds to import, and could only say the same
        return ()
    import torch

    return tuple(map(str, range(torch.cuda.device_count())))


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    slot: int  # 0 to workers - 1, no two alike at a time: it decides on the GPU
    trial: Trial | None = None
    started: float = 0.0


class LocalPool:
    """Runs trials in ``workers`` processes of this machine; each serves many trials, so torch is imported once.

    A worker that dies (segfault, kill -9, out of memory) costs its own trial's try and is replaced. Workers ignore
    Ctrl-C (the driver decides) and end themselves when the driver is gone, however it went.
    """

    def __init__(self, function: TrialFunction, workers: int, threads: int = 1, gpus: Sequence[str] = ()) -> None:
        """``gpus``: names for CUDA_VISIBLE_DEVICES; workers are dealt to them in turn, so several may share one."""
        self.function, self.size, self.threads, self.gpus = function, workers, threads, gpus
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
        slot = min(set(range(self.size)) - {worker.slot for worker in self.workers if worker.process.is_alive()})
        gpu = self.gpus[slot % len(self.gpus)] if self.gpus else None
        arguments = (theirs, self.function, self.threads, gpu)
        process = self.context.Process(target=_serve, args=arguments, daemon=True, name="proxy")
        process.start()
        theirs.close()  # so that the pipe ends when the worker does
        worker = _Worker(process, ours, slot)
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


def _serve(pipe: Connection, function: TrialFunction, threads: int, gpu: str | None) -> None:
    """A worker: trials in, outcomes out, until the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    limit_threads(threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # this worker's "cuda:0", as long as torch was not imported
    threading.Thread(target=_die_with_parent, daemon=True).start()
    for trial in _received(pipe):
        pipe.send(attempt(function, trial))


def _received(pipe: Connection) -> Iterator[Trial]:
    with contextlib.suppress(EOFError, OSError):
        while True:
            yield pipe.recv()


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
