"""Evaluates models: RegMix's 13 benchmarks by lm-evaluation-harness, and losses on held-out domains.

    python launch/evaluate.py runs/x --tokenizer tokenizer/                         # the 13 tasks, 0 to 5 shots each
    python launch/evaluate.py human=runs/h1,runs/h2 regmix=runs/r1,runs/r2 --tokenizer tokenizer/ --out runs/table
    python launch/evaluate.py llama/ --include-path tasks/ --tasks local_wiki --shots 0     # data_tools/local_task.py
    python launch/evaluate.py runs/x --perplexity --data-dir shards/                # nats/token, perplexity, bits/byte

A model is a run, a step_* folder or a Hugging Face folder; NAME=A,B,C are seeds of one mixture. Each score (of a model,
a task, shots) is stored under OUT when it is done, and a repeated command computes what is missing. OUT gets
evaluation.json and table.md. Exit codes: 0 done, 2 a mistake in the request, or data that cannot be had.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # so that `python launch/evaluate.py` works from a clone without installing
    # in place of launch/, where the harness would find this file when it imports Hugging Face's `evaluate`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from launch.harness import TASKS, lm_eval_version
from launch.perplexity import domain_cells, domain_losses, domain_table, held_out_sets, loss_table
from launch.scores import Cell, average, compare, comparison_table, score_table
from launch.task_scores import Models, stored_scores
from megatron_lite.files import atomic_write, atomic_write_json, folder_lock
from megatron_lite.weights import find_weights


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", metavar="[NAME=]FOLDER[,FOLDER...]", help="several folders of a name: its seeds")
    add("--tasks", nargs="+", metavar="TASK", help="lm-evaluation-harness's names (default: RegMix's 13)")
    add("--include-path", metavar="DIR", help="folder with task YAMLs of your own")
    add("--shots", default="0-5", help="few-shot examples: 0-5, 0 or 0,5 (default %(default)s)")
    add("--tokenizer", help="the tokenizer that made the shards; a Hugging Face folder has its own")
    add("--out", help="folder of results (default: RUN/evaluation for one run, else runs/evaluation)")
    add("--batch-size", default="16", help="requests at a time, or auto (GPU only) (default %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="precision of the model (default %(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N items of each task: a trial, not a result")
    add("--perplexity", action="store_true", help="losses on held-out domains (and tasks only if --tasks is given)")
    add("--data-dir", metavar="DIR", help="its valid_* shards are the domains (default: those of the run)")
    add("--mixture", metavar="FILE", help="its valid: are the domains")
    add("--max-tokens", type=int, metavar="N", help="tokens of each domain (default: all)")
    add("--json", action="store_true", help="print evaluation.json instead of tables")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        models = read_models(args.models)
        args.out = args.out or default_out(models)
        with folder_lock(args.out), contextlib.redirect_stdout(sys.stderr):  # results alone go to stdout
            tables, found = [], {"models": {name: [str(p) for p in paths] for name, paths in models.items()}}
            if args.perplexity:
                tables += measure_domains(models, args, found)
            if args.tasks or not args.perplexity:
                tables += measure_tasks(models, args, found)
            atomic_write_json(Path(args.out) / "evaluation.json", found)
            atomic_write(Path(args.out) / "table.md", "\n\n".join(tables) + "\n")
        print(json.dumps(found, indent=1) if args.json else "\n\n".join(tables))
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def read_models(arguments: Sequence[str]) -> Models:
    """The models asked for, each run replaced by its newest complete checkpoint."""
    models: Models = {}
    for argument in arguments:
        name, equals, folders = argument.partition("=")
        paths = [Path(p) for p in (folders if equals else argument).split(",")]
        label = name if equals else default_name(paths[0])
        if label in models or not label:
            raise ValueError(f"{argument}: the name {label!r} is taken; write NAME=FOLDER[,FOLDER...]")
        models[label] = [find_weights(p) for p in paths]
        if len(set(models[label])) < len(paths):
            raise ValueError(f"{argument}: a model is named twice; it is no second seed")
    counts = {name: len(paths) for name, paths in models.items()}
    if len(set(counts.values())) > 1:
        print(f"mixtures have different numbers of seeds: {counts}", file=sys.stderr)
    return models


def default_out(models: Models) -> str:
    """Where export.py looks for a run's scores; a folder beside the runs where there are several models."""
    folders = [path for paths in models.values() for path in paths]
    one = len(folders) == 1 and (folders[0] / "state.json").is_file()
    return str(folders[0].parent / "evaluation") if one else "runs/evaluation"


def default_name(path: Path) -> str:
    """The folder's name, with its run's for a step_* folder."""
    path = path.resolve()
    return f"{path.parent.name}/{path.name}" if path.name.startswith("step_") else path.name


