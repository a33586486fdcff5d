"""Results early: the optimum so far while proxies still run, and when more of them would not move it any more."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_lite.files import atomic_write_json
from regmix_search.config import SearchConfig
from regmix_search.freshness import digest_of, read_record
from regmix_search.reduction import Reduction
from regmix_search.space import Space
from regmix_search.tables import Runs

GROWTH = 1.3  # times the runs of the last fit until the next one: all fits together cost four times the last
PATIENCE = 2  # fits running that must find the optimum settled: one alone may be luck
SURROGATES = ("effective", "effective_gp", "gp", "average")  # laws and processes: with refits some three seconds a fit
SHOWN = 4  # domains that a line names
NICE = 10  # of nice(1): a tenth of a core that a proxy also wants; at 19 a fit of two seconds would take two minutes


@dataclass(frozen=True)
class EarlyFit:
    """What the first runs of a search say about its optimum. Losses in nats per token of a proxy."""

    time: float  # seconds since 1970
    runs: int  # runs that it was fitted to
    mixtures: int  # different ones among them
    surrogate: str  # of the goal's first loss
    target: str | dict[str, float]
    weights: dict[str, float]
    weights90: dict[str, list[float]]  # domain -> 90 % interval, by refits on resampled runs
    predicted: float  # of the goal at the optimum
    interval90: list[float]  # of a run there
    prior: float  # predicted of the prior
    left_to_gain: float  # by a better mixture, if a refit (19 of 20) or another surrogate is right
    reach: float  # L1 from the optimum to that of a refit, nine tenths of them
    moved: float | None  # L1 from the optimum of the fit before; None: there was none
    noise: float | None  # standard deviation of the goal between runs of one mixture; None: no repeats

    @property
    def settled(self) -> bool:
        """Moved less than its own uncertainty, and what is left to gain would not be seen in the noise of one run."""
        if self.moved is None or self.noise is None:
            return False
        return self.moved <= self.reach and self.left_to_gain <= self.noise

    def line(self) -> str:
        """In words, on one line."""
        largest = sorted(self.weights.items(), key=lambda item: -item[1])[:SHOWN]
        mixture = ", ".join(f"{name} {weight:.0%}" for name, weight in largest if weight >= 0.005)
        low, high = self.interval90
        moved = "" if self.moved is None else f"; moved {self.moved:.2f} (refits {self.reach:.2f})"
        noise = "" if self.noise is None else f", noise {self.noise:.4f}"
        return (
            f"{self.runs} runs: {self.predicted:.4f} ({low:.4f} to {high:.4f}) against the prior's {self.prior:.4f} at "
            f"{mixture}{moved}; up to {self.left_to_gain:.4f} left to gain{noise}"
        )


def fit_early(
    runs: Runs,
    space: Space,
    config: SearchConfig,
    last: EarlyFit | None = None,
    reduction: Reduction | None = None,
) -> EarlyFit:
    """The optimum by the runs that are there, with what could still change. The final fit's steps on few surrogates."""
    from regmix_search.certainty import BOOTSTRAPS
    from regmix_search.fits import fit_targets, run_noise
    from regmix_search.goals import parse_goal
    from regmix_search.optimize import find_optimum

    goal = parse_goal(config.fit.target, runs.losses)
    target, first = goal.to_json(), next(iter(goal.shares))
    names = config.fit.surrogates or SURROGATES
    asked = first if len(goal.shares) == 1 else dict(goal.shares)
    fit = fit_targets(runs, asked, list(goal.shares), names, seed=config.seed, folds=config.fit.folds, repeats=1)
    # other losses are not fitted, so they cannot be limits; the uncertainty is what is asked for here
    bootstraps = max(BOOTSTRAPS, config.optimum.bootstraps)
    settings = replace(config.optimum, max_worse=None, pareto=0, method="exact", bootstraps=bootstraps)
    how = (config.mixtures.minimum, config.seed, settings)
    found = find_optimum(space, runs, fit, target, *how, reduction=reduction)
    noise = run_noise(replace(runs, losses={"goal": goal.of(runs.losses)}))
    left = found["left_to_gain"]
    before = None if last is None else sum(abs(w - last.weights.get(d, 0.0)) for d, w in found["weights"].items())
    return EarlyFit(
        time=time.time(),
        runs=len(runs.index),
        mixtures=distinct(runs),
        surrogate=fit["targets"][first]["chosen"],
        target=target,
        weights=found["weights"],
        weights90=found["weights_interval90"],
        predicted=found["objective"]["predicted"],
        interval90=found["interval90"],
        prior=found["objective"]["prior"],
        left_to_gain=max(left["rivals"], left["refits95"]),
        reach=left["reach90"],
        moved=before,
        noise=noise.get("goal"),
    )


