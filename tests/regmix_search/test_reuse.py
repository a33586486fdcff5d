"""Building on an earlier search: what changed is found, runs that apply are fitted, the rest is refused by name."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from planted_law import draw, planted

from megatron_lite.files import atomic_write_json
from megatron_lite.testing import write_tiny_shards
from regmix_search import run as cli
from regmix_search.calibration import read_proxy
from regmix_search.changes import Changes, find_changes, join_earlier, translate
from regmix_search.config import OptimumConfig, load_search
from regmix_search.fits import fit_chosen, fit_targets
from regmix_search.freshness import bring_up_to_date, digest_of, read_json
from regmix_search.optimize import find_optimum
from regmix_search.proposals import fit_runs
from regmix_search.reduction import Reduction
from regmix_search.reuse import plan_reuse, read_reduction, search_runs
from regmix_search.search import Search
from regmix_search.space import Space
from regmix_search.stages import mixtures, settings
from regmix_search.tables import Runs, read_mixtures, write_losses

THEN = {"a": (100, "xa"), "b": (200, "xb"), "c": (300, "xc"), "d": (400, "xd")}
KEYS = (
    *("train.enabled=false", "proxy.model={num_layers: 1, hidden_size: 32, num_heads: 2, ffn_hidden_size: 64}"),
    *("proxy.data.seq_length=16", "proxy.batch={global_batch_size: 4, micro_batch_size: 4}", "proxy.optim.lr=4e-3"),
    *("proxy.schedule={total_tokens: 320, warmup_steps: 1}", "target_tokens=6000", "fit.surrogates=[linear]"),
    *("optimum.bootstraps=2", "proxies.workers=1", "fit.target=b", "fit.folds=3"),
)


@pytest.mark.parametrize(
    ("now", "split", "same", "found"),
    [
        ({**THEN, "e": (50, "xe")}, (), (), "added e"),
        ({k: THEN[k] for k in "abc"}, (), (), "removed d"),
        ({**THEN, "d": (410, "yd")}, (), (), "revised d"),
        ({**THEN, "d": (410, "yd")}, (), ("d",), "no domain changed"),
        ({**{k: THEN[k] for k in "abc"}, "math": (400, "xd")}, (), (), "renamed d -> math"),
        ({**{k: THEN[k] for k in "abc"}, "d1": (150, "p"), "d2": (251, "q")}, ("d=d1+d2",), (), "split d -> d1 + d2"),
        ({"a": (100, "xa"), "e": (1, "xe"), "c": (9, "y")}, (), (), "added e; revised c; removed b, d"),
    ],
)
def test_changes_are_found_by_name_and_content(now, split, same, found) -> None:
    changes = find_changes(THEN, now, split, same)
    assert str(changes) == found
    parts = [part for new in changes.split.values() for part in new]
    assert sorted([*changes.same, *changes.added, *changes.revised, *parts]) == sorted(now)
    assert sorted([*changes.same.values(), *changes.revised, *changes.removed, *changes.split]) == sorted(THEN)


@pytest.mark.parametrize(
    ("now", "split", "same", "message"),
    [
        (THEN, ("d=d1",), (), "is not OLD=NEW1"),
        (THEN, ("d=d1+d2",), (), "d must be a domain of the earlier search and none of this one"),
        ({"d1": (1, "p")}, ("d=d1+d2",), (), "d2 must be new domains of this search"),
        ({"d1": (150, "p"), "d2": (300, "q")}, ("d=d1+d2",), (), "d had 400 tokens, its parts have 450"),
        (THEN, (), ("e",), "reuse.same: e must be a domain of both"),
    ],
)
def test_splits_that_are_none_are_refused(now, split, same, message) -> None:
    with pytest.raises(ValueError, match=message):
        find_changes(THEN, now, split, same)


def old_runs() -> Runs:
    weights = np.array([[0.5, 0.5, 0, 0], [0, 0.2, 0.8, 0], [0.1, 0.2, 0.3, 0.4], [0, 0, 0.6, 0.4]])
    return Runs((3, 5, 7, 9), tuple("abcd"), weights, {"b": np.arange(4.0), "x": np.arange(4.0) + 10})


def test_earlier_runs_are_put_into_todays_domains() -> None:
    """Added: weight 0. Split: by tokens. Removed or revised: beside today's domains, and counted."""
    tokens = {"e": 5, "d1": 300, "b": 200, "c": 300, "d2": 100}
    changes = Changes({"b": "b", "c": "c"}, added=("e",), removed=("a",), split={"d": ("d1", "d2")})
    found = translate(old_runs(), changes, tokens)
    assert found.domains == (*tokens, "a (gone)") and found.gone == 1 and found.index == old_runs().index
    np.testing.assert_allclose(found.weights[2], [0, 0.3, 0.2, 0.3, 0.1, 0.1])
    np.testing.assert_allclose(found.weights.sum(axis=1), 1)
    assert found.notes[0].startswith("2 of 4 earlier runs had text of a as it was")
    assert found.mixed.index == (5, 9) and found.mixed.domains == tuple(tokens) and not found.mixed.gone
    np.testing.assert_allclose(found.mixed.weights, [[0, 0, 0.2, 0.8, 0], [0, 0.3, 0, 0.6, 0.1]])
    assert found.mixed.losses["x"].tolist() == [11, 13]
    revised = translate(old_runs(), Changes({name: name for name in "abc"}, revised=("d",)), dict.fromkeys("abcd", 1))
    assert revised.domains == (*"abcd", "d (gone)") and revised.mixed.index == (3, 5)
    assert revised.weights[:, 3].max() == 0, "text as it was does not count as text of today"
    everything = translate(old_runs(), Changes({name: name for name in "abcd"}), dict.fromkeys("abcd", 1))
    np.testing.assert_allclose(everything.weights, old_runs().weights)
    assert not everything.notes and everything.mixed is everything
    again = translate(revised, Changes({"a": "a", "b": "b"}, removed=("c", "d")), {"a": 1, "b": 1})
    assert again.domains == ("a", "b", "c (gone)", "d (gone)"), "what was gone stays gone"


