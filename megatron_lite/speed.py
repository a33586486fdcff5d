"""How fast this machine would train a plan: measured where that is cheap, estimated where it is not, and said which."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from megatron_lite.config import Config
from megatron_lite.mesh import Mesh
from megatron_lite.model import GPT
from megatron_lite.plan import Plan

MEASURABLE_FLOPS = 5e12  # one micro-batch above this is not run just to time it (minutes on a CPU)
ASSUMED_MFU = 0.40  # what well-run 1B models reach on H100 (MPT-1B on 8xH100: 41.8 %, llm-foundry's tables)


@dataclass(frozen=True)
class Speed:
    """Tokens a second over all ranks, and where the figure comes from."""

    tokens_per_s: float
    source: str


def measure_speed(config: Config, plan: Plan, mesh: Mesh) -> Speed:
    """A few micro-batches of the real model on this device; for models too large to try, peak x assumed MFU."""
    micro_tokens = config.batch.micro_batch_size * config.data.seq_length
    if plan.flops_per_token * micro_tokens <= MEASURABLE_FLOPS or mesh.device.type == "cuda":
        return Speed(mesh.dp_size * _micro_batch_rate(config, plan, mesh), "(measured on this machine)")
    flops = _gemm_flops(mesh.device)
    return Speed(
        mesh.size * flops * ASSUMED_MFU / plan.flops_per_token, f"(estimated: {flops:.3g} FLOP/s here, MFU 0.4)"
    )


def _micro_batch_rate(config: Config, plan: Plan, mesh: Mesh) -> float:
    model = GPT(plan.shape, config.seed, mesh.tp).to(mesh.device)
    shape = (config.batch.micro_batch_size, config.data.seq_length)
    tokens_BT = torch.zeros(shape, dtype=torch.int32, device=mesh.device)
    autocast = torch.autocast(mesh.device.type, torch.bfloat16, enabled=plan.precision == "bf16")
    best = float("inf")
    for _ in range(4):  # the first ones warm caches and allocators up
        start = time.perf_counter()
        with autocast:
            loss = model(tokens_BT, tokens_BT).mean()
        loss.backward()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return tokens_BT.numel() / best


def _gemm_flops(device: torch.device) -> float:
    a = torch.ones(1024, 1024, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
