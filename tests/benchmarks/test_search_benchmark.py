"""The claims of benchmarks/search.py on RegMix's published runs. Test rows only score: no choice looks at them."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import precise, reuse, scales, search
from benchmarks.table import Row
from regmix_search.tables import Runs


@pytest.fixture(autouse=True)
def _published(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (shared_dir / "data" / "regmix").is_dir():
        pytest.skip(f"no published runs below {shared_dir}")
    monkeypatch.setenv("MEGATRON_LITE_SHARED", str(shared_dir))


def test_48_runs_in_rounds_find_the_best_of_768() -> None:
    pool = search.join(search.published("train", "1m"), search.published("test", "1m"))
    row = search.adaptive_row(pool)
    assert len(pool.index) == 768 and row.ours <= 0.003 < 0.03 < row.peer


def test_the_simulation_averages_the_best_draws() -> None:
    """On a loss with one best domain: nearly all of it, and better than the prior by far."""
    prior = np.array([0.5, 0.3, 0.2])
    found = search.simulate_regmix(lambda w: -w[:, 1], prior, 100_000)
    assert found[1] > 0.999 and found.sum() == pytest.approx(1)


def test_without_the_runs_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MEGATRON_LITE_SHARED", str(tmp_path))
    assert search.main([]) == 2
    assert "train_mixture_1m.csv: no such file; set MEGATRON_LITE_SHARED" in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_stops_when_its_optimum_is_settled_and_not_before() -> None:
    """On one order of the 512: a mixture within a run's noise of the best, from a fraction of the runs."""
    train = search.published("train", "1m")
    space = search.unlimited_space(train.domains, dict(zip(train.domains, search.PILE, strict=True)))
    fits = precise.fit_as_they_arrive(search.draw_runs(train, 512, 0), search.TARGET, space)
    truth = search.build_surrogate("average").fit(train.weights, train.losses[search.TARGET])
    objective, region = search.Objective(((1.0, truth),)), search.Region(np.zeros(17), np.ones(17))
    best = objective.at(search.solve(objective, region, space.prior, train.weights))
    regrets = [objective.at(np.array(list(fit.weights.values()))) - best for fit in fits]
    print([(fit.runs, fit.settled) for fit in fits], regrets)
    assert 40 <= fits[-1].runs <= 300 and not any(fit.settled for fit in fits[:2])
    assert regrets[-1] < precise.NOISE and regrets[-1] < regrets[0]
    few = search.pick(train, range(44))
    assert len(precise.fit_as_they_arrive(few, search.TARGET, space, noise=1e-4)) == 4, "never settled: all runs"


@pytest.mark.slow
def test_few_runs_rank_as_regmix_ranks_with_512() -> None:
    """What docs/benchmarks.md has, less the spread between machines. RegMix's LightGBM with 512: .989 and .986."""
    train = search.published("train", "1m")
    tests = {"1M": search.published("test", "1m"), "60M": search.published("test", "60m")}
    rows: dict[str, Row] = {row.key: row for row in search.correlations(train, tests)}
    least = {"cc_512": (0.995, 0.991), "cc_128": (0.99, 0.987), "cc_64": (0.985, 0.982), "mean13_64": (0.985, 0.98)}
    for key, (small, large) in least.items():
        assert rows[f"{key}.1M"].ours >= small and rows[f"{key}.60M"].ours >= large, key
        assert rows[key].ours == pytest.approx((rows[f"{key}.1M"].ours + rows[f"{key}.60M"].ours) / 2)
    assert rows["cc_512.60M"].ratio > 1.004 and rows["cc_24_designed.1M"].ours > 0.97


def test_transfer_scores_runs_that_no_fit_has_seen_and_gains_from_the_small_ones():
    rng = np.random.default_rng(0)

    def runs(n: int, level: float, seed: int) -> Runs:
        weights = np.random.default_rng(seed).dirichlet(np.full(8, 0.4), size=n)
        losses = level - 0.4 * np.log(0.2 + np.sqrt(weights) @ np.geomspace(4, 0.1, 8)) + 0.04 * rng.standard_normal(n)
        return Runs(tuple(range(n)), tuple("abcdefgh"), weights, {"x": losses})

    rmse, rank = scales.transfer_rows(runs(90, 5.0, 1), runs(40, 4.0, 2), [0])
    assert rmse.ours < 0.05 and rmse.ratio > 1.1, "nats; the noise is .04"
    assert rank.ours > 0.9 and rank.key == "transfer.rank"
    (large,) = scales.large_rows(runs(90, 5.0, 1), runs(40, 4.0, 2), runs(30, 3.0, 3), "x")
    assert large.ours > 0.9


@pytest.mark.slow
def test_earlier_runs_are_worth_as_much_as_new_ones() -> None:
    """What docs/benchmarks.md has, less the spread between machines."""
    train = search.published("train", "1m")
    tests = {"1M": search.published("test", "1m")}
    rows = {row.key: row for row in reuse.runs_rows(train, tests, search.TARGET)}
    assert rows["reuse_runs"].ours > rows["reuse_runs"].peer - 0.003 > 0.98
    assert rows["reuse_gone"].ours > rows["reuse_gone"].peer + 0.003
    pool, pile = search.join(train, tests["1M"]), np.array(search.PILE)
    found = [reuse.search_again(pool, search.TARGET, pile, search.EPOCHS, 1, seed) for seed in range(3)]
    ours, peer = np.mean(found, axis=0)
    assert 0 <= ours < peer + 0.015 and ours < 0.05, "of the .32 nats between the prior and the best"
