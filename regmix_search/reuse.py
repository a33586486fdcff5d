"""A search that builds on an earlier one: domains that did not change keep their ratio, earlier runs are fitted too.

Domains come, go, are split or revised while a model is planned. What changed is read off names and contents of shards;
the others become one virtual domain in the ratio of the earlier optimum (Olmix's mixture reuse), and runs of the
earlier search count wherever the same mixture could be run today with the same result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_lite.config import diff
from megatron_lite.files import atomic_write_json
from regmix_search.calibration import adopt, settled_by
from regmix_search.changes import GONE, Changes, find_changes, join_earlier, stack, translate
from regmix_search.fingerprint import fingerprint_path, settings, with_defaults
from regmix_search.fits import BETTER_RUNS
from regmix_search.freshness import digest, digest_of, read_json, read_record
from regmix_search.inventory import TRAIN, VALID, Inventory, take_inventory
from regmix_search.reduction import Reduction
from regmix_search.search import Search
from regmix_search.space import Space
from regmix_search.tables import Runs, read_ledger, read_runs, write_losses, write_mixtures

TABLES = ("earlier_mixtures.csv", "earlier_losses.csv")  # the earlier runs that are fitted, in today's domains


def search_runs(out: Path) -> Runs:
    """All runs of a search that may be fitted: its own finished ones, and earlier ones where it reuses a search."""
    runs, earlier = read_runs(out / "mixtures.csv", out / "losses.csv", partial=True), earlier_runs(out)
    return runs if earlier is None else join_earlier(runs, earlier)


def earlier_runs(out: Path) -> Runs | None:
    """The runs that a search has taken over, in its own domains; None without any."""
    if not (out / TABLES[0]).is_file():
        return None
    runs = read_runs(out / TABLES[0], out / TABLES[1])
    return replace(runs, gone=sum(name.endswith(GONE) for name in runs.domains))


def read_reduction(out: Path, domains: Sequence[str]) -> Reduction | None:
    """The ratios that a search keeps; None when it reuses no other."""
    path = out / "reuse.json"
    return Reduction(tuple(domains), read_json(path)["kept"]) if path.is_file() else None


def keep_ratios(earlier: Path, changes: Changes, free: Sequence[str], domains: Sequence[str]) -> Reduction:
    """Unchanged domains in the ratio of the earlier optimum, but for those in `free`. ValueError: nothing to search."""
    if odd := [name for name in free if name not in domains]:
        raise ValueError(f"reuse.free: {', '.join(odd)} is no domain of this search; it has {', '.join(domains)}")
    digest(earlier / "optimum.json", "optimize")
    optimum = read_json(earlier / "optimum.json")["weights"]
    kept = {name: float(optimum[old]) for name, old in changes.same.items() if name not in free}
    total = math.fsum(kept.values())
    if not total > 0:
        raise ValueError(
            f"{earlier}: its optimum has no weight on any domain that is kept, so there is no ratio to keep; search "
            "anew (no reuse.earlier), or add to reuse.free what is to be searched again"
        )
    ratios = {name: weight / total for name, weight in kept.items()}
    if len(ratios) == len(domains):
        shares = ", ".join(f"{name}={share:.4g}" for name, share in ratios.items())
        raise ValueError(
            f"reuse: nothing is left to search ({changes}). The earlier optimum in today's domains is {shares}; to "
            "search some of it again, name domains in reuse.free. (What the earlier runs alone say: --stage optimize "
            "there, with optimum.bounds=[NAME=0] for what is gone)"
        )
    return Reduction(tuple(domains), ratios)


def check_comparable(earlier: Path, settings: Mapping[str, Any], inventory: Inventory, goal: Sequence[str]) -> None:
    """ValueError unless a proxy of the earlier search would have the same losses today.

    settings: fingerprint.settings' of today; goal: the losses that count.
    """
    way_out = "Undo the change, or set reuse.runs=false: then its ratio alone is used"
    then = with_defaults(read_json(fingerprint_path(earlier / "trials.jsonl")), {"settings": settings})
    if lines := diff(_seen_by_proxies(then["settings"]), _seen_by_proxies(settings)):
        raise ValueError(
            f"{earlier}: its proxies were trained with other settings (old -> new):\n  "
            + "\n  ".join(lines)
            + f"\n{way_out}"
        )
    contents = earlier_contents(earlier)
    old, new = contents.get("tokenizer"), inventory.tokenizer
    if old and new and old != new:
        raise ValueError(
            f"{earlier}: its shards were made with another tokenizer ({old[:12]}, now {new[:12]}). Make today's "
            f"with its own and name them in shards.data_dir. {way_out}"
        )
    here = inventory.contents[VALID]
    changed = [name for name in goal if list(contents[VALID].get(name, ())) != list(here[name])]
    if changed:
        raise ValueError(f"{earlier}: its losses on {', '.join(changed)} are of other validation sets. {way_out}")


def earlier_contents(earlier: Path) -> dict[str, Any]:
    """What the shards of an earlier search held: {train_: {domain: [tokens, content]}, valid_: ..., tokenizer: hash}.

    ValueError when nobody knows any more: no inventory.json, and other shards in their place.
    """
    trained_on = read_json(fingerprint_path(earlier / "trials.jsonl"))["shards"]
    if (earlier / "inventory.json").is_file():
        found = read_json(earlier / "inventory.json")
    else:  # a search from before inventory.json was written
        config = yaml.safe_load((earlier / "config.yaml").read_text(encoding="utf-8")) or {}
        inventory = take_inventory(Path(config.get("shards", {}).get("data_dir") or earlier / "shards"))
        found = {**inventory.contents, "tokenizer": inventory.tokenizer}
    if digest_of({kind: found[kind] for kind in (TRAIN, VALID)}) != trained_on:
        raise ValueError(
            f"{earlier}: its shards are no longer those that its proxies were trained on, so nobody knows what "
            "changed; restore them, or name another folder in reuse.earlier"
        )
    return found


def _seen_by_proxies(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What losses depend on beside mixture and text; where repetition is matched, the length of the target run too."""
    if not settings["shards"].get("match_repetition"):
        return {"proxy": settings["proxy"]}
    return {"proxy": settings["proxy"], "match_repetition": True, "run_tokens": settings["run_tokens"]}


