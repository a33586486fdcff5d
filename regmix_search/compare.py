"""The stage `compare`: one model trained on several mixtures with several seeds each, and how they differ.

It needs shards, mixture files and a size, and no search. A mixture with a seed is a trial of a ledger, so it runs where
proxies run (cores, GPUs, Slurm, Ray), is never repeated, and more mixtures or seeds may be added later.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.config import to_dict
from megatron_lite.files import atomic_write_json
from regmix_search.config import FitConfig, SearchConfig
from regmix_search.drivers import Driver
from regmix_search.freshness import Stage, read_json
from regmix_search.inventory import Inventory
from regmix_search.ledger import Ledger, Trial, replay
from regmix_search.progress import Progress
from regmix_search.retrain import main_threads
from regmix_search.search import Search

MOST = 100  # mixtures in one folder: t0203 is the fourth mixture with the third seed
KNOWN = "compared.json"  # which mixture has which number, so that another list of them keeps what is trained


@dataclass(frozen=True)
class Entry:
    """A mixture that is compared: what it is called, weights above 0 by domain, how often each domain is read."""

    name: str
    path: str
    weights: dict[str, float]
    epochs: dict[str, float]


def place(config: SearchConfig, paths: Sequence[Path], out: str | None) -> SearchConfig:
    """The config with the shards' folder and the comparison's own filled in.

    Shards: shards.data_dir, or the data_dir that the files name, or the search's. Folder: ``out``, or `compare` in the
    search's. ValueError for fewer than two files, for others than .yaml, where their data_dir differ, and for a folder
    that holds a search.
    """
    from megatron_lite.data.mixture_file import read_yaml

    other = [str(path) for path in paths if path.suffix not in (".yaml", ".yml")]
    if len(paths) < 2 or other or len(set(paths)) < len(paths):
        given = f"; {', '.join(other)} is none" if other else ""
        raise ValueError(f"--stage compare: name two or more mixture.yaml, each once, after --mixtures{given}")
    written = {path: read_yaml(str(path)).get("data_dir") for path in paths}
    named = {str((path.parent / text).resolve()) for path, text in written.items() if text}
    folder = config.shards.data_dir
    if folder is None and len(named) > 1:
        raise ValueError(f"--mixtures: they name the shards of {' and of '.join(sorted(named))}: set shards.data_dir")
    folder = folder or next(iter(named), None) or str(config.run_dir / "shards")
    placed = dataclasses.replace(config, out_dir=out or str(config.run_dir / "compare"), method="regmix")
    if (placed.run_dir / "trials.jsonl").is_file() and not (placed.run_dir / KNOWN).is_file():
        raise ValueError(f"{placed.run_dir}: holds a search; name another folder for the comparison with --out DIR")
    return dataclasses.replace(placed, shards=dataclasses.replace(config.shards, data_dir=folder))


def compare(search: Search, paths: Sequence[Path]) -> Stage:
    """compare.json, compare.md and compare.html: losses of every mixture and seed, and differences to the first."""
    entries, out, config = read_entries(search, paths), search.out, search.config

    def make() -> str:
        from regmix_search.report.compare import describe_outcome, summarise, write_page

        search.say(describe_mixtures(entries, search.inventory))
        trials = plan_trials(search, entries)
        with Driver(out / "drivers") as driver:
            ledger = _train_all(search, entries, trials, driver)
        content = summarise(search, entries, trials, ledger)
        atomic_write_json(out / "compare.json", content)
        write_page(out, content)
        return describe_outcome(content)

    inputs = {
        **_fingerprint(search),
        "mixtures": [[entry.name, entry.weights] for entry in entries],
        "seeds": [config.seed, config.train.seeds],
        "retries": config.proxies.retries,
    }
    names = ("compare.json", "compare.md", "compare.html", "trials.jsonl")
    return Stage("compare", inputs, tuple(out / name for name in names), make)


def read_outcome(out: Path) -> str:
    """What a finished comparison found, as the console shows it."""
    from regmix_search.report.compare import describe_outcome

    return describe_outcome(read_json(out / "compare.json"))


def join(search: Search, paths: Sequence[Path]) -> str:
    """Trains models of a comparison that another process leads, on this machine or another, until none waits."""
    entries = read_entries(search, paths)
    with Driver(search.out / "drivers", joined=True) as driver:
        ledger = _train_all(search, entries, plan_trials(search, entries, new=False), driver)
    mine = sum(event.get("driver") == driver.id for event in ledger.finished.values())
    return f"compare: {len(ledger.finished)} of {len(ledger.trials)} done, {mine} of them by this driver"


def describe(search: Search, paths: Sequence[Path]) -> str:
    """The plan as text, for --dry-run: mixtures, epochs, what one run is, what all cost. Nothing is written."""
    from regmix_search.budget import model_lines

    entries, inventory = read_entries(search, paths), search.inventory
    known = _numbers(search.out)
    wanted = {i for entry in entries if (i := _find(known, entry)) is not None}
    seeds = search.config.train.seeds
    done = sum(t % MOST in wanted and t // MOST < seeds for t in replay(search.out / "trials.jsonl").finished)
    lines = [f"compare -> {search.out}: dry run", describe_mixtures(entries, inventory)]
    return "\n".join(lines + model_lines(search, inventory, [entry.name for entry in entries], done))


def read_entries(search: Search, paths: Sequence[Path]) -> list[Entry]:
    """The mixtures, checked as a run of train.main would check them before its first step.

    ValueError for domains that the shards do not have, shards of a mixture's own, domains too small for a sample, and
    domains that would be read more often than the file's max_epochs, or mixtures.max_epochs where it says nothing.
    """
    inventory, names, main = search.inventory, name_files(paths), search.config.train.main
    for key in ("phases", "reweighting"):
        if getattr(main, key):
            raise ValueError(
                f"train.main.{key}: a comparison trains on one mixture from beginning to end; leave it out"
            )
    if not inventory.valid:
        raise ValueError(f"{inventory.folder}: no valid_* shards: there is nothing to compare models on")
    if search.config.fit.target not in ("mean", FitConfig().target, *inventory.valid):
        try:
            inventory.check_target("fit.target", search.config.fit.target)
        except ValueError as error:
            raise ValueError(f"{error}; --target mean: the average over all sets alone") from None
    return [_read_entry(search, inventory, path, name) for path, name in zip(paths, names, strict=True)]


def name_files(paths: Sequence[Path]) -> list[str]:
    """What to call mixtures: a file's stem, with as many folders before it as tell it from the others."""
    parts = [path.resolve().with_suffix("").parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"--mixtures: {', '.join(map(str, paths))}: one file is given twice")