def distinct(runs: Runs) -> int:
    """How many different mixtures were run."""
    from regmix_search.surrogates import group_mixtures

    return int(group_mixtures(runs.weights).max()) + 1


def is_precise(fits: Sequence[EarlyFit]) -> bool:
    """Has the optimum been settled for PATIENCE fits running?"""
    return len(fits) >= PATIENCE and all(fit.settled for fit in fits[-PATIENCE:])


def read_fits(path: Path, identity: str | None = None) -> tuple[list[EarlyFit], str | None]:
    """(early.json's fits, oldest first; why no further proxies were started, None when they were).

    With an identity, fits of another one do not count.
    """
    record = read_record(path)
    if identity not in (None, record.get("identity")):
        return [], None
    return [EarlyFit(**fit) for fit in record.get("fits", [])], record.get("stopped")


class EarlyFits:
    """Fits in a process of its own, at a low priority, so that proxies hardly wait for it; early.json has them."""

    def __init__(
        self, path: Path, space: Space, config: SearchConfig, trials: str, reduction: Reduction | None = None
    ) -> None:
        """trials: names the settings that the trials have in common; reduction: ratios that the optimum keeps."""
        self.path, self.space, self.config, self.reduction = path, space, config, reduction
        self.identity = digest_of([trials, asdict(config.fit), asdict(config.optimum)])
        self.process: BaseProcess | None = None
        self.pipe: Connection | None = None
        self.reload()
        self.tried = self.fits[-1].mixtures if self.fits else 0

    def reload(self) -> None:
        """Takes in what early.json says."""
        self.fits, self.stopped = read_fits(self.path, self.identity)

    def lead(self) -> None:
        """Takes back a stop that nobody asks for any more."""
        if self.stopped is not None and not self.config.proxies.until_precise:
            self.stopped = None
            self.save()

    def due(self, mixtures: int) -> bool:
        """Is it time for a fit, with so many different mixtures run?"""
        least = len(self.space.domains) + 2  # slopes of a law, and two more
        return self.process is None and mixtures >= max(least, GROWTH * self.tried)

    def start(self, runs: Runs) -> None:
        """Begins a fit to these runs."""
        self.tried = distinct(runs)
        spawn = multiprocessing.get_context("spawn")  # fork would copy thread pools in unknown state
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        # Hundreds of runs are more than a pipe holds: as arguments of the process, or sent from here, they would hold
        # the driver until the new process reads, and for ever if it dies before.
        task = (runs, self.space, self.config, self.fits[-1] if self.fits else None, self.reduction)
        self.sender = threading.Thread(target=_send, args=(self.pipe, task), daemon=True)
        self.sender.start()

    def collect(self, timeout: float = 0.0) -> EarlyFit | str | None:
        """The fit that was begun, or why there is none, if it is through after at most `timeout` seconds."""
        if self.pipe is None or self.process is None or not self.pipe.poll(timeout):
            return None
        try:
            found: EarlyFit | str = self.pipe.recv()
        except (EOFError, OSError):
            found = "its process died"
        self.close()
        if isinstance(found, EarlyFit):
            self.fits.append(found)
            if self.config.proxies.until_precise and is_precise(self.fits):
                self.stopped = f"the optimum has been settled for {PATIENCE} fits running"
            self.save()
        return found

    def save(self) -> None:
        """Writes early.json."""
        fits = [asdict(fit) for fit in self.fits]
        atomic_write_json(self.path, {"identity": self.identity, "fits": fits, "stopped": self.stopped})

    def close(self) -> None:
        """Ends a fit that is under way: it is repeated when it is due again."""
        if self.process is not None and self.pipe is not None:
            self.process.kill()
            self.process.join()
            self.sender.join()
            self.pipe.close()
        self.process = self.pipe = None


def _send(pipe: Connection, task: tuple[object, ...]) -> None:
    with contextlib.suppress(OSError):  # it died: collect() will see that
        pipe.send(task)


def _serve(pipe: Connection) -> None:
    """The process of one fit: receives what fit_early takes; sends an EarlyFit, or in words why there is none."""
    from numpy.linalg import LinAlgError
    from threadpoolctl import threadpool_limits

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides
    os.nice(NICE)
    try:
        with threadpool_limits(1):
            pipe.send(fit_early(*pipe.recv()))
    except (ValueError, ArithmeticError, LinAlgError) as error:
        pipe.send(f"{type(error).__name__}: {error}")
