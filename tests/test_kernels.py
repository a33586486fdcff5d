"""The loss kernel against plain cross-entropy, chunk by chunk and block by block; optimizer and allocator choices."""

import dataclasses
import platform
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import megatron_lite.tensor_parallel.loss as loss_module
from megatron_lite.config import OptimConfig, to_dict
from megatron_lite.engine import build_engine
from megatron_lite.mesh import Mesh
from megatron_lite.optim import adamw_name, apex_adamw, build_optimizer, moments, param_groups, set_moments
from megatron_lite.plan import Plan
from megatron_lite.resume import identity
from megatron_lite.tensor_parallel.loss import VocabRows, token_losses, weighted_loss
from megatron_lite.testing import tiny_config

ROWS, HIDDEN, VOCAB = 11, 8, 30


def inputs(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, HIDDEN, generator=generator, dtype=dtype).mul(scale).requires_grad_() for n in (ROWS, VOCAB))
    labels, weights = (
        torch.randint(0, VOCAB, (ROWS,), generator=generator),
        0.5 + torch.rand(ROWS, generator=generator, dtype=dtype),
    )
    weights[3] = 0.0  # a masked token
    return h, w, labels, weights


@pytest.fixture(params=["whole", "chunks"])
def chunks(request, monkeypatch):
    """Everything at once, or chunks of 4 rows (the last one short) in blocks of 2."""
    if request.param == "chunks":
        monkeypatch.setitem(loss_module.CHUNK, "cpu", 4 * VOCAB)
        monkeypatch.setattr(loss_module, "BLOCK", 2 * VOCAB)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("scale", [1.0, 12.0])  # 12: logits of some hundreds, whose plain exponentials overflow
def test_losses_and_gradients_equal_cross_entropy(chunks, dtype, tolerance, scale):
    h, w, labels, weights = inputs(dtype, scale)
    expected = F.cross_entropy(h.double() @ w.double().t(), labels, reduction="none")
    theirs = torch.autograd.grad((expected * weights).sum(), (h, w))
    losses = token_losses(h, w, labels)
    loss, detached = weighted_loss(h, w, labels, weights)
    assert torch.equal(losses, detached) and not detached.requires_grad and losses.dtype == dtype
    assert (losses - expected).norm() <= tolerance * expected.norm()
    assert (loss - (expected * weights).sum()).abs() <= tolerance * loss.abs()
    for scalar, factor in (((losses * weights).sum(), 1), (loss * 3, 3)):
        ours = torch.autograd.grad(scalar, (h, w))
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype and (a / factor - b).norm() <= tolerance * b.norm()


def test_a_second_backward_is_refused():
    h, w, labels, weights = inputs()
    loss, _ = weighted_loss(h, w, labels, weights)
    loss.backward(retain_graph=False)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_bf16_matmuls_keep_an_fp32_loss_and_gradients(chunks):
    h, w, labels, weights = inputs()
    expected = F.cross_entropy(h @ w.t(), labels, reduction="none")
    theirs = torch.autograd.grad((expected * weights).sum(), (h, w))
    with torch.autocast("cpu", torch.bfloat16):
        loss, losses = weighted_loss(h, w, labels, weights)
        unweighted = token_losses(h, w, labels)
    assert losses.dtype == torch.float32 and not torch.equal(losses, expected)
    torch.testing.assert_close(losses, expected.detach(), rtol=0, atol=0.05)  # logits of bf16's 3 digits
    for scalar in (loss, (unweighted * weights).sum()):  # the second backward runs outside autocast
        for a, b in zip(torch.autograd.grad(scalar, (h, w)), theirs, strict=True):
            assert a.dtype == torch.float32 and 0 < (a - b).norm() < 0.01 * b.norm()


def test_no_more_logits_are_held_than_a_chunk_has():
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    h, w, labels = torch.randn(4096, 16), torch.randn(20_000, 16), torch.randint(0, 20_000, (4096,))
    with Sizes():
        weighted_loss(h.requires_grad_(), w.requires_grad_(), labels, torch.ones(4096))[0].backward()
    whole = 4096 * 20_000 * 4
    assert 0 < largest <= 4 * loss_module.CHUNK["cpu"] < whole / 2