def _read_entry(search: Search, inventory: Inventory, path: Path, name: str) -> Entry:
    from megatron_lite.data.mixture import Mixture

    mixture, config = Mixture.load(path, inventory.folder), search.config
    for domain in mixture.domains:
        own = str(inventory.train[domain.name].prefix.absolute()) if domain.name in inventory.train else ""
        if domain.weight > 0 and domain.prefixes != (own,):
            raise ValueError(
                f"{path}: train_{domain.name} names shards by path; compare mixes the train_* of {inventory.folder}: "
                "merge them there (data_tools/merge_data.py) or link them under that name"
            )
    limits = [domain.max_epochs or config.mixtures.max_epochs for domain in mixture.domains]
    capped = [dataclasses.replace(d, max_epochs=limit) for d, limit in zip(mixture.domains, limits, strict=True)]
    _check_run(search, dataclasses.replace(mixture, domains=tuple(capped)))
    # in one order for all, whatever the files' is: then runs of one seed differ in their weights alone
    weights = {domain.name: domain.weight for domain in sorted(mixture.domains, key=lambda d: d.name) if domain.weight}
    budget = config.train.main.schedule.total_tokens
    epochs = {domain: weight * budget / inventory.train[domain].tokens for domain, weight in weights.items()}
    return Entry(name, str(path), weights, epochs)


def _check_run(search: Search, mixture: Any) -> None:
    """What a run would refuse of this mixture; the error names its file."""
    import torch

    from megatron_lite import run
    from megatron_lite.mesh import Mesh

    try:
        run.resolve(search.config.train.main, mixture, Mesh(0, 1, torch.device("cpu")))  # wherever the models will run
    except ValueError as error:
        text = str(error).replace("raise max_epochs", "raise max_epochs (mixtures.max_epochs, or the file's)")
        raise ValueError(text if text.startswith(mixture.path) else f"{mixture.path}: {text}") from None


