"""Swarms of several sizes, as the user names them: tables with a size beside them, or folders of finished searches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from regmix_search.config import load_search
from regmix_search.freshness import digest, read_json
from regmix_search.ledger import replay
from regmix_search.repetition import match
from regmix_search.scale_law import Size
from regmix_search.tables import Runs, read_ledger, read_runs

FORM = "NAME=PARAMS,TOKENS,MIXTURES.csv,LOSSES.csv, NAME=PARAMS,TOKENS,trials.jsonl or NAME=FOLDER of a search"


@dataclass(frozen=True, eq=False)
class Scale:
    """Finished runs of one model size and length."""

    name: str
    size: Size
    runs: Runs


def parse_size(text: str, where: str) -> Size:
    """PARAMS,TOKENS: parameters without embeddings, and training tokens."""
    parts = text.split(",")
    try:
        size = Size(float(parts[0]), float(parts[1])) if len(parts) == 2 else None
    except ValueError:
        size = None
    if size is None or not (size.params > 0 and size.tokens > 0 and math.isfinite(size.flops)):
        raise ValueError(f"{where} {text!r}: write PARAMS,TOKENS, two positive numbers such as 59e6,1e9")
    return size


def files_of(text: str) -> list[Path]:
    """The files that a scale is read from."""
    name, _, value = text.partition("=")
    parts = value.split(",")
    if name and value and len(parts) == 1:
        return [Path(value) / "trials.jsonl", Path(value) / "space.json", Path(value) / "config.yaml"]
    if name and len(parts) in (3, 4):
        return [Path(part) for part in parts[2:]]
    raise ValueError(f"scales.runs {text!r}: write {FORM}")


def read_scale(text: str) -> Scale:
    """One scale. ValueError says what the text should look like, or which file is wrong."""
    files, (name, _, value) = files_of(text), text.partition("=")
    if "," not in value:
        return read_search(name, Path(value))
    size = parse_size(",".join(value.split(",")[:2]), f"scales.runs {name}")
    return Scale(name, size, _all_runs(files[0]) if len(files) == 1 else read_runs(files[0], files[1]))


def read_search(name: str, folder: Path) -> Scale:
    """The proxies of a search: its ledger, and the size from the plan of one of them."""
    path = folder / "trials.jsonl"
    digest(path, "proxies")  # says which stage makes it
    runs, config = _all_runs(path), load_search(folder / "config.yaml")
    plan = read_json(folder / next(iter(replay(path).finished.values()))["run_dir"] / "plan.json")
    tokens, proxy = read_json(folder / "space.json")["tokens"], int(plan["total_tokens"])
    if config.shards.match_repetition:
        tokens = match(tokens, config.run_tokens, config.proxy.schedule.total_tokens, config.proxy.data.seq_length)
    held = tuple(float(tokens[domain]) for domain in runs.domains)
    return Scale(name, Size(float(plan["non_embedding_params"]), float(proxy), held), runs)


def align(scales: Sequence[Scale]) -> list[Scale]:
    """By compute, the smallest first, domains in the order of the first scale's. ValueError where names differ."""
    if len(names := [scale.name for scale in scales]) > len(set(names)):
        raise ValueError(f"scales.runs: {', '.join(names)}: give each scale a name of its own")
    domains, aligned = scales[0].runs.domains, []
    for scale in scales:
        runs = scale.runs
        if odd := sorted(set(runs.domains) ^ set(domains)):
            raise ValueError(f"scales {scales[0].name} and {scale.name}: domains {', '.join(odd)} are not in both")
        order = [runs.domains.index(domain) for domain in domains]
        held = None if scale.size.held is None else tuple(scale.size.held[i] for i in order)
        moved = Runs(runs.index, domains, runs.weights[:, order], runs.losses, runs.unfinished)
        aligned.append(Scale(scale.name, replace(scale.size, held=held), moved))
    return sorted(aligned, key=lambda scale: scale.size.flops)


def _all_runs(path: Path) -> Runs:
    """Every finished trial of a ledger: nothing is chosen here by the runs that a search held back."""
    fitted, held = read_ledger(path)
    weights = np.vstack([fitted.weights, held.weights])
    losses = {name: np.concatenate([values, held.losses[name]]) for name, values in fitted.losses.items()}
    return Runs((*fitted.index, *held.index), fitted.domains, weights, losses, fitted.unfinished)
