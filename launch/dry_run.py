"""What ``launch/pretrain.py --dry-run`` prints: the plan, what it costs here and on GPUs, what it would draw."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import torch

from megatron_lite import tally
from megatron_lite.config import Config
from megatron_lite.data.loader import BlendedLoader
from megatron_lite.mesh import Mesh, TensorParallel, data_parallel_size
from megatron_lite.optim import schedule_table
from megatron_lite.plan import Plan
from megatron_lite.run import load_mixture, resolve
from megatron_lite.speed import measure_speed
from regmix_search import gpu_cost


def dry_run(config: Config, gpus: int | None) -> int:
    """Prints it all and returns the exit code. ``gpus``: so many of them elsewhere; None: this launch as it is.

    Plan and cost need no data. Where mixture or shards are at fault, they are printed first, then the error.
    """
    mesh = imagined_mesh(config, gpus) if gpus is not None else Mesh.from_env(config.parallel)
    try:
        loader, plan, problem = open_data(config, mesh)
        speed = None if gpus is not None or loader is None else measure_speed(config, plan, mesh)
        if not mesh.is_main:
            return 2 if problem else 0
        rate = (speed.tokens_per_s, speed.source) if speed else ()
        print(f"{config.name}: dry run\n{plan.table(*rate)}")
        rates = schedule_table(plan.total_steps, config.optim.lr, config.schedule)
        print("  lr at step  " + ", ".join(f"{step:,}: {rate:.3g}" for step, rate in rates))
        print(cost(config, plan, mesh, loader, speed.tokens_per_s if speed else None))
        if loader is not None:
            print(f"to draw:\n{tally.table(tally.report(loader, plan.total_steps))}")
        elif problem is None:
            print("to draw: not known without --mixture")
        if problem is not None:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        return 2 if problem else 0
    finally:
        mesh.close()


def imagined_mesh(config: Config, gpus: int) -> Mesh:
    """Rank 0 of a launch on GPUs that are elsewhere; no process group is made."""
    tp_size = config.parallel.tensor_parallel_size
    if gpus < 1:
        raise ValueError(f"--gpus {gpus}: must be at least 1")
    dp_size = data_parallel_size(gpus, tp_size)
    return Mesh(0, gpus, torch.device("cuda"), 0, dp_size, TensorParallel(size=tp_size))


def open_data(config: Config, mesh: Mesh) -> tuple[BlendedLoader | None, Plan, Exception | None]:
    """(loader, plan, None), or (None, the plan without data, what is wrong with the data, if a mixture is named).

    Settings that clash raise ValueError either way.
    """
    problem: Exception | None = None
    if config.mixture is not None:
        try:
            return *resolve(config, load_mixture(config), mesh), None
        except (ValueError, OSError) as error:
            problem = error
    return None, resolve_plan(config, mesh, None), problem


def resolve_plan(config: Config, mesh: Mesh, vocab_size: int | None) -> Plan:
    """The plan of a launch on as many GPUs as it has ranks, whatever this machine is."""
    return Plan.resolve(config, mesh.size, vocab_size, True, "CROSS_SIZE" in os.environ)


def cost(config: Config, plan: Plan, mesh: Mesh, loader: BlendedLoader | None, rate: float | None) -> str:
    """Time and memory on the GPU at hand, where there is one and it was measured; else on H100 and H200."""
    sets = len(loader.valid) if loader else 0
    if mesh.device.type == "cuda" and rate is not None:
        facts = torch.cuda.get_device_properties(mesh.device)
        return gpu_cost.table(config, plan, sets, gpu_cost.Here(facts.name, facts.total_memory, rate))
    return gpu_cost.table(config, replace(plan, precision=resolve_plan(config, mesh, None).precision), sets)
