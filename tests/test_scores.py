"""launch/scores.py against scipy and against cases whose answer is known."""

import random
import statistics

import pytest
from scipy import stats

from launch.scores import Cell, average, compare, comparison_table, difference, holm, score_table


def test_differences_are_welchs_t_as_scipy_has_it():
    rng = random.Random(0)
    for n, m in ((2, 2), (5, 5), (3, 7)):
        a, b = ([rng.gauss(mean, sd) for _ in range(k)] for mean, sd, k in ((0.5, 0.02, n), (0.47, 0.1, m)))
        expected = stats.ttest_ind(a, b, equal_var=False)
        interval = expected.confidence_interval(0.95)
        found = difference(Cell(tuple(a)), Cell(tuple(b)))
        assert found.gap == pytest.approx(statistics.fmean(a) - statistics.fmean(b))
        assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, interval.low, interval.high))


def test_one_seed_is_compared_by_the_items_and_says_so():
    a, b = Cell((0.60,), 0.03), Cell((0.50, 0.52), 0.04)
    found = difference(a, b)
    assert found.p == pytest.approx(2 * stats.norm.sf(0.09 / 0.05))  # hypot(.03, .04) = .05
    comparisons = compare({"task": {"a": a, "b": b}})
    assert comparisons[0].over == "items" and "not how training does" in comparison_table(comparisons, "points")
    for known in (None, 0.03):
        assert difference(Cell((0.6,), known), Cell((0.5,))).p is None  # nothing known: no claim


def test_holm_is_the_textbooks():
    # Holm 1979 on .01, .04, .03, .005 (sorted .005 .01 .03 .04, times 4 3 2 1, never falling)
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, None, 0.9]) == [0.8, None, 0.9]


def test_the_average_is_taken_seed_by_seed():
    # two tasks that vary against each other over seeds: their average does not vary at all
    cells = [Cell((0.4, 0.5, 0.6), 0.03), Cell((0.6, 0.5, 0.4), 0.04)]
    assert average(cells).values == pytest.approx((0.5, 0.5, 0.5))
    assert average(cells).stderr == pytest.approx(0.025)


def draw(rng: random.Random, effect: float) -> dict[str, dict[str, Cell]]:
    """13 tasks, three mixtures of five seeds; the first task of the third mixture is better by `effect`."""
    return {
        f"task{t}": {
            m: Cell(tuple(rng.gauss(0.5 + effect * (m == "c" and t == 0), 0.004) for _ in range(5))) for m in "abc"
        }
        for t in range(13)
    }


def test_noise_is_rarely_called_significant_and_an_effect_is_found():
    rng = random.Random(1)
    null = [compare(draw(rng, 0)) for _ in range(60)]
    # 39 tests a table at 5 %: without Holm 87 % of tables would have a false star; with it at most 5 %
    assert sum(any(c.higher or c.lower for c in found) for found in null) <= 9
    assert sum(any((c.p or 1) < 0.05 for c in found) for found in null) <= 9
    found = {(c.first, c.second): c for c in compare(draw(rng, 0.05))}
    assert found["c", "a"].higher == found["c", "b"].higher == ["task0"]
    assert not found["b", "a"].higher and all(not c.lower for c in found.values())


def test_the_table_reads_as_regmixs():
    table = {
        "piqa": {"human": Cell((0.70, 0.72)), "regmix": Cell((0.71, 0.73))},
        "race": {"human": Cell((0.31, 0.29)), "regmix": Cell((0.28, 0.28))},
    }
    assert score_table(table, {"piqa": "acc_norm", "race": "acc"}).splitlines() == [
        "| task | metric | human | regmix |",
        "|---|---|---:|---:|",
        "| piqa | acc_norm | 71.0 \u00b1 1.4 | **72.0 \u00b1 1.4** |",
        "| race | acc | **30.0 \u00b1 1.4** | 28.0 \u00b1 0.0 |",
        "| **average** |  | **50.5 \u00b1 0.0** | 50.0 \u00b1 0.7 |",
        "| best on | | 1 of 2 | 1 of 2 |",
    ]
    assert "**" not in score_table({"piqa": {"one": Cell((0.7,))}}, {}).replace("**average**", "")