def test_a_removed_domain_is_a_feature_of_the_fit_and_no_part_of_the_optimum() -> None:
    """Six runs without it alone could not tell five slopes; all forty do, and the optimum is the true one."""
    rows = draw(40, 0)
    old = Runs(tuple(range(40)), tuple("abcde"), rows, {"l": planted(rows, 0)})
    kept = {name: name for name in "bcde"}
    new = np.vstack([draw(5, 1, 4), draw(5, 1, 4)[:1]])
    fresh = Runs(tuple(range(6)), tuple("bcde"), new, {"l": planted(np.hstack([np.zeros((6, 1)), new]), 1)})
    runs = join_earlier(fresh, translate(old, Changes(kept, removed=("a",)), dict.fromkeys("bcde", 1)))
    assert runs.domains == (*"bcde", "a (gone)") and runs.gone == 1 and len(runs.index) == 46
    fit = fit_targets(runs, "l", names=("effective",))
    space = Space(tuple("bcde"), None, np.full(4, 0.25), np.array([0.6, 1, 1, 1]), None, None)
    found = find_optimum(space, runs, fit, settings=OptimumConfig(bootstraps=3))
    weights = np.array(list(found["weights"].values()))
    assert list(found["weights"]) == list("bcde") and weights.sum() == pytest.approx(1)
    grid = np.hstack([np.zeros((4000, 1)), np.random.default_rng(0).dirichlet(np.full(4, 0.5), 4000)])
    lowest = planted(grid[grid[:, 1] <= 0.6]).min()
    assert planted(np.append(0, weights)[None])[0] - lowest < 0.01, "the noise of one run"
    assert sum(found["best_observed"]["weights"].values()) == pytest.approx(1)
    model = fit_chosen(runs, fit, "l")
    assert np.std(model.predict(new) - fresh.losses["l"]) < 0.02
    proposed = fit_runs(runs, "l")
    assert proposed.weights.shape[1] == 4 and proposed.losses.min() >= runs.mixed.losses["l"].min()
    assert np.isfinite(proposed.predict(new)).all()


