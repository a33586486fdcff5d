"""RegMix's published runs (17 domains, 512 + 256 proxies). Choices were made on training rows; test rows only score.

The paper reports a Spearman of .9845 (1M) and .9864 (60M) for LightGBM on Pile-CC with all 512 runs, .9008 for linear.
"""

from pathlib import Path

import numpy as np
import pytest
import yaml

from regmix_search.certainty import calibrated
from regmix_search.choice import choose
from regmix_search.fits import fit_chosen, fit_targets
from regmix_search.goals import parse_goal
from regmix_search.objective import Objective
from regmix_search.optimize import find_optimum
from regmix_search.simulation import simulate_top
from regmix_search.space import unlimited_space
from regmix_search.surrogates import build_surrogate, score
from regmix_search.tables import Runs, read_runs

TARGET = "the_pile_pile_cc"


def load(shared_dir: Path, mixtures: str, losses: str) -> Runs:
    folder = shared_dir / "data" / "regmix"
    if not folder.is_dir():
        pytest.skip(f"no published runs at {folder}")
    return read_runs(folder / f"{mixtures}.csv", folder / f"{losses}.csv")


@pytest.fixture(scope="module")
def train(shared_dir: Path) -> Runs:
    return load(shared_dir, "train_mixture_1m", "train_pile_loss_1m")


@pytest.fixture(scope="module")
def test_1m(shared_dir: Path) -> Runs:
    return load(shared_dir, "test_mixture_1m", "test_pile_loss_1m")


@pytest.fixture(scope="module")
def test_60m(shared_dir: Path) -> Runs:
    return load(shared_dir, "test_mixture_60m", "test_pile_loss_60m")


def subset(runs: Runs, n: int, seed: int) -> Runs:
    picks = np.random.default_rng(seed).permutation(len(runs.index))[:n]
    return runs.select(runs.index[i] for i in picks)


def spearman(name: str, runs: Runs, test: Runs, target: str = TARGET) -> float:
    model = build_surrogate(name).fit(runs.weights, runs.losses[target])
    return score(model.predict(test.weights), test.losses[target])["spearman"]


def test_tables_are_read_whole(train: Runs, test_60m: Runs) -> None:
    assert train.weights.shape == (512, 17) and len(train.losses) == 13
    assert test_60m.weights.shape == (256, 17) and train.domains == test_60m.domains
    assert np.abs(train.weights.sum(axis=1) - 1).max() < 1e-12


@pytest.mark.parametrize(
    ("name", "low_1m", "high_1m", "low_60m"),
    [
        ("linear", 0.89, 0.91, 0.88),
        ("loglinear", 0.955, 0.975, 0.95),
        ("lightgbm", 0.985, 1.0, 0.98),
        ("effective", 0.990, 1.0, 0.988),
    ],
)
def test_all_512_runs_rank_the_test_runs(
    name: str, low_1m: float, high_1m: float, low_60m: float, train: Runs, test_1m: Runs, test_60m: Runs
) -> None:
    small, large = spearman(name, train, test_1m), spearman(name, train, test_60m)
    print(f"{name}: {small:.4f} (1M) {large:.4f} (60M)")
    assert low_1m <= small <= high_1m and large >= low_60m


def test_96_runs_and_a_law_rank_as_the_paper_did_with_512(train: Runs, test_1m: Runs, test_60m: Runs) -> None:
    found = [[spearman("effective", subset(train, 96, s), t) for t in (test_1m, test_60m)] for s in range(5)]
    print("effective, 96 runs, mean of 5:", np.round(np.mean(found, axis=0), 4))
    small, large = np.mean(found, axis=0)
    assert small >= 0.985 and large >= 0.982 and np.min(found) >= 0.97


def test_48_runs_choose_the_law_and_not_the_trees(train: Runs) -> None:
    some = subset(train, 48, 0)
    choice = choose(some.weights, some.losses[TARGET], seed=0, repeats=1, larger=True)
    print(choice.why)
    assert choice.chosen == "effective" and choice.candidates["effective"]["spearman"] > 0.93
    assert choice.candidates["linear"]["mse"] > 2 * choice.candidates["effective"]["mse"]


@pytest.mark.slow
def test_the_law_holds_for_all_13_losses(train: Runs, test_1m: Runs) -> None:
    found = {t: spearman("effective", train, test_1m, t) for t in train.losses}
    trees = {t: spearman("lightgbm", train, test_1m, t) for t in train.losses}
    print({t: (round(found[t], 4), round(trees[t], 4)) for t in found})
    assert np.mean(list(found.values())) > 0.985 and min(found.values()) > 0.96


