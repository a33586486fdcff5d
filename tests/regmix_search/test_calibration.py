"""Calibration: what it tries, what it picks, what it keeps, and that nothing is picked without the user's leave."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.config import config_hash, load_config, to_dict
from megatron_lite.testing import tiny_config, write_tiny_shards
from regmix_search import calibration, machine
from regmix_search.calibration import calibrate, packings, read_proxy, search_settings, variants
from regmix_search.config import ProxiesConfig, SearchConfig
from regmix_search.crew import Crew, Setting, Timing, timed_micro_batch
from regmix_search.ledger import Ledger
from regmix_search.search import Search
from regmix_search.stages import settings

PROXY = load_config(
    SearchConfig, None, ["proxy.data.seq_length=512", "proxy.batch={global_batch_size: 32, micro_batch_size: 32}"]
).proxy
ALL = ("precision", "micro_batch_size", "loss_chunk", "compile")


class Scripted:
    """A crew whose timings are a formula; it remembers what it was asked."""

    def __init__(self, rate: Callable[[Setting], float], memory: int = 1, gpus: tuple[str, ...] = ()) -> None:
        self.rate, self.memory, self.gpus = rate, memory, gpus
        self.asked: list[Setting] = []

    def time(self, setting: Setting) -> Timing:
        self.asked.append(setting)
        rate = self.rate(setting)
        if rate == 0:
            raise RuntimeError("a process died")
        return Timing(rate, rate, 40.0 if setting.compile else 1.0, self.memory)

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def fastest(crew: Scripted, tokens: float = 1e9, cores: int = 8, **proxies: object) -> Setting:
    best, timed = search_settings(crew, PROXY, ProxiesConfig(**proxies), tokens, cores)
    assert best in timed or best.workers == proxies.get("workers")
    return best


def tried(cores: int, gpus: int = 0, **fixed: int) -> list[tuple[int, int]]:
    return list(packings(cores, ProxiesConfig(**fixed), gpus))


def test_every_core_is_used_and_what_the_user_fixed_stays():
    assert tried(2) == [(1, 2), (2, 1), (1, 1)]
    assert tried(8)[:4] == [(1, 8), (2, 4), (4, 2), (8, 1)]
    assert {t for t, _ in tried(8, threads=4)} == {4} and {n for _, n in tried(8, workers=3)} == {3}
    assert tried(8, threads=16) == [(16, 1)] and tried(8, threads=2, workers=5) == [(2, 5)]
    assert tried(16, gpus=2) == [(8, 2), (4, 4), (2, 8), (1, 16)] and tried(16, gpus=2, per_gpu=2) == [(4, 4)]


def test_only_what_the_user_allows_is_tried():
    assert {key for key, _ in variants(PROXY, ALL, cuda=False)} == set(ALL)
    assert not list(variants(PROXY, (), cuda=False))
    written = dataclasses.replace(PROXY, precision="fp32", compile=True, loss_chunk=1 << 20)
    assert {key for key, _ in variants(written, ALL, cuda=False)} == {"micro_batch_size"}
    sizes = [change["micro_batch_size"] for key, change in variants(PROXY, ALL, False) if key == "micro_batch_size"]
    assert sizes == [4, 16] and all(PROXY.batch.global_batch_size % size == 0 for size in sizes)


def test_the_fastest_of_all_combinations_is_found_where_each_choice_helps_by_itself():
    def rate(setting: Setting) -> float:
        sizes = {4: 1.0, 16: 1.4, 32: 1.2}
        each = setting.threads**0.7 * sizes[setting.micro_batch_size] * (1.5 if setting.precision == "bf16" else 1.0)
        return each * min(setting.workers, 4) * (1.2 if setting.compile else 1.0)

    found = fastest(Scripted(rate), tokens=1e6)
    grid = itertools.product(tried(8), ("fp32", "bf16"), (False, True), (4, 16, 32))
    everything = [Setting(t, n, p, c, m) for (t, n), p, c, m in grid]
    assert rate(found) == max(map(rate, everything)) and found == Setting(2, 4, "bf16", True, 16)


@pytest.mark.parametrize(("gain", "chosen"), [(1.09, "fp32"), (1.11, "bf16")])
def test_a_setting_that_changes_digits_must_be_clearly_faster(gain, chosen):
    crew = Scripted(lambda setting: setting.workers * (gain if setting.precision == "bf16" else 1.0))
    assert fastest(crew).precision == chosen


def test_the_compiler_is_tried_where_it_can_pay():
    crew = Scripted(lambda setting: setting.workers * (1.5 if setting.compile else 1.0))
    assert not fastest(crew, tokens=8 * calibration.COMPILE / calibration.SHARE * 0.9).compile
    assert not any(setting.compile for setting in crew.asked)
    assert fastest(crew, tokens=8 * calibration.COMPILE / calibration.SHARE * 1.1).compile


def test_memory_limits_how_many_and_failing_settings_are_passed_over(monkeypatch):
    monkeypatch.setattr(calibration, "free_memory", lambda: 4 * 2**30)
    crew = Scripted(lambda s: 0 if s.precision == "bf16" else s.workers, memory=2**30)
    assert fastest(crew).workers == 3 and max(s.workers for s in crew.asked) == 3  # 0.8 of 4
    with pytest.raises(RuntimeError):
        fastest(Scripted(lambda s: 0))


def test_fixed_numbers_are_kept_even_where_they_are_slower():
    crew = Scripted(lambda setting: 1 / setting.workers / setting.threads)
    best = fastest(crew, threads=2, workers=3)
    assert (best.threads, best.workers) == (2, 3)


def make_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, rate=None) -> tuple[Search, Scripted]:
    config = load_config(SearchConfig, None, [f"out_dir={tmp_path / 'out'}", *overrides])
    crew = Scripted(rate or (lambda s: s.workers * (2.0 if s.precision == "bf16" else 1.0)))
    monkeypatch.setattr(calibration, "Crew", lambda *_: crew)
    monkeypatch.setattr(calibration, "cores", lambda: 4)
    return Search(config, io.StringIO()), crew


def test_what_was_found_is_kept_and_printed(tmp_path, monkeypatch):
    search, crew = make_search(tmp_path, monkeypatch)
    assert read_proxy(search) is None
    dry = calibrate(search, 2048, save=False)
    assert not (tmp_path / "out").exists() and dry.setting.precision == "bf16"
    found = calibrate(search, 2048)
    asked = len(crew.asked)
    again = calibrate(search, 2048)
    assert again == found and dry.setting == found.setting and len(crew.asked) == asked
    assert read_proxy(search).precision == "bf16" and found.worker_rate == found.tokens_per_s / 4
    assert "4 at a time x 1 thread, bf16" in found.summary and "tokens/s" in found.summary
    assert len(json.loads((tmp_path / "out/calibration.json").read_text())["machines"]) == 1


def test_another_machine_measures_packing_and_keeps_what_losses_depend_on(tmp_path, monkeypatch):
    search, _ = make_search(tmp_path, monkeypatch)
    calibrate(search, 2048)
    search, crew = make_search(tmp_path, monkeypatch, rate=lambda s: s.threads * (9.0 if s.precision == "fp32" else 1))
    monkeypatch.setattr(calibration, "cores", lambda: 16)
    there = calibrate(search, 2048).setting
    kept = {(setting.precision, setting.micro_batch_size, setting.compile) for setting in crew.asked}
    assert there.precision == "bf16" and kept == {("bf16", 16, False)}
    assert there.threads == 16 and read_proxy(search).precision == "bf16"


def test_other_settings_are_measured_anew(tmp_path, monkeypatch):
    search, crew = make_search(tmp_path, monkeypatch)
    calibrate(search, 2048)
    search, crew = make_search(tmp_path, monkeypatch, "proxy.precision=fp32")
    assert read_proxy(search) is None
    assert calibrate(search, 2048).setting.precision == "fp32" and crew.asked
    search, crew = make_search(tmp_path, monkeypatch, "proxy.log.every=7", "proxy.precision=fp32")
    calibrate(search, 2048)
    assert not crew.asked


def test_the_ledger_knows_what_was_chosen(tmp_path, monkeypatch):
    search, _ = make_search(tmp_path, monkeypatch)
    written = settings(search.config)
    calibrate(search, 2048)
    chosen = settings(search.config, read_proxy(search))
    assert written["settings"]["proxy"]["precision"] == "auto" and chosen["settings"]["proxy"]["precision"] == "bf16"
    ledger = Ledger(tmp_path / "trials.jsonl", [], chosen)
    assert ledger.config_hash != Ledger(tmp_path / "other.jsonl", [], written).config_hash


def test_a_ledger_with_trials_keeps_its_digits(tmp_path, monkeypatch):
    search, crew = make_search(tmp_path, monkeypatch)
    monkeypatch.setattr(calibration, "replay", lambda _: type("Replay", (), {"finished": {0: {}}}))
    assert calibrate(search, 2048).setting.precision == "auto"
    assert {setting.precision for setting in crew.asked} == {"auto"}


def test_short_searches_are_not_measured(tmp_path, monkeypatch):
    short = (
        "proxy.model.preset=demo_proxy",
        "proxy.data.seq_length=128",
        "proxy.schedule={total_tokens: 1_000_000, warmup_steps: 0}",
    )
    search, crew = make_search(tmp_path, monkeypatch, *short, "mixtures={count: 4, holdout: 0, repeats: 0}")
    found = calibrate(search, 512)
    assert not crew.asked and found.tokens_per_s is None and found.worker_rate is None
    assert (found.setting.threads, found.setting.workers) == (1, 4) and "not measured" in found.summary


def test_on_a_cluster_nothing_is_measured_here(tmp_path, monkeypatch):
    search, crew = make_search(tmp_path, monkeypatch, "proxies={executor: slurm, threads: 3}")
    found = calibrate(search, 2048)
    assert not crew.asked and not (tmp_path / "out").exists()
    assert found.setting == Setting(3, 0, "auto", False, 16) and found.worker_rate is None


def test_on_gpus_some_share_one_and_bf16_is_taken():
    best = fastest(Scripted(lambda s: min(s.workers, 4), gpus=("0", "1")))
    assert best == Setting(2, 4, "bf16", False, 32)


def test_long_micro_batches_are_timed_by_a_part_that_divides_them():
    assert timed_micro_batch(PROXY, 1) == 32
    flops = 1e11 / PROXY.data.seq_length
    assert timed_micro_batch(PROXY, int(flops / 5)) == 4 and timed_micro_batch(PROXY, int(flops * 9)) == 1


@pytest.mark.slow
def test_a_crew_times_two_real_proxies_at_once_and_says_what_fails(tmp_path):
    write_tiny_shards(tmp_path / "shards")
    proxy = tiny_config(tmp_path / "run")
    with Crew(proxy, 64) as crew:
        for workers in (1, 2):
            timing = crew.time(Setting(1, workers, "fp32", False, 4))
            assert timing.tokens_per_s > 100 and timing.undisturbed > 100 and timing.ready_s > 0
            assert timing.memory > 50e6
        with pytest.raises(RuntimeError, match=r"ValueError: batch\.micro_batch_size=3"):
            crew.time(Setting(1, 1, "fp32", False, 3))
        assert crew.time(Setting(1, 1, "bf16", False, 8)).tokens_per_s > 100


def test_the_losss_chunk_is_chosen_kept_and_known_to_the_ledger(tmp_path, monkeypatch):
    rate = lambda s: s.workers * (1.2 if s.loss_chunk == 1 << 26 else 1.0)  # noqa: E731
    search, _ = make_search(tmp_path, monkeypatch, rate=rate)
    found = calibrate(search, 2048)
    assert found.setting.loss_chunk == 1 << 26 and "loss in chunks of 67,108,864 logits" in found.summary
    assert found.setting.apply(search.config.proxy).loss_chunk == read_proxy(search).loss_chunk == 1 << 26
    assert settings(search.config, read_proxy(search))["settings"]["proxy"]["loss_chunk"] == 1 << 26


def test_a_chunk_that_is_written_stays(tmp_path, monkeypatch):
    written = ("proxy.loss_chunk=4096", "proxies.threads=1")
    search, crew = make_search(tmp_path, monkeypatch, *written)
    assert calibrate(search, 2048).setting.loss_chunk == read_proxy(search).loss_chunk == 4096
    assert {setting.loss_chunk for setting in crew.asked} == {4096}
    on_a_cluster = calibrate(make_search(tmp_path, monkeypatch, *written, "proxies.executor=slurm")[0], 2048)
    assert on_a_cluster.setting.apply(search.config.proxy).loss_chunk == 4096


def test_what_was_settled_before_the_chunk_was_calibrated_still_holds(tmp_path, monkeypatch):
    search, _ = make_search(tmp_path, monkeypatch)
    asked = {key: value for key, value in to_dict(search.config.proxy).items() if key in calibration.TIMED}
    before = {**asked, "seq_length": 2048, "calibrate": ["precision", "micro_batch_size", "compile"]}
    keys = {"precision": "bf16", "compile": False, "micro_batch_size": 4}
    record = {"inputs": config_hash(before), "proxy": keys, "machines": {}}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/calibration.json").write_text(json.dumps(record))
    assert (read_proxy(search).precision, read_proxy(search).batch.micro_batch_size) == ("bf16", 4)
    assert calibrate(search, 2048).setting.loss_chunk == 0, "losses of trials that are there depend on it"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "350000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "9900000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
    ],
)
def test_a_containers_quota_limits_cores_for_everybody(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / "cpu").mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    assert calibration.cores() == Search(SearchConfig(), io.StringIO()).workers(0) == expected
    assert calibration.describe_machine()["cores"] == expected