def test_joined_tables_keep_who_is_who_and_say_which_losses_are_not_fitted() -> None:
    today = Runs((3, 4), tuple("abcd"), np.eye(4)[:2], {"b": np.array([7.0, 8]), "y": np.array([1.0, 2])})
    both = join_earlier(today, old_runs())
    assert both.index == (3, 4, "earlier 3", "earlier 5", "earlier 7", "earlier 9")
    assert both.losses["b"].tolist() == [7, 8, 0, 1, 2, 3] and set(both.losses) == {"b"}
    assert both.notes == ("losses that only some of the runs have are not fitted: y, x",)
    assert both.select([4, "earlier 5"]).losses["b"].tolist() == [8, 1] and both.select([3]).notes == both.notes
    with pytest.raises(ValueError, match="none of the losses y"):
        join_earlier(Runs((1,), tuple("abcd"), np.eye(4)[:1], {"y": np.ones(1)}), old_runs())


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """shards/ of a to e, and old/: a search of a to d that looks finished, its losses made up."""
    write_tiny_shards(tmp_path / "shards", tuple("abcde"))
    shutil.copytree(tmp_path / "shards", tmp_path / "before", ignore=shutil.ignore_patterns("*_e*"))
    search = search_of(tmp_path, "old", f"shards.data_dir={tmp_path / 'before'}")
    old, inventory = search.out, search.inventory
    old.mkdir()
    mixtures(search).make()
    index, domains, rows = read_mixtures(old / "mixtures.csv")
    events = [
        {"event": "finish", "trial": int(i), "kind": "train", "seed": 0, "config_hash": "0", "weights": weights}
        | {"losses": {"b": float(5 - row[1]), "a": float(5 - row[0])}}
        for i, row in zip(index, rows, strict=True)
        for weights in [dict(zip(domains, row.tolist(), strict=True))]
    ]
    (old / "trials.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    atomic_write_json(old / "trials.fingerprint.json", {**settings(search.config), "shards": inventory.digest})
    atomic_write_json(old / "inventory.json", {**inventory.contents, "tokenizer": inventory.tokenizer})
    atomic_write_json(old / "optimum.json", {"weights": {"a": 0.1, "b": 0.6, "c": 0.3, "d": 0.0}})
    return tmp_path


def search_of(folder: Path, name: str, *keys: str) -> Search:
    given = ("mixtures={count: 6, holdout: 1, repeats: 2}", *keys)
    return Search(load_search(None, None, (*KEYS, f"out_dir={folder / name}", *given)), io.StringIO())


def reusing(folder: Path, *keys: str) -> Search:
    (folder / "new").mkdir(exist_ok=True)
    return search_of(folder, "new", f"shards.data_dir={folder / 'shards'}", f"reuse.earlier={folder / 'old'}", *keys)


def test_mixtures_of_a_reusing_search_keep_the_ratio_and_obey_the_real_caps(folders) -> None:
    search = reusing(folders, "target_tokens=15000")
    mixtures(search).make()
    _, domains, rows = read_mixtures(search.out / "mixtures.csv")
    space = Space.from_json(read_json(search.out / "space.json"))
    kept = read_reduction(search.out, space.domains)
    assert kept is not None and domains == space.domains == tuple("abcde")
    assert kept.ratios == pytest.approx({"a": 0.1, "b": 0.6, "c": 0.3, "d": 0.0}) and kept.free == ("e",)
    assert len(rows) == 9 and all(kept.holds(row) for row in rows[2:]) and np.all(rows <= space.caps + 1e-9)
    assert space.caps.max() < 0.7, "the caps must bind"
    assert not kept.holds(rows[0]), "the prior is the real one: what the gain is measured against"
    assert np.ptp(rows[2:, 4]) > 0.1, "the new domain must vary"
    facts = read_json(search.out / "reuse.json")
    assert facts["changes"] == "added e" and facts["earlier_runs"] == 9 and facts["searched"] == ["e"]
    assert facts["saving"]["runs_without"] == 15 and facts["saving"]["tokens_saved"] == 9 * 320
    said = search.stream.getvalue()
    assert "6 proxies to fit on where 5 domains searched anew would take 15" in said and "2,880 tokens" in said


def test_what_was_taken_over_is_fitted_and_outlives_the_earlier_folder(folders) -> None:
    search = reusing(folders)
    mixtures(search).make()
    shutil.copy(folders / "old" / "optimum.json", search.out / "optimum.json")
    index, _, rows = read_mixtures(search.out / "mixtures.csv")
    lines = [
        "index,metric/b_val_loss,metric/e_val_loss",
        *(f"{i},{5 - row[1]},1.0" for i, row in zip(index, rows, strict=True)),
    ]
    (search.out / "losses.csv").write_text("\n".join(lines) + "\n")
    inputs = mixtures(search).inputs
    shutil.rmtree(folders / "old")
    runs = search_runs(search.out)
    assert len(runs.index) == 18 and set(runs.losses) == {"b"} and mixtures(search).inputs == inputs
    np.testing.assert_allclose(runs.losses["b"], 5 - runs.weights[:, 1])
    assert runs.weights[9:, 4].max() == 0, "earlier runs had none of what was added"
    mixtures(search_of(folders, "new", f"shards.data_dir={folders / 'shards'}")).make()
    assert len(search_runs(search.out).index) == 9 and read_reduction(search.out, runs.domains) is None


def test_text_that_is_gone_is_kept_in_the_tables_of_a_search(folders) -> None:
    write_tiny_shards(folders / "other", tuple("abcde"), documents=70)
    for file in (folders / "other").glob("train_c*"):
        shutil.copy(file, folders / "shards" / file.name)
    search = reusing(folders)
    mixtures(search).make()
    index, _, rows = read_mixtures(search.out / "mixtures.csv")
    write_losses(search.out / "losses.csv", index, {"b": 5 - rows[:, 1]})
    runs = search_runs(search.out)
    assert runs.gone == 1 and runs.domains == (*"abcde", "c (gone)") and len(runs.index) == 18
    assert runs.weights[:9, 5].max() == 0 < runs.weights[9:, 5].max() and runs.mixed.domains == tuple("abcde")
    assert "had text of c as it was" in search.stream.getvalue()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("proxy.optim.lr=1e-3",), r"other settings \(old -> new\):\n  proxy.optim.lr: 0.004 -> 0.001"),
        (("fit.target=e",), "its losses on e are of other validation sets.*reuse.runs=false"),
        (("reuse.free=[f]",), "reuse.free: f is no domain"),
        (("reuse.free=[a, b, c]",), "no weight on any domain that is kept"),
        (("shards.match_repetition=true",), "match_repetition"),
        (("mixtures.domains=[a, b, c]",), r"nothing is left to search \(removed d\).*a=0.1, b=0.6, c=0.3"),
        (("reuse.earlier={out}",), "this search's own folder"),
    ],
)
def test_searches_that_do_not_fit_together_are_refused_by_name(folders, keys, message) -> None:
    search = reusing(folders, *(key.replace("{out}", str(folders / "new")) for key in keys))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        plan_reuse(search)


