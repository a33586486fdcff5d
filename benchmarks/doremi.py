"""DoReMi against RegMix's search, the natural and the uniform mixture on the demo's text: python -m benchmarks.doremi.

Each method finds a mixture of the demo's ten domains; the demo's larger model is trained on each, with three seeds and
one budget, under the same caps on repetition. A row compares DoReMi (ours) with one other method (peer): loss on the
average domain, on the worst domain, and what finding the mixture cost in FLOPs by the plan's convention. The search
minimises the average. Everything is resumable and lies in --out; alone on two cores it takes some half an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.table import Row, cost_row, pick_keys, print_rows
from regmix_search import run as cli
from regmix_search.config import load_search
from regmix_search.doremi import main_mixtures
from regmix_search.freshness import read_json
from regmix_search.ledger import replay
from regmix_search.retrain import MainRun, prepare, run_all
from regmix_search.search import Search

CONFIGS = Path(__file__).resolve().parents[1] / "configs/search"
SEEDS = range(3)
PEERS = ("natural", "uniform", "regmix")


def find_mixtures(out: Path, peers: Sequence[str]) -> tuple[Search, dict[str, dict[str, float]], dict[str, float]]:
    """(DoReMi's search, weights by method, FLOPs that finding them took by method)."""
    folder = ("train.enabled=false", f"out_dir={out / 'regmix'}")
    made = _run("demo", ("corpus", "tokenizer", "shards"), *folder)
    shards = f"shards.data_dir={made.shards_dir.resolve()}"
    doremi = _run("doremi", ("doremi",), "train.enabled=false", f"out_dir={out / 'doremi'}", shards, "doremi.rounds=1")
    ours, rounds = main_mixtures(doremi), read_json(doremi.out / "doremi.json")["rounds"]
    weights = {"doremi": ours["optimal"], "natural": ours["prior"], "uniform": ours["uniform"]}
    flops = {"doremi": sum(sum(one["flops"].values()) for one in rounds)}
    if "regmix" in peers:
        domains = list(ours["optimal"])
        average = f"fit.target='{','.join(f'{name}={1 / len(domains)!r}' for name in domains)}'"
        regmix = _run("demo", ("mixtures", "proxies", "fit", "optimize"), *folder, average)
        weights["regmix"] = read_json(regmix.out / "optimum.json")["weights"]
        flops["regmix"] = sum(event["flops"] for event in replay(regmix.out / "trials.jsonl").finished.values())
    return doremi, {name: weights[name] for name in ("doremi", *peers)}, flops


def train_models(search: Search, weights: dict[str, dict[str, float]]) -> dict[str, np.ndarray]:
    """Held-out losses [seed, domain] of the larger model by method. ValueError where a run fails."""
    folder = search.out / "models"
    runs = [MainRun(name, seed, mix, folder / f"{name}-s{seed}") for seed in SEEDS for name, mix in weights.items()]
    for run in runs:
        prepare(search, run)
    failed = run_all(search, [run for run in runs if not run.done], len(runs))
    if failed:
        raise ValueError(f"models failed: {failed}")
    domains = list(weights["doremi"])
    losses = [(run.mixture, read_json(run.folder / "result.json")["losses"]) for run in runs]
    return {name: np.array([[found[d] for d in domains] for of, found in losses if of == name]) for name in weights}


def compare(losses: dict[str, np.ndarray], flops: dict[str, float]) -> list[Row]:
    """Rows by peer: means over seeds; the spread is the sd over seeds of DoReMi's average minus the peer's."""
    rows = []
    for peer in [name for name in losses if name != "doremi"]:
        ours, theirs = losses["doremi"], losses[peer]
        rows.append(cost_row(f"average_loss.{peer}", ours.mean(), theirs.mean(), "nats a token"))
        rows.append(cost_row(f"worst_loss.{peer}", ours.max(1).mean(), theirs.max(1).mean(), "nats a token"))
        spread = float(np.std(ours.mean(1) - theirs.mean(1), ddof=1))
        gain = float(theirs.mean() - ours.mean())
        rows.append(Row(f"average_gain.{peer}", gain, spread, gain / spread, "nats (peer: sd over seeds)"))
    found = [cost_row(f"flops.{peer}", flops["doremi"], flops[peer], "FLOPs to find the mixture") for peer in flops]
    return rows + found[1:]


def run(out: Path, peers: Sequence[str] = PEERS) -> list[Row]:
    """All of it, or what is missing of it."""
    search, weights, flops = find_mixtures(out, peers)
    return compare(train_models(search, weights), flops)


def _run(name: str, stages: Sequence[str], *overrides: str) -> Search:
    """Brings stages of configs/search/<name>.yaml up to date."""
    config = CONFIGS / f"{name}.yaml"
    for stage in stages:
        sets = [word for text in overrides for word in ("--set", text)]
        with contextlib.redirect_stdout(sys.stderr):
            code = cli.main(["--config", str(config), "--stage", stage, *sets])
        if code:
            sys.exit(code)
    return Search(load_search(config, None, overrides), sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_doremi"), help="folder of all runs")
    parser.add_argument("--only", default=",".join(PEERS), help="peers; regmix alone needs 75 proxies")
    arguments = parser.parse_args()
    print_rows(run(arguments.out, pick_keys(parser, arguments.only, PEERS)), arguments.json)
    sys.exit(0)
