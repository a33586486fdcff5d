"""DoReMi (Xie et al. 2023): a reference model on its weights, a proxy under group DRO on uniform samples, its averaged
weights; and again with those as the reference's, until they stay. Every run of every round is resumable.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_lite.config import Config, to_dict
from megatron_lite.data.mixture import Mixture
from megatron_lite.files import atomic_write_json, read_jsonl
from megatron_lite.resume import identity
from regmix_search.budget import FORWARD_SHARE, resolve, vocabulary
from regmix_search.freshness import Stage, digest, read_json
from regmix_search.retrain import MainRun, prepare, run_all
from regmix_search.search import Search
from regmix_search.space import Space, bound, build_space, controls

CHECKPOINTS = 10  # a run of a round saves this often where proxy.checkpoint.every does not say
CURVE = 400  # points of a round's curves in doremi.json
COLUMNS = ("weight", "average", "excess")  # by domain, in the metrics of a proxy


def doremi(search: Search) -> Stage:
    """doremi.json (every round: weights, their curves, cost) and mixture.yaml (the last answer, under the caps)."""
    config, out = search.config.doremi, search.out
    space = _space(search)
    start = first_weights(search, space)

    def make() -> str:
        weights, rounds = start, list[dict[str, Any]]()
        for number in range(1, config.rounds + 1):
            rounds.append(one_round(search, number, weights))
            weights = rounds[-1]["weights"]
            _write(search, space, rounds)
            search.say(_say(rounds[-1], number))
            if rounds[-1]["change"] < config.tolerance:
                break
        return _summary(rounds, config.tolerance)

    inputs = {
        "doremi": to_dict(config),
        "proxy": identity(to_dict(search.config.proxy)),
        "seed": search.config.seed,
        "start": start,
        "shards": search.inventory.digest,
        "caps": space.named(space.caps),
    }
    return Stage("doremi", inputs, (out / "doremi.json", out / "mixture.yaml"), make)


def first_weights(search: Search, space: Space) -> dict[str, float]:
    """What the first reference is trained on: doremi.reference. ValueError where it is none of the three."""
    written = search.config.doremi.reference
    if written == "prior":
        return space.named(space.prior)
    if written == "uniform":
        return _uniform(space)
    if not Path(written).is_file():
        raise ValueError(f"doremi.reference={written}: write prior, uniform, or the path of a mixture.yaml")
    mixture = Mixture.load(written, search.shards_dir)
    given = dict(zip(mixture.names, mixture.weights.tolist(), strict=True))
    if given.keys() != set(space.domains):
        raise ValueError(
            f"doremi.reference={written}: has the domains {', '.join(given)}, mixed are {', '.join(space.domains)}"
        )
    return {name: given[name] for name in space.domains}


def one_round(search: Search, number: int, weights: dict[str, float]) -> dict[str, Any]:
    """Trains reference and proxy, or goes on with them; what doremi.json says of the round."""
    proxy_config, folder, seed = search.config.proxy, search.out / "doremi", search.config.seed
    steps = resolve(proxy_config, vocabulary(search, search.inventory)).total_steps
    every = proxy_config.checkpoint.every or max(1, steps // CHECKPOINTS)
    config = dataclasses.replace(proxy_config, checkpoint=dataclasses.replace(proxy_config.checkpoint, every=every))
    reference = MainRun("reference", seed, weights, folder / f"round-{number}-reference", config)
    trained = _train(search, reference)
    doing = dataclasses.replace(search.config.doremi.reweighting, reference=str(reference.folder.resolve()))
    config = dataclasses.replace(config, reweighting=doing)
    # a seed of its own: another order than the reference's, so that excess is not measured where that one had just been
    uniform = dict.fromkeys(weights, 1 / len(weights))
    proxy = MainRun("proxy", seed + 1, uniform, folder / f"round-{number}-proxy", config, trained["run_hash"])
    result = _train(search, proxy)
    answer, plan = result["domain_weights"], read_json(proxy.folder / "plan.json")
    rows = read_jsonl(proxy.folder / "metrics.jsonl")
    forwards = 1 + (doing.update_order == "two_pass")  # the reference's, and the proxy's own once more
    return {
        "reference": weights,
        "weights": {name: answer[name] for name in weights},
        "change": max(abs(answer[name] - weights[name]) for name in weights),
        "losses": {"reference": trained["losses"], "proxy": result["losses"]},
        "curves": _curves(rows, list(weights), plan["tokens_per_step"]),
        "warnings": _warnings(config, rows, list(weights)),
        "flops": {"reference": trained["flops"], "proxy": result["flops"] * (1 + forwards * FORWARD_SHARE)},
        "tokens": {"reference": trained["tokens"], "proxy": result["tokens"]},
        "seconds": {"reference": trained["seconds"], "proxy": result["seconds"]},
    }


def main_mixtures(search: Search) -> dict[str, dict[str, float]]:
    """What models are trained on: DoReMi's mixture as ``optimal``, and its controls, all under the caps."""
    digest(search.out / "doremi.json", "doremi")
    found, space = read_json(search.out / "doremi.json"), _space(search)
    made = {name: space.named(row) for name, row in controls(space).items() if name in ("prior", "uniform")}
    return {"optimal": found["mixture"], **made}


