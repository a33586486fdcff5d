"""The memory estimate against the real model: every tensor that is alive, counted as it comes and goes."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_lite.config import BatchConfig, Config, ParallelConfig, load_config
from megatron_lite.data.batch import Batch
from megatron_lite.engine import build_engine
from megatron_lite.mesh import Mesh, TensorParallel
from megatron_lite.model import GPT
from megatron_lite.plan import Plan
from megatron_lite.testing import run_distributed
from regmix_search.gpu_memory import GIB, Memory, largest_micro_batch, memory

WIDE = "{num_layers: 3, hidden_size: 64, num_heads: 4, ffn_hidden_size: 256}"
GROUPED = "{num_layers: 2, hidden_size: 128, num_heads: 8, num_kv_heads: 2, ffn_hidden_size: 96, tie_embeddings: true}"


class Alive(TorchDispatchMode):
    """Bytes of the storages that are alive, and their peak, from what every operator returns."""

    def __init__(self, *older: torch.Tensor) -> None:
        super().__init__()
        self.older = [x.untyped_storage() for x in older]
        self.seen, self.now, self.peak = {x._cdata for x in self.older}, 0, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor) and not x.is_meta):
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


def measured(config: Config, plan: Plan | None = None, tp: TensorParallel | None = None) -> int:
    """Peak bytes of a step's second micro-batch beyond weights, gradients and moments."""
    plan = plan or resolve(config)
    model = GPT(plan.shape, tp=tp, recompute=config.activation_checkpointing)
    model.loss_chunk = config.loss_chunk
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    shape = (config.batch.micro_batch_size, config.data.seq_length)
    tokens, weights = torch.zeros(shape, dtype=torch.int32), torch.ones(shape)
    alive = Alive(*model.parameters(), *(p.grad for p in model.parameters()), *model.buffers(), weights)
    with alive:
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bf16"):
            loss = model(tokens, tokens, weights)[0]
        loss.backward()
    return alive.peak


def settings(precision: str, recompute: str, model: str, vocab_size: int, tokens: str = "128") -> Config:
    overrides = [f"model={model}", f"model.vocab_size={vocab_size}", f"data.seq_length={tokens}"]
    overrides += [f"precision={precision}", f"activation_checkpointing={recompute}"]
    return load_config(Config, None, [*overrides, "batch={global_batch_size: 16, micro_batch_size: 16}"])


