"""From finished runs to fit.json, optimum.json and mixture.yaml; with shards or from two CSV files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_lite.files import atomic_write, atomic_write_json
from regmix_search.config import SearchConfig
from regmix_search.fits import fit_targets, split_holdout
from regmix_search.freshness import Stage, digest, read_json
from regmix_search.optimize import find_optimum
from regmix_search.space import Space, unlimited_space
from regmix_search.surrogates import SURROGATES
from regmix_search.tables import Runs, read_runs


def fit_runs(out: Path, runs: Runs, held: list[int], config: SearchConfig) -> str:
    """Writes fit.json and says what it found. held: indices of runs that neither fit nor choice may see."""
    fit = fit_targets(
        runs,
        config.fit.target,
        names=config.fit.surrogates or SURROGATES,
        holdout=held,
        seed=config.seed,
        folds=config.fit.folds,
    )
    atomic_write_json(out / "fit.json", fit)
    chosen = fit["targets"][config.fit.target]
    return f"{config.fit.target}: {chosen['why']}{_holdout_words(chosen['holdout'])}{_warned(fit)}"


def solve_runs(out: Path, space: Space, runs: Runs, config: SearchConfig) -> tuple[dict[str, Any], str]:
    """Writes optimum.json; returns it, and what it says in a line."""
    optimum = find_optimum(space, runs, read_json(out / "fit.json"), minimum=config.mixtures.minimum, seed=config.seed)
    atomic_write_json(out / "optimum.json", optimum)
    largest = sorted(optimum["weights"].items(), key=lambda item: -item[1])
    weights = ", ".join(f"{name} {weight:.1%}" for name, weight in largest if weight >= 0.0005)
    predicted, prior = optimum["objective"]["predicted"], optimum["objective"]["prior"]
    text = f"{weights}; predicted {optimum['target']} loss {predicted:.4f} against the prior's {prior:.4f}"
    return optimum, text + _warned(optimum)


def provenance(config: SearchConfig, optimum: dict[str, Any], fit_path: Path) -> dict[str, Any]:
    """What mixture.yaml says about where its weights come from; losses in nats per token of a proxy."""
    fit = read_json(fit_path)
    chosen = {
        target: entry["chosen"] for target, entry in fit["targets"].items() if target in _names(optimum["target"])
    }
    facts = {key: optimum[key] for key in ("target", "objective", "interval90", "inside_sampled_region")}
    made = {"made_by": "regmix_search", "search": config.name, "seed": config.seed, "fit": digest(fit_path, "fit")}
    return {**made, "proxies": fit["n_train"], "held_back": fit["n_holdout"], "surrogate": chosen, **facts}


def _names(target: str | dict[str, float]) -> list[str]:
    return [target] if isinstance(target, str) else list(target)


def fit_tables(config: SearchConfig, mixtures: Path, losses: Path) -> Stage:
    """Stage fit from two CSV files in RegMix's format; an eighth of the runs is held back, mixtures.holdout at most."""
    out = config.run_dir

    def make() -> str:
        runs = read_runs(mixtures, losses)
        held = split_holdout(runs, min(config.mixtures.holdout, len(runs.index) // 8), config.seed)
        return fit_runs(out, runs, list(held), config)

    inputs = {"mixtures": digest(mixtures, "mixtures"), "losses": digest(losses, "proxies"), "seed": config.seed}
    inputs |= {"target": config.fit.target, "surrogates": config.fit.surrogates, "folds": config.fit.folds}
    return Stage("fit", {**inputs, "holdout": config.mixtures.holdout}, (out / "fit.json",), make)


def optimize_tables(config: SearchConfig, mixtures: Path, losses: Path, space_file: Path | None) -> Stage:
    """Stage optimize from two CSV files. space_file: a space.json with prior and caps; without one the prior is the
    mean of the mixtures and nothing is capped."""
    out = config.run_dir

    def make() -> str:
        runs = read_runs(mixtures, losses)
        centre = dict(zip(runs.domains, np.mean(runs.weights, axis=0).tolist(), strict=True))
        space = Space.from_json(read_json(space_file)) if space_file else unlimited_space(runs.domains, centre)
        optimum, text = solve_runs(out, space, runs, config)
        train = {f"train_{domain}": weight for domain, weight in optimum["weights"].items()}
        facts = provenance(config, optimum, out / "fit.json")
        content = {"version": 1, "train": train, "epochs": optimum["epochs"], "provenance": facts}
        atomic_write(out / "mixture.yaml", yaml.safe_dump(content, sort_keys=False))
        return text

    inputs = {"mixtures": digest(mixtures, "mixtures"), "losses": digest(losses, "proxies"), "seed": config.seed}
    inputs |= {"fit": digest(out / "fit.json", "fit"), "minimum": config.mixtures.minimum}
    inputs["space"] = digest(space_file, "mixtures") if space_file else None
    return Stage("optimize", inputs, (out / "optimum.json", out / "mixture.yaml"), make)


def _holdout_words(holdout: dict[str, Any]) -> str:
    if holdout.get("spearman") is None:
        return ""
    return (
        f"; {len(holdout['index'])} held-back proxies: Spearman {holdout['spearman']:.3f}, RMSE {holdout['rmse']:.4f}"
    )


def _warned(result: dict[str, Any]) -> str:
    return "".join(f"\n  warning: {warning}" for warning in result["warnings"])
