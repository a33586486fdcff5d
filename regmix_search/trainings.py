"""How far the runs are that are no trials: DoReMi's references and proxies, and the models; read without a lock."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lite.files import read_jsonl
from regmix_search.config import SearchConfig
from regmix_search.drivers import LEASE
from regmix_search.freshness import read_record
from regmix_search.progress import describe_left


def read_rounds(out: Path, config: SearchConfig) -> list[dict[str, Any]]:
    """Reference and proxy of each round that has begun: step, pace, and of a proxy its averaged weights so far."""
    found = []
    for number in range(1, config.doremi.rounds + 1) if config.method == "doremi" else ():
        before = read_record(out / "doremi" / f"round-{number}-reference.inputs.json").get("weights")
        for who in ("reference", "proxy"):
            folder = out / "doremi" / f"round-{number}-{who}"
            if folder.is_dir():
                run = {"round": number, "of": config.doremi.rounds, **_run(folder)}
                average = _starting("average/", run.pop("last")) if who == "proxy" else None
                found.append({**run, "weights": average, "change": _change(before, average)})
    return found


def read_models(out: Path, config: SearchConfig) -> list[dict[str, Any]]:
    """Every model of stage train, once one of them has begun."""
    seeds = range(config.seed, config.seed + config.train.seeds) if config.train.enabled else ()
    folders = [out / "train" / f"{name}-s{seed}" for seed in seeds for name in config.train.mixtures]
    runs = [_run(folder) for folder in folders if any(one.is_dir() for one in folders)]
    return [{key: value for key, value in run.items() if key != "last"} for run in runs]


def describe_rounds(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """What read_rounds found, in lines; the weights of the newest proxy alone."""
    names = [run["run"].removeprefix(f"round-{run['round']}-") for run in rounds]
    lines = [
        f"round {run['round']} of at most {run['of']}: {_describe({**run, 'run': name})}"
        for name, run in zip(names, rounds, strict=True)
    ]
    proxies = [run for run in rounds if run["weights"]]
    if proxies:
        largest = sorted(proxies[-1]["weights"].items(), key=lambda item: -item[1])
        state = "weights" if proxies[-1]["state"] == "done" else "weights so far"
        lines.append(f"{state}: {', '.join(f'{name} {weight:.1%}' for name, weight in largest)}")
    return lines or ["round 1: not begun"]


def describe_models(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many of the models are trained, and how far those are that have begun."""
    done = sum(model["state"] == "done" for model in models)
    lines = [f"models: {done} of {len(models)} done"] if models else []
    return lines + [f"  {_describe(model)}" for model in models if model["state"] in ("running", "stopped")]


def _run(folder: Path) -> dict[str, Any]:
    """One run by its folder; ``last``: its newest line of metrics."""
    plan, rows = read_record(folder / "plan.json"), read_jsonl(folder / "metrics.jsonl")
    last: dict[str, Any] = rows[-1] if rows else {}
    ended = "running" if _at_work(folder) else "stopped"
    state = "done" if (folder / "result.json").is_file() else ended if folder.is_dir() else "waiting"
    step, steps, pace = last.get("step", 0), plan.get("total_steps"), last.get("perf/tokens_per_s")
    known = state == "running" and pace and steps is not None
    left = (steps - step) * plan["tokens_per_step"] / pace if known else None
    facts = {"step": step, "steps": steps, "loss": last.get("train/loss"), "tokens_per_s": pace}
    return {"run": folder.name, "state": state, **facts, "seconds_left": left, "last": last}


def _at_work(folder: Path) -> bool:
    """Whether the process that locked the folder lives; on another machine: whether it wrote something lately."""
    with contextlib.suppress(ValueError, OSError):
        pid, host = (folder / ".lock").read_text(encoding="utf-8").removeprefix("pid ").split(" on ")
        if host == os.uname().nodename:
            return _lives(int(pid))
    times = [path.stat().st_mtime for path in (folder, folder / "metrics.jsonl") if path.exists()]
    return time.time() - max(times, default=0.0) < LEASE


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _change(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> float | None:
    """The largest change of a domain's weight between the reference's mixture and what the proxy has come to."""
    return max(abs(after[name] - before[name]) for name in before) if before and after else None


def _starting(prefix: str, row: Mapping[str, float]) -> dict[str, float] | None:
    found = {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
    return found or None


def _describe(run: Mapping[str, Any]) -> str:
    of = f" of {run['steps']:,}" if run["steps"] is not None else ""
    words = [f"{run['run']} {run['state']}", f"step {run['step']:,}{of}"]
    words += [f"loss {run['loss']:.4f}"] if run["loss"] is not None else []
    words += [f"{run['tokens_per_s']:,.0f} tokens/s"] if run["tokens_per_s"] else []
    words += [describe_left(run["seconds_left"])] if run["seconds_left"] is not None else []
    words += [f"largest change {run['change']:.4f}"] if run.get("change") is not None and run["state"] == "done" else []
    return ", ".join(words)
