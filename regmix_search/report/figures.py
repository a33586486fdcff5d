"""The report's figures as inline SVG. Each is one function of plain numbers and returns the <svg> text."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from regmix_search.report.numerals import fixed, percent
from regmix_search.report.svg import WIDTH, Canvas, Point, Scale, nice_ticks, spread_labels
from regmix_search.report.verdict import Comparison

LEFT = 92  # room for a domain's name
ROW = 24
LABEL_GAP = 14  # between the base lines of two names at the ends of curves
# A curve needs no more points than the figure has pixels.
MAX_POINTS = 240
GOLDEN = 0.6180339887498949  # jitter of strip plots: i * GOLDEN mod 1 spreads neighbours and is the same every time

GAINS = (
    "Gain of the optimal mixture over each control, with intervals",
    "gain in nats per token (control loss minus optimal loss)",
    "control better",  # left of zero
    "optimal better",  # right of it
)


@dataclass(frozen=True)
class Curve:
    """One mixture's runs: (tokens, loss) points for each seed. `style` is the CSS colour name."""

    style: str
    label: str
    seeds: Sequence[Sequence[Point]]


def draw_gains(comparisons: Sequence[Comparison], words: tuple[str, str, str, str] = GAINS) -> str:
    """Gain of optimal over each control, with its own interval (thick) and the joint one (thin); words: as GAINS."""
    top, bottom = 26, 26 + 46 * len(comparisons)
    title, axis, left, right = words
    canvas = Canvas(bottom + 40, title)
    values = [0.0, *(c.gain for c in comparisons), *(edge for c in comparisons for edge in c.joint or ())]
    pad = 0.06 * (max(values) - min(values) or 1.0)
    x = Scale(min(values) - pad, max(values) + pad, 12, WIDTH - 12)
    canvas.axis_x(x, nice_ticks(x.lo, x.hi, 6), top, bottom, axis)
    canvas.line(x(0), top - 4, x(0), bottom, "zero")
    if x(0) > 100:
        canvas.text(x(0) - 6, top - 8, left, "tick", "end")
    if x(0) < WIDTH - 100:
        canvas.text(x(0) + 6, top - 8, right, "tick")
    for row, c in enumerate(comparisons):
        y = top + 46 * row + 32
        said = f"{c.label}: {c.gain:+.3f}".replace("-", "\u2212")
        anchor = "start" if x(c.gain) < WIDTH / 2 else "end"
        canvas.text(min(max(x(c.gain), 12), WIDTH - 12), y - 11, said, "strong", anchor)
        if c.joint and c.interval:
            canvas.line(x(c.joint[0]), y, x(c.joint[1]), y, f"s-{c.control} thin", "joint interval")
            canvas.line(x(c.interval[0]), y, x(c.interval[1]), y, f"s-{c.control} thick", "95% interval on its own")
        canvas.circle(x(c.gain), y, 5, f"f-{c.control} rim", said)
    return canvas.render()


def draw_weights(
    names: Sequence[str],
    prior: Mapping[str, float],
    optimal: Mapping[str, float],
    epochs: Mapping[str, float],
    caps: Mapping[str, float],
    at_cap: Sequence[str],
) -> str:
    """Two bars a domain, prior above optimal; a black tick at the cap; weights and epochs in columns."""
    row, top = 30, 24
    bottom = top + row * len(names)
    canvas = Canvas(bottom + 34, "Weight of every domain, prior and optimal, with caps and epochs")
    widest = max([*prior.values(), *optimal.values(), 0.01]) * 1.08
    x = Scale(0, widest, LEFT, 300)
    canvas.axis_x(x, nice_ticks(0, widest, 4), top, bottom, "weight (share of training tokens)")
    for right, words in ((350, "prior"), (406, "optimal"), (456, "epochs")):
        canvas.text(right, 14, words, "head", "end")
    for i, name in enumerate(names):
        y = top + row * i + 4
        canvas.name(LEFT - 8, y + 15, name)
        for offset, style, weights in ((0, "prior", prior), (11, "optimal", optimal)):
            if name in weights:
                width = x(weights[name]) - x(0)
                canvas.rect(x(0), y + offset, width, 10, f"f-{style}", f"{name}: {style} {weights[name]:.4f}")
        if caps.get(name, 1.0) < 1.0 and caps[name] <= widest:
            canvas.line(x(caps[name]), y - 2, x(caps[name]), y + 23, "cap", f"cap {caps[name]:.4f}")
        canvas.text(350, y + 15, percent(prior.get(name)), "quiet num", "end")
        canvas.text(406, y + 15, percent(optimal.get(name)), "strong num", "end")
        cls = "hot strong num" if name in at_cap else "num"
        canvas.text(456, y + 15, fixed(epochs.get(name), 2), cls, "end")
    return canvas.render()


