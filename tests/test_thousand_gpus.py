"""docs/thousand_gpus.md: its figures are worked out here anew, from the code's own sizes and the stated assumptions."""

import math
from pathlib import Path

import numpy as np
import torch

from megatron_lite.checkpoint import save_checkpoint
from megatron_lite.config import Config, ModelConfig, load_config
from megatron_lite.mesh import TIMEOUT
from megatron_lite.model import GPT
from megatron_lite.optim import moments
from megatron_lite.plan import Plan
from megatron_lite.shape import resolve_shape
from regmix_search.gpu_cost import H100, gpu_seconds

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "thousand_gpus.md").read_text(encoding="utf-8")
VOCAB = 50_432  # GPT-NeoX's tokenizer with its padding, as RegMix trained
GPU_HOURS = 54 * 24 * 16_384 / 419  # between failures: Llama 3's 419 unexpected ones in 54 days of 16,384 H100
NETWORK, WRITER = 50e9, 1e9  # assumed: 400 Gb/s a GPU, 1 GB/s from one process to the shared file system
RESTART = 300  # s, assumed: from a failure to the first new step


CONFIG = load_config(Config, ROOT / "configs" / "model" / "tinyllama_1_1b.yaml")
ONE_B = Plan.resolve(CONFIG, 1, VOCAB, True, False)
SECONDS = gpu_seconds(CONFIG, ONE_B, H100, 0)  # of H100s, as --dry-run prints them in hours
EIGHT_B = resolve_shape(ModelConfig(preset="doremi_8B"), 2048, VOCAB)


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def checkpoint_row(name: str, params: int, gpus: int) -> str:
    """Bytes, seconds of writing, time between failures, Young's interval, and the share of the time that is lost."""
    seconds, between = 12 * params / WRITER, GPU_HOURS * 3600 / gpus
    every = math.sqrt(2 * seconds * between)
    lost = seconds / every + (every / 2 + RESTART) / between
    facts = (f"{12 * params / 1e9:.1f} GB", f"{seconds:.0f} s", f"{between / 3600:.0f} h")
    return row(name, f"{gpus:,}", *facts, f"{every / 60:.0f} min", f"{lost:.1%}")


def split_row(gpus: int) -> str:
    """A step of the 1B run on so many GPUs: compute, one ring all-reduce of fp32 gradients, the whole run."""
    compute = SECONDS / gpus / ONE_B.total_steps
    reduce = 2 * 4 * ONE_B.params * (gpus - 1) / gpus / NETWORK
    hours = ONE_B.total_steps * compute / 3600
    return row(f"{gpus:,}", f"{512 / gpus:g}", f"{compute:.2f} s", f"{reduce:.2f} s", f"{hours:.1f} h")


def cost_row(name: str, runs: int) -> str:
    hours = SECONDS / 3600
    return row(name, f"{runs:,}", f"{runs * ONE_B.total_flops:.3g}", f"{hours:,.0f}", f"{runs * hours:,.0f}")


def tables() -> list[str]:
    """Every row that the document must have, as it must have it."""
    rows = [checkpoint_row("RegMix's 1B", ONE_B.params, gpus) for gpus in (32, 1024)]
    rows += [checkpoint_row("DoReMi's 8B", EIGHT_B.params, 1024)]
    rows += [split_row(gpus) for gpus in (8, 32, 128, 512)]
    return [*rows, cost_row("the 1B run", 1), cost_row("4 mixtures x 5 seeds of it", 20)]


def facts() -> list[str]:
    """Figures in the sentences."""
    tokens = ONE_B.total_tokens
    slowest = expected_maximum(1024)
    return [
        f"{ONE_B.params:,} parameters",
        f"{2 * tokens / 1e9:.1f} GB of shards",
        f"{512 * 2 * 2049 / 1e6:.1f} MB a step",
        f"{12 * ONE_B.params * 128 / 1e12:.1f} TB",
        f"{GPU_HOURS:,.0f} GPU-hours",
        f"{slowest:.1f} standard deviations",
        f"{TIMEOUT.seconds // 60} minutes",
        f"{TIMEOUT.seconds * WRITER / 12 / 1e9:.0f} billion parameters",
    ]


def expected_maximum(n: int) -> float:
    """Of n draws from a standard normal distribution."""
    x = np.linspace(-10, 10, 200_001)
    below = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    return float(np.sum(x[1:] * np.diff(below**n)))


def test_every_figure_of_the_document_is_what_comes_out_today():
    missing = [text for text in [*tables(), *facts()] if text not in TEXT]
    assert missing == []


def test_a_checkpoint_is_twelve_bytes_a_parameter(tmp_path):
    config = load_config(Config, ROOT / "configs/model/tinyllama_1M.yaml")
    module = GPT(Plan.resolve(config, 1, 4096, False, False).shape)
    state = moments(module, torch.optim.AdamW(module.parameters()))
    folder = save_checkpoint(tmp_path, 1, dict(module.named_parameters()), state, {}, keep=1)
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert 12 <= size / sum(p.numel() for p in module.parameters()) < 12.05
