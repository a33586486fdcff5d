"""Scores of models on tasks, each in a file named after all that it depends on: nothing is computed twice."""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_tools.tokenizer import load_tokenizer
from launch import export
from launch.harness import Harness, lm_eval_version, open_tasks
from megatron_lite.files import atomic_write_json
from megatron_lite.hf_config import read_json

Models = dict[str, list[Path]]  # mixture -> one folder a seed: a step_* or a Hugging Face folder


def stored_scores(
    models: Models, tasks: Sequence[str], shots: Sequence[int], args: argparse.Namespace
) -> dict[Path, dict[str, list[dict[str, Any]]]]:
    """Model -> task -> a result for each number of shots; what is missing on disk is computed first."""
    folders = {p: Path(args.out) / "scores" / identity(p, args) for paths in models.values() for p in paths}
    missing = {
        path: [(task, k) for task in tasks for k in shots if not (folder / file_name(task, k)).is_file()]
        for path, folder in folders.items()
    }
    if any(missing.values()):
        manager = open_tasks(sorted({task for found in missing.values() for task, _ in found}), args.include_path)
    for path, asked in missing.items():
        if asked:
            run_tasks(path, asked, folders[path], manager, args)
    return {p: {t: [read_json(f / file_name(t, k)) for k in shots] for t in tasks} for p, f in folders.items()}


def file_name(task: str, shots: int) -> str:
    """Where a result is kept."""
    return f"{task}-{shots}shot.json"


def run_tasks(
    path: Path, asked: Sequence[tuple[str, int]], folder: Path, manager: Any, args: argparse.Namespace
) -> None:
    """Runs tasks on one model; each result is on disk before the next begins."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".export-") as temp:
        harness = Harness(hf_folder(path, Path(temp), args), manager, args.device, args.batch_size, args.dtype)
        for task, k in asked:
            result = {"model": str(path), **harness.score(task, k, args.limit)}
            atomic_write_json(folder / file_name(task, k), result)
            print(f"{path}: {task}, {k} shots: {result['metric']} {result['value']:.4f}, {result['seconds']:.0f} s")


def hf_folder(path: Path, temp: Path, args: argparse.Namespace) -> Path:
    """The model as a Hugging Face folder: its own, or one that lives as long as ``temp``."""
    if (path / "config.json").is_file():
        return path
    if not args.tokenizer:
        raise ValueError(f"{path}: name the tokenizer that made its shards with --tokenizer")
    command = [str(path), "--out", str(temp / "model"), "--tokenizer", args.tokenizer, "--dtype", args.dtype]
    export.export_checkpoint(export.build_parser().parse_args(command))
    return temp / "model"


def identity(path: Path, args: argparse.Namespace) -> str:
    """Names what a score depends on: weights, tokenizer, precision, items, the harness and the user's own tasks."""
    if (path / "config.json").is_file():
        model: Any = digest(p for p in path.iterdir() if p.suffix in (".json", ".safetensors", ".model"))
    else:
        tokenizer = load_tokenizer(args.tokenizer).sha256 if args.tokenizer else None
        model = [read_json(path / "COMPLETE")["model.safetensors"]["sha256"], tokenizer]
    own = digest(p for p in Path(args.include_path).rglob("*") if p.is_file()) if args.include_path else None
    facts = {"model": model, "dtype": args.dtype, "limit": args.limit, "lm_eval": lm_eval_version(), "tasks": own}
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def digest(files: Iterable[Path]) -> str:
    """One hash of some files' names and contents."""
    whole = hashlib.sha256()
    for file in sorted(files):
        with open(file, "rb") as stream:
            whole.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