def draw_scatter(
    pairs: Sequence[Point],
    limits: Sequence[float],
    noise: float,
    words: Sequence[str],
    style: str,
    label: str,
    hollow: Collection[int] = (),
) -> str:
    """(predicted, true) pairs in nats, with the diagonal and a band of two noise sds on either side of it.

    `limits` are values that both axes must reach, so that two figures can share them; `hollow`: pairs whose true loss
    is an estimate.
    """
    canvas = Canvas(376, label)
    left, right, top, bottom = 46, WIDTH - 8, 10, 336
    shown = [(i, p, t) for i, (p, t) in enumerate(pairs) if math.isfinite(p) and math.isfinite(t)]
    lo, hi = _padded([*limits, *(v for _, p, t in shown for v in (p, t))])
    x, y = Scale(lo, hi, left, right), Scale(lo, hi, bottom, top)
    if noise > 0:
        band = min(2 * noise, hi - lo)
        corners = [(lo, lo), (lo, lo + band), (hi - band, hi), (hi, hi), (hi, hi - band), (lo + band, lo)]
        canvas.polygon([(x(a), y(b)) for a, b in corners], "band")
    canvas.axis_x(x, nice_ticks(lo, hi), top, bottom, "predicted loss (nats per token)")
    canvas.axis_y(y, nice_ticks(lo, hi), left, right)
    canvas.line(x(lo), y(lo), x(hi), y(hi), "zero")
    for i, p, t in shown:
        cls, source = (f"s-{style} told", "estimated") if i in hollow else (f"f-{style} dot", "true")
        canvas.circle(x(p), y(t), 4, cls, f"predicted {p:.3f}, {source} {t:.3f}")
    canvas.text(left + 8, top + 14, "true loss", "axis")
    for i, line in enumerate(words):
        canvas.text(left + 8, top + 34 + 16 * i, line, "strong" if i == 0 else "")
    return canvas.render()


