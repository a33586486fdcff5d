"""When a stage has nothing to do: the same inputs as last time, and its files still there."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.files import atomic_write_json


@dataclass(frozen=True)
class Stage:
    """One step of a search: what its files are a function of, which files, and how they are made."""

    name: str
    inputs: dict[str, Any]  # JSON; settings and digests of what was read
    outputs: tuple[Path, ...]
    make: Callable[[], str]  # does the work; returns what came out, in one line


@dataclass(frozen=True)
class Outcome:
    """What bringing a stage up to date took."""

    stage: str
    ran: bool  # False: it was up to date
    seconds: float
    summary: str


def bring_up_to_date(stage: Stage, records: Path) -> Outcome:
    """Runs a stage unless ``records``/<name>.json says that these inputs already gave the files that are there."""
    start = time.perf_counter()
    path = records / f"{stage.name}.json"
    inputs = json.loads(json.dumps(stage.inputs))
    old = read_record(path)
    if old.get("inputs") == inputs and old.get("outputs") == _sizes(stage.outputs, records):
        return Outcome(stage.name, False, time.perf_counter() - start, "up to date")
    path.unlink(missing_ok=True)  # from here on, until the stage is through, its files are in doubt
    summary = stage.make()
    seconds = time.perf_counter() - start
    records.mkdir(parents=True, exist_ok=True)
    missing = [output for output in stage.outputs if not output.exists()]
    if not missing:  # otherwise the next run makes the rest
        record = {"inputs": inputs, "outputs": _sizes(stage.outputs, records), "seconds": seconds, "time": time.time()}
        atomic_write_json(path, {**record, "summary": summary})
    return Outcome(stage.name, True, seconds, summary)


def digest(path: Path, made_by: str) -> str:
    """sha256 of a small file, 16 hex digits; ValueError naming the stage that makes it when it is not there."""
    if not path.is_file():
        raise ValueError(f"{path}: not there yet; run `--stage {made_by}` first (or `--stage all`)")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def digest_of(value: Any) -> str:
    """16 hex digits of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def listing(files: Iterable[Path]) -> list[list[Any]]:
    """Names, sizes and times of large files: enough to see that somebody changed them."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. ValueError names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); make it again with its stage") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object; make it again with its stage")
    return value


def _sizes(files: Iterable[Path], records: Path) -> dict[str, int]:
    """Sizes by name relative to the search's folder, which may be moved; -1: not there."""
    return {os.path.relpath(f, records.parent): f.stat().st_size if f.is_file() else -1 for f in files}


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object that says how something was made; {} when there is none or it is damaged: then it is made again."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
