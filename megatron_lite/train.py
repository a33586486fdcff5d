"""One training run: build, resume, THE loop, evaluate, save. A proxy and the 1B model go through the same lines."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lite import checkpoint, resume, tally
from megatron_lite.config import Config, config_hash, dump, to_dict
from megatron_lite.data.loader import BlendedLoader, EvalSet
from megatron_lite.data.megatron_order import MegatronOptions
from megatron_lite.data.mixture import Mixture
from megatron_lite.engine import Engine, build_engine, choose_kernels, optim_names
from megatron_lite.evaluate import EvalResult, evaluate, flatten
from megatron_lite.files import atomic_write, atomic_write_json, folder_lock
from megatron_lite.mesh import Mesh
from megatron_lite.metrics import Metrics, Stopwatch
from megatron_lite.optim import learning_rate
from megatron_lite.plan import Plan, grad_accum_steps, peak_flops
from megatron_lite.process import collect_garbage, manual_gc, stop_signal, use_cpu
from megatron_lite.shape import DEFAULT_VOCAB_SIZE
from megatron_lite.tensor_parallel.shards import gather_whole, slicer, whole_shapes
from megatron_lite.weights import initial_weights

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved, run me again


@dataclass(frozen=True)
class RunResult:
    """What a finished run gives: held-out losses and the cost (result.json)."""

    losses: dict[str, float]  # domain -> nats a token
    bpb: dict[str, float]  # domain -> bits a byte, where the sidecar knows bytes
    tokens: int
    steps: int
    seconds: float  # this process's own time in the loop, evaluation included
    tokens_per_s: float
    flops: float  # of training, by the plan's convention; evaluation is not counted
    run_dir: str
    run_hash: str  # of config, mixture and data: a finished run is not repeated when it is the same


class Preempted(SystemExit):
    """SIGTERM came: the step was finished and saved. Its exit code tells the launcher to requeue."""

    def __init__(self, step: int) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.step = step


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
    metrics: Metrics | None = None  # rank 0 only
    step: int = 0  # optimizer steps completed; consumed samples follow from it
    allowed: list[Any] = dataclasses.field(default_factory=list)  # what changed at resumes, for the record


def train(config: Config, mixture: Mixture | None = None) -> RunResult:
    """Trains one model on one mixture and evaluates it; resumes by itself where ``checkpoint.resume`` says so.

    ``mixture=None`` reads ``config.mixture``. Raises ValueError for the user's mistakes, FloatingPointError naming
    the step for a non-finite gradient (nothing is updated or saved then), Preempted after SIGTERM.
    """
    use_cpu(config.threads)
    mixture = mixture or load_mixture(config)
    mesh = Mesh.from_env(config.parallel)
    with folder_lock(config.run_dir) if mesh.is_main else contextlib.nullcontext():
        loader, plan = resolve(config, mixture, mesh)
        run_hash = config_hash({"config": resume.identity(to_dict(config)), "data": loader.fingerprint()})
        done = finished(config, run_hash)
        if mesh.from_main(int(done is not None)):
            assert done is not None
            return done
        run = build(config, mixture, mesh, loader, plan)
        start = time.perf_counter()
        try:
            with stop_signal() as stop, manual_gc():
                results = loop(run, stop)
        finally:
            run.saver.close()  # also after a signal: the checkpoint that is being written is the one to resume from
            if run.metrics:
                run.metrics.close()
        report(run, run.step, "drawn")
        result = collect(run, results, time.perf_counter() - start, run_hash)
        if mesh.is_main:
            atomic_write_json(config.run_dir / "result.json", dataclasses.asdict(result))
    return result


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


def build(config: Config, mixture: Mixture, mesh: Mesh, loader: BlendedLoader, plan: Plan) -> Run:
    """Model, optimizer, evaluation sets; the newest checkpoint loaded; the run folder begun."""
    sets = [
        EvalSet(name, prefixes, loader.seq_length, config.eval.max_tokens, loader.micro_batch_size, loader.options)
        for name, prefixes in loader.valid.items()
    ]
    saver = checkpoint.Saver(config.run_dir, config.checkpoint.keep, config.checkpoint.async_save)
    kernels = choose_kernels(config, mesh.device)
    run = Run(config, mixture, plan, mesh, loader, sets, build_engine(config, plan, mesh), saver)
    load(run)
    if mesh.is_main:
        run_dir = config.run_dir
        run.metrics = Metrics(config, plan.total_steps, run.step)
        atomic_write(run_dir / "config.yaml", dump(config))
        mixture.save(run_dir / "mixture.yaml")
        atomic_write_json(run_dir / "plan.json", plan.to_dict())
        if config.log.console:
            new = f"new run from {config.init_from}" if config.init_from else "new run"
            print(
                f"{config.name}: {f'resumed at step {run.step}' if run.step else new}\n{plan.table()}\n  kernels     {kernels}"
            )
    report(run, plan.total_steps, "to draw")
    return run


def report(run: Run, steps: int, what: str) -> None:
    """By domain: weights asked for and realised, tokens, epochs. On the console and in the run's data.json."""
    if run.mesh.is_main:
        found = tally.report(run.loader, steps)
        atomic_write_json(run.config.run_dir / "data.json", {"done": run.step, **found})
        if run.config.log.console:
            print(f"{what}:\n{tally.table(found)}", flush=True)


