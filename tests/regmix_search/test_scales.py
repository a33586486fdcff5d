"""Scale transfer: ranks compared between sizes, the law over weights, size and tokens, and when not to trust it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from finished_search import make_search
from scipy.optimize import approx_fprime

from regmix_search import run as cli
from regmix_search.goals import Goal
from regmix_search.region import build_region
from regmix_search.repeats import EffectiveRepeats
from regmix_search.report import write_report
from regmix_search.scale_files import Scale, align, read_scale
from regmix_search.scale_law import FORMS, Sample, ScaleLaw, Size
from regmix_search.scale_stage import study_scales
from regmix_search.scales import TRUSTED, compare, doubts, fit_scales
from regmix_search.space import build_space, unlimited_space
from regmix_search.tables import Runs, write_losses, write_mixtures

K, NOISE = 5, 0.01
DOMAINS = tuple(f"d{i}" for i in range(K))
SMALL, MIDDLE, LARGE, TARGET = (Size(10.0**n, 20 * 10.0**n) for n in (6, 6.8, 7.5, 8.2))
SIZES = (SMALL, MIDDLE, LARGE)
GOAL = Goal({"a": 1.0})


def true_loss(weights, size, slope=0.0, drift=0.0, repeats=None):
    """Chinchilla's terms beside a law of effective data, whose swing and rates may change with compute."""
    compute = np.log(size.flops / LARGE.flops)
    if repeats is not None and size.once is not None:
        more = np.maximum(weights / size.once - 1, 0)
        weights = np.minimum(weights, size.once) + size.once * repeats * (1 - np.exp(-more / repeats))
    rates = np.array([3.0, 1.5, 0.8, 0.3, 0.1]) * np.exp(drift * compute * np.array([-1, 1, 0, 1, -1]))
    mixed = -0.5 * np.log(0.3 + np.sqrt(weights) @ rates)
    return 1.7 + 300 / size.params**0.34 + 300 / size.tokens**0.28 + np.exp(slope * compute) * mixed


def draw(size, n, seed, noise=NOISE, **truth):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(K, 0.7), size=n)
    return Sample(size, weights, true_loss(weights, size, **truth) + noise * rng.standard_normal(n))


def as_scale(name, sample, other=0.0):
    losses = {"a": sample.losses, "b": sample.losses[::-1] + other}
    return Scale(name, sample.size, Runs(tuple(range(len(sample.losses))), DOMAINS, sample.weights, losses))


def test_slopes_of_the_laws_are_their_differences():
    rng = np.random.default_rng(0)
    once = Size(1e6, 1e6, tuple(rng.uniform(5e4, 4e5, K)))
    weights = rng.dirichlet(np.ones(K), size=3)
    law = EffectiveRepeats(once.once)
    params = 0.5 * rng.standard_normal(4 + 2 * K + law.SHAPE)
    for row in range(3):
        near = approx_fprime(params, lambda p, r=row: law.standard(p, weights)[r], 1e-6)
        assert law.slopes(params, weights)[row] == pytest.approx(near, abs=2e-4)
    whole = ScaleLaw("drift").fit(
        [draw(SMALL, 20, 0), replace(draw(LARGE, 20, 1), size=replace(LARGE, held=once.held))]
    )
    params = whole.posterior.params + 0.2 * rng.standard_normal(len(whole.posterior.params))
    sample = Sample(Size(3e6, 5e6, once.held), weights, np.zeros(3))
    for row in range(3):
        near = approx_fprime(params, lambda p, r=row: whole._losses(p, sample)[r], 1e-6)
        assert whole._slopes(params, sample)[row] == pytest.approx(near, abs=2e-4)
    fitted = whole.at(sample.size)
    near = approx_fprime(weights[0], lambda w: fitted.predict(w[None])[0], 1e-7)
    assert fitted.gradient(weights[:1])[0] == pytest.approx(near, rel=1e-3, abs=1e-4)


