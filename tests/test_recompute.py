"""Activation checkpointing saves memory and changes no bit."""

import pytest
import torch

from megatron_lite.config import ModelConfig
from megatron_lite.model import GPT
from megatron_lite.shape import resolve_shape

MODES = ("none", "selective", "full")
SIZES = ModelConfig(num_layers=3, hidden_size=64, num_heads=4, num_kv_heads=2, ffn_hidden_size=128)
SHAPE = resolve_shape(SIZES, 64, 97)
TOKENS = torch.randint(0, 97, (2, 65), generator=torch.Generator().manual_seed(0))


def gradients(mode: str, autocast: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch."""
    model = GPT(SHAPE, recompute=mode)
    with torch.autocast("cpu", torch.bfloat16, autocast):
        loss = model(TOKENS[:, :-1], TOKENS[:, 1:]).mean()
    loss.backward()
    return loss.detach(), {name: param.grad for name, param in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_activations_give_the_same_bits(mode, autocast):
    loss, expected = gradients("none", autocast)
    again, got = gradients(mode, autocast)
    assert torch.equal(again, loss)
    for name, grad in expected.items():
        assert torch.equal(got[name], grad), name


def kept_bytes(mode: str) -> int:
    """What autograd holds after a forward pass through the blocks, parameters not counted."""
    model, kept = GPT(SHAPE, recompute=mode), {}
    params = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in params:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(TOKENS[:, :-1])
    assert hidden.requires_grad
    return sum(kept.values())


def test_full_keeps_little_more_than_the_blocks_inputs():
    inputs = SHAPE.num_layers * TOKENS[:, 1:].numel() * SHAPE.hidden_size * 4
    assert kept_bytes("full") < 3 * inputs < kept_bytes("none") / 3


def matmuls(mode: str) -> int:
    """Matrix multiplications of one forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    model = GPT(SHAPE, recompute=mode)
    with FlopCounterMode(display=False) as counter:
        model(TOKENS[:, :-1], TOKENS[:, 1:]).mean().backward()
    return counter.get_total_flops()


def test_selective_repeats_no_matmul_and_full_repeats_every_block():
    plain, selective, full = (matmuls(mode) for mode in MODES)
    assert selective == plain
    assert full > plain * 1.15
