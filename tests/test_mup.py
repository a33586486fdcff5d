"""muP (Yang et al. 2022, Tensor Programs V): what training does to activations does not depend on the width."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_lite.config import ModelConfig, OptimConfig
from megatron_lite.data.mixture import Mixture
from megatron_lite.files import read_jsonl
from megatron_lite.hf import export_hf, fold_multipliers
from megatron_lite.mesh import Mesh, TensorParallel
from megatron_lite.model import GPT
from megatron_lite.optim import build_optimizer, clip_grad_norm, hidden_lr_scale, param_groups, set_learning_rate
from megatron_lite.shape import ModelShape, resolve_shape
from megatron_lite.testing import run_distributed, tiny_config, write_tiny_shards
from megatron_lite.train import train

WIDTHS, STEPS, SEEDS = (64, 128, 256, 512), 5, 3
V, T = 16, 32  # few tokens: at width 64 what one token's row learns must outweigh its chance likeness to the others


def shape_of(width: int, base: int | None, **sizes) -> ModelShape:
    heads = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "ffn_hidden_size": 2 * width, "mup_base_width": base}
    return resolve_shape(ModelConfig(hidden_size=width, **(heads | sizes)), T, sizes.get("vocab_size", V))


def coordinates(width: int, base: int | None, optimizer: str, seed: int) -> list[list[float]]:
    """mean |activation| of each block's output and of the logits, after 0, 1, ... STEPS steps on one batch."""
    model, config = GPT(shape_of(width, base), seed), OptimConfig(optimizer, lr=1e-3 if optimizer == "adamw" else 1e-2)
    groups = param_groups(model, config.weight_decay, hidden_lr_scale(config, model.shape.mup_width))
    update = build_optimizer(groups, config)
    set_learning_rate(update.param_groups, config.lr)
    tokens = torch.randint(0, V, (8, T + 1), generator=torch.Generator().manual_seed(seed))
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _args, out: seen.append(out.detach().abs().mean()))
    history = []
    for _ in range(STEPS + 1):
        seen.clear()
        with torch.no_grad():
            seen.append(model.logits(tokens[:, :-1]).abs().mean())
        history.append([x.item() for x in seen])
        model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
        clip_grad_norm(model, 1.0, TensorParallel())
        update.step()
        model.zero_grad()
    return history


def slopes(base: int | None, optimizer: str) -> np.ndarray:
    """d log(mean |x|) / d log(width) after each step from the first on: [step, block 0, block 1, logits]."""
    sizes = np.array([[coordinates(w, base, optimizer, s) for s in range(SEEDS)] for w in WIDTHS]).mean(1)[:, 1:]
    log_widths = np.log(WIDTHS) - np.log(WIDTHS).mean()
    return np.einsum("w,wsx->sx", log_widths, np.log(sizes)) / (log_widths**2).sum()


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_under_mup_activations_do_not_depend_on_the_width(optimizer):
    found = slopes(64, optimizer)
    assert found.shape == (STEPS, 3) and np.abs(found).max() <= 0.1, found.round(3)


def test_under_the_standard_parametrisation_they_do():
    found = slopes(None, "adamw")
    assert (found[-1] > 0.1).all(), f"the check above would not see it: {found.round(3)}"


def test_multipliers_and_starts_are_those_of_table_8():
    narrow, wide = (GPT(shape_of(width, 64, vocab_size=512, tie_embeddings=True)) for width in (64, 256))
    assert narrow.embedding.weight.std().item() == pytest.approx(wide.embedding.weight.std().item(), rel=0.02)
    assert narrow.embedding.weight.std().item() == pytest.approx(math.sqrt(2 / (5 * 64)), rel=0.02)
    for name in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down"):  # variance falls as 1 / fan-in
        a, b = (model.get_parameter(f"blocks.0.{name}.weight").std().item() for model in (narrow, wide))
        assert a / b == pytest.approx(2, rel=0.03), name
    assert GPT(shape_of(256, 64)).head.weight.abs().max() == 0
    for heads in (2, 4, 8):
        model = GPT(shape_of(256, 64, num_heads=heads, num_kv_heads=heads))
        K, q_and_k = 256 / heads, model.cos_TK.square() + model.sin_TK.square()  # the tables scale both
        assert torch.allclose(q_and_k / math.sqrt(K), torch.tensor(8 / K)), heads
    for model, width in ((narrow, 1), (wide, 4)):
        tokens = torch.arange(T)[None]
        hidden = model.hidden(tokens)
        assert hidden.square().mean().sqrt().item() == pytest.approx(1 / width, rel=1e-3)


