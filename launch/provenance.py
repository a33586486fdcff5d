"""Which code a run was made with: a line in its starts.jsonl for each start that differs from the one before."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import torch

from megatron_lite import __version__
from megatron_lite.files import read_jsonl
from megatron_lite.mesh import Mesh

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str | None:
    """The commit of this clone, with -dirty where tracked files differ from it; None where this is no clone."""
    if not (ROOT / ".git").exists():  # an installed copy inside some other repository
        return None
    try:
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or a clone of another user
        return None


def record_start(run_dir: Path, mesh: Mesh) -> None:
    """Appends what this start runs with; a start like the last one adds nothing."""
    device = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "CPU"
    code: dict[str, object] = {"version": __version__, "commit": commit(), "torch": torch.__version__}
    start = code | {"ranks": mesh.size, "device": device}
    path = run_dir / "starts.jsonl"
    last = (read_jsonl(path) or [{}])[-1]
    if start == {key: last.get(key) for key in start}:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"date": time.strftime("%Y-%m-%d"), **start}) + "\n")
