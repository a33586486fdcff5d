"""fit.json: every target gets an honest choice, the held-back runs stay unseen, the noise of a run is measured."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from regmix_search import fits, machine, solution
from regmix_search.config import FitConfig, SearchConfig
from regmix_search.fits import check_runs_tell, fit_chosen, fit_targets, run_noise, split_holdout
from regmix_search.goals import parse_goal
from regmix_search.surrogates import score
from regmix_search.tables import Runs

NAMES = ("effective", "linear")
NOISE = 0.02


def planted_runs(n: int = 40, seed: int = 0, noise: float = NOISE, repeats: int = 3) -> Runs:
    """n mixtures of four domains, the first run `repeats` times more; targets a and b want different domains."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(4, 0.7), size=n)
    weights = np.vstack([weights, np.tile(weights[0], (repeats, 1))])
    losses = {
        "a": 5 - 0.5 * np.log(0.2 + weights**0.5 @ [3, 1, 0.3, 0.1]) + noise * rng.normal(size=len(weights)),
        "b": 4 - 0.3 * np.log(0.1 + weights**0.5 @ [0.1, 0.3, 1, 2]) + noise * rng.normal(size=len(weights)),
    }
    return Runs(tuple(range(100, 100 + len(weights))), ("w", "x", "y", "z"), weights, losses)


def test_fit_json_has_its_promised_form_and_is_json() -> None:
    runs = planted_runs()
    held = split_holdout(runs, 8, seed=0)
    fit = fit_targets(runs, "a", names=NAMES, holdout=held, seed=0)
    assert json.loads(json.dumps(fit, allow_nan=False)) == fit
    assert (
        fit["target"] == "a" and fit["n_train"] == 35 and fit["n_holdout"] == 8 and list(fit["targets"]) == ["a", "b"]
    )
    assert sorted([*fit["train_index"], *held]) == sorted(runs.index)
    for name, entry in fit["targets"].items():
        assert entry["chosen"] == "effective" and set(entry["candidates"]) == set(NAMES)
        assert set(entry["candidates"]["linear"]) == {"spearman", "pearson", "mse", "rmse", "coverage90"}
        assert set(entry["nested"]) == set(entry["candidates"]["linear"]) and entry["scale90"] > 0
        assert len(entry["cv_deviation"]) == len(entry["nested_predicted"]) == len(entry["nested_deviation"]) == 35
        assert len(entry["cv_predicted"]) == len(entry["true"]) == 35
        judged = entry["holdout"]
        assert judged["index"] == list(held) and judged["true"] == runs.select(held).losses[name].tolist()
        assert judged["spearman"] > 0.8
        again = score(np.array(judged["predicted"]), np.array(judged["true"]))
        assert judged["mse"] == pytest.approx(again["mse"])


def test_held_back_losses_are_never_looked_at() -> None:
    """Another loss on the held-back rows changes their score and nothing else."""
    runs = planted_runs()
    held = split_holdout(runs, 8, seed=1)
    rows = [runs.index.index(i) for i in held]
    spoilt = {name: values.copy() for name, values in runs.losses.items()}
    for values in spoilt.values():
        values[rows] = np.random.default_rng(0).normal(50, 9, len(rows))
    first = fit_targets(runs, "a", names=NAMES, holdout=held)
    other = fit_targets(Runs(runs.index, runs.domains, runs.weights, spoilt), "a", names=NAMES, holdout=held)
    assert first["targets"]["a"]["holdout"].pop("true") != other["targets"]["a"]["holdout"].pop("true")
    assert first["targets"]["a"]["holdout"]["predicted"] == other["targets"]["a"]["holdout"]["predicted"]
    for fit in (first, other):
        for entry in fit["targets"].values():
            del entry["holdout"]
    assert first == other


def test_a_mixture_cannot_be_held_back_and_fitted() -> None:
    runs = planted_runs()  # run 100 has repeats 140, 141, 142
    with pytest.raises(ValueError, match=r"runs \[141\] have a mixture that is also fitted"):
        fit_targets(runs, "a", names=NAMES, holdout=[105, 141])
    assert not {100, 140, 141, 142} & set(split_holdout(runs, 30, seed=0))


def test_split_holdout_is_seeded_and_leaves_something() -> None:
    runs = planted_runs()
    assert split_holdout(runs, 8, 0) == split_holdout(runs, 8, 0) != split_holdout(runs, 8, 1)
    with pytest.raises(ValueError, match="cannot hold back 38 of 39"):
        split_holdout(runs, 38, 0)


def test_run_noise_is_the_pooled_deviation_of_repeats() -> None:
    weights = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [0, 1], [0.5, 0.5]])
    runs = Runs((0, 1, 2, 3, 4, 5), ("w", "x"), weights, {"a": np.array([1.0, 3, 5, 5, 8, 99])})
    assert run_noise(runs) == {"a": pytest.approx(np.sqrt((1 + 1 + 1 + 1 + 4) / 3))}
    assert run_noise(runs.select([0, 2, 5])) == {}
    many = planted_runs(n=2, repeats=400)
    assert run_noise(many)["b"] == pytest.approx(NOISE, rel=0.15)


