"""Rows of the DoReMi benchmark from losses that are known."""

import numpy as np

from benchmarks.doremi import compare


def test_rows_are_means_over_seeds_and_costs():
    losses = {
        "doremi": np.array([[1.0, 2.0], [1.2, 2.2], [1.1, 2.1]]),  # [seed, domain]
        "uniform": np.array([[1.5, 2.5], [1.8, 2.6], [1.5, 2.5]]),
        "regmix": np.array([[1.0, 1.8], [1.0, 1.8], [1.0, 1.8]]),
    }
    rows = {row.key: row for row in compare(losses, {"doremi": 10.0, "regmix": 40.0})}
    assert np.isclose(rows["average_loss.uniform"].ours, 1.6) and np.isclose(
        rows["average_loss.uniform"].peer, 12.4 / 6
    )
    assert np.isclose(rows["worst_loss.regmix"].ours, 2.1) and rows["worst_loss.regmix"].ratio < 1, "less is better"
    gains = np.array([2.0 - 1.5, 2.2 - 1.7, 2.0 - 1.6])
    found = rows["average_gain.uniform"]
    assert np.isclose(found.ours, gains.mean()) and np.isclose(found.peer, gains.std(ddof=1))
    assert rows["flops.regmix"].ratio == 4 and "flops.doremi" not in rows and "flops.uniform" not in rows
