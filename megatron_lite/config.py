"""What the user wrote: frozen dataclasses, read from YAML and ``--set a.b=c``. What it *means* is in plan.py.

Precedence: dataclass defaults <- ``base:`` file (one level) <- ``--config`` file <- ``--set``. An unknown key is an
error that names the nearest one. Nothing here is mutated or derived, and every key is documented on its own line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml

from megatron_lite.schema import parse

T = TypeVar("T")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of slow rotary frequencies (Hugging Face's llama3); the defaults are its 8B's."""

    factor: float = 8.0  # slow frequencies are divided by it
    low_freq_factor: float = 1.0  # wavelengths above original_max_position_embeddings / this are stretched fully
    high_freq_factor: float = 4.0  # wavelengths below original_max_position_embeddings / this are left alone
    original_max_position_embeddings: int = 8192  # context in tokens before the stretching


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-shaped GPT: a preset by name, and any size of it overridden."""

    preset: str = "tinyllama_1M"  # a name in shape.PRESETS, or init_from: as its weights (launch/pretrain.py alone)
    num_layers: int | None = None  # transformer blocks; null: the preset's
    hidden_size: int | None = None  # width of the residual stream; null: the preset's
    num_heads: int | None = None  # query heads; null: the preset's
    num_kv_heads: int | None = None  # key/value heads, fewer than num_heads for GQA; null: the preset's
    ffn_hidden_size: int | None = None  # width of the SwiGLU; null: the preset's
    vocab_size: int | None = None  # token ids; null: what the shards' sidecar says
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # Llama 3.1's long-context frequencies; null: plain RoPE
    norm_eps: float = 1e-5  # RMSNorm epsilon, inside the square root
    tie_embeddings: bool = False  # share the input embedding with the output head
    mup_base_width: int | None = None  # muP: hidden_size at which optim.lr was tuned; null: standard parametrisation


@dataclass(frozen=True)
class DataConfig:
    """Where the shards are and how long a sample is."""

    data_dir: str | None = None  # folder of the shards; null: what mixture.yaml says
    seq_length: int = 2048  # tokens a sample predicts
    sample_order: Literal["documents", "contiguous", "megatron"] = "documents"  # contiguous: for shuffled shards
    split: str | None = None  # megatron order only: its --split, e.g. "99,1,0"; null: all documents are for training
    mid_level_dataset_surplus: float | None = None  # the same; null: Megatron's, 0.005 or, for one prefix alone, 0
    reset_position_ids: bool = False  # positions count from 0 after each EOD
    reset_attention_mask: bool = False  # no attention from one document to another
    eod_mask_loss: bool = False  # what follows an EOD is not learned


@dataclass(frozen=True)
class PhaseConfig:
    """A mixture that takes over in the middle of the run; domains go on where they were."""

    mixture: str  # mixture.yaml; its domains are matched by name with those of before
    from_tokens: int  # training tokens after which it begins, rounded up to a step


@dataclass(frozen=True)
class BatchConfig:
    """Batch sizes in sequences; gradient accumulation is derived from them."""

    global_batch_size: int = 512  # sequences an optimizer step sees over all ranks
    micro_batch_size: int = 16  # sequences in one forward pass of one rank


@dataclass(frozen=True)
class ScheduleConfig:
    """The budget in tokens and the learning rate's shape."""

    total_tokens: int = 1_000_000_000  # training tokens; steps are derived, rounded up
    warmup_steps: int = 100  # linear warm-up from 0, in optimizer steps
    decay: Literal["constant", "cosine", "linear", "wsd"] = "cosine"  # shape after the warm-up; wsd: hold, then linear
    min_lr: float = 1e-5  # learning rate at the last step (not used by constant)
    decay_fraction: float = 0.2  # wsd only: share of the steps spent decaying


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and clipping."""

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, with AdamW for the rest
    lr: float = 4e-4  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's moment decay rates
    eps: float = 1e-8  # AdamW's epsilon
    weight_decay: float = 0.1  # on matrices only; norms are never decayed
    clip_grad: float = 1.0  # global gradient norm; 0: no clipping


@dataclass(frozen=True)
class ReweightingConfig:
    """Group DRO over domains, as DoReMi's proxy; launch/pretrain.py and the search give the loop what does it."""

    reference: str = ""  # excess is loss over this model's, by token: a run or step_* folder, or losses stored from one
    targets: dict[str, float] = field(default_factory=dict)  # instead: held-out loss over this, by domain, in nats
    sampling_every: int = 0  # steps between changes of what is sampled, to the weights; 0: they weight the loss
    eta: float = 1.0  # step size of the weights (the paper's 1)
    smoothing: float = 1e-3  # c, how much of smooth_to an update mixes in (the paper's; its code's default is 1e-4)
    smooth_to: Literal["uniform", "sampling"] = "uniform"  # the weights at the start, too; sampling: the mixture's
    objective: Literal["group_mean", "importance"] = "group_mean"  # sum of weight * domain's mean | as in DoReMi's code
    update_order: Literal["lagged", "two_pass"] = "lagged"  # weights of the step before | the paper's, a forward more


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks share the work; the data-parallel size is what is left."""

    tensor_parallel_size: int = 1  # ranks that share each layer (heads, ffn, vocabulary); they should be on one node
    sequence_parallel: bool = False  # with tensor parallelism: share the norms and residuals too, by position
    zero_stage: int = 0  # 1: ranks shard the optimizer state; 2: gradients too (DeepSpeed only); 0: neither


@dataclass(frozen=True)
class EvalConfig:
    """Per-domain loss on fixed held-out sets, the same for every run."""

    every: int = 0  # optimizer steps between evaluations; 0: only after the last step
    max_tokens: int = 1_000_000  # tokens a validation domain contributes, from its start


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and where to resume from."""

    every: int = 0  # optimizer steps between checkpoints; 0: save nothing
    keep: int = 2  # complete checkpoints kept, newest first
    async_save: bool = False  # write in a thread while training goes on; costs a copy of model and optimizer in memory
    resume: str = "auto"  # auto: newest complete one in out_dir | never | a step_* folder
    allow_change: tuple[str, ...] = ()  # what a resumed run may change: mixture, data, or a key; same as --allow-change


