"""One process against many: per-tensor gradients, losses, norms and a hundred steps, each within ten times its noise.

Each rank computes the reference itself, so that a case costs no process of its own.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_lite.config import ModelConfig, OptimConfig, ParallelConfig
from megatron_lite.mesh import MegatronUnit, Mesh
from megatron_lite.model import GPT
from megatron_lite.optim import build_optimizer, clip_grad_norm, param_groups
from megatron_lite.shape import ModelShape, resolve_shape
from megatron_lite.tensor_parallel import TensorParallel
from megatron_lite.tensor_parallel import loss as loss_module
from megatron_lite.tensor_parallel.loss import VocabRows, token_losses
from megatron_lite.tensor_parallel.shards import shard_of
from megatron_lite.testing import run_distributed

T = 32
CASES: dict[str, dict[str, Any]] = {  # heads 8, kv heads 4 unless it says otherwise
    "plain": {"vocab_size": 96},
    "odd vocabulary": {"vocab_size": 97},
    "vocabulary smaller than one rank's rows": {"vocab_size": 33},
    "tied": {"vocab_size": 97, "tie_embeddings": True},
    "multi-head": {"vocab_size": 96, "num_kv_heads": 8},
}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.float32}
BOUND = {"fp32": 1e-5, "fp64": 1e-12, "bf16": 5e-2}  # of a tensor's gradient, relative


def shape_of(**sizes: Any) -> ModelShape:
    defaults = {"num_layers": 2, "hidden_size": 64, "num_heads": 8, "num_kv_heads": 4, "ffn_hidden_size": 96}
    return resolve_shape(ModelConfig(**{**defaults, **sizes}), T, None)


def build(shape: ModelShape, tp: TensorParallel, dtype: torch.dtype) -> GPT:
    model = GPT(shape, 3, tp).to(dtype)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name:  # they start at 1: move them, or a lost weight would go unseen
                param.add_(torch.linspace(-0.3, 0.3, param.numel()))
    return model


def one_step(shape: ModelShape, tp: TensorParallel, kind: str) -> tuple[torch.Tensor, torch.Tensor, GPT, float]:
    """Losses, logits, the model with its gradients, and their global norm, under unequal weights on the tokens."""
    model = build(shape, tp, DTYPES[kind])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, shape.vocab_size, (32, T + 1), generator=generator)
    mask = (torch.rand(32, T, generator=generator) > 0.3).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        losses = model(tokens[:, :-1], tokens[:, 1:])
    ((losses * mask).sum() / mask.sum()).backward()
    logits = model.logits(tokens[:, :-1]).detach()
    return losses.detach(), logits, model, clip_grad_norm(model, 0.0, tp)


def difference(shape: ModelShape, tp: TensorParallel, kind: str) -> dict[str, float]:
    """How far this rank is from one process, by tensor and in all."""
    loss, logits, one, norm = one_step(shape, TensorParallel(), kind)
    got_loss, got_logits, many, got_norm = one_step(shape, tp, kind)
    assert got_logits.shape == logits.shape
    out = {
        "loss": (got_loss - loss).abs().max().item(),
        "mean loss": abs((got_loss.mean() - loss.mean()).item()),
        "logits": (got_logits - logits).abs().max().item(),
        "norm": abs(got_norm / norm - 1),
    }
    sliced = dict(many.named_parameters())
    for name, param in one.named_parameters():
        shard = shard_of(sliced[name])
        expected = shard.slice(param.grad, tp) if shard else param.grad
        scale = expected.norm().item() or 1.0  # a rank that holds padding alone: its gradient is zero
        out[f"grad {name}"] = (sliced[name].grad - expected).norm().item() / scale
    return out


def cross_entropy(tp: TensorParallel, dtype: torch.dtype, vocab: int, offset: float) -> float:
    """Largest difference from F.cross_entropy, forward and backward; token 3 is masked. Rows as the head pads them."""
    generator = torch.Generator().manual_seed(1)
    h, w = (torch.randn(n, 8, generator=generator, dtype=dtype).requires_grad_() for n in (11, vocab))
    with torch.no_grad():
        h[:, 0], w[:, 0] = offset, 1.0  # moves all logits of a row alike
    labels = torch.randint(0, vocab, (11,), generator=generator)
    scale = torch.randn(11, generator=generator, dtype=dtype)
    scale[3] = 0.0
    expected = F.cross_entropy(h @ w.t(), labels, reduction="none")
    want_h, want_w = torch.autograd.grad((expected * scale).sum(), (h, w))
    rows = -(-vocab // (64 * tp.size)) * 64
    first, last = (min(vocab, (tp.rank + i) * rows) for i in (0, 1))
    losses = token_losses(h, w[first:last], labels, VocabRows(first, rows, tp))
    got_h, got_w = torch.autograd.grad((losses * scale).sum(), (h, w))
    dist.all_reduce(got_h, group=tp.group)  # each rank has its vocabulary's part
    parts = ((losses, expected), (got_h, want_h), (got_w[first:last], want_w[first:last]))
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in parts if a.numel())


def hundred_steps(tp: TensorParallel, kind: str) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms of AdamW with clipping, and the parameters at the end."""
    model, config = build(shape_of(vocab_size=97), tp, torch.float32), OptimConfig(lr=3e-3)
    optimizer = build_optimizer(param_groups(model, config.weight_decay), config)
    losses, norms = [], []
    for step in range(100):
        first = torch.randint(0, 97, (4, 1), generator=torch.Generator().manual_seed(step))
        tokens = (first + 3 * torch.arange(T + 1)) % 97
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
        loss.backward()
        norms.append(clip_grad_norm(model, 0.5, tp))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {n: p.detach() for n, p in model.named_parameters()}


