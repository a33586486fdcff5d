"""Processes that take training steps at the same moment: a setting is timed the way the pool would run it."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from megatron_lite.config import Config

WINDOW = 0.5  # seconds that one timing takes, or one micro-batch where that is longer
WINDOWS = 2  # timings of a setting, of which the best counts: other work on the machine only ever slows
# FLOPs of the micro-batch that is timed, at most: a second or two of one core. Longer ones are timed by a shorter.
TIMED_FLOPS = 1e11


@dataclass(frozen=True)
class Setting:
    """One way to run proxies."""

    threads: int  # CPU threads of a process
    workers: int  # processes at a time
    precision: Literal["auto", "fp32", "bf16"]
    compile: bool
    micro_batch_size: int
    loss_chunk: int = 0  # logits of the loss that exist at once; 0: by the device

    def apply(self, proxy: Config) -> Config:
        """The proxy's config with this setting in it."""
        batch = dataclasses.replace(proxy.batch, micro_batch_size=self.micro_batch_size)
        chosen = {key: getattr(self, key) for key in ("precision", "compile", "threads", "loss_chunk")}
        return dataclasses.replace(proxy, batch=batch, **chosen)

    def __str__(self) -> str:
        compiled = ", compiled" if self.compile else ""
        packing = f"{self.workers} at a time x {self.threads} thread{'s' * (self.threads > 1)}"
        chunk = f", loss in chunks of {self.loss_chunk:,} logits" if self.loss_chunk else ""
        return f"{packing}, {self.precision}, micro-batch {self.micro_batch_size}{chunk}{compiled}"


@dataclass(frozen=True)
class Timing:
    """What a setting gives on this machine."""

    tokens_per_s: float  # of all processes together, by the clock
    undisturbed: float  # the same without the machine's other work: by CPU-seconds where a process is one CPU thread
    ready_s: float  # seconds until the first step is done: building the model, compiling it
    memory: int  # bytes: the most that one of the processes has had resident so far


class Crew:
    """Up to as many processes as a setting asks for; they stay, so that torch is imported once in each."""

    def __init__(self, proxy: Config, vocab_size: int, gpus: Sequence[str] = ()) -> None:
        self.proxy, self.vocab_size, self.gpus = proxy, vocab_size, gpus
        self.context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self._dismiss()

    def time(self, setting: Setting) -> Timing:
        """Steps of ``setting.workers`` processes at once; RuntimeError with a process's own words where one fails."""
        while len(self.pipes) < setting.workers:
            self.pipes.append(self._start(len(self.pipes)))
        pipes = self.pipes[: setting.workers]
        try:
            ready = _ask(pipes, setting.apply(self.proxy))
            windows = [_ask(pipes, "go") for _ in range(WINDOWS)]
        except RuntimeError:
            self._dismiss()  # the others' answers are not read: the next setting gets new processes
            raise
        clock, cpu, memory = (
            [[found[i] for found in window] for window in windows] for i in range(3)
        )  # [windows, processes]
        best = max(map(sum, clock))
        alone = max(best, *map(sum, cpu)) if setting.threads == 1 and not self.gpus else best  # neither flatters
        return Timing(best, alone, max(ready), max(map(max, memory)))

    def _dismiss(self) -> None:
        for pipe in self.pipes:
            pipe.close()  # a process ends when its pipe does
        self.pipes = []

    def _start(self, number: int) -> Connection:
        ours, theirs = self.context.Pipe()
        gpu = self.gpus[number % len(self.gpus)] if self.gpus else None  # dealt as the pool deals them
        arguments = (theirs, self.vocab_size, gpu)
        self.context.Process(target=_serve, args=arguments, daemon=True, name="calibration").start()
        theirs.close()
        return ours


def timed_micro_batch(proxy: Config, flops_per_token: int) -> int:
    """Sequences of the micro-batch that stands for the config's: the largest divisor of it below TIMED_FLOPS, or 1."""
    written, each = proxy.batch.micro_batch_size, flops_per_token * proxy.data.seq_length
    return max((n for n in range(1, written + 1) if written % n == 0 and n * each <= TIMED_FLOPS), default=1)


def prepare(proxy: Config, vocab_size: int) -> Callable[[], tuple[float, float, int]]:
    """Builds a proxy and takes two steps; what is returned times some more.

    It gives (tokens/s by the clock, tokens per CPU-second, the most bytes that were resident).
    """
    import torch

    from megatron_lite.data.batch import Batch
    from megatron_lite.engine import build_engine, choose_kernels
    from megatron_lite.mesh import Mesh
    from megatron_lite.metrics import peak_memory
    from megatron_lite.plan import Plan
    from megatron_lite.process import use_cpu

    use_cpu(proxy.threads)
    mesh = Mesh.from_env()
    choose_kernels(proxy, mesh.device)
    plan = Plan.resolve(proxy, 1, vocab_size, mesh.device.type == "cuda", deepspeed=False)
    sequences = timed_micro_batch(proxy, plan.flops_per_token)
    shorter = dataclasses.replace(proxy.batch, micro_batch_size=sequences)
    plan = Plan.resolve(dataclasses.replace(proxy, batch=shorter), 1, vocab_size, mesh.device.type == "cuda", False)
    engine = build_engine(proxy, plan, mesh)
    size, generator = (sequences, proxy.data.seq_length), torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, size, generator=generator)
    batch = Batch(tokens, tokens, torch.ones(size), torch.zeros(sequences, dtype=torch.long))

    def lap() -> list[float]:
        """Seconds of a micro-batch and of an update by the clock, then both by the CPU's."""
        stamps = [(time.perf_counter(), time.process_time())]
        engine.forward_backward([batch], tokens.numel()).item()
        stamps.append((time.perf_counter(), time.process_time()))
        engine.step(proxy.optim.lr)
        stamps.append((time.perf_counter(), time.process_time()))
        return [stamps[i + 1][clock] - stamps[i][clock] for clock in (0, 1) for i in (0, 1)]

    def window() -> tuple[float, float, int]:
        start, laps = time.perf_counter(), [lap()]
        while time.perf_counter() - start < WINDOW:
            laps.append(lap())
        compute, update, cpu_compute, cpu_update = (sum(part) / len(laps) for part in zip(*laps, strict=True))
        clock = plan.tokens_per_step / (plan.grad_accum_steps * compute + update)
        cpu = plan.tokens_per_step / (plan.grad_accum_steps * cpu_compute + cpu_update)
        return clock, cpu, peak_memory(torch.device("cpu"))

    for _ in range(2):
        lap()
    return window


def _serve(pipe: Connection, vocab_size: int, gpu: str | None) -> None:
    """A process of the crew: a proxy's config in, then for every "go" a timing out."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with contextlib.suppress(EOFError, OSError):  # the driver is gone, or done
        window: Callable[[], tuple[float, float, int]] | None = None
        while True:
            asked = pipe.recv()
            try:
                if asked == "go":
                    assert window is not None
                    pipe.send(window())
                else:
                    start, window = time.perf_counter(), None  # frees the proxy of before
                    window = prepare(asked, vocab_size)
                    pipe.send(time.perf_counter() - start)
            except Exception as error:  # the driver says it: out of memory, a setting that this machine cannot run
                pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _ask(pipes: list[Connection], what: Any) -> list[Any]:
    """Sends all of them the same and waits for all answers."""
    answers: list[Any] = []
    try:
        for pipe in pipes:
            pipe.send(what)
        answers = [pipe.recv() for pipe in pipes]
    except (EOFError, OSError):
        raise RuntimeError("a process died (often: out of memory)") from None
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers
