"""`pytest -m gpu`: what a GPU computes is what the CPU computes. What can run on the CPU does so with the other tests.

One GPU is enough for all but the layouts of two ranks. No GPU has run this yet: its tolerances for one are estimates.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_lite.attention import Documents, by_document, packed, sdpa, varlen_kernel
from megatron_lite.config import OptimConfig, dump
from megatron_lite.data.mixture import Mixture
from megatron_lite.files import read_jsonl
from megatron_lite.mesh import Mesh
from megatron_lite.optim import build_optimizer, param_groups
from megatron_lite.tensor_parallel.loss import weighted_loss
from megatron_lite.testing import run_distributed, tiny_config, write_tiny_shards
from megatron_lite.train import train
from tests.conftest import wants_gpus

ROOT = Path(__file__).resolve().parents[1]
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
BOTH = pytest.mark.parametrize("device", ["cpu", GPU])
SLOW_OR_GPU = pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU])


class Curve(NamedTuple):
    """Losses and gradient norms of ten steps, and the held-out losses after them."""

    losses: list[float]
    norms: list[float]
    held_out: list[float]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder with tiny shards and mixture.yaml."""
    folder = tmp_path_factory.mktemp("gpu")
    write_tiny_shards(folder / "shards").save(folder / "mixture.yaml")
    return folder


def curve(device: str, shards: Path, run: Path, *overrides: str) -> Curve:
    """A run of the real loop on this device, in fp32 unless ``overrides`` say otherwise."""
    config = tiny_config(run, "precision=fp32", *overrides)
    with mock.patch.object(torch.cuda, "is_available", lambda: device == "cuda"):
        result = train(config, Mixture.load(shards / "mixture.yaml"))
    rows = read_jsonl(run / "metrics.jsonl")
    return Curve(*([row[f"train/{key}"] for row in rows] for key in ("loss", "grad_norm")), [*result.losses.values()])


def assert_near(found: Curve, expected: Curve, losses: float, norms: float) -> None:
    """Losses within so many nats, norms within that share; and something was learned at all."""
    assert len(found.losses) == len(expected.losses) == 10 and expected.losses[-1] < expected.losses[0] - 0.1
    assert found.losses == pytest.approx(expected.losses, rel=0, abs=losses)
    assert found.held_out == pytest.approx(expected.held_out, rel=0, abs=losses)
    assert found.norms == pytest.approx(expected.norms, rel=norms)


@pytest.fixture(scope="module")
def on_cpu(shards) -> Curve:
    """What every test here compares with: one process on the CPU, in fp32."""
    return curve("cpu", shards, shards / "cpu")


@pytest.mark.gpu
def test_a_gpu_draws_the_curve_of_the_cpu(shards, tmp_path, on_cpu):
    assert_near(curve("cuda", shards, tmp_path), on_cpu, losses=1e-4, norms=1e-3)


