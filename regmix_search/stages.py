"""The stages of a search from shards to a report: each says what it makes from what, and does it when asked."""

from __future__ import annotations

import dataclasses
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron_lite.files import atomic_write_json
from regmix_search.calibration import Calibration, calibrate, read_proxy
from regmix_search.drivers import Driver
from regmix_search.fingerprint import settings
from regmix_search.freshness import Stage, digest, read_json, read_record
from regmix_search.ledger import Kind, Ledger, Trial, replay
from regmix_search.progress import Progress
from regmix_search.repetition import exposure, proxy_shards, with_epochs
from regmix_search.search import Search

JOIN_POLL = 2.0  # seconds between looks at whether the leader has more proxies


def mixtures(search: Search) -> Stage:
    """mixtures.csv and space.json: repeats of the prior, then held-back mixtures, then those to fit on.

    In this order a search can be extended: the first mixtures do not depend on ``mixtures.count`` (without a design).
    Rounds append to mixtures.csv later, so then design.csv is what this stage answers for.
    """
    config, seed, out = search.config.mixtures, search.config.seed, search.out
    tokens, left_out = search.inventory.usable(config.domains, search.sample_tokens)
    first = out / ("design.csv" if config.rounds else "mixtures.csv")

    def make() -> str:
        import numpy as np

        from regmix_search.designs import draw_design
        from regmix_search.fits import check_enough
        from regmix_search.reuse import take_over
        from regmix_search.rounds import continues
        from regmix_search.space import build_space, controls, sample_mixtures
        from regmix_search.tables import write_mixtures

        space = build_space(tokens, search.config.run_tokens, config.max_epochs)
        kept = take_over(search, space)
        small = space if kept is None else kept.space(space)
        # before the proxies are trained rather than after
        check_enough(config.count + config.rounds * config.batch + bool(config.repeats), len(small.domains))
        shape = (config.temperature, config.min_strength, config.max_strength, config.minimum, config.over_cap)
        prior, held = np.tile(controls(space)["prior"], (config.repeats, 1)), np.empty((0, len(small.domains)))
        if config.holdout:
            held = sample_mixtures(small, config.holdout, seed, *shape)
        known = prior if kept is None else kept.reduce(prior)
        drawn = draw_design(small, config.count, seed, config.design, *shape, given=known, skip=config.holdout)
        drawn = np.vstack([held, drawn])
        rows = np.vstack([prior, drawn if kept is None else kept.expand(drawn)])
        write_mixtures(first, range(len(rows)), space.domains, rows)
        if config.rounds and not continues(out / "mixtures.csv", space.domains, rows):
            write_mixtures(out / "mixtures.csv", range(len(rows)), space.domains, rows)
        atomic_write_json(out / "space.json", space.to_json())
        what = f"{config.count} to fit on, {config.holdout} held back, {config.repeats} x the prior"
        few = f"; left out, too little text: {', '.join(left_out)}" if left_out else ""
        more = f", then {config.rounds} rounds of {config.batch}" if config.rounds else ""
        total = config.count + config.holdout + config.repeats
        return f"{total} mixtures of {len(small.domains)} domains: {what}{more}{few}"

    inputs = {**dataclasses.asdict(config), "seed": seed, "run_tokens": search.config.run_tokens, "tokens": tokens}
    if search.config.reuse.earlier is not None:
        from regmix_search.reuse import reuse_inputs

        inputs["reuse"] = reuse_inputs(search)
    return Stage("mixtures", inputs, (first, out / "space.json"), make)


def plan_trials(search: Search) -> list[Trial]:
    """The proxies that mixtures.csv asks for: repeats of the prior with seeds of their own, the rest with one seed."""
    from regmix_search.tables import read_mixtures

    config, path = search.config.mixtures, search.out / "mixtures.csv"
    digest(path, "mixtures")
    index, domains, rows = read_mixtures(path)
    planned = config.repeats + config.holdout + config.count
    more = len(index) - planned  # what rounds have added
    if more < 0 or (more and not config.rounds):
        raise ValueError(
            f"{path}: has {len(index)} mixtures, mixtures.repeats + holdout + count is "
            f"{planned}; run `--stage mixtures` again"
        )
    train = config.count + more
    shares: list[tuple[Kind, int]] = [("repeat", config.repeats), ("holdout", config.holdout), ("train", train)]
    kinds = [kind for kind, count in shares for _ in range(count)]
    seeds = [search.config.seed + 1 + i if kind == "repeat" else search.config.seed for i, kind in enumerate(kinds)]
    weights = [dict(zip(domains, row, strict=True)) for row in rows.tolist()]
    return [Trial(*facts) for facts in zip(map(int, index), kinds, weights, seeds, strict=True)]


