"""An append-only file of lines that several processes, also on several machines, write and read.

An append holds a lock on the file's side and starts from what is there now. Where locks work across machines (NFS with
its lock daemon, Lustre -o flock, GPFS) that alone keeps lines whole. Where they do not, O_APPEND places whole lines one
after another, and the reader's rule that the first line counts does the rest. One of the two is enough.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_lite.files import sync


class Journal:
    """``with journal.locked(): ... journal.read(whole=True); journal.append(line)``, and ``read()`` at any time."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.offset = self.newlines = 0  # what read() has given so far
        self.ends_torn = False  # the last byte read is not a newline

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other writers out; the kernel lets them in again when this process dies, however it dies."""
        with open(self.path.with_name(f".{self.path.name}.lock"), "a", encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # no locks on this file system: see above
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def read(self, whole: bool = False) -> list[tuple[int, bytes]]:
        """(number from 1, line) of what was appended since the last call, blank lines left out.

        ``whole``: a last line without its newline too, for whoever holds the lock: nobody is about to end it.
        """
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read()
        data = data if whole else data[: data.rfind(b"\n") + 1]
        if not data:
            return []
        lines = [(number, line) for number, line in enumerate(data.split(b"\n"), self.newlines + 1) if line.strip()]
        self.offset += len(data)
        self.newlines += data.count(b"\n")
        self.ends_torn = not data.endswith(b"\n")
        return lines

    def append(self, line: bytes) -> None:
        """Writes one line; it is on the disk when this returns. Only after ``read(whole=True)`` under the lock."""
        data = b"\n" * self.ends_torn + line + b"\n"
        created = not self.path.exists()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
        if written != len(data):
            raise OSError(f"{self.path}: only {written} of {len(data)} bytes were written; is the disk full?")
        if created:
            sync(self.path.parent)
