"""Training on one GPU in bf16 against Hugging Face's Llama with flash attention and torch.compile, in the same run.

    python -m benchmarks.gpu [--json] [--only KEY,...] [--sequences N] [--steps 20]

tinyllama_1_1b has TinyLlama's own sizes (32 heads over 4 of keys and values, 32,000 tokens), for which 67,000 tokens/s
are 50 % of an H100's or H200's peak; tinyllama_1M is RegMix's proxy. Both sides run eager and compiled; ours is given
both ways (`.eager`), the peer is the better of its two. Weights, tokens and settings are equal (benchmarks.sides), and
so must be the losses of the first step. MFU: 6 N + 12 L d S FLOPs a token (PaLM) over the card's dense bf16 peak.

Without CUDA it says so and exits 2. Needs the bench extra (transformers).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.sides import SIDES, Case, export_weights
from benchmarks.table import Row, best_of, pick_keys, print_rows
from megatron_lite.metrics import peak_memory
from megatron_lite.plan import peak_flops

CASES = {
    "tinyllama_1_1b.bf16": Case("tinyllama_1_1b", 32000, 2048, 8, "bf16", num_heads=32, num_kv_heads=4),
    "tinyllama_1M.bf16": Case("tinyllama_1M", 50432, 2048, 16, "bf16"),
}
WARM_UP = 3  # steps: the compiler, the allocator, the choice of matmuls
TOLERANCE = 0.01  # nats between sides in the first step: bf16 rounds differently in each


@dataclass(frozen=True)
class Found:
    """What one side did."""

    tokens_per_s: float
    memory_gb: float
    first_loss: float


def measure(side: str, case: Case, weights: Path, device: torch.device, steps: int) -> Found:
    """Tokens a second by the clock over ``steps`` steps, and the peak of memory: on a GPU what tensors held."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    step = SIDES[side](case, weights, device)
    tokens, labels = (x.to(device) for x in case.batch())
    # the peer attends by the flash kernel or not at all; ours chooses as it does in training
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if side != "ours" else contextlib.nullcontext():
        losses = [step(tokens, labels).item() for _ in range(WARM_UP)]
        start = time.perf_counter()
        for _ in range(steps):
            step(tokens, labels)
        if cuda:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    found = Found(steps * case.tokens / seconds, peak_memory(device) / 1e9, losses[0])
    del step
    torch._dynamo.reset()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return found


def measure_all(case: Case, device: torch.device, steps: int) -> dict[str, Found]:
    """Both sides, eager and compiled (named `+compile`); RuntimeError where they do not train the same."""
    found = {}
    with tempfile.TemporaryDirectory() as room:
        weights = Path(room, "weights")
        export_weights(case, weights)
        for compiled in (False, True):
            for side in ("ours", "hf"):
                name = f"{side}+compile" if compiled else side
                found[name] = measure(side, dataclasses.replace(case, compile=compiled), weights, device, steps)
                print(f"{case.preset} {name}: {found[name]}", file=sys.stderr)
    losses = [one.first_loss for one in found.values()]
    if not all(abs(loss - losses[0]) <= TOLERANCE for loss in losses):  # so that no NaN passes
        raise RuntimeError(f"{case}: losses of the first step differ: {dict(zip(found, losses, strict=True))}")
    return found


def rows_of(key: str, case: Case, found: Mapping[str, Found], peak: float | None) -> list[Row]:
    """Speed compiled and eager, the better one's share of the device's peak where that is known, and memory."""
    rates = {name: one.tokens_per_s for name, one in found.items()}
    peers = {name: rate for name, rate in rates.items() if name.startswith("hf")}
    unit = "tokens/s"
    rows = [
        best_of(key, {"ours": rates["ours+compile"], **peers}, unit, more_is_better=True),
        best_of(f"{key}.eager", {"ours": rates["ours"], **peers}, unit, more_is_better=True),
    ]
    if peak:
        flops = case.shape.flops_per_token
        both = {"ours": max(rates["ours"], rates["ours+compile"]), **peers}
        unit = f"MFU, {flops:.4g} FLOPs a token (6N + 12LdS), peak {peak:.4g} FLOP/s dense bf16"
        rows.append(best_of(f"{key}.mfu", {n: r * flops / peak for n, r in both.items()}, unit, more_is_better=True))
    memory = {"ours": found["ours+compile"].memory_gb} | {name: found[name].memory_gb for name in peers}
    return [*rows, best_of(f"{key}.memory", memory, "GB at the peak", more_is_better=False)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs and prints; returns the exit code: 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--only", default=",".join(CASES), help="cases to measure, with commas between")
    parser.add_argument("--sequences", type=int, help="of one step, instead of 8 (1.1B) and 16 (1M)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each side")
    args = parser.parse_args(argv)
    keys = pick_keys(parser, args.only, CASES)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here, so nothing was measured", file=sys.stderr)
        return 2
    device, rows = torch.device("cuda", 0), []
    name = torch.cuda.get_device_name(device)
    print(name, file=sys.stderr)
    for key in keys:
        case = dataclasses.replace(CASES[key], sequences=args.sequences or CASES[key].sequences)
        rows += rows_of(key, case, measure_all(case, device, args.steps), peak_flops(name))
    print_rows(rows, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
