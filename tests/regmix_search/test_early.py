"""Results early: the fit while proxies run, when it says stop, and what that does to the search."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import signal
from contextlib import closing
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from regmix_search import results, stages
from regmix_search.config import FitConfig, MixturesConfig, ProxiesConfig, SearchConfig, load_search
from regmix_search.early import EarlyFit, EarlyFits, distinct, fit_early, is_precise, read_fits
from regmix_search.ledger import Ledger, Trial
from regmix_search.progress import Progress
from regmix_search.proxies import Outcome, run_trials
from regmix_search.results import Results
from regmix_search.search import Search
from regmix_search.space import build_space, controls, sample_mixtures
from regmix_search.tables import Runs, write_mixtures

SPACE = build_space({"web": 600, "code": 300, "math": 200}, 1000, max_epochs=4)


def loss(weights: np.ndarray, seed: int, noise: float) -> float:
    value = 5 - 0.5 * np.log(0.2 + np.sqrt(weights) @ [3.0, 1.0, 2.0])
    return float(value + noise * np.random.default_rng([seed, *(weights * 1e6).astype(int)]).normal())


class Formula:
    """An executor that works a trial's losses out from a formula, one at a time: one to minimise and another."""

    def __init__(self, noise: float) -> None:
        self.noise, self.waiting = noise, list[Trial]()

    def free(self) -> int:
        return 1 - len(self.waiting)

    def submit(self, trial: Trial) -> None:
        self.waiting.append(trial)

    def wait(self, timeout: float) -> list[Outcome]:
        trial = self.waiting.pop()
        value = loss(np.array(list(trial.weights.values())), trial.seed, self.noise)
        return [Outcome(trial, {"losses": {"a": value, "b": 9.0 - value}, "tokens": 10})]

    def close(self) -> None:
        self.waiting = []


class Here(EarlyFits):
    """Early fits in this process, through as soon as they are begun: what they decide, without the time it takes."""

    def start(self, runs: Runs) -> None:
        self.pipe, theirs = Pipe(duplex=False)
        self.tried, self.process = distinct(runs), SimpleNamespace(kill=int, join=int)
        self.sender = self.process
        theirs.send(fit_early(runs, self.space, self.config, self.fits[-1] if self.fits else None))


@pytest.fixture(autouse=True)
def _fits_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "EarlyFits", Here)


class Folder:
    """A search of 3 repeats, 2 held back and `count` to fit on."""

    def __init__(self, out: Path, count: int = 40, noise: float = 0.02, until_precise: bool = True) -> None:
        self.out, self.noise = out, noise
        mixtures = MixturesConfig(count=count, holdout=2, repeats=3)
        proxies = ProxiesConfig(until_precise=until_precise)
        fit = FitConfig(target="a", surrogates=("effective",))  # the fastest
        config = SearchConfig(out_dir=str(out), mixtures=mixtures, proxies=proxies, fit=fit)
        self.search, self.said = Search(config, io.StringIO()), io.StringIO()
        out.mkdir(exist_ok=True)
        rows = np.vstack([np.tile(controls(SPACE)["prior"], (3, 1)), sample_mixtures(SPACE, count + 2, 0)])
        write_mixtures(out / "mixtures.csv", range(len(rows)), SPACE.domains, rows)
        (out / "space.json").write_text(json.dumps(SPACE.to_json()))

    def ledger(self) -> Ledger:
        return Ledger(self.out / "trials.jsonl", stages.plan_trials(self.search), {})

    def train(self) -> Ledger:
        """As the stage does."""
        ledger, progress = self.ledger(), Progress("proxies", self.said)
        with (
            Results(self.search, ledger, ("a", "b"), progress) as current,
            closing(run_trials(ledger, Formula(self.noise), progress)) as outcomes,
        ):
            for _ in outcomes:
                current.update()
                assert self.losses() == {i: e["losses"]["a"] for i, e in ledger.finished.items()}
        return ledger

    def losses(self) -> dict[int, float]:
        with (self.out / "losses.csv").open() as file:
            return {int(row["index"]): float(row["metric/a_val_loss"]) for row in csv.DictReader(file)}


