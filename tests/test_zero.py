"""ZeRO-1 of TorchEngine: sharding the moments changes no number, only who holds them."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from megatron_lite.config import OptimConfig
from megatron_lite.data.mixture import Mixture
from megatron_lite.engine import zero
from megatron_lite.engine.zero import ZeroAdamW
from megatron_lite.mesh import Mesh
from megatron_lite.optim import build_optimizer, moments, param_groups, set_moments
from megatron_lite.testing import run_distributed, tiny_config, write_tiny_shards
from megatron_lite.train import train

CONFIG = OptimConfig(lr=0.1, weight_decay=0.3)


def odd_module() -> nn.Module:
    """Sizes that no rank count divides, and one parameter with fewer elements than ranks."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2, bias=False))
    module.scale = nn.Parameter(torch.ones(2))
    return module


def set_grads(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in module.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def sharded_steps(state: dict | None) -> tuple[dict, dict, int]:
    """Three steps, from `state` if given: parameters, moments, and how many numbers this rank's moments hold."""
    warnings.simplefilter("error", FutureWarning)  # torch 2.13 has another name for a collective of before
    zero.BUCKET = 16  # several collectives, one of them for a parameter above the limit
    mesh, module = Mesh.from_env(), odd_module()
    optimizer = ZeroAdamW(module, param_groups(module, CONFIG.weight_decay), CONFIG, mesh)
    if state:
        optimizer.set_moments(state)
    for step in range(3):
        set_grads(module, step)
        optimizer.step()
        assert all(piece.grad is None for piece in optimizer.slices.values())
    held = sum(s["exp_avg"].numel() for s in optimizer.optimizer.state.values())
    out = {k: v.clone() for k, v in module.state_dict().items()}, optimizer.moments(), held
    mesh.close()
    return out


@pytest.mark.parametrize("resumed", [False, True])
def test_slices_updated_by_three_ranks_are_adamw_on_the_whole(resumed):
    module = odd_module()
    optimizer = build_optimizer(param_groups(module, CONFIG.weight_decay), CONFIG)
    state = None
    if resumed:
        state = {k: torch.rand_like(v) for k, v in moments(module, optimizer).items()} | {"step": torch.tensor(7.0)}
        set_moments(module, optimizer, state)
    for step in range(3):
        set_grads(module, step)
        optimizer.step()
    expected = moments(module, optimizer)
    total = sum(p.numel() for p in module.parameters())
    for params, got, held in run_distributed(sharded_steps, 3, state):
        assert held <= total / 3 + 4, "each rank holds a third, and at most one padding element a parameter"
        assert got["step"] == expected["step"]
        for name, param in module.state_dict().items():
            torch.testing.assert_close(params[name], param, rtol=1e-6, atol=1e-7)
        for name, moment in expected.items():
            torch.testing.assert_close(got[name], moment, rtol=1e-6, atol=1e-7)


def trained(folder: str, *overrides: str) -> list[float]:
    config = tiny_config(Path(folder) / "run", "checkpoint.every=5", *overrides)
    result = train(config, Mixture.load(Path(folder) / "mixture.yaml"))
    Mesh.from_env().close()
    return list(result.losses.values())


def test_zero_1_draws_the_same_curve_and_its_checkpoints_are_anybodys(tmp_path):
    folders = {name: tmp_path / name for name in ("plain", "zero")}
    for folder in folders.values():
        write_tiny_shards(folder / "shards").save(folder / "mixture.yaml")
    expected = trained(str(folders["plain"]))
    for losses in run_distributed(trained, 2, str(folders["zero"]), "parallel.zero_stage=1"):
        assert losses == pytest.approx(expected, abs=1e-5)
    for file in ("model.safetensors", "optim.safetensors"):
        a, b = (load_file(f / "run" / "step_0000010" / file) for f in folders.values())
        for name, tensor in a.items():
            assert (b[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
    run = folders["zero"] / "run"
    (run / "result.json").unlink()
    for file in (run / "step_0000010").iterdir():
        file.unlink()
    assert trained(str(folders["zero"])) == pytest.approx(expected, abs=1e-5)  # one rank, without ZeRO, from step 5