def check(config: Config) -> None:
    counted = memory(config, resolve(config), "cpu")
    assert counted.overhead == 0
    assert measured(config) == pytest.approx(counted.activations + counted.work, rel=0.03)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_peak_of_a_step_is_what_was_counted(recompute):
    """Within 3 %: as counted here, .3 % but for wide blocks in fp32 (2.6 %)."""
    check(settings("bf16", recompute, WIDE, 96))


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [96, 3000])
@pytest.mark.parametrize("model", [WIDE, GROUPED], ids=["wide", "grouped"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_is_what_was_counted_for_any_shape(precision, recompute, model, vocab_size):
    check(settings(precision, recompute, model, vocab_size))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_weights_in_bf16_are_counted(recompute):
    """Of 128 tokens in blocks of 128 x 512 they are a third of the peak, or three quarters."""
    model = "{num_layers: 4, hidden_size: 128, num_heads: 4, ffn_hidden_size: 512}"
    config = settings("bf16", recompute, model, 96)
    check(replace(config, batch=BatchConfig(1, 1)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_smaller_chunk_of_the_loss_holds_less(precision):
    """A quarter of 2,048 x 3,000 logits at once."""
    whole = settings(precision, "none", WIDE, 3000)
    quarter = replace(whole, loss_chunk=2048 * 3000 // 4)
    check(quarter)
    assert memory(quarter, resolve(quarter)).work < memory(whole, resolve(whole)).work / 2


def shared(config: Config) -> float:
    """Measured over counted on one of two tensor-parallel ranks."""
    mesh, plan = Mesh.from_env(config.parallel), resolve(config, 2)
    counted = memory(config, plan, "cpu")
    found = measured(config, plan, mesh.tp) / (counted.activations + counted.work)
    mesh.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_peak_of_a_tensor_parallel_rank_is_what_was_counted(sequence_parallel):
    config = settings("bf16", "none", WIDE, 96)
    config = replace(config, parallel=ParallelConfig(2, sequence_parallel))
    assert run_distributed(shared, 2, config) == pytest.approx([1, 1], rel=0.05)


def deepspeed_peak(config: Config) -> float:
    """Measured over counted on one of two ranks: weights, gradients, moments and all in the second step."""
    mesh, plan = Mesh.from_env(config.parallel), resolve(config, 2)
    tokens, mask = torch.zeros(1, config.data.seq_length, dtype=torch.int32), torch.ones(1, config.data.seq_length)
    alive = Alive()
    with alive:
        engine = build_engine(config, plan, mesh)
        for _ in range(2):
            alive.peak = alive.now
            batches = [Batch(tokens, tokens, mask, torch.zeros(1, dtype=torch.int64)) for _ in range(2)]
            engine.forward_backward(batches, 2 * tokens.numel())
            engine.step(1e-3)
    engine.close()
    mesh.close()
    return alive.peak / memory(config, plan, "cpu").total


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_peak_under_deepspeed_is_what_was_counted(stage):
    pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    config = settings("bf16", "none", "{num_layers: 2, hidden_size: 256, num_heads: 4, ffn_hidden_size: 1024}", 8000)
    bucket = {"zero_optimization": {"reduce_bucket_size": 3_000_000}}  # half of the parameters
    engine = {"engine": "deepspeed", "deepspeed": bucket, "parallel": ParallelConfig(zero_stage=stage)}
    config = replace(config, batch=BatchConfig(4, 1), **engine)
    assert run_distributed(deepspeed_peak, 2, config) == pytest.approx([1, 1], rel=0.05)


def test_a_gpu_keeps_less_where_its_kernels_do():
    """Norms keep no normalised copy, attention writes no second one: 4 D, 4 D and 2 D bytes a token and block."""
    config = settings("bf16", "none", WIDE, 96)
    cpu, gpu = (memory(config, resolve(config), device) for device in ("cpu", "cuda"))
    assert cpu.activations - gpu.activations == (3 * (4 + 4 + 2) + 4) * 64 * 16 * 128
    assert gpu.overhead == 2 * GIB and gpu.total == sum((gpu.weights, gpu.gradients, gpu.moments)) + (
        gpu.activations + gpu.work + gpu.overhead
    )


def held(*overrides: str, gpus: int = 1) -> Memory:
    config = load_config(Config, None, ["model.preset=tinyllama_1_1b", *overrides])
    return memory(config, resolve(config, gpus, cuda=True))


def test_weights_gradients_and_moments_are_bytes_a_parameter():
    """1,337,026,560 parameters: 4 + 4 + 8 bytes; ZeRO 1 shares out the moments, tensor parallelism all but norms."""
    params = 1_337_026_560
    plain = held()
    assert (plain.weights, plain.gradients, plain.moments) == (4 * params, 4 * params, 8 * params)
    assert held("parallel.zero_stage=1", gpus=8).moments == params
    shared, norms = held("parallel.tensor_parallel_size=8", gpus=8), 45 * 2048
    assert shared.weights == 4 * ((params - norms) // 8 + norms)
    assert held("optim.optimizer=muon").moments == 8 * params - 4 * 22 * (4 * 2048**2 + 3 * 2048 * 5632)
    assert held("reweighting.reference=runs/r").weights == 8 * params
    offload = "deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}"
    assert held("engine=deepspeed", "parallel.zero_stage=2", offload, gpus=8).moments == 0


def test_sequence_parallelism_shares_out_what_tensor_parallelism_alone_does_not():
    tp, whole = ("parallel.tensor_parallel_size=8",), held()
    alone, both = held(*tp, gpus=8), held(*tp, "parallel.sequence_parallel=true", gpus=8)
    assert both.activations < alone.activations < whole.activations
    norms = 45 * (4 * 2048 + 4) * 16 * 2048  # of all blocks and the last
    assert alone.activations - both.activations == pytest.approx(norms * 7 / 8, rel=1e-3)


def test_the_largest_micro_batch_is_the_largest_that_fits():
    config = load_config(Config, None, ["model.preset=tinyllama_1_1b", "batch.micro_batch_size=4"])
    plan = resolve(config, 8, cuda=True)
    found = largest_micro_batch(config, plan, 79 * GIB)
    sizes = {size: held(f"batch.micro_batch_size={size}", gpus=8).total for size in (found, 2 * found)}
    assert sizes[found] <= 79 * GIB < sizes[2 * found]
    assert largest_micro_batch(config, plan, 10 * GIB) == 0