def test_the_optimum_of_the_law_with_repeats_is_the_lowest_under_caps():
    size = Size(1e6, 1e6, (3e4, 2e5, 1e6, 1e5, 1e6))
    sample = draw(size, 80, 3, repeats=1.0)
    law = EffectiveRepeats(size.once).fit(sample.weights, sample.losses)
    rng = np.random.default_rng(0)
    for caps in (np.ones(K), np.array([0.1, 0.3, 0.5, 0.4, 1.0])):
        best = law.argmin(caps)
        assert best.sum() == pytest.approx(1) and (best <= caps + 1e-9).all() and (best >= 0).all()
        drawn = rng.dirichlet(np.ones(K), size=4000)
        near = np.clip(best + 0.02 * rng.standard_normal((4000, K)), 0, caps)
        drawn = np.vstack([drawn[(drawn <= caps).all(axis=1)], near / near.sum(axis=1, keepdims=True)])
        drawn = drawn[(drawn <= caps + 1e-9).all(axis=1)]
        assert law.predict(best[None])[0] <= law.predict(drawn).min() + 1e-6


@pytest.mark.parametrize("seed", range(2))
def test_an_unseen_size_is_inside_its_interval_and_its_mixtures_in_order(seed):
    fitted = fit_scales([draw(size, n, 10 * seed + n, slope=0.03) for size, n in zip(SIZES, (60, 30, 15), strict=True)])
    unseen = draw(TARGET, 50, 99, noise=0.0, slope=0.03)
    law = fitted.law.at(TARGET)
    errors = law.predict(unseen.weights) - unseen.losses
    assert np.mean(np.abs(errors) <= fitted.factor * law.deviation(unseen.weights)) >= 0.9
    assert np.sqrt(np.mean(errors**2)) < 0.05, "nats, at 25 times the compute of the largest"
    assert np.std(errors) < 0.02, "differences between mixtures are known better than their level"
    alone = EffectiveRepeats().fit(
        *[getattr(draw(LARGE, 15, 10 * seed + 15, slope=0.03), k) for k in ("weights", "losses")]
    )
    here = draw(LARGE, 50, 98, noise=0.0, slope=0.03)
    together = fitted.law.at(LARGE).predict(here.weights) - here.losses
    assert np.std(together) < 0.7 * np.std(alone.predict(here.weights) - here.losses), "small runs taught nothing"


@pytest.mark.parametrize(
    ("form", "truth"), [("amplitude", {}), ("amplitude", {"slope": 0.12}), ("drift", {"drift": 0.15})]
)
def test_cross_validation_finds_the_form_that_the_runs_need(form, truth):
    fitted = fit_scales([draw(SMALL, 80, 1, **truth), draw(LARGE, 60, 2, **truth)])
    assert fitted.form == form, fitted.rmse
    assert set(fitted.rmse) == set(FORMS) and fitted.rmse[form] < 2 * NOISE
    assert (fitted.rmse["additive"] > 2 * fitted.rmse[form]) == bool(truth)


def test_a_mixture_left_out_is_left_out_at_every_size():
    small = draw(SMALL, 24, 3, noise=0.1)
    shift = true_loss(small.weights, LARGE) - true_loss(small.weights, SMALL)
    fitted = fit_scales([small, Sample(LARGE, small.weights, small.losses + shift)])
    assert min(fitted.rmse.values()) > 0.09, "nats; both sizes have the same noise of .1, which nobody can predict"


def test_domains_in_another_order_are_the_same_domains():
    small = draw(SMALL, 40, 1)
    large = as_scale("l", replace(draw(LARGE, 40, 1), size=replace(LARGE, held=(1.0, 2.0, 3.0, 4.0, 5.0))))
    order = [3, 0, 4, 1, 2]
    runs = Runs(large.runs.index, tuple(DOMAINS[i] for i in order), large.runs.weights[:, order], large.runs.losses)
    moved = Scale("l", replace(large.size, held=tuple(large.size.held[i] for i in order)), runs)
    aligned = align([as_scale("s", small), moved])[1]
    assert aligned.runs.domains == DOMAINS and aligned.size.held == large.size.held
    assert np.array_equal(aligned.runs.weights, large.runs.weights)
    with pytest.raises(ValueError, match="domains d4, other"):
        align([as_scale("s", small), Scale("l", LARGE, replace(runs, domains=("d3", "d0", "other", "d1", "d2")))])


