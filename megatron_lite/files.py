"""Writes that survive a crash, and a lock that says whose folder it is."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Replaces a file whole or not at all: temp in the same folder, fsync, rename."""
    path = Path(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    with open(temp, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temp, path)
    sync(path.parent)


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Writes JSON atomically, indented, with a final newline. NaN is refused: it is not JSON."""
    atomic_write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sync(path: str | Path) -> None:
    """fsyncs a file, or a folder so that a rename inside it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Holds a folder for this process; the kernel drops the lock when the process dies, however it dies.

    Raises ValueError naming the holder when another process has it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(
                f"{folder}: output folder in use by {holder}; wait for it or name another folder"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a .jsonl file; a torn last line (a crash in the middle of a write) is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
