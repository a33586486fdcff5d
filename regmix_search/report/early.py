"""What was decided while proxies ran, for the report: fits on the first runs, when to stop, runs that ended early."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from regmix_search.early import EarlyFit
from regmix_search.report.evidence import Evidence
from regmix_search.report.exhibits import Cell, Table
from regmix_search.report.numerals import DASH, fixed, percent

SHOWN = 3  # domains of an early optimum that its row names
HEAD = ("runs", "surrogate", "predicted", "90% interval", "moved", "by refits", "left to gain", "noise", "settled")


@dataclass(frozen=True)
class Early:
    """One row for each fit, oldest first, and what came of them. Empty without early.json and early ends."""

    fits: Table = field(default_factory=lambda: Table((), []))
    sentences: tuple[str, ...] = ()


def describe_early(evidence: Evidence) -> Early:
    """The section on results before the end."""
    try:
        fits = [EarlyFit(**fit) for fit in evidence.early.get("fits") or []]
    except TypeError as error:
        return Early(sentences=(f"early.json is of another version ({error}): early fits are not shown.",))
    ended = sum(trial.stopped_at is not None for trial in evidence.trials)
    words = "1 proxy was" if ended == 1 else f"{ended} proxies were"
    told = [f"{words} ended early (proxies.stop_hopeless): losses at the end are estimates there."] if ended else []
    return Early(Table((*HEAD, "largest weights"), [_row(fit) for fit in fits]), (*_decision(evidence, fits), *told))


def _decision(evidence: Evidence, fits: Sequence[EarlyFit]) -> list[str]:
    """Whether --until-precise stopped the search; nothing where it was off."""
    waiting = sum(trial.status in ("planned", "unfinished") for trial in evidence.trials)
    if waiting and (why := evidence.early.get("stopped")):
        return [
            f"No further proxies were started (proxies.until_precise): {why}. {waiting} of the planned ones were saved."
        ]
    if not (evidence.config.get("proxies") or {}).get("until_precise"):
        return []
    settled = sum(fit.settled for fit in fits)
    return [f"proxies.until_precise has not stopped the search: of {len(fits)} early fits {settled} were settled."]


def _row(fit: EarlyFit) -> list[Cell]:
    low, high = fit.interval90
    largest = sorted(fit.weights.items(), key=lambda item: -item[1])[:SHOWN]
    texts = [str(fit.runs), fit.surrogate, fixed(fit.predicted, 4), f"{low:.4f} to {high:.4f}", fixed(fit.moved, 2)]
    texts += [fixed(fit.reach, 2), fixed(fit.left_to_gain, 4), fixed(fit.noise, 4), "yes" if fit.settled else "no"]
    shown = ", ".join(f"{name} {percent(weight)}" for name, weight in largest)
    return [*map(Cell, texts), Cell(shown or DASH, "wrap")]
