"""Epochs as a feature of a surrogate: chosen where runs repeat and repeats are worth less, absent where they do not."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planted_law import NOISE, POWERS, RATES, K, draw

from regmix_search.certainty import refit
from regmix_search.choice import choose
from regmix_search.fits import fit_chosen, fit_targets
from regmix_search.objective import Objective
from regmix_search.repeats import EffectiveRepeats
from regmix_search.study_files import StudyFiles, read_study
from regmix_search.surrogates import from_json, to_json
from regmix_search.tables import Runs, write_losses, write_mixtures

ONCE = np.array([0.05, 0.1, 2.0, 2.0, 2.0])  # a run that takes a fifth of its tokens from domain 0 reads it four times
SATURATION = 1.0
LAWS = ("effective", "power", "effective_repeats")


def truth(weights: np.ndarray, once: np.ndarray = ONCE) -> np.ndarray:
    """The planted law on tokens whose repeats fade."""
    more = np.maximum(weights / once - 1, 0)
    worth = np.minimum(weights, once) + once * SATURATION * (1 - np.exp(-more / SATURATION))
    return 5 - 0.4 * np.log(0.2 + worth**POWERS @ RATES)


def runs(once: np.ndarray | None = ONCE, n: int = 90) -> Runs:
    weights = draw(n, 0)
    losses = truth(weights) + NOISE * np.random.default_rng(1).standard_normal(n)
    return Runs(tuple(range(n)), tuple("abcde"), weights, {"x": losses}, once=once)


def test_the_choice_counts_epochs_where_they_matter_and_finds_how_fast_repeats_fade() -> None:
    found = choose(runs().weights, runs().losses["x"], LAWS, once=ONCE)
    assert found.chosen == "effective_repeats"
    error = {name: scores["rmse"] for name, scores in found.candidates.items()}
    assert error["effective_repeats"] < 1.25 * NOISE < 1.5 * NOISE < min(error["effective"], error["power"])
    law = EffectiveRepeats(ONCE).fit(runs().weights, runs().losses["x"])
    assert SATURATION / 2 < law.saturation < 2 * SATURATION, "the prior says 15.4"


def test_without_repeats_in_the_runs_epochs_are_no_candidate() -> None:
    for once in (None, np.full(K, 1.5)):
        found = choose(runs().weights, runs().losses["x"], LAWS, once=once)
        assert set(found.candidates) == {"effective", "power"}


def test_epochs_move_the_optimum_away_from_what_would_be_repeated_in_vain() -> None:
    fit = fit_targets(runs(), "x", names=LAWS)
    assert fit["targets"]["x"]["chosen"] == "effective_repeats"
    caps, drawn = np.ones(K), draw(20_000, 5)
    best = fit_chosen(runs(), fit, "x").argmin(caps)  # type: ignore[attr-defined]
    blind = fit_chosen(runs(), fit, "x", "power").argmin(caps)  # type: ignore[attr-defined]
    lowest = truth(drawn).min()
    assert truth(best[None])[0] < lowest + 0.002 < truth(blind[None])[0], "nats"


def test_a_fit_knows_its_epochs_after_a_trip_through_json() -> None:
    law = EffectiveRepeats(ONCE).fit(runs().weights, runs().losses["x"])
    again = from_json(to_json(law))
    assert isinstance(again, EffectiveRepeats)
    assert np.array_equal(again.predict(runs().weights), law.predict(runs().weights))
    assert again.argmin(np.ones(K)) == pytest.approx(law.argmin(np.ones(K)))


def test_refits_count_epochs_too() -> None:
    law = EffectiveRepeats(ONCE).fit(runs().weights, runs().losses["x"])
    models = [each.terms[0][1] for each in refit(Objective(((1.0, law),)), {"x": 1.0}, runs(), 0, 3).objectives]
    assert all(0.3 < model.saturation < 4 for model in models)  # type: ignore[attr-defined]


def test_tables_count_epochs_where_the_space_says_how_long_a_run_was(tmp_path: Path) -> None:
    given = runs()
    write_mixtures(tmp_path / "M.csv", given.index, given.domains, given.weights)  # type: ignore[arg-type]
    write_losses(tmp_path / "L.csv", given.index, given.losses)  # type: ignore[arg-type]
    held = dict(zip("edcba", (1000 * ONCE[::-1]).tolist(), strict=True))
    space = {"tokens": held, "target_tokens": 9_000}
    files = StudyFiles(tmp_path / "M.csv", tmp_path / "L.csv", space=tmp_path / "space.json")
    for extra, once in (({}, None), ({"run_tokens": 1000}, ONCE)):
        (tmp_path / "space.json").write_text(json.dumps({**space, **extra}))
        found = read_study(files)[0].once
        assert found is None if once is None else found == pytest.approx(once)
    assert read_study(replace(files, earlier_mixtures=files.mixtures, earlier_losses=files.losses))[0].once is None
    (tmp_path / "space.json").write_text(json.dumps({**space, "run_tokens": "long"}))
    with pytest.raises(ValueError, match="run_tokens 'long'"):
        read_study(files)