def draw_curves(curves: Sequence[Curve], label: str, floor_share: float = 0.12) -> str:
    """Loss against tokens: the mean over seeds as a line, each seed faint behind it, the name at the end of the line.

    The y axis starts at the highest loss after `floor_share` of the tokens: the first fall would flatten the rest.
    Where there is no room for all names, those that moved most from first to last point have theirs.
    """
    canvas = Canvas(300, label)
    left, right, top, bottom = 46, WIDTH - 92, 12, 258
    points = [p for curve in curves for seed in curve.seeds for p in seed]
    last = max(t for t, _ in points)
    shown = [loss for t, loss in points if t >= floor_share * last] or [loss for _, loss in points]
    lo, hi = _padded(shown)
    x, y = Scale(0, last, left, right), Scale(lo, hi, bottom, top)
    canvas.axis_x(x, nice_ticks(0, last, 4), top, bottom, "training tokens")
    canvas.axis_y(y, nice_ticks(lo, hi), left, right)
    ends, moved = [], []
    for curve in curves:
        for seed in curve.seeds:
            canvas.polyline(_visible(seed, x, y), f"s-{curve.style} faint")
        mean = mean_curve(curve.seeds)
        canvas.polyline(_visible(mean, x, y), f"s-{curve.style} curve", curve.label)
        ends.append(y(mean[-1][1]) if mean else bottom)
        moved.append(abs(mean[-1][1] - mean[0][1]) if mean else 0.0)
    room = int((bottom - top - 4) // LABEL_GAP) + 1
    named = sorted(sorted(range(len(curves)), key=lambda i: -moved[i])[:room])
    places = spread_labels([ends[i] for i in named], LABEL_GAP, top + 4, bottom)
    for i, place in zip(named, places, strict=True):
        canvas.line(right + 2, ends[i], right + 9, place, f"s-{curves[i].style} lead")
        canvas.name(right + 12, place + 4, curves[i].label, 13, "start", f"f-{curves[i].style} strong")
    if len(curves) > room:
        canvas.text(right + 12, bottom + 20, f"+ {len(curves) - room} more", "tick", title="they moved less")
    return canvas.render()


def draw_design(
    names: Sequence[str],
    sampled: Mapping[int, Mapping[str, float]],
    best: Sequence[int],
    prior: Mapping[str, float],
    optimal: Mapping[str, float],
    rounds: Mapping[int, int],
) -> str:
    """Every proxy's weights by domain, square-root axis: dots, the best ringed, prior a bar, optimum a diamond.

    `rounds`: the round that proposed a proxy, where one did; these dots have a colour of their own.
    """
    top, bottom = 22, 22 + ROW * len(names)
    canvas = Canvas(bottom + 34, "Sampled weights of every domain with the optimum marked")
    x = Scale(0, 1, LEFT, WIDTH - 12, 0.5)
    canvas.axis_x(x, [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], top, bottom, "weight (square-root scale)")
    _design_key(canvas, bool(rounds))
    for row, name in enumerate(names):
        middle = top + ROW * row + ROW / 2
        values = np.array([weights.get(name, 0.0) for weights in sampled.values()])
        if len(values):
            low, high = np.quantile(values, [0.25, 0.75])
            canvas.rect(x(low), middle - 9, max(x(high) - x(low), 1), 18, "box", f"{name}: half of the runs")
        for position, (index, weights) in enumerate(sampled.items()):
            y = middle + (position * GOLDEN % 1 - 0.5) * 13
            cls, radius = ("ring", 3.4) if index in best else ("spot", 2.0)
            cls, words = (f"{cls} late", f"round {rounds[index]}") if index in rounds else (cls, "")
            canvas.circle(x(weights.get(name, 0.0)), y, radius, cls, words)
        if name in prior:
            canvas.line(x(prior[name]), middle - 10, x(prior[name]), middle + 10, "mark", f"prior {prior[name]:.4f}")
        if name in optimal:
            canvas.diamond(x(optimal[name]), middle, 6.5, "f-optimal rim", f"optimum {optimal[name]:.4f}")
        canvas.name(LEFT - 8, middle + 4, name)
    return canvas.render()


def draw_noise(rows: Sequence[tuple[str, Sequence[float], Sequence[float], str]]) -> str:
    """One row a target: losses of all mixtures about their median (dots), repeats of the prior (bars)."""
    top, bottom = 22, 22 + ROW * len(rows)
    canvas = Canvas(bottom + 34, "Spread over mixtures beside the noise of repeats, per target")
    centred = [
        (name, np.asarray(losses) - np.median(losses), np.asarray(repeats) - np.median(losses), ratio)
        for name, losses, repeats, ratio in rows
    ]
    lo, hi = _padded([float(v) for _, losses, repeats, _ in centred for v in (*losses, *repeats)])
    x = Scale(lo, hi, LEFT, WIDTH - 64)
    canvas.axis_x(x, nice_ticks(lo, hi), top, bottom, "loss minus the target's median (nats per token)")
    canvas.text(WIDTH - 4, 12, "spread / noise", "head", "end")
    for row, (name, losses, repeats, ratio) in enumerate(centred):
        middle = top + ROW * row + ROW / 2
        for position, value in enumerate(losses):
            canvas.circle(x(value), middle - 3 + (position * GOLDEN % 1 - 0.5) * 8, 2.0, "spot")
        for value in repeats:
            canvas.line(x(value), middle + 3, x(value), middle + 10, "s-repeat thick2", f"{name}: repeat of the prior")
        canvas.name(LEFT - 8, middle + 4, name, cls="strong" if row == 0 else "")
        canvas.text(WIDTH - 4, middle + 4, ratio, "strong num", "end")
    return canvas.render()


def mean_curve(seeds: Sequence[Sequence[Point]]) -> list[Point]:
    """Mean over seeds at the first seed's token counts, up to where the shortest seed ends."""
    seeds = [seed for seed in seeds if seed]
    if not seeds:
        return []
    end = min(seed[-1][0] for seed in seeds)
    grid = [t for t, _ in seeds[0] if t <= end]
    losses = np.mean([np.interp(grid, *np.array(seed).T) for seed in seeds], axis=0)
    return list(zip(grid, losses.tolist(), strict=True))


def smooth(curve: Sequence[Point], window: int) -> list[Point]:
    """Running mean of the losses over `window` points ending at each point; tokens are kept."""
    sums = np.cumsum([0.0, *(loss for _, loss in curve)])
    return [
        (t, float(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(window, i + 1)) for i, (t, _) in enumerate(curve)
    ]


def _design_key(canvas: Canvas, rounds: bool) -> None:
    canvas.circle(LEFT + 8, 8, 2.0, "spot")
    canvas.text(LEFT + 16, 12, "proxy", "head")
    canvas.circle(LEFT + 66, 8, 3.4, "ring")
    canvas.text(LEFT + 76, 12, "five best", "head")
    canvas.line(LEFT + 146, 2, LEFT + 146, 14, "mark")
    canvas.text(LEFT + 154, 12, "prior", "head")
    canvas.diamond(LEFT + 204, 8, 6, "f-optimal rim")
    canvas.text(LEFT + 215, 12, "optimum", "head")
    if rounds:
        canvas.circle(LEFT + 278, 8, 2.0, "spot late")
        canvas.text(LEFT + 286, 12, "by a round", "head")


def _visible(curve: Sequence[Point], x: Scale, y: Scale) -> list[Point]:
    stride = max(1, math.ceil(len(curve) / MAX_POINTS))
    kept = [*curve[:-1:stride], *curve[-1:]]
    return [(x(t), y(loss)) for t, loss in kept if loss <= y.hi]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    lo, hi = min(values, default=0.0), max(values, default=1.0)
    pad = 0.05 * (hi - lo) or 0.5
    return lo - pad, hi + pad
