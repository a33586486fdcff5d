"""Small proxies from a process's start to their held-out losses: ours, and a training script of its own for each.

For benchmarks.proxies. The script is benchmarks.plain_proxy: Hugging Face's Llama in a plain loop.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sides import Case
from benchmarks.table import Row, cost_row
from megatron_lite.config import Config, dump, load_config
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.mixture import Mixture
from megatron_lite.data.sidecar import ShardMeta, write_meta
from regmix_search.calibration import cores
from regmix_search.executors.local import LocalPool
from regmix_search.ledger import Ledger, Trial
from regmix_search.progress import Progress
from regmix_search.proxies import ProxyTraining, run_trials

ROOT = Path(__file__).resolve().parents[1]
DOMAINS, PROXIES, EVAL_TOKENS = ("a", "b", "c"), 8, 2048
LEARNED = 0.9  # of log V nats, which a model that knows nothing scores


def write_shards(folder: Path, vocab_size: int, tokens: int = 120_000) -> None:
    """Three domains, each a chain in which the next token is the last one plus a small step."""
    folder.mkdir()
    for number, name in enumerate(DOMAINS):
        for split, count in (("train", tokens), ("valid", 2 * EVAL_TOKENS)):
            steps = np.random.default_rng([number, count]).integers(1, 4 + number, count)
            prefix = folder / f"{split}_{name}"
            with IndexedWriter(prefix, np.uint16) as writer:
                writer.add_document((np.cumsum(steps) % (vocab_size - 1) + 1).astype(np.uint16))
            write_meta(prefix, ShardMeta("none", vocab_size, 0, 1, count, 3 * count, "uint16", layout=writer.layout))


def proxy_config(case: Case, folder: Path, steps: int) -> Config:
    """A proxy of the case's size, as the demo trains it."""
    keys = [
        f"model.preset={case.preset}",
        f"data.seq_length={case.seq_length}",
        f"batch={{global_batch_size: {case.sequences}, micro_batch_size: {case.sequences}}}",
        f"schedule={{total_tokens: {steps * case.tokens}, warmup_steps: {min(10, steps)}, min_lr: 4.0e-4}}",
        "optim.lr=4e-3",
        f"eval.max_tokens={EVAL_TOKENS}",
        f"precision={case.precision}",
        f"out_dir={folder}",
    ]
    return load_config(Config, None, keys)


def plain_job(case: Case, shards: Path, weights: Mapping[str, float], steps: int, threads: int) -> str:
    """What benchmarks.plain_proxy is told, for the same proxy."""
    shape = case.shape
    model = {
        "vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size, "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads, "max_position_embeddings": shape.seq_length,
        "rms_norm_eps": shape.norm_eps, "rope_theta": shape.rope_theta, "tie_word_embeddings": False,
    }  # fmt: skip
    facts = {"shards": str(shards), "weights": dict(weights), "steps": steps, "threads": threads, "model": model}
    facts |= {"seq_length": case.seq_length, "batch": case.sequences, "lr": 4e-3, "warmup": 10, "seed": 0}
    return json.dumps({**facts, "eval_tokens": EVAL_TOKENS, "precision": case.precision})


def start_rows(case: Case, repeats: int) -> list[Row]:
    """Seconds until the first step is done, the files warm: the first start of each is not counted."""
    with tempfile.TemporaryDirectory() as room:
        shards, weights = Path(room, "shards"), dict.fromkeys(DOMAINS, 1.0)
        write_shards(shards, case.vocab_size)
        Mixture.from_weights(weights, shards).save(Path(room, "mixture.yaml"))
        config = dataclasses.replace(proxy_config(case, Path(room, "run"), 2), threads=1)
        config = dataclasses.replace(config, log=dataclasses.replace(config.log, every=1))
        Path(room, "config.yaml").write_text(dump(config))
        given = ["--config", f"{room}/config.yaml", "--mixture", f"{room}/mixture.yaml", "--resume", "never"]
        ours = [sys.executable, str(ROOT / "launch/pretrain.py"), *given]
        plain = [sys.executable, str(ROOT / "benchmarks/plain_proxy.py"), plain_job(case, shards, weights, 2, 1)]
        times = [(_first_step(ours), _first_step(plain)) for _ in range(repeats + 1)][1:]
    (wall, cpu), (their_wall, their_cpu) = (
        [min(part) for part in zip(*side, strict=True)] for side in zip(*times, strict=True)
    )
    return [cost_row("start.wall", wall, their_wall, "s (hf)"), cost_row("start.cpu", cpu, their_cpu, "CPU-s (hf)")]


