"""Going on with a saved run: what must be the same, what may change by itself, what only with --allow-change."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron_lite import checkpoint, tally
from megatron_lite.config import Config, diff, to_dict
from megatron_lite.data.loader import BlendedLoader
from megatron_lite.data.stages import Stage
from megatron_lite.mesh import Mesh
from megatron_lite.plan import Plan
from megatron_lite.schema import nearest

# A resumed run may differ in these; in anything else it would be another run. What `mixture` and `phases` name is in
# the loader's state.
FREE = {
    *("name", "out_dir", "mixture", "phases", "engine", "compile", "attention", "threads", "eval", "checkpoint", "log"),
    *("parallel", "activation_checkpointing", "loss_chunk"),
}
IN_LOADER = {"data_dir", "split", "mid_level_dataset_surplus"}  # of `data`: the loader's state has what they lead to
NEVER = {  # what a resumed run may not change, and what to do instead
    "tokenizer": "the same ids would mean other text to a half-trained model: tokenise with the old tokenizer",
    "batch.global_batch_size": "a step is counted in it, and so is all that follows from the step: keep it, and change "
    "batch.micro_batch_size or the number of ranks",
    "optim.optimizer": "the moments are another optimizer's: start a new run with init_from",
    "megatron": "its order follows from the length of the whole run, the mixture and the data as they were: keep them",
    "order": "this version draws samples in another order: finish the run with the version that began it",
}
DATA = ("mixture", "data")  # keys of --allow-change that are not keys of the config


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config dict that decides what is computed."""
    kept = {k: v for k, v in config.items() if k not in FREE and (k, v) != ("reweighting", None)}  # as before the key
    kept["batch"] = {"global_batch_size": config["batch"]["global_batch_size"]}  # the micro-batch is only a split
    kept["data"] = {k: v for k, v in config["data"].items() if k not in IN_LOADER}
    return kept


def record(config: Config, loader: BlendedLoader, plan: Plan, step: int, allowed: list[Any]) -> dict[str, Any]:
    """What state.json says beside the step: enough to tell later what has changed."""
    return {
        "consumed_samples": step * config.batch.global_batch_size,
        "config": to_dict(config),
        "data": loader.state_dict(),
        "allowed": allowed,
        "plan": to_dict(plan),
        "tokenizer": asdict(loader.meta),
    }