@BOTH
def test_bf16_draws_the_curve_of_fp32(shards, tmp_path, on_cpu, device):
    found = curve(device, shards, tmp_path, "precision=bf16")
    assert_near(found, on_cpu, losses=0.02, norms=0.05)
    assert found.losses != on_cpu.losses


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["false", "true"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_draws_the_eager_curve(shards, tmp_path, graphs, precision, device="cuda"):
    """With CUDA graphs too, as proxies may run: two micro-batches a step add up in the same gradients."""
    settings = (f"precision={precision}",)
    eager = curve(device, shards, tmp_path / "eager", *settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile=true does not work here")
        compiled = curve(device, shards, tmp_path / "run", *settings, "compile=true", f"cuda_graphs={graphs}")
    near = {"fp32": (1e-4, 1e-3), "bf16": (0.02, 0.05)}[precision]  # the compiler leaves roundings to bf16 out
    assert_near(compiled, eager, *near)


@SLOW_OR_GPU
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_give_the_same_curve(shards, tmp_path, on_cpu, device, recompute):
    found = curve(device, shards, tmp_path, f"activation_checkpointing={recompute}")
    assert_near(found, on_cpu, losses=1e-4, norms=1e-3)


@SLOW_OR_GPU
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(shards, tmp_path, device):
    settings = ("checkpoint={every: 5, async_save: true}",)
    whole = curve(device, shards, tmp_path, *settings)
    for file in (tmp_path / "step_0000010").iterdir():
        file.unlink()
    (tmp_path / "result.json").unlink()
    assert_near(curve(device, shards, tmp_path, *settings), whole, losses=1e-5, norms=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("key", ["reset_position_ids", "reset_attention_mask", "eod_mask_loss"])
def test_document_marks_reach_the_gpu(shards, tmp_path, on_cpu, key):
    settings = ("reset_position_ids", "reset_attention_mask") if key == "reset_attention_mask" else (key,)
    overrides = [f"data.{name}=true" for name in settings]
    expected = curve("cpu", shards, tmp_path / "cpu", *overrides)
    assert expected.losses != on_cpu.losses
    assert_near(curve("cuda", shards, tmp_path / "run", *overrides), expected, losses=1e-4, norms=1e-3)


def heads(device: str, groups: int, length: int = 96) -> list[torch.Tensor]:
    """q of four heads, k and v of ``groups``, in fp64 on the CPU's draw."""
    generator = torch.Generator().manual_seed(groups)
    sizes = [(2, count, length, 64) for count in (4, groups, groups)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(device).requires_grad_() for size in sizes]


def with_gradients(attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor], dtype: torch.dtype) -> list:
    """The output and the gradients by q, k and v, computed in ``dtype``."""
    out = attend(*(x.to(dtype) for x in inputs))
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
    return [out.double(), *torch.autograd.grad((out.double() * weights).sum(), inputs)]


def assert_rounded(found: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Equal but for rounding to ``dtype``, tensor by tensor."""
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm()


@BOTH
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_flash_attention_is_the_softmax_written_out(device, groups):
    """In bf16 on a GPU, where flash kernels know nothing else; the CPU's flash kernel in fp32."""
    dtype, inputs = torch.bfloat16 if device == "cuda" else torch.float32, heads(device, groups)

    def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(4 // groups, dim=1) for x in (k, v))
        future = torch.ones(96, 96, dtype=torch.bool, device=device).triu(1)
        return (q @ k.mT / 8).masked_fill(future, -torch.inf).softmax(-1) @ v

    expected = with_gradients(written_out, inputs, torch.float64)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert_rounded(with_gradients(sdpa, inputs, dtype), expected, dtype)
    with sdpa_kernel(SDPBackend.MATH):
        assert_rounded(with_gradients(sdpa, inputs, dtype), expected, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_varlen_kernel_is_document_by_document(groups):
    kernel, starts = varlen_kernel(), [0, 5, 96, 97, 170, 192]
    assert kernel is not None, "no varlen kernel with this torch: document masks go document by document on this GPU"
    longest = max(b - a for a, b in itertools.pairwise(starts))
    documents = Documents(None, torch.tensor(starts, dtype=torch.int32, device="cuda"), longest)
    inputs = heads("cuda", groups)
    expected = with_gradients(lambda *x: by_document(*x, documents), inputs, torch.float64)
    assert_rounded(
        with_gradients(lambda *x: packed(*x, documents, kernel), inputs, torch.bfloat16), expected, torch.bfloat16
    )


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_kernel_is_cross_entropy(device, dtype):
    """A GPU's chunk holds 2^27 logits: here all of them, so chunks are tests/test_kernels.py's business."""
    generator = torch.Generator().manual_seed(0)
    h, head = (torch.randn(n, 32, generator=generator).to(device).requires_grad_() for n in (300, 1000))
    labels = torch.randint(0, 1000, (300,), generator=generator, dtype=torch.int32).to(device)
    weights = torch.rand(300, generator=generator).to(device)
    losses = F.cross_entropy(h.double() @ head.double().t(), labels.long(), reduction="none")
    expected = [losses, *torch.autograd.grad((losses * weights).sum(), (h, head))]
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, found = weighted_loss(h, head, labels, weights)
    assert_rounded([found, *torch.autograd.grad(loss, (h, head))], expected, dtype)


@BOTH
def test_fused_adamw_is_the_plain_one(device):
    config, results = OptimConfig(lr=1e-2), []
    for fused in (True, False):
        torch.manual_seed(0)
        module = torch.nn.Linear(70, 50).to(device)
        groups = param_groups(module, config.weight_decay)
        plain = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "foreach": False}
        optimizer = build_optimizer(groups, config) if fused else torch.optim.AdamW(groups, **plain)
        for step in range(20):
            for param in module.parameters():
                generator = torch.Generator().manual_seed(step)
                param.grad = torch.randn(param.shape, generator=generator).to(device)
            optimizer.step()
        results.append([param.detach() for param in module.parameters()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def on_ranks(device: str, shards: str, runs: dict[str, tuple[str, ...]]) -> dict[str, Curve]:
    """One run after another on this rank: by NCCL on GPUs, by gloo on the CPU; DeepSpeed keeps its groups between."""
    found = {name: curve(device, Path(shards), Path(shards) / f"{device} {name}", *runs[name]) for name in runs}
    with mock.patch.object(torch.cuda, "is_available", lambda: device == "cuda"):
        Mesh.from_env().close()
    return found


ZERO = {f"deepspeed zero{stage}": ("engine=deepspeed", f"parallel.zero_stage={stage}") for stage in (0, 1, 2)}
TWO_RANKS = {
    "dp2": (),
    "dp2 zero1": ("parallel.zero_stage=1",),
    "tp2": ("parallel.tensor_parallel_size=2",),
    "tp2 sp": ("parallel={tensor_parallel_size: 2, sequence_parallel: true}",),
}


@SLOW_OR_GPU
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_zero_and_engines_draw_the_same_curve(shards, on_cpu, device, ranks):
    """Two ranks by NCCL where there are two GPUs; DeepSpeed's ZeRO 0 to 2 where it is installed."""
    if device == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    runs = (TWO_RANKS if ranks == 2 else {}) | (ZERO if importlib.util.find_spec("deepspeed") else {})
    if not runs:
        pytest.skip("one rank of torch's engine is the other tests' business, and there is no DeepSpeed")
    runs = {f"{name} of {ranks}": settings for name, settings in runs.items()}
    for found in run_distributed(on_ranks, ranks, device, str(shards), runs):
        for name, got in found.items():
            print(name)
            assert_near(got, on_cpu, losses=1e-4, norms=1e-3)


@pytest.mark.gpu
def test_the_command_line_takes_the_gpu_and_bf16_and_names_its_kernels(shards, tmp_path):
    (tmp_path / "c.yaml").write_text(dump(tiny_config(tmp_path / "run", "log.console=true", "threads=0")))
    command = ["launch/pretrain.py", "--config", str(tmp_path / "c.yaml"), "--mixture", str(shards / "mixture.yaml")]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["precision"] == "bf16" and "SDPA" in done.stdout and "AdamW" in done.stdout
    memory = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["perf/memory_gib"]
    assert 0 < memory < 0.25, "of tensors on the GPU, not of the process"


@pytest.mark.parametrize(
    ("marks", "wanted"),
    [
        ("not slow", False),
        ("", False),
        ("slow", False),
        ("slow and not gpu", False),
        ("gpu", True),
        ("slow or gpu", True),
    ],
)
def test_gpus_are_hidden_from_tests_that_are_for_the_cpu(marks, wanted):
    assert wants_gpus(marks) == wanted
