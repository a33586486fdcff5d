"""benchmarks.proxies: the same work on both sides, each side at its own best setting, a chosen setting against all."""

import dataclasses

import pytest

from benchmarks import proxies, sweep
from benchmarks.proxies import Found, _found, speed_rows
from benchmarks.sides import SIDES, Case

TINY = Case("demo_proxy", 512, 32, 4, "fp32")


def test_a_lap_of_several_processes_counts_all_their_tokens():
    one = [[{"wall_s": 2.0, "cpu_s": 4.0, "memory_mb": 50}], [{"wall_s": 1.0, "cpu_s": 2.0, "memory_mb": 60}]]
    slow, fast = {"wall_s": 4.0, "cpu_s": 3.0, "memory_mb": 70}, {"wall_s": 2.0, "cpu_s": 1.0, "memory_mb": 80}
    found = _found(100, one, [[slow, slow], [slow, fast]])
    assert found == Found(one=100.0, packed=25.0 + 50.0, cpu=100 / 3.0, memory=80)


def test_each_side_has_the_setting_that_is_its_best():
    at = {
        "fp32": {"ours": Found(1, 10, 1, 5), "hf": Found(4, 8, 1, 7), "litgpt": Found(1, 1, 1, 9)},
        "bf16": {"ours": Found(3, 6, 1, 1), "hf": Found(2, 9, 1, 3), "litgpt": Found(1, 1, 1, 9)},
    }
    assert set(at["fp32"]) == set(SIDES)
    rows = {row.key.removeprefix("k."): row for row in speed_rows("k", at)}
    assert (rows["one"].ours, rows["one"].peer) == (3, 4) and (rows["packed"].ours, rows["packed"].peer) == (10, 9)
    assert (rows["memory"].ours, rows["memory"].peer, rows["memory"].peer_name) == (5, 3, "hf")  # where it is fastest
    assert rows["packing"].ratio == pytest.approx(10 / 3)


def test_unknown_keys_are_named(capsys):
    with pytest.raises(SystemExit):
        proxies.main(["--only", "nope"])
    assert "no case nope" in capsys.readouterr().err


@pytest.mark.slow
def test_our_sweep_and_the_scripts_both_learn(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(sweep, "PROXIES", 2)
    monkeypatch.setattr(sweep, "cores", lambda: 2)
    wall, cpu = sweep.sweep_rows(TINY, steps=200)  # raises where a side has not learned
    assert wall.ours > 0 and cpu.peer > cpu.ours > 0


def test_a_sweep_that_learns_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(sweep, "_our_sweep", lambda *_: 3.0)
    for theirs in (6.0, float("nan")):
        monkeypatch.setattr(sweep, "_plain_sweep", lambda *_, loss=theirs: loss)
        with pytest.raises(RuntimeError, match="has not learned"):
            sweep.sweep_rows(TINY, steps=30)


@pytest.mark.slow
def test_the_first_step_is_waited_for():
    pytest.importorskip("transformers")
    wall, cpu = sweep.start_rows(TINY, repeats=1)
    assert wall.ours > 0.5 and 0.3 < cpu.ours < 60 and wall.peer > 0.5


@pytest.mark.slow
def test_the_chosen_setting_is_timed_again_with_all_others():
    (row,) = proxies.calibration_rows("calibration.tiny", dataclasses.replace(TINY, sequences=8))
    assert 0 < row.ratio <= 1