def test_settings_that_change_after_the_mixtures_were_drawn_are_compared_again(folders) -> None:
    search, records = reusing(folders), folders / "new" / "stages"
    assert bring_up_to_date(mixtures(search), records).ran and not bring_up_to_date(mixtures(search), records).ran
    with pytest.raises(ValueError, match=r"proxy\.optim\.lr: 0\.004 -> 0\.001"):
        bring_up_to_date(mixtures(reusing(folders, "proxy.optim.lr=1e-3")), records)


def test_ratios_alone_ask_for_no_comparable_proxies(folders) -> None:
    search = reusing(folders, "reuse.runs=false", "proxy.optim.lr=1e-3", "fit.target=e")
    mixtures(search).make()
    assert read_json(search.out / "reuse.json")["earlier_runs"] == 0
    assert not (search.out / "earlier_mixtures.csv").exists()


def test_domains_may_be_freed_and_revised_ones_are(folders) -> None:
    write_tiny_shards(folders / "other", tuple("abcde"), documents=70)
    for file in (folders / "other").glob("train_c*"):
        shutil.copy(file, folders / "shards" / file.name)
    search = reusing(folders, "reuse.free=[a]")
    found = plan_reuse(search)
    assert str(found.changes) == "added e; revised c"
    assert isinstance(found.reduction, Reduction) and found.reduction.free == ("a", "c", "e")
    assert found.reduction.ratios == pytest.approx({"b": 1.0, "d": 0.0})
    assert found.runs is not None and found.runs.weights[:, 2].max() == 0 and found.runs.domains[5:] == ("c (gone)",)


def test_an_earlier_search_whose_shards_nobody_knows_any_more_is_refused(folders) -> None:
    """Before inventory.json was written its own shards tell; when they were replaced, nothing does."""
    (folders / "old" / "inventory.json").unlink()
    (folders / "old" / "config.yaml").write_text(f"shards: {{data_dir: {folders / 'before'}}}\n")
    search = reusing(folders)
    assert str(plan_reuse(search).changes) == "added e"
    (folders / "old" / "config.yaml").write_text(f"shards: {{data_dir: {folders / 'shards'}}}\n")
    with pytest.raises(ValueError, match="nobody knows what changed"):
        plan_reuse(search)
    atomic_write_json(folders / "old" / "inventory.json", {"train_": {}, "valid_": {}, "tokenizer": ""})
    assert digest_of({"train_": {}, "valid_": {}}) != read_json(folders / "old" / "trials.fingerprint.json")["shards"]
    with pytest.raises(ValueError, match="nobody knows what changed"):
        plan_reuse(search)


