"""How far the trials are: a live table on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from megatron_lite.plan import duration
from regmix_search.ledger import Counts

if TYPE_CHECKING:
    from rich.table import Table

PLAIN_INTERVAL = 10.0  # seconds between lines when nobody watches
LIVE_INTERVAL = 0.5  # seconds between redraws on a terminal
BAR = 40  # characters


class Progress:
    """``with Progress("proxies") as p: p.update(counts, tokens)``; ``say`` prints a line that stays.

    ``rows`` are further lines of the table by name; ``best`` is in the plain line too.
    """

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self.label, self.one = label, "proxy" if label == "proxies" else label.removesuffix("s")
        self.stream = stream or sys.stdout
        self.live: Any = None
        self.rows: dict[str, str] = {}
        self.started = self.shown = time.monotonic()
        self.at_start: Counts | None = None

    def __enter__(self) -> Progress:
        if self.stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self.stream, highlight=False)
            self.live = Live("", console=console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """Prints a line above the live table."""
        if self.live is not None:
            self.live.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def update(self, counts: Counts, tokens: int) -> None:
        """Shows the state if it is time to; ``tokens``: trained since the start of this process."""
        now = time.monotonic()
        if self.at_start is None:
            self.at_start = counts
        if now - self.shown < (LIVE_INTERVAL if self.live is not None else PLAIN_INTERVAL):
            return
        self.shown = now
        if self.live is not None:
            self.live.update(self.table(counts, tokens, now - self.started), refresh=True)
        else:
            self.say(self.line(counts, tokens, now - self.started))

    def line(self, counts: Counts, tokens: int, seconds: float) -> str:
        """The state in words: done / running / failed, tokens/s, time to go, the best so far."""
        pace = self._pace(counts, tokens, seconds)
        best = [f"best {self.rows['best']}"] if "best" in self.rows else []
        return f"{self.label}: {', '.join([describe_counts(counts), *pace, *best])}"

    def table(self, counts: Counts, tokens: int, seconds: float) -> Table:
        """The state as a table of a few rows, the first with a bar."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        table.add_row(self.label, ProgressBar(max(1, counts.total), counts.finished + counts.failed, BAR))
        table.add_row("", describe_counts(counts))
        rows = {"pace": ", ".join(self._pace(counts, tokens, seconds)) or "not known yet", **self.rows}
        for name, text in rows.items():
            table.add_row(name, Text(text))
        return table

    def _pace(self, counts: Counts, tokens: int, seconds: float) -> list[str]:
        """Tokens/s, time to go and the hour of the end; nothing before the first trial has ended."""
        start = self.at_start or counts
        ended = counts.finished + counts.failed - start.finished - start.failed
        if not ended or seconds <= 0:
            return []
        left = seconds / ended * (counts.running + counts.waiting)
        return [f"{tokens / seconds:,.0f} tokens/s", describe_left(left)]


def describe_counts(counts: Counts) -> str:
    """done / running / failed in words."""
    return f"{counts.finished} of {counts.total} done, {counts.running} running, {counts.failed} failed"


def describe_left(seconds: float) -> str:
    """Time to go, and when that is, with the day where it may be another."""
    form = "%H:%M" if seconds < 12 * 3600 else "%a %H:%M"
    return f"{duration(seconds)} to go (about {time.strftime(form, time.localtime(time.time() + seconds))})"
