"""Where trials run: one small protocol, and a file for each way to meet it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from regmix_search.ledger import Trial

# What a trial returns: {"losses": {domain: nats}, "tokens": int, ...}, all of it JSON. Runs in a worker process.
TrialFunction = Callable[[Trial], dict[str, Any]]

# A diverged model and a mistake in settings or data: a second try would end the same.
NOT_RETRIED = (FloatingPointError, ValueError)
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
    """Where trials run."""

    def free(self) -> int:
        """How many trials may be submitted now."""

    def submit(self, trial: Trial) -> None:
        """Starts a trial; only when ``free()``."""

    def wait(self, timeout: float) -> list[Outcome]:
        """Trials that ended, after at most ``timeout`` seconds; every submitted trial comes back exactly once."""

    def close(self) -> None:
        """Ends everything that still runs."""


def attempt(function: TrialFunction, trial: Trial) -> dict[str, Any]:
    """Calls the function; the fields of an Outcome that only the worker knows."""
    try:
        return {"result": function(trial)}
    except Exception as error:  # whatever it is, it belongs into the ledger and must not end the search
        text = f"{type(error).__name__}: {error}"
        retry = not isinstance(error, NOT_RETRIED)
        return {"result": None, "reason": text, "retry": retry, "traceback": traceback.format_exc()[-TRACEBACK_CHARS:]}


def limit_threads(threads: int) -> None:
    """Sets the CPU threads of torch and numpy in a process that has not imported them yet."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