def chunked(shape: ModelShape, tp: TensorParallel) -> float:
    """Largest gradient difference between the loss in one piece and in chunks of 200 tokens."""
    _, _, whole, _ = one_step(shape, tp, "fp32")
    whole_chunk = loss_module.CHUNK["cpu"]
    loss_module.CHUNK["cpu"] = 200 * 96 // tp.size
    _, _, pieces, _ = one_step(shape, tp, "fp32")
    loss_module.CHUNK["cpu"] = whole_chunk
    pairs = zip(whole.parameters(), pieces.parameters(), strict=True)
    return max(((a.grad - b.grad).norm() / a.grad.norm()).item() for a, b in pairs)


def compare(sequence_parallel: bool, kinds: list[str], steps: list[str]) -> dict[str, Any]:
    """Every comparison that one launch of tp = all ranks allows."""
    size = dist.get_world_size() if dist.is_initialized() else Mesh.from_env().size
    mesh = Mesh.from_env(ParallelConfig(size, sequence_parallel))
    tp, out = mesh.tp, {}
    heads = {"num_heads": 16, "num_kv_heads": 8} if size == 8 else {}
    for kind in kinds:
        for case, sizes in CASES.items():
            out[kind, case] = difference(shape_of(**{**sizes, **heads}), tp, kind)
    out["chunked"] = chunked(shape_of(vocab_size=96, **heads), tp)
    out["cross-entropy"] = {
        (str(dtype), vocab, offset): cross_entropy(tp, dtype, vocab, offset)
        for dtype in (torch.float32, torch.float64)
        for vocab in (13, 64 * size, 127)  # a rank or more of padding alone; no padding; some
        for offset in (0.0, 30.0)
    }
    for kind in steps:
        one, many, again = hundred_steps(TensorParallel(), kind), hundred_steps(tp, kind), hundred_steps(tp, kind)
        out[kind, "losses"] = [abs(a - b) for a, b in zip(one[0], many[0], strict=True)]
        out[kind, "learnt"] = one[0][-1]
        out[kind, "norms"] = [abs(a / b - 1) for a, b in zip(one[1], many[1], strict=True)]
        out[kind, "clipped"] = sum(norm > 0.5 for norm in many[1])
        out[kind, "repeated"] = many[:2] == again[:2]
        out[kind, "replicated"] = {n: p for n, p in many[2].items() if "norm" in n}
        spare = max(0, 97 - tp.rank * many[2]["head.weight"].shape[0])  # this rank's first row of padding
        out[kind, "padding"] = max(many[2][f"{n}.weight"][spare:].abs().sum().item() for n in ("embedding", "head"))
    mesh.close()
    return out


def odd_vocabulary() -> dict[bool, dict[str, float]]:
    """The comparison that costs least, without and with sequence parallelism, in fp64."""
    mesh = Mesh.from_env(ParallelConfig(2))
    layouts = {on: dataclasses.replace(mesh.tp, sequence_parallel=on) for on in (False, True)}
    out = {on: difference(shape_of(vocab_size=97, num_layers=1), tp, "fp64") for on, tp in layouts.items()}
    mesh.close()
    return out


@pytest.fixture(scope="module")
def odd() -> list[dict[bool, dict[str, float]]]:
    return run_distributed(odd_vocabulary, 2)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2+sp"])
def test_an_odd_vocabulary_on_two_ranks_is_one_process_to_twelve_digits(odd, sequence_parallel):
    for rank, result in enumerate(odd):
        worst = max((error, name) for name, error in result[sequence_parallel].items())
        assert worst[0] <= 1e-12, (f"rank {rank}", *worst)


@pytest.fixture(scope="module", params=[False, True], ids=["tp2", "tp2+sp"])
def two_ranks(request) -> list[dict[str, Any]]:
    return run_distributed(compare, 2, request.param, ["fp32", "fp64", "bf16"], [])


@pytest.fixture(scope="module")
def trained() -> list[dict[str, Any]]:
    return run_distributed(compare, 2, True, [], ["fp32"])


