"""Intervals, near-ties and gains: known truth, noise that hides it, and figures worked out by hand."""

import json

import numpy as np
import pytest

from regmix_search import certainty
from regmix_search.config import OptimumConfig
from regmix_search.fits import fit_targets
from regmix_search.goals import Goal
from regmix_search.objective import Objective
from regmix_search.optimize import find_optimum
from regmix_search.region import Region
from regmix_search.space import FloatArray, Space, build_space
from regmix_search.surrogates import build_surrogate
from regmix_search.tables import Runs

DOMAINS = ("w", "x", "y")
RATES = {"a": [3.0, 1.0, 2.0], "b": [0.2, 2.0, 0.4]}


def true_loss(weights: FloatArray, target: str) -> FloatArray:
    return np.asarray(5 - 0.5 * np.log(0.2 + np.sqrt(weights) @ RATES[target]))


def make_runs(n: int, seed: int, noise: float) -> Runs:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(3, 0.7), size=n)
    losses = {t: true_loss(weights, t) + noise * rng.normal(size=n) for t in RATES}
    return Runs(tuple(range(n)), DOMAINS, weights, losses)


def space(**tokens: int) -> Space:
    return build_space({d: tokens.get(d, 10**6) for d in DOMAINS}, 10**6, max_epochs=1)


def search(noise: float = 0.01, n: int = 40, seed: int = 0, target: str = "a", **settings) -> dict:
    runs = make_runs(n, seed, noise)
    fit = fit_targets(runs, target, names=("effective",), repeats=1)
    return find_optimum(space(), runs, fit, settings=OptimumConfig(**settings))


def test_less_noise_leaves_fewer_ties_and_narrower_weights() -> None:
    found = [search(noise, bootstraps=20) for noise in (0.002, 0.05)]
    widths = [[high - low for low, high in f["weights_interval90"].values()] for f in found]
    assert max(widths[0]) < 0.5 * max(widths[1])
    assert found[0]["near_ties"]["farthest"] < 0.5 * found[1]["near_ties"]["farthest"]
    for f in found:
        for domain, (low, high) in f["near_ties"]["weights"].items():
            assert low - 1e-12 <= f["weights"][domain] <= high + 1e-12
        assert 0 < f["near_ties"]["found"] < f["near_ties"]["looked_at"]
        assert json.loads(json.dumps(f, allow_nan=False)) == f


@pytest.mark.slow
def test_the_true_optimum_is_inside_the_interval_of_the_weights() -> None:
    """By fresh noise, for each weight about nine times in ten; small samples make bootstraps a little too sure."""
    grid = np.random.default_rng(0).dirichlet(np.ones(3), size=200_000)
    best = grid[np.argmin(true_loss(grid, "a"))]
    inside = []
    for seed in range(15):
        found = search(0.02, 60, seed)
        pairs = zip(best, found["weights_interval90"].values(), strict=True)
        inside.append(np.mean([low - 0.01 <= w <= high + 0.01 for w, (low, high) in pairs]))
    assert np.mean(inside) >= 0.75, np.mean(inside)


def test_a_gain_is_found_and_is_the_true_one() -> None:
    found = search(0.005, target="b")
    prior, weights = np.full(3, 1 / 3), np.array(list(found["weights"].values()))
    truth = float(true_loss(prior[None], "b")[0] - true_loss(weights[None], "b")[0])
    low, high = found["gain"]["interval90"]
    assert found["gain"]["significant"] and low - 0.01 < truth < high + 0.01 and truth > 0.05
    controls = found["controls"]
    names = {"prior", "natural", "uniform", "unimax", "tempered", "best_observed", "unconstrained"}
    assert set(controls) == names
    assert not controls["prior"]["ties_with_optimum"] and controls["prior"]["obeys_bounds"]
    assert controls["prior"]["predicted"] == pytest.approx(found["objective"]["prior"])


def test_tokens_saved_by_hand() -> None:
    """2085.43 * 1e9 ** -0.3658 = 1.0635 nats are left to gain at 1e9 tokens; 0.2 of them is 37.9 % of the tokens."""
    found = certainty.tokens_saved(0.2, 10**9)
    term = 2085.43 * 1e9**-0.3658
    assert found["share"] == pytest.approx(1 - (1 + 0.2 / term) ** (-1 / 0.3658)) and 0.35 < found["share"] < 0.40
    tokens = 1e9 * (1 - found["share"])
    assert 2085.43 * tokens**-0.3658 - term == pytest.approx(0.2), "so many tokens fewer end at a loss 0.2 higher"
    assert certainty.tokens_saved(0.0, 10**9)["share"] == 0 and certainty.tokens_saved(0.1, None)["share"] is None
    assert certainty.tokens_saved(-0.1, 10**9)["share"] < 0


