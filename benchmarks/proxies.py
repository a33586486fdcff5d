"""Many small proxies on one machine: ours beside Hugging Face's Llama and litgpt, one after another and packed.

    python -m benchmarks.proxies [--json] [--only KEY,...] [--repeats 5] [--steps 60] [--compile]

speed.*        training steps of the same model (benchmarks.sides), each side at the best of its settings (fp32, bf16;
               with --compile also compiled): `.one` is one process with a thread a core, `.packed` a process a core
               with one thread each, all at once, tokens/s together; `.cpu` tokens per CPU-second of the packed ones;
               `.memory` of a packed process; `.packing` is our `.packed` against our own `.one`
start          a process's start to its first step: launch/pretrain.py against benchmarks.plain_proxy
sweep          eight proxies of the demo's size, data, start-up and evaluation included: our pool against a script of
               its own for each (benchmarks.plain_proxy), the better of packed and one after another
calibration.*  what calibration chooses, against the best of every setting that it could have chosen, timed after it

By the clock a figure is the best of --repeats, by the CPU their median: other work on the machine only ever slows.
Needs the bench extra (transformers, litgpt).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import train
from benchmarks.sides import SIDES, Case, export_weights
from benchmarks.sweep import start_rows, sweep_rows
from benchmarks.table import Row, best_of, pick_keys, print_rows, rate_row
from regmix_search.calibration import packings, search_settings, variants
from regmix_search.config import ProxiesConfig
from regmix_search.crew import Crew, Setting
from regmix_search.machine import cores

CASES = {  # and the steps of one lap: a second or two
    "demo": (Case("demo_proxy", 2048, 128, 8, "fp32"), 30),
    "1M_v8192": (Case("tinyllama_1M", 8192, 2048, 1, "fp32"), 2),
}
KEYS = (*(f"speed.{name}" for name in CASES), "start", "sweep", *(f"calibration.{name}" for name in CASES))
SEARCH_TOKENS = 1e9  # of all proxies, so that calibration has time for everything that it would try


@dataclass(frozen=True)
class Found:
    """What one side did at one setting."""

    one: float  # tokens/s of a process with all cores
    packed: float  # tokens/s of single-threaded processes together
    cpu: float  # tokens per CPU-second of these
    memory: float  # MB of one of these


def speed(case: Case, steps: int, repeats: int, weights: Path) -> dict[str, Found]:
    """side -> figures at this case's precision and compiler, the sides taking turns lap by lap."""
    one = {side: [train.Worker(side, case, cores(), weights, side == "ours")] for side in SIDES}
    packed = {side: [train.Worker(side, case, 1, weights, side == "ours") for _ in range(cores())] for side in SIDES}
    teams = [(side, team) for teams in (one, packed) for side, team in teams.items()]
    laps: dict[tuple[str, int], list[list[dict[str, float]]]] = {}
    try:
        for count in (1, *[steps] * (repeats + 1)):
            for side, team in teams:
                for worker in team:
                    worker.ask(count)
                laps.setdefault((side, len(team)), []).append([worker.answer() for worker in team])
    finally:
        for _, team in teams:
            for worker in team:
                worker.close()
    train.check_losses(case, [{side: laps[side, 1][0][0] for side in SIDES}])  # the first step: the same work
    return {side: _found(case.tokens * steps, laps[side, 1][2:], laps[side, cores()][2:]) for side in SIDES}


def _found(tokens: int, one: list[list[dict[str, float]]], packed: list[list[dict[str, float]]]) -> Found:
    fastest, together = (max(sum(tokens / found["wall_s"] for found in lap) for lap in laps) for laps in (one, packed))
    cpu = tokens / statistics.median(found["cpu_s"] for lap in packed for found in lap)
    return Found(fastest, together, cpu, max(found["memory_mb"] for found in packed[-1]))