def _first_step(command: Sequence[str]) -> tuple[float, float]:
    """(seconds, CPU-seconds) from a process's start until it prints that a step is done."""
    start, env = time.perf_counter(), {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout
    if not any(line.startswith("step 1") for line in process.stdout):
        raise RuntimeError(f"no first step: {command}")
    wall = time.perf_counter() - start
    ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()[11:13]  # utime, stime: proc(5)
    process.communicate()
    return wall, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def sweep_rows(case: Case, steps: int) -> list[Row]:
    """All proxies from nothing to their held-out losses; RuntimeError where a side has not learned."""
    rng = np.random.default_rng(0)
    mixtures = [dict(zip(DOMAINS, row, strict=True)) for row in rng.dirichlet([1, 1, 1], PROXIES).tolist()]
    with tempfile.TemporaryDirectory() as room:
        write_shards(Path(room, "shards"), case.vocab_size)
        ours = _timed(_our_sweep, case, Path(room), mixtures, steps)
        peers = [_timed(_plain_sweep, case, Path(room), mixtures, steps, n) for n in {1, cores()}]
    for loss, _, _ in (ours, *peers):  # two starts of a model differ; one that does nothing stays at log V
        if not loss < LEARNED * math.log(case.vocab_size):
            raise RuntimeError(f"sweep: mean held-out loss {loss:.3f} nats: that side has not learned")
    print(f"sweep: {ours}, peers {peers}", file=sys.stderr)
    _, wall, cpu = min(peers, key=lambda peer: peer[1])
    what = f"{PROXIES} proxies x {steps * case.tokens:,} tokens (hf)"
    return [cost_row("sweep.wall", ours[1], wall, f"s, {what}"), cost_row("sweep.cpu", ours[2], cpu, f"CPU-s, {what}")]


def _timed(function: Any, *arguments: Any) -> tuple[float, float, float]:
    """(what it returns, seconds, CPU-seconds of this process and of its children that have ended)."""

    def cpu() -> float:
        both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    start, before = time.perf_counter(), cpu()
    result = function(*arguments)
    return result, time.perf_counter() - start, cpu() - before


def _our_sweep(case: Case, room: Path, mixtures: Sequence[dict[str, float]], steps: int) -> float:
    config = proxy_config(case, room / "unused", steps)
    config = dataclasses.replace(config, threads=1, log=dataclasses.replace(config.log, console=False))
    function = ProxyTraining(config, str(room / "shards"), DOMAINS, str(room / "ours"))
    trials = [Trial(i, "train", weights, seed=0) for i, weights in enumerate(mixtures)]
    ledger = Ledger(room / "trials.jsonl", trials, {})
    list(run_trials(ledger, LocalPool(function, cores(), 1), Progress("proxies", io.StringIO())))
    return statistics.mean(loss for event in ledger.finished.values() for loss in event["losses"].values())


def _plain_sweep(case: Case, room: Path, mixtures: Sequence[dict[str, float]], steps: int, at_a_time: int) -> float:
    """A shell loop's work: a process for each mixture, ``at_a_time`` of them with an equal share of the cores."""
    threads, env = cores() // at_a_time, {**os.environ, "OMP_NUM_THREADS": str(cores() // at_a_time)}
    waiting, running, losses = list(mixtures), list[subprocess.Popen[str]](), list[float]()
    while waiting or running:
        while waiting and len(running) < at_a_time:
            job = plain_job(case, room / "shards", waiting.pop(0), steps, threads)
            command = [sys.executable, str(ROOT / "benchmarks/plain_proxy.py"), job]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env))
        time.sleep(0.02)
        for process in [process for process in running if process.poll() is not None]:
            running.remove(process)
            losses += json.loads(process.communicate()[0].splitlines()[-1]).values()
    return statistics.mean(losses)
