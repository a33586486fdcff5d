"""What a search cost: tokens, compute and elapsed time per stage, from the ledger and the retrained runs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from regmix_search.report.evidence import Evidence, finite

KINDS = {"train": "proxies to fit on", "holdout": "proxies held back", "repeat": "repeats of the prior"}


@dataclass(frozen=True)
class Cost:
    """One stage. `seconds`: summed over workers. `elapsed`: time in which at least one worker ran (NaN: unknown)."""

    name: str
    runs: int
    tokens: float
    seconds: float
    elapsed: float
    flops: float
    total: bool = False


def list_costs(evidence: Evidence) -> list[Cost]:
    """Rows for each kind of proxy, all proxies, and the retrained models; failed attempts count where they happened."""
    rows = []
    tried = [t for t in evidence.trials if t.spans]
    for kind, name in KINDS.items():
        if mine := [t for t in tried if t.kind == kind]:
            sums = (sum(t.tokens for t in mine), sum(t.seconds for t in mine))
            rows.append(
                Cost(name, len(mine), *sums, covered(s for t in mine for s in t.spans), sum(t.flops for t in mine))
            )
    if len(rows) > 1:
        elapsed = covered(span for trial in tried for span in trial.spans)
        sums = (sum(r.tokens for r in rows), sum(r.seconds for r in rows))
        rows.append(Cost("all proxies", len(tried), *sums, elapsed, sum(r.flops for r in rows), True))
    if runs := evidence.runs:
        tokens = sum(r.tokens for r in runs if math.isfinite(r.tokens))
        seconds = sum(r.seconds for r in runs if math.isfinite(r.seconds))
        flops = sum(_run_flops(evidence, r.flops, r.tokens) for r in runs)
        rows.append(
            Cost("retrained models", len(runs), tokens, seconds, finite(evidence.train.get("elapsed")), flops, True)
        )
    return rows


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of time spans: pauses between two sittings of a search do not count."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _run_flops(evidence: Evidence, known: float | None, tokens: float) -> float:
    """The run's own count, else 6 x parameters x tokens (Kaplan et al., 2020; attention left out); 0 if unknown."""
    params = finite((evidence.train.get("model") or {}).get("params"))
    estimate = 6 * params * tokens
    return known if known is not None else (estimate if math.isfinite(estimate) else 0.0)
