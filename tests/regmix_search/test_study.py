"""Fit and optimize from tables: the command line's JSON, its errors, and goals made of several losses."""

import json
from pathlib import Path

import numpy as np
import pytest

from regmix_search import run as cli
from regmix_search.choice import coverage90
from regmix_search.config import SearchConfig
from regmix_search.fits import check_runs_tell
from regmix_search.goals import Goal, parse_goal
from regmix_search.study import judge, study_fit
from regmix_search.study_files import StudyFiles, draw_runs, read_space, read_study
from regmix_search.tables import Runs, read_mixtures, read_runs, write_losses, write_mixtures

DOMAINS = ("web", "code", "math")
KNOWN = ["the_pile_pile_cc", "the_pile_github", "mean_reversion"]


def make_runs(n: int = 40, seed: int = 0, first: int = 0) -> Runs:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(3), size=n)
    rates = {"a": [3.0, 1.0, 0.5], "b": [0.2, 2.0, 1.0]}
    losses = {t: 5 - np.log(0.3 + np.sqrt(weights) @ r) + 0.01 * rng.normal(size=n) for t, r in rates.items()}
    return Runs(tuple(range(first, first + n)), DOMAINS, weights, losses)


def write(folder: Path, runs: Runs, name: str = "") -> list[str]:
    write_mixtures(folder / f"{name}m.csv", runs.index, runs.domains, runs.weights)
    write_losses(folder / f"{name}l.csv", runs.index, runs.losses)
    flags = ("--test-mixtures", "--test-losses") if name else ("--mixtures", "--losses")
    return [flags[0], str(folder / f"{name}m.csv"), flags[1], str(folder / f"{name}l.csv")]


@pytest.mark.parametrize(
    ("text", "shares", "worst"),
    [
        ("pile_cc", {KNOWN[0]: 1.0}, False),
        ("metric/the_pile_github_val_loss", {KNOWN[1]: 1.0}, False),
        ("pile_cc=1,github=3", {KNOWN[0]: 0.25, KNOWN[1]: 0.75}, False),
        ("pile_cc=2, github=0", {KNOWN[0]: 1.0}, False),
        ("mean", dict.fromkeys(KNOWN, 1 / 3), False),
        ("worst", dict.fromkeys(KNOWN, 1 / 3), True),
        ({"pile_cc": 1, "github": 1}, {KNOWN[0]: 0.5, KNOWN[1]: 0.5}, False),
    ],
)
def test_a_goal_is_one_loss_a_weighted_list_the_mean_or_the_worst(text, shares, worst) -> None:
    goal = parse_goal(text, KNOWN)
    assert goal.shares == pytest.approx(shares) and goal.worst == worst
    assert parse_goal(goal, KNOWN) is goal


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("pile_c", "is not among the losses. Did you mean"),
        ("pile", "is not among the losses"),
        ("pile_cc=x", "is not NAME=WEIGHT"),
        ("pile_cc=-1,github=1", "0 or above"),
        ("pile_cc=0", "above 0"),
        ("pile_cc=1,the_pile_pile_cc=1", "twice"),
        ({"pile_cc": float("nan")}, "must be a number"),
    ],
)
def test_goals_that_mean_nothing_are_refused(target, message) -> None:
    with pytest.raises(ValueError, match=message):
        parse_goal(target, KNOWN)
    with pytest.raises(ValueError, match="may mean x_a, y_a"):
        parse_goal("a", ["x_a", "y_a"])


def test_goals_combine_columns() -> None:
    columns = {"a": np.array([1.0, 4.0]), "b": [3.0, 2.0]}
    assert Goal({"a": 0.25, "b": 0.75}).of(columns).tolist() == [2.5, 2.5]
    assert parse_goal("worst", columns).of(columns).tolist() == [3.0, 4.0]
    assert parse_goal("mean", ["mean", "x"]).shares == {"mean": 1.0}, "a loss of that name wins over the word"


