"""benchmarks.train and .gpu: the same work on every side, the best peer in every row, no GPU no figures."""

import dataclasses

import pytest
import torch

from benchmarks import gpu, train
from benchmarks.sides import SIDES, Case, export_weights
from benchmarks.table import best_of

CPU = torch.device("cpu")
TINY = Case("demo_proxy", 96, 24, 2, "fp32", num_kv_heads=2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_sides_do_the_same_steps_from_the_same_weights(tmp_path, precision):
    pytest.importorskip("transformers")
    pytest.importorskip("litgpt")
    case = dataclasses.replace(TINY, precision=precision)
    export_weights(case, tmp_path / "weights")
    losses = {}
    for side, build in SIDES.items():
        step = build(case, tmp_path / "weights", CPU)
        losses[side] = [step(*case.batch()).item() for _ in range(6)]
    assert losses["ours"][0] - losses["ours"][5] > 0.1  # they learn, so a wrong update would show
    tolerance = train.TOLERANCE if precision == "fp32" else 0.02
    for side in ("hf", "litgpt"):
        assert losses[side] == pytest.approx(losses["ours"], abs=tolerance), side


def test_sides_that_differ_are_refused():
    rounds = [{"ours": {"loss": 5.0}, "hf": {"loss": 5.0 + 0.9e-4}}, {"ours": {"loss": 4.0}, "hf": {"loss": 4.0002}}]
    train.check_losses(TINY, rounds[:1])
    with pytest.raises(RuntimeError, match="step 1"):
        train.check_losses(TINY, rounds)
    with pytest.raises(RuntimeError, match="step 0"):
        train.check_losses(TINY, [{"ours": {"loss": 5.0}, "hf": {"loss": float("nan")}}])


@pytest.mark.parametrize(("more_is_better", "peer", "ratio"), [(True, "b", 0.5), (False, "a", 0.25)])
def test_a_row_is_against_the_best_peer(more_is_better, peer, ratio):
    row = best_of("k", {"a": 2.0, "ours": 8.0, "b": 16.0}, "x", more_is_better)
    assert (row.peer_name, row.ratio, row.ours) == (peer, ratio, 8.0)


@pytest.mark.parametrize(("threads", "rate"), [(1, 48 / 2.0), (2, 48 / 0.5)])
def test_one_thread_counts_median_cpu_seconds_and_two_the_shortest_time(threads, rate):
    steps = [{"cpu_s": c, "wall_s": c / 2, "memory_mb": 100.0 + c} for c in (9.0, 1.0, 2.0)]
    slow = [{"cpu_s": 4.0, "wall_s": 2.0, "memory_mb": 204.0}]
    speed, memory = train.rows_of("k", TINY, threads, {"ours": steps, "hf": slow, "litgpt": slow})
    assert speed.ours == rate and speed.ratio == pytest.approx(rate / (12 if threads == 1 else 24))
    assert memory.key == "k.memory" and memory.ours == 102 and memory.ratio == 2


@pytest.mark.slow
def test_processes_take_turns_and_report_memory(monkeypatch):
    pytest.importorskip("litgpt")
    monkeypatch.setitem(train.CASES, "tiny", (Case("demo_proxy", 8192, 128, 8, "fp32"), 1))
    speed, memory = train.run(["tiny"], repeats=1)
    assert speed.key == "tiny" and speed.ours > 0 and speed.peer > 0
    logits = 8192 * 128 * 8 * 4 / 1e6  # of the peers alone
    assert memory.peer > 2 * logits and memory.peer > memory.ours > 16 * 2 * 8192 * 64 / 1e6


def test_the_gpu_benchmark_measures_on_any_device():
    pytest.importorskip("transformers")
    found = {}
    for side in ("ours", "hf"):
        found[side] = found[f"{side}+compile"] = one = measured(side)
        assert one.tokens_per_s > 0 and one.memory_gb > 0
    assert found["ours"].first_loss == pytest.approx(found["hf"].first_loss, abs=gpu.TOLERANCE)
    found["ours+compile"] = dataclasses.replace(found["ours"], tokens_per_s=2 * found["ours"].tokens_per_s)
    rows = {row.key: row for row in gpu.rows_of("k", TINY, found, 1e12)}
    assert list(rows) == ["k", "k.eager", "k.mfu", "k.memory"]
    assert rows["k.mfu"].ours == pytest.approx(rows["k"].ours * TINY.shape.flops_per_token / 1e12)
    assert rows["k.eager"].ours == rows["k"].ours / 2
    assert "k.mfu" not in {row.key for row in gpu.rows_of("k", TINY, found, None)}  # an unknown card has no MFU


def measured(side: str) -> gpu.Found:
    """One side of a tiny case on the CPU, compiler left out."""
    import tempfile
    from pathlib import Path

    case = dataclasses.replace(TINY, precision="bf16")
    with tempfile.TemporaryDirectory() as room:
        export_weights(case, Path(room, "weights"))
        return gpu.measure(side, case, Path(room, "weights"), CPU, steps=1)


def test_without_a_gpu_one_line_and_exit_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "no CUDA device" in err


def test_the_models_on_the_gpu_are_those_that_the_targets_speak_of():
    shape = gpu.CASES["tinyllama_1_1b.bf16"].shape
    assert shape.flops_per_token == pytest.approx(
        7.314e9, rel=1e-3
    )  # TinyLlama's, so 50 % of 989.5e12 is 67.6k tokens/s
    assert gpu.CASES["tinyllama_1M.bf16"].shape.vocab_size == 50432


@pytest.mark.parametrize("module", [train, gpu])
def test_unknown_cases_are_named(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--only", "nope"])
    assert "no case nope" in capsys.readouterr().err