def test_the_chosen_surrogate_is_fitted_again_to_the_same_rows() -> None:
    runs = planted_runs()
    held = split_holdout(runs, 8, seed=0)
    fit = json.loads(json.dumps(fit_targets(runs, "a", names=NAMES, holdout=held, seed=4)))
    model = fit_chosen(runs, fit, "b")
    found = model.predict(runs.select(held).weights)
    np.testing.assert_array_equal(found, fit["targets"]["b"]["holdout"]["predicted"])
    assert fit_chosen(runs, fit, "b", "linear").name == "linear"


@pytest.mark.parametrize("held", [(), (105,), (105, 106)])
def test_correlations_of_fewer_than_three_runs_are_null(held: tuple[int, ...]) -> None:
    fit = fit_targets(planted_runs(), "a", names=("linear",), holdout=held)
    judged = fit["targets"]["a"]["holdout"]
    assert judged["spearman"] is None and judged["pearson"] is None and len(judged["true"]) == len(held)
    assert (judged["mse"] is None) == (not held)


def test_warnings_name_the_target_and_what_is_wrong() -> None:
    runs = planted_runs(repeats=0)
    noise_only = {**runs.losses, "b": np.random.default_rng(3).normal(size=40)}
    found = fit_targets(Runs(runs.index, runs.domains, runs.weights, noise_only, (900,)), "a", names=NAMES)
    text = "\n".join(found["warnings"])
    assert "b: " in text and "a: " not in text
    for part in ("no mixture was run twice", "1 mixtures have no losses and were left out: 900"):
        assert part in text, text


def test_targets_are_names_or_weighted_names() -> None:
    assert fit_targets(planted_runs(), "a=1,b=3", names=("linear",))["target"] == {"a": 0.25, "b": 0.75}
    fit = fit_targets(planted_runs(), {"a": 2.0, "b": 2.0}, targets=["a"], names=("linear",))
    assert fit["target"] == {"a": 0.5, "b": 0.5} and set(fit["targets"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("reamde", "'reamde' is not among the losses. Did you mean 'readme'"),
        ({"readme": -1.0}, "'readme' has weight -1"),
        ({"readme": float("nan")}, "has weight nan"),
        ({"readme": 0.0}, "at least one loss a weight above 0"),
        ({}, "at least one loss"),
    ],
)
def test_bad_targets_are_named(target: str | dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_goal(target, ["readme", "python"])


def test_what_cannot_be_fitted_is_said_in_a_search_as_in_a_study() -> None:
    """Searches and studies both fit through fit_targets. Domains that keep one ratio count as one."""
    runs = planted_runs()
    idle = Runs(runs.index, (*runs.domains, "idle"), np.hstack([runs.weights, np.zeros((43, 1))]), runs.losses)
    with pytest.raises(ValueError, match=r"never vary in these 43 runs: idle \(always 0\)"):
        fit_targets(idle, "a", names=NAMES)
    assert fit_targets(idle, "a", names=("linear",), fixed=("idle",))["n_train"] == 43
    with pytest.raises(ValueError, match="5 different mixtures for 4 domains: a fit needs at least 6, better 20"):
        fit_targets(runs.select(runs.index[:5]), "a", names=NAMES)
    share = np.random.default_rng(0).random((5, 1))
    tied = Runs(runs.index[:5], runs.domains, np.hstack([share * [0.2, 0.3, 0.5], 1 - share]), runs.losses)
    check_runs_tell(tied, NAMES)
    with pytest.raises(ValueError, match="3 different mixtures for 2 domains"):
        check_runs_tell(Runs(runs.index[:3], runs.domains, tied.weights[:3], runs.losses), NAMES)


def test_a_search_fits_many_losses_on_every_core_and_few_in_its_own_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, told = planted_runs(), list[int]()

    def record(*_: Any, **how: Any) -> None:
        told.append(how["workers"])
        raise KeyboardInterrupt

    monkeypatch.setattr(solution, "fit_targets", record)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)  # no quota
    for count in (12, 2):
        many = Runs(runs.index, runs.domains, runs.weights, {f"l{i}": runs.losses["a"] for i in range(count)})
        with pytest.raises(KeyboardInterrupt):
            solution.fit_runs(tmp_path, many, [], SearchConfig(fit=FitConfig(target="l0")))
    assert told == [3, 1]


@pytest.mark.slow
def test_processes_change_no_figure() -> None:
    runs = planted_runs()
    alone = fit_targets(runs, "a", names=("effective", "gp"))
    assert fit_targets(runs, "a", names=("effective", "gp"), workers=2) == alone


def test_workers_use_one_thread_whatever_the_main_module_has_loaded(monkeypatch):
    """Two workers with two threads each took twenty times as long: BLAS waits for its own threads in a busy loop."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), fits._use_one_thread) as pool:
        found = pool.submit(threadpool_info).result()
    assert found and all(library["num_threads"] == 1 for library in found)