def find(config: Config, loader: BlendedLoader, mesh: Mesh) -> tuple[Path | None, int, list[Any]]:
    """The checkpoint to go on from (None: none), its step, every change allowed so far; sets the loader's stages.

    Rank 0 chooses, so that all ranks load the same one. ValueError with every difference that is not allowed.
    """
    resume, allow = config.checkpoint.resume, config.checkpoint.allow_change
    check_keys(allow, to_dict(config))
    newest = checkpoint.find_checkpoint(config.run_dir, resume) if mesh.is_main else None
    step = mesh.from_main(checkpoint.load_state(newest)["step"] if newest else 0)
    if step == 0:
        return None, 0, []
    path = checkpoint.step_folder(config.run_dir, step) if resume == "auto" else Path(resume)
    state = checkpoint.load_state(path)
    if not isinstance(state["data"], dict):
        raise ValueError(f"{path}: written by a version that kept no stages; begin again with --resume never")
    if config.reweighting and config.reweighting.sampling_every:  # stages that the run made itself
        for stage in state["data"]["stages"][1:]:
            loader.change_mixture(stage["first_step"], loader.mixture.with_weights(stage["weights"]))
    lines = [line.partition(": ") for line in diff(identity(state["config"]), identity(to_dict(config)))]
    found = {key: [line] for key, _, line in lines} | changes(state["data"], loader.state_dict(), step)
    refuse(str(path), found, allow)
    loader.load_state_dict(state["data"], step)
    tally.check_epochs(loader, config.schedule.total_tokens // config.data.seq_length)
    now = [{"step": step, "key": key, "change": line} for key, lines in found.items() for line in lines]
    if mesh.is_main:
        print(
            "".join(f"allowed to change at step {step}: {x['key']}: {x['change']}\n" for x in now), end="", flush=True
        )
    return path, step, [*state["allowed"], *now]


def changes(old: dict[str, Any], new: dict[str, Any], step: int) -> dict[str, list[str]]:
    """How two loaders' states differ for a run that goes on at `step`: key of --allow-change -> lines."""
    keys = [key for key in old if not isinstance(old[key], dict | list)]
    found = {key: [f"{old[key]} -> {new[key]}"] for key in keys if old[key] != new[key]}
    was, now = old["tokenizer"], new["tokenizer"]
    if was["tokenizer_sha256"] and now["tokenizer_sha256"]:
        found["tokenizer"] = [f"{key} {was[key]} -> {now[key]}" for key in was if was[key] != now[key]]
    found["data"] = shard_changes(old["domains"], new["domains"])
    before, after = ([Stage(**stage) for stage in state["stages"]] for state in (old, new))
    found["mixture"] = stage_changes(before, after, step)
    return {key: lines for key, lines in found.items() if lines}


def stage_changes(old: Sequence[Stage], new: Sequence[Stage], step: int) -> list[str]:
    """One line for each stage from `step` on whose beginning or weights are not those of before."""
    lines = []
    for was, now in zip_longest(_ahead(old, step), _ahead(new, step)):
        if was == now:
            continue
        (start, before), (begin, after) = was or (None, {}), now or (None, {})
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        texts = [f"{name} {before.get(name, 0.0):.6g} -> {after.get(name, 0.0):.6g}" for name in names]
        when = " -> ".join(dict.fromkeys("no stage" if at is None else f"step {at}" for at in (start, begin)))
        lines.append(f"from {when}: {', '.join(texts[:8])}{f' and {len(texts) - 8} more' if len(texts) > 8 else ''}")
    return lines


def shard_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each shard of a domain in both that is not the same file as before."""
    lines = []
    for domain in old:
        for was, now in zip_longest(old[domain]["shards"], new.get(domain, old[domain])["shards"]):
            if was is None or now is None:
                lines.append(
                    f"train_{domain}: {'new shard' if was is None else 'no more shard'} {(was or now)['name']}"
                )
                continue
            sizes = [f"{end} {was[end]:,} -> {now[end]:,} bytes" for end in ("bin", "idx") if was[end] != now[end]]
            hashes = [key for key in ("probe", "xxh3") if was[key] and now[key]]  # a sidecar may have come since
            sizes += [f"{key} {was[key]} -> {now[key]}" for key in hashes if was[key] != now[key]]
            if sizes:
                lines.append(f"train_{domain}: shard {now['name']}: {', '.join(sizes)}")
    return lines


def refuse(where: str, changes: Mapping[str, Sequence[str]], allowed: Collection[str]) -> None:
    """ValueError with every change of a key that is not in `allowed`, and for each the flag that would allow it."""
    lines = []
    for key in changes:
        if key in NEVER or key not in allowed:
            lines += [f"{key}: {line}" for line in changes[key]]
            lines.append(
                f"    no flag allows it: {NEVER[key]}" if key in NEVER else f"    to allow it: --allow-change {key}"
            )
    if lines:
        text = "\n  ".join(lines)
        raise ValueError(f"{where}: cannot resume, this is another run:\n  {text}\nUndo it, or use a new out_dir")


def _ahead(stages: Sequence[Stage], step: int) -> list[tuple[int, dict[str, float]]]:
    """From which step on, `step` the first, which weights."""
    after = [stage.first_step for stage in stages[1:]]
    ends = [*after, step + 1]  # the last has no end
    return [(max(s.first_step, step), s.drawn) for s, end in zip(stages, ends, strict=True) if end > step]


def check_keys(allow: tuple[str, ...], config: dict[str, Any]) -> None:
    """ValueError for a key of checkpoint.allow_change that means nothing, or that nothing can allow."""
    known = [*DATA, *_leaves(identity(config))]
    for key in allow:
        if key in NEVER:
            raise ValueError(f"--allow-change {key}: no flag allows it: {NEVER[key]}")
        if key not in known:
            raise ValueError(f"--allow-change {key}: unknown key.{nearest(key, known)}")


def _leaves(config: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        found += _leaves(value, f"{prefix}{key}.") if nested else [prefix + key]
    return found
