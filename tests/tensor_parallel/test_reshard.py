"""Checkpoints are logical: any tp and dp takes what any other wrote, to the bit, and goes on with the same losses."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_lite.config import ParallelConfig
from megatron_lite.data.mixture import Mixture
from megatron_lite.files import read_jsonl
from megatron_lite.mesh import Mesh
from megatron_lite.run import build, resolve, save
from megatron_lite.testing import run_distributed, tiny_config, write_tiny_shards
from megatron_lite.train import train

ODD = ["model.vocab_size=67", "checkpoint={every: 5, keep: 9}"]  # the shards have 64 tokens; 67 is padded to 128
TP2 = ["parallel.tensor_parallel_size=2"]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Mixture:
    mixture = write_tiny_shards(tmp_path_factory.mktemp("shards"))
    mixture.save(Path(mixture.data_dir) / "mixture.yaml")
    return mixture


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "optim.safetensors")


def curve(run: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_jsonl(run / "metrics.jsonl")}


def rewrite(data_dir: str, run: str, overrides: list[str]) -> int:
    """Loads the newest checkpoint of a run and writes it again, from this layout."""
    config = tiny_config(Path(run), *ODD, *overrides)
    mixture = Mixture.load(Path(data_dir) / "mixture.yaml")
    mesh = Mesh.from_env(config.parallel)
    state = build(config, mixture, mesh, *resolve(config, mixture, mesh))
    mesh.barrier()  # every rank has read it
    if mesh.is_main:
        shutil.rmtree(Path(run) / f"step_{state.step:07d}")
    save(state)
    state.engine.close()
    mesh.close()
    return state.step


def trained(data_dir: str, run: str, overrides: list[str]) -> list[float]:
    result = train(tiny_config(Path(run), *ODD, *overrides), Mixture.load(Path(data_dir) / "mixture.yaml"))
    Mesh.from_env().close()
    return list(result.losses.values())


def several(calls: list[tuple[Any, ...]]) -> list[Any]:
    """Calls functions one after the other in the same ranks: a spawn costs seconds."""
    out = []
    for number, (function, *arguments) in enumerate(calls):
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + (number > 0))
        out.append(function(*arguments))
    return out


@pytest.fixture(scope="module")
def one(mixture, tmp_path_factory) -> Path:
    """A run of one process, 10 steps, saved at 5 and 10."""
    run = tmp_path_factory.mktemp("one") / "run"
    trained(mixture.data_dir, str(run), [])
    return run


def cut_at_5(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    shutil.rmtree(to / "step_0000010")
    (to / "result.json").unlink()
    return to


def check_layout(mixture: Mixture, one: Path, tmp_path: Path, size: int, overrides: list[str]) -> None:
    """One process's checkpoint through this layout and back, exactly; and the same losses from scratch and resumed."""
    again, resumed, fresh = (tmp_path / name for name in ("again", "resumed", "fresh"))
    shutil.copytree(one, again)
    cut_at_5(one, resumed)
    calls = [(rewrite, mixture.data_dir, str(again), overrides)]
    calls += [(trained, mixture.data_dir, str(run), overrides) for run in (resumed, fresh)]
    results = run_distributed(several, size, calls)
    assert all(step == 10 for step, *_ in results)
    before, after = tensors(one / "step_0000010"), tensors(again / "step_0000010")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert after["head.weight"].shape == (67, 32), "no padding at rest"
    assert after["exp_avg/blocks.0.attention.qkv.weight"].abs().max() > 0
    expected = curve(one)
    for run in (resumed, fresh):
        got = curve(run)
        assert got.keys() == expected.keys() and max(abs(got[s] - expected[s]) for s in got) <= 1e-5, run
    assert all(r[1] == pytest.approx(results[0][1], abs=1e-5) for r in results)
    back = cut_at_5(fresh, tmp_path / "back")  # and one process takes over
    trained(mixture.data_dir, str(back), [])
    assert abs(curve(back)[6] - curve(fresh)[6]) <= 1e-6
    assert max(abs(curve(back)[s] - expected[s]) for s in expected) <= 1e-5


def test_two_tensor_parallel_ranks_take_over_and_hand_back(mixture, one, tmp_path):
    check_layout(mixture, one, tmp_path, 2, [*TP2, "parallel.sequence_parallel=true"])


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", ["false", "true"])
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_two_by_two_ranks_take_over_and_hand_back(mixture, one, tmp_path, sequence_parallel, zero_stage):
    extra = [f"parallel.sequence_parallel={sequence_parallel}", f"parallel.zero_stage={zero_stage}"]
    check_layout(mixture, one, tmp_path, 4, [*TP2, *extra])


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_deepspeed_with_tensor_parallelism_takes_over_and_hands_back(mixture, one, tmp_path, zero_stage):
    pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    check_layout(mixture, one, tmp_path, 4, [*TP2, f"parallel.zero_stage={zero_stage}", "engine=deepspeed"])


def replicas(data_dir: str, run: str, overrides: list[str]) -> tuple[int, dict[str, torch.Tensor]]:
    config = tiny_config(Path(run), *overrides)
    mixture = Mixture.load(Path(data_dir) / "mixture.yaml")
    mesh = Mesh.from_env(config.parallel)
    loader, plan = resolve(config, mixture, mesh)
    state = build(config, mixture, mesh, loader, plan)
    for step in range(50):
        batches = loader.step(step)
        state.engine.forward_backward(batches, 128.0)
        state.engine.step(1e-2)
    out = {n: p.detach().clone() for n, p in state.engine.module.named_parameters()}
    state.engine.close()
    mesh.close()
    return mesh.tp.rank, out


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", ["false", "true"])
def test_what_ranks_share_is_bit_equal_after_50_steps_of_tp_and_dp(mixture, tmp_path, sequence_parallel):
    overrides = [*TP2, f"parallel.sequence_parallel={sequence_parallel}", "precision=bf16"]
    results = run_distributed(replicas, 4, mixture.data_dir, str(tmp_path), overrides)
    for tp_rank, params in results:
        for name, param in params.items():
            twin = next(p for rank, p in results if rank == tp_rank or "norm" in name)
            assert torch.equal(param, twin[name]), (name, "norms on all ranks, slices on all data-parallel ranks")


def test_ranks_that_tp_does_not_divide_are_refused_with_the_sizes_that_do(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match=r"tensor_parallel_size=4 does not divide the 6 ranks .* valid: 1, 2, 3, 6"):
        Mesh.from_env(ParallelConfig(tensor_parallel_size=4))
