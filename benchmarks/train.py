"""One optimizer step on the CPU (forward, backward, clipping, AdamW) beside Hugging Face's Llama and litgpt's GPT.

    python -m benchmarks.train [--json] [--only KEY,...] [--repeats 5] [--same-allocator]

Each side is a process of its own and they take turns, with the same weights, tokens and settings (benchmarks.sides):
one sequence of 2,048 tokens a step. A row's peer is the better of the two, named in `peer_name`. With one thread the
figure is the median of tokens per CPU-second over the repeats, with two the best of tokens per second by the clock. In
fp32 all losses of all steps must agree within 1e-4, or nothing is printed: the same work is compared, updates included.

`.memory` is each process's largest resident size over all its steps, less what was resident before the model was built
(interpreter, torch, the side's own modules): weights, gradients, moments, activations, logits.

Ours sets malloc as training does (megatron_lite.process.use_cpu), the peers run as they come; --same-allocator gives
them our setting: faster, and more memory. Needs the bench extra (transformers, litgpt).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.sides import SIDES, Case, export_weights
from benchmarks.table import Row, best_of, pick_keys, print_rows

MODELS = (("tinyllama_1M", 50432), ("tinyllama_1M", 8192), ("tinyllama_60M", 50432))
CASES = {
    f"{preset}.v{vocab}.{precision}.t{threads}": (Case(preset, vocab, 2048, 1, precision), threads)
    for preset, vocab in MODELS
    for precision in ("fp32", "bf16")
    for threads in (1, 2)
}
# What a side is made of, imported before the first look at memory.
IMPORTS = {
    "ours": (),  # with this file
    "hf": ("transformers.models.llama.modeling_llama",),
    "litgpt": ("litgpt.model", "litgpt.scripts.convert_hf_checkpoint"),
}
TOLERANCE = 1e-4  # nats between sides in fp32


class Worker:
    """One side in a process that waits for its turns."""

    def __init__(self, side: str, case: Case, threads: int, weights: Path, tune: bool) -> None:
        given = {"side": side, "case": asdict(case), "threads": threads, "weights": str(weights), "tune": tune}
        command = [sys.executable, "-m", "benchmarks.train", "--worker", json.dumps(given)]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)

    def step(self) -> dict[str, float]:
        """One optimizer step: its loss, CPU-seconds, seconds, and the peak of memory so far in MB."""
        self.ask(1)
        return self.answer()

    def ask(self, steps: int) -> None:
        """Starts so many steps; ``answer`` must be called before the next ones."""
        assert self.process.stdin
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, float]:
        """Waits for the steps asked for: the last one's loss, the seconds of all of them."""
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"a side failed: {self.process.args!r}")  # its traceback is on stderr
        return dict(json.loads(line))

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


def resident(field: str) -> float:
    """VmRSS or VmHWM (its maximum) of this process in MB, from the kernel."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found, field
    return int(found[1]) / 1000


def work(given: dict[str, Any]) -> None:
    """What a Worker's process does: as many steps as each line on stdin says."""
    import torch

    from megatron_lite.process import use_cpu

    for module in IMPORTS[given["side"]]:
        importlib.import_module(module)
    torch.set_num_threads(given["threads"])
    if given["tune"]:
        use_cpu(given["threads"])
    before, case = resident("VmRSS"), Case(**given["case"])
    step = SIDES[given["side"]](case, Path(given["weights"]), torch.device("cpu"))
    tokens, labels = case.batch()
    for line in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(int(line)):
            loss = step(tokens, labels).item()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        found = {"loss": loss, "cpu_s": cpu, "wall_s": wall, "memory_mb": resident("VmHWM") - before}
        print(json.dumps(found), flush=True)


def measure(case: Case, threads: int, repeats: int, same_allocator: bool = False) -> dict[str, list[dict[str, float]]]:
    """side -> what each of its steps said, after two to warm up, taken in turn."""
    with tempfile.TemporaryDirectory() as room:
        weights = Path(room, "weights")
        export_weights(case, weights)
        workers = {s: Worker(s, case, threads, weights, s == "ours" or same_allocator) for s in SIDES}
        try:
            rounds = [{side: worker.step() for side, worker in workers.items()} for _ in range(repeats + 2)]
        finally:
            for worker in workers.values():
                worker.close()
    check_losses(case, rounds)
    return {side: [steps[side] for steps in rounds[2:]] for side in SIDES}


def check_losses(case: Case, rounds: Sequence[dict[str, dict[str, float]]]) -> None:
    """Raises where two sides have not done the same work; in bf16 they may round differently."""
    for number, steps in enumerate(rounds):
        losses, tolerance = (
            [found["loss"] for found in steps.values()],
            TOLERANCE * (1 if case.precision == "fp32" else 100),
        )
        if not all(abs(loss - losses[0]) <= tolerance for loss in losses):  # so that no NaN passes
            raise RuntimeError(f"{case}: losses of step {number} differ: {dict(zip(steps, losses, strict=True))}")


def rows_of(key: str, case: Case, threads: int, found: dict[str, list[dict[str, float]]]) -> Iterator[Row]:
    """Speed and memory of one case."""
    if threads == 1:
        rates = {s: case.tokens / statistics.median(step["cpu_s"] for step in steps) for s, steps in found.items()}
    else:
        rates = {s: case.tokens / min(step["wall_s"] for step in steps) for s, steps in found.items()}
    yield best_of(key, rates, "tokens/CPU-s" if threads == 1 else "tokens/s", more_is_better=True)
    memory = {side: steps[-1]["memory_mb"] for side, steps in found.items()}
    yield best_of(f"{key}.memory", memory, "MB", more_is_better=False)


def run(keys: Sequence[str] = tuple(CASES), repeats: int = 5, same_allocator: bool = False) -> list[Row]:
    """These cases as rows; what each side did goes to stderr as it comes."""
    rows: list[Row] = []
    for key in keys:
        case, threads = CASES[key]
        rows += rows_of(key, case, threads, measure(case, threads, repeats, same_allocator))
        said = ", ".join(f"{row.ratio:.3f} of {row.peer_name} in {row.unit}" for row in rows[-2:])
        load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"  # figures by the clock need quiet
        print(f"{key}: {said}; {load}", file=sys.stderr)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--only", default=",".join(CASES), help="cases to measure, with commas between")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each side")
    parser.add_argument("--same-allocator", action="store_true", help="give the peers our setting of malloc")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(json.loads(args.worker))
        return 0
    keys = pick_keys(parser, args.only, CASES)
    print_rows(run(keys, args.repeats, args.same_allocator), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
