"""Several drivers on one ledger: each trial is trained once for the record, whoever is killed, stopped or late."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from regmix_search.drivers import Driver
from regmix_search.ledger import Ledger, Trial, replay

WORK = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from regmix_search import journal
from regmix_search.ledger import Ledger, Trial
folder, count, kind, pause = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
def append(self, line):  # what O_APPEND is on NFS: the client asks for the size, then writes there
    self.path.touch()
    with open(self.path, "r+b") as file:
        file.seek(self.path.stat().st_size)
        time.sleep(0.001)
        file.write(line + b"\\n")
if kind == "nfs":
    journal.Journal.append = append
if kind == "no_locks":
    journal.fcntl = type("NoLocks", (), {{"flock": staticmethod(lambda *a: None), "LOCK_EX": 0}})
trials = [Trial(i, "train", {{"a": 1.0}}, 0) for i in range(count)]
ledger = Ledger(folder / "trials.jsonl", trials, {{}})
print("ready", flush=True)
sys.stdin.readline()
while ledger.counts.finished < count:
    ledger.refresh()
    if (trial := ledger.ask()) is None:
        time.sleep(0.01)
        continue
    print("claimed", trial.index, flush=True)
    time.sleep(pause)
    if ledger.tell(trial, losses={{"x": float(trial.index)}}):
        print("told", trial.index, flush=True)
"""


