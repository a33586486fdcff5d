"""What a run is made of, built once: shards and plan, model and optimizer, its checkpoint and its folder."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_lite import checkpoint, resume, tally
from megatron_lite.config import Config, dump, to_dict
from megatron_lite.data.loader import Batch, BlendedLoader, EvalSet
from megatron_lite.data.megatron_order import MegatronOptions
from megatron_lite.data.mixture import Mixture
from megatron_lite.engine import Engine, build_engine, choose_kernels, optim_names
from megatron_lite.files import atomic_write, atomic_write_json
from megatron_lite.mesh import Mesh
from megatron_lite.metrics import Metrics
from megatron_lite.plan import Plan, grad_accum_steps, peak_flops
from megatron_lite.shape import DEFAULT_VOCAB_SIZE
from megatron_lite.tensor_parallel.shards import gather_whole, slicer, whole_shapes
from megatron_lite.weights import initial_weights


class Reweighting(Protocol):
    """What changes how much domains count while a run goes on; every rank has one (regmix_search/group_dro.py)."""

    @property
    def weights(self) -> dict[str, float]:
        """The answer so far, by domain."""

    def prepare(self, run: Run, micro_batches: Sequence[Batch]) -> None:
        """Before a step's backward: sets ``weight_B`` and ``reference_BT`` of its micro-batches."""

    def observe(self, run: Run, sums_3D: Tensor) -> None:
        """After a step, with what ``add_by_domain`` added up on all ranks; may change the loader's mixture."""

    def values(self, run: Run) -> dict[str, float]:
        """For a log line; every rank calls it."""

    def state_dict(self) -> dict[str, Any]:
        """JSON: all that changes from step to step."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what state_dict gave."""


@dataclass
class Run:
    """Everything the loop touches, built once."""

    config: Config
    mixture: Mixture
    plan: Plan
    mesh: Mesh
    loader: BlendedLoader
    eval_sets: list[EvalSet]
    engine: Engine
    saver: checkpoint.Saver
    peak_flops: float | None = None  # dense bf16 FLOP/s of one device by its data sheet, where it is known
    metrics: Metrics | None = None  # rank 0 only
    step: int = 0  # optimizer steps completed; consumed samples follow from it
    reweighting: Reweighting | None = None
    eval_seconds: float = 0.0  # spent in evaluations by this process
    allowed: list[Any] = dataclasses.field(default_factory=list)  # what changed at resumes, for the record


Reweight = Callable[[Run], Reweighting]  # makes one for a run that is built but for its checkpoint


def load_mixture(config: Config) -> Mixture:
    """The mixture that the config names."""
    if config.mixture is None:
        raise ValueError("no mixture: pass --mixture FILE, or set mixture: in the config")
    return Mixture.load(config.mixture, config.data.data_dir)