def test_a_run_holds_as_many_logits_as_its_loss_chunk_says(monkeypatch, tmp_path):
    config = tiny_config(tmp_path, "loss_chunk=640")  # 64 token ids: 10 rows, which cut 64 into 7 chunks
    plan = Plan.resolve(config, 1, 64, False, False)
    cut, whole = (
        build_engine(c, plan, Mesh.from_env()).module for c in (config, dataclasses.replace(config, loss_chunk=0))
    )
    sizes, seen = list[int](), loss_module.exponentials_
    monkeypatch.setattr(loss_module, "exponentials_", lambda x, *rest: (sizes.append(x.numel()), seen(x, *rest))[1])
    tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = [model(tokens, tokens, torch.ones(4, 16))[1] for model in (cut, whole)]
    assert sizes[:-1] == [640] * 6 + [256] and sizes[-1] == 64 * 64
    torch.testing.assert_close(*losses)
    assert identity({**to_dict(config), "loss_chunk": 0}) == identity(to_dict(config)), "a run may go on with another"
    with pytest.raises(ValueError, match="loss_chunk=-1"):
        Plan.resolve(dataclasses.replace(config, loss_chunk=-1), 1, 64, False, False)


def sharded_loss(dtype: torch.dtype):
    """This rank's (loss, losses, its part of h's gradient, its rows of the head's) with the last rank all padding."""
    from megatron_lite.config import ParallelConfig
    from megatron_lite.mesh import Mesh

    h, w, labels, weights = inputs(dtype, 12.0)
    mesh = Mesh.from_env(ParallelConfig(tensor_parallel_size=3))
    first, size = [(0, 20), (20, 10), (30, 0)][mesh.tp.rank]
    loss_module.CHUNK["cpu"] = 4 * 20
    loss, losses = weighted_loss(h, w[first : first + size], labels, weights, VocabRows(first, 20, mesh.tp))
    grad_h, grad_w = torch.autograd.grad(loss, (h, w))
    mesh.close()
    return loss.item(), losses.tolist(), grad_h.tolist(), grad_w.tolist()


@pytest.mark.slow
def test_a_vocabulary_spread_over_ranks_gives_the_same_loss_and_gradients():
    from megatron_lite.testing import run_distributed

    h, w, labels, weights = inputs(torch.float64, 12.0)
    loss, losses = weighted_loss(h, w, labels, weights)
    grad_h, grad_w = torch.autograd.grad(loss, (h, w))
    ranks = run_distributed(sharded_loss, 3, torch.float64)
    for rank in ranks:
        assert rank[0] == pytest.approx(loss.item(), rel=1e-13) and rank[1] == pytest.approx(losses.tolist(), rel=1e-12)
    for i, expected in ((2, grad_h), (3, grad_w)):
        total = sum(torch.tensor(rank[i], dtype=torch.float64) for rank in ranks)
        assert (total - expected).norm() <= 1e-13 * expected.norm()


class FusedAdam(torch.optim.Optimizer):
    """apex's, as its optimizers/fused_adam.py has it: one step count a group, and state only for the moments."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True):  # fmt: skip
        assert adam_w_mode
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (b1, b2), t = group["betas"], group["step"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(p.grad, 1 - b1)
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                update = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group["eps"])
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))


@pytest.fixture
def apex(monkeypatch):
    """NVIDIA's apex, as far as it is used here."""
    module = types.ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)


def test_apex_steps_as_torch_does_and_resumes_at_its_step_count(apex):
    config = OptimConfig(lr=1e-2)

    def steps(build, cut):
        model = torch.nn.Linear(5, 7)
        with torch.no_grad():
            [p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p)) for p in model.parameters()]
        optimizer = build(param_groups(model, 0.1), config)
        for step in range(6):
            if step == cut:
                state = {name: tensor.clone() for name, tensor in moments(model, optimizer).items()}
                assert state["step"] == cut
                optimizer = build(param_groups(model, 0.1), config)
                set_moments(model, optimizer, state)
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    expected = steps(build_optimizer, None)
    for cut in (None, 3):
        for got, want in zip(steps(apex_adamw, cut), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_apex_is_taken_on_a_gpu_and_pypis_apex_never(apex, monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert (adamw_name(gpu), adamw_name(cpu)) == ("apex's FusedAdam", "torch's fused AdamW")
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    assert adamw_name(gpu) == "torch's fused AdamW"


def test_freed_memory_is_kept_where_the_c_library_is_glibc():
    code = """
import resource, torch
from megatron_lite.process import use_cpu
USE
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(16 << 20)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = [
        int(subprocess.check_output([sys.executable, "-c", code.replace("USE", use)], text=True))
        for use in ("", "use_cpu(1)")
    ]
    if platform.libc_ver()[0] == "glibc":
        assert faults[1] < faults[0] / 2
