"""The local pool: deaths, divergence, retries and interruption, with trial functions that misbehave on purpose."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted

from regmix_search.executors.local import LocalPool
from regmix_search.ledger import Counts, Ledger, Trial, replay
from regmix_search.progress import Progress
from regmix_search.proxies import run_trials


def always_nan(trial: Trial) -> dict[str, Any]:
    raise FloatingPointError("diverged")


def trials(n: int) -> list[Trial]:
    return [Trial(i, "train", {"a": 1.0}, seed=0) for i in range(n)]


def run(tmp_path: Path, n: int, first: dict[int, str], workers: int = 2, retries: int = 2) -> tuple[Ledger, str]:
    ledger, out = Ledger(tmp_path / "trials.jsonl", trials(n), {}, retries), io.StringIO()
    with Progress("proxies", out) as progress:
        list(run_trials(ledger, LocalPool(Scripted(str(tmp_path), first), workers, threads=1), progress))
    return ledger, out.getvalue()


def test_all_finish_in_reused_single_threaded_workers(tmp_path):
    ledger, _ = run(tmp_path, 8, {})
    assert ledger.counts == Counts(finished=8, running=0, failed=0, waiting=0)
    workers = [event["worker"] for event in ledger.finished.values()]
    assert {w["threads"] for w in workers} == {"1"}
    assert 1 <= len({w["pid"] for w in workers}) <= 2 and os.getpid() not in {w["pid"] for w in workers}


def test_deaths_and_errors_are_recorded_and_retried_and_divergence_is_not(tmp_path):
    ledger, out = run(tmp_path, 6, {0: "kill", 2: "exit", 3: "nan", 4: "oserror"})
    assert sorted(ledger.finished) == [0, 1, 2, 4, 5]
    assert ledger.failed == {3: "FloatingPointError: step 3: the gradient norm is nan"}
    reasons = {i: [event["reason"] for event in events] for i, events in replay(ledger.path).failures.items()}
    assert reasons[0][0].startswith("worker killed by SIGKILL")
    assert reasons[2] == ["worker died with exit code 3"] and reasons[4] == ["OSError: disk went away"]
    assert "disk went away" in replay(ledger.path).failures[4][0]["traceback"]
    assert "proxy t0003 failed" in out and "given up" in out and "it will be tried again" in out


def test_retries_end(tmp_path):
    ledger, _ = run(tmp_path, 2, {0: "kill"}, retries=0)
    assert sorted(ledger.finished) == [1] and list(ledger.failed) == [0]


def test_a_second_run_repeats_nothing(tmp_path):
    run(tmp_path, 3, {})
    before = (tmp_path / "trials.jsonl").read_bytes()
    ledger, _ = run(tmp_path, 3, {})
    assert (tmp_path / "trials.jsonl").read_bytes() == before and ledger.counts.finished == 3


def test_a_search_in_which_nothing_works_stops_early(tmp_path):
    ledger = Ledger(tmp_path / "trials.jsonl", trials(50), {})
    pool = LocalPool(always_nan, 1)
    with pytest.raises(ValueError, match="no proxy succeeds: FloatingPointError: diverged"):
        list(run_trials(ledger, pool, Progress("proxies", io.StringIO())))
    assert ledger.counts.failed == 3 and pool.workers == []


@dataclass(frozen=True)
class Mended:
    """Fails with a mistake in the data from the third trial on, until a file says that it was mended."""

    folder: str

    def __call__(self, trial: Trial) -> dict[str, Any]:
        if trial.index >= 2 and not (Path(self.folder) / "mended").exists():
            raise ValueError("shards: no train_* shards")
        return {"losses": {"readme": 1.0}, "tokens": 10}


def test_a_mistake_that_fails_every_proxy_stops_the_search_and_can_be_mended(tmp_path):
    ledger = Ledger(tmp_path / "trials.jsonl", trials(20), {})
    with pytest.raises(
        ValueError, match=r"no proxy succeeds: ValueError: shards: no train.*Mend it and run this again"
    ):
        list(run_trials(ledger, LocalPool(Mended(str(tmp_path)), 1), Progress("proxies", io.StringIO())))
    assert sorted(ledger.finished) == [0, 1] and ledger.counts.failed == 3
    (tmp_path / "mended").touch()
    again = Ledger(tmp_path / "trials.jsonl", trials(20), {})
    list(run_trials(again, LocalPool(Mended(str(tmp_path)), 1), Progress("proxies", io.StringIO())))
    assert again.counts == Counts(finished=20, running=0, failed=0, waiting=0)


def test_each_outcome_is_in_the_ledger_when_it_is_yielded_and_closing_ends_the_rest(tmp_path):
    ledger = Ledger(tmp_path / "trials.jsonl", trials(9), {})
    pool = LocalPool(Scripted(str(tmp_path), {1: "nan", 3: "hang"}), 2)
    with closing(run_trials(ledger, pool, Progress("proxies", io.StringIO()))) as outcomes:
        assert pool.workers == [], "nothing runs before somebody asks"
        for seen, outcome in enumerate(outcomes, start=1):
            state = replay(ledger.path)
            assert outcome.trial.index in (state.failures if outcome.result is None else state.finished)
            if seen == 4:
                break
        assert any(worker.trial for worker in pool.workers), "a worker waited for whoever looks at outcomes"
    assert pool.workers == [] and len(replay(ledger.path).finished) < 9
    again = Ledger(tmp_path / "trials.jsonl", trials(9), {}, driver=ledger.driver)
    assert again.counts.running == 0, "what was ended must not count as running for as long as this driver lives"


def test_interrupting_the_driver_kills_the_workers(tmp_path):
    class Stop(Exception):
        pass

    class Interrupting(Progress):
        def update(self, counts: Counts, tokens: int) -> None:
            if (tmp_path / "tried0").exists() and counts.running:
                raise Stop

    ledger = Ledger(tmp_path / "trials.jsonl", trials(2), {})
    pool = LocalPool(Scripted(str(tmp_path), {0: "hang", 1: "hang"}), 2)
    with pytest.raises(Stop):
        list(run_trials(ledger, pool, Interrupting("proxies", io.StringIO())))
    assert_dead(int((tmp_path / "tried0").read_text()))


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_driver_and_the_next_run_goes_on(tmp_path, kill):
    script = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]}\n"
        "from test_proxies import run\n"
        "from pathlib import Path\n"
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job has none
        "if __name__ == '__main__': run(Path(sys.argv[1]), 3, {1: 'hang', 2: 'hang'})\n"
    )
    path = tmp_path / "driver.py"
    path.write_text(script)
    driver = subprocess.Popen([sys.executable, str(path), str(tmp_path)])
    wait_for(lambda: (tmp_path / "tried1").exists() and (tmp_path / "tried2").exists())
    driver.send_signal(kill)
    driver.wait(timeout=120)
    for i in (1, 2):
        assert_dead(int((tmp_path / f"tried{i}").read_text()))
    assert sorted(replay(tmp_path / "trials.jsonl").finished) == [0]
    ledger, _ = run(tmp_path, 3, {})
    assert ledger.counts.finished == 3


def test_the_line_says_done_running_failed_and_rate():
    progress = Progress("proxies", io.StringIO())
    progress.at_start = Counts(finished=2, running=0, failed=0, waiting=8)
    line = progress.line(Counts(finished=5, running=2, failed=1, waiting=2), tokens=4000, seconds=8.0)
    assert line.startswith("proxies: 5 of 10 done, 2 running, 1 failed, 500 tokens/s, 8 s to go (about ")


def wait_for(condition: Any, timeout: float = 60.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def assert_dead(pid: int, timeout: float = 10.0) -> None:
    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_for(gone, timeout)
