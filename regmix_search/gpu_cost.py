"""What a run costs on GPUs, be they here or not: tokens a second, GPU-hours and memory, beside published times.

Without a GPU to measure on, matmuls are assumed to run at an MFU that others have published for models near 1B, and the
logits, which small models spend most of their time on, at the speed of the GPU's memory. Both are printed.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config import Config, ModelConfig
from megatron_lite.plan import PEAK_FLOPS, Plan, duration
from megatron_lite.shape import resolve_shape
from megatron_lite.speed import ASSUMED_MFU
from regmix_search.budget import FORWARD_SHARE, evaluations
from regmix_search.gpu_memory import GIB, largest_micro_batch, memory

# What the loss moves through memory for a logit of a token, in bf16: written and read twice by matmuls (2 each), copied
# to fp32 (2 + 4), its largest (4), subtracted (8), exponentials (8), summed (4), copied back (4 + 2).
LOGIT_BYTES = 42
HEAD = ("GPU", "tokens/s", "MFU", "time", "GPU-hours", "memory of a GPU", "largest micro-batch")


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet (SXM parts), and what is assumed of it."""

    name: str
    peak_flops: float  # dense bf16
    bandwidth: float  # bytes a second
    memory: int  # bytes that PyTorch sees
    mfu: float  # of a 1B model's matmuls


H100 = Gpu("H100", PEAK_FLOPS["H100"], 3.35e12, 79 * GIB, ASSUMED_MFU)
H200 = Gpu("H200", PEAK_FLOPS["H200"], 4.8e12, 139 * GIB, ASSUMED_MFU)
# TinyLlama 1.1B on 16 A100 (TinyLlama's README, 24,000 tokens/s a GPU) and MPT-1B on 8 (llm-foundry's tables): 56 %
A100 = Gpu("A100", PEAK_FLOPS["A100"], 2.04e12, 79 * GIB, 0.56)


@dataclass(frozen=True)
class Published:
    """How long somebody's run took."""

    preset: str
    tokens: int
    a100_hours: float
    source: str
    proxy: bool = False  # of DoReMi: trained against a reference


REGMIX, DOREMI = "sail-sg/regmix, model_training/README.md", "sangmichaelxie/doremi, issue 17"
PUBLISHED = (
    Published("tinyllama_1M", 1_000 * 512 * 2048, 1 / 3, f"20 min on one A100 ({REGMIX})"),
    Published("tinyllama_1_1b", 25_000 * 512 * 2048, 8 * 48, f"2 days on 8 A100 ({REGMIX})"),
    Published("doremi_120M", 200_000 * 512 * 1024, 8 * 36, f"36 h on 8 A100 for the reference ({DOREMI})"),
    Published("doremi_120M", 200_000 * 512 * 1024, 8 * 44, f"44 h on 8 A100 for the proxy ({DOREMI})", proxy=True),
)


@dataclass(frozen=True)
class Here:
    """The GPU of this machine, measured."""

    gpu: str
    memory: int  # bytes
    tokens_per_s: float  # over all ranks


def gpu_seconds(config: Config, plan: Plan, gpu: Gpu, sets: int) -> float:
    """Seconds of one GPU that the whole run would take, shared by however many; ``sets`` are scored as configured."""
    token = plan.flops_per_token / (gpu.mfu * gpu.peak_flops) + LOGIT_BYTES * plan.shape.vocab_size / gpu.bandwidth
    return plan.total_tokens * token * _work(config, plan, sets)


def mfu(plan: Plan, gpu: Gpu, seconds: float) -> float:
    """Of a run that took so many GPU-seconds, by the plan's FLOPs alone."""
    return plan.total_flops / (gpu.peak_flops * seconds)


def published(config: Config, plan: Plan) -> Published | None:
    """The published run that this one repeats, by its sizes and tokens."""
    proxy = bool(config.reweighting and config.reweighting.reference)
    for run in PUBLISHED:
        theirs = resolve_shape(ModelConfig(preset=run.preset, tie_embeddings=plan.shape.tie_embeddings), 1, None)
        same = theirs.body_matmul_params == plan.shape.body_matmul_params and run.tokens == plan.total_tokens
        if same and run.proxy == proxy and abs(plan.shape.vocab_size / theirs.vocab_size - 1) < 0.01:
            return run
    return None