def test_what_size_does_is_not_known_from_one_size_and_the_interval_says_so():
    one = fit_scales([draw(LARGE, 60, 0)])
    three = fit_scales([draw(size, 60, seed) for seed, size in enumerate(SIZES)])
    at = draw(TARGET, 5, 2).weights
    here, there = (one.law.at(size).deviation(at).max() for size in (LARGE, TARGET))
    assert here < 0.03 and there > 10 * here
    assert there > 2 * three.law.at(TARGET).deviation(at).max()


def test_repeats_are_learned_from_runs_of_two_lengths():
    held = (2e5, 1e6, 4e6, 4e6, 4e6)
    short, long = Size(1e6, 1e6, held), Size(1e6, 16e6, held)
    given = [draw(short, 60, 1, repeats=2.0), draw(long, 40, 2, repeats=2.0)]
    unseen = draw(long, 200, 3, noise=0.0, repeats=2.0)
    blind = [Sample(replace(s.size, held=None), s.weights, s.losses) for s in given]
    known, unknown = ScaleLaw("additive").fit(given).at(long), ScaleLaw("additive").fit(blind).at(blind[1].size)
    assert 0.7 < known.saturation < 6, "R* of 2 was planted, the prior says 15.4"
    rmse, worse = (np.sqrt(np.mean((law.predict(unseen.weights) - unseen.losses) ** 2)) for law in (known, unknown))
    assert rmse < 0.5 * worse and rmse < 0.02
    assert known.argmin(np.ones(K))[0] < unknown.argmin(np.ones(K))[0], "the scarce domain is not worth repeating"


def test_a_study_counts_epochs_where_the_space_knows_tokens():
    held = (2e5, 1e6, 4e6, 4e6, 4e6)
    short, long = Size(1e6, 1e6, held), Size(1e6, 16e6, held)
    given = [draw(short, 60, 1, repeats=2.0), draw(long, 40, 2, repeats=2.0)]
    sizes = [as_scale(n, replace(s, size=replace(s.size, held=None))) for n, s in zip("sl", given, strict=True)]
    tokens = build_space(dict(zip(DOMAINS, map(int, held), strict=True)), int(long.tokens), None)
    known, unknown = (
        study_scales(sizes, "a", long, space)["at_target"] for space in (tokens, unlimited_space(DOMAINS))
    )
    best, blind = (true_loss(np.array([list(at["weights"].values())]), long, repeats=2.0)[0] for at in (known, unknown))
    assert best < blind - 0.003, "nats"


def test_ranks_are_compared_on_shared_mixtures_with_repeats_averaged():
    small, large = draw(SMALL, 60, 1), draw(LARGE, 60, 1, noise=0.04)
    found = compare(as_scale("s", small), as_scale("l", large), GOAL)
    assert found["shared"] == found["mixtures"] == 60
    assert found["interval90"][0] < found["spearman"] < found["interval90"][1] and found["spearman"] > 0.95
    twice = np.concatenate([large.losses[:30] + 0.5, large.losses[30:], large.losses[:30] - 0.5])
    doubled = Sample(LARGE, np.vstack([large.weights, large.weights[:30]]), twice)
    again = compare(as_scale("s", small), as_scale("l", doubled), GOAL)
    assert again["shared"] == 60 and again["spearman"] == pytest.approx(found["spearman"])
    reversed_ = compare(as_scale("s", small), as_scale("l", replace(large, losses=-large.losses)), GOAL)
    assert reversed_["spearman"] == pytest.approx(-found["spearman"], abs=1e-9)


def test_without_shared_mixtures_the_smaller_sizes_law_stands_in_and_few_runs_say_nothing():
    small, large = as_scale("s", draw(SMALL, 80, 1)), as_scale("l", draw(LARGE, 30, 2))
    found = compare(small, large, GOAL)
    assert found["shared"] == 0 and found["mixtures"] == 30 and found["spearman"] > 0.95
    few = as_scale("l", draw(LARGE, 5, 2))
    assert compare(small, few, GOAL)["spearman"] is None
    assert "too few to compare" in doubts([small, few], [compare(small, few, GOAL)], LARGE)[0]