def measure_domains(models: Models, args: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    """Held-out losses of every model into ``found``; returns the tables."""
    rows = {}
    for name, paths in models.items():
        results = []
        for path in paths:
            valid = held_out_sets(path, args.mixture, args.data_dir)
            batch = int(args.batch_size) if args.batch_size.isdigit() else 16
            results.append(domain_losses(path, valid, args.max_tokens, batch, args.device, args.dtype))
        rows[name] = domain_cells(results)
    found["domains"] = {
        name: {d: {k: as_json(v) for k, v in row.items()} for d, row in table.items()} for name, table in rows.items()
    }
    tables = [domain_table(name, table) for name, table in rows.items()]
    if len(models) > 1:
        comparisons = compare(loss_table(rows))
        found["domain_comparisons"] = [dataclasses.asdict(c) for c in comparisons]
        tables.append(comparison_table(comparisons, "nats/token (lower is better)"))
    return tables


def measure_tasks(models: Models, args: argparse.Namespace, found: dict[str, Any]) -> list[str]:
    """Scores of every model on every task into ``found``; returns the tables."""
    shots, tasks = read_shots(args.shots), list(dict.fromkeys(args.tasks or TASKS))
    results = stored_scores(models, tasks, shots, args)
    raw = {name: [results[path] for path in paths] for name, paths in models.items()}
    table = {
        task: {name: Cell(*over_shots([seed[task] for seed in seeds])) for name, seeds in raw.items()} for task in tasks
    }
    metrics = {task: next(iter(raw.values()))[0][task][0]["metric"] for task in tasks}
    found["setting"] = {"shots": shots, "limit": args.limit, "dtype": args.dtype, "lm_eval": lm_eval_version()}
    found["tasks"] = {
        task: {"metric": metrics[task], "scores": {n: as_json(c) for n, c in row.items()}}
        for task, row in table.items()
    }
    found["average"] = {name: as_json(average([row[name] for row in table.values()])) for name in models}
    found["by_shots"] = {
        name: {
            task: [statistics.fmean(runs) for runs in zip(*(values(s[task]) for s in seeds), strict=True)]
            for task in tasks
        }
        for name, seeds in raw.items()
    }
    comparisons = compare(table)
    found["comparisons"] = [dataclasses.asdict(c) for c in comparisons]
    tables = [score_table(table, metrics), explain(args, shots, models, raw)]
    return [*tables, comparison_table(comparisons, "points", 100)] if comparisons else tables


def over_shots(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[tuple[float, ...], float | None]:
    """A value for each seed, the mean over shots; and the items' error of one, as if all shots erred alike."""
    means = tuple(statistics.fmean(values(results)) for results in seeds)
    errors = [r["stderr"] for results in seeds for r in results]
    return means, None if any(e is None for e in errors) else statistics.fmean(errors)


def values(results: Sequence[Mapping[str, Any]]) -> list[float]:
    """The scores of some results, here one for each number of shots."""
    return [r["value"] for r in results]


def explain(args: argparse.Namespace, shots: Sequence[int], models: Models, raw: Mapping[str, Any]) -> str:
    """What the table's figures are."""
    results = [r for seeds in raw.values() for seed in seeds for task in seed.values() for r in task]
    cut, asked = (sum(r[key] for r in results) for key in ("truncated_requests", "requests"))
    seeds = {len(paths) for paths in models.values()}
    text = f"Percent; each score is the mean over {args.shots} shots ({len(shots)} runs of lm_eval {lm_eval_version()})"
    text += "; mean \u00b1 standard deviation over seeds" if max(seeds) > 1 else "; one seed each"
    text += f"; ONLY THE FIRST {args.limit} ITEMS of each task" if args.limit else ""
    lost = f"; {cut:,} of {asked:,} requests were longer than the model's context and lost their beginning."
    return text + (lost if cut else ".")


def read_shots(text: str) -> list[int]:
    """0-5, 3 or 0,2,5 -> numbers."""
    try:
        shots: list[int] = []
        for part in text.split(","):
            low, _, high = part.partition("-")
            shots += range(int(low), int(high or low) + 1)
        if not shots or len(set(shots)) < len(shots):
            raise ValueError
        return shots
    except ValueError:
        raise ValueError(f"--shots {text}: expected 0-5, 3 or 0,2,5") from None


def as_json(value: Any) -> Any:
    """A cell with its mean and deviation; anything else as it is."""
    if isinstance(value, Cell):
        return {"mean": value.mean, "sd": value.sd, "values": list(value.values), "stderr": value.stderr}
    return value


if __name__ == "__main__":
    sys.exit(main())
