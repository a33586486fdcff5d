"""The few SVG primitives that the report's figures need.

Colours come from CSS classes (`f-` fill, `s-` stroke), so one figure serves light, dark and print. Every text is
escaped here. Drawn by hand rather than by matplotlib: a figure is then a few kB, sharp, and set in the page's own font.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH = 460
Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Maps [lo, hi] to [start, end] in pixels, through x ** power (power 0.5 opens up small weights)."""

    lo: float
    hi: float
    start: float
    end: float
    power: float = 1.0

    def __call__(self, value: float) -> float:
        if self.hi <= self.lo:
            return (self.start + self.end) / 2
        lo, hi, at = (self._bend(v) for v in (self.lo, self.hi, value))
        return self.start + (at - lo) / (hi - lo) * (self.end - self.start)

    def _bend(self, value: float) -> float:
        return value if self.power == 1.0 else max(value, 0.0) ** self.power


@dataclass
class Canvas:
    """One figure of WIDTH x height user units; `render` gives the <svg> element."""

    height: float
    label: str
    width: float = WIDTH
    parts: list[str] = field(default_factory=list)

    def add(self, tag: str, cls: str, title: str = "", **attributes: float | str) -> None:
        pairs = "".join(f' {name.replace("_", "-")}="{_show(value)}"' for name, value in attributes.items())
        body = f"><title>{escape(title)}</title></{tag}>" if title else "/>"
        self.parts.append(f'<{tag} class="{cls}"{pairs}{body}')

    def line(self, x1: float, y1: float, x2: float, y2: float, cls: str, title: str = "") -> None:
        self.add("line", cls, title, x1=x1, y1=y1, x2=x2, y2=y2)

    def rect(self, x: float, y: float, width: float, height: float, cls: str, title: str = "") -> None:
        self.add("rect", cls, title, x=x, y=y, width=max(width, 0.0), height=max(height, 0.0))

    def circle(self, x: float, y: float, r: float, cls: str, title: str = "") -> None:
        self.add("circle", cls, title, cx=x, cy=y, r=r)

    def diamond(self, x: float, y: float, r: float, cls: str, title: str = "") -> None:
        corners = ((x, y - r), (x + r, y), (x, y + r), (x - r, y))
        self.add("polygon", cls, title, points=" ".join(f"{a:.1f},{b:.1f}" for a, b in corners))

    def polyline(self, points: Sequence[Point], cls: str, title: str = "") -> None:
        self.add("polyline", cls, title, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))

    def polygon(self, points: Sequence[Point], cls: str) -> None:
        self.add("polygon", cls, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))

    def text(self, x: float, y: float, words: str, cls: str = "", anchor: str = "start", title: str = "") -> None:
        tip = f"<title>{escape(title)}</title>" if title else ""
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.parts.append(f'<text class="{cls}" {place}>{tip}{escape(words)}</text>')

    def name(self, x: float, y: float, words: str, limit: int = 13, anchor: str = "end", cls: str = "") -> None:
        """A domain's name, shortened to `limit` characters with the whole of it in the tooltip."""
        short = words if len(words) <= limit else words[: limit - 1] + "\u2026"
        self.text(x, y, short, cls, anchor, words if short != words else "")

    def axis_x(self, scale: Scale, ticks: Sequence[float], top: float, bottom: float, title: str = "") -> None:
        """Vertical grid lines with their values below, and the axis title under them."""
        for tick, words in zip(ticks, tick_labels(ticks), strict=True):
            self.line(scale(tick), top, scale(tick), bottom, "grid")
            self.text(scale(tick), bottom + 14, words, "tick", "middle")
        if title:
            self.text((scale.start + scale.end) / 2, bottom + 30, title, "axis", "middle")

    def axis_y(self, scale: Scale, ticks: Sequence[float], left: float, right: float) -> None:
        """Horizontal grid lines with their values on the left."""
        for tick, words in zip(ticks, tick_labels(ticks), strict=True):
            self.line(left, scale(tick), right, scale(tick), "grid")
            self.text(left - 6, scale(tick) + 4, words, "tick", "end")

    def render(self) -> str:
        box = f"0 0 {self.width:.0f} {self.height:.0f}"
        head = f'<svg viewBox="{box}" role="img" aria-label="{escape(self.label, quote=True)}">'
        return "".join([head, *self.parts, "</svg>"])


def nice_ticks(lo: float, hi: float, count: int = 5) -> list[float]:
    """Round values inside [lo, hi], about `count` of them, at steps of 1, 2 or 5 times a power of ten."""
    if not hi > lo:
        return [lo]
    raw = (hi - lo) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((power * m for m in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / raw)))
    first = math.ceil(lo / step - 1e-9)
    last = math.floor(hi / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """All ticks with the decimals that the finest of them needs; a true minus sign; k and M for large counts."""
    top = max((abs(t) for t in ticks), default=0.0)
    unit, suffix = (1e9, "B") if top >= 1e9 else (1e6, "M") if top >= 1e6 else (1e3, "k") if top >= 1e4 else (1.0, "")
    scaled = [t / unit for t in ticks]
    places = next((d for d in range(6) if all(abs(round(t, d) - t) < 1e-9 for t in scaled)), 6)
    return [f"{t:.{places}f}{suffix if t else ''}".replace("-", "\u2212") for t in scaled]


def spread_labels(positions: Sequence[float], gap: float, lo: float, hi: float) -> list[float]:
    """Move label positions as little as a greedy pass needs so that neighbours are `gap` apart and stay in [lo, hi]."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = list(positions)
    previous = lo - gap
    for i in order:
        placed[i] = previous = max(placed[i], previous + gap)
    following = hi + gap
    for i in reversed(order):
        placed[i] = following = min(placed[i], following - gap)
    return placed


def _show(value: float | str) -> str:
    return escape(value, quote=True) if isinstance(value, str) else f"{value:.1f}"