def work(folder: Path, count: int, kind: str = "local", pause: float = 0.0) -> subprocess.Popen[str]:
    """A driver in a process of its own; it starts with the trials when a line arrives on its stdin."""
    command = [sys.executable, "-c", WORK.format(path=sys.path), str(folder), str(count)]
    command += [kind, str(pause)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(*drivers: subprocess.Popen[str]) -> None:
    for driver in drivers:
        assert driver.stdout is not None and driver.stdout.readline() == "ready\n"
    for driver in drivers:
        assert driver.stdin is not None
        driver.stdin.write("go\n")
        driver.stdin.flush()


def said(driver: subprocess.Popen[str], word: str) -> list[int]:
    text, _ = driver.communicate(timeout=120)
    return [int(line.split()[1]) for line in text.splitlines() if line.startswith(word)]


def finishes(folder: Path) -> Counter[int]:
    lines = (folder / "trials.jsonl").read_text().splitlines()
    return Counter(e["trial"] for e in map(json.loads, filter(None, lines)) if e["event"] == "finish")


def trials(count: int) -> list[Trial]:
    return [Trial(i, "train", {"a": 1.0}, 0) for i in range(count)]


@pytest.mark.parametrize("kind", ["local", "no_locks", "nfs"])
def test_drivers_that_claim_at_once_claim_each_trial_once(tmp_path, kind):
    """Also where locks do not reach other machines, and where appends are not atomic: one of the two is enough."""
    drivers = [work(tmp_path, 40, kind) for _ in range(4)]
    go(*drivers)
    claimed = [said(driver, "claimed") for driver in drivers]
    assert sorted(i for indices in claimed for i in indices) == list(range(40)), (
        "a trial was claimed by two drivers, or by none"
    )
    assert sum(map(bool, claimed)) >= 2, "one driver did everything: this test has not tested anything"
    assert finishes(tmp_path) == Counter(range(40))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_drivers_killed_at_random_points_lose_nothing_and_repeat_nothing(tmp_path, seed):
    rng, count = random.Random(seed), 60
    running, ended = [work(tmp_path, count, pause=0.01) for _ in range(3)], []
    go(*running)
    for _ in range(6):
        time.sleep(rng.uniform(0.02, 0.2))
        running.sort(key=lambda _: rng.random())
        victim = running.pop()
        victim.send_signal(signal.SIGKILL)
        ended.append(victim)
        running.append(work(tmp_path, count, pause=0.01))
        go(running[-1])
    told = [index for driver in [*running, *ended] for index in said(driver, "told")]
    state = replay(tmp_path / "trials.jsonl")
    assert sorted(state.finished) == list(range(count)) and state.torn_lines == []
    assert set(finishes(tmp_path).values()) == {1} and max(Counter(told).values()) == 1
    assert state.failures == {}, "a driver's death is not the trial's fault"
    assert len(told) >= count - len(ended), "more finishes than kills were never reported"


def test_the_claims_of_a_killed_driver_are_free_at_once_on_the_same_machine(tmp_path):
    other = work(tmp_path, 2, pause=60)
    go(other)
    assert other.stdout is not None and other.stdout.readline() == "claimed 0\n"
    ledger = Ledger(tmp_path / "trials.jsonl", trials(2), {})
    assert ledger.counts.running == 1 and ledger.ask().index == 1 and ledger.ask() is None  # type: ignore[union-attr]
    other.kill()
    other.wait()
    time.sleep(1.1)  # what is known of another driver is asked again after a second
    assert ledger.ask().index == 0  # type: ignore[union-attr]
    released = [e for e in map(json.loads, ledger.path.read_text().splitlines()) if e["event"] == "release"]
    assert len(released) == 1 and released[0]["by"] == ledger.driver.id


def test_a_driver_on_another_machine_is_dead_after_its_lease(tmp_path):
    here, there = Driver(tmp_path, lease=5), Driver(tmp_path, lease=5)
    there._stop.set()  # no further sign of life
    there.path.write_text(json.dumps({"boot": "another machine's", "joined": False}))
    assert here.alive(there.id) and here.led()
    old = time.time() - 6
    os.utime(there.path, (old, old))
    here._seen.clear()
    assert not here.alive(there.id)
    here.close()
    assert not here.alive(here.id) and not Driver(tmp_path, joined=True, lease=5).led(), "nobody leads any more"


def test_a_driver_that_was_stopped_too_long_loses_its_trial_and_trains_on(tmp_path):
    """SIGSTOP stands for a suspended machine: the lock is held, but there is no sign of life."""
    stopped = work(tmp_path, 3, pause=1.5)
    go(stopped)
    assert stopped.stdout is not None and stopped.stdout.readline() == "claimed 0\n"
    stopped.send_signal(signal.SIGSTOP)
    driver = Driver(tmp_path / "drivers", lease=0.5)
    ledger = Ledger(tmp_path / "trials.jsonl", trials(3), {}, driver=driver)
    time.sleep(1.2)
    taken = ledger.ask()
    assert taken is not None and taken.index == 0
    stopped.send_signal(signal.SIGCONT)
    time.sleep(2.0)
    assert 0 not in replay(ledger.path).finished, "the late driver's result counted although the trial is another's"
    assert ledger.tell(taken, losses={"x": 0.0})
    assert sorted(said(stopped, "told")) == [1, 2]
    assert replay(ledger.path).finished[0]["driver"] == driver.id


def test_a_late_result_of_a_trial_that_nobody_has_taken_counts(tmp_path):
    first, second = (Ledger(tmp_path / "trials.jsonl", trials(1), {}) for _ in range(2))
    trial = first.ask()
    assert trial is not None
    with second.journal.locked():
        second.refresh(locked=True)
        second._release(lambda driver: driver == first.driver.id)
    assert first.tell(trial, losses={"x": 1.0})
    assert second.ask() is None and second.finished[0]["losses"] == {"x": 1.0}


def test_a_failure_told_by_one_that_lost_the_trial_uses_up_no_try(tmp_path):
    first, second = (Ledger(tmp_path / "trials.jsonl", trials(1), {}, retries=0) for _ in range(2))
    trial = first.ask()
    assert trial is not None
    with second.journal.locked():
        second.refresh(locked=True)
        second._release(lambda driver: driver == first.driver.id)
    first.fail(trial, "worker killed by SIGKILL", retry=True)
    second.refresh()
    assert second.failed == {} and second.ask() == trial


def test_a_line_torn_by_one_driver_is_skipped_by_all(tmp_path):
    first, second = (Ledger(tmp_path / "trials.jsonl", trials(3), {}) for _ in range(2))
    mine = first.ask()
    with first.path.open("ab") as file:
        file.write(b'{"event": "finish", "trial": 0, "los')  # a third driver was killed here, or its disk was full
    theirs = second.ask()
    assert mine is not None and theirs is not None and (mine.index, theirs.index) == (0, 1)
    assert replay(first.path).claims == {0: first.driver.id, 1: second.driver.id}, "the torn line took another with it"
    assert first.tell(mine, losses={"x": 1.0}) and second.tell(theirs, losses={"x": 2.0})
    second.refresh()
    assert sorted(second.finished) == [0, 1] and second.torn_lines == [2]
    first.refresh()
    assert sorted(first.finished) == [0, 1] == sorted(replay(first.path).finished)
    assert replay(first.path).torn_lines == [2]


def test_half_of_a_claim_that_is_being_written_is_read_again_when_it_is_whole(tmp_path, monkeypatch):
    """Where locks do nothing a write becomes visible a page at a time, while another driver reads."""
    first, second = (Ledger(tmp_path / "trials.jsonl", trials(2), {}) for _ in range(2))
    theirs = first.ask()
    text = first.path.read_bytes()
    first.path.write_bytes(text[:100])
    assert theirs is not None and theirs.index == 0
    append = second.journal.append

    def rest_arrives(line: bytes) -> None:
        monkeypatch.undo()
        first.path.write_bytes(text)
        append(line)

    monkeypatch.setattr(second.journal, "append", rest_arrives)
    mine = second.ask()
    assert mine is not None and mine.index == 1, "the first driver's trial was claimed again"
    assert second.torn_lines == [] and replay(first.path).torn_lines == []


def test_other_settings_are_refused_while_a_driver_is_at_work(tmp_path):
    first = Ledger(tmp_path / "trials.jsonl", trials(2), {"settings": {"lr": 1}})
    assert first.ask() is not None
    with pytest.raises(ValueError, match=r"settings\.lr: 1 -> 2"):
        Ledger(tmp_path / "trials.jsonl", trials(2), {"settings": {"lr": 2}})
    first.release()
    second = Ledger(tmp_path / "trials.jsonl", trials(2), {"settings": {"lr": 2}})
    assert second.ask() is not None
    with pytest.raises(ValueError, match="taken over by a driver with other settings"):
        first.ask()


def test_a_ledger_from_before_there_were_several_drivers_is_read(tmp_path):
    path, head = tmp_path / "trials.jsonl", {"kind": "train", "weights": {"a": 1.0}, "seed": 0, "pid": 1, "host": "h"}
    old = [{"event": "claim", "trial": 0}, {"event": "claim", "trial": 0, "pid": 2}]
    old += [{"event": "finish", "trial": 0, "losses": {"x": 1.0}, "pid": 2}, {"event": "claim", "trial": 1}]
    path.write_text("".join(json.dumps({**head, **event}) + "\n" for event in old))
    state = replay(path)
    assert sorted(state.finished) == [0] and state.claims == {}


def test_appends_that_get_lost_are_noticed(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "trials.jsonl", trials(2), {})
    monkeypatch.setattr(ledger.journal, "append", lambda line: None)
    with pytest.raises(OSError, match="what was appended is not there"):
        ledger.ask()
