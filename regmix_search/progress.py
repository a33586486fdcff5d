"""One line that says how far the trials are: redrawn in place on a terminal, every few seconds in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from megatron_lite.plan import duration
from regmix_search.ledger import Counts

PLAIN_INTERVAL = 10.0  # seconds between lines when nobody watches
LIVE_INTERVAL = 0.5  # seconds between redraws on a terminal


class Progress:
    """``with Progress("proxies") as p: p.update(counts, tokens)``; ``say`` prints a line that stays."""

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self.label = label
        self.stream = stream or sys.stdout
        self.live: Any = None
        self.started = self.shown = time.monotonic()
        self.at_start: Counts | None = None

    def __enter__(self) -> Progress:
        if self.stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self.stream, highlight=False, soft_wrap=True)
            self.live = Live("", console=console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """Prints a line above the live one."""
        if self.live is not None:
            self.live.console.print(text, markup=False)
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
        text = self.line(counts, tokens, now - self.started)
        if self.live is not None:
            self.live.update(text, refresh=True)
        else:
            self.say(text)

    def line(self, counts: Counts, tokens: int, seconds: float) -> str:
        """The state in words: done / running / failed, tokens/s, time to go."""
        start = self.at_start or counts
        ended = counts.finished + counts.failed - start.finished - start.failed
        text = (
            f"{self.label}: {counts.finished} of {counts.total} done, {counts.running} running, {counts.failed} failed"
        )
        if ended and seconds > 0:
            left = counts.running + counts.waiting
            text += f", {tokens / seconds:,.0f} tokens/s, {duration(seconds / ended * left)} to go"
        return text