def test_tokens_saved_are_read_off_the_priors_own_curves() -> None:
    """4.6 at 100 tokens, 4.4 at 200, 4.2 at 400: halving the tokens costs .2 nats, a quarter as many .4."""
    goal, other = Goal({"a": 0.5, "b": 0.5}), {"kind": "train", "curve": [{"tokens": 100, "losses": {"a": 9, "b": 9}}]}
    curve = [{"tokens": t, "losses": {"a": at - 0.1, "b": at + 0.1}} for t, at in ((100, 4.6), (200, 4.4), (400, 4.2))]
    ended = {"kind": "repeat", "curve": curve[:1], "stopped": curve[0]}
    found = certainty.prior_curve([{"kind": "repeat", "curve": curve}] * 2 + [other, ended, {"kind": "repeat"}], goal)
    assert found == [(100, pytest.approx(4.6)), (200, pytest.approx(4.4)), (400, pytest.approx(4.2))]
    saved = {gain: certainty.tokens_saved(gain, 10**9, found) for gain in (0.0, 0.1, 0.2, 0.4, 1.0)}
    shares = [entry["share"] for entry in saved.values()]
    assert shares == pytest.approx([0, 1 - 2**-0.5, 0.5, 0.75, 0.75])
    assert saved[0.1]["of_tokens"] == 400 and "learning curves" in saved[0.1]["why"]
    assert "at least" in saved[1.0]["why"] and "at least" not in saved[0.4]["why"]
    assert "Chinchilla" in certainty.tokens_saved(-0.1, 10**9, found)["why"], "a loss of ground is not on the curve"


def test_without_refits_there_are_no_intervals_of_weights() -> None:
    found = search(bootstraps=0)
    assert found["weights_interval90"] == {} and found["gain"]["interval90"] == [None, None]
    assert found["interval90"][0] < found["objective"]["predicted"] < found["interval90"][1]


@pytest.mark.parametrize("name", ["effective", "lightgbm"])
def test_refits_solve_themselves_with_and_without_slopes(name: str) -> None:
    runs = make_runs(60, 0, 0.01)
    objective = Objective(((1.0, build_surrogate(name).fit(runs.weights, runs.losses["a"])),))
    region = Region(np.zeros(3), np.array([0.4, 1.0, 1.0]))
    refits = certainty.refit(objective, {"a": 1.0}, runs, 0, 4)
    near = certainty.candidates(region, np.array([0.4, 0.3, 0.3]), 0)
    again = certainty.solve_again(refits, region, np.full(3, 1 / 3), near, 0)
    assert again.shape == (4, 3) and all(region.holds(row) for row in [*again, *near])
    values = [o.at(w) - o.predict(near).min() for o, w in zip(refits.objectives, again, strict=True)]
    assert max(values) < (0.001 if name == "effective" else 0.04)  # the mean of 32 mixtures on a staircase


def test_bounds_kl_ceilings_and_the_front_reach_the_result() -> None:
    plain, fixed = search(bootstraps=1), search(bootstraps=1, bounds=("w=0.2", "x+y=..0.8"))
    assert fixed["weights"]["w"] == pytest.approx(0.2) and plain["weights"]["w"] > 0.25
    assert fixed["controls"]["unimax"]["obeys_bounds"] and not fixed["controls"]["uniform"]["obeys_bounds"]
    pulled = search(kl=1.0, bootstraps=1)
    assert abs(pulled["weights"]["w"] - 1 / 3) < abs(plain["weights"]["w"] - 1 / 3)
    assert plain["predicted"]["b"] > plain["prior_predicted"]["b"] + 0.02, "or the next line tests nothing"
    kept = search(max_worse=0.01, bootstraps=1)
    assert kept["predicted"]["b"] <= kept["prior_predicted"]["b"] + 0.01 + 1e-6
    assert kept["predicted"]["a"] < kept["prior_predicted"]["a"]
    assert "pareto" not in plain
    runs = make_runs(40, 0, 0.01)
    fit = fit_targets(runs, {"a": 1, "b": 1}, names=("effective",), repeats=1)
    both = find_optimum(space(), runs, fit, settings=OptimumConfig(pareto=6, bootstraps=2))
    assert len(both["pareto"]) >= 4 and set(both["pareto"][0]["weights"]) == set(DOMAINS)
    worst = find_optimum(space(), runs, {**fit, "target": "worst"}, settings=OptimumConfig(bootstraps=2))
    assert worst["target"] == "worst"
    assert max(worst["predicted"].values()) <= max(both["predicted"].values()) + 1e-9


def test_simulation_as_in_regmix_is_an_option() -> None:
    found = search(method="simulate", samples=20_000, top=20, bootstraps=2)
    exact = search(bootstraps=2)
    gap = found["objective"]["predicted"] - exact["objective"]["predicted"]
    assert found["method"] == "simulate" and 0 <= gap < 0.02


def test_a_rival_that_prefers_another_mixture_makes_it_a_tie() -> None:
    """Refits share one form; a surrogate of another form that predicts as well has a say too."""
    runs = make_runs(40, 0, 0.002)
    model, other = (build_surrogate("effective").fit(runs.weights, runs.losses[t]) for t in "ab")
    objective, rival = Objective(((1.0, model),)), Objective(((1.0, other),))
    refits = certainty.refit(objective, {"a": 1.0}, runs, 0, 8)
    optimum, far = model.argmin(np.ones(3)), other.argmin(np.ones(3))  # type: ignore[attr-defined]
    assert not certainty.tied(refits, far[None], optimum)[0]
    assert certainty.tied(certainty.Refits(refits.objectives, (rival,)), far[None], optimum)[0]
