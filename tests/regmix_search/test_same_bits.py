"""A proxy is a function of its mixture and seed: which process trains it, and after what, does not matter."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.testing import tiny_config, write_tiny_shards
from regmix_search.executors.local import LocalPool
from regmix_search.ledger import Trial
from regmix_search.proxies import ProxyTraining

EQUAL = {"a": 0.5, "b": 0.3, "c": 0.2}
TRIALS = [
    Trial(0, "train", EQUAL, seed=7),
    Trial(1, "train", {"a": 0.1, "b": 0.1, "c": 0.8}, seed=7),
    Trial(2, "repeat", EQUAL, seed=8),
    Trial(3, "train", EQUAL, seed=7),  # as 0
]


def train(folder: Path, shards: Path, trials: list[Trial], *overrides: str) -> dict[int, tuple[Any, ...]]:
    """Trains them one after another in one worker process: index -> losses, bits/byte, a hash of all weights."""
    config = tiny_config(folder / "unused", "checkpoint.every=10", *overrides)
    pool, found = LocalPool(ProxyTraining(config, str(shards), ("a", "b", "c"), str(folder)), workers=1), {}
    try:
        for trial in trials:
            pool.submit(trial)
            while not (outcomes := pool.wait(60)):
                pass
            (outcome,) = outcomes
            assert outcome.result is not None, outcome.reason
            (weights,) = (folder / trial.name).glob("step_*/model.safetensors")
            kept = hashlib.sha256(weights.read_bytes()).hexdigest()
            found[trial.index] = (outcome.result["losses"], outcome.result["bpb"], kept)
    finally:
        pool.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_worker_in_any_order_and_fresh_processes_give_the_same_bits(tmp_path, precision):
    write_tiny_shards(tmp_path / "shards")
    chosen = f"precision={precision}"
    forward = train(tmp_path / "forward", tmp_path / "shards", TRIALS, chosen)
    backward = train(tmp_path / "backward", tmp_path / "shards", TRIALS[::-1], chosen)
    fresh = [train(tmp_path / f"fresh{t.index}", tmp_path / "shards", [t], chosen) for t in TRIALS[1:3]]
    assert forward == backward
    assert forward[1] == fresh[0][1] and forward[2] == fresh[1][2]
    assert forward[0] == forward[3]  # same mixture, same seed
    for other in (1, 2):  # another mixture; another seed, which is the noise floor
        assert all(forward[0][0][name] != forward[other][0][name] for name in "abc")
        assert forward[0][2] != forward[other][2]
    for losses, bits, _ in forward.values():  # nobody is dropped
        assert set(losses) == set(bits) == {"a", "b", "c"}
