"""Numbers out of a run: metrics.jsonl first, then the console line and TensorBoard, which only mirror it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lite.files import atomic_write

CONSOLE_KEYS = (("train/loss", "loss {:.4f}"), ("train/lr", "lr {:.2e}"), ("train/grad_norm", "grad norm {:.3f}"))


class Metrics:
    """Writes one run's metrics on rank 0; every line of a .jsonl is one whole JSON object with its step."""

    def __init__(self, run_dir: Path, total_steps: int, tensorboard: bool, console: bool, resumed_step: int) -> None:
        self.run_dir, self.total_steps, self.console = run_dir, total_steps, console
        for name in ("metrics.jsonl", "evals.jsonl"):
            drop_after(run_dir / name, resumed_step)
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, so only when asked for

            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)

    def train(self, step: int, values: dict[str, float]) -> None:
        """Appends one training line and prints it."""
        self._append("metrics.jsonl", step, values)
        if self.console:
            parts = [f"step {step}/{self.total_steps}"] + [form.format(values[k]) for k, form in CONSOLE_KEYS]
            parts.append(f"{values['perf/tokens_per_s']:,.0f} tokens/s")
            if "perf/mfu" in values:
                parts.append(f"mfu {values['perf/mfu']:.1%}")
            print(" | ".join(parts), flush=True)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one evaluation line and prints the losses by domain."""
        self._append("evals.jsonl", step, values)
        if self.console:
            losses = [f"{k.split('/')[1]} {v:.4f}" for k, v in values.items() if k.endswith("/loss")]
            print(f"step {step}/{self.total_steps} | valid: " + ", ".join(losses), flush=True)

    def close(self) -> None:
        """Flushes TensorBoard."""
        if self.writer is not None:
            self.writer.close()

    def _append(self, name: str, step: int, values: Mapping[str, float]) -> None:
        with open(self.run_dir / name, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer is not None:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a .jsonl file; a torn last line (a crash in the middle of a write) is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def drop_after(path: Path, step: int) -> None:
    """Removes lines past ``step``, so that a resumed run writes each step once."""
    if path.exists():
        kept = [row for row in read_jsonl(path) if row["step"] <= step]
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in kept))