@pytest.mark.slow
@pytest.mark.parametrize("n", [48, 96])
def test_intervals_cover_unseen_runs(n: int, train: Runs) -> None:
    """Nine tenths of runs that no fit saw, for one loss, for a mean of losses and for the worst of them."""
    covered: dict[str, list[float]] = {TARGET: [], "mean": [], "worst": []}
    for seed in range(3):
        some = subset(train, n, seed)
        rest = train.without(some.index)
        fit = fit_targets(some, "mean", names=("effective", "linear"), repeats=1)
        for target, found in covered.items():
            goal = parse_goal(target, train.losses)
            objective = Objective(tuple((s, fit_chosen(some, fit, t)) for t, s in goal.shares.items()), goal.worst)
            interval, true = calibrated(objective, goal, fit["targets"]), goal.of(rest.losses)
            low, high = interval.at(rest.weights).T
            found.append(float(np.mean((low <= true) & (true <= high))))
            assert target != TARGET or interval.scale == fit["targets"][TARGET]["scale90"]
    print(f"coverage of 90 % intervals, {n} runs: {covered}")
    assert all(0.84 <= np.mean(found) <= 0.96 for found in covered.values())


def test_the_optimum_of_64_runs_is_near_the_published_one(train: Runs) -> None:
    """RegMix published 87 % Pile-CC; the law agrees on the domain, and the run it proposes beats every run it saw."""
    some = subset(train, 64, 0)
    fit = fit_targets(some, TARGET, [TARGET], names=("effective", "linear"), repeats=1)
    found = find_optimum(unlimited_space(some.domains), some, fit)
    assert 0.7 < found["weights"][TARGET] < 0.97 and found["inside_sampled_region"]
    assert found["predicted"][TARGET] < min(some.losses[TARGET]) + 0.03  # 0.03: the noise of one run
    low, high = found["interval90"]
    assert low < 5.10 < high  # what several surrogates on all 512 runs predict for the published mixture


def weights_of(name: str, domains: tuple[str, ...]) -> np.ndarray:
    """A published mixture of configs/mixture, normalised as the trainer does."""
    path = Path(__file__).resolve().parents[2] / "configs" / "mixture" / f"{name}.yaml"
    written = yaml.safe_load(path.read_text(encoding="utf-8"))["train"]
    assert set(written) <= {f"train_{domain}" for domain in domains}
    weights = np.array([written.get(f"train_{domain}", 0.0) for domain in domains])
    return weights / weights.sum()


def test_published_mixtures_are_those_of_the_paper(train: Runs) -> None:
    """Sums as published (RegMix normalises on reading), and the losses that the law predicts for them in order."""
    model = build_surrogate("effective").fit(train.weights, train.losses[TARGET])
    names = ("regmix", "pile_cc_only", "doremi", "natural", "human")
    found = [float(model.predict(weights_of(name, train.domains)[None])[0]) for name in names]
    np.testing.assert_allclose(found, [5.110, 5.137, 5.105, 5.329, 5.376], atol=0.02)
    cc = train.domains.index(TARGET)
    assert weights_of("regmix", train.domains)[cc] == pytest.approx(0.8701291419934237)
    assert weights_of("human", train.domains)[cc] == pytest.approx(0.1121 / 0.7868)
    assert weights_of("doremi", train.domains)[cc] == pytest.approx(0.6057 / 0.8148)


@pytest.mark.slow
def test_the_published_optimum_is_replayed(train: Runs) -> None:
    """RegMix's way, LightGBM and the 100 best of a million draws from the prior, ends where RegMix did."""
    objective = Objective(((1.0, build_surrogate("lightgbm").fit(train.weights, train.losses[TARGET])),))
    found = simulate_top(objective, weights_of("natural", train.domains), 1_000_000, 100, seed=0)
    distance = float(np.abs(found - weights_of("regmix", train.domains)).sum())
    print(f"L1 distance to the published optimum: {distance:.3f}")
    assert distance <= 0.10
    assert np.argsort(-found)[:2].tolist() == [train.domains.index(TARGET), train.domains.index("the_pile_ubuntu_irc")]


@pytest.mark.slow
@pytest.mark.parametrize("n", [64, 512])
def test_auto_covers_nine_tenths_of_the_13_losses(n: int, train: Runs) -> None:
    """By the choice that cross-validation makes without the fold, on every loss."""
    some = subset(train, n, 0)
    fit = fit_targets(some, TARGET, workers=2)
    covered = {name: entry["nested"]["coverage90"] for name, entry in fit["targets"].items()}
    print({name: round(value, 3) for name, value in covered.items()})
    assert 0.87 <= np.mean(list(covered.values())) <= 0.93
    assert all(0.85 - (n == 64) * 0.05 <= value <= 0.95 + (n == 64) * 0.03 for value in covered.values())


def test_doremis_published_weights_are_complete() -> None:
    """All 22 domains of the Pile, as printed: their sums differ from 1 by rounding alone."""
    folder = Path(__file__).resolve().parents[2] / "configs/mixture"
    written = {
        name: yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))["train"]
        for name in ("pile_baseline", "doremi_280M", "doremi_120M", "doremi", "human")
    }
    for name in ("pile_baseline", "doremi_280M", "doremi_120M"):
        assert len(written[name]) == 22 and sum(written[name].values()) == pytest.approx(1, abs=2e-4), name
    for seventeen, whole in (("doremi", "doremi_280M"), ("human", "pile_baseline")):
        assert written[seventeen].items() <= written[whole].items(), "RegMix took 17 of them"