def speed_rows(key: str, found: Mapping[str, Mapping[str, Found]]) -> list[Row]:
    """``found``: setting -> side -> figures; each side has the setting that is its best."""

    def best(field: str) -> dict[str, float]:
        return {side: max(getattr(sides[side], field) for sides in found.values()) for side in SIDES}

    fastest = {side: max(found.values(), key=lambda sides: sides[side].packed)[side] for side in SIDES}
    one, packed = best("one"), best("packed")
    return [
        best_of(f"{key}.one", one, "tokens/s", more_is_better=True),
        best_of(f"{key}.packed", packed, "tokens/s", more_is_better=True),
        best_of(f"{key}.cpu", best("cpu"), "tokens/CPU-s", more_is_better=True),
        best_of(f"{key}.memory", {side: one.memory for side, one in fastest.items()}, "MB", more_is_better=False),
        rate_row(f"{key}.packing", packed["ours"], one["ours"], "tokens/s packed against one after another, both ours"),
    ]


def measure_speed(key: str, case: Case, steps: int, repeats: int, compiled: bool) -> list[Row]:
    """Every setting of every side."""
    found = {}
    with tempfile.TemporaryDirectory() as room:
        export_weights(case, Path(room, "weights"))
        for precision, compile_ in itertools.product(("fp32", "bf16"), (False, True) if compiled else (False,)):
            name = precision + "+compile" * compile_
            setting = dataclasses.replace(case, precision=precision, compile=compile_)
            found[name] = speed(setting, steps, repeats, Path(room, "weights"))
            print(f"{key} {name}: {found[name]}", file=sys.stderr)
    return speed_rows(key, found)


def calibration_rows(key: str, case: Case) -> Iterator[Row]:
    """The chosen setting's speed and that of the best, both from a second timing of everything but the compiler."""
    config = ProxiesConfig(calibrate=("precision", "micro_batch_size"))
    proxy = dataclasses.replace(case.config, precision="auto")
    changes = [{}, *(change for _, change in variants(proxy, config.calibrate, cuda=False))]
    with Crew(proxy, case.vocab_size) as crew:
        chosen, _ = search_settings(crew, proxy, config, SEARCH_TOKENS, cores())
        base = Setting(1, 1, "fp32", False, proxy.batch.micro_batch_size)
        merged = [{**first, **second} for first in changes for second in changes]
        grid = {
            dataclasses.replace(base, threads=t, workers=n, **c) for t, n in packings(cores(), config) for c in merged
        }
        rates = {setting: crew.time(setting).undisturbed for setting in sorted({*grid, chosen}, key=str)}
    best = max(rates, key=rates.__getitem__)
    print(f"{key}: chosen {chosen}, best of {len(rates)} {best}", file=sys.stderr)
    yield rate_row(key, rates[chosen], rates[best], f"tokens/s, chosen against the best of {len(rates)}")


def run(keys: Sequence[str] = KEYS, repeats: int = 5, steps: int = 60, compiled: bool = False) -> list[Row]:
    """These keys as rows."""
    rows: list[Row] = []
    for key in keys:
        kind, _, name = key.partition(".")
        case, lap = CASES[name or "demo"]
        if kind == "speed":
            rows += measure_speed(key, case, lap, repeats, compiled)
        elif kind == "calibration":
            rows += calibration_rows(key, case)
        else:
            rows += start_rows(case, repeats) if kind == "start" else sweep_rows(case, steps)
        print(f"{key}: load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs", file=sys.stderr)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--only", default=",".join(KEYS), help="what to measure, with commas between")
    parser.add_argument("--repeats", type=int, default=5, help="measured laps or starts of each side")
    parser.add_argument("--steps", type=int, default=60, help="of a proxy in the sweep")
    parser.add_argument("--compile", action="store_true", help="all sides compiled too: a minute each")
    args = parser.parse_args(argv)
    rows = run(pick_keys(parser, args.only, KEYS), args.repeats, args.steps, args.compile)
    print_rows(rows, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
