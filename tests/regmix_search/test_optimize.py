"""The optimum: feasible always, best among all mixtures by brute force, and honest about where it stands."""

import json

import numpy as np
import pytest

from regmix_search.fits import fit_targets
from regmix_search.objective import Objective
from regmix_search.optimize import find_optimum, sampled_region
from regmix_search.region import Region
from regmix_search.solver import solve
from regmix_search.space import Space, bound, build_space
from regmix_search.surrogates import SmoothSurrogate, build_surrogate
from regmix_search.tables import Runs

DOMAINS = ("w", "x", "y")
RATES = {"a": [3.0, 1.0, 2.0], "b": [0.2, 2.0, 0.4]}
NOISE = 0.01


def true_loss(weights: np.ndarray, target: str) -> np.ndarray:
    return 5 - 0.5 * np.log(0.2 + np.sqrt(weights) @ RATES[target])


def planted_runs(n: int = 50, seed: int = 0, noise: float = NOISE, strength: float = 0.7) -> Runs:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(3, strength), size=n)
    weights = np.vstack([weights, np.tile(weights[0], (2, 1))])
    losses = {t: true_loss(weights, t) + noise * rng.normal(size=len(weights)) for t in RATES}
    return Runs(tuple(range(len(weights))), DOMAINS, weights, losses)


def space_of(caps: tuple[float, float, float]) -> Space:
    """Token counts that give these caps at one epoch of a million tokens."""
    return build_space({d: round(1e6 * c) for d, c in zip(DOMAINS, caps, strict=True)}, 1_000_000, max_epochs=1)


def box(caps: np.ndarray) -> Region:
    return Region(np.zeros(len(caps)), caps)


def grid(caps: np.ndarray, steps: int = 201) -> np.ndarray:
    axis = np.linspace(0, 1, steps)
    rows = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    rows = np.column_stack([rows, 1 - rows.sum(axis=1)])
    return rows[(rows >= -1e-12).all(axis=1) & (rows <= caps + 1e-12).all(axis=1)].clip(0)


CAPS = [(1.0, 1.0, 1.0), (0.3, 0.9, 0.5), (0.35, 0.4, 0.3), (1.0, 0.05, 0.02)]


@pytest.mark.parametrize("caps", CAPS)
@pytest.mark.parametrize("target", ["a", {"a": 1.0, "b": 2.0}])
def test_the_optimum_beats_a_grid_of_all_mixtures(caps: tuple[float, float, float], target: str | dict) -> None:
    """One target takes the exact path, two take SLSQP; both against 20,000 feasible mixtures of the same objective."""
    runs, space = planted_runs(), space_of(caps)
    fit = fit_targets(runs, target, names=("effective",), repeats=1)
    found = find_optimum(space, runs, fit)
    weights = np.array(list(found["weights"].values()))
    assert abs(weights.sum() - 1) < 1e-12 and np.all(weights <= space.caps + 1e-9) and np.all(weights >= 0)
    shares = {"a": 1.0} if target == "a" else {"a": 1 / 3, "b": 2 / 3}
    models = {t: build_surrogate("effective").fit(runs.weights, runs.losses[t]) for t in shares}
    predicted = sum(s * models[t].predict(grid(space.caps)) for t, s in shares.items())
    assert found["objective"]["predicted"] <= predicted.min() + 1e-6
    assert found["objective"]["predicted"] >= predicted.min() - 1e-3  # a grid of .005 cannot be farther off
    truth = sum(s * true_loss(grid(space.caps), t) for t, s in shares.items())
    here = sum(s * true_loss(weights[None], t)[0] for t, s in shares.items())
    assert here - truth.min() < NOISE, "the law was fitted well enough to find the true optimum"


