"""Proxies that know token frequencies and no more are named."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.testing import write_tiny_shards
from regmix_search.config import load_search
from regmix_search.search import Search
from regmix_search.tables import Runs
from regmix_search.unigram import unigram_doubts, unigram_entropy


def test_the_entropy_is_that_of_the_frequencies_corrected_for_few_tokens() -> None:
    rng = np.random.default_rng(0)
    assert unigram_entropy(np.tile(np.arange(4, dtype=np.uint16), 10_000)) == pytest.approx(math.log(4), abs=1e-4)
    assert unigram_entropy(np.full(50, 7, dtype=np.int32)) == 0
    few = np.mean([unigram_entropy(rng.integers(0, 64, 200)) for _ in range(50)])
    assert few == pytest.approx(math.log(64), abs=0.03), "nats; without the correction .16 below"


def test_losses_above_the_frequencies_are_a_warning_for_the_goal_alone(tmp_path: Path) -> None:
    write_tiny_shards(tmp_path / "data", documents=200)
    keys = {"shards.data_dir": str(tmp_path / "data"), "fit.target": "a", "proxy.eval.max_tokens": 1_000}
    overrides = tuple(f"{key}={json.dumps(value)}" for key, value in keys.items())
    search = Search(load_search(None, None, overrides), io.StringIO())
    from megatron_lite.data.indexed import IndexedDataset

    entropy = unigram_entropy(IndexedDataset(tmp_path / "data" / "valid_a").tokens[:1_000])
    for offset, share in ((-0.5, None), (-0.35, None), (-0.1, "60%"), (0.5, "100%")):
        losses = entropy + offset + np.array([-0.3, -0.2, 0.2, 0.3, 0.4])
        runs = Runs(tuple(range(5)), ("a", "b", "c"), np.full((5, 3), 1 / 3), {"a": losses, "b": losses + 99})
        found = unigram_doubts(search, runs)
        assert [w.split(" of ")[0] for w in found] == ([] if share is None else [f"a: {share}"])
