"""What is current after every proxy: losses.csv, TensorBoard, the best so far, the early fit and whether to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_lite.files import atomic_write_json
from regmix_search import board
from regmix_search.changes import join_earlier
from regmix_search.curves import build_rule
from regmix_search.early import EarlyFit, EarlyFits, distinct
from regmix_search.freshness import read_json
from regmix_search.goals import parse_goal
from regmix_search.ledger import Ledger
from regmix_search.progress import Progress
from regmix_search.reuse import earlier_runs, read_reduction
from regmix_search.search import Search
from regmix_search.space import Space
from regmix_search.tables import read_ledger, write_losses


class Results:
    """``with Results(search, ledger, valid, progress) as results: results.update()`` after each outcome."""

    def __init__(self, search: Search, ledger: Ledger, valid: Sequence[str], progress: Progress) -> None:
        """valid: the losses that every trial measures."""
        self.out, self.ledger, self.valid, self.progress = search.out, ledger, valid, progress
        self.goal = parse_goal(search.config.fit.target, valid)
        self.target, self.stops = search.config.fit.target, search.config.proxies.stop_hopeless
        self.leads = not ledger.driver.joined  # one that joined only looks whether the leader says stop
        space = Space.from_json(read_json(self.out / "space.json"))
        kept, self.earlier = read_reduction(self.out, space.domains), earlier_runs(self.out)
        self.early = EarlyFits(self.out / "early.json", space, search.config, ledger.config_hash, kept)
        self.shown: set[int] = set()  # trials that TensorBoard has
        self.mirrors = True

    def __enter__(self) -> Results:
        if self.leads:
            self.early.lead()
        self.update()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.early.close()
        if self.leads and self.ledger.finished:  # an outcome that nobody looked at any more
            self._write()

    def update(self) -> None:
        """Brings everything up to what the ledger has."""
        if self.ledger.finished:
            self._show_best()
            if self.leads:
                self._write()
                self._fit()
                if self.stops:
                    rule = build_rule(self.ledger.finished.values(), self.goal, self.valid)
                    atomic_write_json(self.out / "stopping.json", rule)
        if not self.leads:
            self.early.reload()
        self.ledger.stopped = self.early.stopped is not None

    def _write(self) -> None:
        done = dict(sorted(self.ledger.finished.items()))
        losses = {name: [event["losses"][name] for event in done.values()] for name in self.valid}
        write_losses(self.out / "losses.csv", list(done), losses)
        for index in sorted(done.keys() - self.shown):
            self.shown.add(index)
            self._mirror(board.write_trial, done[index])

    def _mirror(self, write: Callable[[Path, Any], None], what: Any) -> None:
        """TensorBoard only mirrors: a full disk there is no reason to stop."""
        if self.mirrors:
            try:
                write(self.out, what)
            except (OSError, ImportError) as error:
                self.mirrors = False
                self.progress.say(f"TensorBoard is left out from here on: {error}")

    def _show_best(self) -> None:
        events = list(self.ledger.finished.values())
        losses = self.goal.of({name: [event["losses"][name] for event in events] for name in self.goal.shares})
        best = int(losses.argmin())
        self.progress.rows["best"] = f"{self.target} {losses[best]:.4f} in t{events[best]['trial']:04d}"

    def _fit(self) -> None:
        """Collects an early fit, starts the next when it is due."""
        found = self.early.collect()
        if isinstance(found, EarlyFit):
            self._mirror(board.write_fit, found)
        if found is not None:
            text = found if isinstance(found, str) else found.line()
            self.progress.say(f"early fit: {text}")
            self.progress.rows["early fit"] = text
        if self.early.stopped is not None and not self.ledger.stopped:
            self.progress.say(f"no further proxies: {self.early.stopped}")
        fitted = [e for e in self.ledger.finished.values() if e["kind"] != "holdout"]
        mixtures = len({tuple(event["weights"].values()) for event in fitted})
        mixtures += distinct(self.earlier) if self.earlier else 0
        if self.early.stopped is None and self.ledger.counts.waiting and self.early.due(mixtures):
            runs = read_ledger(self.ledger.path)[0]
            self.early.start(join_earlier(runs, self.earlier) if self.earlier else runs)