def loop(run: Run, stop: list[int]) -> dict[str, EvalResult]:
    """Every step of the run, in order. ``stop`` fills when a signal arrives. Returns the last evaluation."""
    config, plan, mesh, engine = run.config, run.plan, run.mesh, run.engine
    results: dict[str, EvalResult] = {}
    watch = Stopwatch()
    while run.step < plan.total_steps:
        with watch.waiting_for_data():
            micro_batches = run.loader.step(run.step)
        local_tokens = torch.stack([b.loss_mask_BT.sum(dtype=torch.float64) for b in micro_batches]).sum()
        num_loss_tokens = mesh.sum(local_tokens.to(mesh.device)).item()
        loss_sum = engine.forward_backward(micro_batches, num_loss_tokens)
        lr = learning_rate(run.step, plan.total_steps, config.optim.lr, config.schedule)
        stats = engine.step(lr)
        if stats.skipped:
            raise non_finite(run, stats.grad_norm)
        run.step += 1

        last = run.step == plan.total_steps
        if last or run.step % config.log.every == 0:
            loss = (mesh.sum(loss_sum.double()) / num_loss_tokens).item()
            values = {"train/loss": loss, "train/lr": lr, "train/grad_norm": stats.grad_norm}
            log(run, values | watch.lap(plan.tokens_per_step, mesh.device))
        if last or (config.eval.every and run.step % config.eval.every == 0):
            results = evaluate(engine.forward, run.eval_sets, mesh, engine.autocast)
            if run.metrics:
                run.metrics.evaluation(run.step, {"tokens": run.step * plan.tokens_per_step} | flatten(results))
        collect_garbage(run.step)
        stopping = mesh.any(bool(stop)) and not last
        every = config.checkpoint.every
        if stopping or (every and (last or run.step % every == 0)):
            save(run)
        if stopping:
            raise Preempted(run.step)
    return results or evaluate(engine.forward, run.eval_sets, mesh, engine.autocast)


def log(run: Run, values: dict[str, float]) -> None:
    """One line of metrics on rank 0, with the model FLOPs utilisation where the GPU's peak is known."""
    if run.metrics is None:
        return
    peak = peak_flops(torch.cuda.get_device_name()) if run.mesh.device.type == "cuda" else None
    if peak:
        values["perf/mfu"] = values["perf/tokens_per_s"] * run.plan.flops_per_token / (peak * run.mesh.size)
    run.metrics.train(run.step, values)


def non_finite(run: Run, grad_norm: float) -> FloatingPointError:
    """The error for a step whose gradients are NaN or infinite: which step, which samples, what to try."""
    size = run.config.batch.global_batch_size
    samples = f"{run.step * size} to {(run.step + 1) * size - 1}"
    return FloatingPointError(
        f"step {run.step + 1}: the gradient norm is {grad_norm}, and nothing of this step is saved. "
        f"It was computed from samples {samples}; lower optim.lr={run.config.optim.lr}, or look at the data there"
    )


def save(run: Run) -> None:
    """Writes a checkpoint: gathering is for every rank, writing for rank 0."""
    module, tp = run.engine.module, run.mesh.tp
    optim, model = run.engine.state_dict(), {}
    if run.mesh.dp_rank == 0:  # the other data-parallel ranks hold the same
        model = gather_whole(dict(module.named_parameters()), module, tp)
        optim = gather_whole(optim, module, tp)
    if run.mesh.is_main:
        state = resume.record(run.config, run.loader, run.plan, run.step, run.allowed)
        run.saver.save(run.step, model, optim, state)
    run.mesh.barrier()


def load(run: Run) -> None:
    """Resumes from the newest verified checkpoint, or begins with the weights of init_from."""
    path, run.step, run.allowed = resume.find(run.config, run.loader, run.mesh)
    module = run.engine.module
    cut = slicer(module, run.mesh.tp)
    if path is not None:
        params = checkpoint.load_tensors(path, "model.safetensors", whole_shapes(module), cut)
        put(run, params, checkpoint.load_tensors(path, "optim.safetensors", optim_names(module), cut))
    elif run.config.init_from:
        whole = initial_weights(run.config.init_from, run.plan.shape)
        fresh = {name: cut(name, torch.zeros(size)) for name, size in optim_names(module).items()}
        put(run, {name: cut(name, tensor) for name, tensor in whole.items()}, fresh)


def put(run: Run, params: dict[str, Tensor], optim: dict[str, Tensor]) -> None:
    """This rank's slices of the weights, and then of the optimizer state, into the engine."""
    with torch.no_grad():
        for name, param in run.engine.module.named_parameters():
            param.copy_(params[name])
    run.engine.load_state_dict(optim)


def finished(config: Config, run_hash: str) -> RunResult | None:
    """The result of this very run if it was finished before, else None."""
    path = config.run_dir / "result.json"
    if config.checkpoint.resume == "never" or not path.is_file():
        return None
    import json

    result = RunResult(**json.loads(path.read_text(encoding="utf-8")))
    return result if result.run_hash == run_hash else None


def collect(run: Run, results: dict[str, EvalResult], seconds: float, run_hash: str) -> RunResult:
    """The loop's outcome as a RunResult."""
    return RunResult(
        losses={name: r.loss for name, r in results.items()},
        bpb={name: r.bpb for name, r in results.items() if r.bpb is not None},
        tokens=run.plan.total_tokens,
        steps=run.step,
        seconds=seconds,
        tokens_per_s=run.plan.total_tokens / seconds,
        flops=run.plan.total_flops,
        run_dir=str(run.config.run_dir),
        run_hash=run_hash,
    )
