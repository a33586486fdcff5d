"""How this machine runs the proxies fastest, measured once: threads x processes, precision, compiler, micro-batch.

What a search has settled is in calibration.json. Keys of the proxy (precision, compile, micro_batch_size) are settled
for the whole search, since losses depend on them; threads and processes are settled for each machine.
"""

from __future__ import annotations

import dataclasses
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.config import Config, config_hash, to_dict
from megatron_lite.files import atomic_write_json
from regmix_search.config import ProxiesConfig
from regmix_search.crew import Crew, Setting, Timing
from regmix_search.executors.local import visible_gpus
from regmix_search.freshness import read_record
from regmix_search.ledger import replay
from regmix_search.machine import cores, free_memory
from regmix_search.search import Search

# Keys of the proxy that how fast it runs depends on.
TIMED = ("model", "batch", "optim", "precision", "compile", "attention", "activation_checkpointing")
SETTLED = ("precision", "compile", "micro_batch_size", "loss_chunk")  # of a Setting: what losses depend on
FLOPS_GUESSED = 2e10  # FLOP/s of a core for small models, before anything is measured (docs/decisions.md)
WORTH = 60.0  # seconds of proxies below which nothing is measured
SHARE = 0.02  # of the proxies' time is what calibration may take, but at least SHORTEST and at most LONGEST seconds
SHORTEST, LONGEST = 5.0, 120.0
COMPILE = 30.0  # seconds that a compiler takes, about: it is tried when it could take SHARE of a worker's time
MEMORY = 0.8  # of what is free is what the processes may take together
# A setting must be this much faster than a simpler one: timings differ by a few percent from one moment to the next,
# bf16 also costs digits, and threads are timed by the clock, single processes by the better of clock and CPU.
MARGIN = {"precision": 1.10, "compile": 1.03, "micro_batch_size": 1.03, "loss_chunk": 1.03, "packing": 1.10}
# Other sizes of the loss's chunk, in logits: 2^22 of fp32 stay in a large cache, 2^26 have longer matmuls.
CHUNKS = (1 << 22, 1 << 26)


@dataclass(frozen=True)
class Calibration:
    """What was settled for a search on this machine."""

    setting: Setting
    tokens_per_s: float | None  # of all processes together; None: not measured
    summary: str

    @property
    def worker_rate(self) -> float | None:
        """Tokens/s of one proxy while the others run beside it."""
        return None if self.tokens_per_s is None else self.tokens_per_s / self.setting.workers


def read_proxy(search: Search) -> Config | None:
    """The proxy with the keys that an earlier calibration of this search settled; None where there was none."""
    record = read_record(search.out / "calibration.json")
    return _settle(search.config.proxy, record["proxy"]) if record.get("inputs") == _inputs(search) else None


def settled_by(folder: Path, proxy: Config) -> Config:
    """A proxy with the keys as another search settled them; as it is where that search settled none."""
    return _settle(proxy, read_record(folder / "calibration.json").get("proxy", {}))


def adopt(search: Search, folder: Path) -> None:
    """Settles this search's proxies as another search did, so that the losses of both can be compared."""
    proxy, path, inputs = settled_by(folder, search.config.proxy), search.out / "calibration.json", _inputs(search)
    keys = _settled(proxy)
    record = read_record(path)
    if record.get("inputs") != inputs or record.get("proxy") != keys:
        atomic_write_json(path, {"inputs": inputs, "proxy": keys, "machines": {}})


def calibrate(search: Search, vocab_size: int, save: bool = True) -> Calibration:
    """What calibration.json says about this machine; measured first where it says nothing, and kept if ``save``.

    On a cluster nothing is measured: this machine does not run the proxies.
    """
    if (config := search.config.proxies).executor != "local":
        proxy = read_proxy(search) or search.config.proxy
        micro, threads = proxy.batch.micro_batch_size, config.threads or 1
        setting = Setting(threads, config.workers, proxy.precision, proxy.compile, micro, proxy.loss_chunk)
        return Calibration(setting, None, f"not here: proxies run on {config.executor}")
    path, inputs, machine = search.out / "calibration.json", _inputs(search), describe_machine()
    record = read_record(path)
    if record.get("inputs") != inputs:
        record = {"inputs": inputs, "proxy": {}, "machines": {}}
    key = config_hash({"machine": machine, "packing": _packing_keys(search.config.proxies)})
    if (found := record["machines"].get(key)) is None:
        found = {**machine, **_measure(search, vocab_size, record["proxy"])}
        if (latest := read_record(path)).get("inputs") == inputs:  # another driver was faster: what it settled holds
            record = latest
        record["proxy"] = record["proxy"] or {name: found["setting"][name] for name in SETTLED}
        found["setting"] |= record["proxy"]
        record["machines"][key] = found
        if save:
            search.out.mkdir(parents=True, exist_ok=True)
            atomic_write_json(path, record)
    return Calibration(Setting(**found["setting"]), found["tokens_per_s"], found["summary"])