def describe(search: Search) -> str:
    """The plan of a search by DoReMi as text, for ``--dry-run``."""
    config = search.config
    there = config.shards.data_dir is not None or list(search.shards_dir.glob("train_*.idx"))
    inventory = search.inventory if there else None
    size = vocabulary(search, inventory)
    plan = resolve(config.proxy, size)
    extra = 1 + (config.doremi.reweighting.update_order == "two_pass")
    each = plan.total_flops * (2 + extra * FORWARD_SHARE)
    lines = [f"search {config.name} -> {search.out}: dry run", f"doremi: at most {config.doremi.rounds} rounds of a"]
    lines[-1] += f" reference and a proxy, {each:.3g} FLOPs a round; both are"
    lines.append(plan.table())
    if config.train.enabled:
        main, number = resolve(config.train.main, size, "train.main"), len(config.train.mixtures) * config.train.seeds
        lines += [f"models: {number} = {', '.join(config.train.mixtures)} x {config.train.seeds} seeds", main.table()]
    return "\n".join(lines)


def _space(search: Search) -> Space:
    tokens, _ = search.inventory.usable(search.config.mixtures.domains, search.sample_tokens)
    return build_space(tokens, search.config.run_tokens, search.config.mixtures.max_epochs)


def _uniform(space: Space) -> dict[str, float]:
    return dict.fromkeys(space.domains, 1 / len(space.domains))


def _train(search: Search, run: MainRun) -> dict[str, Any]:
    """The result of a run; ValueError with its last words where it fails."""
    prepare(search, run)
    if not run.done:
        failed = run_all(search, [run], 1, run.folder.name)
        if failed:
            raise ValueError(f"{run.folder.name}: {failed[run.folder.name]}")
    return read_json(run.folder / "result.json")


def _write(search: Search, space: Space, rounds: list[dict[str, Any]]) -> None:
    import numpy as np

    answer = rounds[-1]["weights"]
    capped = space.named(bound(np.array([answer[name] for name in space.domains]), space.caps))
    atomic_write_json(search.out / "doremi.json", {"rounds": rounds, "mixture": capped})
    facts = {"method": "doremi", "search": search.config.name, "rounds": len(rounds), "change": rounds[-1]["change"]}
    facts |= {"run_tokens": search.config.run_tokens, "max_epochs": search.config.mixtures.max_epochs}
    caps = dict.fromkeys(space.domains, search.config.mixtures.max_epochs)
    mixture = Mixture.from_weights(capped, search.shards_dir, list(search.inventory.valid), facts, max_epochs=caps)
    tokens, _ = search.inventory.usable(search.config.mixtures.domains, search.sample_tokens)
    epochs = {name: capped[name] * search.config.run_tokens / count for name, count in tokens.items()}
    dataclasses.replace(mixture, epochs=epochs).save(search.out / "mixture.yaml")


def _curves(rows: list[dict[str, Any]], names: list[str], tokens_per_step: int) -> dict[str, Any]:
    """Tokens, and by column and domain what was logged there; thinned to CURVE points, the last one kept."""
    stride = max(1, -(-len(rows) // CURVE))
    kept = [*rows[:-1:stride], rows[-1]]
    columns = {key: {name: [row[f"{key}/{name}"] for row in kept] for name in names} for key in COLUMNS}
    return {"tokens": [row["step"] * tokens_per_step for row in kept], **columns}


def _warnings(config: Config, rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    """What a collapse is blamed on, as of the first line of metrics that shows it."""
    from regmix_search.group_dro import ONE_HOT, collapse  # torch

    assert config.reweighting is not None
    for row in rows:
        weights, means = ([row[f"{key}/{name}"] for name in names] for key in ("weight", "excess"))
        if max(weights) > ONE_HOT:
            text = collapse(names, weights, means, config.reweighting.eta, config.batch.global_batch_size)
            return [f"step {row['step']}: {text}"]
    return []


def _say(found: dict[str, Any], number: int) -> str:
    largest = sorted(found["weights"].items(), key=lambda item: -item[1])
    weights = ", ".join(f"{name} {found['reference'][name]:.4f} -> {weight:.4f}" for name, weight in largest)
    text = [f"doremi round {number}: {weights}; largest change {found['change']:.4f}", *found["warnings"]]
    return "\n  warning: ".join(text)


def _summary(rounds: list[dict[str, Any]], tolerance: float) -> str:
    change, flops = rounds[-1]["change"], sum(sum(r["flops"].values()) for r in rounds)
    ended = f"weights stay to {tolerance:g}" if change < tolerance else f"last change {change:.4f}"
    return f"{len(rounds)} round{'s' * (len(rounds) > 1)}, {flops:.3g} FLOPs, {ended}"
