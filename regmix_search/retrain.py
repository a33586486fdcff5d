"""Stage train: the larger model on the optimal mixture and on the controls, through launch/pretrain.py."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from megatron_lite.config import Config, dump, to_dict
from megatron_lite.files import atomic_write, atomic_write_json, read_jsonl
from regmix_search.freshness import Stage, digest, read_json, read_record
from regmix_search.ledger import Counts
from regmix_search.progress import Progress
from regmix_search.repetition import with_epochs
from regmix_search.search import Search

LAUNCHER = Path(__file__).resolve().parents[1] / "launch" / "pretrain.py"
GRACE = 20.0  # seconds that an interrupted run gets to save before it is killed
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True)
class MainRun:
    """One training of the larger model; everything about it lies in train/<mixture>-s<seed>*."""

    mixture: str
    seed: int
    weights: dict[str, float]
    folder: Path
    config: Config | None = None  # None: train.main
    after: str = ""  # what else the run depends on: the run_hash of another

    def beside(self, ending: str) -> Path:
        """A file next to the folder: .config.yaml and .mixture.yaml go in, .log comes out, .inputs.json is both."""
        return self.folder.with_name(self.folder.name + ending)

    @property
    def done(self) -> bool:
        """It was trained and evaluated to the end."""
        return (self.folder / "result.json").is_file()


def train(search: Search) -> Stage | None:
    """train.json: losses and curves of every mixture and seed. None when train.enabled is false."""
    config, out = search.config, search.out
    if not config.train.enabled:
        return None
    runs = plan_runs(search)

    def make() -> str:
        for run in runs:
            prepare(search, run)
        start, todo = time.monotonic(), [run for run in runs if not run.done]
        failed = run_all(search, todo, len(runs))
        elapsed = time.monotonic() - start if len(todo) == len(runs) else None  # in one go, or it is not known
        finished = [run for run in runs if run.done]
        if not finished:
            raise ValueError(f"no main run succeeded: {next(iter(failed.values()))}")
        atomic_write_json(out / "train.json", _summarise(search, finished, failed, elapsed))
        lost = "".join(f"\n  failed: {name}: {reason}" for name, reason in failed.items())
        return f"{len(finished)} of {len(runs)} models trained{lost}"

    inputs = {
        "main": to_dict(config.train.main),
        "shards": search.inventory.digest,
        "targets": [config.fit.target, config.fit.target_test],
        "runs": [[run.mixture, run.seed, run.weights] for run in runs],
    }
    return Stage("train", inputs, (out / "train.json", *(run.folder / "result.json" for run in runs)), make)


def plan_runs(search: Search) -> list[MainRun]:
    """Every mixture with every seed, seed by seed, so that an early stop leaves a fair comparison."""
    weights = mixture_weights(search)
    seeds = range(search.config.seed, search.config.seed + search.config.train.seeds)
    names = search.config.train.mixtures
    folder = search.out / "train"
    return [MainRun(name, seed, weights[name], folder / f"{name}-s{seed}") for seed in seeds for name in names]


def mixture_weights(search: Search) -> dict[str, dict[str, float]]:
    """The optimum and its controls, by name. best_single is the one domain that the surrogate predicts best alone.

    A single domain obeys no cap: it is the control that repeats its text as often as it must.
    """
    if search.config.method == "doremi":
        from regmix_search.doremi import main_mixtures

        return main_mixtures(search)
    import numpy as np

    from regmix_search.fits import fit_chosen
    from regmix_search.reuse import search_runs
    from regmix_search.space import Space, controls

    out, target = search.out, search.config.fit.target
    digest(out / "optimum.json", "optimize")
    space, optimum = Space.from_json(read_json(out / "space.json")), read_json(out / "optimum.json")
    runs = with_epochs(search, search_runs(out))
    alone = fit_chosen(runs, read_json(out / "fit.json"), target).predict(np.eye(len(space.domains)))
    best = f"single({space.domains[int(np.argmin(alone))]})"
    made = {name: space.named(row) for name, row in controls(space).items()}
    return {"optimal": optimum["weights"], "best_single": made[best], **made}


def run_all(search: Search, runs: Sequence[MainRun], total: int, label: str = "models") -> dict[str, str]:
    """Trains the runs, several at a time, and waits; name -> reason of those that failed. Stops them on the way out."""
    failed: dict[str, str] = {}
    waiting, running = list(runs), dict[subprocess.Popen[bytes], MainRun]()
    threads = max((main_threads(search, run.config) for run in runs), default=1)
    workers = search.workers(search.config.train.workers, threads)
    start = total - len(runs)
    ended = tokens = 0
    with Progress(label, search.stream) as progress, _stopping(running):
        while waiting or running:  # every round: fill the workers, show, collect
            while waiting and len(running) < workers:
                run = waiting.pop(0)
                running[_launch(search, run)] = run
            counts = Counts(start + ended - len(failed), len(running), len(failed), len(waiting))
            progress.update(counts, tokens)
            time.sleep(0.1)
            for process in [p for p in running if p.poll() is not None]:
                run = running.pop(process)
                ended += 1
                if process.returncode == 0 and run.done:
                    tokens += read_json(run.folder / "result.json")["tokens"]
                else:
                    failed[run.folder.name] = f"exit code {process.returncode}, {_last_line(run.beside('.log'))}"
                    progress.say(f"model {run.folder.name} failed: {failed[run.folder.name]}")
    return failed


def main_config(search: Search, run: MainRun) -> Config:
    """The config of one run: train.main, or its own, with its seed, folder and threads filled in."""
    main, folder = run.config or search.config.train.main, str(run.folder.resolve())
    threads = main_threads(search, run.config)
    return dataclasses.replace(main, name=run.folder.name, out_dir=folder, seed=run.seed, threads=threads)


def main_threads(search: Search, main: Config | None = None) -> int:
    """CPU threads of one of these runs, train.main's where it has no config of its own."""
    return (main or search.config.train.main).threads or search.config.proxies.threads or 1


