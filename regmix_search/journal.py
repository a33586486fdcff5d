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
    """``with journal.locked(): ... journal.catch_up(); journal.append(line)``, and ``read()`` at any time."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.offset = self.newlines = 0  # what read() has given so far
        self.unended = False  # there is more, without a newline

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other writers out; the kernel lets them in again when this process dies, however it dies."""
        with open(self.path.with_name(f".{self.path.name}.lock"), "a", encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # no locks on this file system: see above
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def read(self, tail: bool = False) -> list[tuple[int, bytes]]:
        """(number from 1, line) of what was appended since the last call, blank lines left out.

        ``tail``: a last line without its end too, for whoever reads once; the next call gives it again.
        """
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            *lines, rest = file.read().split(b"\n")
        first = self.newlines + 1
        self.offset += sum(map(len, lines)) + len(lines)
        self.newlines += len(lines)
        self.unended = bool(rest)
        given = [*lines, rest] if tail else lines
        return [(number, line) for number, line in enumerate(given, first) if line.strip()]

    def catch_up(self) -> list[tuple[int, bytes]]:
        """``read()`` for whoever is about to append: a last line without its end gets one, so that no other joins it.

        A kill tore it. Or, where locks do nothing, another driver is writing it, and this newline comes after its own.
        """
        lines = self.read()
        while self.unended:
            self.append(b"")
            lines += self.read()
        return lines

    def append(self, line: bytes) -> None:
        """Writes one line; it is on the disk when this returns. Only after ``catch_up()`` under the lock."""
        data = line + b"\n"
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