def planted_runs(n: int, noise: float, repeats: int = 3) -> Runs:
    rows = np.vstack([np.tile(controls(SPACE)["prior"], (repeats, 1)), sample_mixtures(SPACE, n, 0)])
    losses = np.array([loss(row, i, noise) for i, row in enumerate(rows)])
    return Runs(tuple(range(len(rows))), SPACE.domains, rows, {"a": losses, "b": 9 - losses})


def search_config(**mixtures: Any) -> SearchConfig:
    fit = FitConfig(target="a", surrogates=("effective", "gp"))
    return SearchConfig(fit=fit, mixtures=MixturesConfig(**mixtures))


def made(**changes: Any) -> EarlyFit:
    """A fit that is settled, but for the changes."""
    weights, spread = {"web": 0.6, "code": 0.4}, {"web": [0.5, 0.7], "code": [0.3, 0.5]}
    fit = EarlyFit(0.0, 9, 8, "gp", "a", weights, spread, 4.5, [4.4, 4.6], 5.0, 0.01, 0.2, 0.1, 0.02)
    return dataclasses.replace(fit, **changes)


def test_settled_is_less_movement_than_uncertainty_and_less_to_gain_than_noise() -> None:
    assert made().settled and made(moved=0.2, left_to_gain=0.02).settled
    assert not made(moved=0.21).settled and not made(left_to_gain=0.021).settled
    assert not made(moved=None).settled and not made(noise=None).settled


def test_one_settled_fit_is_not_enough() -> None:
    assert not is_precise([]) and not is_precise([made()]) and is_precise([made(moved=9.0), made(), made()])
    assert not is_precise([made(), made(moved=9.0)]) and not is_precise([made(), made(moved=9.0), made()])


def test_more_runs_leave_less_to_gain_and_find_the_optimum() -> None:
    config = SearchConfig(fit=FitConfig(target="a"))  # all the surrogates that are asked early
    fits = [fit_early(planted_runs(n, 0.05), SPACE, config) for n in (8, 120)]
    best = min(loss(row, 0, 0.0) for row in sample_mixtures(SPACE, 500, 1))
    assert fits[1].left_to_gain < 0.5 * fits[0].left_to_gain and fits[1].reach < 0.7 * fits[0].reach
    assert loss(np.array(list(fits[1].weights.values())), 0, 0.0) < best + 0.005
    assert fits[0].mixtures == 9 and fits[0].runs == 11 and 0.02 < fits[0].noise < 0.12


def test_movement_is_from_the_fit_before_and_repeats_give_the_noise() -> None:
    runs = planted_runs(20, 0.01)
    last = fit_early(runs, SPACE, search_config())
    same = fit_early(runs, SPACE, search_config(), last)
    assert last.moved is None and same.moved == 0.0
    elsewhere = dataclasses.replace(last, weights={**last.weights, "web": last.weights["web"] + 0.25})
    assert fit_early(runs, SPACE, search_config(), elsewhere).moved == pytest.approx(0.25)
    assert fit_early(planted_runs(20, 0.01, repeats=1), SPACE, search_config(), last).noise is None


def test_a_fit_in_its_own_process_is_the_same_and_is_remembered(tmp_path: Path) -> None:
    runs, path = planted_runs(12, 0.02), tmp_path / "early.json"
    early = EarlyFits(path, SPACE, search_config(), "x")
    assert early.due(distinct(runs)) and not early.due(4) and early.due(5)
    early.start(runs)
    assert not early.due(99)
    found = early.collect(60)
    here = fit_early(runs, SPACE, search_config())
    assert dataclasses.replace(found, time=0.0) == dataclasses.replace(here, time=0.0)
    again = EarlyFits(path, SPACE, search_config(), "x")
    assert again.fits == [found] and not again.due(16) and again.due(17)
    assert EarlyFits(path, SPACE, search_config(), "other trials").fits == []
    assert EarlyFits(path, SPACE, SearchConfig(fit=FitConfig(target="b")), "x").fits == []


