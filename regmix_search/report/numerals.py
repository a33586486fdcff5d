"""How the report writes numbers, durations, intervals and foreign text."""

import math
import re
from collections.abc import Sequence
from typing import Any

DASH = "\u2013"


def fixed(value: float | None, places: int) -> str:
    """A number with that many decimals; a dash for None and NaN."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{places}f}"


def signed(value: float) -> str:
    """A difference of losses: three decimals and always a sign; a dash for NaN."""
    return f"{value:+.3f}" if math.isfinite(value) else DASH


def percent(weight: float | None) -> str:
    """0.104 -> 10.4%; a plain 0 for exactly zero, which means never drawn."""
    return DASH if weight is None else f"{100 * weight:.1f}%" if weight else "0"


def span(interval: Sequence[float] | None) -> str:
    """An interval of differences: +0.180 to +0.260."""
    return f"{interval[0]:+.3f} to {interval[1]:+.3f}" if interval else DASH


def ratio(spread: float, noise: float) -> str:
    """Spread over noise; a dash when either is unknown."""
    return f"{spread / noise:.1f}" if noise > 0 and math.isfinite(spread) else DASH


def count(value: float) -> str:
    """1234567 -> 1.23M; a dash for NaN."""
    if not math.isfinite(value):
        return DASH
    for limit, unit, unit_letter in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= limit:
            return f"{value / unit:.{2 if value < 10 * unit else 1}f}{unit_letter}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """3725 -> 1 h 02 min; a dash for NaN."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def minus(text: Any) -> str:
    """Hyphens that stand as signs in front of digits become true minus signs."""
    return re.sub(r"(?<!\w)-(?=[\d.])", "\u2212", str(text))


def markdown_cell(text: Any) -> str:
    """Text that cannot break out of a Markdown table or turn into markup."""
    clean = " ".join(str(text).split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in clean)
