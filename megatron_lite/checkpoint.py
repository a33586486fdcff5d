"""Checkpoints: safetensors and JSON, one folder a step, complete or absent.

    step_0000100/model.safetensors   parameters by name
                 optim.safetensors   exp_avg/<name>, exp_avg_sq/<name>
                 state.json          step, consumed samples, config, mixture, data fingerprint
                 COMPLETE            sizes and sha256 of the three files above, written last

A folder is written under a temporary name and renamed, so a crash leaves the old state or the new one, never a mix.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_lite.files import atomic_write_json, sync

FILES = ("model.safetensors", "optim.safetensors", "state.json")


def step_folder(run_dir: Path, step: int) -> Path:
    """The folder of one step's checkpoint."""
    return run_dir / f"step_{step:07d}"


def save_checkpoint(
    run_dir: Path, step: int, model: Mapping[str, Tensor], optim: Mapping[str, Tensor], state: dict[str, Any], keep: int
) -> Path:
    """Writes one checkpoint and then deletes all but the ``keep`` newest complete ones."""
    final = step_folder(run_dir, step)
    temp = run_dir / f".{final.name}.tmp"
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    save_file(_storable(model), temp / "model.safetensors")
    save_file(_storable(optim), temp / "optim.safetensors")
    atomic_write_json(temp / "state.json", {"step": step, **state})
    for name in FILES:
        sync(temp / name)
    atomic_write_json(temp / "COMPLETE", {name: _digest(temp / name) for name in FILES})
    shutil.rmtree(final, ignore_errors=True)
    temp.rename(final)
    sync(run_dir)
    for old in complete_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


class Saver:
    """Saves one run's checkpoints, in a thread of its own where asked; never two at once, the last one waited for.

    ``save`` returns when the tensors may change again: they are copied to the CPU before the thread starts. An error
    of the writer is raised by the next ``save`` or ``wait``, so a run never goes on for long without being saved.
    """

    def __init__(self, run_dir: Path, keep: int, asynchronous: bool) -> None:
        self.run_dir, self.keep = run_dir, keep
        self._writer = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[Path] | None = None

    def save(self, step: int, model: Mapping[str, Tensor], optim: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """See save_checkpoint."""
        self.wait()
        if self._writer is None:
            save_checkpoint(self.run_dir, step, model, optim, state, self.keep)
            return
        params, moments = ({k: v.detach().to("cpu", copy=True) for k, v in x.items()} for x in (model, optim))
        self._pending = self._writer.submit(save_checkpoint, self.run_dir, step, params, moments, state, self.keep)

    def wait(self) -> None:
        """Returns when nothing is being written; raises what the writer met."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the last checkpoint and ends the thread."""
        if self._writer is not None:
            self._writer.shutdown(wait=True)
        self.wait()


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Every folder with a COMPLETE file, oldest step first. File times and pointer files are never asked."""
    return sorted(path.parent for path in run_dir.glob("step_*/COMPLETE"))


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """``never`` -> None; ``auto`` -> the newest complete checkpoint that verifies, or None; a path -> that folder."""
    if resume == "never":
        return None
    if resume != "auto":
        verify(Path(resume))
        return Path(resume)
    for path in reversed(complete_checkpoints(run_dir)):
        try:
            verify(path)
            return path
        except ValueError as error:
            print(f"resume auto: skipping {error}", flush=True)
    return None


def verify(path: Path) -> None:
    """Raises ValueError listing every file of a checkpoint that is missing, truncated or altered."""
    if not (path / "COMPLETE").is_file():
        raise ValueError(f"{path}: not a complete checkpoint (no COMPLETE file in it)")
    expected = json.loads((path / "COMPLETE").read_text(encoding="utf-8"))
    wrong = []
    for name in FILES:
        if not (path / name).is_file():
            wrong.append(f"{name} is missing")
        elif _digest(path / name) != expected.get(name):
            wrong.append(f"{name} does not match its checksum")
    if wrong:
        raise ValueError(f"{path}: damaged checkpoint: {'; '.join(wrong)}")


def load_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def load_tensors(
    path: Path,
    name: str,
    want: Mapping[str, torch.Size],
    cut: Callable[[str, Tensor], Tensor] = lambda _, whole: whole,
) -> dict[str, Tensor]:
    """Tensors of ``name`` (model.safetensors or optim.safetensors); ValueError when names or shapes differ.

    ``cut(key, whole)`` is what is kept of each: a rank never holds more than its slices and one whole tensor.
    """
    with safe_open(path / name, "pt") as file:
        found = {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no dict)
        problems = [f"{k} is missing" for k in want if k not in found]
        problems += [f"{k} is not in the model" for k in found if k not in want]
        problems += [
            f"{k} is {tuple(shape)}, the model has {tuple(want[k])}"
            for k, shape in found.items()
            if k in want and shape != want[k]
        ]
        if problems:
            raise ValueError(f"{path / name}: does not fit this model: {'; '.join(problems[:5])}")
        return {key: cut(key, file.get_tensor(key)) for key in found}


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