def describe_machine() -> dict[str, Any]:
    """What speed depends on and a driver can see: processor, cores that it may use, GPUs, torch."""
    from importlib.metadata import version

    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*: (.*)$", text, re.M)
    facts = {"cpu": name[1] if name else platform.machine(), "cores": cores(), "torch": version("torch")}
    if visible_gpus():
        from torch import cuda

        facts["gpus"] = [cuda.get_device_name(i) for i in range(cuda.device_count())]
    return facts


def packings(cores: int, config: ProxiesConfig, gpus: int = 0) -> Iterator[tuple[int, int]]:
    """(threads, processes) to try, the likeliest first; what the user has fixed (not 0) stays.

    On GPUs some processes a GPU share its cores; on CPUs all cores are taken, then half of them, and so on down to
    one process: a core may be half of another (SMT), or not ours (a container's quota).
    """
    tried, threads, workers = set(), config.threads, config.workers
    if gpus:
        sharing = [config.per_gpu] if config.per_gpu else [1, 2, 4, 8]
        wanted = [(threads or max(1, cores // (gpus * n)), workers or gpus * n) for n in sharing]
    else:
        sizes = [threads] if threads else [1 << i for i in range(cores.bit_length())]
        wanted = [(size, workers or max(1, cores // size)) for size in sizes if size <= cores or threads]
        wanted += [(sizes[0], workers or max(1, cores // sizes[0] >> i)) for i in range(1, cores.bit_length())]
    for packing in wanted:
        if packing not in tried:
            tried.add(packing)
            yield packing


def variants(proxy: Config, allowed: tuple[str, ...], cuda: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, changed fields of a Setting) of each other way to compute the same proxy that the user allows."""
    if "precision" in allowed and proxy.precision == "auto" and not cuda:
        yield "precision", {"precision": "bf16"}
    if "micro_batch_size" in allowed:
        total, length = proxy.batch.global_batch_size, proxy.data.seq_length
        fitting = [n for n in range(1, total + 1) if total % n == 0 and n * length <= 8192]
        # activations of some 2,048 tokens stay in a core's cache; those of 8,192 have larger matmuls
        for tokens in (2048, 8192):
            sizes = [n for n in fitting if n * length <= tokens]
            if sizes and sizes[-1] != proxy.batch.micro_batch_size:
                yield "micro_batch_size", {"micro_batch_size": sizes[-1]}
    if "loss_chunk" in allowed and not proxy.loss_chunk and not cuda:
        yield from (("loss_chunk", {"loss_chunk": chunk}) for chunk in CHUNKS)
    if "compile" in allowed and not proxy.compile:
        yield "compile", {"compile": True}


def search_settings(
    crew: Crew, proxy: Config, config: ProxiesConfig, tokens: float, cores: int
) -> tuple[Setting, dict[Setting, Timing]]:
    """The fastest setting found for ``tokens`` in all, and everything that was timed; memory and time set limits.

    RuntimeError where not even one proxy alone runs, or not as many at a time as the user says.
    """
    timed: dict[Setting, Timing] = {}
    (threads, workers), *others = packings(cores, config, len(crew.gpus))
    cuda, precision = len(crew.gpus) > 0, proxy.precision
    if precision == "auto" and "precision" in config.calibrate:
        precision = "bf16" if cuda else "fp32"
    alone = Setting(threads, 1, precision, proxy.compile, proxy.batch.micro_batch_size, proxy.loss_chunk)
    timed[alone] = crew.time(alone)  # says how much memory a process takes, too
    start, limit = time.monotonic(), SHARE * tokens / timed[alone].undisturbed / cores
    limit = min(LONGEST, max(SHORTEST, limit))

    def cost(setting: Setting) -> float:
        """Seconds that all proxies would take if the machine did nothing else."""
        return tokens / timed[setting].undisturbed + timed[setting].ready_s * setting.compile

    def better(best: Setting, margin: float, **change: Any) -> Setting:
        room = int(MEMORY * free_memory() / max(timing.memory for timing in timed.values()))
        setting = dataclasses.replace(best, **change)
        setting = dataclasses.replace(setting, workers=config.workers or max(1, min(setting.workers, room)))
        if setting not in timed and time.monotonic() - start < limit:
            try:
                timed[setting] = crew.time(setting)
            except RuntimeError:  # this machine cannot run it
                return best
        return setting if setting in timed and cost(setting) * margin < cost(best) else best

    if config.workers:  # so many, faster or not
        best = dataclasses.replace(alone, workers=workers)
        timed[best] = crew.time(best)
    else:
        best = better(alone, MARGIN["packing"], workers=workers)
    for key, change in variants(proxy, config.calibrate, cuda):
        if key != "compile" or SHARE * cost(best) > COMPILE:
            best = better(best, MARGIN[key], **change)
    for count, workers in others:
        best = better(best, MARGIN["packing"], threads=count, workers=workers)
    return best, timed


def _measure(search: Search, vocab_size: int, settled: dict[str, Any]) -> dict[str, Any]:
    """A machine's part of calibration.json. Keys that are settled already are not tried otherwise."""
    from megatron_lite.plan import Plan, duration
    from megatron_lite.speed import MEASURABLE_FLOPS

    config, gpus = search.config.proxies, visible_gpus()
    proxy = _settle(search.config.proxy, settled)
    if settled or replay(search.out / "trials.jsonl").finished:  # what losses depend on stays as it is
        config = dataclasses.replace(config, calibrate=())
    plan = Plan.resolve(proxy, 1, vocab_size, len(gpus) > 0, deepspeed=False)
    tokens = plan.total_tokens * search.config.mixtures.num_proxies
    expected = tokens * plan.flops_per_token / (FLOPS_GUESSED * cores())
    if expected < WORTH or plan.flops_per_token * proxy.data.seq_length > MEASURABLE_FLOPS:
        threads, workers = next(packings(cores(), config, len(gpus)))
        setting = Setting(
            threads, workers, proxy.precision, proxy.compile, proxy.batch.micro_batch_size, proxy.loss_chunk
        )
        return {"setting": to_dict(setting), "tokens_per_s": None, "summary": f"{setting} (not measured)", "timed": []}
    start = time.monotonic()
    try:
        with Crew(proxy, vocab_size, gpus) as crew:
            best, timed = search_settings(crew, proxy, config, tokens, cores())
    except RuntimeError as error:
        raise ValueError(f"proxies: not one runs here, or not proxies.workers={config.workers}: {error}") from None
    rate = timed[best].tokens_per_s
    summary = f"{best}: {rate:,.0f} tokens/s, the best of {len(timed)} timed in {duration(time.monotonic() - start)}"
    alone = {setting: timing for setting, timing in timed.items() if setting.workers == 1 and setting != best}
    if alone:
        one = max(alone, key=lambda setting: alone[setting].tokens_per_s)
        summary += f"; {one}: {alone[one].tokens_per_s:,.0f}"
    rows = [{**to_dict(setting), **to_dict(timing)} for setting, timing in timed.items()]
    return {"setting": to_dict(best), "tokens_per_s": rate, "summary": summary, "timed": rows}


def _settled(proxy: Config) -> dict[str, Any]:
    """The keys of SETTLED, which are the proxy's own or its batch's."""
    return {name: getattr(proxy.batch if hasattr(proxy.batch, name) else proxy, name) for name in SETTLED}


def _settle(proxy: Config, keys: dict[str, Any]) -> Config:
    of_batch, rest = ({k: v for k, v in keys.items() if hasattr(proxy.batch, k) == there} for there in (True, False))
    return dataclasses.replace(proxy, batch=dataclasses.replace(proxy.batch, **of_batch), **rest)


def _inputs(search: Search) -> str:
    """A hash of what the search asks for; other settings are calibrated anew."""
    config = search.config
    asked = {key: value for key, value in to_dict(config.proxy).items() if key in TIMED}
    asked["seq_length"] = config.proxy.data.seq_length
    asked |= {"loss_chunk": config.proxy.loss_chunk} if config.proxy.loss_chunk else {}
    # loss_chunk came later: what searches from before have settled still holds
    return config_hash({**asked, "calibrate": [key for key in config.proxies.calibrate if key != "loss_chunk"]})


def _packing_keys(config: ProxiesConfig) -> list[int]:
    return [config.threads, config.workers, config.per_gpu]