def test_a_fit_that_dies_or_cannot_be_made_costs_nothing_but_a_word(tmp_path: Path) -> None:
    early = EarlyFits(tmp_path / "early.json", SPACE, search_config(), "x")
    runs = planted_runs(12, 0.02)
    rows = np.tile(runs.weights, (1000, 1))  # more than a pipe holds: a process that never reads holds nobody up
    early.start(Runs(tuple(range(15_000)), SPACE.domains, rows, {"a": rows[:, 0]}))
    os.kill(early.process.pid, signal.SIGKILL)
    assert early.collect(60) == "its process died" and not early.due(16) and early.due(17)
    early.start(dataclasses.replace(runs, losses={"c": runs.losses["a"]}))
    assert "ValueError" in early.collect(60) and early.fits == [] and not (tmp_path / "early.json").exists()
    early.start(runs)
    early.close()
    assert early.process is None and early.collect() is None


def test_a_settled_search_starts_no_more_proxies_until_it_is_told_to(tmp_path: Path) -> None:
    folder = Folder(tmp_path, count=60)
    ledger = folder.train()
    fits, stopped = read_fits(tmp_path / "early.json")
    done = len(ledger.finished)
    print(done, "of", ledger.counts.total, [fit.line() for fit in fits])
    assert ledger.stopped and stopped is not None and is_precise(fits) and not is_precise(fits[:-1])
    assert fits[-1].runs + 2 < done < 50, "held-back trials are finished too, and one was on its way"
    assert stopped in folder.said.getvalue() and f"early fit: {fits[-1].line()}" in folder.said.getvalue()
    found = loss(np.array(list(fits[-1].weights.values())), 0, 0.0)
    assert found < min(loss(row, 0, 0.0) for row in sample_mixtures(SPACE, 500, 1)) + folder.noise
    before = (tmp_path / "trials.jsonl").read_bytes()
    assert folder.train().stopped and (tmp_path / "trials.jsonl").read_bytes() == before
    all_of_it = Folder(tmp_path, count=60, until_precise=False).train()
    assert not all_of_it.stopped and all_of_it.counts.finished == 65


def test_without_until_precise_fits_are_made_and_nothing_stops(tmp_path: Path) -> None:
    folder = Folder(tmp_path, count=16, until_precise=False)
    assert folder.train().counts.finished == 21
    fits, stopped = read_fits(tmp_path / "early.json")
    assert [fit.mixtures for fit in fits] == [5, 7, 10, 13] and stopped is None
    assert [fit.moved is None for fit in fits] == [True] + 3 * [False]


def test_held_back_losses_have_no_say(tmp_path: Path) -> None:
    """Trials 3 and 4 are held back: with other losses there the fits are the same."""
    found = []
    for name, shift in (("one", 0.0), ("two", 7.0)):
        folder = Folder(tmp_path / name, count=8, until_precise=False)
        ledger = folder.ledger()
        while trial := ledger.ask():
            value = loss(np.array(list(trial.weights.values())), trial.seed, 0.02)
            ledger.tell(trial, {"a": value + shift * (trial.kind == "holdout"), "b": 0.0}, tokens=1)
        with Results(folder.search, ledger, ("a", "b"), Progress("proxies", folder.said)) as current:
            ledger.trials[99] = Trial(99, "train", ledger.trials[9].weights, 0)  # otherwise a fit is not worth it
            current.update()
            found.append(dataclasses.replace(current.early.collect(60), time=0.0))
    assert found[0] == found[1]


def test_until_precise_is_a_setting_that_needs_the_noise_of_a_run() -> None:
    from regmix_search.run import build_parser, read_config

    config = read_config(build_parser().parse_args(["--until-precise"]))
    assert config.proxies.until_precise and not load_search(None).proxies.until_precise
    with pytest.raises(ValueError, match=r"noise of one run, which takes mixtures.repeats of 2 or more \(is 1\)"):
        load_search(None, overrides=("proxies.until_precise=true", "mixtures.repeats=1"))
