"""What a search will cost, said before anything starts: tokens, FLOPs, time, disk. ``--dry-run`` prints it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence

from megatron_lite.config import Config
from megatron_lite.plan import Plan, duration
from regmix_search.calibration import calibrate
from regmix_search.executors.local import visible_gpus
from regmix_search.inventory import Inventory, take_inventory
from regmix_search.ledger import replay
from regmix_search.repetition import exposure
from regmix_search.retrain import main_threads
from regmix_search.search import Search
from regmix_search.space import build_space

FORWARD_SHARE = 1 / 3  # of a training token's FLOPs is its forward pass: what scoring a token costs
CHECKPOINT_BYTES = 12  # a parameter: fp32 weight and AdamW's two moments
LINE_BYTES, FOLDER_BYTES = 1_000, 20_000  # a line of metrics.jsonl with 20 domains; config, plan, mixture, result, data
EVALUATION_LIMIT = 0.10  # of a proxy's training is what its evaluation should cost at most


def describe(search: Search) -> str:
    """The plan of a search as text. Nothing is written, nothing is trained; a few steps time this machine."""
    config = search.config
    there = config.shards.data_dir is not None or list(search.shards_dir.glob("train_*.idx"))
    inventory = take_inventory(search.shards_dir) if there else None
    if inventory is not None:
        search.goal_losses(inventory)
    lines = [f"search {config.name} -> {search.out}: dry run"]
    lines += _domain_lines(search, inventory) + proxy_lines(search, inventory, save=False)
    if config.train.enabled:
        lines += _main_lines(search, inventory)
    return "\n".join([*lines, _disk_line(search, vocabulary(search, inventory))])


def resolve(config: Config, vocab_size: int, block: str = "proxy") -> Plan:
    """The plan of one single-process run on CPU; an error says of which ``block`` of the search's config it is."""
    try:
        return Plan.resolve(config, 1, vocab_size, False, False)
    except ValueError as error:
        raise ValueError(f"in {block}: {error}") from None


def run_seconds(config: Config, plan: Plan, inventory: Inventory | None, scored: list[str], rate: float) -> float:
    """One run's expected wall time at ``rate`` training tokens/s, evaluations on the ``scored`` sets included."""
    return plan.total_tokens * (1 + evaluation_share(config, plan, inventory, scored)) / rate


def evaluation_share(config: Config, plan: Plan, inventory: Inventory | None, scored: list[str]) -> float:
    """FLOPs of one run's evaluations on the ``scored`` sets, as a share of its training's."""
    tokens = sum(_set_sizes(inventory, scored, config.eval.max_tokens))
    return tokens * evaluations(config, plan) * FORWARD_SHARE / plan.total_tokens


def _set_sizes(inventory: Inventory | None, scored: list[str], most: int) -> list[int]:
    return [min(inventory.valid[name].tokens - 1, most) for name in scored] if inventory else []


