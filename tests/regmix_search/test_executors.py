"""What every executor promises: the local pool, Slurm (a real one, on loopback) and Ray (a real one, local)."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from loopback_slurm import slurm_cluster, why_not
from scripted import Scripted
from test_proxies import assert_dead, wait_for

from megatron_lite.config import Config, load_config
from regmix_search import machine
from regmix_search.config import ProxiesConfig, SlurmConfig
from regmix_search.executors import Executor, Outcome
from regmix_search.executors.local import LocalPool, visible_gpus
from regmix_search.executors.slurm import SlurmQueue
from regmix_search.ledger import Ledger, Trial
from regmix_search.progress import Progress
from regmix_search.proxies import ProxyTraining, build_executor, run_trials

Build = Callable[..., Executor]  # (folder, first, **settings) -> executor
SCRIPT = str(Path(__file__).with_name("scripted.py"))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if reason := why_not():
        pytest.skip(reason)
    before = dict(os.environ)
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as environment:
        os.environ.update(environment)
        yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """Ray counts GPUs by what it is told, so two that are not there will do."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(SCRIPT).parent}:{Path(SCRIPT).parents[2]}")  # of Ray's workers
        ray.init(num_cpus=8, num_gpus=2, include_dashboard=False, log_to_driver=False)
        yield
        assert ray.is_initialized(), "a Ray of somebody else's was ended"
        ray.shutdown()


def slurm_queue(folder: Path, first: dict[int, str], **settings: Any) -> SlurmQueue:
    config = {key: settings.pop(key) for key in ("chunk", "gpus", "options") if key in settings}
    command = (sys.executable, SCRIPT, str(folder), json.dumps(first))
    settings = {"workers": 2, "ask": 0.3, "settle": 1.0, **settings}
    return SlurmQueue(command, folder / "slurm", SlurmConfig(**config), **settings)


def ray_tasks(folder: Path, first: dict[int, str]) -> Executor:
    from regmix_search.executors.ray_tasks import RayTasks

    return RayTasks(Scripted(str(folder), first), workers=2)


def local_pool(folder: Path, first: dict[int, str]) -> Executor:
    return LocalPool(Scripted(str(folder), first), 2)


@pytest.fixture(
    params=[
        "local",
        pytest.param("slurm", marks=pytest.mark.slow),
        pytest.param("ray", marks=pytest.mark.slow),
    ]
)
def build(request: pytest.FixtureRequest) -> Build:
    if request.param != "local":
        request.getfixturevalue({"slurm": "slurm", "ray": "ray_cluster"}[request.param])
    return {"local": local_pool, "slurm": slurm_queue, "ray": ray_tasks}[request.param]


def trials(count: int) -> list[Trial]:
    return [Trial(i, "train", {"a": 1.0}, seed=0) for i in range(count)]


def run(executor: Executor, count: int, timeout: float = 240.0) -> list[Outcome]:
    """Submits trials as there is room, and waits for as many outcomes."""
    waiting, outcomes, end = trials(count), list[Outcome](), time.monotonic() + timeout
    while len(outcomes) < count:
        while waiting and executor.free() > 0:
            executor.submit(waiting.pop(0))
        outcomes += executor.wait(0.5)
        assert time.monotonic() < end, f"only {len(outcomes)} of {count} outcomes in {timeout} s"
    return outcomes + executor.wait(0.5)


def test_every_trial_comes_back_once_with_its_result_or_its_reason(build, tmp_path):
    with closing(build(tmp_path, {1: "nan", 2: "kill", 3: "mistake", 4: "oserror"})) as executor:
        found = run(executor, 7)
    outcomes = {outcome.trial.index: outcome for outcome in found}
    assert sorted(outcome.trial.index for outcome in found) == list(range(7))
    for i in (0, 5, 6):
        assert outcomes[i].result is not None and outcomes[i].result["losses"] == {"readme": 1.0 + i}
        assert outcomes[i].result["worker"]["threads"] == "1" and outcomes[i].trial == trials(7)[i]
    assert outcomes[1].reason == "FloatingPointError: step 3: the gradient norm is nan" and not outcomes[1].retry
    assert outcomes[3].reason == "ValueError: shards: no train_* shards" and not outcomes[3].retry
    assert outcomes[4].reason == "OSError: disk went away" and outcomes[4].retry
    assert "disk went away" in outcomes[4].traceback
    assert outcomes[2].result is None and outcomes[2].retry and outcomes[2].reason, "a killed worker is worth a retry"


