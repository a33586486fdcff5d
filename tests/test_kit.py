"""The kit's scripts as a user starts them: what they run, what they skip, where they stop."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_lite.data.mixture import Mixture
from megatron_lite.testing import write_tiny_shards

ROOT = Path(__file__).resolve().parents[1]
RECORD = """#!{python}
import os, pathlib, sys
folder = pathlib.Path(next(a for a in sys.argv if a.startswith("out_dir=")).removeprefix("out_dir="))
with open({log!r}, "a") as log:
    print(*sys.argv[1:], file=log)
if folder.name == os.environ.get("FAILS"):
    sys.exit(75)
folder.mkdir(parents=True)
(folder / "result.json").write_text("{{}}")
"""


def script(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """A script of launch/, with this Python as the first on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", f"launch/{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_the_1b_experiment_is_twenty_runs_that_stop_and_go_on(tmp_path):
    log, launch = tmp_path / "log", tmp_path / "launch"
    launch.write_text(RECORD.format(python=sys.executable, log=str(log)))
    launch.chmod(0o755)
    places = {"launch": str(launch), "out": str(tmp_path / "out"), "shards": "/data/pile"}
    assert script("regmix_1b.sh", FAILS="regmix-2", **places).returncode == 75
    assert len(log.read_text().splitlines()) == 8, "seed 1, and seed 2 up to the run that was cut"
    assert script("regmix_1b.sh", "--engine", "torch", **places).returncode == 0
    lines = log.read_text().splitlines()
    done = sorted(path.parent.name for path in (tmp_path / "out").glob("*/result.json"))
    assert done == sorted(f"{m}-{s}" for m in ("human", "doremi", "pile_cc_only", "regmix") for s in range(1, 6))
    assert len(lines) == 21 and all(line.endswith("--engine torch") for line in lines[8:]), "none was run twice"
    assert lines[-1].split()[:8] == [
        *("--config", "configs/model/tinyllama_1_1b.yaml", "--mixture", "configs/mixture/regmix.yaml"),
        *("--name", "regmix-5", "--set", "data.data_dir=/data/pile"),
    ]
    assert "seed=5" in lines[-1].split()


@pytest.mark.slow
def test_a_dry_run_of_the_kit_asks_no_launcher_and_says_what_is_missing(tmp_path):
    done = script("regmix_1b.sh", "--gpus", "8", "--dry-run", shards=str(tmp_path), launch="false")
    assert done.returncode == 2 and "train_the_pile_arxiv has no shard" in done.stderr
    assert "25,000 steps, 26,214,400,000 tokens" in done.stdout and "published: 2 days on 8 A100" in done.stdout


@pytest.mark.slow
def test_doremis_pipeline_ends_with_a_model_on_the_weights_that_its_proxy_found(tmp_path):
    names = yaml.safe_load((ROOT / "configs/mixture/pile_uniform.yaml").read_text())["train"]
    write_tiny_shards(tmp_path / "shards", [name.removeprefix("train_") for name in names])
    small = ["model.num_layers=1", "model.hidden_size=32", "model.num_heads=2", "model.ffn_hidden_size=32"]
    small += ["data.seq_length=16", "batch={global_batch_size: 44, micro_batch_size: 44}", "model.vocab_size=64"]
    small += ["schedule={total_tokens: 3520, warmup_steps: 1}", "eval.max_tokens=64", "log.every=1"]
    out = tmp_path / "out"
    places = {"launch": "python launch/pretrain.py", "out": str(out), "shards": str(tmp_path / "shards")}
    done = script("doremi_120M.sh", "--set", *small, **places)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "proxy/result.json").read_text())["domain_weights"]
    trained = Mixture.load(out / "main/mixture.yaml")
    assert dict(zip(trained.names, trained.weights, strict=True)) == pytest.approx(found)
    assert max(found.values()) > min(found.values()) > 0 and sum(found.values()) == pytest.approx(1)
    reference = Mixture.load(out / "reference/mixture.yaml")
    assert reference.weights[0] == pytest.approx(0.109025, rel=1e-5)
    times = [(out / run / "result.json").stat().st_mtime_ns for run in ("reference", "proxy", "main")]
    assert script("doremi_120M.sh", "--set", *small, **places).returncode == 0
    assert times == [(out / run / "result.json").stat().st_mtime_ns for run in ("reference", "proxy", "main")]


def test_every_file_and_setting_that_the_page_names_is_there():
    text = (ROOT / "docs/regmix_1b.md").read_text()
    named = set(re.findall(r"\b(?:configs|launch|tests|data_tools|docs)/[\w/]+\.\w+", text))
    assert len(named) > 8 and all((ROOT / name).is_file() for name in named), named
    for name in ("regmix_1b.sh", "doremi_120M.sh"):
        assert os.access(ROOT / "launch" / name, os.X_OK)
        for variable in ("shards", "out", "launch"):
            assert f"{variable}=${{{variable}:-" in (ROOT / "launch" / name).read_text()