@dataclass(frozen=True, eq=False)
class Reuse:
    """What a search takes over from an earlier one."""

    changes: Changes
    reduction: Reduction
    runs: Runs | None  # earlier runs that still apply, in today's domains; None: not wanted

    def to_json(self, space: Space, search: Search) -> dict[str, Any]:
        """The content of reuse.json."""
        from regmix_search.budget import resolve, vocabulary

        count, proxy = search.config.mixtures.count, resolve(search.config.proxy, vocabulary(search, search.inventory))
        small, whole = self.reduction.space(space), len(space.domains)
        shares = {name: share for name, share in self.reduction.ratios.items() if share > 0}
        without = math.ceil(count * whole / len(small.domains))
        saved = without - count
        return {
            "changes": str(self.changes),
            "kept": dict(self.reduction.ratios),
            "kept_cap": float(small.caps[0]),
            "kept_tokens": None if small.tokens is None else float(small.tokens[0]),
            "scarcest": min(shares, key=lambda name: space.named(space.caps)[name] / shares[name]),
            "searched": list(self.reduction.free),
            "earlier_runs": 0 if self.runs is None else len(self.runs.index),
            "notes": [] if self.runs is None else list(self.runs.notes),
            "saving": {
                "runs": count,
                "runs_without": without,
                "runs_saved": saved,
                "tokens_saved": saved * proxy.total_tokens,
                "flops_saved": saved * proxy.total_flops,
            },
        }


def comparable(search: Search) -> dict[str, Any]:
    """The settings that proxies must have so that those of reuse.earlier can be fitted beside them."""
    assert search.config.reuse.earlier is not None
    proxy = settled_by(Path(search.config.reuse.earlier), search.config.proxy)
    return dict(settings(search.config, proxy)["settings"])


