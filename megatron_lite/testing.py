"""What tests of this package, and of yours, are built from: tiny shards, tiny configs, many ranks on one machine."""

from __future__ import annotations

import os
import queue
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.multiprocessing as mp

from megatron_lite.config import Config, load_config
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.mixture import Mixture
from megatron_lite.data.sidecar import ShardMeta, write_meta

TINY_VOCAB = 64
TIMEOUT_S = 300  # for all ranks of run_distributed together; a busy machine needs minutes to start eight
TINY_MODEL = (
    "model={num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, ffn_hidden_size: 48}",
    "data.seq_length=16",
    "batch={global_batch_size: 8, micro_batch_size: 4}",
    "schedule={total_tokens: 1280, warmup_steps: 2}",
    "optim.lr=1e-2",
    "log={every: 1, console: false}",
    "threads=1",
)


def tiny_config(out_dir: Path, *overrides: str) -> Config:
    """A run of 10 steps that takes a fraction of a second on one core."""
    return load_config(Config, None, [*TINY_MODEL, f"out_dir={out_dir}", *overrides])


def write_tiny_shards(folder: Path, domains: Sequence[str] = ("a", "b", "c"), documents: int = 60) -> Mixture:
    """Shards train_<d>, valid_<d> of learnable text (each domain its own first-order chain) and their mixture."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(domains):
        for split, count in (("train", documents), ("valid", 8)):
            rng = np.random.default_rng([number, count])
            lengths = rng.integers(5, 60, count)
            _write_shard(folder / f"{split}_{name}", [_document(rng, number, n) for n in lengths])
    weights = {name: float(i + 1) for i, name in enumerate(domains)}
    return Mixture.from_weights(weights, folder)


def _document(rng: np.random.Generator, domain: int, length: int) -> np.ndarray[Any, Any]:
    steps = rng.integers(1, 3 + domain, length)  # the next token is the last one plus a small, domain-wide step
    return np.append((np.cumsum(steps) % (TINY_VOCAB - 1)) + 1, 0).astype(np.uint16)


def _write_shard(prefix: Path, documents: list[np.ndarray[Any, Any]]) -> None:
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    tokens = sum(map(len, documents))
    meta = ShardMeta(
        tokenizer_sha256="tiny", vocab_size=TINY_VOCAB, eod_id=0, num_documents=len(documents), num_tokens=tokens,
        num_bytes=3 * tokens, dtype="uint16", layout=writer.layout,
    )  # fmt: skip
    write_meta(prefix, meta)


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Calls ``fn(*args)`` on ``world_size`` spawned ranks with the environment that torchrun sets; returns by rank.

    ``fn`` is a module-level function. A rank's exception is raised here with its own traceback as the message; so is
    a rank that dies without one, or has not answered after TIMEOUT_S.
    """
    context = mp.get_context("spawn")
    answers, read = context.Queue(), context.Event()
    port = free_port()
    ranks = [
        context.Process(target=_rank_main, args=(fn, args, rank, world_size, port, answers, read), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while len(results) < world_size:
            try:
                rank, ok, value = answers.get(timeout=2)
                assert ok, f"rank {rank} failed:\n{value}"
                results[rank] = value
            except queue.Empty:
                codes = {rank: ranks[rank].exitcode for rank in range(world_size) if rank not in results}
                alive = set(codes.values()) == {None} and time.monotonic() < deadline
                assert alive, f"no answer from these ranks (None: still running): {codes}"
    finally:
        read.set()
        for process in ranks:
            process.join(timeout=10 if len(results) == world_size else 0)
            process.kill()
    return [results[rank] for rank in range(world_size)]


def _rank_main(
    fn: Callable[..., Any], args: Sequence[Any], rank: int, size: int, port: int, answers: Any, read: Any
) -> None:
    import torch

    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in env.items()})
    torch.set_num_threads(1)
    try:
        answers.put((rank, True, fn(*args)))
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))
    read.wait(60)  # tensors in a result live in this process's memory until they are read


def free_port() -> int:
    """A TCP port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