def resolve(config: Config, mixture: Mixture, mesh: Mesh) -> tuple[BlendedLoader, Plan]:
    """Opens the shards and works out the plan; every cross-check of config, data and launch happens here."""
    grad_accum_steps(config, mesh.dp_size)  # refuses batch sizes before any shard is opened
    loader = BlendedLoader(
        mixture,
        seq_length=config.data.seq_length,
        seed=config.seed,
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=config.batch.micro_batch_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        vocab_size=config.model.vocab_size or DEFAULT_VOCAB_SIZE,  # where no sidecar says
        sample_order=config.data.sample_order,
        reset_position_ids=config.data.reset_position_ids,
        reset_attention_mask=config.data.reset_attention_mask,
        eod_mask_loss=config.data.eod_mask_loss,
        megatron=megatron_options(config),
    )
    vocab_size = loader.meta.vocab_size if loader.meta else None
    if vocab_size is None and config.model.vocab_size is None:
        way_out = "set model.vocab_size, or let data_tools/inspect_data.py --write-sidecar find it"
        warnings.warn(f"no sidecar says how large the vocabulary is: {DEFAULT_VOCAB_SIZE:,} is assumed; {way_out}")
    deepspeed = "CROSS_SIZE" in os.environ  # set by DeepSpeed's launcher for every rank, never by torchrun
    plan = Plan.resolve(config, mesh.size, vocab_size, mesh.device.type == "cuda", deepspeed)
    for phase in config.phases:
        first_step = -(-phase.from_tokens // plan.tokens_per_step)
        loader.change_mixture(first_step, Mixture.load(phase.mixture, config.data.data_dir))
    asked = config.schedule.total_tokens // config.data.seq_length  # samples, not rounded to steps
    tally.check_epochs(loader, asked)
    return loader, plan


def megatron_options(config: Config) -> MegatronOptions | None:
    """What Megatron-Core's order depends on, where that is asked for: the run's length too."""
    data, given = config.data, (config.data.split, config.data.mid_level_dataset_surplus)
    if data.sample_order == "megatron":
        return MegatronOptions(-(-config.schedule.total_tokens // data.seq_length), *given)
    if given != (None, None):
        raise ValueError(
            "data.split and data.mid_level_dataset_surplus are for data.sample_order=megatron: remove them"
        )
    return None


def build(
    config: Config, mixture: Mixture, mesh: Mesh, loader: BlendedLoader, plan: Plan, reweight: Reweight | None = None
) -> Run:
    """Model, optimizer, evaluation sets; the newest checkpoint loaded; the run folder begun."""
    if (config.reweighting is None) != (reweight is None):
        raise ValueError("reweighting: start this run with launch/pretrain.py, or give train() the class that does it")
    sets = [
        EvalSet(name, prefixes, loader.seq_length, config.eval.max_tokens, loader.micro_batch_size, loader.options)
        for name, prefixes in loader.valid.items()
    ]
    saver = checkpoint.Saver(config.run_dir, config.checkpoint.keep, config.checkpoint.async_save)
    kernels = choose_kernels(config, mesh.device)
    peak = peak_flops(torch.cuda.get_device_name()) if mesh.device.type == "cuda" else None
    run = Run(config, mixture, plan, mesh, loader, sets, build_engine(config, plan, mesh), saver, peak)
    run.reweighting = reweight(run) if reweight else None
    load(run)
    if mesh.is_main:
        run_dir = config.run_dir
        run.metrics = Metrics(config, plan.total_steps, run.step)
        atomic_write(run_dir / "config.yaml", dump(config))
        mixture.save(run_dir / "mixture.yaml")
        atomic_write_json(run_dir / "plan.json", to_dict(plan))
        if config.log.console:
            new = f"new run from {config.init_from}" if config.init_from else "new run"
            begun = f"resumed at step {run.step}" if run.step else new
            mfu = f"of {peak:.4g} FLOP/s a GPU, its dense bf16 peak" if peak else "no peak is known for this device"
            print(f"{config.name}: {begun}\n{plan.table()}\n  kernels     {kernels}\n  mfu         {mfu}")
    return run


def save(run: Run) -> None:
    """Writes a checkpoint: gathering is for every rank, writing for rank 0."""
    module, tp = run.engine.module, run.mesh.tp
    optim, model = run.engine.state_dict(), {}
    if run.mesh.dp_rank == 0:  # the other data-parallel ranks hold the same
        model = gather_whole(dict(module.named_parameters()), module, tp)
        optim = gather_whole(optim, module, tp)
    if run.mesh.is_main:
        state = resume.record(run.config, run.loader, run.plan, run.step, run.allowed)
        state["reweighting"] = run.reweighting and run.reweighting.state_dict()
        run.saver.save(run.step, model, optim, state)
    run.mesh.barrier()


def load(run: Run) -> None:
    """Resumes from the newest verified checkpoint, or begins with the weights of init_from."""
    path, run.step, run.allowed = resume.find(run.config, run.loader, run.mesh)
    module = run.engine.module
    cut = slicer(module, run.mesh.tp)
    if path is not None:
        params = checkpoint.load_tensors(path, "model.safetensors", whole_shapes(module), cut)
        put(run, params, checkpoint.load_tensors(path, "optim.safetensors", optim_names(module, run.config.optim), cut))
        if run.reweighting:
            run.reweighting.load_state_dict(checkpoint.load_state(path)["reweighting"])
    elif run.config.init_from:
        whole = initial_weights(run.config.init_from, run.plan.shape)
        fresh = {name: cut(name, torch.zeros(size)) for name, size in optim_names(module, run.config.optim).items()}
        put(run, {name: cut(name, tensor) for name, tensor in whole.items()}, fresh)


def put(run: Run, params: dict[str, Tensor], optim: dict[str, Tensor]) -> None:
    """This rank's slices of the weights, and then of the optimizer state, into the engine."""
    with torch.no_grad():
        for name, param in run.engine.module.named_parameters():
            param.copy_(params[name])
    run.engine.load_state_dict(optim)
