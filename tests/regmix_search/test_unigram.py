"""Proxies that know token frequencies and no more are named."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.testing import write_tiny_shards
from regmix_search.config import load_search
from regmix_search.search import Search
from regmix_search.tables import Runs
from regmix_search.unigram import mixed_frequencies, unigram_doubts, unigram_loss


def test_frequencies_are_those_of_the_mixture_and_none_is_zero() -> None:
    texts = {"a": np.array([0, 0, 1, 1], dtype=np.uint16), "b": np.array([2] * 6, dtype=np.uint16)}
    found = mixed_frequencies(texts, {"a": 0.5, "b": 0.5}, 4)
    assert found == pytest.approx(np.array([0.25, 0.25, 0.5, 0.1]) / 1.1)
    assert unigram_loss(np.array([2, 2]), found) == pytest.approx(math.log(2.2))


def test_losses_above_the_frequencies_are_a_warning_for_the_goal_alone(tmp_path: Path) -> None:
    write_tiny_shards(tmp_path / "data", documents=200)
    keys = {"shards.data_dir": str(tmp_path / "data"), "fit.target": "a", "proxy.eval.max_tokens": 1_000}
    overrides = tuple(f"{key}={json.dumps(value)}" for key, value in keys.items())
    search = Search(load_search(None, None, overrides), io.StringIO())
    whole = np.concatenate([IndexedDataset(tmp_path / "data" / f"train_{d}").tokens for d in "abc"])
    shares = np.bincount(whole, minlength=64) / len(whole)  # at the prior a mixture is all text as it is
    learnt = float(-np.log(shares[IndexedDataset(tmp_path / "data" / "valid_a").tokens[:1_000]]).mean())
    for offset, share in ((-0.5, None), (-0.35, None), (-0.1, "60%"), (0.5, "100%")):
        losses = learnt + offset + np.array([-0.3, -0.2, 0.2, 0.3, 0.4])
        runs = Runs(tuple(range(5)), ("a", "b", "c"), np.full((5, 3), 1 / 3), {"a": losses, "b": losses + 99})
        found = unigram_doubts(search, runs)
        assert [w.split(" of ")[0] for w in found] == ([] if share is None else [f"a: {share}"])
