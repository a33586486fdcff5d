"""What a search will cost, said before anything starts: tokens, FLOPs, time, disk. ``--dry-run`` prints it."""

from __future__ import annotations

import shutil

from megatron_lite.config import Config
from megatron_lite.plan import Plan, duration
from regmix_search.freshness import read_json
from regmix_search.inventory import Inventory, take_inventory
from regmix_search.ledger import replay
from regmix_search.repetition import exposure
from regmix_search.search import Search
from regmix_search.space import build_space

FORWARD_SHARE = 1 / 3  # of a training token's FLOPs is its forward pass: what scoring a token costs
CHECKPOINT_BYTES = 12  # a parameter: fp32 weight and AdamW's two moments


def describe(search: Search) -> str:
    """The plan of a search as text. Nothing is written, nothing is trained; a few micro-batches time this machine."""
    config = search.config
    there = config.shards.data_dir is not None or list(search.shards_dir.glob("train_*.idx"))
    inventory = take_inventory(search.shards_dir) if there else None
    if inventory is not None:
        search.goal_losses(inventory)
    vocab_size = vocabulary(search, inventory)
    proxy = resolve(config.proxy, vocab_size)
    lines = [f"search {config.name} -> {search.out}: dry run"]
    lines += _domain_lines(search, inventory) + _proxy_lines(search, inventory, proxy)
    if config.train.enabled:
        lines += _main_lines(search, inventory, vocab_size, proxy)
    return "\n".join([*lines, _disk_line(search)])


def resolve(config: Config, vocab_size: int) -> Plan:
    """The plan of one single-process run on CPU."""
    return Plan.resolve(config, 1, vocab_size, False, False)