def test_a_worker_killed_in_the_middle_costs_a_try_and_no_more(build, tmp_path):
    ledger = Ledger(tmp_path / "trials.jsonl", trials(4), {})
    killed = False
    with closing(run_trials(ledger, build(tmp_path, {1: "hang"}), Progress("proxies", io.StringIO()))) as outcomes:
        for _ in outcomes:
            if not killed:
                wait_for(lambda: (tmp_path / "tried1").exists())
                os.kill(int((tmp_path / "tried1").read_text()), signal.SIGKILL)
                killed = True
    assert ledger.counts.finished == 4 and ledger.failed == {}
    assert [len(ledger.failures.get(i, ())) for i in range(4)] == [0, 1, 0, 0]


def test_closing_ends_what_runs(build, tmp_path):
    executor = build(tmp_path, {0: "hang", 1: "hang"})
    for trial in trials(2):
        executor.submit(trial)
    end = time.monotonic() + 240
    while not all((tmp_path / f"tried{i}").exists() for i in range(2)):
        assert executor.wait(0.2) == [] and time.monotonic() < end
    time.sleep(0.2)
    executor.close()
    for i in range(2):
        assert_dead(int((tmp_path / f"tried{i}").read_text()), 20)


def test_room_is_what_may_be_submitted(build, tmp_path):
    with closing(build(tmp_path, {0: "hang"})) as executor:
        free = executor.free()
        executor.submit(trials(1)[0])
        assert executor.free() == free - 1 >= 1


@pytest.mark.slow
def test_a_requeued_task_goes_on_with_what_it_has_not_finished(slurm, tmp_path):
    """As Slurm does with a preempted task: it is killed, put back, and started again."""
    with closing(slurm_queue(tmp_path, {1: "hang"}, chunk=2)) as executor:
        for trial in trials(2):
            executor.submit(trial)
        (outcome,) = run_on(executor)
        assert outcome.trial.index == 0
        wait_for(lambda: (tmp_path / "tried1").exists())
        before = (tmp_path / "tried0").read_text()
        (name,) = executor.tasks
        subprocess.run(["scontrol", "requeue", name], check=True)
        (outcome,) = run_on(executor)
    assert outcome.trial.index == 1 and outcome.result is not None, "a requeued task is not a failure"
    assert (tmp_path / "tried0").read_text() == before, "what was finished was done again"
    log = next((tmp_path / "slurm").glob("*/t0001.log")).read_text()
    assert log.count("trial 0: done") == log.count("trial 1: done") == 1


@pytest.mark.slow
def test_a_cancelled_task_comes_back_as_a_retry_with_its_state_and_log(slurm, tmp_path):
    with closing(slurm_queue(tmp_path, {0: "hang"})) as executor:
        executor.submit(trials(1)[0])
        executor.wait(0.1)
        wait_for(lambda: (tmp_path / "tried0").exists())
        subprocess.run(["scancel", *executor.tasks], check=True)
        (outcome,) = run_on(executor)
    assert outcome.retry and "(cancelled)" in outcome.reason and "CANCELLED" in outcome.reason, outcome.reason


@pytest.mark.slow
def test_a_lost_task_costs_a_try_only_what_it_had_begun_with(slurm, tmp_path):
    with closing(slurm_queue(tmp_path, {1: "hang"}, chunk=4)) as executor:
        for trial in trials(4):
            executor.submit(trial)
        executor.wait(0.1)
        wait_for(lambda: (tmp_path / "tried1").exists())
        subprocess.run(["scancel", *executor.tasks], check=True)
        outcomes = {outcome.trial.index: outcome for outcome in run_on(executor, 4)}
    assert sorted(outcomes) == [0, 1, 2, 3] and outcomes[1].result is None and outcomes[1].retry
    assert all(outcomes[index].result is not None for index in (0, 2, 3))