def evaluations(config: Config, plan: Plan) -> int:
    """How often one run is scored on its held-out sets."""
    every = config.eval.every
    return -(-plan.total_steps // every) if every else 1


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
    if (length := config.proxy.schedule.total_tokens) > config.run_tokens:
        lines.append(
            f"  PROXIES of {length:,} tokens are longer than the run that the mixture is for ({config.run_tokens:,}): "
            "set target_tokens to that run's length, and proxy.schedule.total_tokens well below it"
        )
    if config.reuse.earlier is not None:
        from regmix_search.reuse import describe as describe_reuse
        from regmix_search.reuse import plan_reuse

        lines.append(describe_reuse(plan_reuse(search).to_json(space, search)))
    return lines + [f"  {name:<16} left out: not one sample" for name in left_out]


def proxy_lines(search: Search, inventory: Inventory | None, save: bool = True) -> list[str]:
    """The proxies' plan: how many, how they are run here, what they cost, when they will be done."""
    config, mixtures = search.config, search.config.mixtures
    vocab_size, number = vocabulary(search, inventory), mixtures.num_proxies
    resolve(config.proxy, vocab_size)  # says what is wrong with it as it is written, before anything is measured
    how = calibrate(search, vocab_size, save)
    proxy = how.setting.apply(config.proxy)
    plan = resolve(proxy, vocab_size)
    scored = [name for name in inventory.valid if name != config.fit.target_test] if inventory else []
    done = [event["seconds"] for event in replay(search.out / "trials.jsonl").finished.values()]
    if done:
        each, source = sum(done) / len(done), f"(as {len(done)} finished ones took)"
    else:
        rate, source = how.worker_rate, "by the calibration"
        if rate is None:
            rate, source = _measure(proxy, plan, how.setting.threads)
        each = run_seconds(proxy, plan, inventory, scored, rate)
    parts = f"{mixtures.count} to fit + {mixtures.holdout} held back + {mixtures.repeats} x the prior"
    further = mixtures.rounds * mixtures.batch
    parts += f" + {mixtures.rounds} rounds of {mixtures.batch} at most" if further else ""
    return [
        f"proxies: {number} = {parts}, {len(done)} finished so far",
        plan.table(),
        *_validation_lines(proxy, plan, inventory, scored),
        *_gpu_lines(proxy, vocab_size, number, len(scored)),
        f"  calibrated  {how.summary}",
        _sum_line(number, len(done), plan, (how.setting.workers, how.setting.threads), each, source),
    ]


def _gpu_lines(config: Config, vocab_size: int, number: int, sets: int) -> list[str]:
    """What all proxies would cost on GPUs, where there are none to measure."""
    if visible_gpus():
        return []
    from regmix_search.gpu_cost import sweep_line

    return ["  on GPUs     " + sweep_line(config, Plan.resolve(config, 1, vocab_size, True, False), number, sets)]


def _validation_lines(config: Config, plan: Plan, inventory: Inventory | None, scored: list[str]) -> list[str]:
    """What scoring costs; what to lower where that is too much; domains whose loss nobody would see."""
    if inventory is None:
        return []
    share = evaluation_share(config, plan, inventory, scored)
    tokens = sum(_set_sizes(inventory, scored, config.eval.max_tokens))
    text = f"  validation  {len(scored)} sets, {tokens:,} tokens, {share:.1%} of a proxy's training FLOPs"
    if share > EVALUATION_LIMIT:
        text += f" - MORE THAN {EVALUATION_LIMIT:.0%}: {_way_out(config, plan, inventory, scored)}"
    lines = [text]
    if unseen := sorted(set(inventory.train) - set(inventory.valid)):
        lines.append(
            f"  NOT SCORED  {', '.join(unseen)}: in the training data, but with no validation set or an empty one"
        )
    if unsized := [name for name in scored if not inventory.valid[name].bytes]:
        lines.append(f"  NO BYTES    {', '.join(unsized)}: no sidecar says how many, so no bits/byte")
    return lines


def _way_out(config: Config, plan: Plan, inventory: Inventory, scored: list[str]) -> str:
    """The largest proxy.eval.max_tokens, in whole sequences, that keeps evaluation within its limit."""
    affordable = EVALUATION_LIMIT * plan.total_tokens / FORWARD_SHARE / evaluations(config, plan)
    length = config.data.seq_length
    low, high = 0, config.eval.max_tokens // length + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = sum(_set_sizes(inventory, scored, middle * length)) <= affordable
        low, high = (middle, high) if fits else (low, middle)
    fewer = "proxy.eval.every=0 (only at the end)" if config.eval.every else "fewer sets or longer proxies"
    return f"set proxy.eval.max_tokens={low * length:,}" if low else f"set {fewer}"


def _main_lines(search: Search, inventory: Inventory | None) -> list[str]:
    config, vocab_size = search.config, vocabulary(search, inventory)
    plan, proxy = resolve(config.train.main, vocab_size, "train.main"), resolve(config.proxy, vocab_size)
    lines = model_lines(search, inventory, config.train.mixtures)
    size = f"{plan.non_embedding_params / proxy.non_embedding_params:.1f} times a proxy's size"
    return [f"{lines[0]}, {size}", *lines[1:]]


def model_lines(search: Search, inventory: Inventory | None, names: Sequence[str], done: int = 0) -> list[str]:
    """The plan of train.main on these mixtures, train.seeds times: how many, what one is, what all cost."""
    config, vocab_size, threads = search.config.train, vocabulary(search, inventory), main_threads(search)
    plan, number = resolve(config.main, vocab_size, "train.main"), len(names) * config.seeds
    rate, source = _measure(config.main, plan, threads)
    each = run_seconds(config.main, plan, inventory, list(inventory.valid) if inventory else [], rate)
    packing = (search.workers(config.workers, threads), threads)
    return [
        f"models: {number} = {', '.join(names)} x {config.seeds} seeds",
        plan.table(),
        _sum_line(number, done, plan, packing, each, source),
    ]


def _sum_line(number: int, done: int, plan: Plan, packing: tuple[int, int], each: float, source: str) -> str:
    """All tokens and FLOPs, device-hours of all, and when those that are left will be done."""
    left = number - done
    at_once = min(packing[0] or left, max(1, left))  # 0: as many as the cluster runs
    wall = each * -(-left // max(1, at_once))
    finish = time.strftime("%H:%M on %d %B", time.localtime(time.time() + wall))
    gpus = len(visible_gpus())
    devices, unit = (gpus / (packing[0] or gpus), "GPU") if gpus else (packing[1], "core")
    work = f"{number * plan.total_tokens:,} tokens, {number * plan.total_flops:.3g} FLOPs"
    hours = f"{number * each * devices / 3600:.3g} {unit}-hours"
    return (
        f"  all         {work}, {hours}, about {duration(wall)} to go, until {finish}: "
        f"{at_once} at a time, {duration(each)} each {source}"
    )


def _measure(config: Config, plan: Plan, threads: int) -> tuple[float, str]:
    """(tokens/s of one run on ``threads`` threads, how that is known)."""
    from megatron_lite.mesh import Mesh
    from megatron_lite.process import use_cpu
    from megatron_lite.speed import measure_speed

    use_cpu(threads)
    speed = measure_speed(config, plan, Mesh.from_env())
    return speed.tokens_per_s, f"at {speed.tokens_per_s:,.0f} tokens/s {speed.source}"


def _disk_line(search: Search, vocab_size: int) -> str:
    """What the folder holds, what checkpoints and the proxies' folders will add, and what is free."""
    config, proxies = search.config, search.config.mixtures.num_proxies
    runs = len(config.train.mixtures) * config.train.seeds if config.train.enabled else 0
    saved = runs * run_bytes(config.train.main, vocab_size) + proxies * run_bytes(config.proxy, vocab_size)
    used = sum(file.stat().st_size for file in search.out.rglob("*") if file.is_file())
    here = next(folder for folder in (search.out.absolute(), *search.out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(here).free
    text = f"disk: {used / 1e6:,.1f} MB used so far, run folders {saved / 1e6:,.1f} MB, {free / 1e9:,.1f} GB free"
    return text if saved * 1.1 < free + used else text + " - NOT ENOUGH"


def run_bytes(config: Config, vocab_size: int) -> int:
    """About how much one run's folder holds: checkpoints that are kept, lines of metrics, the rest."""
    plan = resolve(config, vocab_size)
    kept = min(config.checkpoint.keep, plan.total_steps // config.checkpoint.every) if config.checkpoint.every else 0
    lines = -(-plan.total_steps // config.log.every) + evaluations(config, plan)
    return kept * CHECKPOINT_BYTES * plan.params + lines * LINE_BYTES + FOLDER_BYTES
