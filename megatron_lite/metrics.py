"""Numbers out of a run: metrics.jsonl first, then the console line, TensorBoard and W&B, which only mirror it."""

from __future__ import annotations

import contextlib
import json
import resource
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megatron_lite.config import Config
from megatron_lite.files import atomic_write, read_jsonl

CONSOLE_KEYS = (
    ("train/loss", "loss {:.4f}"),
    ("train/lr", "lr {:.2e}"),
    ("train/grad_norm", "grad norm {:.3f}"),
    ("perf/tokens_per_s", "{:,.0f} tokens/s"),
    ("perf/data_wait", "data wait {:.1%}"),
    ("perf/memory_gib", "{:.2f} GiB"),
    ("perf/mfu", "mfu {:.1%}"),
    ("perf/peak_flops", "of {:.4g} FLOP/s"),
)


class Metrics:
    """Writes one run's metrics on rank 0; every line of a .jsonl is one whole JSON object with its step."""

    def __init__(self, config: Config, total_steps: int, resumed_step: int) -> None:
        self.run_dir, self.total_steps, self.console = config.run_dir, total_steps, config.log.console
        for name in ("metrics.jsonl", "evals.jsonl"):
            drop_after(self.run_dir / name, resumed_step)
        self.mirrors: list[TensorBoard | WandB] = []
        if config.log.tensorboard:
            self.mirrors.append(TensorBoard(self.run_dir, resumed_step))
        if config.log.wandb:
            self.mirrors.append(WandB(config))

    def train(self, step: int, values: dict[str, float]) -> None:
        """Appends one training line and prints it."""
        self._append("metrics.jsonl", step, values)
        if self.console:
            parts = [f"step {step}/{self.total_steps}"]
            parts += [form.format(values[key]) for key, form in CONSOLE_KEYS if key in values]
            print(" | ".join(parts), flush=True)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one evaluation line and prints the losses by domain."""
        self._append("evals.jsonl", step, values)
        if self.console:
            losses = [f"{k.split('/')[1]} {v:.4f}" for k, v in values.items() if k.endswith("/loss")]
            print(f"step {step}/{self.total_steps} | valid: " + ", ".join(losses), flush=True)

    def close(self) -> None:
        """Flushes the mirrors."""
        for mirror in self.mirrors:
            mirror.close()

    def _append(self, name: str, step: int, values: Mapping[str, float]) -> None:
        with open(self.run_dir / name, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for mirror in list(self.mirrors):
            try:
                mirror.write(step, values)
            except Exception as error:  # a full disk or a closed port there is no reason to stop training
                self.mirrors.remove(mirror)
                warnings.warn(f"{type(mirror).__name__} failed ({error}) and is left out from step {step} on")


class TensorBoard:
    """Event files under out_dir/tensorboard."""

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only when asked for

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a key."""
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flushes the events."""
        self.writer.close()


class WandB:
    """Weights & Biases; project, entity and mode are its own WANDB_* variables."""

    def __init__(self, config: Config) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("log.wandb: wandb is not installed: pip install wandb, or set it to false") from error
        # the id is the folder's, so that a resumed run goes on in the same curve
        identity = str(config.run_dir).strip("/.").replace("/", "-")
        self.run = wandb.init(
            project="megatron_lite", name=config.name, id=identity, dir=str(config.run_dir), resume="allow"
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row of the run's history."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Uploads what is left."""
        self.run.finish()


class Stopwatch:
    """Wall time between two log lines, by the monotonic clock, and how much of it went by waiting for data."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts what happens inside as waiting, and one step."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before
        self._steps += 1

    def lap(self, tokens_per_step: int, device: torch.device) -> dict[str, float]:
        """perf/* since the last lap: seconds a step, tokens/s, share of data wait, this process's peak memory."""
        seconds = time.perf_counter() - self._start
        values = {
            "perf/tokens_per_s": self._steps * tokens_per_step / seconds,
            "perf/step_s": seconds / max(1, self._steps),
            "perf/data_wait": self._waited / seconds,
            "perf/memory_gib": peak_memory(device) / 2**30,
        }
        self._restart()
        return values


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors on a GPU held at once, or the most that this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def drop_after(path: Path, step: int) -> None:
    """Removes lines past ``step``, so that a resumed run writes each step once."""
    if path.exists():
        kept = [row for row in read_jsonl(path) if row["step"] <= step]
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in kept))