def describe_mixtures(entries: Sequence[Entry], inventory: Inventory) -> str:
    """Weights and epochs of every mixture, a line a domain."""
    domains = sorted({domain for entry in entries for domain in entry.weights})
    wide = max(18, *(len(entry.name) + 2 for entry in entries))
    lines = [f"  {'domain':<24} {'tokens':>16}" + "".join(f"{entry.name:>{wide}}" for entry in entries)]
    for domain in domains:
        shares = [f"{e.weights.get(domain, 0):.2%} {e.epochs.get(domain, 0):>6.3g} ep" for e in entries]
        lines.append(
            f"  {domain:<24} {inventory.train[domain].tokens:>16,}" + "".join(f"{text:>{wide}}" for text in shares)
        )
    return "\n".join(["mixtures, and how often each reads a domain:", *lines])


def plan_trials(search: Search, entries: Sequence[Entry], new: bool = True) -> list[Trial]:
    """Every mixture with every seed, seed by seed, so that an early stop leaves a fair comparison.

    A mixture keeps the number that it got first. ``new``: give numbers to mixtures that have none, and write them.
    """
    known = _numbers(search.out)
    fresh = [[entry.name, entry.weights] for entry in entries if _find(known, entry) is None]
    if fresh and not new:
        raise ValueError(f"{search.out}: {fresh[0][0]} is not compared there yet; start it without --join first")
    if len(known) + len(fresh) > MOST:
        raise ValueError(f"{search.out}: {len(known) + len(fresh)} mixtures, at most {MOST} in one folder; use another")
    if fresh:
        search.out.mkdir(parents=True, exist_ok=True)
        atomic_write_json(search.out / KNOWN, known := known + fresh)
    numbers = [_find(known, entry) or 0 for entry in entries]
    trials = [
        Trial(seed * MOST + number, "train", entry.weights, search.config.seed + seed)
        for seed in range(search.config.train.seeds)
        for number, entry in zip(numbers, entries, strict=True)
    ]
    if new:
        _write_table(search.out / "mixtures.csv", trials)
    return trials


def _write_table(path: Path, trials: Sequence[Trial]) -> None:
    """mixtures.csv, a row a trial, as a search has it: with trials.jsonl it is what --stage status reads."""
    import numpy as np

    from regmix_search.tables import write_mixtures

    domains = sorted({domain for trial in trials for domain in trial.weights})
    rows = np.array([[trial.weights.get(domain, 0.0) for domain in domains] for trial in trials])
    write_mixtures(path, [trial.index for trial in trials], domains, rows)


def _numbers(out: Path) -> list[list[Any]]:
    """[name, weights] of the mixtures that were compared in this folder; the place is the number."""
    path = out / KNOWN
    found: list[list[Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return found


def _find(known: list[list[Any]], entry: Entry) -> int | None:
    return next((i for i, one in enumerate(known) if one == [entry.name, entry.weights]), None)


def _fingerprint(search: Search) -> dict[str, Any]:
    """What all losses of a comparison have in common; the ledger refuses trials of another."""
    from megatron_lite.resume import identity

    main = to_dict(dataclasses.replace(search.config.train.main, seed=0))
    return {"main": identity(main), "eval": main["eval"], "shards": search.inventory.digest}


def _train_all(search: Search, entries: Sequence[Entry], trials: Sequence[Trial], driver: Driver) -> Ledger:
    """Trains what is not finished, beside other drivers of the same ledger."""
    from regmix_search.proxies import ProxyTraining, build_executor, run_trials

    config, out, threads = search.config, search.out, main_threads(search)
    ledger = Ledger(out / "trials.jsonl", trials, _fingerprint(search), config.proxies.retries, driver)
    log = dataclasses.replace(config.train.main.log, console=False)
    main = dataclasses.replace(config.train.main, threads=threads, log=log)
    function = ProxyTraining(main, str(search.shards_dir.resolve()), tuple(search.inventory.valid), str(_models(out)))
    executor = build_executor(function, config.proxies, config.train.workers, threads, out, driver.path)
    with (
        Progress("models", search.stream) as progress,
        closing(run_trials(ledger, executor, progress)) as outcomes,
    ):
        for _ in outcomes:
            _show(progress, entries, trials, ledger)
    return ledger


def _models(out: Path) -> Path:
    return out.resolve() / "models"


def _show(progress: Progress, entries: Sequence[Entry], trials: Sequence[Trial], ledger: Ledger) -> None:
    """A row of the live table for every mixture: its average loss so far."""
    from regmix_search.report.compare import average

    for number, entry in enumerate(entries):
        mine = [trial.index for trial in trials[number :: len(entries)]]
        done = [average(ledger.finished[i]["losses"]) for i in mine if i in ledger.finished]
        if done:
            progress.rows[entry.name] = f"{sum(done) / len(done):.4f} ({len(done)} of {len(mine)})"
