"""The memory estimate against the real model: every tensor that is alive, counted as it comes and goes."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_lite.config import Config, load_config
from megatron_lite.model import GPT
from megatron_lite.plan import Plan
from regmix_search.gpu_memory import GIB, Memory, largest_micro_batch, memory

WIDE = "{num_layers: 3, hidden_size: 64, num_heads: 4, ffn_hidden_size: 256}"
GROUPED = "{num_layers: 2, hidden_size: 128, num_heads: 8, num_kv_heads: 2, ffn_hidden_size: 96, tie_embeddings: true}"


class Alive(TorchDispatchMode):
    """Bytes of the storages that are alive, and their peak, from what every operator returns."""

    def __init__(self, model: GPT, *others: torch.Tensor) -> None:
        super().__init__()
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        self.older = [x.untyped_storage() for x in (*model.parameters(), *model.buffers(), *grads, *others)]
        self.seen, self.now, self.peak = {x._cdata for x in self.older}, 0, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def resolve(config: Config, world_size: int = 1, cuda: bool = False) -> Plan:
    return Plan.resolve(config, world_size, None, cuda, deepspeed=False)


def measured(config: Config) -> int:
    """Peak bytes of a step's second micro-batch beyond weights, gradients and moments."""
    plan = resolve(config)
    model = GPT(plan.shape, recompute=config.activation_checkpointing)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    shape = (config.batch.micro_batch_size, config.data.seq_length)
    tokens, weights = torch.zeros(shape, dtype=torch.int32), torch.ones(shape)
    alive = Alive(model, weights)
    with alive:
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16"):
            loss = model(tokens, tokens, weights)[0]
        loss.backward()
    return alive.peak


@pytest.mark.parametrize("vocab_size", [96, 3000])
@pytest.mark.parametrize("model", [WIDE, GROUPED], ids=["wide", "grouped"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_of_the_real_model_is_what_was_counted(precision, recompute, model, vocab_size):
    overrides = [f"model={model}", f"model.vocab_size={vocab_size}", "data.seq_length=128", f"precision={precision}"]
    overrides += ["batch={global_batch_size: 16, micro_batch_size: 16}", f"activation_checkpointing={recompute}"]
    config = load_config(Config, None, overrides)
    counted = memory(config, resolve(config), "cpu")
    print(counted.activations, counted.work, measured(config)/(counted.activations + counted.work))
    assert measured(config) == pytest.approx(counted.activations + counted.work, rel=0.03)