def test_fit_prints_one_object_in_the_promised_form(tmp_path, capsys) -> None:
    """Every figure is recomputed here from the files."""
    train, test = make_runs(), make_runs(30, 1, first=5)
    files = write(tmp_path, train) + write(tmp_path, test, "t")
    command = ["--stage", "fit", *files, "--target", "a", "--surrogate", "effective", "--limit", "20", "--seed", "3"]
    assert cli.main([*command, "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["surrogate"] == "effective" and printed["n_train"] == 20 and printed["seconds"] > 0
    some = draw_runs(read_runs(tmp_path / "m.csv", tmp_path / "l.csv"), 20, 3)
    assert some.index == tuple(np.random.default_rng(3).permutation(40)[:20])
    fit = study_fit(some, "a", ("effective",), read_runs(tmp_path / "tm.csv", tmp_path / "tl.csv"), seed=3)
    for part in ("cv", "test"):
        assert printed[part] == pytest.approx(fit["summary"][part])
    assert set(printed["cv"]) == {"spearman", "pearson", "mse", "coverage90"}
    assert set(printed["test"]) == {"spearman", "pearson", "mse", "regret_at_1"}
    assert printed["test"]["spearman"] > 0.95 and 0 <= printed["test"]["regret_at_1"] < 0.1
    assert cli.main([*command, "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == printed, "the second time it is read, not fitted"


def test_auto_chooses_and_says_why(tmp_path, capsys) -> None:
    files = write(tmp_path, make_runs())
    command = ["--stage", "fit", *files, "--target", "a", "--surrogate", "auto", "--out", str(tmp_path / "o"), "--json"]
    assert cli.main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["test"] is None and printed["n_train"] == 40
    assert printed["surrogate"] in printed["why"]["a"]


def test_optimize_prints_the_optimum_of_a_goal_of_several_losses(tmp_path, capsys) -> None:
    files = write(tmp_path, make_runs())
    command = ["--stage", "optimize", *files, "--target", "a=1,b=3", "--surrogate", "effective", "--json"]
    assert cli.main([*command, "--out", str(tmp_path / "o")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert sum(printed["weights"].values()) == pytest.approx(1) and printed["target"] == {"a": 0.25, "b": 0.75}
    assert printed["fit"]["n_train"] == 40 and Path(printed["files"]["mixture.yaml"]).is_file()
    assert printed["objective"]["predicted"] < printed["objective"]["prior"]


def test_judge_and_coverage_by_hand() -> None:
    true = np.array([3.0, 1.0, 2.0])
    assert judge(np.array([3.0, 2.0, 1.0]), true)["regret_at_1"] == 1.0
    assert judge(true, true) == {"spearman": 1.0, "pearson": 1.0, "mse": 0.0, "regret_at_1": 0.0}
    errors = np.array([0.0] * 19 + [9.0])
    assert coverage90(errors, np.ones(20), np.arange(20)) == pytest.approx(0.95), (
        "the outlier is outside what the others show"
    )
    rng = np.random.default_rng(0)
    assert coverage90(rng.normal(size=400), np.ones(400), np.arange(400)) == pytest.approx(0.9, abs=0.01)


def broken(**changes) -> Runs:
    runs = make_runs(12)
    facts = {"index": runs.index, "domains": runs.domains, "weights": runs.weights, "losses": runs.losses, **changes}
    return Runs(**facts)


def test_what_cannot_be_fitted_is_said(tmp_path) -> None:
    still = np.column_stack([0.7 * make_runs(12).weights[:, :2], 1 - 0.7 * make_runs(12).weights[:, :2].sum(axis=1)])
    still = np.column_stack([still[:, 0], 0.7 - still[:, 0], np.full(12, 0.3)])
    with pytest.raises(ValueError, match=r"never vary in these 12 runs: math \(always 0\.3\)"):
        check_runs_tell(broken(weights=still), ("linear",))
    check_runs_tell(broken(weights=still), ("linear",), fixed=("math",))
    with pytest.raises(ValueError, match="4 different mixtures for 3 domains: a fit needs at least 5, better 15"):
        check_runs_tell(make_runs(12).select(range(4)), ("linear",))
    with pytest.raises(ValueError, match="does not exist"):
        check_runs_tell(make_runs(12), ("liner",))
    with pytest.raises(ValueError, match="--limit 13: there are 12 runs"):
        draw_runs(make_runs(12), 13, 0)


def test_test_runs_must_have_the_domains_of_the_runs(tmp_path) -> None:
    """Other order: put right. Other names: an error."""
    train, test = make_runs(), make_runs(9, 1)
    write(tmp_path, train)
    write(tmp_path, Runs(test.index, DOMAINS[::-1], test.weights[:, ::-1].copy(), test.losses), "t")
    files = StudyFiles(*(tmp_path / name for name in ("m.csv", "l.csv", "tm.csv", "tl.csv")))
    found = read_study(files)[1]
    assert found is not None
    np.testing.assert_allclose(found.weights, test.weights, atol=1e-12)
    write(tmp_path, Runs(test.index, ("web", "code", "maths"), test.weights, test.losses), "t")
    with pytest.raises(ValueError, match="domains math, maths are not in both tables"):
        read_study(files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--target", "c"], "target 'c' is not among the losses"),
        (["--surrogate", "tree"], "surrogate 'tree' does not exist"),
        (["--limit", "3"], "needs at least 5"),
        (["--test-mixtures", "m.csv"], "--test-mixtures and --test-losses go together"),
        (["--stage", "train"], "with --stage fit or --stage optimize"),
        (["--losses", "gone.csv"], "gone.csv"),
    ],
)
def test_mistakes_on_the_command_line_are_named(tmp_path, capsys, change, message) -> None:
    files = write(tmp_path, make_runs())
    assert cli.main(["--stage", "fit", *files, "--target", "a", "--out", str(tmp_path / "out"), *change]) == 2
    assert message in capsys.readouterr().err


def test_a_prior_or_token_counts_bound_the_weights(tmp_path) -> None:
    """From a mixture.yaml, from counts alone, and from a search's space.json in another order of domains."""
    runs, config = make_runs(), SearchConfig(target_tokens=1000)
    np.testing.assert_allclose(read_space(None, runs, config).prior, runs.weights.mean(axis=0))
    (tmp_path / "m.yaml").write_text("train:\n  train_code: 0.3\n  train_math: 0.2\n  train_web: 0.5\n")
    assert read_space(tmp_path / "m.yaml", runs, config).prior.tolist() == [0.5, 0.3, 0.2]
    counts = {"code": 100, "math": 50, "web": 850}
    (tmp_path / "t.json").write_text(json.dumps({"tokens": counts}))
    space = read_space(tmp_path / "t.json", runs, config)
    np.testing.assert_allclose(space.caps, [1, 0.4, 0.2])
    np.testing.assert_allclose(space.prior, [0.85, 0.1, 0.05])
    (tmp_path / "s.json").write_text(json.dumps(space.to_json() | {"domains": ["math", "web", "code"]}))
    np.testing.assert_allclose(read_space(tmp_path / "s.json", runs, config).caps, space.caps)
    (tmp_path / "t.json").write_text(json.dumps({"tokens": counts, "target_tokens": 500, "max_epochs": 2}))
    np.testing.assert_allclose(read_space(tmp_path / "t.json", runs, config).caps, [1, 0.4, 0.2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tokens": {"web": 1, "code": 1}, "target_tokens": 1}, "domains math are not in both"),
        ({"tokens": {"web": 1, "code": 1, "math": 1}}, "target_tokens"),
        ({"token": {}}, "unknown key 'token'. Did you mean 'tokens'"),
        ({"tokens": {"web": 1, "code": 1, "math": 1}, "target_tokens": 100}, "Lower target_tokens"),
    ],
)
def test_spaces_that_say_too_little_or_too_much_are_named(tmp_path, content, message) -> None:
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_space(tmp_path / "t.json", make_runs(), SearchConfig())


def test_a_study_ends_with_a_report_and_exports(tmp_path, capsys) -> None:
    """Runs that Olmix named are numbered there; mixture.yaml and the exports carry tokens and epochs."""
    runs = make_runs()
    head = "run,name,index," + ",".join(DOMAINS)
    rows = [f"r{i},x,0," + ",".join(map(repr, row)) for i, row in enumerate(runs.weights.tolist())]
    (tmp_path / "ratios.csv").write_text("\n".join([head, *rows]) + "\n")
    rows = [f"r{i},{a},{b}" for i, (a, b) in enumerate(zip(runs.losses["a"], runs.losses["b"], strict=True))]
    (tmp_path / "metrics.csv").write_text("\n".join(["run,a,b", *reversed(rows)]) + "\n")
    (tmp_path / "t.json").write_text(
        json.dumps({"tokens": {"web": 500, "code": 100, "math": 800}, "target_tokens": 1000})
    )
    files = ["--mixtures", str(tmp_path / "ratios.csv"), "--losses", str(tmp_path / "metrics.csv")]
    files += ["--space", str(tmp_path / "t.json"), "--target", "worst", "--surrogate", "effective"]
    out = tmp_path / "out"
    assert cli.main(["--stage", "optimize", *files, "--out", str(out)]) == 0, capsys.readouterr().err
    text = (out / "report.md").read_text()
    assert "target worst of 2 losses" in text and "What is as good?" in text and "unimax" in text
    epochs = (out / "exports/epochs.csv").read_text().splitlines()
    assert epochs[0] == "domain,weight,tokens,available,epochs" and epochs[2].startswith("code,0.")
    assert "significant" in text or "Predicted gain" in text


def test_earlier_runs_of_fewer_domains_are_fitted_when_they_are_asked_for(tmp_path, capsys) -> None:
    """A domain that an earlier table lacks had weight 0; text that is gone is a domain of the fit alone."""
    runs, old = make_runs(), make_runs(12, 1)
    files = write(tmp_path, runs)
    pair = np.hstack([old.weights[:, :2] / old.weights[:, :2].sum(axis=1, keepdims=True), np.zeros((12, 1))])
    pair[0] = [0.5, 0.3, 0.2]
    write(tmp_path, Runs(old.index, (*DOMAINS[:2], "gone"), pair, old.losses), "e")
    earlier = ["--earlier-mixtures", str(tmp_path / "em.csv"), "--earlier-losses", str(tmp_path / "el.csv")]
    command = ["--stage", "optimize", *files, "--target", "a", "--surrogate", "linear", "--out", str(tmp_path / "o")]
    assert cli.main([*command, *earlier, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["fit"]["n_train"] == 40 + 12 and list(printed["weights"]) == list(DOMAINS)
    assert any(text.startswith("1 of 12 earlier runs had text of gone as it was") for text in printed["warnings"])
    rows = read_mixtures(tmp_path / "o" / "mixtures.csv")
    assert rows[0] == tuple(range(51)) and rows[2][40:, 2].max() == 0
    np.testing.assert_allclose(rows[2][40:, :2], pair[1:, :2], atol=1e-12)
    assert cli.main([*command, *earlier[:2]]) == 2
    assert "--earlier-mixtures and --earlier-losses go together" in capsys.readouterr().err