def test_each_reason_for_doubt_is_said_and_none_without_reason():
    small, large = as_scale("s", draw(SMALL, 60, 1)), as_scale("l", draw(LARGE, 60, 1))
    pair = compare(small, large, GOAL)
    assert doubts([small, large], [pair], TARGET) == []
    assert "farther than" in doubts([small, large], [pair], Size(1e12, LARGE.tokens))[0]
    noisy = compare(small, as_scale("l", draw(LARGE, 60, 1, noise=0.5)), GOAL)
    assert noisy["interval90"][0] < TRUSTED and "cannot be trusted" in doubts([small, large], [noisy], LARGE)[0]
    same = Scale("l", Size(LARGE.params, SMALL.tokens), large.runs)
    said = doubts([small, same], [pair], TARGET)
    assert len(said) == 1 and "all scales have 2e+07 tokens" in said[0] and "not a measurement" in said[0]


def test_a_study_of_sizes_finds_the_mixture_for_the_target():
    truth = {"slope": 0.02, "drift": 0.1}
    sizes = align(
        [as_scale(n, draw(s, 70, i, **truth), 1.0) for i, (n, s) in enumerate(zip("lms", SIZES[::-1], strict=True))]
    )
    assert [scale.name for scale in sizes] == ["s", "m", "l"]
    space = unlimited_space(DOMAINS)
    content = study_scales(sizes, "a", TARGET, space)
    at = content["at_target"]
    best = np.array(list(at["weights"].values()))
    drawn = np.random.default_rng(0).dirichlet(np.ones(K), size=20000)
    assert true_loss(best[None], TARGET, **truth)[0] < true_loss(drawn, TARGET, **truth).min() + 0.01
    prior = true_loss(space.prior[None], TARGET, **truth)[0]
    gain = prior - true_loss(best[None], TARGET, **truth)[0]
    for what, value in (("prior", prior), ("gain", gain)):
        assert at[what]["interval90"][0] < value < at[what]["interval90"][1]
    wide, narrow = (np.ptp(at[what]["interval90"]) for what in ("prior", "gain"))
    assert narrow < wide / 2, "both losses share one level, so their difference is known better"
    small = np.array(list(at["small_weights"].values()))
    lost = true_loss(small[None], TARGET, **truth)[0] - true_loss(best[None], TARGET, **truth)[0]
    assert at["cost_of_small"] > 0.003 and lost == pytest.approx(at["cost_of_small"], abs=0.01)
    assert content["law"]["a"]["form"] == "drift" and len(content["ranks"]) == 3
    capped = study_scales(sizes, "a", TARGET, build_space(dict.fromkeys(DOMAINS, 10**9), int(TARGET.tokens), 1.0))
    assert max(capped["at_target"]["weights"].values()) <= 1e9 / TARGET.tokens + 1e-9
    assert build_region(space).is_capped_simplex


def write_scale(folder, sample):
    write_mixtures(folder / "M.csv", range(len(sample.losses)), DOMAINS, sample.weights)
    write_losses(folder / "L.csv", range(len(sample.losses)), {"a": sample.losses})
    return f"{sample.size.params:g},{sample.size.tokens:g},{folder / 'M.csv'},{folder / 'L.csv'}"


def test_the_command_line_compares_tables_of_several_sizes(tmp_path, capsys):
    arguments = ["--stage", "scales", "--target", "a", "--out", str(tmp_path / "out"), "--target-scale", "1e8,2e9"]
    for name, size, seed in (("big", LARGE, 1), ("small", SMALL, 1)):
        (tmp_path / name).mkdir()
        arguments += ["--scale", f"{name}={write_scale(tmp_path / name, draw(size, 40, seed))}"]
    assert cli.main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "out" / "scales.json").read_text())
    assert [s["name"] for s in said["scales"]] == ["small", "big"] and said["ranks"] == written["ranks"]
    assert said["ranks"][0]["shared"] == 40 and said["at_target"]["params"] == 1e8
    assert cli.main(arguments) == 0 and "scales: up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("big", "NAME=PARAMS,TOKENS"),
        ("big=1e6,1e9", "NAME=PARAMS,TOKENS"),
        ("big=1e6,zero,{m},{l}", "two positive numbers"),
        ("big=-1,1e9,{m},{l}", "two positive numbers"),
        ("big=1e6,1e9,{m},nowhere.csv", "nowhere.csv"),
        ("small=1e6,1e9,{m},{l}", "a name of its own"),
    ],
)
def test_a_scale_that_makes_no_sense_is_refused_by_name(tmp_path, capsys, text, said):
    good = write_scale(tmp_path, draw(SMALL, 30, 0))
    text = text.format(m=tmp_path / "M.csv", l=tmp_path / "L.csv")
    arguments = ["--stage", "scales", "--target", "a", "--out", str(tmp_path / "out"), "--scale", f"small={good}"]
    assert cli.main([*arguments, "--scale", text]) == 2
    assert said in capsys.readouterr().err
    assert cli.main(arguments) == 2 and "two sizes at least" in capsys.readouterr().err


