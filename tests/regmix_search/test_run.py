"""The whole search, tiny: text to report, killed on the way, run again, and every refusal."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_proxies import assert_dead

from megatron_lite.files import folder_lock
from regmix_search import run as cli
from regmix_search.config import load_search
from regmix_search.executors.local import LocalPool
from regmix_search.ledger import Ledger, Trial, replay
from regmix_search.progress import Progress
from regmix_search.proxies import ProxyTraining, run_trials
from regmix_search.search import Search
from regmix_search.stages import plan_trials, settings

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs/search/demo.yaml"
SMOKE = ["--config", str(DEMO), "--preset", "smoke"]
STAGES = [stage for stage in cli.ORDER if stage != "scales"]  # without runs of other sizes that one has nothing to do


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "regmix_search.run", *SMOKE, "--out", str(out), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(out: Path, *arguments: str) -> str:
    process = start(out, *arguments)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


def events(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class Finished:
    """The smoke search after it was killed once and run again."""

    out: Path
    finished_at_kill: set[int]
    text: str


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("search") / "smoke"
    first = start(out)
    deadline = time.monotonic() + 240
    while len(replay(out / "trials.jsonl").finished) < 4:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline, "no four proxies in four minutes"
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    killed = set(replay(out / "trials.jsonl").finished)
    return Finished(out, killed, finish(out))


def test_a_killed_search_goes_on_and_repeats_nothing(smoke):
    done = Counter(e["trial"] for e in events(smoke.out) if e["event"] == "finish")
    assert 4 <= len(smoke.finished_at_kill) < 17 and set(done) == set(range(17))
    assert set(done.values()) == {1}
    claims = Counter(e["trial"] for e in events(smoke.out) if e["event"] == "claim")
    assert all(claims[i] == 1 for i in smoke.finished_at_kill)
    for stage in ("corpus", "tokenizer", "shards", "mixtures"):
        assert f"{stage}: up to date" in smoke.text, smoke.text


def test_every_artefact_is_there_and_consistent(smoke):
    out = smoke.out
    mixtures, losses = read_csv(out / "mixtures.csv"), read_csv(out / "losses.csv")
    assert [row["index"] for row in mixtures] == [row["index"] for row in losses] == [str(i) for i in range(17)]
    assert all(abs(sum(float(v) for k, v in row.items() if k != "index") - 1) < 1e-9 for row in mixtures)
    space, optimum = (json.loads((out / name).read_text()) for name in ("space.json", "optimum.json"))
    mixture = yaml.safe_load((out / "mixture.yaml").read_text())
    entries = {
        k.removeprefix("train_"): v if isinstance(v, dict) else {"weight": v} for k, v in mixture["train"].items()
    }
    weights = {domain: entry["weight"] for domain, entry in entries.items()}
    assert all(entry.get("max_epochs") == (4 if entry["weight"] else None) for entry in entries.values())
    assert weights == pytest.approx(optimum["weights"]) and sum(weights.values()) == pytest.approx(1)
    assert all(weights[d] <= space["caps"][d] + 1e-9 for d in space["domains"])
    assert min(space["caps"].values()) < 0.5, "the smoke preset must make a cap bind"
    assert (
        set(mixture["valid"]) >= {"valid_readme", "valid_readme_test"} and mixture["provenance"]["target"] == "readme"
    )
    for name in ("report.html", "report.md", "fit.json", "config.yaml", "corpus/SOURCES.md"):
        assert (out / name).stat().st_size > 100


def test_the_test_half_of_the_target_is_never_seen_by_the_search(smoke):
    columns = read_csv(smoke.out / "losses.csv")[0]
    assert "metric/readme_val_loss" in columns and "metric/readme_test_val_loss" not in columns
    assert all("readme_test" not in e.get("losses", {}) for e in events(smoke.out))
    assert "readme_test" not in json.loads((smoke.out / "fit.json").read_text())["targets"]
    train = json.loads((smoke.out / "train.json").read_text())
    assert train["target_test"] == "readme_test" and all("readme_test" in run["losses"] for run in train["runs"])


def test_held_out_proxies_are_not_fitted_and_repeats_have_their_own_seeds(smoke):
    kinds = {e["trial"]: e["kind"] for e in events(smoke.out)}
    fit = json.loads((smoke.out / "fit.json").read_text())
    held = [i for i, kind in kinds.items() if kind == "holdout"]
    assert sorted(fit["targets"]["readme"]["holdout"]["index"]) == sorted(held) and len(held) == 3
    assert not set(fit["train_index"]) & set(held)
    done = [e for e in events(smoke.out) if e["event"] == "finish"]
    seeds = {kind: [e["seed"] for e in done if e["kind"] == kind] for kind in ("train", "holdout", "repeat")}
    assert set(seeds["train"]) == set(seeds["holdout"]) == {0} and sorted(seeds["repeat"]) == [1, 2]
    finished = replay(smoke.out / "trials.jsonl").finished
    assert finished[0]["weights"] == finished[1]["weights"] and finished[0]["losses"] != finished[1]["losses"]


def test_main_runs_share_budget_and_sets_and_differ_by_seed(smoke):
    train = json.loads((smoke.out / "train.json").read_text())
    expected = [("optimal", 0), ("optimal", 1), ("prior", 0), ("prior", 1)]
    assert sorted((run["mixture"], run["seed"]) for run in train["runs"]) == expected
    assert {run["tokens"] for run in train["runs"]} == {train["budget_tokens"]} == {10_240}
    assert len({tuple(sorted(run["losses"])) for run in train["runs"]}) == 1
    assert len({run["losses"]["readme"] for run in train["runs"]}) == 4
    for run in train["runs"]:
        assert [tokens for tokens, _ in run["valid_curve"]] == [5_120, 10_240]
        assert run["valid_curve"][-1][1] == run["losses"]["readme"]
        assert [tokens for tokens, _ in run["curve"]] == [2_560, 5_120, 7_680, 10_240]
        assert (smoke.out / run["run_dir"] / "result.json").is_file()
    assert train["model"]["non_embedding_params"] >= 4 * 10_336


def test_a_second_run_does_nothing(smoke):
    def state() -> dict[str, tuple[int, bytes]]:
        files = [p for p in smoke.out.rglob("*") if p.is_file() and p.name not in ("config.yaml", ".lock")]
        return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}

    before = state()
    text = finish(smoke.out)
    for stage in (
        stage for stage in cli.ORDER if stage != "scales"
    ):  # it has nothing to do without runs of other sizes
        assert f"{stage}: up to date" in text, text
    assert state() == before


def test_json_is_one_object_on_stdout(smoke, capfd):
    assert cli.main([*SMOKE, "--out", str(smoke.out), "--json"]) == 0
    summary = json.loads(capfd.readouterr().out)
    assert [stage["stage"] for stage in summary["stages"]] == STAGES
    assert not any(stage["ran"] for stage in summary["stages"])
    assert Path(summary["files"]["mixture.yaml"]).is_file()


def copy_search(smoke: Finished, tmp_path: Path, *left_out: str) -> Path:
    out = tmp_path / "copy"
    shutil.copytree(smoke.out, out, ignore=shutil.ignore_patterns("train", *left_out))
    return out


def test_a_lost_artefact_is_made_again_alone(smoke, tmp_path):
    out = copy_search(smoke, tmp_path)
    before, trials = (out / "optimum.json").read_bytes(), (out / "trials.jsonl").read_bytes()
    (out / "optimum.json").unlink()
    finish(out, "--stage", "optimize")
    assert (out / "optimum.json").read_bytes() == before and (out / "trials.jsonl").read_bytes() == trials


def test_a_search_is_extended_without_repeating(smoke, tmp_path):
    out = copy_search(smoke, tmp_path)
    before = events(out)
    finish(out, "--set", "mixtures.count=14", "--stage", "mixtures")
    finish(out, "--set", "mixtures.count=14", "--stage", "proxies")
    assert sorted(e["trial"] for e in events(out)[len(before) :] if e["event"] == "finish") == [17, 18]
    assert len(read_csv(out / "losses.csv")) == 19


def test_a_search_goes_on_in_rounds(smoke, tmp_path):
    """Two more proxies where improvement is expected, and nothing again when the same command is repeated."""
    out = copy_search(smoke, tmp_path)
    before, more = events(out), ["--set", "mixtures.rounds=1", "--set", "mixtures.batch=2"]
    finish(out, *more, "--stage", "mixtures")
    assert "round 1 of 1: 2 mixtures" in finish(out, *more, "--stage", "proxies")
    assert sorted(e["trial"] for e in events(out)[len(before) :] if e["event"] == "finish") == [17, 18]
    history = json.loads((out / "rounds.json").read_text())
    assert history["stopped"].startswith("1 rounds done") and len(history["rounds"]) == 1
    for stage in ("mixtures", "proxies"):
        assert f"{stage}: up to date" in finish(out, *more, "--stage", stage)
    finish(out, *more, "--stage", "fit")
    assert json.loads((out / "fit.json").read_text())["n_train"] == 16


def test_a_search_may_minimise_several_losses(smoke, tmp_path):
    """The proxies measure them all anyway; models are compared on one loss, so a search of several ends before."""
    out = copy_search(smoke, tmp_path)
    several = ["--set", "fit.target=prose=1,python=3", "--set", "fit.surrogates=[linear]"]
    refused = start(out, *several, "--stage", "proxies")
    assert refused.wait() == 2 and "set train.enabled=false" in refused.communicate()[0]
    several += ["--set", "train.enabled=false"]
    for stage in ("proxies", "fit", "optimize", "report"):
        finish(out, *several, "--stage", stage)
    found = json.loads((out / "optimum.json").read_text())
    assert found["target"] == {"prose": 0.25, "python": 0.75} and sum(found["weights"].values()) == pytest.approx(1)
    assert "0.25 prose + 0.75 python" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("proxy.optim.lr=0.001", "settings.proxy.optim.lr: 0.004 -> 0.001"),
        ("mixtures.temperature=1.0", "settings.mixtures.temperature: 0.5 -> 1.0"),
        ("shards.fraction=0.4", "settings.shards.fraction: 0.5 -> 0.4"),
        ("tokenizer.vocab_size=600", "settings.tokenizer.vocab_size: 512 -> 600"),
    ],
)
def test_other_settings_are_refused_before_anything_is_touched(smoke, capsys, change, named):
    before = {p: p.stat().st_mtime_ns for p in smoke.out.rglob("*") if p.is_file() and p.name != ".lock"}
    assert cli.main([*SMOKE, "--out", str(smoke.out), "--set", change]) == 2
    error = capsys.readouterr().err
    assert named in error and "--out" in error and "Traceback" not in error
    assert {p: p.stat().st_mtime_ns for p in smoke.out.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_a_folder_in_use_is_refused(smoke, capsys):
    with folder_lock(smoke.out):
        assert cli.main([*SMOKE, "--out", str(smoke.out)]) == 2
    error = capsys.readouterr().err
    assert f"in use by pid {os.getpid()}" in error and "--join" in error


@dataclass(frozen=True)
class Failing:
    """A proxy training that diverges for one trial and dies in another's first try."""

    real: ProxyTraining
    diverges: int
    dies: int

    def __call__(self, trial: Trial) -> dict[str, Any]:
        if trial.index == self.diverges:
            raise FloatingPointError("step 3: the gradient norm is nan")
        mark = Path(self.real.runs_dir) / "died"
        if trial.index == self.dies and not mark.exists():
            mark.mkdir(parents=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.real(trial)


def test_finished_models_are_kept_when_only_logging_changes_and_moved_aside_otherwise(smoke, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(smoke.out, out)
    runs = sorted(p.name for p in (out / "train").iterdir() if (p / "result.json").is_file())
    before = {name: (out / "train" / name / "result.json").stat().st_mtime_ns for name in runs}
    finish(out, "--set", "train.main.log.every=7")
    assert {name: (out / "train" / name / "result.json").stat().st_mtime_ns for name in runs} == before
    text = finish(out, "--set", "train.main.optim.lr=1e-3")
    assert text.count("the old run is in") == len(runs)
    assert all((out / "train" / f"{name}.old-1" / "result.json").is_file() for name in runs)
    assert len(json.loads((out / "train.json").read_text())["runs"]) == len(runs)


def test_a_misspelt_test_target_is_refused_before_any_proxy(smoke, tmp_path, capsys):
    shards = tmp_path / "mine"
    shutil.copytree(smoke.out / "shards", shards)
    arguments = [*SMOKE, "--out", str(tmp_path / "out"), "--set", f"shards.data_dir={shards}"]
    assert cli.main([*arguments, "--set", "fit.target_test=readme_tset"]) == 2
    assert "fit.target_test=readme_tset" in capsys.readouterr().err
    assert not (tmp_path / "out" / "trials.jsonl").exists()


def test_the_mixture_carries_its_caps_to_longer_runs(smoke, tmp_path):
    command = [sys.executable, "launch/pretrain.py", "--mixture", str(smoke.out / "mixture.yaml"), "--dry-run"]
    sizes = ["--set", "data.seq_length=64", "--set", "model.preset=demo_proxy", "--set", f"out_dir={tmp_path}"]
    sizes += ["--set", "batch={global_batch_size: 4, micro_batch_size: 4}", "--set", "schedule.warmup_steps=0"]
    for tokens, code in ((100_000, 0), (10_000_000, 2)):
        sized = [*command, *sizes, "--set", f"schedule.total_tokens={tokens}"]
        done = subprocess.run(sized, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert "max_epochs is 4" in done.stderr and "The largest weight allowed" in done.stderr


def test_a_failing_proxy_is_recorded_and_left_out(smoke, tmp_path, capsys):
    out = copy_search(smoke, tmp_path, "trials*", "losses.csv", "proxies")
    config = load_search(DEMO, "smoke", (f"out_dir={out}", "train.enabled=false"))
    search = Search(config, sys.stdout)
    inventory = search.inventory
    ledger = Ledger(out / "trials.jsonl", plan_trials(search), {**settings(config), "shards": inventory.digest})
    valid = tuple(d for d in inventory.valid if d != "readme_test")
    proxy = dataclasses.replace(config.proxy, threads=1, log=dataclasses.replace(config.proxy.log, console=False))
    real = ProxyTraining(proxy, str(search.shards_dir), valid, str(out / "proxies"))
    with Progress("proxies", sys.stdout) as progress:
        list(run_trials(ledger, LocalPool(Failing(real, diverges=7, dies=9), 2), progress))
    reasons = {i: [e["reason"] for e in failed] for i, failed in ledger.failures.items()}
    assert list(ledger.failed) == [7] and "gradient norm is nan" in reasons[7][0] and "SIGKILL" in reasons[9][0]
    assert "failed for good: trial 7: FloatingPointError" in finish(out, "--stage", "proxies")
    assert [int(row["index"]) for row in read_csv(out / "losses.csv")] == [i for i in range(17) if i != 7]
    same = {i: e["losses"] for i, e in replay(smoke.out / "trials.jsonl").finished.items() if i != 7}
    assert {i: e["losses"] for i, e in replay(out / "trials.jsonl").finished.items()} == same, (
        "proxies are deterministic"
    )


def test_diverging_proxies_stop_the_search_with_their_reason(smoke, tmp_path, capsys):
    out = copy_search(smoke, tmp_path, "trials*", "losses.csv", "proxies")
    changes = ["--set", "proxy.optim.lr=1e30", "--set", "proxies.workers=1"]
    assert cli.main([*SMOKE, "--out", str(out), "--stage", "proxies", *changes]) == 2
    error = capsys.readouterr().err
    assert "no proxy succeeds" in error and "gradient norm" in error, error
    assert [e["event"] for e in events(out)].count("fail") == 3


def test_a_polite_kill_leaves_a_ledger_and_no_workers(smoke, tmp_path):
    out = copy_search(smoke, tmp_path, "trials*", "losses.csv", "proxies")
    process = start(out, "--stage", "proxies")
    while not replay(out / "trials.jsonl").finished:
        assert process.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2, "two workers, and multiprocessing's own"
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from here" in text and "Traceback" not in text, text
    assert len(replay(out / "trials.jsonl").finished) < 17
    for pid in children:
        assert_dead(int(pid))


def test_fit_and_optimize_from_two_csv_files(smoke, tmp_path, capsys):
    files = ["--mixtures", str(smoke.out / "mixtures.csv"), "--losses", str(smoke.out / "losses.csv")]
    files += ["--set", "fit.surrogates=[linear]"]
    out = tmp_path / "csv"
    assert cli.main(["--stage", "optimize", *files, "--target", "prose", "--out", str(out)]) == 0
    free = yaml.safe_load((out / "mixture.yaml").read_text())["train"]
    assert sum(free.values()) == pytest.approx(1) and "predicted prose loss" in capsys.readouterr().out
    space = ["--space", str(smoke.out / "space.json")]
    assert cli.main(["--stage", "optimize", *files, *space, "--target", "prose", "--out", str(out)]) == 0
    caps = json.loads((smoke.out / "space.json").read_text())["caps"]
    capped = yaml.safe_load((out / "mixture.yaml").read_text())["train"]
    assert all(weight <= caps[name.removeprefix("train_")] + 1e-9 for name, weight in capped.items())
    assert cli.main(["--stage", "fit", *files, "--target", "pros", "--out", str(tmp_path / "typo")]) == 2
    assert "'prose'" in capsys.readouterr().err


def test_bring_your_own_shards(smoke, tmp_path):
    out = tmp_path / "own"
    data = f"shards.data_dir={smoke.out / 'shards'}"
    assert "17 mixtures of 4 domains" in finish(out, "--set", data, "--stage", "mixtures")
    assert (out / "mixtures.csv").read_bytes() == (smoke.out / "mixtures.csv").read_bytes()
    assert cli.main([*SMOKE, "--out", str(out), "--set", data, "--stage", "corpus"]) == 0
    assert not (out / "corpus").exists()