def table(config: Config, plan: Plan, sets: int = 0, here: Here | None = None) -> str:
    """Time and memory as text, for the GPU at hand or for H100 and H200; what is assumed; what was published."""
    size, held = plan.dp_size * plan.tp_size, memory(config, plan)
    known = "measured on this GPU" if here else "estimated"
    rows = [_here_row(config, plan, sets, here)] if here else [_row(config, plan, gpu, sets) for gpu in (H100, H200)]
    lines = [
        f"on {size} GPU{'s' * (size > 1)}, {known}:",
        *("  " + _columns(row) for row in (HEAD, *rows)),
        f"  {held}",
    ]
    if not here:
        lines.append(
            f"  assumed: matmuls at MFU {ASSUMED_MFU:.0%} (MPT-1B on 8 H100: 41.8 %), {LOGIT_BYTES} bytes a logit at "
            f"the memory's speed, no time lost between GPUs; eager activations, of which the compiler keeps fewer"
        )
    return "\n".join(lines + _check(config, plan, sets))


def sweep_line(config: Config, plan: Plan, number: int, sets: int) -> str:
    """Many runs of one GPU each, on H100 and on H200."""
    parts = []
    for gpu in (H100, H200):
        each = gpu_seconds(config, plan, gpu, sets)
        parts.append(f"{number} x {duration(each)} = {number * each / 3600:.3g} {gpu.name}-hours")
    share, held = mfu(plan, H100, gpu_seconds(config, plan, H100, 0)), memory(config, plan).total
    return f"{'; '.join(parts)} (assumed MFU {share:.0%} on an H100); {held / GIB:.1f} GiB each"


def _work(config: Config, plan: Plan, sets: int) -> float:
    """All work over that of training: held-out sets, and the forward passes that DoReMi's proxy has more."""
    doing = config.reweighting
    forwards = evaluations(config, plan) * sets * config.eval.max_tokens / plan.total_tokens
    if doing and doing.reference:
        forwards += 1 + (doing.update_order == "two_pass")
    return 1 + FORWARD_SHARE * forwards


def _row(config: Config, plan: Plan, gpu: Gpu, sets: int) -> tuple[str, ...]:
    size, training = plan.dp_size * plan.tp_size, gpu_seconds(config, plan, gpu, 0)
    rate = plan.total_tokens * size / training
    return _cells(config, plan, gpu, rate, gpu_seconds(config, plan, gpu, sets), mfu(plan, gpu, training))


def _here_row(config: Config, plan: Plan, sets: int, here: Here) -> tuple[str, ...]:
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in here.gpu), 0.0)
    size = plan.dp_size * plan.tp_size
    training = plan.total_tokens * size / here.tokens_per_s
    gpu = Gpu(here.gpu, peak, 0.0, here.memory, 0.0)
    seconds = training * _work(config, plan, sets)
    return _cells(config, plan, gpu, here.tokens_per_s, seconds, mfu(plan, gpu, training) if peak else None)


def _cells(config: Config, plan: Plan, gpu: Gpu, rate: float, seconds: float, share: float | None) -> tuple[str, ...]:
    held, size = memory(config, plan).total, plan.dp_size * plan.tp_size
    room = f"{held / GIB:.1f} of {gpu.memory / GIB:.0f} GiB" + " - TOO MUCH" * (held > gpu.memory)
    time = (duration(seconds / size), f"{seconds / 3600:,.3g}" if seconds < 3.6e6 else f"{seconds / 3600:,.0f}")
    most = largest_micro_batch(config, plan, gpu.memory) or "none"
    return (gpu.name, f"{rate:,.0f}", f"{share:.1%}" if share else "?", *time, room, str(most))


def _columns(row: tuple[str, ...]) -> str:
    widths = (7, 11, 6, 9, 10, 20, 20)
    return " ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _check(config: Config, plan: Plan, sets: int) -> list[str]:
    run = published(config, plan)
    if run is None:
        return []
    ours, theirs = gpu_seconds(config, plan, A100, sets) / 3600, run.a100_hours
    text = f"  published: {run.source}, {theirs:.3g} A100-hours or MFU {mfu(plan, A100, theirs * 3600):.0%}; "
    text += f"this estimate for A100 (MFU {A100.mfu:.0%}): {ours:.3g}, {ours / theirs:.2f} of that"
    return [text if 0.5 < ours / theirs < 2 else text + " - MORE THAN A FACTOR OF 2 APART"]
