"""One training run: THE loop, its metrics and its result. A proxy and the 1B model go through the same lines."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from dataclasses import dataclass

import torch

from megatron_lite import resume, tally
from megatron_lite.config import Config, config_hash, to_dict
from megatron_lite.data.mixture import Mixture
from megatron_lite.data.prefetch import Prefetch
from megatron_lite.evaluate import EvalResult, evaluate, flatten
from megatron_lite.files import atomic_write_json, folder_lock
from megatron_lite.mesh import Mesh
from megatron_lite.metrics import Stopwatch
from megatron_lite.optim import learning_rate
from megatron_lite.process import collect_garbage, manual_gc, stop_signal, use_cpu
from megatron_lite.run import Reweight, Run, build, load_mixture, resolve, save

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
    eval_seconds: float = 0.0  # of these, in evaluations
    domain_weights: dict[str, float] | None = None  # what reweighting came to


class Preempted(SystemExit):
    """SIGTERM came: the step was finished and saved. Its exit code tells the launcher to requeue."""

    def __init__(self, step: int) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.step = step


def train(config: Config, mixture: Mixture | None = None, reweight: Reweight | None = None) -> RunResult:
    """Trains one model on one mixture and evaluates it; resumes by itself where ``checkpoint.resume`` says so.

    ``mixture=None`` reads ``config.mixture``; ``reweight`` does what ``config.reweighting`` says. Raises ValueError for
    the user's mistakes, FloatingPointError naming the step for a non-finite gradient (nothing is updated or saved
    then), Preempted after SIGTERM.
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
        run = build(config, mixture, mesh, loader, plan, reweight)
        report(run, plan.total_steps, "to draw")
        start = time.perf_counter()
        try:
            with stop_signal() as stop, manual_gc(), Prefetch(loader, plan.total_steps, mesh.device) as ahead:
                results = loop(run, ahead, stop)
        finally:
            run.engine.close()
            run.saver.close()  # also after a signal: the checkpoint that is being written is the one to resume from
            if run.metrics:
                run.metrics.close()
        report(run, run.step, "drawn")
        result = collect(run, results, time.perf_counter() - start, run_hash)
        if mesh.is_main:
            atomic_write_json(config.run_dir / "result.json", dataclasses.asdict(result))
    return result


def report(run: Run, steps: int, what: str) -> None:
    """By domain: weights asked for and realised, tokens, epochs. On the console and in the run's data.json."""
    if run.mesh.is_main:
        found = tally.report(run.loader, steps)
        atomic_write_json(run.config.run_dir / "data.json", {"done": run.step, **found})
        if run.config.log.console:
            print(f"{what}:\n{tally.table(found)}", flush=True)


def loop(run: Run, ahead: Prefetch, stop: list[int]) -> dict[str, EvalResult]:
    """Every step of the run, in order. ``stop`` fills when a signal arrives. Returns the last evaluation."""
    config, plan, mesh, engine = run.config, run.plan, run.mesh, run.engine
    results: dict[str, EvalResult] = {}
    watch = Stopwatch()
    while run.step < plan.total_steps:
        with watch.waiting_for_data():
            micro_batches = ahead.step(run.step)
        local_tokens = torch.stack([b.loss_mask_BT.sum(dtype=torch.float64) for b in micro_batches]).sum()
        num_loss_tokens = mesh.sum(local_tokens.to(mesh.device)).item()
        last = run.step + 1 == plan.total_steps
        logged = last or (run.step + 1) % config.log.every == 0
        names, doing = run.loader.names, run.reweighting
        if doing:
            doing.prepare(run, micro_batches)
        size = (3, len(names))
        by_domain = torch.zeros(size, dtype=torch.float64, device=mesh.device) if logged or doing else None
        loss_sum = engine.forward_backward(micro_batches, num_loss_tokens, by_domain)
        lr = learning_rate(run.step, plan.total_steps, config.optim.lr, config.schedule)
        stats = engine.step(lr)
        if stats.skipped:
            raise non_finite(run, stats.grad_norm)
        run.step += 1

        if by_domain is not None:
            sums = mesh.sum(torch.cat((loss_sum.double().view(1), by_domain.flatten())))
            if doing:
                doing.observe(run, sums[1:].view(size))
        if logged:
            loss, *each = sums.tolist()
            values = {"train/loss": loss / num_loss_tokens, "train/lr": lr, "train/grad_norm": stats.grad_norm}
            values |= {f"train/loss/{n}": s / t for n, s, t in zip(names, each, each[len(names) :], strict=False) if t}
            values |= doing.values(run) if doing else {}
            log(run, values | watch.lap(plan.tokens_per_step, mesh.device))
        if last or (config.eval.every and run.step % config.eval.every == 0):
            before = time.perf_counter()
            results = evaluate(engine.forward, run.eval_sets, mesh, engine.autocast)
            run.eval_seconds += time.perf_counter() - before
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
    if peak := run.peak_flops:
        values["perf/mfu"] = values["perf/tokens_per_s"] * run.plan.flops_per_token / (peak * run.mesh.size)
        values["perf/peak_flops"] = peak
    run.metrics.train(run.step, values)


def non_finite(run: Run, grad_norm: float) -> FloatingPointError:
    """The error for a step whose gradients are NaN or infinite: which step, which samples, what to try."""
    size = run.config.batch.global_batch_size
    samples = f"{run.step * size} to {(run.step + 1) * size - 1}"
    return FloatingPointError(
        f"step {run.step + 1}: the gradient norm is {grad_norm}, and nothing of this step is saved. "
        f"It was computed from samples {samples}; lower optim.lr={run.config.optim.lr}, or look at the data there"
    )


def finished(config: Config, run_hash: str) -> RunResult | None:
    """The result of this very run if it was finished before, else None."""
    path = config.run_dir / "result.json"
    if config.checkpoint.resume == "never" or not path.is_file():
        return None
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
        domain_weights=run.reweighting.weights if run.reweighting else None,
        run_hash=run_hash,
        eval_seconds=run.eval_seconds,
    )