def proxies(search: Search) -> Stage:
    """losses.csv: every mixture trained and scored on the validation sets, the test target excepted."""
    config, out, inventory = search.config, search.out, search.inventory
    search.goal_losses(inventory)  # refuses losses that will not be measured
    if config.fit.target_test is not None:
        inventory.check_target("fit.target_test", config.fit.target_test)
    rounds, fingerprint = config.mixtures.rounds, _fingerprint(search)
    plan_trials(search)  # refuses a table of other settings before anything starts

    def make() -> str:
        from regmix_search.budget import proxy_lines

        search.say("\n".join(proxy_lines(search, inventory)))
        with Driver(out / "drivers") as driver:
            ledger = train_planned(search, driver)
            while rounds and not ledger.stopped:
                from regmix_search.rounds import add_round

                text, grown = add_round(search)
                search.say(text)
                if not grown:
                    break
                ledger = train_planned(search, driver)
        # by domain, so that a later search can tell what has changed
        atomic_write_json(out / "inventory.json", {**inventory.contents, "tokenizer": inventory.tokenizer})
        done, total = ledger.finished.values(), len(ledger.trials)
        early = sum("stopped" in event for event in done)
        ended = f", {early} of them ended early" if early else ""
        stopped = f"; no more: {read_record(out / 'early.json')['stopped']}" if ledger.stopped else ""
        failed = "".join(f"\n  failed for good: trial {i}: {reason}" for i, reason in ledger.failed.items())
        scored = [event for event in done if "eval_seconds" in event]
        seconds, scoring = (sum(event[key] for event in scored) for key in ("seconds", "eval_seconds"))
        cost = f", evaluation took {scoring / max(seconds - scoring, 1e-9):.1%} of the training" if scored else ""
        tokens = f"{sum(event['tokens'] for event in done):,} tokens"
        return f"{len(done)} of {total} done{ended}, {tokens}{cost}{stopped}{failed}"

    inputs = {**fingerprint, "retries": config.proxies.retries}
    if config.proxies.until_precise:  # what it means that the optimum is settled
        inputs["until_precise"] = [dataclasses.asdict(config.fit), dataclasses.asdict(config.optimum)]
    if not rounds:
        inputs["mixtures"] = digest(out / "mixtures.csv", "mixtures")
        return Stage("proxies", inputs, (out / "trials.jsonl", out / "losses.csv"), make)
    keys = ("rounds", "batch", "max_flops")
    inputs |= {"mixtures": digest(out / "design.csv", "mixtures"), "target": config.fit.target}
    inputs |= {key: getattr(config.mixtures, key) for key in keys}
    outputs = (out / "trials.jsonl", out / "losses.csv", out / "mixtures.csv", out / "rounds.json")
    return Stage("proxies", inputs, outputs, make)


def train_planned(search: Search, driver: Driver) -> Ledger:
    """Trains what mixtures.csv asks for and is not finished, beside other drivers of the same ledger."""
    from regmix_search.proxies import ProxyTraining, build_executor, run_trials
    from regmix_search.results import Results

    config, out, path = search.config, search.out, search.out / "trials.jsonl"
    ledger = Ledger(path, plan_trials(search), _fingerprint(search), config.proxies.retries, driver)
    for line in ledger.torn_lines:
        search.say(f"{path}, line {line}: torn by a crash, skipped")
    log = dataclasses.replace(config.proxy.log, console=False)
    how = _calibration(search).setting
    proxy = dataclasses.replace(how.apply(config.proxy), log=log)
    shards, valid = str(proxy_shards(search).resolve()), _scored(search)
    hopeless = config.proxies.stop_hopeless
    function = ProxyTraining(proxy, shards, valid, str(out.resolve() / "proxies"), hopeless)
    executor = build_executor(function, config.proxies, how.workers, how.threads, out, driver.path)
    with (
        Progress("proxies", search.stream) as progress,
        Results(search, ledger, valid, progress) as results,
        closing(run_trials(ledger, executor, progress)) as outcomes,
    ):
        for _ in outcomes:
            results.update()
    if not ledger.finished:
        raise ValueError(f"{path}: no proxy succeeded: {next(iter(ledger.failed.values()))}")
    return ledger


def join(search: Search) -> str:
    """Trains proxies of a search that another process leads, on this machine or another, until it needs no more."""
    with Driver(search.out / "drivers", joined=True) as driver:
        grown = True
        while grown:
            ledger = train_planned(search, driver)
            while not (grown := len(plan_trials(search)) > len(ledger.trials)) and driver.led():
                time.sleep(JOIN_POLL)  # the leader may be at its next round
    mine = sum(event.get("driver") == driver.id for event in ledger.finished.values())
    return f"proxies: {len(ledger.finished)} of {len(ledger.trials)} done, {mine} of them by this driver"


