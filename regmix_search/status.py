"""How far a search is, read from its folder without a lock: from another terminal, or long after it has ended."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_lite.files import read_jsonl
from megatron_lite.plan import duration
from regmix_search.config import SearchConfig, load_search
from regmix_search.drivers import living
from regmix_search.early import read_fits
from regmix_search.freshness import read_record
from regmix_search.ledger import Counts, Replay, gave_up, replay
from regmix_search.progress import describe_counts, describe_left
from regmix_search.trainings import describe_models, describe_rounds, read_models, read_rounds

FAILURES = 5  # trials whose failures are written out
Event = dict[str, Any]


def read_status(out: Path) -> dict[str, Any]:
    """Counts, rate, expected finish, failures, the best so far, early and last fit; JSON values, seconds and nats.

    DoReMi has `rounds` and no trials; `models` are stage train's. `finish_at` is null unless a driver is at work.
    Raises ValueError where there is no search.
    """
    if not (out / "config.yaml").is_file() and not (out / "trials.jsonl").is_file():
        raise ValueError(f"{out}: no search here; name its folder with --out DIR")
    config = load_search(out / "config.yaml" if (out / "config.yaml").is_file() else None)
    events = read_jsonl(out / "trials.jsonl")
    state, alive = replay(out / "trials.jsonl"), living(out / "drivers")
    running = _running(out, events, state, alive)
    failures = _failures(state, config.proxies.retries)
    given_up = sum(failure["given_up"] for failure in failures)
    planned = max(_rows(out / "mixtures.csv"), len(state.finished) + len(running) + given_up)
    waiting = planned - len(state.finished) - len(running) - given_up
    counts = Counts(len(state.finished), len(running), given_up, waiting)
    fits, stopped = read_fits(out / "early.json")
    return {
        "name": config.name,
        "method": config.method,
        "out_dir": str(out),
        "trained": _folder(out),
        "stages": _stages(out / "stages"),
        "trials": {"planned": counts.total, **asdict(counts)},
        "ended_early": sum("stopped" in event for event in state.finished.values()),
        "running": running,
        **_pace(events, counts, alive),
        "failures": failures,
        "best": _best(config, state),
        "early": asdict(fits[-1]) if fits else None,
        "early_line": fits[-1].line() if fits else None,
        "stopped": stopped,
        "optimum": _optimum(out),
        "rounds": read_rounds(out, config),
        "models": read_models(out, config),
    }


def describe_status(status: Mapping[str, Any]) -> str:
    """What read_status found, in lines."""
    lines = [f"{status['name']} in {status['out_dir']}"]
    lines += [f"  {stage['stage']}: {stage['summary'].splitlines()[0]}" for stage in status["stages"]]
    lines += describe_rounds(status["rounds"]) if status["method"] == "doremi" else _proxy_lines(status)
    if (best := status["best"]) is not None:
        lines.append(f"best: {best['target']} {best['loss']:.4f} in t{best['trial']:04d}: {_mixture(best['weights'])}")
    if status["early"] is not None:
        lines.append(f"early fit: {status['early_line']}")
    if status["stopped"] is not None:
        lines.append(f"stopped: {status['stopped']}")
    if (optimum := status["optimum"]) is not None:
        low, high = optimum["interval90"]
        against = f"{optimum['predicted']:.4f} ({low:.4f} to {high:.4f}) against the prior's {optimum['prior']:.4f}"
        lines.append(f"last fit: {against}: {_mixture(optimum['weights'])}")
    return "\n".join([*lines, *describe_models(status["models"])])


def _proxy_lines(status: Mapping[str, Any]) -> list[str]:
    """Counts, pace, what runs and what failed."""
    trials = {key: value for key, value in status["trials"].items() if key != "planned"}
    early = f", {status['ended_early']} ended early" if status["ended_early"] else ""
    lines = [f"{status['trained']}: {describe_counts(Counts(**trials))}{early}"]
    if status["tokens_per_s"] is not None:
        left = status["seconds_left"]
        lines.append(f"  {status['tokens_per_s']:,.0f} tokens/s" + ("" if left is None else f", {describe_left(left)}"))
    if not status["running"] and trials["waiting"]:
        lines.append(f"  nobody is at work{' any more' if status['tokens_per_s'] is not None else ''}")
    for trial in status["running"]:
        step = f", step {trial['step']} of {trial['steps']}, loss {trial['loss']:.4f}" if trial["step"] else ""
        lines.append(f"  t{trial['trial']:04d} has run for {duration(trial['seconds'])}{step}")
    for failure in status["failures"][:FAILURES]:
        what = "given up" if failure["given_up"] else "to be tried again"
        lines.append(f"  t{failure['trial']:04d} failed {failure['tries']} x, {what}: {failure['reason']}")
    if len(status["failures"]) > FAILURES:
        lines.append(f"  and {len(status['failures']) - FAILURES} more failures in trials.jsonl")
    return lines


def _running(out: Path, events: Sequence[Event], state: Replay, alive: set[str]) -> list[dict[str, Any]]:
    """Trials that a living driver has claimed, with the last step that they logged."""
    began = {event["trial"]: event["time"] for event in events if event["event"] == "claim"}
    found = []
    for trial in sorted(trial for trial, driver in state.claims.items() if driver in alive):
        folder = out / _folder(out) / f"t{trial:04d}"
        last: Event = next(reversed(read_jsonl(folder / "metrics.jsonl")), {})
        step = {"step": last.get("step"), "loss": last.get("train/loss")}
        steps = read_record(folder / "plan.json").get("total_steps")
        found.append({"trial": trial, "seconds": time.time() - began[trial], **step, "steps": steps})
    return found


def _folder(out: Path) -> str:
    """Where the trials' runs are, which says what they are: a comparison's are no proxies."""
    return "models" if (out / "models").is_dir() else "proxies"


def _pace(events: Sequence[Event], counts: Counts, alive: set[str]) -> dict[str, float | None]:
    """tokens_per_s of the drivers that work, or of the one that wrote last; what is left at their pace."""
    unknown: dict[str, float | None] = {"tokens_per_s": None, "seconds_left": None, "finish_at": None}
    if not events:
        return unknown
    drivers = alive & {event.get("driver", "") for event in events} or {events[-1].get("driver", "")}
    mine = [event for event in events if event.get("driver", "") in drivers]
    end = time.time() if counts.running else mine[-1]["time"]
    seconds, ended = end - mine[0]["time"], [event for event in mine if event["event"] in ("finish", "fail")]
    if not ended or seconds <= 0:
        return unknown
    found = dict(unknown, tokens_per_s=sum(event.get("tokens", 0) for event in ended) / seconds)
    if counts.running:
        left = seconds / len(ended) * (counts.running + counts.waiting)
        found |= {"seconds_left": left, "finish_at": end + left}
    return found


def _failures(state: Replay, retries: int) -> list[dict[str, Any]]:
    """Trials that failed and have not finished since, the last reason of each."""
    found = []
    for trial, events in sorted(state.failures.items()):
        if trial not in state.finished:
            facts = {"tries": len(events), "given_up": gave_up(events, retries), "reason": events[-1]["reason"]}
            found.append({"trial": trial, **facts})
    return found


def _best(config: SearchConfig, state: Replay) -> dict[str, Any] | None:
    """The finished trial of the lowest goal; None where the goal's losses are not there."""
    from regmix_search.goals import parse_goal

    events = list(state.finished.values())
    try:
        goal = parse_goal(config.fit.target, events[0]["losses"] if events else {})
    except ValueError:
        return None
    losses = goal.of({name: [event["losses"][name] for event in events] for name in goal.shares})
    best = events[int(losses.argmin())]
    target = config.fit.target
    return {"target": target, "trial": best["trial"], "loss": float(losses.min()), "weights": best["weights"]}


def _optimum(out: Path) -> dict[str, Any] | None:
    found = read_record(out / "optimum.json")
    if not {"target", "weights", "interval90", "objective"} <= found.keys():
        return None
    kept = {key: found[key] for key in ("target", "weights", "interval90")}
    return {**kept, **found["objective"], "made_at": (out / "optimum.json").stat().st_mtime}


def _stages(records: Path) -> list[dict[str, Any]]:
    """Stages that are through, in the order in which they were."""
    found = [(read_record(path), path.stem) for path in records.glob("*.json")]
    rows = [{"stage": name, **{key: r.get(key) for key in ("time", "seconds", "summary")}} for r, name in found if r]
    return sorted(rows, key=lambda row: row["time"])


def _rows(path: Path) -> int:
    """Rows of a CSV file below its header."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return max(0, sum(bool(line.strip()) for line in lines) - 1)


def _mixture(weights: Mapping[str, float]) -> str:
    largest = sorted(weights.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {weight:.1%}" for name, weight in largest if weight >= 0.005)
