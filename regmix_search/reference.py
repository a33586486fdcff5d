"""What a proxy's losses are compared with: a model, or the losses of one, stored once for every sample of a run.

    python -m regmix_search.reference --config proxy.yaml --mixture mixture.yaml --out reference_losses

scores every sample that this run will draw with the model that its reweighting.reference names, and writes
<out>/<domain>.f32 (float32 [ordinal, seq_length]) beside losses.json, which says of what. Runs on any launcher. Then
reweighting.reference=<out> reads them in the place of a forward pass, in any run with the same seed and data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from megatron_lite.config import Config, load_config
from megatron_lite.data.loader import Batch, BlendedLoader
from megatron_lite.data.mixture import Mixture
from megatron_lite.evaluate import token_losses
from megatron_lite.files import atomic_write_json, sync
from megatron_lite.mesh import Mesh
from megatron_lite.model import GPT
from megatron_lite.plan import Plan
from megatron_lite.process import use_cpu
from megatron_lite.run import Run, load_mixture, resolve
from megatron_lite.tensor_parallel.shards import slicer
from megatron_lite.weights import initial_weights
from regmix_search.freshness import read_json

FORWARD = 1 / 3  # of a training token's FLOPs


class Reference(Protocol):
    """Gives every micro-batch of a step the losses that its own are compared with."""

    def attach(self, run: Run, micro_batches: Sequence[Batch]) -> None:
        """Sets ``reference_BT``."""


class ReferenceModel:
    """A second model in memory, and a second forward pass for every micro-batch."""

    def __init__(self, path: str, plan: Plan, mesh: Mesh) -> None:
        """``path``: a run or step_* folder of a model of the plan's shape, cut over ranks as the run's own."""
        self.model = GPT(plan.shape, 0, mesh.tp).requires_grad_(False).eval()
        whole, cut = initial_weights(path, plan.shape, "reweighting.reference"), slicer(self.model, mesh.tp)
        for name, param in self.model.named_parameters():
            param.copy_(cut(name, whole[name]))
        self.model.to(mesh.device)

    def attach(self, run: Run, micro_batches: Sequence[Batch]) -> None:
        """See Reference."""
        for batch in micro_batches:
            batch.reference_BT = token_losses(self.model, batch, run.mesh.device, run.engine.autocast)


class StoredLosses:
    """Rows of files that ``store`` wrote, by domain and ordinal. ValueError where they are of other samples."""

    def __init__(self, folder: Path, loader: BlendedLoader, total_steps: int) -> None:
        stored, wanted = read_json(folder / "losses.json"), identity(loader, total_steps)
        enough = {name: min(n, stored["rows"].get(name, 0)) for name, n in wanted["rows"].items()}
        wrong = [key for key in wanted if wanted[key] != {**stored, "rows": enough}.get(key)]
        if wrong:
            raise ValueError(
                f"reweighting.reference={folder}: was stored for other samples than this run's: "
                f"{', '.join(wrong)} differ; store it again with `python -m regmix_search.reference`"
            )
        self.rows = [_open(folder, name, stored["rows"][name], loader.seq_length, "r") for name in loader.names]

    def attach(self, run: Run, micro_batches: Sequence[Batch]) -> None:
        """See Reference."""
        drawn = zip(*(x.tolist() for x in run.loader.drawn(run.step)), strict=True)
        losses = torch.from_numpy(np.stack([self.rows[domain][ordinal] for domain, ordinal in drawn]))
        parts = torch.split(losses, len(micro_batches[0].domain_B))
        for batch, losses_BT in zip(micro_batches, parts, strict=True):
            batch.reference_BT = losses_BT.to(run.mesh.device)


def open_reference(run: Run) -> Reference:
    """What reweighting.reference names; of stored losses it says what they save."""
    assert run.config.reweighting is not None
    path = run.config.reweighting.reference
    if not (Path(path) / "losses.json").is_file():
        return ReferenceModel(path, run.plan, run.mesh)
    if run.mesh.is_main:
        print(f"reference losses are read from {path}: {saving(run.config, run.plan)}", flush=True)
    return StoredLosses(Path(path), run.loader, run.plan.total_steps)


def saving(config: Config, plan: Plan) -> str:
    """What a run does not compute when the reference's losses are stored, by the plan's FLOP convention."""
    two_pass = config.reweighting is not None and config.reweighting.update_order == "two_pass"
    with_model = 1 + FORWARD * (1 + two_pass)
    return f"{FORWARD * plan.total_flops:.3g} FLOPs saved, {FORWARD / with_model:.0%} of a run beside the model"


def identity(loader: BlendedLoader, total_steps: int) -> dict[str, Any]:
    """What the losses of an ordinal depend on beside the model, and how many ordinals a run of these steps draws."""
    state = loader.state_dict()
    kept = {key: state[key] for key in ("order", "seed", "data.seq_length", "data.sample_order", "domains")}
    return {
        **kept,
        "documents": asdict(loader.options),
        "rows": loader.realised(total_steps * loader.global_batch_size),
    }


def store(config: Config, mixture: Mixture, out: Path) -> str:
    """Scores every sample of a run once and writes its losses; every rank calls it. Returns what they save."""
    if config.reweighting is None or not config.reweighting.reference:
        raise ValueError("reweighting.reference: name the model whose losses are to be stored")
    use_cpu(config.threads)
    mesh = Mesh.from_env(config.parallel)
    loader, plan = resolve(config, mixture, mesh)
    facts, device = identity(loader, plan.total_steps), mesh.device
    model = ReferenceModel(config.reweighting.reference, plan, mesh).model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bf16")
    if mesh.is_main:
        out.mkdir(parents=True, exist_ok=True)
        (out / "losses.json").unlink(missing_ok=True)  # until all is written there is nothing to read
        for name in loader.names:
            _open(out, name, facts["rows"][name], loader.seq_length, "w+")
    mesh.barrier()
    rows = [_open(out, name, facts["rows"][name], loader.seq_length, "r+") for name in loader.names]
    for step in range(plan.total_steps):
        losses = torch.cat([token_losses(model, batch, device, autocast).cpu() for batch in loader.step(step)])
        for domain, ordinal, losses_T in zip(*loader.drawn(step), losses.numpy(), strict=True):
            rows[domain][ordinal] = losses_T  # ranks of one tensor-parallel group write the same
    for one in rows:
        one.flush()
    mesh.barrier()
    if mesh.is_main:
        for name in loader.names:
            sync(out / f"{name}.f32")
        atomic_write_json(out / "losses.json", {**facts, "reference": config.reweighting.reference})
    return saving(config, plan)


def _open(folder: Path, name: str, rows: int, seq_length: int, mode: Any) -> np.memmap[Any, np.dtype[np.float32]]:
    return np.memmap(folder / f"{name}.f32", "<f4", mode, shape=(rows, seq_length))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the proxy's config; its reweighting.reference is a model")
    parser.add_argument("--mixture", help="mixture.yaml; the same as in the config")
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="A.B=C", help="override keys; repeatable"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    args = parser.parse_args(argv)
    try:
        named = [f"mixture={args.mixture}"] if args.mixture else []
        config = load_config(Config, args.config, args.set + named)
        print(f"{args.out}: {store(config, load_mixture(config), args.out)}")
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
