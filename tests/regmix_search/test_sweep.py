"""The stage proxies of a real search on every executor: the same losses to the bit, also when its driver is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback_slurm import slurm_cluster, why_not

from regmix_search import run as cli
from regmix_search.ledger import replay

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SMALL = ["mixtures.count=5", "mixtures.holdout=0", "mixtures.repeats=1", "proxies.workers=2"]
SEARCH = [
    "--config",
    str(ROOT / "configs/search/demo.yaml"),
    "--preset",
    "smoke",
    *(a for s in SMALL for a in ("--set", s)),
]


def start(out: Path, *settings: str, what: tuple[str, ...] = ("--stage", "proxies")) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "regmix_search.run", *SEARCH, "--out", str(out), *what]
    command += [argument for setting in settings for argument in ("--set", setting)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "6 of 6 done" in text, text
    return text


def losses(out: Path) -> dict[int, Any]:
    return {index: (event["losses"], event["bpb"]) for index, event in replay(out / "trials.jsonl").finished.items()}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search as it is before its proxies."""
    out = tmp_path_factory.mktemp("sweep") / "planned"
    for stage in ("corpus", "tokenizer", "shards", "mixtures"):
        assert cli.main([*SEARCH, "--out", str(out), "--stage", stage]) == 0
    return out


@pytest.fixture(scope="module")
def local(planned: Path) -> dict[int, Any]:
    out = shutil.copytree(planned, planned.with_name("local"))
    finish(start(out))
    return losses(out)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if reason := why_not():
        pytest.skip(reason)
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as environment, pytest.MonkeyPatch.context() as m:
        m.setenv("SLURM_CONF", environment["SLURM_CONF"])
        yield


def test_slurm_gives_what_the_local_pool_gives_although_its_driver_is_killed(slurm, planned, local):
    out = shutil.copytree(planned, planned.with_name("slurm"))
    driver = start(out, "proxies.executor=slurm")
    while not replay(out / "trials.jsonl").finished:
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    first = set(replay(out / "trials.jsonl").finished)
    finish(start(out, "proxies.executor=slurm", "proxies.slurm.chunk=3"))
    assert losses(out) == local and 0 < len(first) < 6
    events = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    finished = Counter(event["trial"] for event in events if event["event"] == "finish")
    assert finished == Counter(range(6)) and not any(event["event"] == "fail" for event in events)
    claims = Counter(event["trial"] for event in events if event["event"] == "claim")
    assert all(claims[index] == 1 for index in first), "what was finished was trained again"
    assert all(list((out / "slurm").glob(f"*/t000{i}.log")) for i in range(6)), "a trial has no log"
    queue = subprocess.run(["squeue", "-h", "-r"], capture_output=True, text=True)
    end = time.monotonic() + 120
    while queue.stdout and time.monotonic() < end:  # tasks of the killed driver see that it is gone
        time.sleep(0.5)
        queue = subprocess.run(["squeue", "-h", "-r"], capture_output=True, text=True)
    assert queue.stdout == ""


def test_ray_gives_what_the_local_pool_gives(planned, local):
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    out = shutil.copytree(planned, planned.with_name("ray"))
    finish(start(out, "proxies.executor=ray"))
    assert losses(out) == local


def test_a_second_process_joins_and_goes_on_when_the_first_is_killed(planned, local):
    out = shutil.copytree(planned, planned.with_name("joined"))
    leader = start(out, "proxies.workers=1")
    while not (out / "trials.jsonl").exists():
        assert leader.poll() is None, leader.communicate()[0]
        time.sleep(0.05)
    joined = start(out, "proxies.workers=1", what=("--join",))
    while len({event["driver"] for event in replay(out / "trials.jsonl").finished.values()}) < 2:
        assert leader.poll() is None and joined.poll() is None, "one of them has done everything"
        time.sleep(0.05)
    leader.send_signal(signal.SIGKILL)
    leader.wait()
    text = finish(joined)
    mine = Counter(event["driver"] for event in replay(out / "trials.jsonl").finished.values())
    assert losses(out) == local and any(
        f"6 of 6 done, {count} of them by this driver" in text for count in mine.values()
    )
    finish(start(out))  # what the leader would have written
    assert len((out / "losses.csv").read_text().splitlines()) == 1 + 6 and list((out / "drivers").iterdir()) == []
