"""The loop: resume is bitwise, ranks and micro-batches change nothing, faults are named, the curve is golden."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_lite.config import Config, dump
from megatron_lite.data.mixture import Mixture
from megatron_lite.engine.torch_engine import TorchEngine
from megatron_lite.files import read_jsonl
from megatron_lite.mesh import Mesh
from megatron_lite.model import GPT
from megatron_lite.process import manual_gc
from megatron_lite.run import resolve
from megatron_lite.testing import run_distributed, tiny_config, write_tiny_shards
from megatron_lite.train import train

GOLDEN = Path(__file__).parent / "golden" / "loss_200_steps.json"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Mixture:
    return write_tiny_shards(tmp_path_factory.mktemp("shards"))


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_jsonl(run_dir / "metrics.jsonl")}


def last_state(run_dir: Path) -> dict[str, torch.Tensor]:
    folder = sorted(run_dir.glob("step_*"))[-1]
    return load_file(folder / "model.safetensors") | load_file(folder / "optim.safetensors")


def test_a_run_learns_and_leaves_its_record(tmp_path, mixture):
    config = tiny_config(tmp_path / "run", "schedule.total_tokens=12800", "eval.every=50")
    result = train(config, mixture)
    curve = losses(tmp_path / "run")
    assert curve[1] > 4.0 and curve[100] < 2.5  # ln 64 = 4.2; the chains have at most 4 next tokens
    assert set(result.losses) == {"a", "b", "c"} and result.tokens == 12800
    assert result.bpb["a"] == pytest.approx(result.losses["a"] / np.log(2) / 3)  # the shards say 3 bytes a token
    names = {"config.yaml", "plan.json", "mixture.yaml", "metrics.jsonl", "evals.jsonl", "result.json"}
    assert names <= {p.name for p in (tmp_path / "run").iterdir()}
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "evals.jsonl")] == [50, 100]


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_resume_is_bitwise_at_any_cut(tmp_path, mixture, cut):
    whole = tiny_config(tmp_path / "whole", "checkpoint={every: 10}")
    train(whole, mixture)
    config = tiny_config(tmp_path / "cut", "checkpoint={every: 1, keep: 20}")
    train(config, mixture)
    for folder in sorted((tmp_path / "cut").glob("step_*"))[cut:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    (tmp_path / "cut" / "result.json").unlink()
    train(config, mixture)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    first, second = last_state(tmp_path / "cut"), last_state(tmp_path / "whole")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert [r["step"] for r in read_jsonl(tmp_path / "cut" / "metrics.jsonl")] == list(range(1, 11))


def test_a_finished_run_is_not_repeated_and_a_changed_one_is(tmp_path, mixture):
    config = tiny_config(tmp_path / "run")
    first = train(config, mixture)
    before = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert train(config, mixture) == first
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == before
    changed = train(tiny_config(tmp_path / "run", "optim.lr=1e-3"), mixture)
    assert changed.losses != first.losses
    other = train(tiny_config(tmp_path / "run"), mixture.with_weights({"a": 1.0}))
    assert other.losses != first.losses


def test_resuming_another_run_is_refused_with_the_difference(tmp_path, mixture):
    train(tiny_config(tmp_path / "run", "checkpoint={every: 5}"), mixture)
    with pytest.raises(ValueError, match=r"(?s)optim.lr: 0.01 -> 0.5\n.*--allow-change optim.lr\n.*new out_dir"):
        train(tiny_config(tmp_path / "run", "checkpoint={every: 5}", "optim.lr=0.5"), mixture)
    with pytest.raises(
        ValueError,
        match=r"mixture: from step 10: a 0.166667 -> 1, b 0.333333 -> 0, c 0.5 -> 0\n.*--allow-change mixture",
    ):
        train(tiny_config(tmp_path / "run", "checkpoint={every: 5}"), mixture.with_weights({"a": 1.0}))


@pytest.mark.parametrize("override", ["schedule.min_lr=1e-4", "precision=bf16", "seed=5", "batch.global_batch_size=4"])
def test_whatever_changes_the_numbers_is_refused_on_resume(tmp_path, mixture, override):
    every = "checkpoint={every: 5}"
    train(tiny_config(tmp_path / "run", every), mixture)
    with pytest.raises(ValueError, match=override.split("=")[0] + ": "):
        train(tiny_config(tmp_path / "run", every, override), mixture)


def test_whatever_does_not_is_allowed(tmp_path, mixture):
    train(tiny_config(tmp_path / "run", "checkpoint={every: 4, keep: 9}"), mixture)
    assert [p.name[-2:] for p in sorted((tmp_path / "run").glob("step_*"))] == ["04", "08", "10"], (
        "the last step is saved"
    )
    shutil.rmtree(tmp_path / "run" / "step_0000010")
    first = json.loads((tmp_path / "run" / "result.json").read_text())
    (tmp_path / "run" / "result.json").unlink()
    shutil.copytree(mixture.data_dir, tmp_path / "moved")
    changed = ["batch.micro_batch_size=2", "log.every=2", "eval.every=3", f"data.data_dir={tmp_path / 'moved'}"]
    moved = Mixture.from_weights(dict(zip(mixture.names, mixture.weights, strict=True)), tmp_path / "moved")
    again = train(tiny_config(tmp_path / "run", "checkpoint={every: 4, keep: 9}", *changed), moved)
    assert again.losses == pytest.approx(first["losses"], rel=1e-5)
    rates = [r["perf/tokens_per_s"] for r in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert len(rates) == 9  # steps 1 to 8 of the first run, step 10 of the second: its step 9 is not logged


def test_a_run_that_died_after_its_last_checkpoint_is_only_evaluated(tmp_path, mixture):
    config = tiny_config(tmp_path / "run", "checkpoint={every: 5}")
    first = train(config, mixture)
    (tmp_path / "run" / "result.json").unlink()
    assert train(config, mixture).losses == first.losses
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 10


def test_resume_takes_a_folder_or_never(tmp_path, mixture):
    train(tiny_config(tmp_path / "run", "checkpoint={every: 5}"), mixture)
    before = losses(tmp_path / "run")
    other = tiny_config(
        tmp_path / "other", "checkpoint={every: 5}", f"checkpoint.resume={tmp_path / 'run/step_0000005'}"
    )
    train(other, mixture)
    assert losses(tmp_path / "other") == {step: loss for step, loss in before.items() if step > 5}
    stamp = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    train(tiny_config(tmp_path / "run", "checkpoint.resume=never"), mixture)
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns > stamp and losses(tmp_path / "run") == before


def test_handlers_of_before_come_back(tmp_path, mixture):
    def mine(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, mine)
    try:
        train(tiny_config(tmp_path / "run"), mixture)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def gradients(folder: str, micro_batch: int) -> tuple[dict[str, torch.Tensor], float, float]:
    """One step's averaged gradients, global norm and loss on this rank, with unequal masks."""
    config = tiny_config(Path(folder) / "unused", f"batch.micro_batch_size={micro_batch}", "optim.clip_grad=0")
    mesh = Mesh.from_env()
    loader, plan = resolve(config, Mixture.load(Path(folder) / "mixture.yaml"), mesh)
    engine = TorchEngine(config, plan, mesh)
    batches = loader.step(0)
    for batch in batches:  # a mask that depends on the sample alone, and differs between samples
        batch.loss_mask_BT = (batch.tokens_BT % 5 != batch.tokens_BT[:, :1] % 5).float()
    tokens = mesh.sum(torch.stack([b.loss_mask_BT.sum() for b in batches]).sum()).item()
    loss = mesh.sum(engine.forward_backward(batches, tokens)).item() / tokens
    grads = {n: p.grad.clone() for n, p in engine.module.named_parameters()}
    norm = engine.step(0.0).grad_norm
    engine.close()
    mesh.close()
    return grads, norm, loss


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 4), (1, 2), (1, 1), (2, 4), (2, 1)])
def test_ranks_and_micro_batches_do_not_change_the_gradient(tmp_path, mixture, world_size, micro_batch):
    mixture.save(tmp_path / "mixture.yaml")
    expected, norm, loss = gradients(str(tmp_path), 8)
    run = gradients if world_size == 1 else None
    results = [run(str(tmp_path), micro_batch)] if run else run_distributed(gradients, 2, str(tmp_path), micro_batch)
    for grads, got_norm, got_loss in results:
        assert got_loss == pytest.approx(loss, rel=1e-6) and got_norm == pytest.approx(norm, rel=1e-6)
        for name, grad in grads.items():
            assert (grad - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


def test_the_gradient_is_that_of_the_masked_mean(tmp_path, mixture):
    """The engine against plain autograd on the whole batch at once."""
    mixture.save(tmp_path / "mixture.yaml")
    grads, _, loss = gradients(str(tmp_path), 2)
    config = tiny_config(tmp_path / "unused")
    loader, plan = resolve(config, mixture, Mesh.from_env())
    tokens, labels = (torch.cat([getattr(b, n) for b in loader.step(0)]) for n in ("tokens_BT", "labels_BT"))
    mask = tokens % 5 != tokens[:, :1] % 5
    model = GPT(plan.shape, config.seed)
    expected = model(tokens, labels)[mask].mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, param in model.named_parameters():
        assert (grads[name] - param.grad).norm() <= 1e-5 * param.grad.norm(), name


@pytest.mark.parametrize("clip", [0.0, 0.05, 50.0])
def test_what_reaches_adamw_is_clipped_to_the_global_norm(tmp_path, mixture, clip):
    config = tiny_config(tmp_path / "unused", f"optim.clip_grad={clip}")
    loader, plan = resolve(config, mixture, Mesh.from_env())
    engine = TorchEngine(config, plan, Mesh.from_env())
    engine.forward_backward(loader.step(0), float(plan.tokens_per_step))
    norm = torch.cat([p.grad.flatten() for p in engine.module.parameters()]).double().norm().item()
    assert engine.step(1e-3).grad_norm == pytest.approx(norm, rel=1e-6) and 0.05 < norm < 50
    seen = torch.cat([m.flatten() for n, m in engine.state_dict().items() if n.startswith("exp_avg/")]).norm().item()
    beta = config.optim.betas[0]  # the first moment after one step is (1 - beta) times the gradient
    assert seen / (1 - beta) == pytest.approx(0.05 if clip == 0.05 else norm, rel=1e-4)


def trained(folder: str, overrides: list[str]) -> dict[int, float]:
    config = tiny_config(Path(folder) / "run", *overrides)
    train(config, Mixture.load(Path(folder) / "mixture.yaml"))
    Mesh.from_env().close()
    return losses(Path(folder) / "run")


def test_two_ranks_draw_the_curve_of_one_and_resume_each_other(tmp_path, mixture):
    (tmp_path / "two").mkdir()
    mixture.save(tmp_path / "mixture.yaml")
    mixture.save(tmp_path / "two" / "mixture.yaml")
    one = trained(str(tmp_path), ["checkpoint={every: 5}"])
    two = run_distributed(trained, 2, str(tmp_path / "two"), ["checkpoint={every: 5}"])[0]
    assert one.keys() == two.keys()
    assert max(abs(one[s] - two[s]) for s in one) <= 1e-5
    run = tmp_path / "two" / "run"
    for file in (run / "step_0000010").iterdir():
        file.unlink()
    (run / "result.json").unlink()
    resumed = trained(str(tmp_path / "two"), ["checkpoint={every: 5}"])  # written by two ranks, finished by one
    assert max(abs(one[s] - resumed[s]) for s in one) <= 1e-5


def test_a_non_finite_gradient_stops_before_the_update(tmp_path, mixture):
    config = tiny_config(tmp_path / "run", "optim.lr=1e30", "optim.clip_grad=0", "checkpoint={every: 1, keep: 99}")
    with pytest.raises(FloatingPointError, match=r"step (\d+): the gradient norm is .*samples \d+ to \d+"):
        train(config, mixture)
    assert not (tmp_path / "run" / "result.json").exists()
    for tensor in last_state(tmp_path / "run").values():
        assert not torch.isnan(tensor).any()


def test_out_dir_in_use_is_refused(tmp_path, mixture):
    from megatron_lite.files import folder_lock

    with folder_lock(tmp_path / "run"), pytest.raises(ValueError, match="in use by pid"):
        train(tiny_config(tmp_path / "run"), mixture)


def test_sigterm_saves_and_asks_to_be_run_again(tmp_path, mixture):
    mixture.save(tmp_path / "mixture.yaml")
    config = tiny_config(tmp_path / "run", "schedule.total_tokens=1e7", "log.console=true")
    (tmp_path / "c.yaml").write_text(dump(config))
    command = [
        sys.executable,
        "launch/pretrain.py",
        "--config",
        tmp_path / "c.yaml",
        "--mixture",
        tmp_path / "mixture.yaml",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait(30) == 75
    step = json.loads((next((tmp_path / "run").glob("step_*")) / "state.json").read_text())["step"]
    assert step >= 5 and losses(tmp_path / "run").keys() == set(range(1, step + 1))


def test_compile_failure_warns_and_trains(tmp_path, mixture, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: setattr(self, "_compiled_call_impl", broken))
    plain = train(tiny_config(tmp_path / "plain"), mixture)
    with pytest.warns(UserWarning, match="compile=true does not work here .*no compiler here"):
        result = train(tiny_config(tmp_path / "compiled", "compile=true"), mixture)
    assert result.losses == plain.losses


def test_under_cuda_graphs_gradients_add_up_where_they_are(tmp_path, mixture, monkeypatch):
    """A graph's outputs are overwritten when it is replayed, so a gradient must not be one; the modes are torch's."""
    modes, marks, places = [], [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: modes.append(options))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    real = TorchEngine.step

    def step(self, lr):
        places.append([param.grad.data_ptr() for param in self.module.parameters()])
        return real(self, lr)

    monkeypatch.setattr(TorchEngine, "step", step)
    train(tiny_config(tmp_path / "plain", "compile=true"), mixture)
    assert marks == []
    places.clear()
    train(tiny_config(tmp_path / "graphs", "compile=true", "cuda_graphs=true"), mixture)
    assert modes == [{"dynamic": False, "mode": mode} for mode in (None, "reduce-overhead")]
    assert len(marks) == 20 and len(places) == 10 and all(step == places[0] for step in places)  # 2 micro-batches
    assert losses(tmp_path / "plain") == losses(tmp_path / "graphs")
    with pytest.raises(ValueError, match="set compile=true"):
        train(tiny_config(tmp_path / "alone", "cuda_graphs=true"), mixture)


def test_the_cost_of_evaluation_is_counted(tmp_path, mixture):
    result = train(tiny_config(tmp_path / "run", "eval.every=2"), mixture)
    assert 0 < result.eval_seconds < result.seconds


@pytest.mark.slow
@pytest.mark.parametrize("graphs", ["false", "true"])
def test_compiled_draws_the_same_curve(tmp_path, mixture, graphs):
    train(tiny_config(tmp_path / "plain"), mixture)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile=true does not work here")
        train(tiny_config(tmp_path / "compiled", "compile=true", f"cuda_graphs={graphs}"), mixture)
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert max(abs(plain[s] - compiled[s]) for s in plain) <= 1e-5


def test_tensorboard_mirrors_metrics_jsonl(tmp_path, mixture):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tiny_config(tmp_path / "run", "log.tensorboard=true"), mixture)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    mirrored = {e.step: e.value for e in events.Scalars("train/loss")}
    assert mirrored == pytest.approx(losses(tmp_path / "run"))
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    by_domain = {e.step: e.value for e in events.Scalars("train/loss/a")}
    assert by_domain == pytest.approx({r["step"]: r["train/loss/a"] for r in rows if "train/loss/a" in r})
    assert [e.step for e in events.Scalars("valid/a/bpb")] == [10]


def test_bf16_is_close_to_fp32(tmp_path, mixture):
    full = train(tiny_config(tmp_path / "fp32"), mixture)
    half = train(tiny_config(tmp_path / "bf16", "precision=bf16"), mixture)
    assert full.losses != half.losses
    for name in full.losses:
        assert half.losses[name] == pytest.approx(full.losses[name], abs=0.02)


def golden_curve(tmp_path: Path, mixture: Mixture, seed: int) -> list[float]:
    steps = "schedule={total_tokens: 25600, warmup_steps: 10}"
    config: Config = tiny_config(tmp_path / "golden", steps, f"seed={seed}")
    train(config, mixture)
    return list(losses(tmp_path / "golden").values())


def machine() -> str:
    """What decides the last bits of a matmul: torch and the processor."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    facts = dict((word.strip() for word in line.split(":", 1)) for line in lines)
    known = [facts.get(key, "?") for key in ("vendor_id", "cpu family", "model", "stepping")]
    return " ".join(["torch", torch.__version__, torch.backends.cpu.get_cpu_capability(), *known])


@pytest.mark.parametrize("seed", [7, pytest.param(8, marks=pytest.mark.slow)])
def test_golden_curve_of_200_steps(tmp_path, mixture, seed):
    curve = golden_curve(tmp_path, mixture, seed)
    golden = json.loads(GOLDEN.read_text())
    if os.environ.get("UPDATE_GOLDEN"):
        golden["machine"], golden[f"seed {seed}"] = machine(), curve
        GOLDEN.write_text(json.dumps(golden, indent=0))
    assert len(curve) == 200
    difference = max(abs(a - b) for a, b in zip(curve, golden[f"seed {seed}"], strict=True))
    # the last bits differ between CPUs; a change of the mathematics is far larger than this
    assert difference <= (0.0 if golden["machine"] == machine() else 1e-4)


def test_an_asynchronous_run_saves_what_a_synchronous_one_saves(tmp_path, mixture):
    for name in ("plain", "async"):
        train(tiny_config(tmp_path / name, f"checkpoint={{every: 3, keep: 9, async_save: {name == 'async'}}}"), mixture)
    saved = [sorted(p.parent.name for p in (tmp_path / n).glob("step_*/COMPLETE")) for n in ("plain", "async")]
    assert saved[0] == saved[1] and len(saved[0]) == 4
    for step in saved[0]:
        for file in ("model.safetensors", "optim.safetensors"):
            a, b = ((tmp_path / n / step / file).read_bytes() for n in ("plain", "async"))
            assert a == b, (step, file)


def test_no_garbage_is_collected_behind_the_loops_back():
    assert gc.isenabled()
    with pytest.raises(KeyError), manual_gc():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