def prepare(search: Search, run: MainRun) -> None:
    """Writes what the run is launched with; a folder of a run on other settings or data is moved aside, not deleted."""
    from megatron_lite.data.mixture import Mixture
    from megatron_lite.resume import identity

    run.folder.parent.mkdir(parents=True, exist_ok=True)
    config, inventory = main_config(search, run), search.inventory
    inputs = {"config": identity(to_dict(config)), "weights": run.weights, "shards": inventory.digest}
    inputs |= {"after": run.after} if run.after else {}
    if read_record(run.beside(".inputs.json")) != inputs:
        if run.folder.exists():
            old = next(p for n in count(1) if not (p := run.beside(f".old-{n}")).exists())
            run.folder.rename(old)
            search.say(f"{run.folder.name}: other settings, mixture or shards than before; the old run is in {old}")
        atomic_write_json(run.beside(".inputs.json"), inputs)
    facts = {"mixture": run.mixture, "search": search.config.name, "shards": inventory.digest}
    mixture = Mixture.from_weights(run.weights, search.shards_dir, list(inventory.valid), facts)
    mixture.save(run.beside(".mixture.yaml"))
    atomic_write(run.beside(".config.yaml"), dump(config))


def _launch(search: Search, run: MainRun) -> subprocess.Popen[bytes]:
    threads = str(main_threads(search, run.config))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [sys.executable, str(LAUNCHER), "--config", str(run.beside(".config.yaml"))]
    command += ["--mixture", str(run.beside(".mixture.yaml"))]
    with open(run.beside(".log"), "wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the search alone, which then lets its runs save
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """In the child, on Linux: SIGKILL when the search dies, so that its successor does not meet a run in progress."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def _stopping(running: dict[subprocess.Popen[bytes], MainRun]) -> Iterator[None]:
    """On the way out, whatever the reason: SIGTERM (a run saves if it is told to), then SIGKILL."""
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        deadline = time.monotonic() + GRACE
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _summarise(
    search: Search, runs: Sequence[MainRun], failed: dict[str, str], elapsed: float | None
) -> dict[str, Any]:
    """The content of train.json. Losses in nats per token, curves as [tokens, loss]."""
    config = search.config
    plan = read_json(runs[0].folder / "plan.json")
    test = config.fit.target_test if config.fit.target_test in search.inventory.valid else None
    return {
        "target": config.fit.target,
        "target_test": test,
        "model": {"name": config.train.main.model.preset, **{k: plan[k] for k in ("params", "non_embedding_params")}},
        "flops_per_token": plan["flops_per_token"],
        "budget_tokens": plan["total_tokens"],
        "elapsed": elapsed,
        "runs": [_describe(search, run, plan) for run in runs],
        "failed": failed,
    }


def _describe(search: Search, run: MainRun, plan: dict[str, Any]) -> dict[str, Any]:
    result, key = read_json(run.folder / "result.json"), f"valid/{search.config.fit.target}/loss"
    curve = [
        [row["step"] * plan["tokens_per_step"], row["train/loss"]] for row in read_jsonl(run.folder / "metrics.jsonl")
    ]
    scored = [[row["tokens"], row[key]] for row in read_jsonl(run.folder / "evals.jsonl") if key in row]
    return {
        "mixture": run.mixture,
        "seed": run.seed,
        "weights": run.weights,
        **{name: result[name] for name in ("losses", "bpb", "tokens", "seconds")},
        "flops": float(plan["total_flops"]),
        "curve": curve,
        "valid_curve": scored,
        "run_dir": os.path.relpath(run.folder, search.out),
    }


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'it printed nothing'} ({path})"