@pytest.mark.parametrize("heads", [{}, {"num_kv_heads": 2}])
def test_groups_carry_the_scale_and_keep_the_decay_of_a_step(heads):
    model = GPT(shape_of(256, 64, **heads))
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(param_groups(model, 0.1, hidden_lr_scale(OptimConfig(), 4.0)), OptimConfig())
    set_learning_rate(optimizer.param_groups, 0.8)
    found = {names[id(p)]: (g["lr"], g["lr"] * g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == set(names.values())
    for name, (lr, decay) in found.items():
        hidden = name.startswith("blocks.") and "norm" not in name
        assert lr == pytest.approx(0.2 if hidden else 0.8), name
        assert decay == pytest.approx(0.0 if "norm" in name else 0.08), name


def test_at_the_base_width_the_groups_are_the_standard_ones():
    assert hidden_lr_scale(OptimConfig(), 1.0) is None and shape_of(64, None).mup_width == 1
    standard = param_groups(GPT(shape_of(64, None)), 0.1)
    assert [sorted(group) for group in standard] == [["params", "weight_decay"]] * 2


def test_a_width_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"model: mup_base_width=0 must be at least 1"):
        shape_of(64, 0)


def trained(width: int, **sizes) -> GPT:
    """A model whose head and norms are not what they started as."""
    model = GPT(shape_of(width, 48, **sizes), seed=2)
    with torch.no_grad():
        for name, param in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            param.add_(torch.randn(param.shape, generator=generator) * (0.3 if "norm" in name else 0.1))
    return model


@pytest.mark.parametrize("sizes", [{}, {"tie_embeddings": True}, {"num_kv_heads": 2}])
def test_folded_into_the_weights_the_multipliers_leave_the_logits_alone(sizes):
    model = trained(128, **sizes)  # 128 / 48 is no power of two
    folded, shape = fold_multipliers(dict(model.named_parameters()), model.shape)
    assert shape == dataclasses.replace(model.shape, mup_base_width=None)
    standard = GPT(shape)
    standard.load_state_dict(folded, strict=False)
    tokens = torch.arange(3 * T).view(3, T) % V
    expected = model.logits(tokens)
    assert expected.std() > 0.1 and (standard.logits(tokens) - expected).abs().max() <= 1e-5
    unfolded = GPT(shape)
    unfolded.load_state_dict(dict(model.named_parameters()), strict=False)
    assert (unfolded.logits(tokens) - expected).abs().max() > 0.1, "the multipliers matter"


def test_an_export_has_the_logits_of_training(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = trained(128)
    assert export_hf(dict(model.named_parameters()), model.shape, tmp_path / "hf") <= 1e-5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    tokens = torch.arange(2 * T).view(2, T) % V
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model.logits(tokens), rtol=0, atol=1e-5)


def curve(folder: str, *overrides: str) -> list[float]:
    config = tiny_config(Path(folder), "model.mup_base_width=8", "optim.lr=0.05", "checkpoint.every=5", *overrides)
    train(config, Mixture.load(Path(folder).parent / "mixture.yaml"))
    Mesh.from_env().close()
    return [row["train/loss"] for row in read_jsonl(Path(folder) / "metrics.jsonl")]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, list[float]]:
    """A folder with a mixture, and the curve of one rank under muP, which is not the standard one."""
    folder = tmp_path_factory.mktemp("mup")
    write_tiny_shards(folder / "shards").save(folder / "mixture.yaml")
    losses = curve(str(folder / "one"))
    assert losses[0] == pytest.approx(math.log(64), abs=1e-6) and losses[-1] < 3.5  # a head at zero knows nothing
    one_rate = curve(str(folder / "sp"), "model.mup_base_width=null")
    assert abs(one_rate[-1] - losses[-1]) > 0.05
    return folder, losses


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("zero1", ["parallel.zero_stage=1"]),
        ("tp", ["parallel={tensor_parallel_size: 2, sequence_parallel: true}"]),
        ("ds0", ["engine=deepspeed"]),
        ("ds2", ["engine=deepspeed", "parallel.zero_stage=2"]),
        ("ds1tp", ["engine=deepspeed", "parallel={tensor_parallel_size: 2, zero_stage: 1}"]),
    ],
)
@pytest.mark.slow
def test_every_engine_scales_the_learning_rate_alike_and_resumes(one, name, overrides):
    if name.startswith("ds"):
        pytest.importorskip("deepspeed")
    folder, expected = one
    for got in run_distributed(curve, 2, str(folder / name), *overrides):
        assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) <= 1e-5
    run = folder / name
    (run / "result.json").unlink()
    for file in (run / "step_0000010").iterdir():
        file.unlink()
    assert max(abs(a - b) for a, b in zip(curve(str(run)), expected, strict=True)) <= 1e-5  # one rank, from step 5
