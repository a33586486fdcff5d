"""What the config means: every derived number and every cross-check, in one frozen object. ``--dry-run`` prints it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_lite.config import Config
from megatron_lite.shape import ModelShape, padded_vocab_size, resolve_shape

# Dense bf16 peaks in FLOP/s from NVIDIA's data sheets (SXM parts); an unknown device gets no MFU at all.
PEAK_FLOPS = {"H100": 989.5e12, "H200": 989.5e12, "GH200": 989.5e12, "A100": 312e12, "B200": 2250e12}

FLOPS_OF = "PaLM's 6N + 12LdS: N multiplies, head included; attention's whole square"  # what flops_per_token counts


@dataclass(frozen=True)
class Plan:
    """One run, resolved: sizes, steps, tokens, FLOPs."""

    shape: ModelShape
    dp_size: int
    tp_size: int
    sequence_parallel: bool
    grad_accum_steps: int
    total_steps: int
    tokens_per_step: int
    total_tokens: int
    params: int
    non_embedding_params: int
    flops_per_token: int
    total_flops: float
    engine: str
    zero_stage: int
    precision: str

    @classmethod
    def resolve(cls, config: Config, world_size: int, vocab_size: int | None, cuda: bool, deepspeed: bool) -> Plan:
        """Config + launch facts -> Plan; ``deepspeed``: its launcher started us. ValueError on clashing settings."""
        from megatron_lite.mesh import data_parallel_size  # brings torch, which --help does without

        shape = resolve_shape(config.model, config.data.seq_length, vocab_size)
        tp_size = config.parallel.tensor_parallel_size
        dp_size = data_parallel_size(world_size, tp_size)
        accum = grad_accum_steps(config, dp_size)
        tokens_per_step = config.batch.global_batch_size * config.data.seq_length
        total_steps = max(1, -(-config.schedule.total_tokens // tokens_per_step))
        engine = config.engine if config.engine != "auto" else ("deepspeed" if deepspeed else "torch")
        _check(config, engine, total_steps)
        _check_tensor_parallel(config, shape)
        return cls(
            shape=shape,
            dp_size=dp_size,
            tp_size=tp_size,
            sequence_parallel=config.parallel.sequence_parallel and tp_size > 1,
            grad_accum_steps=accum,
            total_steps=total_steps,
            tokens_per_step=tokens_per_step,
            total_tokens=total_steps * tokens_per_step,
            params=shape.params,
            non_embedding_params=shape.non_embedding_params,
            flops_per_token=shape.flops_per_token,
            total_flops=float(shape.flops_per_token) * total_steps * tokens_per_step,
            engine=engine,
            zero_stage=config.parallel.zero_stage,
            precision=config.precision if config.precision != "auto" else ("bf16" if cuda else "fp32"),
        )

    def table(self, tokens_per_s: float | None = None, rate_source: str = "") -> str:
        """The plan as aligned text; with a rate, the expected wall time too."""
        s = self.shape
        heads = f"{s.num_heads} heads ({s.num_kv_heads} kv)"
        tp = f"tp {self.tp_size}{' with sequence parallelism' * self.sequence_parallel} x " if self.tp_size > 1 else ""
        split = f"dp {self.dp_size} x {tp}accumulation {self.grad_accum_steps}"
        rows_held = padded_vocab_size(s.vocab_size, self.tp_size)
        vocab = f"vocab {s.vocab_size:,}" + (f" (padded to {rows_held:,})" if rows_held > s.vocab_size else "")
        mup = f", muP: lr tuned at width {s.mup_base_width}" if s.mup_base_width else ""
        rows = [
            ("model", f"{s.num_layers} layers x {s.hidden_size}, {heads}, ffn {s.ffn_hidden_size}, {vocab}{mup}"),
            ("parameters", f"{self.params:,} ({self.non_embedding_params:,} without embeddings)"),
            ("batch", f"{self.tokens_per_step:,} tokens a step = {split}, sequences of {s.seq_length:,}"),
            ("budget", f"{self.total_steps:,} steps, {self.total_tokens:,} tokens"),
            ("compute", f"{self.flops_per_token:,} FLOPs a token, {self.total_flops:.3g} in all ({FLOPS_OF})"),
            ("engine", f"{self.engine}, ZeRO {self.zero_stage}, {self.precision}"),
        ]
        if tokens_per_s:
            time = duration(self.total_tokens / tokens_per_s)
            rows.append(("expected", f"{time} at {tokens_per_s:,.0f} tokens/s {rate_source}"))
        return "\n".join(f"  {name:<11} {text}" for name, text in rows)


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 12.5 min, 3.4 h, 2.1 days."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.1f} days"


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name, None when it is not in the table."""
    return next((v for k, v in sorted(PEAK_FLOPS.items(), key=lambda kv: -len(kv[0])) if k in device_name), None)


