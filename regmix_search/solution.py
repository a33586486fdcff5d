"""From finished runs to fit.json and optimum.json: what both a search and a study of tables do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lite.files import atomic_write_json
from regmix_search.certainty import prior_curve, tokens_saved
from regmix_search.config import SearchConfig
from regmix_search.fits import fit_targets, fit_workers
from regmix_search.freshness import digest, read_json
from regmix_search.goals import parse_goal
from regmix_search.optimize import find_optimum
from regmix_search.region import fixed_domains
from regmix_search.repetition import Exposure
from regmix_search.reuse import describe, read_reduction
from regmix_search.space import Space
from regmix_search.surrogates import SURROGATES
from regmix_search.tables import Runs

OPINIONS = 2  # losses of a goal up to which every surrogate is asked about the optimum, not the candidates alone


def fit_runs(out: Path, runs: Runs, held: list[Any], config: SearchConfig, doubts: Sequence[str] = ()) -> str:
    """Writes fit.json and says what it found. held: indices of runs that neither fit nor choice may see.

    doubts: further warnings, which begin with the loss that they are about.
    """
    goal = parse_goal(config.fit.target, runs.losses)
    fit = fit_targets(
        runs,
        goal,
        names=config.fit.surrogates or SURROGATES,
        holdout=held,
        seed=config.seed,
        folds=config.fit.folds,
        larger=config.train.main.model != config.proxy.model,  # then smooth laws are preferred: they carry over
        fixed=fixed_domains(config.optimum.bounds),
        workers=fit_workers(len(runs.losses)),
    )
    fit["warnings"] += doubts
    atomic_write_json(out / "fit.json", fit)
    said = [(name, fit["targets"][name]) for name in goal.shares]
    lines = [f"{name}: {chosen['why']}{_holdout_words(chosen['holdout'])}" for name, chosen in said]
    return "\n  ".join(lines) + _warned(fit)


def solve_runs(
    out: Path,
    space: Space,
    runs: Runs,
    config: SearchConfig,
    exposure: Exposure | None = None,
    events: Iterable[Mapping[str, Any]] = (),
) -> tuple[dict[str, Any], str]:
    """Writes optimum.json; returns it, and what it says in a line.

    exposure: what target run and proxies read. events: finished trials of a ledger, for their learning curves.
    """
    fit, minimum = read_json(out / "fit.json"), config.mixtures.minimum
    asked = SURROGATES if len(parse_goal(fit["target"], fit["targets"]).shares) <= OPINIONS else ()
    how: dict[str, Any] = {"minimum": minimum, "seed": config.seed, "settings": config.optimum, "opinions": asked}
    reduction = read_reduction(out, space.domains)
    optimum = find_optimum(space, runs, fit, reduction=reduction, **how)
    if reduction is not None:
        optimum["reuse"] = describe(read_json(out / "reuse.json"))
    if curve := prior_curve(events, parse_goal(fit["target"], fit["targets"])):
        optimum["gain"]["tokens_saved"] = tokens_saved(optimum["gain"]["nats"], space.target_tokens, curve)
    if exposure is not None:
        optimum["repetition"] = exposure.to_json(optimum["weights"])
        optimum["warnings"] += optimum["repetition"].pop("warnings")
    atomic_write_json(out / "optimum.json", optimum)
    largest = sorted(optimum["weights"].items(), key=lambda item: -item[1])
    weights = ", ".join(f"{name} {weight:.1%}" for name, weight in largest if weight >= 0.0005)
    predicted, prior = optimum["objective"]["predicted"], optimum["objective"]["prior"]
    text = f"{weights}; predicted {optimum['target']} loss {predicted:.4f} against the prior's {prior:.4f}"
    ties, saved = optimum["near_ties"], optimum["gain"]["tokens_saved"]["share"]
    text += f", saving {saved:.0%} of the tokens" if saved and optimum["gain"]["significant"] else ""
    text += f"; mixtures up to L1 {ties['farthest']:.2f} away tie with it" if ties["found"] else ""
    return optimum, text + _warned(optimum)


def provenance(config: SearchConfig, optimum: dict[str, Any], fit_path: Path) -> dict[str, Any]:
    """What mixture.yaml says about where its weights come from; losses in nats per token of a proxy."""
    fit = read_json(fit_path)
    terms = parse_goal(optimum["target"], fit["targets"]).shares
    chosen = {target: fit["targets"][target]["chosen"] for target in terms}
    facts = {key: optimum[key] for key in ("target", "objective", "interval90", "inside_sampled_region")}
    made = {"made_by": "regmix_search", "search": config.name, "seed": config.seed, "fit": digest(fit_path, "fit")}
    return {**made, "proxies": fit["n_train"], "held_back": fit["n_holdout"], "surrogate": chosen, **facts}


def _holdout_words(holdout: dict[str, Any]) -> str:
    if holdout.get("spearman") is None:
        return ""
    return (
        f"; {len(holdout['index'])} held-back proxies: Spearman {holdout['spearman']:.3f}, RMSE {holdout['rmse']:.4f}"
    )


def _warned(result: dict[str, Any]) -> str:
    return "".join(f"\n  warning: {warning}" for warning in result["warnings"])