def _fingerprint(search: Search) -> dict[str, Any]:
    settled = read_proxy(search) or _calibration(search).setting.apply(search.config.proxy)
    return {**settings(search.config, settled), "shards": search.inventory.digest}


def _calibration(search: Search) -> Calibration:
    from regmix_search.budget import vocabulary

    return calibrate(search, vocabulary(search, search.inventory))


def _scored(search: Search) -> tuple[str, ...]:
    return tuple(name for name in search.inventory.valid if name != search.config.fit.target_test)


def _earlier(out: Path) -> dict[str, str]:
    """Digests of what was taken over from an earlier search; empty without one."""
    names = ("reuse.json", "earlier_mixtures.csv", "earlier_losses.csv")
    return {name: digest(out / name, "mixtures") for name in names if (out / name).is_file()}


def fit(search: Search) -> Stage:
    """fit.json: a surrogate for every validation loss, chosen by cross-validation, judged on the held-back proxies."""
    out = search.out

    def make() -> str:
        from regmix_search.reuse import search_runs
        from regmix_search.solution import fit_runs
        from regmix_search.unigram import unigram_doubts

        runs, finished = with_epochs(search, search_runs(out)), replay(out / "trials.jsonl").finished
        held = [i for i in runs.index if isinstance(i, int) and finished.get(i, {}).get("kind") == "holdout"]
        return fit_runs(out, runs, held, search.config, unigram_doubts(search, runs))

    inputs = {**dataclasses.asdict(search.config.fit), "seed": search.config.seed}
    inputs |= {"mixtures": digest(out / "mixtures.csv", "mixtures"), "losses": digest(out / "losses.csv", "proxies")}
    digest(out / "trials.jsonl", "proxies")  # it says which runs are held back
    inputs |= _earlier(out)
    return Stage("fit", inputs, (out / "fit.json",), make)


def optimize(search: Search) -> Stage:
    """optimum.json and mixture.yaml: the weights of lowest predicted loss under the repetition caps."""
    config, out = search.config, search.out

    def make() -> str:
        from megatron_lite.data.mixture import Mixture
        from regmix_search.exports import read_blend, write_exports
        from regmix_search.reuse import search_runs
        from regmix_search.solution import provenance, solve_runs
        from regmix_search.space import Space

        runs = with_epochs(search, search_runs(out))
        space = Space.from_json(read_json(out / "space.json"))
        finished = replay(out / "trials.jsonl").finished.values()
        optimum, text = solve_runs(out, space, runs, config, exposure(search, search.inventory), finished)
        facts = provenance(config, optimum, out / "fit.json")
        facts |= {"run_tokens": config.run_tokens, "max_epochs": config.mixtures.max_epochs}  # what the caps are for
        limits = {domain: config.mixtures.max_epochs for domain, weight in optimum["weights"].items() if weight > 0}
        valid = list(search.inventory.valid)
        mixture = Mixture.from_weights(optimum["weights"], search.shards_dir, valid, facts, max_epochs=limits)
        dataclasses.replace(mixture, epochs=optimum["epochs"]).save(out / "mixture.yaml")
        write_exports(read_blend(out / "mixture.yaml", config.run_tokens), out / "exports")
        return text

    inputs = {"seed": config.seed, "minimum": config.mixtures.minimum, "shards_dir": str(search.shards_dir)}
    inputs["optimum"] = dataclasses.asdict(config.optimum)
    inputs["match_repetition"] = config.shards.match_repetition
    for name, made_by in (("fit.json", "fit"), ("space.json", "mixtures"), ("losses.csv", "proxies")):
        inputs[name] = digest(out / name, made_by)
    inputs |= _earlier(out)
    outputs = (out / "optimum.json", out / "mixture.yaml", out / "exports" / "epochs.csv")
    return Stage("optimize", inputs, outputs, make)


def report(search: Search) -> Stage:
    """report.html and report.md, from whatever is in the folder."""
    out = search.out

    def make() -> str:
        from regmix_search.report import write_report

        return str(write_report(out).get("verdict", ""))

    names = ("space", "early", "fit", "optimum", "scales", "train")
    files = ["trials.jsonl", "losses.csv", "config.yaml", *(f"{name}.json" for name in names)]
    inputs = {name: digest(out / name, name) for name in files if (out / name).is_file()}
    inputs["mixtures.csv"] = digest(out / "mixtures.csv", "mixtures")
    return Stage("report", inputs, (out / "report.html", out / "report.md"), make)
