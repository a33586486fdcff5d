"""Adaptive rounds on a search's folder, with losses from a formula instead of proxies."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regmix_search import rounds, stages
from regmix_search.config import FitConfig, MixturesConfig, SearchConfig
from regmix_search.ledger import Ledger
from regmix_search.search import Search
from regmix_search.space import build_space, controls, sample_mixtures
from regmix_search.tables import read_mixtures, write_losses, write_mixtures

SPACE = build_space({"web": 600, "code": 300, "math": 200}, 1000, max_epochs=4)


def loss(weights: np.ndarray, seed: int, noise: float) -> float:
    value = 5 - 0.5 * np.log(0.2 + np.sqrt(weights) @ [3.0, 1.0, 2.0])
    return float(value + noise * np.random.default_rng([seed, *(weights * 1e6).astype(int)]).normal())


class Folder:
    """A search of 2 repeats, 3 held back and 10 to fit on, before its rounds."""

    def __init__(self, out: Path, noise: float, **settings: Any) -> None:
        self.noise, self.out = noise, out
        mixtures = MixturesConfig(count=10, holdout=3, repeats=2, batch=4, **{"rounds": 3, **settings})
        config = SearchConfig(out_dir=str(out), mixtures=mixtures, fit=FitConfig(target="a"))
        self.search = Search(config, io.StringIO())
        rows = np.vstack([np.tile(controls(SPACE)["prior"], (2, 1)), sample_mixtures(SPACE, 13, 0)])
        write_mixtures(out / "mixtures.csv", range(15), SPACE.domains, rows)
        (out / "space.json").write_text(json.dumps(SPACE.to_json()))

    def train(self) -> None:
        """Every trial that mixtures.csv asks for, with a loss from the formula."""
        ledger = Ledger(self.out / "trials.jsonl", stages.plan_trials(self.search), {})
        while trial := ledger.ask():
            ledger.tell(trial, {"a": loss(np.array(list(trial.weights.values())), trial.seed, self.noise)}, tokens=1)
        done = dict(sorted(ledger.finished.items()))
        write_losses(self.out / "losses.csv", list(done), {"a": [e["losses"]["a"] for e in done.values()]})

    def best(self) -> float:
        _, _, rows = read_mixtures(self.out / "mixtures.csv")
        return min(loss(row, 0, 0.0) for row in rows)

    def history(self) -> dict[str, Any]:
        return json.loads((self.out / "rounds.json").read_text())


def run_all(folder: Folder) -> list[str]:
    said = []
    while True:
        folder.train()
        text, grown = rounds.add_round(folder.search)
        said.append(text)
        if not grown:
            return said


def test_rounds_end_at_their_number_and_find_better_mixtures(tmp_path: Path) -> None:
    folder = Folder(tmp_path, noise=1e-5)
    before = folder.best()
    said = run_all(folder)
    assert said[0].startswith("round 1 of 3: 4 mixtures") and said[-1].startswith("no further round: 3 rounds done")
    index, _, rows = read_mixtures(tmp_path / "mixtures.csv")
    assert len(index) == 15 + 12 and folder.best() < before
    assert np.all(rows <= SPACE.caps + 1e-9) and len(np.unique(rows.round(9), axis=0)) == 26
    kinds = [trial.kind for trial in stages.plan_trials(folder.search)]
    assert kinds == ["repeat"] * 2 + ["holdout"] * 3 + ["train"] * 22
    history = folder.history()
    assert [entry["round"] for entry in history["rounds"]] == [1, 2, 3] and "3 rounds done" in history["stopped"]


def test_rounds_end_when_the_gain_is_below_the_noise_twice_running(tmp_path: Path) -> None:
    folder = Folder(tmp_path, noise=0.5, rounds=9)
    said = run_all(folder)
    assert "is below the noise of one run" in said[-1] and "2 rounds running" in said[-1]
    last = folder.history()["rounds"]
    assert len(last) < 9 and last[-1]["expected_gain"] < last[-1]["noise"]


def test_one_round_of_small_gain_does_not_end_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A surrogate of few runs may be too sure: the gain must be below the noise twice running."""
    gains, folder = iter([0.001, 9.0, 0.001, 0.001]), Folder(tmp_path, noise=0.5, rounds=9)

    def stub(fitted: Any, pool: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(count) + 4 * len(fitted.losses), np.full(count, next(gains))

    monkeypatch.setattr(rounds, "propose_rows", stub)
    assert "2 rounds running" in run_all(folder)[-1]
    assert [entry["expected_gain"] for entry in folder.history()["rounds"]] == [0.001, 9.0, 0.001]


def test_rounds_end_with_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """15 proxies of 2 FLOPs and a round of 4 are 38; two rounds would be 46."""
    folder = Folder(tmp_path, noise=1e-5, max_flops=45.0)
    monkeypatch.setattr("regmix_search.budget.resolve", lambda *_: type("Plan", (), {"total_flops": 2}))
    monkeypatch.setattr("regmix_search.budget.vocabulary", lambda *_: 1)
    monkeypatch.setattr(Search, "inventory", None)
    said = run_all(folder)
    assert len(said) == 2 and "46 FLOPs in all, mixtures.max_flops is 45" in said[-1]


def test_an_interrupted_round_is_trained_and_not_proposed_again(tmp_path: Path) -> None:
    folder = Folder(tmp_path, noise=1e-5)
    folder.train()
    rounds.add_round(folder.search)
    once = (tmp_path / "mixtures.csv").read_bytes()
    folder.train()  # the next command begins with this
    assert len(stages.plan_trials(folder.search)) == 19
    assert rounds.add_round(folder.search)[0].startswith("round 2 of 3")
    assert (tmp_path / "mixtures.csv").read_bytes().startswith(once)
    rows = read_mixtures(tmp_path / "mixtures.csv")[2]
    assert len(rows) == 23 and rounds.continues(tmp_path / "mixtures.csv", SPACE.domains, rows[:15])
    assert not rounds.continues(tmp_path / "mixtures.csv", SPACE.domains, rows[:15][::-1])
    assert not rounds.continues(tmp_path / "none.csv", SPACE.domains, rows)


def test_held_back_mixtures_have_no_say(tmp_path: Path) -> None:
    """The same proposals when the losses of what is held back are others."""
    found = []
    for name, shift in (("a", 0.0), ("b", 3.0)):
        folder = Folder(tmp_path / name, noise=1e-5) if (tmp_path / name).mkdir() is None else None
        assert folder is not None
        folder.train()
        text = (tmp_path / name / "losses.csv").read_text().splitlines()
        for line in (3, 4, 5):
            index, value = text[line].split(",")
            text[line] = f"{index},{float(value) - shift}"
        (tmp_path / name / "losses.csv").write_text("\n".join(text) + "\n")
        rounds.add_round(folder.search)
        found.append((tmp_path / name / "mixtures.csv").read_text())
    assert found[0] == found[1]


def test_a_search_may_be_given_more_rounds() -> None:
    """Rounds, batch and budget are no part of what makes losses comparable; how mixtures are drawn is."""
    config = SearchConfig()
    changed = dataclasses.replace(
        config, mixtures=dataclasses.replace(config.mixtures, rounds=2, batch=3, max_flops=9.0)
    )
    assert stages.settings(config) == stages.settings(changed)
    drawn = dataclasses.replace(config, mixtures=dataclasses.replace(config.mixtures, design="maximin"))
    assert stages.settings(config) != stages.settings(drawn)