@pytest.mark.slow
def test_a_task_without_gpus_hides_those_of_its_node(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # as if the node's were visible to everybody
    with closing(slurm_queue(tmp_path, {})) as executor:
        executor.submit(trials(1)[0])
        (outcome,) = run_on(executor)
    assert outcome.result is not None and outcome.result["worker"]["gpu"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed", "silent"])
def test_tasks_end_when_their_driver_is_gone(slurm, tmp_path, how):
    heartbeat = tmp_path / "driver"
    heartbeat.touch()
    executor = slurm_queue(tmp_path, {0: "hang"}, heartbeat=heartbeat)
    executor.submit(trials(1)[0])
    executor.wait(0.1)
    wait_for(lambda: (tmp_path / "tried0").exists())
    if how == "closed":
        heartbeat.unlink()
    assert_dead(int((tmp_path / "tried0").read_text()), 20)
    (outcome,) = run_on(executor)
    assert "the driver is gone" in outcome.reason


@pytest.mark.slow
def test_what_sbatch_refuses_is_the_users_mistake(slurm, tmp_path):
    executor = slurm_queue(tmp_path, {}, options=("--partition=nowhere",))
    executor.submit(trials(1)[0])
    with pytest.raises(ValueError, match=r"sbatch refused the proxies: .*partition"):
        executor.wait(0.1)


def test_without_slurm_or_ray_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    executor = slurm_queue(tmp_path, {})
    executor.submit(trials(1)[0])
    with pytest.raises(ValueError, match="there is no sbatch here"):
        executor.wait(0.1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'megatron_lite\[ray\]'"):
        ray_tasks(tmp_path, {})


def test_a_controller_that_does_not_answer_says_nothing_about_the_tasks(tmp_path, monkeypatch):
    """A fake Slurm, scripted: sbatch takes the array, then squeue fails, then knows nothing of it."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")  # this driver is in a job itself
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")
    answers = {"sbatch": f"env > {tmp_path}/env; echo 7", "squeue": f"cat {tmp_path}/states", "scancel": "true"}
    for program, line in answers.items():
        (tmp_path / "bin" / program).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    executor = slurm_queue(tmp_path, {}, ask=0.0, settle=0.5)
    executor.submit(trials(1)[0])
    assert executor.wait(1.0) == [], "squeue fails: the task may well be running"
    environment = (tmp_path / "env").read_text()
    assert "SLURM_CONF=/etc/other.conf" in environment and "SLURM_CPUS_PER_TASK" not in environment
    (tmp_path / "states").write_text("7_0 PREEMPTED\n")
    assert executor.wait(0.3) == [], "its files may not be seen yet, or it may be requeued"
    (tmp_path / "states").write_text("7_0 PENDING\n")
    assert executor.wait(0.8) == [], "it was requeued"
    (tmp_path / "states").write_text("")
    (outcome,) = run_on(executor)
    assert outcome.retry and "7_0 ended without a result (gone)" in outcome.reason


def meeting(count: int) -> list[Trial]:
    """Trials that end only when all of them have started."""
    return [Trial(i, "train", {"a": 1.0}, seed=count) for i in range(count)]


@pytest.mark.slow
def test_a_slurm_task_packs_proxies_on_the_gpus_that_it_got(slurm, tmp_path):
    first = dict.fromkeys(range(4), "meet")
    with closing(slurm_queue(tmp_path, first, chunk=4, gpus=2, per_gpu=2)) as executor:
        for trial in meeting(4):
            executor.submit(trial)
        seen = Counter(outcome.result["worker"]["gpu"] for outcome in run_on(executor, 4))  # type: ignore[index]
    assert seen == {"0": 2, "1": 2}


@pytest.mark.slow
def test_ray_tasks_take_their_fraction_of_a_gpu(ray_cluster, tmp_path):
    from regmix_search.executors.ray_tasks import RayTasks

    with closing(RayTasks(Scripted(str(tmp_path), dict.fromkeys(range(4), "meet")), per_gpu=2)) as executor:
        assert executor.free() == 4 and RayTasks(see_gpu, per_gpu=0).free() == 8
        for trial in meeting(4):
            executor.submit(trial)
        outcomes = run_on(executor, 4)
    assert all(outcome.result for outcome in outcomes), [outcome.reason for outcome in outcomes]
    assert Counter(outcome.result["worker"]["gpu"] for outcome in outcomes if outcome.result) == {"0": 2, "1": 2}


class LosesTheFirst:
    """Ray, but the first cancellation is lost, as one that reaches a worker just before its task begins."""

    def __init__(self, ray: Any) -> None:
        self.ray, self.cancelled = ray, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ray, name)

    def cancel(self, reference: Any, force: bool) -> None:
        self.cancelled += 1
        if self.cancelled > 1:
            self.ray.cancel(reference, force=force)


@pytest.mark.slow
def test_a_lost_cancellation_leaves_no_ray_task_behind(ray_cluster, tmp_path):
    executor: Any = ray_tasks(tmp_path, {0: "hang"})
    executor.ray = LosesTheFirst(executor.ray)
    executor.submit(trials(1)[0])
    wait_for(lambda: (tmp_path / "tried0").exists() and (tmp_path / "tried0").read_text())
    executor.close()
    assert_dead(int((tmp_path / "tried0").read_text()), 20)


def test_the_local_pool_has_as_many_workers_as_cores_or_gpus_hold(tmp_path, monkeypatch):
    def pool(workers: int = 0, threads: int = 1, per_gpu: int = 1, **rest: bool) -> LocalPool:
        function: Any = Scripted(str(tmp_path), {})
        built = build_executor(function, ProxiesConfig(per_gpu=per_gpu), workers, threads, tmp_path, tmp_path, **rest)
        assert isinstance(built, LocalPool)
        return built

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)  # no quota
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [pool().size, pool(threads=3).size, pool(workers=5).size, pool(threads=99).size] == [8, 2, 5, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert [pool().size, pool(per_gpu=3).size, pool(workers=1).size] == [2, 6, 1]
    assert pool().gpus == ("0", "3")
    assert pool(on_gpus=False).gpus == () and pool(on_gpus=False).size == 8, "tokenising needs no GPU"


def test_another_machine_builds_the_same_proxy_training(tmp_path):
    config = load_config(Config, None, ("optim.lr=0.0123", "eval.every=7", "batch.micro_batch_size=2"))
    function = ProxyTraining(config, "/data", ("readme", "prose"), "/runs", stops=True)
    function.save(tmp_path)
    assert ProxyTraining.load(tmp_path) == function
    kept = json.loads((tmp_path / "proxy.json").read_text())
    assert {field.name for field in dataclasses.fields(ProxyTraining)} == {"config", *kept}, "a field does not travel"


def test_workers_are_dealt_to_gpus_in_turn_and_a_new_one_takes_the_place_of_a_dead_one(tmp_path, monkeypatch):
    pool = LocalPool(see_gpu, 4, gpus=("2", "GPU-5"))
    with closing(pool):
        for trial in trials(4):
            pool.submit(trial)
        seen = {outcome.trial.index: outcome.result["gpu"] for outcome in run_on(pool, 4)}  # type: ignore[index]
        assert seen == {0: "2", 1: "GPU-5", 2: "2", 3: "GPU-5"}
        pool.workers[1].process.kill()
        pool.workers[1].process.join()
        for trial in trials(4):
            pool.submit(trial)
        again = Counter(outcome.result["gpu"] for outcome in run_on(pool, 4))  # type: ignore[index]
        assert again == {"2": 2, "GPU-5": 2}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert visible_gpus() == ("1", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_gpus() == ()


def see_gpu(trial: Trial) -> dict[str, Any]:
    return {"losses": {}, "gpu": os.environ["CUDA_VISIBLE_DEVICES"]}


def run_on(executor: Executor, count: int = 1) -> list[Outcome]:
    outcomes, end = list[Outcome](), time.monotonic() + 240
    while len(outcomes) < count:
        outcomes += executor.wait(0.2)
        assert time.monotonic() < end
    return outcomes
