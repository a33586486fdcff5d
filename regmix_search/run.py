"""Finds a data mixture: raw text -> proxies -> surrogate -> optimal weights -> the model trained on them -> report.

    python -m regmix_search.run --config configs/search/demo.yaml
    python -m regmix_search.run --config configs/search/demo.yaml --dry-run
    python -m regmix_search.run --config configs/search/demo.yaml --stage proxies --set mixtures.count=128
    python -m regmix_search.run --config runs/demo/config.yaml --join
    python -m regmix_search.run --stage status --out runs/demo
    python -m regmix_search.run --stage fit --mixtures M.csv --losses L.csv --target pile_cc --out DIR --json
    python -m regmix_search.run --stage optimize --mixtures M.csv --losses L.csv --target mean --out DIR
    python -m regmix_search.run --stage scales --scale 1M=1.3e6,1e9,M1.csv,L1.csv --scale 60M=59e6,1e9,M2.csv,L2.csv \
        --target-scale 1.1e9,26e9 --target pile_cc --out DIR
    python -m regmix_search.run --stage compare --mixtures human.yaml regmix.yaml --set shards.data_dir=shards --out DIR

Every stage may be interrupted and run again: what is finished is never repeated, and a stage whose inputs have not
changed does nothing. `fit`, `optimize` and `scales` need no training and no shards: they work from RegMix's two CSV
files, Olmix's ratios.csv and metrics.csv, or another search's trials.jsonl. `compare` needs shards and no search: it
trains train.main on every mixture with train.seeds seeds, and reports differences to the first with intervals.

Exit codes: 0 done, 2 a mistake in settings or data, 130 interrupted (the same command goes on from there).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megatron_lite.config import dump
from megatron_lite.files import atomic_write, folder_lock
from megatron_lite.plan import duration
from regmix_search import compare, retrain, sources, stages
from regmix_search.calibration import read_proxy
from regmix_search.config import SearchConfig, load_search
from regmix_search.fingerprint import settings
from regmix_search.freshness import Outcome, Stage, bring_up_to_date, read_json
from regmix_search.ledger import check_fingerprint
from regmix_search.search import Search

TABLES = (
    ("--mixtures", "CSV", "weights: index,train_<domain>,... (RegMix), run,<domain>,... (Olmix), or a trials.jsonl"),
    ("--losses", "CSV", "losses: index,metric/<name>_val_loss,... or run,<metric>,...; not with a trials.jsonl"),
    ("--test-mixtures", "CSV", "runs that are only scored, never fitted"),
    ("--test-losses", "CSV", "their losses"),
    ("--earlier-mixtures", "CSV", "fitted too: runs from before there were some domains, which had weight 0 then"),
    ("--earlier-losses", "CSV", "their losses"),
    ("--space", "FILE", "a search's space.json, {tokens: {domain: n}, target_tokens: n}, or a mixture.yaml: the prior"),
)
ORDER = ("corpus", "tokenizer", "shards", "mixtures", "proxies", "fit", "optimize", "scales", "train", "report")
DOREMI = ("corpus", "tokenizer", "shards", "doremi", "train", "report")  # method: doremi


def build_parser() -> argparse.ArgumentParser:
    """The command line; everything else is in the config."""
    parser = argparse.ArgumentParser(
        prog="python -m regmix_search.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file; every key has a default (--print-config shows them)")
    parser.add_argument("--preset", metavar="NAME", help="NAME.yaml beside the config instead of it, e.g. smoke")
    stages = ("all", *ORDER, "doremi", "compare", "status")
    parser.add_argument("--stage", choices=stages, default="all", help="one of them (default: all); status only looks")
    parser.add_argument("--join", action="store_true", help="train proxies of a search that runs here or elsewhere")
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="A.B=C", help="override keys; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, tokens, FLOPs and time, and stop")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as YAML, and stop")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; the messages go to stderr")
    tables = parser.add_argument_group("fit and optimize without training")
    for flag, metavar, text in TABLES:
        if flag == "--mixtures":
            text += "; --stage compare: several mixture.yaml, the others against the first"
        tables.add_argument(flag, metavar=metavar, type=Path, nargs="+" if flag == "--mixtures" else None, help=text)
    tables.add_argument("--limit", metavar="N", type=int, help="fit on N of the runs, drawn by the seed")
    short = parser.add_argument_group("short for a key")
    short.add_argument("--target", metavar="NAME", help="fit.target: a loss, a=0.5,b=0.5, mean or worst (of all)")
    short.add_argument("--surrogate", metavar="NAME", help="fit.surrogates: one name, or auto to choose among all")
    short.add_argument("--until-precise", action="store_true", help="proxies.until_precise: stop when it is settled")
    short.add_argument("--seed", metavar="S", type=int, help="seed")
    short.add_argument("--scale", metavar="NAME=...", action="append", help="scales.runs, one of them; repeatable")
    short.add_argument("--target-scale", metavar="PARAMS,TOKENS", help="scales.target")
    short.add_argument("--out", metavar="DIR", help="out_dir, the search's folder")
    return parser


def read_config(args: argparse.Namespace) -> SearchConfig:
    """--config or --preset, then --set, then the flags that are short for a key."""
    flags = {"out_dir": args.out, "fit.target": args.target, "seed": args.seed}
    flags |= {"proxies.until_precise": args.until_precise or None}
    flags |= {"scales.runs": args.scale, "scales.target": args.target_scale}
    if args.surrogate is not None:
        flags["fit.surrogates"] = [] if args.surrogate == "auto" else [args.surrogate]
    overrides = args.set + [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    config = load_search(args.config, args.preset, tuple(overrides))
    return compare.place(config, args.mixtures or [], args.out) if args.stage == "compare" else config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        config = read_config(args)
        if args.stage == "status":
            from regmix_search.status import describe_status, read_status

            status = read_status(config.run_dir)
            print(json.dumps(status) if args.json else describe_status(status))
            return 0
        if args.print_config:
            print(dump(config), end="")
            return 0
        search = Search(config, sys.stderr if args.json else sys.stdout)
        if args.dry_run:
            from regmix_search import budget, doremi

            plan = (doremi if config.method == "doremi" else budget).describe
            print(compare.describe(search, args.mixtures) if args.stage == "compare" else plan(search))
            return 0
        if args.join:
            search.say(compare.join(search, args.mixtures) if args.stage == "compare" else stages.join(search))
            return 0
        return _run(search, args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr, flush=True)
        return 130


def run_search(search: Search, builders: Iterable[Callable[[], Stage | None]]) -> list[Outcome]:
    """Brings stages up to date in order, one line each; a builder that gives None has nothing to do here."""
    outcomes = []
    for build in builders:
        stage = build()
        if stage is None:
            continue
        outcome = bring_up_to_date(stage, search.out / "stages")
        outcomes.append(outcome)
        took = f"{duration(outcome.seconds)}, " if outcome.ran else ""
        search.say(f"{stage.name}: {took}{outcome.summary}")
    return outcomes


def _run(search: Search, args: argparse.Namespace) -> int:
    start = time.perf_counter()
    with _lock(search):
        builders = _builders(search, args)
        if not args.mixtures:
            # before anything is made anew: shards of other text would be of no use to the trials that are there
            check_fingerprint(search.out / "trials.jsonl", settings(search.config, read_proxy(search)))
        atomic_write(search.out / "config.yaml", dump(search.config))
        outcomes = run_search(search, builders)
    seconds = time.perf_counter() - start
    if args.stage == "compare" and not outcomes[-1].ran:
        search.say(compare.read_outcome(search.out))
    report = search.out / ("compare.html" if args.stage == "compare" else "report.html")
    where = f"report in {report}" if report.is_file() else f"results in {search.out}"
    search.say(f"{search.config.name}: {duration(seconds)}, {where}")
    if args.json:
        print(json.dumps(_summary(search, args, outcomes, seconds)))
    return 0


@contextmanager
def _lock(search: Search) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(search.out))
        except ValueError as error:
            raise ValueError(f"{error}; or train proxies beside it: --join") from None
        yield


def _builders(search: Search, args: argparse.Namespace) -> list[Callable[[], Stage | None]]:
    """What the command line asks for, in order."""
    if args.stage == "scales" and not args.mixtures:
        if not search.config.scales.runs:
            raise ValueError("--stage scales: name runs of other sizes with --scale NAME=... or scales.runs")
        if not (args.out or args.config):
            raise ValueError("--scale: name a folder for the results with --out DIR")
        return [lambda: _scales(search, args.space)]
    tables = [getattr(args, flag.strip("-").replace("-", "_")) for flag, _, _ in TABLES]
    if args.stage == "compare":
        if any(tables[1:]) or args.limit is not None:
            raise ValueError("--stage compare takes mixture.yaml files after --mixtures, and no other tables")
        return [lambda: compare.compare(search, args.mixtures)]
    if any(tables) or args.limit is not None:
        return _table_builders(search, args)
    build: dict[str, Callable[[Search], Stage | None]] = {
        "corpus": sources.corpus,
        "tokenizer": sources.tokenizer,
        "shards": sources.shards,
        "mixtures": stages.mixtures,
        "proxies": stages.proxies,
        "fit": stages.fit,
        "optimize": stages.optimize,
        "scales": _scales,
        "doremi": _doremi,
        "train": retrain.train,
        "report": _doremi_report if search.config.method == "doremi" else stages.report,
    }
    order = DOREMI if search.config.method == "doremi" else ORDER
    if args.stage not in ("all", *order):
        raise ValueError(f"--stage {args.stage}: method={search.config.method} has the stages {', '.join(order)}")
    names = order if args.stage == "all" else (args.stage,)
    return [lambda name=name: build[name](search) for name in names]  # type: ignore[misc]


def _scales(search: Search, space: Path | None = None) -> Stage | None:
    from regmix_search.scale_stage import scales  # numpy: --help starts without it

    return scales(search, space)


def _doremi(search: Search) -> Stage:
    from regmix_search.doremi import doremi  # numpy: --help starts without it

    return doremi(search)


def _doremi_report(search: Search) -> Stage:
    from regmix_search.report.doremi import report

    return report(search)


def _table_builders(search: Search, args: argparse.Namespace) -> list[Callable[[], Stage | None]]:
    mixtures = args.mixtures[0] if args.mixtures else None
    if len(args.mixtures or []) > 1 or (mixtures and mixtures.suffix in (".yaml", ".yml")):
        raise ValueError("--mixtures: one table of runs here; mixture.yaml files go with --stage compare")
    ledger = mixtures is not None and mixtures.suffix == ".jsonl"
    if args.stage not in ("fit", "optimize") or mixtures is None or not (args.losses or ledger):
        raise ValueError("--mixtures and --losses go together, with --stage fit or --stage optimize")
    for kind in ("test", "earlier"):
        weights, losses = getattr(args, f"{kind}_mixtures"), getattr(args, f"{kind}_losses")
        if bool(weights) != bool(losses) and (weights or Path()).suffix != ".jsonl":
            raise ValueError(f"--{kind}-mixtures and --{kind}-losses go together")
    if not (args.out or args.config):
        raise ValueError("--mixtures: name a folder for the results with --out DIR")
    if not (args.target or args.config or any(s.startswith("fit.target=") for s in args.set)):
        raise ValueError("--target: name the loss to minimise (or mean, worst, a=0.5,b=0.5)")
    from regmix_search import study
    from regmix_search.study_files import StudyFiles

    tests, earlier = (args.test_mixtures, args.test_losses), (args.earlier_mixtures, args.earlier_losses)
    files = StudyFiles(mixtures, args.losses, *tests, args.limit, args.space, *earlier)
    fit = [lambda: study.fit_stage(search.config, files)]
    if args.stage == "fit":
        return [*fit]
    return [*fit, lambda: study.optimize_stage(search.config, files), lambda: study.report_stage(search.config)]


def _summary(search: Search, args: argparse.Namespace, outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """What --json prints: about a fit from tables its scores, about an optimum or scales all of their files."""
    done = [{"stage": o.stage, "ran": o.ran, "seconds": round(o.seconds, 3), "summary": o.summary} for o in outcomes]
    made = {
        name: str(search.out / name)
        for name in ("mixture.yaml", "doremi.json", "optimum.json", "fit.json", "report.html")
    }
    files = {name: path for name, path in made.items() if Path(path).is_file()}
    if args.stage == "compare":
        return {**read_json(search.out / "compare.json"), "stage_seconds": seconds, "stages": done}
    if args.mixtures:
        scores = read_json(search.out / "fit.json")["summary"]
        if args.stage == "fit":
            return {**scores, "files": files}
        return {**read_json(search.out / "optimum.json"), "fit": scores, "seconds": seconds, "files": files}
    if args.stage == "scales":
        return {**read_json(search.out / "scales.json"), "seconds": seconds}
    reuse = {"reuse": read_json(search.out / "reuse.json")} if (search.out / "reuse.json").is_file() else {}
    facts = {"name": search.config.name, "out_dir": str(search.out), "seconds": seconds, **reuse}
    return {**facts, "stages": done, "files": files}


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # a scheduler's way to say Ctrl-C
    sys.exit(main())
