"""Metrics: the .jsonl files are the record; what mirrors them may fail without stopping the run."""

import sys
import time
import types

import pytest
import torch

from megatron_lite.files import read_jsonl
from megatron_lite.metrics import Metrics, Stopwatch
from megatron_lite.testing import tiny_config, write_tiny_shards
from megatron_lite.train import log, train


class FakeWandb(types.ModuleType):
    """Stands for the wandb package: keeps what it is told."""

    def __init__(self, fail_at: int = 10**9) -> None:
        super().__init__("wandb")
        self.fail_at, self.rows, self.finished, self.settings = fail_at, {}, False, {}

    def init(self, **settings):
        self.settings = settings
        return self

    def log(self, values, step):
        if step >= self.fail_at:
            raise ConnectionError("port closed")
        self.rows.setdefault(step, {}).update(values)

    def finish(self):
        self.finished = True


def test_wandb_mirrors_metrics_jsonl_and_one_folder_is_one_curve(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(tiny_config(tmp_path / "run", "log.wandb=true"), write_tiny_shards(tmp_path / "shards"))
    logged = {row["step"]: row["train/loss"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")}
    assert {step: row["train/loss"] for step, row in fake.rows.items()} == logged and len(logged) == 10
    assert "valid/a/bpb" in fake.rows[10] and fake.finished
    assert fake.settings["resume"] == "allow" and fake.settings["id"].endswith("run")


def test_a_mirror_that_fails_is_left_out_and_the_record_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fail_at=3))
    with pytest.warns(UserWarning, match=r"WandB failed \(port closed\) and is left out from step 3 on"):
        train(tiny_config(tmp_path / "run", "log.wandb=true"), write_tiny_shards(tmp_path / "shards"))
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 11))


def test_wandb_that_is_missing_is_a_setting_to_change(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log\.wandb: wandb is not installed"):
        Metrics(tiny_config(tmp_path, "log.wandb=true"), 10, 0)


def test_mfu_is_printed_beside_the_peak_that_it_is_a_part_of(tmp_path, capsys):
    metrics = Metrics(tiny_config(tmp_path, "log.console=true"), 10, 0)
    plan = types.SimpleNamespace(flops_per_token=2_000_000)
    mesh = types.SimpleNamespace(size=4)
    run = types.SimpleNamespace(metrics=metrics, plan=plan, mesh=mesh, step=3, peak_flops=989.5e12)
    log(run, {"perf/tokens_per_s": 1e9})
    assert "| mfu 50.5% | of 9.895e+14 FLOP/s" in capsys.readouterr().out  # 2e6 * 1e9 / (4 * 989.5e12)
    run.peak_flops = None
    log(run, {"perf/tokens_per_s": 1e9})
    assert "mfu" not in capsys.readouterr().out
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert rows[0]["perf/peak_flops"] == 989.5e12 and "perf/mfu" not in rows[1]


def test_a_run_says_what_its_flops_count_and_what_mfu_is_of(tmp_path, capsys):
    train(tiny_config(tmp_path / "run", "log.console=true"), write_tiny_shards(tmp_path / "shards"))
    out = capsys.readouterr().out
    assert "PaLM's 6N + 12LdS: N multiplies, head included" in out and "mfu         no peak is known" in out


def test_the_stopwatch_counts_steps_and_the_share_of_waiting():
    watch = Stopwatch()
    for _ in range(4):
        with watch.waiting_for_data():
            time.sleep(0.03)
        time.sleep(0.01)
    lap = watch.lap(100, torch.device("cpu"))
    assert 0.5 < lap["perf/data_wait"] <= 1.0 and lap["perf/step_s"] >= 0.04
    assert lap["perf/tokens_per_s"] == pytest.approx(100 / lap["perf/step_s"])
    assert 0.01 < lap["perf/memory_gib"] < 100
    with watch.waiting_for_data():
        pass
    assert watch.lap(100, torch.device("cpu"))["perf/step_s"] < 0.04, "a lap starts anew"