def run_seconds(config: Config, plan: Plan, inventory: Inventory | None, scored: list[str], rate: float) -> float:
    """One run's expected wall time at ``rate`` training tokens/s, evaluations on the ``scored`` sets included."""
    every = config.eval.every
    evaluations = -(-plan.total_steps // every) if every else 1
    sets = [min(inventory.valid[name].tokens, config.eval.max_tokens) for name in scored] if inventory else []
    return (plan.total_tokens + sum(sets) * evaluations * FORWARD_SHARE) / rate


def vocabulary(search: Search, inventory: Inventory | None) -> int:
    """Token ids that a model has: the shards' own, or what the tokenizer will be trained to."""
    from megatron_lite.data.sidecar import read_meta

    metas = [read_meta(shard.prefix) for shard in inventory.train.values()] if inventory else []
    known = [meta.vocab_size for meta in metas if meta is not None]
    return known[0] if known else search.config.tokenizer.vocab_size


def _domain_lines(search: Search, inventory: Inventory | None) -> list[str]:
    config = search.config
    if inventory is None:
        caps = f"a domain may be read {config.mixtures.max_epochs:g} times in {config.run_tokens:,} tokens"
        return [f"domains: not known before the stage shards; {caps}"]
    tokens, left_out = inventory.usable(config.mixtures.domains, search.sample_tokens)
    total = sum(tokens.values())
    lines = [f"domains: {total:,} tokens; caps: {config.mixtures.max_epochs:g} epochs in {config.run_tokens:,} tokens"]
    lines.append(f"  {'domain':<16} {'tokens':>14} {'prior':>8} {'cap':>8} {'epochs at cap':>14} {'in a proxy':>11}")
    space = build_space(tokens, config.run_tokens, config.mixtures.max_epochs)  # refuses caps that no mixture can meet
    seen = exposure(search, inventory)
    for name, (target, proxy) in seen.epochs(space.named(space.caps)).items():
        facts = f"{tokens[name]:>14,} {tokens[name] / total:>8.2%} {space.named(space.caps)[name]:>8.2%}"
        lines.append(f"  {name:<16} {facts} {target:>14.3g} {proxy:>11.3g}")
    lines += [f"  with every domain at its cap, {text}" for text in seen.to_json(space.named(space.caps))["warnings"]]
    if config.reuse.earlier is not None:
        from regmix_search.reuse import describe as describe_reuse
        from regmix_search.reuse import plan_reuse
        from regmix_search.stages import settings

        lines.append(describe_reuse(plan_reuse(search, settings(config)["settings"]).to_json(space, search)))
    return lines + [f"  {name:<16} left out: not one sample" for name in left_out]


def _proxy_lines(search: Search, inventory: Inventory | None, plan: Plan) -> list[str]:
    config, mixtures = search.config, search.config.mixtures
    further = mixtures.rounds * mixtures.batch
    number = mixtures.count + mixtures.holdout + mixtures.repeats + further
    done = [event["seconds"] for event in replay(search.out / "trials.jsonl").finished.values()]
    if done:
        each, source = sum(done) / len(done), f"(as {len(done)} finished ones took)"
    else:
        scored = [name for name in inventory.valid if name != config.fit.target_test] if inventory else []
        rate, source = _measure(config.proxy, plan, config.proxies.threads)
        each = run_seconds(config.proxy, plan, inventory, scored, rate)
    parts = f"{mixtures.count} to fit + {mixtures.holdout} held back + {mixtures.repeats} x the prior"
    parts += f" + {mixtures.rounds} rounds of {mixtures.batch} at most" if further else ""
    return [
        f"proxies: {number} = {parts}, {len(done)} finished so far",
        plan.table(),
        _sum_line(number, plan, search.workers(config.proxies.workers), each, source),
    ]


def _main_lines(search: Search, inventory: Inventory | None, vocab_size: int, proxy: Plan) -> list[str]:
    config = search.config.train
    plan = resolve(config.main, vocab_size)
    number = len(config.mixtures) * config.seeds
    rate, source = _measure(config.main, plan, config.main.threads or search.config.proxies.threads)
    each = run_seconds(config.main, plan, inventory, list(inventory.valid) if inventory else [], rate)
    ratio = plan.non_embedding_params / proxy.non_embedding_params
    return [
        f"models: {number} = {', '.join(config.mixtures)} x {config.seeds} seeds, {ratio:.1f} times a proxy's size",
        plan.table(),
        _sum_line(number, plan, search.workers(config.workers), each, source),
    ]


def _sum_line(number: int, plan: Plan, workers: int, each: float, source: str) -> str:
    workers = min(workers, number)
    wall = each * -(-number // workers)
    work = f"{number * plan.total_tokens:,} tokens, {number * plan.total_flops:.3g} FLOPs"
    return f"  all         {work}, about {duration(wall)}: {workers} at a time, {duration(each)} each {source}"


def _measure(config: Config, plan: Plan, threads: int) -> tuple[float, str]:
    """(tokens/s of one run on ``threads`` threads, how that is known)."""
    from megatron_lite.mesh import Mesh
    from megatron_lite.process import use_cpu
    from megatron_lite.speed import measure_speed

    use_cpu(threads)
    speed = measure_speed(config, plan, Mesh.from_env())
    return speed.tokens_per_s, f"at {speed.tokens_per_s:,.0f} tokens/s {speed.source}"


def _disk_line(search: Search) -> str:
    config = search.config.train
    plan_file = next(iter(sorted(search.out.glob("train/*/plan.json"))), None)
    params = read_json(plan_file)["params"] if plan_file else resolve(config.main, 50_432).params
    saved = CHECKPOINT_BYTES * params * config.main.checkpoint.keep if config.main.checkpoint.every else 0
    runs = len(config.mixtures) * config.seeds if config.enabled else 0
    used = sum(file.stat().st_size for file in search.out.rglob("*") if file.is_file())
    here = next(folder for folder in (search.out.absolute(), *search.out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(here).free
    text = (
        f"disk: {used / 1e6:,.1f} MB used so far, checkpoints {saved * runs / 1e6:,.1f} MB, {free / 1e9:,.1f} GB free"
    )
    return text if saved * runs < free else text + " - NOT ENOUGH"