def test_a_folder_of_a_search_is_a_scale_with_its_own_size(tmp_path):
    sample, events = draw(SMALL, 6, 0), []
    for i, (row, loss) in enumerate(zip(sample.weights.tolist(), sample.losses.tolist(), strict=True)):
        facts = {"kind": "holdout" if i == 2 else "train", "seed": 0, "config_hash": "x", "run_dir": "proxies/t0"}
        events.append({"event": "finish", "trial": i, "weights": dict(zip(DOMAINS, row, strict=True)), **facts})
        events[-1]["losses"] = {"a": loss}
    (tmp_path / "proxies" / "t0").mkdir(parents=True)
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (tmp_path / "proxies" / "t0" / "plan.json").write_text('{"non_embedding_params": 1000, "total_tokens": 4096}')
    tokens = dict(zip(DOMAINS, (100_000, 2_000, 50_000, 60_000, 70_000), strict=True))
    (tmp_path / "space.json").write_text(json.dumps({"tokens": tokens}))
    keys = "proxy: {schedule: {total_tokens: 4096}, data: {seq_length: 128}}\ntarget_tokens: 40960\n"
    (tmp_path / "config.yaml").write_text(keys)
    ledger = tmp_path / "trials.jsonl"
    ledger.write_text(ledger.read_text().replace("holdout", "train"))
    assert len(read_scale(f"own=1e3,4096,{ledger}").runs.index) == 6, "a ledger that holds nothing back"
    scale = read_scale(f"own={tmp_path}")
    assert scale.size == Size(1000, 4096, tuple(map(float, tokens.values()))) and len(scale.runs.index) == 6
    (tmp_path / "config.yaml").write_text(keys + "shards: {match_repetition: true}\n")
    assert read_scale(f"own={tmp_path}").size.held == (4096, 200, 4096, 4096, 4096)


def test_the_report_shows_ranks_prediction_and_doubts(tmp_path):
    make_search(tmp_path, {"prior": 0.1, "uniform": 0.2, "best_single": 0.3})
    assert "rank as large ones" not in write_report(tmp_path)["verdict"] + (tmp_path / "report.md").read_text()
    sizes = [as_scale("tiny", draw(SMALL, 30, 1)), as_scale("big", draw(LARGE, 30, 1, noise=0.4))]
    content = study_scales(sizes, "a", TARGET, unlimited_space(DOMAINS))
    (tmp_path / "scales.json").write_text(json.dumps(content))
    facts, text = write_report(tmp_path), (tmp_path / "report.md").read_text()
    pair = content["ranks"][0]
    row = next(line for line in text.splitlines() if line.startswith("| tiny | big"))
    assert f"{pair['spearman']:.3f}" in row and f"{pair['interval90'][0]:.3f} to" in row
    assert any("cannot be trusted for a larger model" in warning for warning in facts["warnings"])
    assert f"{content['at_target']['gain']['loss']:.3f} (" in text
    assert "rank as large ones" in (tmp_path / "report.html").read_text()


def test_regmixs_proxies_of_1m_and_60m_rank_pile_cc_alike(shared_dir):
    folder = shared_dir / "data" / "regmix"
    if not folder.is_dir():
        pytest.skip(f"no published runs in {folder}")
    one, sixty = (
        read_scale(f"{n}={p},1.05e9,{folder / f'test_mixture_{n}.csv'},{folder / f'test_pile_loss_{n}.csv'}")
        for n, p in (("1m", "1.312e6"), ("60m", "59e6"))
    )
    found = compare(one, sixty, Goal({"the_pile_pile_cc": 1.0}))
    assert found["shared"] == 256 and found["spearman"] == pytest.approx(0.9941, abs=5e-5)
    assert 0.985 < found["interval90"][0] < found["spearman"] < found["interval90"][1] < 0.998
    assert doubts([one, sixty], [found], Size(1e9, 1.05e9)) == []
