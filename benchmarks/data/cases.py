"""One measurement, in a process of its own so that no cache of one side helps the other: cases.py JSON -> JSON.

CPU seconds (user and system) after all imports; `cold` is wall clock. A case runs `ours` or `peer` on the same shards.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

SEQ_LENGTH, BATCH = 2048, 64


def ours_loader(prefixes: list[str], weights: list[float], samples: int, order: str, masks: bool) -> Any:
    """Our loader on these shards; a step is one batch."""
    from megatron_lite.data.loader import BlendedLoader
    from megatron_lite.data.mixture import Domain, Mixture

    total = sum(weights)
    names = [os.path.basename(prefix).removeprefix("train_") for prefix in prefixes]
    domains = [Domain(n, (p,), w / total) for n, p, w in zip(names, prefixes, weights, strict=True)]
    flags = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True} if masks else {}
    return BlendedLoader(Mixture(tuple(domains), {}), SEQ_LENGTH, 1234, BATCH, BATCH, sample_order=order, **flags)


def drawer(side: str, case: dict[str, Any]) -> Callable[[int], Any]:
    """step -> batch of that side; opening is part of the call that makes it."""
    prefixes, weights, samples = case["prefixes"], case["weights"], case["samples"]
    if side == "ours":
        return ours_loader(prefixes, weights, samples, case["order"], case["masks"]).step
    peer = importlib.import_module("benchmarks.data.peer")
    dataset = peer.build(prefixes, weights, samples, SEQ_LENGTH, case["cache"], case["masks"])
    return lambda step: peer.batch(dataset, step * BATCH, BATCH)


def open_first(side: str, case: dict[str, Any]) -> dict[str, float]:
    """Open everything and draw the first batch."""
    start = time.process_time()
    drawer(side, case)(0)
    return {"cpu_s": time.process_time() - start}


def open_memory(side: str, case: dict[str, Any]) -> dict[str, float]:
    """What it allocates at most while it opens and draws a batch, by tracemalloc, which sees numpy's arrays."""
    tracemalloc.start()
    drawer(side, case)(0)
    return {"bytes": float(tracemalloc.get_traced_memory()[1])}


def warm_batches(side: str, case: dict[str, Any]) -> dict[str, float]:
    """CPU seconds a sample with the shards in the page cache; best of several rounds of new batches.

    An epoch maps each page of a shard once, so hardly any of its samples waits for that; the first rounds do, on both
    sides.
    """
    step, best = drawer(side, case), float("inf")
    rounds, batches = 20, case["batches"]
    for prefix in case["prefixes"]:
        with open(prefix + ".bin", "rb") as file:
            while file.read(1 << 24):
                pass
    for round_ in range(rounds + 1):  # the first is for warming up
        start = time.process_time()
        for i in range(batches):
            step(round_ * batches + i)
        best = min(best, time.process_time() - start) if round_ else best
    return {"cpu_s": best / (batches * BATCH)}


def cold_batches(side: str, case: dict[str, Any]) -> dict[str, float]:
    """Samples a second by the clock, with none of the shards' pages in memory at the start."""
    from benchmarks.data.shards import drop_cache

    step = drawer(side, case)
    drop_cache(case["prefixes"])
    start = time.perf_counter()
    for i in range(case["batches"]):
        step(i)
    return {"per_s": case["batches"] * BATCH / (time.perf_counter() - start)}


def blend(side: str, case: dict[str, Any]) -> dict[str, float]:
    """CPU seconds a sample of the schedule alone; ours in the loader's steps."""
    weights, samples, window = case["weights"], case["samples"], 1024
    if side == "peer":
        peer = importlib.import_module("benchmarks.data.peer")
        run = lambda: peer.blend((np.array(weights) / sum(weights)).tolist(), samples)  # noqa: E731
    else:
        from megatron_lite.data.blend import Blend
        from megatron_lite.data.native import kernels

        schedule = Blend(weights, 1234, kernels(), window=window)
        run = lambda: [schedule.draw(at, window) for at in range(0, samples, window)]  # noqa: E731
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return {"cpu_s": best / samples}


def megatron_index(side: str, case: dict[str, Any]) -> dict[str, float]:
    """Build the three indices; ours are compared with what Megatron cached on disk, entry by entry."""
    from benchmarks.data.shards import SEED
    from megatron_lite.data.indexed import IndexedDataset
    from megatron_lite.data.megatron_order import build_indices
    from megatron_lite.data.native import kernels

    if side == "peer":
        peer = importlib.import_module("benchmarks.data.peer")
        start = time.process_time()
        peer.indices(case["prefixes"][0], case["samples"], SEQ_LENGTH, case["cache"])
        return {"cpu_s": time.process_time() - start}
    dataset = IndexedDataset(case["prefixes"][0])
    start = time.process_time()
    found = build_indices([dataset.lengths], case["samples"], SEQ_LENGTH, SEED, kernels())
    spent = time.process_time() - start
    for array, name in zip(found, ("document", "sample", "shuffle"), strict=True):
        (path,) = (entry.path for entry in os.scandir(case["cache"]) if entry.name.endswith(f"-{name}_index.npy"))
        theirs = np.load(path, mmap_mode="r", allow_pickle=False)
        assert array.dtype == theirs.dtype and np.array_equal(array, theirs), f"{name} index differs from Megatron's"
    return {"cpu_s": spent}


CASES = {f.__name__: f for f in (open_first, open_memory, warm_batches, cold_batches, blend, megatron_index)}


def main() -> None:
    """Reads a case from the command line, runs it, prints what it measured."""
    case = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    if case["side"] == "peer":
        importlib.import_module("benchmarks.data.peer").join_group()
    else:
        importlib.import_module("megatron_lite.data.loader")
    if not case.get("keep_cache"):
        shutil.rmtree(case.get("cache", ""), ignore_errors=True)
    print(json.dumps(CASES[case["what"]](case["side"], case)))


if __name__ == "__main__":
    main()
