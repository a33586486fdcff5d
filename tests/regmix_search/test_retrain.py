"""Running the larger models: side by side, failures named, nothing left behind. The launcher is a script of our own."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_proxies import assert_dead, wait_for

from regmix_search import retrain
from regmix_search.config import load_search
from regmix_search.retrain import MainRun, run_all
from regmix_search.search import Search

# Does what the first word of its config says, in the folder beside it.
LAUNCHER = """
import json, os, pathlib, sys, time
config = pathlib.Path(sys.argv[sys.argv.index("--config") + 1])
folder = config.with_name(config.name.removesuffix(".config.yaml"))
(folder.parent / (folder.name + ".pid")).write_text(str(os.getpid()))
action = config.read_text()
if action == "fail":
    sys.exit("error: no such luck")
time.sleep(600 if action == "hang" else 0.2)
folder.mkdir(exist_ok=True)
(folder / "result.json").write_text(json.dumps({"tokens": 7, "threads": os.environ["OMP_NUM_THREADS"]}))
"""


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "launcher.py"
    path.write_text(LAUNCHER)
    monkeypatch.setattr(retrain, "LAUNCHER", path)
    return path


def make_runs(folder: Path, *actions: str) -> list[MainRun]:
    folder.mkdir(exist_ok=True)
    runs = [MainRun("optimal", seed, {"a": 1.0}, folder / f"optimal-s{seed}") for seed in range(len(actions))]
    for run, action in zip(runs, actions, strict=True):
        run.beside(".config.yaml").write_text(action)
    return runs


def make_search(tmp_path: Path, workers: int = 2) -> tuple[Search, io.StringIO]:
    out = io.StringIO()
    return Search(load_search(None, overrides=(f"out_dir={tmp_path}", f"train.workers={workers}")), out), out


def test_runs_go_side_by_side_and_a_failure_stops_no_other(tmp_path, launcher):
    search, out = make_search(tmp_path)
    runs = make_runs(tmp_path / "train", "ok", "fail", "ok", "ok")
    failed = run_all(search, runs, len(runs))
    assert [run.done for run in runs] == [True, False, True, True]
    assert list(failed) == ["optimal-s1"] and failed["optimal-s1"].startswith("exit code 1, error: no such luck")
    assert "model optimal-s1 failed" in out.getvalue()
    assert '"threads": "1"' in (runs[0].folder / "result.json").read_text()


def test_never_more_at_a_time_than_workers(tmp_path, launcher):
    search, _ = make_search(tmp_path, workers=1)
    start = time.monotonic()
    run_all(search, make_runs(tmp_path / "train", "ok", "ok", "ok"), 3)
    assert time.monotonic() - start > 3 * 0.2


def test_an_interruption_ends_the_runs(tmp_path, launcher, monkeypatch):
    search, _ = make_search(tmp_path)
    runs = make_runs(tmp_path / "train", "hang", "hang")

    def interrupt(progress: object, counts: object, tokens: int) -> None:
        if all(run.beside(".pid").exists() and run.beside(".pid").read_text() for run in runs):
            raise KeyboardInterrupt

    monkeypatch.setattr(retrain.Progress, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_all(search, runs, 2)
    for run in runs:
        assert_dead(int(run.beside(".pid").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="a child's death with its parent is Linux's prctl")
def test_runs_end_with_a_killed_search(tmp_path, launcher):
    runs = make_runs(tmp_path / "train", "hang", "hang")
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]}\n"
        "from pathlib import Path\nfrom regmix_search import retrain\nimport test_retrain as t\n"
        f"retrain.LAUNCHER = Path({str(launcher)!r})\nfolder = Path({str(tmp_path)!r})\n"
        "retrain.run_all(t.make_search(folder)[0], t.make_runs(folder / 'train', 'hang', 'hang'), 2)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: all(run.beside(".pid").exists() and run.beside(".pid").read_text() for run in runs))
    driver.kill()
    driver.wait()
    for run in runs:
        assert_dead(int(run.beside(".pid").read_text()))
