"""Muon for the blocks' matrices, AdamW for the rest: which gets what, and that a resumed run is the same run."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_lite.config import ModelConfig, OptimConfig
from megatron_lite.data.mixture import Mixture
from megatron_lite.files import read_jsonl
from megatron_lite.mesh import Mesh
from megatron_lite.model import GPT
from megatron_lite.optim import MuonAdamW, build_optimizer, hidden_lr_scale, param_groups, set_learning_rate
from megatron_lite.plan import Plan
from megatron_lite.shape import resolve_shape
from megatron_lite.testing import run_distributed, tiny_config, write_tiny_shards
from megatron_lite.train import train

CONFIG = OptimConfig("muon", lr=0.01, weight_decay=0.3)
MUON = "optim.optimizer=muon"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Mixture:
    mixture = write_tiny_shards(tmp_path_factory.mktemp("shards"))
    mixture.save(Path(mixture.data_dir) / "mixture.yaml")
    return mixture


def updated(config: OptimConfig, steps: int) -> tuple[GPT, MuonAdamW]:
    """A model with grouped-query attention after some steps on random gradients."""
    sizes = {"num_layers": 1, "hidden_size": 48, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 80}
    model = GPT(resolve_shape(ModelConfig(**sizes), 16, 64))
    optimizer = build_optimizer(param_groups(model, config.weight_decay, hidden_lr_scale(config, 1.0)), config)
    set_learning_rate(optimizer.param_groups, config.lr)
    for step in range(steps):
        set_grads(model, step)
        optimizer.step()
    return model, optimizer


def set_grads(model: GPT, step: int) -> None:
    for name, param in model.named_parameters():
        generator = torch.Generator().manual_seed(step * 1000 + sum(name.encode()))
        param.grad = (
            torch.randn(param.shape, generator=generator)
            * torch.linspace(0.1, 10, len(param))[(...,) + (None,) * (param.dim() - 1)]
        )


def parts_of(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k, v and gate, up of a packed tensor."""
    return tensor.split({"qkv": [48, 24, 24], "gate_up": [80, 80]}.get(name.split(".")[-2], len(tensor)))


def test_each_matrix_of_the_blocks_moves_by_an_orthogonal_one_of_adamws_size():
    start, _ = updated(CONFIG, 0)
    end, _ = updated(OptimConfig("muon", lr=0.01, weight_decay=0.0), 1)
    matrices = 0
    for (name, before), after in zip(start.named_parameters(), end.parameters(), strict=True):
        if not name.startswith("blocks.") or before.dim() < 2:
            continue
        for change in parts_of(name, ((after - before) / 0.01).detach()):
            # Newton-Schulz leaves singular values between 0.7 and 1.2 (Jordan 2024); 0.2 sqrt(max) is AdamW's size
            values = torch.linalg.svdvals(change) / (0.2 * math.sqrt(max(change.shape)))
            assert values.quantile(0.1) > 0.6 and values.max() < 1.3, (
                name,
                values,
            )  # but the smallest
            matrices += 1
    assert matrices == 7


def test_three_steps_are_torchs_muon_and_adamw_on_tensors_of_their_own():
    start, _ = updated(CONFIG, 0)
    end, _ = updated(CONFIG, 3)
    for name, param in start.named_parameters():
        hidden = name.startswith("blocks.") and param.dim() == 2
        copies = [torch.nn.Parameter(x.clone()) for x in parts_of(name, param.detach())]
        if hidden:
            one = torch.optim.Muon(copies, lr=0.01, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        else:
            one = torch.optim.AdamW(
                copies, lr=0.01, weight_decay=0.3 if param.dim() == 2 else 0.0, betas=CONFIG.betas, fused=True
            )
        for step in range(3):
            set_grads(start, step)
            for copy, grad in zip(copies, parts_of(name, param.grad), strict=True):
                copy.grad = grad
            one.step()
        assert torch.equal(torch.cat([*copies]), end.get_parameter(name)), name


def last_state(run_dir: Path) -> dict[str, torch.Tensor]:
    folder = sorted(run_dir.glob("step_*"))[-1]
    return load_file(folder / "model.safetensors") | load_file(folder / "optim.safetensors")


def test_resume_is_bitwise_and_a_checkpoint_has_the_momentum(tmp_path, mixture):
    train(tiny_config(tmp_path / "whole", MUON, "checkpoint={every: 10}"), mixture)
    config = tiny_config(tmp_path / "cut", MUON, "checkpoint={every: 4, keep: 9}")
    train(config, mixture)
    for step in (8, 10):
        for file in (tmp_path / "cut" / f"step_{step:07d}").iterdir():
            file.unlink()
        (tmp_path / "cut" / f"step_{step:07d}").rmdir()
    (tmp_path / "cut" / "result.json").unlink()
    train(config, mixture)
    whole, cut = last_state(tmp_path / "whole"), last_state(tmp_path / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)
    for name in (key for key in whole if "/" not in key and key != "step"):
        hidden = name.startswith("blocks.") and "norm" not in name
        kinds = {key.split("/")[0] for key in whole if key.endswith(f"/{name}")}
        assert kinds == ({"momentum_buffer"} if hidden else {"exp_avg", "exp_avg_sq"}), name
    assert whole["step"] == 10 and whole["momentum_buffer/blocks.0.mlp.down.weight"].abs().max() > 0
    with pytest.raises(ValueError, match=r"(?s)optim.optimizer: 'muon' -> 'adamw'\n.*no flag allows it: the moments"):
        train(tiny_config(tmp_path / "cut", "checkpoint={every: 4, keep: 9}", "optim.lr=0.01"), mixture)


def test_it_learns(tmp_path, mixture):
    train(tiny_config(tmp_path / "run", MUON, "schedule.total_tokens=12800"), mixture)
    losses = [row["train/loss"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert losses[0] > 4.0 and losses[-1] < 2.0


@pytest.mark.parametrize(
    ("engine", "tp", "zero"), [("torch", 2, 0), ("torch", 1, 1), ("deepspeed", 1, 0), ("deepspeed", 1, 2)]
)
def test_where_matrices_are_in_pieces_it_is_refused_with_the_way_out(tmp_path, engine, tp, zero):
    parallel = f"parallel={{tensor_parallel_size: {tp}, zero_stage: {zero}}}"
    config = tiny_config(tmp_path, MUON, f"engine={engine}", parallel)
    with pytest.raises(ValueError, match=r"optim.optimizer=muon needs whole matrices.*or optim.optimizer=adamw"):
        Plan.resolve(config, 2, 64, cuda=False, deepspeed=False)


def curve(folder: str, out: str) -> list[float]:
    config = tiny_config(Path(out), MUON)
    train(config, Mixture.load(Path(folder) / "mixture.yaml"))
    Mesh.from_env().close()
    return [row["train/loss"] for row in read_jsonl(Path(out) / "metrics.jsonl")]


@pytest.mark.slow
def test_two_ranks_draw_the_curve_of_one(tmp_path, mixture):
    one = curve(str(mixture.data_dir), str(tmp_path / "one"))
    two = run_distributed(curve, 2, str(mixture.data_dir), str(tmp_path / "two"))[0]
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 2e-3  # Newton-Schulz runs in bf16
