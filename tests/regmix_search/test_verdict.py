"""The statistics and the words of the report, and the small parts that it is drawn with."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regmix_search.report.costs import covered
from regmix_search.report.figures import LABEL_GAP, Curve, draw_curves
from regmix_search.report.numerals import count, duration, minus
from regmix_search.report.svg import Scale, nice_ticks, spread_labels, tick_labels
from regmix_search.report.verdict import (
    Agreement,
    Comparison,
    agreement,
    compare,
    headline,
    spearman_interval,
    tokens_to_reach,
    transfer,
    trust,
)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_names_of_curves_never_overlap_and_are_those_that_moved_most(ends: list[tuple[float, float]]) -> None:
    curves = [Curve("d0", f"n{i}", [[(0.0, start), (1.0, end)]]) for i, (start, end) in enumerate(ends)]
    figure = draw_curves(curves, "weights", 0.0)
    named = re.findall(r'<text class="f-d0 strong" x="[\d.]+" y="([-\d.]+)"[^>]*>n(\d+)</text>', figure)
    heights = sorted(float(y) for y, _ in named)
    assert all(b - a >= LABEL_GAP - 0.11 for a, b in itertools.pairwise(heights)), "to a tenth of a pixel"
    assert heights[0] >= 0 and heights[-1] <= 300, "inside the figure"
    moved = [abs(end - start) for start, end in ends]
    shown = [moved[int(i)] for _, i in named]
    others = sorted(moved)[: len(moved) - len(shown)]
    assert len(shown) == min(len(ends), 18) and sorted([*others, *shown]) == sorted(moved)
    assert (f"+ {len(ends) - 18} more" in figure) == (len(ends) > 18)


def test_joint_intervals_keep_their_promise() -> None:
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(2000):
        groups = {name: rng.normal(5.0, 0.1, 2).tolist() for name in ("optimal", "prior", "uniform", "best_single")}
        missed += any(c.outcome != "unclear" for c in compare(groups, {}))
    assert missed / 2000 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_words_for_every_kind_of_outcome() -> None:
    def row(outcome: str, gain: float) -> Comparison:
        spans = {"better": (0.01, 0.3), "worse": (-0.3, -0.01), "unclear": (-0.1, 0.1), "unknown": None}
        return Comparison("prior", "the prior", 4.0, 4.0 + gain, gain, spans[outcome], spans[outcome], None, outcome)

    assert "was right" in transfer(0.2, row("better", 0.1))
    assert "was wrong" in transfer(0.2, row("worse", -0.1))
    assert "too close to zero" in transfer(0.2, row("unclear", 0.01))
    assert "opposite sign, with no interval" in transfer(0.2, row("unknown", -0.1))
    assert transfer(math.nan, None) == ""
    assert headline([], "models") == "The optimal mixture has no control to be compared with"
    assert "none of the controls" in headline([row("unknown", -0.1)], "models")


def test_small_parts() -> None:
    assert covered([(0, 10), (5, 12), (20, 21), (6, 7)]) == 13
    assert [duration(s) for s in (42, 61, 4130, math.nan)] == ["42 s", "1 min", "1 h 09 min", "\u2013"]
    assert [count(v) for v in (950, 12_345, 1.5e6, 2.5e9)] == ["950", "12.3k", "1.50M", "2.50B"]
    assert tokens_to_reach([(10, 5.0), (20, 4.0)], 4.25) == pytest.approx(17.5)
    assert tokens_to_reach([(10, 5.0), (20, 4.0)], 3.9) is None
    assert tick_labels(nice_ticks(-0.05, 0.21)) == ["\u22120.05", "0.00", "0.05", "0.10", "0.15", "0.20"]
    assert spread_labels([10, 11, 50], 14, 0, 60) == [10, 24, 50] and spread_labels([58, 59], 14, 0, 60) == [46, 60]
    assert Scale(0, 1, 0, 100, 0.5)(0.25) == pytest.approx(50)
    assert agreement([1, 2, math.nan], [1, 2, 3]) is None
    assert minus("t-5 -0.1 to +0.2 2026-01-02") == "t-5 \u22120.1 to +0.2 2026-01-02"


def test_trust_is_worded_by_the_held_back_set() -> None:
    def scored(rho: float, n: int = 8) -> Agreement:
        return Agreement(n, rho, rho, 0.06, spearman_interval(rho, n))

    assert "ranks mixtures well" in trust(scored(0.9, 64), scored(0.1), 0.03)
    assert "2.0 times the seed noise" in trust(scored(0.9), None, 0.03)
    assert "could rank little" in trust(scored(0.86), None, math.nan)
    assert "could rank little" not in trust(scored(0.9, 64), None, math.nan)
    assert "ranks mixtures roughly" in trust(None, scored(0.6), 0.03)
    assert "does not rank mixtures reliably" in trust(scored(0.3), scored(0.99), 0.03)
    assert "nothing to judge" in trust(None, None, 0.03)


def test_spearman_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(5)
    true = 6 / math.pi * math.asin(0.8 / 2)  # Spearman of a bivariate normal with correlation 0.8
    hits = 0
    for _ in range(400):
        x, z = rng.standard_normal((2, 20))
        found = agreement(x, 0.8 * x + 0.6 * z)
        assert found and found.interval
        hits += found.interval[0] <= true <= found.interval[1]
    assert 0.92 <= hits / 400 <= 0.99