@pytest.mark.parametrize("seed", range(40))
def test_solutions_obey_caps_sums_and_the_minimum(seed: int) -> None:
    """Random laws, random caps, every kind of path; small weights are gone, not merely small."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(3, 9))
    caps = np.minimum(1, rng.uniform(0.05, 1, k) * (2.0 / k if seed % 2 else 1.0) + (1.02 / k if seed % 3 else 0.3))
    weights = rng.dirichlet(np.full(k, 0.6), size=30)
    losses = [5 - np.log(0.3 + np.sqrt(weights) @ rng.uniform(0, 2, k)) for _ in range(2)]
    names = [("effective",), ("loglinear",), ("linear",), ("effective", "loglinear")][seed % 4]
    terms = [(1 / len(names), build_surrogate(n).fit(weights, y)) for n, y in zip(names, losses, strict=False)]
    minimum = [2e-4, 0.02][seed % 2]
    found = solve(Objective(tuple(terms)), box(caps), bound(np.full(k, 1 / k), caps), weights, minimum)
    assert abs(found.sum() - 1) < 1e-12 and np.all(found <= caps + 1e-9)
    positive = found[found > 0]
    assert positive.min() >= minimum * 0.999 or caps[found >= minimum].sum() < 1


def test_small_weights_stay_where_the_caps_need_them() -> None:
    """Caps that sum to 1 force every domain in: dropping the smallest would leave no mixture."""
    weights = np.random.default_rng(0).dirichlet(np.ones(3), size=20)
    model = build_surrogate("linear").fit(weights, weights @ [1.0, 2.0, 3.0])
    caps = np.array([0.6, 0.399, 0.001])
    found = solve(Objective(((1.0, model),)), box(caps), caps, weights, minimum=0.01)
    np.testing.assert_allclose(found, caps, atol=1e-12)


def test_slsqp_and_the_exact_solution_agree() -> None:
    """The same law twice, half each: several terms take SLSQP, whose answer the exact path must share."""
    runs = planted_runs()
    model = build_surrogate("effective").fit(runs.weights, runs.losses["a"])
    for caps in CAPS:
        space = space_of(caps)
        exact = model.argmin(space.caps)
        found = solve(Objective(((0.5, model), (0.5, model))), box(space.caps), space.prior, runs.weights, minimum=0)
        np.testing.assert_allclose(found, exact, atol=2e-4)
        assert model.predict(found[None])[0] == pytest.approx(model.predict(exact[None])[0], abs=1e-7)


@pytest.mark.parametrize("caps", CAPS[1:3])
def test_trees_are_simulated_and_stay_under_the_caps(caps: tuple[float, float, float]) -> None:
    runs, space = planted_runs(n=150), space_of(caps)
    model = build_surrogate("lightgbm").fit(runs.weights, runs.losses["a"])
    objective = Objective(((1.0, model),))
    found = solve(objective, box(space.caps), space.prior, runs.weights, seed=0)
    assert abs(found.sum() - 1) < 1e-12 and np.all(found <= space.caps + 1e-9)
    best = objective.predict(grid(space.caps, 101)).min()
    assert objective.at(found) - best < 0.01
    np.testing.assert_array_equal(found, solve(objective, box(space.caps), space.prior, runs.weights, seed=0))


class Slopeless:
    """A law that hides its slopes and its exact solution, so that only simulation is left."""

    name = "effective"

    def __init__(self, law: SmoothSurrogate) -> None:
        self.law = law

    def fit(self, weights: np.ndarray, losses: np.ndarray, seed: int = 0) -> "Slopeless":
        return Slopeless(self.law.fit(weights, losses, seed))

    def predict(self, weights: np.ndarray) -> np.ndarray:
        return self.law.predict(weights)


@pytest.mark.parametrize("seed", range(4))
def test_simulation_comes_near_the_exact_optimum_of_ten_domains(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(10, 0.5), size=60)
    losses = 5 - np.log(0.3 + np.sqrt(weights) @ rng.uniform(0, 2, 10))
    law = build_surrogate("effective").fit(weights, losses)
    assert isinstance(law, SmoothSurrogate)
    caps = np.minimum(1, rng.uniform(0.1, 0.6, 10))
    exact = law.predict(law.argmin(caps)[None])[0]
    objective = Objective(((1.0, Slopeless(law)),))
    found = solve(objective, box(caps), bound(rng.dirichlet(np.ones(10)) + 0.01, caps), weights)
    assert np.all(found <= caps + 1e-9)
    assert exact - 1e-9 <= objective.at(found) < exact + 0.01 * np.std(losses)


def test_optimum_json_has_its_promised_form() -> None:
    runs, space = planted_runs(), space_of((0.3, 0.9, 0.8))
    fit = json.loads(json.dumps(fit_targets(runs, "a", names=("effective", "linear"), seed=2)))
    found = find_optimum(space, runs, fit, seed=2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found == find_optimum(space, runs, fit, seed=2)
    assert found["target"] == "a" and set(found["predicted"]) == set(found["prior_predicted"]) == {"a", "b"}
    assert found["caps"] == pytest.approx({"w": 0.3, "x": 0.9, "y": 0.8})
    assert found["at_cap"] == ["w"] and found["epochs"]["w"] == pytest.approx(1.0)
    assert found["epochs"]["x"] == pytest.approx(found["weights"]["x"] / 0.9)
    assert found["predicted"]["a"] == found["objective"]["predicted"] < found["prior_predicted"]["a"]
    assert found["unconstrained"]["predicted"] < found["predicted"]["a"]
    assert found["unconstrained"]["weights"]["w"] > 0.3
    low, high = found["interval90"]
    assert low < found["predicted"]["a"] < high and high - low < 12 * NOISE
    assert set(found["second_opinion"]) == {"effective", "linear"}
    assert any("w at the cap" in w for w in found["warnings"])


def test_the_best_observed_run_obeys_the_caps() -> None:
    runs, space = planted_runs(), space_of((0.3, 0.9, 0.5))
    fit = fit_targets(runs, "a", names=("linear",))
    seen = find_optimum(space, runs, fit)["best_observed"]
    feasible = [i for i in runs.index if np.all(runs.weights[i] <= space.caps)]
    assert seen["index"] == min(feasible, key=lambda i: runs.losses["a"][i]) and seen["obeys_caps"]
    assert seen["loss"] == runs.losses["a"][seen["index"]]
    assert list(seen["weights"].values()) == runs.weights[seen["index"]].tolist()
    few = runs.select(range(9))
    tight = find_optimum(space_of((0.34, 0.34, 0.34)), few, fit_targets(few, "a", names=("linear",)))
    assert not tight["best_observed"]["obeys_caps"]


def test_a_domain_that_no_run_used_gets_no_weight() -> None:
    runs = planted_runs()
    weights = np.hstack([runs.weights, np.zeros((len(runs.index), 1))])
    wider = Runs(runs.index, (*DOMAINS, "new"), weights, runs.losses)
    space = build_space(dict.fromkeys(wider.domains, 1_000_000), 1_000_000, max_epochs=1)
    found = find_optimum(space, wider, fit_targets(wider, "a", names=("effective",), fixed=("new",)))
    assert found["weights"]["new"] == 0 and found["unconstrained"]["weights"]["new"] == 0


def test_an_optimum_outside_the_runs_says_so() -> None:
    """All runs near the centre, the optimum of a linear law in a corner."""
    weights = np.random.default_rng(0).dirichlet(np.full(3, 60.0), size=40)
    runs = Runs(tuple(range(40)), DOMAINS, weights, {"a": weights @ [1.0, 2.0, 3.0]})
    found = find_optimum(space_of((1.0, 1.0, 1.0)), runs, fit_targets(runs, "a", names=("linear",)))
    assert found["weights"]["w"] == 1 and not found["inside_sampled_region"]
    assert found["distance"] > found["usual_distance"]
    assert any("outside the sampled region (w had at most 0." in w for w in found["warnings"])


def test_sampled_region_by_hand() -> None:
    sample = np.array([[0.0, 1.0], [0.2, 0.8], [0.4, 0.6], [0.4, 0.6]])
    nearest, usual, beyond = sampled_region(np.array([0.3, 0.7]), sample)
    assert nearest == pytest.approx(0.2) and usual == pytest.approx(0.4) and beyond == []
    nearest, _, beyond = sampled_region(np.array([0.5, 0.5]), sample)
    assert nearest == pytest.approx(0.2) and beyond == [0]  # near enough, but heavier there than any run


def test_no_gain_is_said_in_words() -> None:
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(3), size=40)
    runs = Runs(tuple(range(40)), DOMAINS, weights, {"a": 5 + 0.1 * rng.normal(size=40)})
    found = find_optimum(space_of((1.0, 1.0, 1.0)), runs, fit_targets(runs, "a", names=("effective", "linear")))
    assert any("no significant gain" in w for w in found["warnings"])
    assert any("mean" in w or "noise" in w for w in found["warnings"])
    clear = planted_runs()
    fit = fit_targets(clear, "a", names=("effective",))
    wide = find_optimum(build_space({"w": 10**6, "x": 10**9, "y": 10**6}, 10**6, max_epochs=1), clear, fit)
    assert not any("no significant gain" in w for w in wide["warnings"])


@pytest.mark.slow
def test_the_interval_covers_the_loss_of_a_new_run() -> None:
    """Searches with fresh noise: the run at the optimum falls into the 90 % interval about that often."""
    space, inside = space_of((1.0, 1.0, 1.0)), []
    for seed in range(25):
        runs = planted_runs(n=24, seed=seed, noise=0.05)
        found = find_optimum(space, runs, fit_targets(runs, "a", targets=["a"], names=("effective",), repeats=1))
        weights = np.array(list(found["weights"].values()))
        loss = true_loss(weights[None], "a")[0] + 0.05 * np.random.default_rng([seed, 7]).normal()
        inside.append(found["interval90"][0] <= loss <= found["interval90"][1])
    assert 0.8 <= np.mean(inside) <= 1.0, np.mean(inside)


def test_domains_in_another_order_are_refused() -> None:
    runs = planted_runs()
    space = build_space({"x": 1, "w": 1, "y": 1}, 1, max_epochs=1)
    with pytest.raises(ValueError, match="same names and order"):
        find_optimum(space, runs, fit_targets(runs, "a", names=("linear",)))
