"""What is seen of a search: the live table, the status from another terminal, TensorBoard."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from finished_search import make_search
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.util import tensor_util
from test_early import made

from megatron_lite.files import folder_lock
from regmix_search import board, run
from regmix_search.drivers import LEASE, Driver, living
from regmix_search.ledger import Counts, Ledger, Trial, replay
from regmix_search.progress import Progress
from regmix_search.status import describe_status, read_status


class Terminal(io.StringIO):
    """A stream that says that somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def half(tmp_path: Path) -> Iterator[Path]:
    """A search of six trials by this process: two finished, one running, one diverged, one failed once, one waiting."""
    out = tmp_path / "half"
    out.mkdir()
    (out / "config.yaml").write_text("name: half\nfit: {target: a}\n")
    (out / "mixtures.csv").write_text("index,train_web,train_code\n" + "".join(f"{i},0.{i},0.9\n" for i in range(6)))
    trials = [Trial(i, "train", {"web": 0.25, "code": 0.75}, 0) for i in range(6)]
    with Driver(out / "drivers") as driver:
        ledger = Ledger(out / "trials.jsonl", trials, {}, driver=driver)
        asked = [ledger.ask() for _ in range(5)]
        ledger.tell(asked[0], {"a": 2.0, "b": 1.0}, tokens=100, seconds=1.0)
        ledger.tell(asked[1], {"a": 1.5, "b": 9.0}, tokens=300, seconds=1.0, stopped={"tokens": 300, "losses": {}})
        ledger.fail(asked[2], "FloatingPointError: step 3", retry=False)
        ledger.fail(asked[3], "worker killed by SIGKILL", retry=True)
        folder = out / "proxies" / "t0004"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"step": 10, "train/loss": 4.5}\n{"step": 20, "train/loss": 4.25}\n{"st')
        (folder / "plan.json").write_text('{"total_steps": 240}')
        yield out


def shift_time(out: Path, first: float, last: float) -> None:
    """Spreads the ledger's times evenly between two."""
    events = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    for i, event in enumerate(events):
        event["time"] = first + (last - first) * i / (len(events) - 1)
    (out / "trials.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_status_counts_every_trial_and_names_what_failed(half: Path) -> None:
    now = time.time()
    shift_time(half, now - 200, now - 100)
    status = read_status(half)
    counts = {"planned": 6, "finished": 2, "running": 1, "failed": 1, "waiting": 2}
    assert status["trials"] == counts
    [running] = status["running"]
    assert (running["trial"], running["step"], running["steps"], running["loss"]) == (4, 20, 240, 4.25)
    assert status["tokens_per_s"] == pytest.approx(400 / 200, rel=0.05)
    assert status["seconds_left"] == pytest.approx(200 / 4 * 3, rel=0.05), "four ended in 200 s, three are left"
    assert status["finish_at"] == pytest.approx(now + 150, abs=10)
    assert [(f["trial"], f["tries"], f["given_up"]) for f in status["failures"]] == [(2, 1, True), (3, 1, False)]
    assert status["best"]["trial"] == 1 and status["best"]["loss"] == 1.5
    text = describe_status(status)
    assert "2 of 6 done, 1 running, 1 failed, 1 ended early" in text and "step 20 of 240, loss 4.2500" in text
    assert "t0002 failed 1 x, given up: FloatingPointError: step 3" in text
    assert "t0003 failed 1 x, to be tried again: worker killed by SIGKILL" in text


def test_a_dead_drivers_claims_are_not_running(half: Path) -> None:
    shift_time(half, 1000.0, 1100.0)
    [driver] = (half / "drivers").iterdir()
    assert living(half / "drivers") == {driver.name} and living(half / "none") == set()
    driver.write_text(json.dumps({"boot": "another machine's", "joined": False}))
    assert read_status(half)["trials"]["running"] == 1
    os.utime(driver, (time.time() - 2 * LEASE,) * 2)
    status = read_status(half)
    assert status["trials"]["running"] == 0 and status["trials"]["waiting"] == 3 and status["finish_at"] is None
    assert status["tokens_per_s"] == 4.0 and "nobody is at work any more" in describe_status(status)


def test_a_file_that_its_dead_driver_left_behind_is_nobody(tmp_path: Path) -> None:
    """Fresh, of this machine, but without the lock that a living driver holds."""
    with Driver(tmp_path) as driver:
        left = driver.path.read_bytes()
        assert living(tmp_path) == {driver.id}
    (tmp_path / driver.id).write_bytes(left)
    assert living(tmp_path) == set() and (tmp_path / driver.id).exists()


def test_status_needs_no_lock_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = make_search(tmp_path / "demo", {"prior": 0.3, "uniform": 0.1, "best_single": 0.2}, trials=100)
    optimum = json.loads((out / "optimum.json").read_text())
    (out / "optimum.json").write_text(json.dumps({**optimum, "objective": {"predicted": 5.5, "prior": 6.0}}))
    with folder_lock(out):
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        assert run.main(["--stage", "status", "--out", str(out)]) == 0
        assert run.main(["--stage", "status", "--out", str(out), "--json"]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    text, status = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    found = json.loads(status)
    assert found["trials"]["finished"] == 103 and found["optimum"]["target"] == "readme"
    assert "last fit: 5.5000 (" in text and "against the prior's 6.0000: prose 38" in text and "best: readme" in text
    assert run.main(["--stage", "status", "--out", str(tmp_path / "none")]) == 2
    assert "no search here" in capsys.readouterr().err


def test_status_starts_without_torch() -> None:
    code = "import sys; import regmix_search.status; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_live_table_holds_counts_pace_best_and_the_early_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    stream = Terminal()
    with Progress("proxies", stream) as progress:
        progress.rows |= {"best": "readme 4.81 in t0031", "early fit": made().line()}
        progress.started, progress.shown = progress.started - 100, progress.shown - 100
        progress.at_start = Counts(0, 2, 0, 8)
        progress.update(Counts(finished=4, running=2, failed=1, waiting=3), tokens=5000)
        shown = stream.getvalue()
        progress.say("proxy t0007 [failed]: nan")
    assert "4 of 10 done, 2 running, 1 failed" in shown and "50 tokens/s, 100 s to go (about " in shown
    assert "readme 4.81 in t0031" in shown and "9 runs: 4.5000 (4.4000 to 4.6000)" in shown
    assert "proxy t0007 [failed]: nan" in stream.getvalue(), "brackets are text, not markup"


def test_a_log_gets_plain_lines_and_no_escape() -> None:
    stream = io.StringIO()
    with Progress("proxies", stream) as progress:
        progress.rows["best"] = "readme 4.81 in t0031"
        progress.shown -= 100
        progress.update(Counts(finished=4, running=2, failed=1, waiting=3), tokens=5000)
        progress.update(Counts(finished=5, running=1, failed=1, waiting=3), tokens=6000)
    assert stream.getvalue() == "proxies: 4 of 10 done, 2 running, 1 failed, best readme 4.81 in t0031\n"


def write_run(folder: Path, steps: int, rows: list[dict[str, float]], result: bool) -> None:
    """A run's folder as training leaves it, of this living process; its last line is torn."""
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"total_steps": steps, "tokens_per_step": 100}))
    lines = [json.dumps({**row, "train/loss": 4.25, "perf/tokens_per_s": 50.0}) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"st']))
    (folder / ".lock").write_text(f"pid {os.getpid()} on {os.uname().nodename}")
    if result:
        (folder / "result.json").write_text("{}")


@pytest.fixture
def rounds(tmp_path: Path) -> Path:
    """A search by DoReMi in its second round: the proxy at step 20 of 240."""
    (tmp_path / "config.yaml").write_text(
        "{name: dro, method: doremi, doremi: {rounds: 3}, train: {seeds: 1, mixtures: [optimal, prior]}}"
    )
    for number, steps in ((1, 240), (2, 20)):
        folder = tmp_path / f"doremi/round-{number}-reference"
        write_run(folder, 240, [{"step": 240}], result=True)
        inputs = {"weights": {"web": 0.5, "code": 0.5}}
        folder.with_name(f"{folder.name}.inputs.json").write_text(json.dumps(inputs))
        row = {"step": steps, "average/web": 0.5 - number / 10, "average/code": 0.5 + number / 10, "weight/web": 0.9}
        write_run(tmp_path / f"doremi/round-{number}-proxy", 240, [{**row, "step": 1}, row], result=number == 1)
    return tmp_path


def test_status_of_doremi_says_round_run_step_pace_and_weights(rounds: Path) -> None:
    status = read_status(rounds)
    names = [f"round-{number}-{who}" for number in (1, 2) for who in ("reference", "proxy")]
    assert [(run["run"], run["state"]) for run in status["rounds"]] == [
        *((name, "done") for name in names[:3]),
        (names[3], "running"),
    ]
    last = status["rounds"][-1]
    assert (last["step"], last["steps"], last["tokens_per_s"], last["loss"]) == (20, 240, 50.0, 4.25)
    assert last["seconds_left"] == pytest.approx((240 - 20) * 100 / 50)
    assert last["weights"] == pytest.approx({"web": 0.3, "code": 0.7})
    assert [run["change"] for run in status["rounds"]] == [None, pytest.approx(0.1), None, pytest.approx(0.2)]
    text = describe_status(status)
    assert "round 2 of at most 3: proxy running, step 20 of 240, loss 4.2500, 50 tokens/s, 7.33 min to go" in text
    assert "round 1 of at most 3: proxy done, step 240 of 240, loss 4.2500, 50 tokens/s, largest change 0.1000" in text
    assert "weights so far: code 70.0%, web 30.0%" in text and "of 0 done" not in text and "models" not in text


def test_status_says_which_runs_have_stopped_and_how_far_models_are(rounds: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (rounds / "doremi/round-2-proxy/.lock").write_text(f"pid {gone.pid} on {os.uname().nodename}")
    write_run(rounds / "train/optimal-s0", 600, [{"step": 300}], result=False)
    status = read_status(rounds)
    assert status["rounds"][-1]["state"] == "stopped" and status["rounds"][-1]["seconds_left"] is None
    assert [model["state"] for model in status["models"]] == ["running", *["waiting"] * (len(status["models"]) - 1)]
    text = describe_status(status)
    assert "round 2 of at most 3: proxy stopped, step 20 of 240" in text
    assert f"models: 0 of {len(status['models'])} done\n  optimal-s0 running, step 300 of 600" in text
    (rounds / "doremi/round-2-proxy/.lock").write_text("pid 1 on another-machine")
    assert read_status(rounds)["rounds"][-1]["state"] == "running", "it wrote something just now"
    long_ago = time.time() - 2 * LEASE
    for path in (rounds / "doremi/round-2-proxy", rounds / "doremi/round-2-proxy/metrics.jsonl"):
        os.utime(path, (long_ago, long_ago))
    assert read_status(rounds)["rounds"][-1]["state"] == "stopped"


def points(runs: EventMultiplexer, run_name: str, tag: str) -> list[tuple[int, float]]:
    return [(e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in runs.Tensors(run_name, tag)]


def test_tensorboard_shows_all_trials_with_their_weights(half: Path) -> None:
    """Read back by TensorBoard itself, as its dashboards do."""
    done = replay(half / "trials.jsonl").finished
    folder = half / "proxies" / "t0000"
    folder.mkdir()
    (folder / "evals.jsonl").write_text('{"step": 5, "valid/a/loss": 3.0}\n{"step": 9, "valid/a/loss": 2.0}\n{"st')
    for event in done.values():
        board.write_trial(half, {**event, "run_dir": f"proxies/t{event['trial']:04d}"})
    for runs in (9, 12):
        board.write_fit(half, made(runs=runs, predicted=4.0 + runs))
    runs = EventMultiplexer().AddRunsFromDirectory(str(half))
    runs.Reload()
    assert sorted(runs.Runs()) == ["tensorboard/search", "tensorboard/t0000", "tensorboard/t0001"]
    assert points(runs, "tensorboard/t0000", "valid/a/loss") == [(5, 3.0), (9, 2.0)]
    assert points(runs, "tensorboard/search", "search/predicted") == [(9, 13.0), (12, 16.0)]
    hparams, request = (
        Context(SimpleNamespace(data_provider=MultiplexerDataProvider(runs, str(half)))),
        RequestContext(),
    )
    sessions = hparams.hparams_metadata(request, "")
    experiment = hparams.experiment_from_metadata(request, "", True, sessions, [])
    assert {info.name for info in experiment.hparam_infos} == {"kind", "seed", "weight/web", "weight/code"}
    assert {info.name.tag for info in experiment.metric_infos} == {"trial/a", "trial/b", "valid/a/loss"}