def test_a_key_that_there_was_not_yet_was_at_its_default(folders) -> None:
    """An earlier search of an older version stays of use, unless today's setting is not the default."""
    path = folders / "old" / "trials.fingerprint.json"
    facts = read_json(path)
    del facts["settings"]["proxy"]["optim"]["clip_grad"], facts["settings"]["proxy"]["eval"]
    atomic_write_json(path, facts)
    search = reusing(folders)
    assert plan_reuse(search).runs is not None
    search = reusing(folders, "proxy.optim.clip_grad=0.5")
    with pytest.raises(ValueError, match=r"proxy\.optim\.clip_grad: 1\.0 -> 0\.5"):
        plan_reuse(search)


def test_switches_that_are_off_are_no_difference_to_trials_from_before_there_were_any(folders) -> None:
    path = folders / "old" / "trials.fingerprint.json"
    facts = read_json(path)
    for section, key in (("proxy", "cuda_graphs"), ("proxy", "reweighting"), ("shards", "match_repetition")):
        del facts["settings"][section][key]
    atomic_write_json(path, facts)
    assert plan_reuse(reusing(folders)).runs is not None
    with pytest.raises(ValueError, match=r"proxy\.cuda_graphs: False -> True"):
        plan_reuse(reusing(folders, "proxy.cuda_graphs=true", "proxy.compile=true"))


def test_proxies_run_with_what_the_earlier_search_had_settled(folders) -> None:
    """Calibration may have chosen another micro-batch: losses of both are compared, so it holds here too."""
    path, old = folders / "old" / "trials.fingerprint.json", folders / "old" / "calibration.json"
    facts = read_json(path)
    facts["settings"]["proxy"]["batch"]["micro_batch_size"] = 2
    atomic_write_json(path, facts)
    search = reusing(folders)
    with pytest.raises(ValueError, match="micro_batch_size: 2 -> 4"):
        plan_reuse(search)
    atomic_write_json(old, {"proxy": {"precision": "auto", "compile": False, "micro_batch_size": 2}})
    mixtures(search).make()
    settled = read_proxy(search)
    assert settled is not None and settled.batch.micro_batch_size == 2
    assert settings(search.config, settled)["settings"]["proxy"]["batch"] == facts["settings"]["proxy"]["batch"]


def test_another_tokenizer_is_named(folders) -> None:
    path = folders / "old" / "inventory.json"
    atomic_write_json(path, {**read_json(path), "tokenizer": "another one"})
    search = reusing(folders)
    with pytest.raises(ValueError, match=r"another tokenizer \(another one, now tiny\)"):
        plan_reuse(search)


@pytest.mark.slow
def test_a_domain_is_added_to_a_finished_search(tmp_path, capsys) -> None:
    """Two searches from the command line: the second trains fewer proxies and fits the first one's too."""
    write_tiny_shards(tmp_path / "shards", tuple("abcd"))
    shutil.copytree(tmp_path / "shards", tmp_path / "before", ignore=shutil.ignore_patterns("*_d*"))
    keys = [part for key in KEYS for part in ("--set", key)]
    first, second = tmp_path / "first", tmp_path / "second"
    command = [*keys, "--out", str(first), "--set", f"shards.data_dir={tmp_path / 'before'}"]
    assert cli.main([*command, "--set", "mixtures={count: 6, holdout: 1, repeats: 2}"]) == 0, capsys.readouterr().err
    command = [*keys, "--out", str(second), "--set", f"shards.data_dir={tmp_path / 'shards'}"]
    command += ["--set", "mixtures={count: 4, holdout: 1, repeats: 1}", "--set", f"reuse.earlier={first}"]
    assert cli.main([*command, "--dry-run"]) == 0
    assert "4 proxies to fit on where 4 domains searched anew would take 8" in capsys.readouterr().out
    assert cli.main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["reuse"]["saving"]["runs_saved"] == 4 and printed["reuse"]["earlier_runs"] == 9
    fit, optimum = read_json(second / "fit.json"), read_json(second / "optimum.json")
    assert fit["n_train"] == 4 + 1 + 9 and sum(isinstance(i, str) for i in fit["train_index"]) == 9
    weights, space = np.array(list(optimum["weights"].values())), Space.from_json(read_json(second / "space.json"))
    kept = read_reduction(second, space.domains)
    assert kept is not None and kept.holds(weights, 1e-7) and np.all(weights <= space.caps + 1e-9)
    assert {"kept", "ratio_free"} <= set(optimum["controls"])
    assert optimum["controls"]["kept"]["weights"]["d"] == 0
    assert optimum["controls"]["ratio_free"]["predicted"] <= optimum["objective"]["predicted"] + 1e-9
    assert "keep their ratio" in (second / "report.md").read_text()
    assert cli.main(command) == 0 and capsys.readouterr().out.count("up to date") == 5
