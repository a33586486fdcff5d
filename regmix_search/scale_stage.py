"""The stage `scales`: finished swarms of several sizes -> scales.json, what they say about the target's size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.files import atomic_write_json
from regmix_search.freshness import Stage, digest, read_json
from regmix_search.goals import Goal, parse_goal
from regmix_search.region import build_region
from regmix_search.scale_files import Scale, align, files_of, parse_size, read_scale, read_search
from regmix_search.scale_law import Sample, Size
from regmix_search.scales import compare, doubts, fit_scales, predict_target
from regmix_search.search import Search
from regmix_search.space import FloatArray, Space, build_space

OWN = "proxies"  # what a search's own trials are called beside the others


def scales(search: Search, space_file: Path | None = None) -> Stage | None:
    """scales.json; None where scales.runs names no other size. A search's own proxies are one of the sizes.

    space_file: what bounds the weights where there is no search (--space); without it the mean mixture is the prior.
    """
    config, out = search.config, search.out
    if not config.scales.runs:
        return None
    own = (out / "trials.jsonl").is_file()
    files = [path for text in config.scales.runs for path in files_of(text)]
    files += [out / "trials.jsonl", out / "space.json"] if own else [space_file] if space_file else []

    def make() -> str:
        found = [read_search(OWN, out)] if own else []
        sizes = align([*found, *map(read_scale, config.scales.runs)])
        if len(sizes) < 2:
            raise ValueError("scales.runs: two sizes at least are needed, to compare them")
        size = _target(search, sizes, own)
        space = _space(search, sizes, size, own, space_file)
        content = study_scales(sizes, config.fit.target, size, space, config.optimum.bounds, config.seed)
        atomic_write_json(out / "scales.json", content)
        return describe(content)

    inputs: dict[str, Any] = {"files": {str(path): digest(path, "proxies") for path in files}}
    inputs |= {"target": config.fit.target, "scales": asdict(config.scales), "bounds": config.optimum.bounds}
    inputs |= {"seed": config.seed, "target_tokens": config.target_tokens, "max_epochs": config.mixtures.max_epochs}
    return Stage("scales", inputs, (out / "scales.json",), make)


def study_scales(
    sizes: Sequence[Scale],
    target: str | Mapping[str, float] | Goal,
    size: Size,
    space: Space,
    bounds: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """The content of scales.json: rank correlations, the law and its form, the mixture for `size`, and doubts.

    sizes: as `align` gives them; epochs are a feature of the law where both they and the space know tokens.
    """
    goal = parse_goal(target, [name for name in sizes[0].runs.losses if all(name in s.runs.losses for s in sizes)])
    held = None if space.tokens is None else tuple(space.tokens.tolist())
    sizes = [replace(s, size=replace(s.size, held=s.size.held or held)) for s in sizes]
    size = replace(size, held=size.held or held)
    pairs = [compare(small, large, goal, seed) for small, large in combinations(sizes, 2)]
    fitted = {
        name: fit_scales([Sample(s.size, s.runs.weights, s.runs.losses[name]) for s in sizes], seed)
        for name in goal.shares
    }
    sample: FloatArray = np.vstack([s.runs.weights for s in sizes])
    found = predict_target(fitted, goal, size, sizes[0].size, space, build_region(space, bounds), sample)
    facts = [
        {"name": s.name, "params": s.size.params, "tokens": s.size.tokens, "runs": len(s.runs.index)} for s in sizes
    ]
    return {
        "target": goal.to_json(),
        "scales": facts,
        "ranks": pairs,
        "law": {name: {"form": each.form, "rmse": each.rmse, "factor": each.factor} for name, each in fitted.items()},
        "at_target": found,
        "warnings": doubts(sizes, pairs, size),
    }


def describe(content: Mapping[str, Any]) -> str:
    """scales.json in a few lines, for people."""
    lines = [
        f"{len(content['scales'])} sizes: " + ", ".join(f"{s['name']} ({s['runs']} runs)" for s in content["scales"])
    ]
    for pair in content["ranks"]:
        if pair["spearman"] is not None:
            low, high = pair["interval90"]
            how = "shared" if pair["shared"] == pair["mixtures"] else "predicted"
            ranked = f"Spearman {pair['spearman']:.4f} ({low:.4f} to {high:.4f}) on {pair['mixtures']} {how} mixtures"
            lines.append(f"{pair['small']} and {pair['large']}: {ranked}")
    for name, law in content["law"].items():
        rmse = ", ".join(f"{form} {value:.4f}" for form, value in law["rmse"].items())
        lines.append(
            f"{name}: {law['form']} law" + (f"; cross-validated RMSE at the largest size: {rmse}" if rmse else "")
        )
    at = content["at_target"]
    said = [f"{what} {_span(at[what])}" for what in ("predicted", "prior", "gain")]
    lines.append(f"at {at['params']:.3g} parameters, {at['tokens']:.3g} tokens: {', '.join(said)} nats")
    lines.append(f"the smallest size's optimum loses {at['cost_of_small']:.4f} nats there")
    return "\n  ".join([*lines, *(f"warning: {warning}" for warning in content["warnings"])])


def _span(found: Mapping[str, Any]) -> str:
    low, high = found["interval90"]
    return f"{found['loss']:.4f} ({low:.4f} to {high:.4f})"


def _target(search: Search, sizes: Sequence[Scale], own: bool) -> Size:
    """scales.target; else a search's main run, or the largest size for as long if it trains none; else the largest."""
    config = search.config
    if config.scales.target is not None:
        return parse_size(config.scales.target, "scales.target")
    if not own:
        return sizes[-1].size
    if not config.train.enabled:
        return Size(sizes[-1].size.params, float(config.run_tokens))
    from regmix_search.budget import resolve, vocabulary

    plan = resolve(config.train.main, vocabulary(search, search.inventory), "train.main")
    return Size(float(plan.non_embedding_params), float(config.run_tokens))


def _space(search: Search, sizes: Sequence[Scale], size: Size, own: bool, path: Path | None) -> Space:
    from regmix_search.study_files import read_space

    config, tokens = search.config, int(size.tokens)
    if not own:
        return read_space(path, sizes[-1].runs, replace(config, target_tokens=config.target_tokens or tokens))
    found = Space.from_json(read_json(search.out / "space.json"))
    if found.tokens is None or found.target_tokens == tokens:
        return found
    counts = {name: int(count) for name, count in found.named(found.tokens).items()}
    return build_space(counts, tokens, config.mixtures.max_epochs, found.named(found.prior))