def grad_accum_steps(config: Config, dp_size: int) -> int:
    """Micro-batches a rank accumulates in one step; ValueError listing the sizes that would divide."""
    batch, micro = config.batch.global_batch_size, config.batch.micro_batch_size
    if batch < 1 or micro < 1:
        raise ValueError(f"batch.global_batch_size={batch}, batch.micro_batch_size={micro}: both must be at least 1")
    if batch % dp_size:
        raise ValueError(f"batch.global_batch_size={batch} is not divisible by the data-parallel size {dp_size}")
    per_rank = batch // dp_size
    if per_rank % micro:
        valid = [m for m in range(1, per_rank + 1) if per_rank % m == 0]
        raise ValueError(
            f"batch.micro_batch_size={micro} does not divide {per_rank}, each rank's share of "
            f"batch.global_batch_size={batch} at dp {dp_size}; valid: {', '.join(map(str, valid))}"
        )
    return per_rank // micro


def _check(config: Config, engine: str, total_steps: int) -> None:
    schedule, stage = config.schedule, config.parallel.zero_stage
    if schedule.total_tokens < 1:
        raise ValueError(f"schedule.total_tokens={schedule.total_tokens} must be at least 1")
    if not 0 <= schedule.warmup_steps <= total_steps:
        raise ValueError(f"schedule.warmup_steps={schedule.warmup_steps} must lie in 0..{total_steps}, the run's steps")
    steps = [
        -(-phase.from_tokens // (config.batch.global_batch_size * config.data.seq_length)) for phase in config.phases
    ]
    if any(b <= a for a, b in zip([0, *steps], [*steps, total_steps], strict=True)):
        raise ValueError(
            f"phases: from_tokens {[phase.from_tokens for phase in config.phases]} are steps {steps}; they must rise, "
            f"from step 1 at the earliest to {total_steps - 1} at the latest (schedule.total_tokens ends the run)"
        )
    if not 0 < schedule.decay_fraction <= 1:
        raise ValueError(f"schedule.decay_fraction={schedule.decay_fraction} must lie in (0, 1]")
    if schedule.decay != "constant" and schedule.min_lr > config.optim.lr:
        raise ValueError(f"schedule.min_lr={schedule.min_lr} is above optim.lr={config.optim.lr}")
    if stage not in (0, 1, 2):
        raise ValueError(f"parallel.zero_stage={stage}: 0 to 2 are supported (weights at rest are ours, not ZeRO's)")
    if stage == 2 and engine == "torch":
        raise ValueError("parallel.zero_stage=2 needs the DeepSpeed engine: --engine deepspeed, or set it to 0 or 1")
    if config.optim.optimizer == "muon" and (engine != "torch" or stage or config.parallel.tensor_parallel_size > 1):
        way_out = "--engine torch, parallel.zero_stage=0 and parallel.tensor_parallel_size=1, or optim.optimizer=adamw"
        raise ValueError(f"optim.optimizer=muon needs whole matrices and their gradients on each rank: {way_out}")
    if config.cuda_graphs and not (config.compile and engine == "torch"):
        raise ValueError("cuda_graphs: graphs are made by the compiler, under the torch engine: set compile=true")
    if config.loss_chunk < 0:
        raise ValueError(f"loss_chunk={config.loss_chunk} is below 0; 0 chooses by the device")
    if config.deepspeed and engine == "torch":
        raise ValueError("deepspeed: has keys, but the engine is torch; use --engine deepspeed or remove them")
    for key in ("every", "keep"):
        if getattr(config.checkpoint, key) < (1 if key == "keep" else 0):
            raise ValueError(f"checkpoint.{key}={getattr(config.checkpoint, key)} is too small")


def _check_tensor_parallel(config: Config, shape: ModelShape) -> None:
    tp = config.parallel.tensor_parallel_size
    for name in ("num_heads", "num_kv_heads", "ffn_hidden_size"):
        size = getattr(shape, name)
        if size % tp:
            raise ValueError(
                f"parallel.tensor_parallel_size={tp} does not divide model.{name}={size}: each rank holds whole heads "
                f"and an equal part of the ffn; largest size that fits: {_largest_tp(shape, tp)}"
            )
    if config.parallel.sequence_parallel and shape.seq_length % tp:
        raise ValueError(
            f"parallel.sequence_parallel: data.seq_length={shape.seq_length} is not divisible by "
            f"parallel.tensor_parallel_size={tp}"
        )


def _largest_tp(shape: ModelShape, below: int) -> int:
    common = math.gcd(shape.num_heads, shape.num_kv_heads, shape.ffn_hidden_size)
    return max(size for size in range(1, below) if common % size == 0)