def plan_reuse(search: Search) -> Reuse:
    """What a search takes over from reuse.earlier. ValueError names what does not fit together."""
    config, inventory = search.config.reuse, search.inventory
    assert config.earlier is not None
    earlier = Path(config.earlier)
    if earlier.resolve() == search.out.resolve():
        raise ValueError(f"reuse.earlier={earlier} is this search's own folder; name another out_dir")
    for name, stage in (
        ("space.json", "mixtures"),
        ("trials.fingerprint.json", "proxies"),
        ("optimum.json", "optimize"),
    ):
        digest(earlier / name, stage)
    tokens, _ = inventory.usable(search.config.mixtures.domains, search.sample_tokens)
    contents = earlier_contents(earlier)[TRAIN]
    then = {name: contents[name] for name in read_json(earlier / "space.json")["domains"]}
    now = {name: inventory.contents[TRAIN][name] for name in tokens}
    changes = find_changes(then, now, config.split, config.same)
    reduction = keep_ratios(earlier, changes, config.free, tuple(tokens))
    runs = None
    if config.runs:
        check_comparable(earlier, comparable(search), inventory, search.goal_losses(inventory))
        runs = translate(read_earlier(earlier), changes, tokens)
    return Reuse(changes, reduction, runs)


def take_over(search: Search, space: Space) -> Reduction | None:
    """Writes reuse.json and the tables of earlier runs that apply; removes them where nothing is reused (then None)."""
    tables = [search.out / name for name in TABLES]
    for path in (*tables, search.out / "reuse.json"):
        path.unlink(missing_ok=True)
    if search.config.reuse.earlier is None:
        return None
    found = plan_reuse(search)
    facts = found.to_json(space, search)
    search.say(describe(facts))
    if found.runs is not None and found.runs.index:
        adopt(search, Path(search.config.reuse.earlier))
        number = range(len(found.runs.index))
        write_mixtures(tables[0], number, found.runs.domains, found.runs.weights)
        write_losses(tables[1], number, found.runs.losses)
    atomic_write_json(search.out / "reuse.json", {**facts, "digests": earlier_digests(search)})
    return found.reduction


def reuse_inputs(search: Search) -> dict[str, Any]:
    """What the stage mixtures depends on beside its own settings, all that comparability rests on included."""
    rests_on = {"settings": comparable(search), "shards": search.inventory.digest, "target": search.config.fit.target}
    return {**asdict(search.config.reuse), "digests": earlier_digests(search), **rests_on}


def earlier_digests(search: Search) -> dict[str, str]:
    """What the stage mixtures depends on in the earlier folder; as they were, when that folder is gone."""
    if search.config.reuse.earlier is None:
        return {}
    earlier = Path(search.config.reuse.earlier)
    if not earlier.is_dir():
        return dict(read_record(search.out / "reuse.json").get("digests", {}))
    names = ("space.json", "trials.jsonl", "optimum.json")
    return {name: digest(earlier / name, "optimize") for name in names}


def read_earlier(earlier: Path) -> Runs:
    """Every finished run of an earlier search, held-back ones and those that it took over itself included."""
    fitted, held = read_ledger(earlier / "trials.jsonl")
    runs = stack([fitted, *([held] if held.index else [])])
    before = earlier_runs(earlier)
    return runs if before is None else join_earlier(runs, before)


def describe(facts: Mapping[str, Any]) -> str:
    """reuse.json in a few lines, for people."""
    saving, kept = facts["saving"], [name for name, share in facts["kept"].items() if share > 0]
    k = len(facts["searched"]) + len(facts["kept"])
    cap = f", together at most {facts['kept_cap']:.4g} (by {facts['scarcest']})" if facts["kept_cap"] < 1 else ""
    lines = [
        f"{facts['changes']}: {len(kept)} domains keep their ratio{cap}; {', '.join(facts['searched'])} searched",
        f"{saving['runs']} proxies to fit on where {k} domains searched anew would take {saving['runs_without']} at as "
        f"many a domain (enough for a law: {BETTER_RUNS * (len(facts['searched']) + 1)} and {BETTER_RUNS * k}): "
        f"{saving['tokens_saved']:,.0f} tokens and {saving['flops_saved']:.3g} FLOPs saved; "
        f"{facts['earlier_runs']} earlier runs are fitted too",
    ]
    return "\n  ".join([*lines, *facts["notes"]])
