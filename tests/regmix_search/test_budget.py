"""The plan before a search: what scoring costs, who is not scored, device-hours, the finish, disk."""

from __future__ import annotations

import dataclasses
import io
import re
import time
from pathlib import Path

import pytest

from megatron_lite.config import load_config
from megatron_lite.data.sidecar import read_meta, write_meta
from megatron_lite.testing import write_tiny_shards
from regmix_search import budget
from regmix_search.budget import describe, evaluation_share, proxy_lines, resolve, run_bytes
from regmix_search.config import SearchConfig
from regmix_search.inventory import take_inventory
from regmix_search.search import Search

SMALL = (
    "mixtures={count: 4, holdout: 1, repeats: 1}",
    "proxy.model={num_layers: 1, hidden_size: 32, num_heads: 2, ffn_hidden_size: 48}",
    "proxy.data.seq_length=16",
    "proxy.batch={global_batch_size: 8, micro_batch_size: 4}",
    "proxy.schedule={total_tokens: 1280, warmup_steps: 2}",
    "fit.target=a",
    "target_tokens=10_000",
    "train.enabled=false",
)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_tiny_shards(tmp_path / "shards")
    return tmp_path / "shards"


def search(shards: Path, *overrides: str) -> Search:
    places = (f"shards.data_dir={shards}", f"out_dir={shards.parent / 'out'}")
    return Search(load_config(SearchConfig, None, [*SMALL, *places, *overrides]), io.StringIO())


def lines(shards: Path, *overrides: str) -> dict[str, str]:
    """First word -> line."""
    text = describe(search(shards, *overrides))
    return {line.split()[0].rstrip(":"): line for line in text.splitlines()}


def test_evaluation_is_counted_and_a_limit_is_named_that_keeps_it_small(shards):
    """Every set counts what it holds up to max_tokens, each time that it is scored, at a forward pass a token."""
    inventory = take_inventory(shards)
    held = [inventory.valid[name].tokens - 1 for name in "abc"]
    config = search(shards, "proxy.eval={every: 4, max_tokens: 200}").config.proxy
    share = evaluation_share(config, resolve(config, 64), inventory, ["a", "b", "c"])
    assert share == pytest.approx(sum(min(200, n) for n in held) * 3 / 3 / 1280)  # 10 steps, every 4, and the last
    line = lines(shards, "proxy.eval={every: 4, max_tokens: 200}")["validation"]
    assert f"{share:.1%}" in line and "MORE THAN 10%" in line
    named = line.split("proxy.eval.max_tokens=")[1].replace(",", "")
    for tokens, fits in ((int(named), True), (int(named) + 16, False)):
        smaller = dataclasses.replace(config, eval=dataclasses.replace(config.eval, max_tokens=tokens))
        assert (evaluation_share(smaller, resolve(smaller, 64), inventory, ["a", "b", "c"]) <= 0.1) == fits
    assert "MORE" not in lines(shards, f"proxy.eval={{every: 4, max_tokens: {named}}}")["validation"]


def test_where_no_length_is_short_enough_the_plan_says_what_else(shards):
    line = lines(shards, "proxy.eval={every: 1, max_tokens: 200}")["validation"]
    assert "set proxy.eval.every=0" in line


def test_domains_that_nobody_would_score_are_named(shards):
    assert "NOT" not in lines(shards)
    for end in (".bin", ".idx", ".meta.json"):
        (shards / f"valid_b{end}").unlink()
    meta = read_meta(shards / "valid_c")
    write_meta(shards / "valid_c", dataclasses.replace(meta, num_bytes=0))
    found = lines(shards)
    assert " b:" in found["NOT"] and " c:" in found["NO"]


def test_the_sum_has_device_hours_and_a_finish_by_what_finished_ones_took(shards, monkeypatch):
    finished = {i: {"seconds": 1800.0} for i in range(2)}
    monkeypatch.setattr(budget, "replay", lambda _: type("Replay", (), {"finished": finished}))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    line = lines(shards, "proxies={workers: 2, threads: 3}")["all"]
    # 6 proxies of half an hour on 3 cores each; 4 are left, 2 at a time
    assert "9 core-hours" in line and "about 60 min to go" in line
    assert time.strftime("until %H:%M on %d %B", time.localtime(3600)) in line and "2 at a time" in line


def test_the_rate_is_that_of_one_proxy_among_the_others(shards, monkeypatch):
    from regmix_search.calibration import Calibration
    from regmix_search.crew import Setting

    found = Calibration(Setting(1, 4, "fp32", False, 4), 400.0, "measured")
    monkeypatch.setattr(budget, "calibrate", lambda *_: found)
    text = "\n".join(proxy_lines(search(shards, "proxy.eval.max_tokens=16"), take_inventory(shards)))
    each = 1280 * (1 + 48 / 3 / 1280) / 100
    assert f"{each:.3g} s each by the calibration" in text and f"about {2 * each:.3g} s to go" in text


def test_disk_counts_checkpoints_that_are_kept_of_proxies_too():
    config = load_config(SearchConfig, None, SMALL).proxy
    plan, folder = resolve(config, 64), run_bytes(config, 64)
    keeping = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=4, keep=3))
    assert run_bytes(keeping, 64) - folder == 2 * 12 * plan.params  # 10 steps: two checkpoints
    assert 1_000 < folder < 100_000


def test_nothing_is_written(shards):
    describe(search(shards))
    assert not (shards.parent / "out").exists()


def test_less_text_than_the_target_needs_is_refused_with_a_length_that_works(shards):
    """own.yaml is for 26B tokens: somebody with less text is told the key, and a value that leaves a choice."""
    with pytest.raises(ValueError, match=r"target_tokens is 26,214,400,000, the length of the run") as caught:
        lines(shards, "target_tokens=26_214_400_000")
    [named] = re.findall(r"--set (target_tokens=\d+) reads all text 2 times", str(caught.value))
    assert "PROXIES" not in lines(shards, named)


def test_proxies_longer_than_the_run_they_stand_for_are_named(shards):
    longer = lines(shards, "proxy.schedule.total_tokens=10_240")["PROXIES"]
    assert "10,240 tokens are longer" in longer and "(10,000)" in longer and "target_tokens" in longer
    assert "PROXIES" not in lines(shards, "proxy.schedule.total_tokens=9_984")
