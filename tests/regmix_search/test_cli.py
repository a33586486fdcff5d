"""The command line of the search: plans, mistakes, configs. Nothing is trained here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from regmix_search import run as cli
from regmix_search.config import load_search

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs/search/demo.yaml"
SMOKE = ["--config", str(DEMO), "--preset", "smoke"]


def test_dry_run_says_what_it_will_cost_and_touches_nothing(tmp_path, capsys):
    assert cli.main([*SMOKE, "--out", str(tmp_path / "none"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "proxies: 17 = 12 to fit + 3 held back + 2 x the prior" in text and "models: 4 = optimal, prior" in text
    assert "87,040 tokens" in text and "FLOPs" in text and "GB free" in text
    assert not (tmp_path / "none").exists()


def test_one_set_takes_several_keys_as_pretraining_does(capsys):
    assert cli.main([*SMOKE, "--set", "seed=7", "train.seeds=5", "--set", "mixtures.count=9", "--print-config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["seed"], config["train"]["seeds"], config["mixtures"]["count"]) == (7, 5, 9)


@pytest.mark.parametrize("block", ["proxy", "train.main"])
def test_a_plan_that_cannot_be_says_of_which_model_it_is(tmp_path, capsys, block):
    wrong = ["--set", f"{block}.schedule.warmup_steps=100000"]
    assert cli.main([*SMOKE, "--out", str(tmp_path / "none"), "--dry-run", *wrong]) == 2
    assert f"error: in {block}: schedule.warmup_steps" in capsys.readouterr().err


def test_the_demo_trains_a_model_four_times_its_proxy(capsys):
    assert cli.main(["--config", str(DEMO), "--dry-run"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("models:"))
    assert float(line.split(" times a proxy")[0].split()[-1]) >= 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--set", "mixture.count=3"], "Did you mean 'mixtures'?"),
        (["--set", "mixtures.count=-3"], "mixtures.count=-3 must be at least 4"),
        (["--set", "shards.fraction=2"], "shards.fraction=2.0 must be between"),
        (["--set", "fit.target=readme_test"], "the test must be unseen"),
        (["--set", "corpus.kind=none"], "set corpus.dir"),
        (["--set", "corpus.dir=text"], "corpus.dir is only read with corpus.kind=none"),
        (["--preset", "smke"], "Did you mean 'smoke'?"),
        (["--mixtures", "a.csv"], "--mixtures and --losses go together"),
        (["--stage", "proxies"], "run `--stage shards` first"),
        (["--stage", "fit"], "run `--stage mixtures` first"),
        (["--stage", "report"], "run `--stage mixtures` first"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, arguments, named):
    assert cli.main(["--config", str(DEMO), "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error


def test_print_config_is_a_config(tmp_path, capsys):
    assert cli.main([*SMOKE, "--print-config", "--set", "seed=5"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_search(path) == load_search(DEMO, "smoke", ("seed=5",))


def test_help_starts_without_torch_or_numpy():
    code = "import sys, regmix_search.run; print([m for m in ('torch', 'numpy', 'scipy', 'rich') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).strip() == "[]"
