"""Presets against published sizes, counters against what a model really has and does, and how parameters start."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_lite.config import Config, ModelConfig, RopeScaling, load_config
from megatron_lite.model import GPT
from megatron_lite.optim import param_groups
from megatron_lite.plan import Plan
from megatron_lite.shape import PRESETS, resolve_shape

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "model").glob("*.yaml"))
# (millions without embeddings, millions in all, vocabulary, tied): RegMix's are those of its lit_gpt configs built; the
# paper of DoReMi gives "280M" and "8B" at a vocabulary of 256k, its repository "120M" at 50,277
PUBLISHED = {
    "tinyllama_1M": (1.312, 27.13, 50432, False),
    "tinyllama_60M": (59.0, 136.5, 50432, False),
    "tinyllama_1_1b": (1130, 1337, 50432, False),
    "doremi_120M": (84.95, 123.6, 50277, True),
    "doremi_280M": (84.95, 280, 256000, True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_parameters(name):
    body, total, vocab_size, tied = PUBLISHED[name]
    shape = resolve_shape(ModelConfig(preset=name, tie_embeddings=tied), 2048, vocab_size)
    assert shape.non_embedding_params / 1e6 == pytest.approx(body, rel=0.002)
    assert shape.params / 1e6 == pytest.approx(total, rel=0.006)


@pytest.mark.parametrize("seq_length", [64, 1024])
@pytest.mark.parametrize("name", PRESETS)
def test_counted_parameters_and_flops_are_those_of_the_model(name, seq_length):
    for sizes in ({}, {"num_kv_heads": 2, "tie_embeddings": True}):
        shape = resolve_shape(ModelConfig(preset=name, **sizes), seq_length, 1000)
        with torch.device("meta"):  # no memory, no arithmetic: 8B counts in a second
            model = GPT(shape).to("meta")
            tokens = torch.zeros(1, seq_length, dtype=torch.long)
        assert sum(p.numel() for p in model.parameters()) == shape.params
        embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tie_embeddings else 2)
        assert shape.params - embeddings == shape.non_embedding_params
        mapping = {
            torch.ops.aten.addmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * b[1]
        }  # the counter knows addmm alone, not its in-place form
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter, sdpa_kernel(SDPBackend.MATH):
            model(tokens, tokens, torch.ones_like(tokens, dtype=torch.float32))[0].backward()
        assert counter.get_total_flops() / seq_length == pytest.approx(shape.flops_per_token, rel=0.01)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_model_config_loads_and_names_a_preset(path):
    config = load_config(Config, path)
    assert config.name == path.stem == config.model.preset
    assert Plan.resolve(config, 8, None, cuda=True, deepspeed=False).total_steps >= 1000


@pytest.mark.parametrize("tied", [False, True])
def test_initialisation_has_tinyllamas_deviations(tied):
    """RegMix's start: N(0, 2/(5D)), 1/(sqrt(D) L) into the residual stream, norms at 1; head logits cost 0.2 nats."""
    shape = resolve_shape(ModelConfig(num_layers=3, num_heads=8, num_kv_heads=4, tie_embeddings=tied), 64, 2048)
    model = GPT(shape, seed=5)
    for name, param in model.named_parameters():
        if "norm" in name:
            assert torch.equal(param, torch.ones_like(param)), name
            continue
        residual = name.endswith(("out.weight", "down.weight"))
        expected = 1 / math.sqrt(256) / 3 if residual else math.sqrt(2 / (5 * 256))
        assert param.std().item() == pytest.approx(expected, rel=0.02), name
        assert abs(param.mean().item()) < 5 * expected / math.sqrt(param.numel()), name
    tokens = torch.randint(0, 2048, (8, 65), generator=torch.Generator().manual_seed(0))
    loss = model(tokens[:, :-1], tokens[:, 1:]).mean().item()
    assert abs(loss - (math.log(2048) + 0.2)) < 0.1  # the logits' variance is 2/5, and half of it is the cost


def test_weight_decay_reaches_every_matrix_and_no_norm():
    model = GPT(resolve_shape(ModelConfig(num_layers=1), 16, 64))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in param_groups(model, 0.1)}
    block = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    assert groups == {
        0.1: {"embedding.weight", "head.weight", *(f"blocks.0.{name}.weight" for name in block)},
        0.0: {"norm.weight", "blocks.0.attention_norm.weight", "blocks.0.mlp_norm.weight"},
    }


def test_rope_scaling_is_null_or_a_block_of_its_own():
    assert load_config(Config, None).model.rope_scaling is None
    config = load_config(Config, None, ["model.rope_scaling={factor: 32}", "model.rope_scaling.low_freq_factor=2"])
    assert config.model.rope_scaling == RopeScaling(32.0, 2.0, 4.0, 8192)  # the rest is Llama 3.1's
    assert resolve_shape(config.model, 64, 100).rope_scaling == config.model.rope_scaling
    with pytest.raises(ValueError, match=r"model.rope_scaling.*low_freq_factor < high_freq_factor"):
        resolve_shape(ModelConfig(rope_scaling=RopeScaling(low_freq_factor=4.0)), 64, 100)
    with pytest.raises(ValueError, match=r"rope_scaling.fctor.*Did you mean 'factor'"):
        load_config(Config, None, ["model.rope_scaling={fctor: 8}"])
