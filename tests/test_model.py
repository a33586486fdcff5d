"""Properties of the model that a loss curve hides. What Hugging Face's Llama says of it is in test_hf.py."""

import math

import pytest
import torch

from megatron_lite.config import ModelConfig, OptimConfig
from megatron_lite.model import GPT
from megatron_lite.optim import build_optimizer, param_groups
from megatron_lite.shape import resolve_shape

VOCAB, T = 96, 24


def build(kv_heads: int = 4, tied: bool = False, theta: float = 10000.0, eps: float = 1e-5, scale: float = 1.0) -> GPT:
    sizes = {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "num_kv_heads": kv_heads, "ffn_hidden_size": 80}
    config = ModelConfig(**sizes, rope_theta=theta, norm_eps=eps, tie_embeddings=tied)
    model = GPT(resolve_shape(config, T, VOCAB), seed=3)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.mul_(scale if param.dim() > 1 else 1.0)
            if "norm" in name:  # norms start at 1: move them, or a lost weight would go unseen
                param.add_(torch.linspace(-0.3, 0.3, param.numel()))
    return model


@torch.no_grad()
def test_no_token_sees_the_future():
    model = build(kv_heads=2, scale=3.0)
    tokens = torch.randint(0, VOCAB, (2, T))
    before = model.logits(tokens)
    for place in range(T):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCAB
        same = (model.logits(changed) == before).all(dim=-1)
        assert same[:, :place].all() and not same[:, place:].any(), place


def test_bf16_matmuls_keep_an_fp32_loss():
    model = build(scale=2.0)
    tokens = torch.randint(0, VOCAB, (2, T + 1))
    full = model(tokens[:, :-1], tokens[:, 1:])
    full.sum().backward()
    expected = model.head.weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(tokens[:, :-1], tokens[:, 1:])
    half.sum().backward()
    assert half.dtype == torch.float32 and model.head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0, atol=0.1)
    assert (model.head.weight.grad - expected).norm() < 0.02 * expected.norm()


def test_initialisation_depends_on_seed_and_name_alone():
    shape = resolve_shape(ModelConfig(num_layers=2, hidden_size=64, num_heads=4, ffn_hidden_size=128), 16, 4096)
    first = dict(GPT(shape, seed=1).named_parameters())
    torch.manual_seed(99)  # the global generator must not matter
    second, other = dict(GPT(shape, seed=1).named_parameters()), dict(GPT(shape, seed=2).named_parameters())
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert not torch.equal(first["blocks.0.mlp.down.weight"], first["blocks.1.mlp.down.weight"])
    assert first["embedding.weight"].std().item() == pytest.approx(math.sqrt(2 / (5 * 64)), rel=0.02)
    assert first["blocks.0.mlp.down.weight"].std().item() == pytest.approx(1 / 8 / 2, rel=0.03)


def test_a_fresh_model_knows_nothing():
    model = GPT(resolve_shape(ModelConfig(preset="demo_proxy"), 64, 1024))
    tokens = torch.randint(0, 1024, (4, 65))
    loss = model(tokens[:, :-1], tokens[:, 1:]).mean().item()
    # the head's logits start with variance 2/5, which costs 0.2 nats over uniform guessing
    assert abs(loss - math.log(1024) - 0.2) < 0.1


def test_one_batch_can_be_learnt_by_heart():
    model = build()
    tokens = torch.randint(0, VOCAB, (2, T + 1), generator=torch.Generator().manual_seed(1))
    config = OptimConfig(lr=1e-2)
    optimizer = build_optimizer(param_groups(model, config.weight_decay), config)
    for _ in range(150):
        loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01