@dataclass(frozen=True)
class LogConfig:
    """metrics.jsonl is always written; the rest mirrors it."""

    every: int = 10  # optimizer steps between log lines
    tensorboard: bool = False  # also write TensorBoard events under out_dir/tensorboard
    wandb: bool = False  # also log to Weights & Biases (its own WANDB_* variables say where); needs pip install wandb
    console: bool = True  # print the table of the plan and one line a log step (rank 0)


@dataclass(frozen=True)
class Config:
    """One training run. ``python launch/pretrain.py --print-config`` prints it with every default."""

    name: str = "run"  # names the run in logs and in its folder
    out_dir: str = "runs/{name}"  # run folder; {name} is replaced
    seed: int = 1234  # initialisation and data order are functions of it
    init_from: str | None = None  # start from these weights: a step_* or run folder, or Hugging Face's Llama
    mixture: str | None = None  # mixture.yaml, RegMix's format or ours; the same as --mixture
    phases: tuple[PhaseConfig, ...] = ()  # later mixtures, e.g. [{mixture: anneal.yaml, from_tokens: 8e9}]
    engine: Literal["auto", "torch", "deepspeed"] = "auto"  # auto: deepspeed when its launcher started us
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # compute type; auto: bf16 on GPU, fp32 on CPU
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # what blocks recompute
    compile: bool = False  # torch.compile the model; falls back with one warning
    cuda_graphs: bool = False  # with compile, on a GPU: replay its kernels as graphs; for models too small to fill it
    loss_chunk: int = 0  # logits that exist at once in the loss, as many rows as fit; 0: 2^25, on a GPU 2^27
    attention: Literal["auto", "sdpa", "flash"] = "auto"  # auto: flash-attn 3 or 4 if installed; flash: or an error
    threads: int = 0  # CPU threads of one rank; 0: what torch chooses
    model: ModelConfig = field(default_factory=ModelConfig)  # sizes of the model
    data: DataConfig = field(default_factory=DataConfig)  # shards and sample length
    batch: BatchConfig = field(default_factory=BatchConfig)  # sequences a step
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)  # budget and learning-rate shape
    optim: OptimConfig = field(default_factory=OptimConfig)  # AdamW
    reweighting: ReweightingConfig | None = None  # domains weighted while training (DoReMi's proxy); null: not
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # ranks
    eval: EvalConfig = field(default_factory=EvalConfig)  # held-out losses
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # saving and resuming
    log: LogConfig = field(default_factory=LogConfig)  # what is printed and mirrored
    deepspeed: dict[str, Any] = field(default_factory=dict)  # extra DeepSpeed keys; those we own are an error

    @property
    def run_dir(self) -> Path:
        """The run's folder, with ``{name}`` filled in."""
        return Path(self.out_dir.replace("{name}", self.name))


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Reads a dataclass tree from YAML and ``a.b=c`` overrides; ``path=None`` starts from the defaults.

    Raises ValueError naming the file or override, the key, the value and the nearest known key.
    """
    data: dict[str, Any] = {}
    if path is not None:
        data = _read_yaml(Path(path))
        base = data.pop("base", None)
        if base is not None:
            data = _merge(_read_yaml(Path(path).parent / base), data)
    config = parse(cls, data, where=str(path) if path is not None else "defaults")
    for text in overrides:
        config = _override(config, text)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass tree (or a dict) as plain YAML and JSON types; ``parse(cls, to_dict(c))`` gives c back."""
    plain = dataclasses.asdict(cast(Any, config)) if dataclasses.is_dataclass(config) else config
    return cast(dict[str, Any], json.loads(json.dumps(plain)))


def dump(config: Any) -> str:
    """The config as YAML text, every key written out."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def config_hash(config: Any) -> str:
    """16 hex digits that change when any value of the config does."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]


def diff(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines ``a.b: old -> new`` for every key in which two config dicts differ."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += diff(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such config file") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if data is not None and not isinstance(data, dict):
        raise ValueError(f"{path}: the top level must be a mapping of keys, got {type(data).__name__}")
    return data or {}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if both else value
    return out


def _override(config: T, text: str) -> T:
    """Applies one ``a.b=c``; the value is YAML."""
    path, sep, raw = text.partition("=")
    if not sep:
        raise ValueError(f"--set {text}: write it as key=value, e.g. --set optim.lr=3e-4")
    try:
        value: Any = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text}: the value is not valid YAML: {error}") from None
    for key in reversed(path.strip().replace("-", "_").split(".")):
        value = {key: value}
    return parse(type(config), _merge(to_dict(config), value), where=f"--set {text}")
