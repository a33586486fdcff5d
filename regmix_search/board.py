"""TensorBoard over all trials: weights as hyperparameters beside losses and curves, and the search's own progress."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_lite.files import atomic_write, read_jsonl
from regmix_search.early import EarlyFit

EVENTS = "events.out.tfevents.{:010}.search"  # TensorBoard reads a folder's files with `tfevents` in order of name


def write_trial(out: Path, event: Mapping[str, Any]) -> None:
    """One finished trial, from its line in the ledger and the curves in its run folder: tensorboard/t0007."""
    path = out / "tensorboard" / f"t{event['trial']:04d}" / EVENTS.format(0)
    if path.exists():
        return
    hparams = {"kind": event["kind"], "seed": event["seed"], **{f"weight/{d}": w for d, w in event["weights"].items()}}
    scalars = [(event["time"], 0, f"trial/{name}", loss) for name, loss in event["losses"].items()]
    for name in ("metrics.jsonl", "evals.jsonl") if event.get("run_dir") else ():
        scalars += [(event["time"], *point) for point in _points(out / event["run_dir"] / name)]
    _write(path, scalars, {"hparams": hparams, "start": event["time"] - event.get("seconds", 0.0)})


def write_fit(out: Path, fit: EarlyFit) -> None:
    """One early fit, by the number of runs: tensorboard/search."""
    values = {"predicted": fit.predicted, "low90": fit.interval90[0], "high90": fit.interval90[1], "prior": fit.prior}
    values |= {"left_to_gain": fit.left_to_gain, "reach": fit.reach}
    values |= {} if fit.moved is None else {"moved": fit.moved}
    named = {f"search/{name}": value for name, value in values.items()}
    named |= {f"optimum/{name}": weight for name, weight in fit.weights.items()}
    scalars = [(fit.time, fit.runs, name, value) for name, value in named.items()]
    _write(out / "tensorboard" / "search" / EVENTS.format(fit.runs), scalars, None)


def _points(path: Path) -> Iterator[tuple[int, str, float]]:
    """(step, name, value) of a run's .jsonl; nothing where the run's folder is gone, or its last line is torn."""
    for row in read_jsonl(path):
        yield from ((row["step"], name, value) for name, value in row.items() if "/" in name)


def _write(path: Path, scalars: list[tuple[float, int, str, float]], session: Mapping[str, Any] | None) -> None:
    """A whole event file at once, without torch or TensorFlow: (seconds, step, name, value) and hyperparameters."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    events = [Event(file_version="brain.Event:2")]
    if session is not None:
        summary = hparams_pb(session["hparams"], path.parent.name, session["start"])
        events.append(Event(wall_time=session["start"], summary=summary))
    for seconds, step, name, value in scalars:
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        events.append(Event(wall_time=seconds, step=step, summary=summary))
    records = RecordWriter(buffer)
    for event in events:
        records.write(event.SerializeToString())
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getvalue())
