"""Pre-trains one GPT on one mixture.

    python launch/pretrain.py --config configs/pretrain.yaml --mixture mixture.yaml
    torchrun --nproc-per-node 8 launch/pretrain.py --config configs/pretrain.yaml --mixture mixture.yaml
    deepspeed launch/pretrain.py --config configs/pretrain.yaml --mixture mixture.yaml

For many nodes and Slurm: torchrun_pretrain.sh, deepspeed_pretrain.sh, slurm_pretrain.sbatch beside this file.

Exit codes: 0 done, 2 a mistake in settings or data, or ranks that do not find each other, 5 non-finite gradients,
75 saved after SIGTERM or SIGUSR1 (run it again).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # so that `python launch/pretrain.py` works from a clone without installing
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_lite.config import Config, dump, load_config

if TYPE_CHECKING:
    from megatron_lite.mesh import Mesh


def build_parser() -> argparse.ArgumentParser:
    """The command line; everything else is in the config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file; every key has a default (--print-config shows them)")
    parser.add_argument("--mixture", help="mixture.yaml, in our format or RegMix's")
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="A.B=C", help="override keys; repeatable"
    )
    parser.add_argument("--resume", help="auto (newest complete checkpoint), never, or a step_* folder")
    parser.add_argument(
        "--allow-change",
        action="append",
        metavar="KEY",
        help="let a resumed run differ in this: mixture, data, or a key of the config; repeatable",
    )
    parser.add_argument(
        "--engine", choices=("auto", "torch", "deepspeed"), help="default: deepspeed under its launcher"
    )
    parser.add_argument("--name", help="name of the run; out_dir defaults to runs/NAME")
    parser.add_argument("--dry-run", action="store_true", help="print the plan with its time and memory, and stop")
    parser.add_argument("--gpus", type=int, metavar="N", help="with --dry-run: the plan for N GPUs that are elsewhere")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as YAML, and stop")
    # DeepSpeed's launcher appends it; ranks are read from the environment, as under torchrun
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """--config, then --set, then the flags that are short for a key."""
    flags = {
        "mixture": args.mixture,
        "checkpoint.resume": args.resume,
        "checkpoint.allow_change": args.allow_change,
        "engine": args.engine,
        "name": args.name,
    }
    overrides = args.set + [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    return load_config(Config, args.config, overrides)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        config = read_config(args)
        if args.print_config:
            print(dump(config), end="")
            return 0
        if args.gpus is not None and not args.dry_run:
            raise ValueError("--gpus is for --dry-run: a run has as many GPUs as torchrun or deepspeed start ranks")
        if config.init_from or config.model.preset == "init_from":
            from launch import initial

            config = initial.resolve(config)
        if args.dry_run:
            from launch.dry_run import dry_run

            return dry_run(config, args.gpus)
        return pretrain(config)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 5


def pretrain(config: Config) -> int:
    """Trains to the end and prints the held-out losses on rank 0."""
    from launch.provenance import record_start
    from megatron_lite.train import EXIT_PREEMPTED, Preempted, train

    mesh = meet()
    if mesh.is_main:
        record_start(config.run_dir, mesh)
    try:
        if config.reweighting:
            from regmix_search.group_dro import GroupDRO

            result = train(config, reweight=GroupDRO)
        else:
            result = train(config)
    except Preempted:  # on every rank
        mesh.barrier()  # rank 0 may still be writing, and launchers kill the others 30 s after the first has ended
        mesh.close()
        return EXIT_PREEMPTED
    # After an error of this rank alone the others wait in a collective: tearing groups down could wait for them.
    mesh.close()
    if mesh.is_main:
        print(f"done: {result.tokens:,} tokens in {result.seconds:.1f} s, {result.run_dir}/result.json")
        for name, loss in result.losses.items():
            bpb = f", {result.bpb[name]:.4f} bits/byte" if name in result.bpb else ""
            print(f"  valid {name:<16} {loss:.4f} nats/token{bpb}")
    return 0


def meet() -> Mesh:
    """The ranks of this launch, all data parallel; an error that says what to do where they cannot find each other."""
    import torch

    from megatron_lite.mesh import Mesh

    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"srun started {tasks} tasks of launch/pretrain.py, and none knows of the others: start one torchrun a "
            "node, as launch/slurm_pretrain.sbatch does"
        )
    try:
        return Mesh.from_env()
    except RuntimeError as error:  # of the store, gloo or NCCL, which have no class in common
        if isinstance(error, torch.AcceleratorError):
            raise
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConnectionError(
            f"rank {os.environ.get('RANK')} cannot join the others at {where}: {error}\nEvery node must reach that "
            "address; where nodes have several networks, name one in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error


if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # All is on disk. Threads that the groups leave can still abort a process that ends the usual way ("terminate
        # called without an active exception"), and the launcher would see another exit code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
