"""Trials as tasks of a Ray cluster, each with its CPUs and, where there are GPUs, its share of one."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from regmix_search.executors import Outcome, TrialFunction, attempt, limit_threads
from regmix_search.ledger import Trial

CLOSING = 30.0  # seconds in which tasks that are cancelled must have ended


class RayTasks:
    """Runs trials on a Ray cluster, or on a Ray that is started on this machine for as long as this lives.

    Ray's own retries are off: the ledger counts the tries. Ray ends the tasks of a driver that dies.
    """

    def __init__(
        self, function: TrialFunction, workers: int = 0, threads: int = 1, per_gpu: int = 1, address: str | None = None
    ) -> None:
        """``workers``: trials at a time, 0: as many as the cluster's CPUs and GPUs hold when it is asked.

        ``per_gpu``: trials that share a GPU, where the cluster has GPUs; 0: they need none.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray starts
        try:
            import ray
        except ImportError:
            raise ValueError("proxies.executor=ray: Ray is not installed; pip install 'megatron_lite[ray]'") from None
        self.ray: Any = ray
        self.workers, self.threads, self.per_gpu = workers, threads, per_gpu
        self.started_here = not self.ray.is_initialized()
        if self.started_here:
            on_sigterm = signal.getsignal(signal.SIGTERM)
            new = address is None and not os.environ.get("RAY_ADDRESS")
            self.ray.init(address=address, log_to_driver=False, **({"include_dashboard": False} if new else {}))
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler would not let the ledger release its trials
        gpus = 1 / per_gpu if per_gpu and self.ray.cluster_resources().get("GPU") else 0
        self.task = self.ray.remote(_run).options(num_cpus=threads, num_gpus=gpus, max_retries=0)
        self.function = self.ray.put(function)
        self.running: dict[Any, tuple[Trial, float]] = {}  # reference -> trial and when it was submitted

    def free(self) -> int:
        """How many trials may be submitted now; a cluster that grows takes more."""
        have = self.ray.cluster_resources()
        fitting = have.get("CPU", 0) // self.threads
        if self.per_gpu and have.get("GPU"):
            fitting = min(fitting, have["GPU"] * self.per_gpu)
        return int(max(0, (self.workers or max(1, fitting)) - len(self.running)))

    def submit(self, trial: Trial) -> None:
        """Hands a trial to Ray."""
        self.running[self.task.remote(self.function, trial, self.threads)] = trial, time.monotonic()

    def wait(self, timeout: float) -> list[Outcome]:
        """Trials that ended, after at most ``timeout`` seconds."""
        if not self.running:
            time.sleep(timeout)
            return []
        self.ray.wait(list(self.running), num_returns=1, timeout=timeout)
        ended, _ = self.ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
        return [self._collect(reference) for reference in ended]

    def close(self) -> None:
        """Kills every task, and Ray with them when it was started here.

        Ray loses a cancellation that reaches a worker just before its task begins, and then runs the task: ask again.
        """
        left, end = list(self.running), time.monotonic() + CLOSING
        while left and time.monotonic() < end:
            for reference in left:
                self.ray.cancel(reference, force=True)
            _, left = self.ray.wait(left, num_returns=len(left), timeout=1.0)
        self.running = {}
        if self.started_here:
            self.ray.shutdown()

    def _collect(self, reference: Any) -> Outcome:
        trial, started = self.running.pop(reference)
        seconds = time.monotonic() - started
        try:
            return Outcome(trial, seconds=seconds, **self.ray.get(reference))
        except self.ray.exceptions.RayError as error:  # its process or machine died, or ran out of memory
            text = " ".join(str(error).split())[:300]
            return Outcome(trial, None, f"{type(error).__name__}: {text}", retry=True, seconds=seconds)


def _run(function: TrialFunction, trial: Trial, threads: int) -> dict[str, Any]:
    limit_threads(threads)
    return attempt(function, trial)
