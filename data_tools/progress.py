"""How far a shard is: a bar on a terminal, a line every so many documents elsewhere."""

import sys
import time
from typing import Any


class Progress:
    """Shows documents, tokens and speed on stderr. `total` is in bytes of input, None where nobody can know."""

    def __init__(self, name: str, total: int | None, log_interval: int) -> None:
        self._name, self._total, self._interval, self._next = name, total, log_interval, log_interval
        self._start = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if self._interval and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = ("{task.description}", BarColumn(), TextColumn("{task.fields[counts]}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._bar.add_task(self._name, total=self._total, counts="")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, num_documents: int, num_tokens: int, text_bytes: int, input_bytes: int) -> None:
        """Totals so far: what was written, bytes of text read, bytes of input done."""
        if not self._interval:
            return
        rate = text_bytes / 1e6 / max(time.monotonic() - self._start, 1e-9)
        counts = f"{num_documents:,} documents, {num_tokens:,} tokens, {rate:.1f} MB/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=input_bytes, counts=counts)
        elif num_documents >= self._next:
            print(f"{self._name}: {counts}", file=sys.stderr, flush=True)
            self._next = (num_documents // self._interval + 1) * self._interval