def check_gradients(results: list[dict[str, Any]], kind: str) -> None:
    for case in CASES:
        for rank, found in enumerate(r[kind, case] for r in results):
            worst = max((v, k) for k, v in found.items() if k.startswith("grad "))
            assert worst[0] <= BOUND[kind], (case, f"rank {rank}", *worst)
            tight = {"fp32": 1e-5, "fp64": 1e-12, "bf16": 5e-4}[kind]
            assert found["mean loss"] <= tight and (kind == "bf16" or found["loss"] <= tight), (case, found)
            assert found["logits"] <= (1e-12 if kind == "fp64" else 1e-5) or kind == "bf16", (case, found)
            assert found["norm"] <= {"fp32": 1e-6, "fp64": 1e-12, "bf16": 5e-3}[kind], (case, found["norm"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "fp64", "bf16"])
def test_gradients_losses_logits_and_norm_are_those_of_one_process(two_ranks, kind):
    check_gradients(two_ranks, kind)


@pytest.mark.slow
def test_vocabulary_parallel_cross_entropy_is_pytorchs(two_ranks):
    for result in two_ranks:
        for (dtype, *case), error in result["cross-entropy"].items():
            assert error <= (1e-6 if case[1] == 0 else 2e-6), (dtype, case, error)
            assert dtype == "torch.float32" or error <= 1e-12, (dtype, case, error)


@pytest.mark.slow
def test_chunked_loss_is_the_whole_under_tensor_parallelism(two_ranks):
    assert max(result["chunked"] for result in two_ranks) <= 1e-6


def check_steps(results: list[dict[str, Any]], kind: str) -> None:
    for result in results:
        assert max(result[kind, "losses"]) <= (1e-4 if kind == "fp32" else 1e-2) and result[kind, "learnt"] < 1.0
        assert kind == "bf16" or (max(result[kind, "norms"][:20]) <= 1e-5)
        assert result[kind, "clipped"] > 10, "the clipping must be at work"
        assert result[kind, "repeated"]


@pytest.mark.slow
def test_a_hundred_steps_stay_together_and_repeat_bitwise(trained):
    check_steps(trained, "fp32")


@pytest.mark.slow
def test_replicated_parameters_are_bit_equal_on_all_ranks_and_padding_stays_zero(trained):
    check_replicas(trained, "fp32")


def check_replicas(results: list[dict[str, Any]], kind: str) -> None:
    first = results[0][kind, "replicated"]
    assert len(first) == 5
    for result in results:
        assert result[kind, "padding"] == 0.0
        for name, param in result[kind, "replicated"].items():
            assert torch.equal(param, first[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_four_and_eight_ranks_are_one_process(size, sequence_parallel):
    steps = ["fp32", "bf16"] if size == 4 else []
    results = run_distributed(compare, size, sequence_parallel, ["fp32", "fp64", "bf16"], steps)
    for kind in ("fp32", "fp64", "bf16"):
        check_gradients(results, kind)
    for result in results:
        assert max(error for (dtype, *_), error in result["cross-entropy"].items() if "64" in dtype) <= 1e-12
    for kind in steps:
        check_steps(results, kind)
        check_replicas(results, kind)


def grid() -> dict[str, Any]:
    mesh = Mesh.from_env(ParallelConfig(tensor_parallel_size=2))
    unit = MegatronUnit(mesh)
    out = {
        "place": (mesh.rank, mesh.dp_rank, mesh.dp_size, mesh.tp.rank, mesh.tp.size),
        "tp group": dist.get_process_group_ranks(unit.get_tensor_model_parallel_group()),
        "dp group": dist.get_process_group_ranks(unit.get_data_parallel_group()),
        "unit": (
            unit.get_data_parallel_rank(),
            unit.get_data_parallel_world_size(),
            unit.get_model_parallel_rank(),
            unit.get_model_parallel_world_size(),
            unit.get_tensor_model_parallel_src_rank(),
        ),
        "said": unit.get_data_parallel_group_ranks(),
        "sum": mesh.sum(torch.tensor(10.0**mesh.rank)).item(),
        "any": (mesh.any(mesh.rank == 3), mesh.any(False)),
        "from main": mesh.from_main(7 + mesh.rank),
    }
    mesh.close()
    return out


def test_neighbours_share_layers_and_sums_count_each_sample_once():
    results = run_distributed(grid, 4)
    assert [r["place"] for r in results] == [(0, 0, 2, 0, 2), (1, 0, 2, 1, 2), (2, 1, 2, 0, 2), (3, 1, 2, 1, 2)]
    assert [r["tp group"] for r in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [r["dp group"] for r in results] == [r["said"] for r in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [r["unit"] for r in results] == [(0, 2, 0, 2, 0), (0, 2, 1, 2, 0), (1, 2, 0, 2, 2), (1, 2, 1, 2, 2)]
    assert [r["sum"] for r in results] == [101.0, 1010.0, 101.0, 1010.0], "over the data-parallel ranks alone"
    assert all(r["any"] == (True, False) and r["from main"] == 7 for r in results), "over all ranks"


def test_size_1_needs_no_process_group():
    assert not dist.is_initialized()
    loss, _, model, norm = one_step(shape_of(vocab_size=97), TensorParallel(), "fp32")
    assert math.isfinite(norm) and model.embedding.weight.shape[0] == 97 and loss.shape == (32, T)
