"""Adaptive rounds: fit what is finished, propose a batch, and say when another round is not worth its proxies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.files import atomic_write_json
from regmix_search.fits import run_noise
from regmix_search.freshness import read_json
from regmix_search.ledger import replay
from regmix_search.proposals import Fitted, draw_pool, fit_runs, propose_rows
from regmix_search.region import build_region
from regmix_search.reuse import read_reduction, search_runs
from regmix_search.search import Search
from regmix_search.space import FloatArray, Space
from regmix_search.tables import append_mixtures, read_mixtures

PATIENCE = 2  # rounds running whose expected gain is below the noise: one alone may be a surrogate that is too sure


def continues(path: Path, domains: tuple[str, ...], rows: FloatArray) -> bool:
    """Does a table of mixtures begin with these rows? Then what rounds have appended to it still holds."""
    if not path.is_file():
        return False
    _, old_domains, old = read_mixtures(path)
    same = old_domains == domains and len(old) >= len(rows)
    return same and bool(np.allclose(old[: len(rows)], rows, rtol=0, atol=1e-12))


def add_round(search: Search) -> tuple[str, bool]:
    """Appends the next batch to mixtures.csv, unless rounds, budget or gain have run out: (what was done, was it).

    rounds.json holds what was expected of each round. A repeated call with nothing new trained proposes the same.
    """
    config, out = search.config.mixtures, search.out
    index, _, _ = read_mixtures(out / "mixtures.csv")
    first = config.repeats + config.holdout + config.count
    number = -(-(len(index) - first) // config.batch)  # rounds so far, a last one of another size included
    history = _read_history(out / "rounds.json")[:number]
    fitted, noise = _fit(search)
    best = float(fitted.losses.min())
    if number >= config.rounds:
        return _stop(out, history, f"{number} rounds done, best {best:.4f}"), False
    if (why := _over_budget(search, len(index) + config.batch)) is not None:
        return _stop(out, history, why), False
    space = Space.from_json(read_json(out / "space.json"))
    bounds, kept = search.config.optimum.bounds, read_reduction(out, space.domains)
    region = build_region(space, bounds) if kept is None else kept.region(space, bounds)
    pool = draw_pool(fitted, space, search.config.seed + number, config.minimum, region)
    picks, gains = propose_rows(fitted, pool, config.batch)
    gain = float(gains.max())
    history = [*history, {"round": number + 1, "best": best, "expected_gain": gain, "noise": noise}]
    small = [entry["noise"] is not None and entry["expected_gain"] < entry["noise"] for entry in history]
    if len(small) >= PATIENCE and all(small[-PATIENCE:]):
        why = f"the expected gain, {gain:.4f}, is below the noise of one run, {noise:.4f}, {PATIENCE} rounds running"
        return _stop(out, history[:-1], why), False
    atomic_write_json(out / "rounds.json", {"rounds": history, "stopped": None})
    append_mixtures(out / "mixtures.csv", pool[picks])
    said = f"best so far {best:.4f}, expected gain {gain:.4f}"
    return f"round {number + 1} of {config.rounds}: {config.batch} mixtures, {said}", True


def _fit(search: Search) -> tuple[Fitted, float | None]:
    """A fit of the finished trials that may be fitted on, and the noise of one run (None: no repeats)."""
    out = search.out
    runs = search_runs(out)
    held = [i for i, event in replay(out / "trials.jsonl").finished.items() if event.get("kind") == "holdout"]
    runs = runs.without(i for i in held if i in runs.index)
    fitted = fit_runs(runs, search.config.fit.target, seed=search.config.seed)
    noises = run_noise(runs)
    return fitted, max(noises[name] for name in fitted.models) if noises else None


def _over_budget(search: Search, proxies: int) -> str | None:
    from regmix_search.budget import resolve, vocabulary

    limit = search.config.mixtures.max_flops
    if limit is None:
        return None
    each = resolve(search.config.proxy, vocabulary(search, search.inventory)).total_flops
    if proxies * each <= limit:
        return None
    return f"another round would take {proxies * each:.3g} FLOPs in all, mixtures.max_flops is {limit:.3g}"


def _stop(out: Path, history: list[dict[str, Any]], why: str) -> str:
    atomic_write_json(out / "rounds.json", {"rounds": history, "stopped": why})
    return f"no further round: {why}"


def _read_history(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rounds"]
    return entries
