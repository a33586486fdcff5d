"""Mixtures compared: mistakes before any training, kill, resume, growth, equals."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_lite.config import to_dict
from megatron_lite.files import read_jsonl
from megatron_lite.testing import tiny_config, write_tiny_shards
from regmix_search import run as cli
from regmix_search.compare import Entry, name_files, place, plan_trials
from regmix_search.config import load_search
from regmix_search.ledger import Trial
from regmix_search.proxies import ProxyTraining
from regmix_search.search import Search

ROOT = Path(__file__).resolve().parents[2]
MIXTURES = {"human": {"a": 1, "b": 1, "c": 1}, "skewed": {"a": 8, "b": 1, "c": 1}, "same": {"a": 1, "b": 1, "c": 1}}

# A comparison whose driver is killed as soon as it has recorded its first model.
DIES = """
import os, signal, sys
from regmix_search import ledger, run
tell = ledger.Ledger.tell
def die(*arguments, **facts):
    tell(*arguments, **facts)
    os.kill(os.getpid(), signal.SIGKILL)
ledger.Ledger.tell = die
run.main(sys.argv[1:])
"""


def test_files_are_called_by_as_little_as_tells_them_apart() -> None:
    assert name_files([Path("runs/a/mixture.yaml"), Path("human.yaml")]) == ["mixture", "human"]
    assert name_files([Path("runs/a/mixture.yaml"), Path("runs/b/mixture.yaml")]) == ["a/mixture", "b/mixture"]
    with pytest.raises(ValueError, match="given twice"):
        name_files([Path("a.yaml"), Path("../" + Path.cwd().name + "/a.yaml")])


def test_shards_are_the_configs_or_the_files_or_the_searchs(tmp_path: Path) -> None:
    for name, text in {"x": "train: {a: 1}\n", "y": "data_dir: s\ntrain: {a: 1}\n", "z": "data_dir: .\n"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    x, y, z = (tmp_path / f"{name}.yaml" for name in "xyz")
    config = load_search(None, overrides=(f"out_dir={tmp_path}/out",))
    assert place(config, [x, y], None).shards.data_dir == str((tmp_path / "s").resolve())
    assert place(config, [x, z], None).run_dir == tmp_path / "out/compare"
    (tmp_path / "w.yaml").write_text("train: {a: 1}\n")
    assert place(config, [x, tmp_path / "w.yaml"], "there").shards.data_dir == f"{tmp_path}/out/shards"
    with pytest.raises(ValueError, match=r"set shards\.data_dir"):
        place(config, [y, z], None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/trials.jsonl").touch()
    with pytest.raises(ValueError, match="holds a search"):
        place(config, [x, y], str(tmp_path / "out"))


def test_more_mixtures_and_seeds_keep_the_numbers_of_the_trials_that_are_there(tmp_path: Path) -> None:
    def planned(names: str, seeds: int) -> dict[int, tuple[float, int]]:
        search = Search(load_search(None, overrides=(f"out_dir={tmp_path}", f"train.seeds={seeds}")), io.StringIO())
        entries = [Entry(name, "", {"a": float(ord(name))}, {}) for name in names]
        return {trial.index: (trial.weights["a"], trial.seed) for trial in plan_trials(search, entries)}

    first = planned("xy", 2)
    assert list(first) == [0, 1, 100, 101], "seed by seed"
    more = planned("zyx", 3)
    assert more.items() > first.items() and len(more) == 9
    assert planned("zx", 1) == {2: more[2], 0: more[0]}


def write_inputs(folder: Path) -> list[str]:
    """Shards, mixtures and a config as a user has them; the arguments of a comparison but for the mixtures."""
    write_tiny_shards(folder / "shards")
    for name, weights in MIXTURES.items():
        text = yaml.safe_dump({"train": {f"train_{domain}": weight for domain, weight in weights.items()}})
        (folder / f"{name}.yaml").write_text(text)
    main = to_dict(tiny_config(folder, "eval.every=5"))
    config = {"corpus": {"kind": "none"}, "shards": {"data_dir": str(folder / "shards")}, "train": {"main": main}}
    (folder / "search.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(folder / "search.yaml"), "--stage", "compare", "--out", str(folder / "out")]


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["human.yaml"], "name two or more mixture.yaml"),
        (["human.yaml", "runs.csv"], "runs.csv is none"),
        (["human.yaml", "typo.yaml"], "did you mean train_a"),
        (["human.yaml", "often.yaml"], "often.yaml: train_a has 2036 tokens"),
        (["human.yaml", "own.yaml"], "own.yaml: train_d names shards by path"),
        (["human.yaml", "skewed.yaml", "--losses", "l.csv"], "no other tables"),
        (["human.yaml", "skewed.yaml", "--target", "d"], "has no valid_d. Known: a, b, c; --target mean"),
        (["human.yaml", "skewed.yaml", "--set", "train.main.reweighting={}"], "train.main.reweighting: a comparison"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(tmp_path, capsys, files, named) -> None:
    arguments = write_inputs(tmp_path)
    (tmp_path / "typo.yaml").write_text("train: {train_aa: 1, train_b: 1}\n")
    (tmp_path / "often.yaml").write_text("train: {train_a: {weight: 1, max_epochs: 0.5}}\n")
    (tmp_path / "own.yaml").write_text("train: {train_d: {weight: 1, path: train_a}}\n")
    paths = [str(tmp_path / name) if name.endswith((".yaml", "runs.csv")) else name for name in files]
    assert cli.main([*arguments, "--mixtures", *paths]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error
    assert not (tmp_path / "out/trials.jsonl").exists()


def test_mixture_files_belong_to_this_stage_alone(tmp_path, capsys) -> None:
    assert cli.main(["--stage", "fit", "--mixtures", "a.yaml", "--losses", "l.csv", "--out", str(tmp_path)]) == 2
    assert "mixture.yaml files go with --stage compare" in capsys.readouterr().err


def paths_of(folder: Path, *names: str) -> list[str]:
    return ["--mixtures", *(str(folder / f"{name}.yaml") for name in names)]


@pytest.mark.slow
def test_a_killed_comparison_repeats_nothing_grows_and_finds_equals_equal(tmp_path, capsys) -> None:
    arguments, ledger = write_inputs(tmp_path), tmp_path / "out/trials.jsonl"
    two = [*arguments, *paths_of(tmp_path, "human", "skewed"), "--set", "train.workers=1"]
    killed = subprocess.run([sys.executable, "-c", DIES, *two], cwd=ROOT, stdout=subprocess.DEVNULL, timeout=600)
    assert killed.returncode == -signal.SIGKILL
    before = [event for event in read_jsonl(ledger) if event["event"] == "finish"]
    assert len(before) == 1 and not (tmp_path / "out/compare.json").exists()

    assert cli.main(two) == 0
    assert "skewed" in capsys.readouterr().out
    content = json.loads((tmp_path / "out/compare.json").read_text())
    assert [row["name"] for row in content["differences"]] == ["skewed"] and content["cost"]["runs"] == 4
    assert content["mixtures"][1]["runs"][0]["losses"]["a"] < content["mixtures"][0]["runs"][0]["losses"]["a"]
    assert len(content["mixtures"][0]["runs"][0]["curve"]) == 2

    grown = [*arguments, *paths_of(tmp_path, "same", "human", "skewed"), "--set", "train.seeds=3", "--json"]
    assert cli.main(grown) == 0
    content = json.loads(capsys.readouterr().out)
    events = [event for event in read_jsonl(ledger) if event["event"] == "finish"]
    assert sorted(event["trial"] for event in events) == [s * 100 + m for s in range(3) for m in range(3)], "each once"
    assert [event for event in events if event in before] == before
    same, human, _ = content["mixtures"]
    assert [run["losses"] for run in same["runs"]] == [run["losses"] for run in human["runs"]], "to the bit"
    [equal, skewed] = (row["average"] for row in content["differences"])
    assert (equal["difference"], equal["outcome"]) == (0, "unclear")
    means = [np.mean([run["average"] for run in mixture["runs"]]) for mixture in content["mixtures"]]
    assert skewed["difference"] == pytest.approx(means[2] - means[0])

    assert cli.main(grown[:-1]) == 0 and cli.main(["--stage", "status", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "compare: up to date" in said and "same shows" not in said and "human shows no significant" in said
    assert "models: 9 of 9 done" in said
    assert cli.main([*grown[:-1], "--dry-run"]) == 0
    assert "9 = same, human, skewed x 3 seeds" in capsys.readouterr().out
    assert cli.main([*two, "--set", "train.main.optim.lr=3e-3"]) == 2
    assert "optim.lr: 0.01 -> 0.003" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_saves_goes_on_where_it_was(tmp_path) -> None:
    write_tiny_shards(tmp_path / "shards")
    config = tiny_config(tmp_path, "checkpoint={every: 5, keep: 9}")
    train = ProxyTraining(config, str(tmp_path / "shards"), ("a", "b"), str(tmp_path / "models"))
    trial, folder = Trial(0, "train", {"a": 0.5, "b": 0.5}, 0), tmp_path / "models/t0000"
    whole, rows = train(trial), read_jsonl(folder / "metrics.jsonl")
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "step_0000010")
    again = train(trial)
    assert (again["losses"], again["bpb"]) == (whole["losses"], whole["bpb"])
    assert read_jsonl(folder / "metrics.jsonl")[:5] == rows[:5], "timings too: the first steps were not done again"
    assert read_jsonl(folder / "metrics.jsonl")[5:] != rows[5:]
