"""The scripts of launch/ on two nodes: torchrun in network namespaces, Slurm on loopback, DeepSpeed with a hostfile."""

import contextlib
import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from loopback_slurm import slurm_cluster, why_not
from two_nodes import (
    EVERY,
    PATIENCE,
    ROOT,
    STEPS,
    Node,
    agents,
    curve,
    edited,
    environment,
    kill_tree,
    logs,
    result,
    two_nodes,
    wait_for,
    wait_for_checkpoint,
    workers,
)  # fmt: skip

from launch import pretrain
from megatron_lite import checkpoint, train
from megatron_lite.config import dump
from megatron_lite.mesh import Mesh
from megatron_lite.testing import free_port, run_distributed, tiny_config, write_tiny_shards

SCRIPTS = ("torchrun_pretrain.sh", "deepspeed_pretrain.sh", "slurm_pretrain.sbatch")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, mixture.yaml and a config."""
    folder = tmp_path_factory.mktemp("nodes")
    write_tiny_shards(folder / "shards").save(folder / "mixture.yaml")
    settings = (f"schedule.total_tokens={STEPS * 128}", f"checkpoint.every={EVERY}", "log.console=true")
    (folder / "c.yaml").write_text(dump(tiny_config(folder / "run", *settings)))
    return folder


@pytest.fixture(scope="module")
def undisturbed(files: Path) -> Path:
    """torchrun_pretrain.sh on one node with two ranks, and nothing happens."""
    out = files / "undisturbed"
    script = edited("torchrun_pretrain.sh", files, out, f"nodes=1 gpus=2 head=localhost:{free_port()}")
    env = environment(GLOO_SOCKET_IFNAME="lo")
    done = subprocess.run(["bash", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "dp 2 x" in done.stdout and len(curve(out)) == STEPS
    return out


def check_same(out: Path, undisturbed: Path) -> None:
    """Bit for bit: what was done again came out as in the run that nothing happened to."""
    different = [i + 1 for i, pair in enumerate(zip(curve(out), curve(undisturbed), strict=True)) if pair[0] != pair[1]]
    assert not different, f"first at step {different[0]}"
    assert result(out) == result(undisturbed)


@pytest.mark.slow
def test_a_worker_is_killed_and_two_nodes_go_on_from_the_checkpoint_with_the_same_losses(files, undisturbed, tmp_path):
    with two_nodes() as nodes, agents(nodes, "2", files, tmp_path) as both:
        wait_for_checkpoint(tmp_path, *both)
        (hung,), (victim,) = map(workers, both)
        os.kill(
            hung, signal.SIGSTOP
        )  # under NCCL the ranks of other nodes wait for a dead one, until their agent ends them
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: is_told_to_end(hung), tmp_path, *both)
        os.kill(hung, signal.SIGKILL)  # as the agent does 30 s later
        assert [agent.wait(PATIENCE) for agent in both] == [0, 0], logs(tmp_path)
    assert re.search(r"resumed at step [1-9]\d*00", logs(tmp_path)), logs(tmp_path)
    stores = set(re.findall(r"master_port=(\d+)", logs(tmp_path)))
    assert len(stores) == 2, "in a store of both starts a rank that is ahead finds the addresses of the dead"
    check_same(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_node_is_lost_and_the_other_one_goes_on_alone(files, undisturbed, tmp_path):
    with two_nodes() as nodes, agents(nodes, "1:2", files, tmp_path) as both:
        wait_for_checkpoint(tmp_path, *both)
        kill_tree(both[1])
        assert both[0].wait(PATIENCE) == 0, logs(tmp_path)
    text = logs(tmp_path)
    assert "dp 2 x" in text and re.search(r"resumed at step [1-9](?s:.)*dp 1 x accumulation 2", text), text
    pairs = zip(curve(tmp_path), curve(undisturbed), strict=True)
    assert max(abs(a["train/loss"] - b["train/loss"]) for a, b in pairs) <= 1e-4


@pytest.mark.slow
def test_a_slurm_job_that_is_told_its_time_is_up_saves_goes_back_into_the_queue_and_ends_with_the_same_losses(
    files, undisturbed, tmp_path, tmp_path_factory
):
    if reason := why_not():
        pytest.skip(reason)
    script = edited("slurm_pretrain.sbatch", files, tmp_path, "#SBATCH --nodes=2 --gpus-per-node=1 --time=60")
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "two", nodes=2, gpus=1) as cluster:
        env = environment(GLOO_SOCKET_IFNAME="lo", **{k: v for k, v in cluster.items() if k == "SLURM_CONF"})
        out = ["--parsable", f"--output={tmp_path}/job.log"]
        job = subprocess.run(["sbatch", *out, script], cwd=ROOT, env=env, capture_output=True, text=True)
        assert job.returncode == 0, job.stderr
        wait_for_checkpoint(tmp_path)
        number = job.stdout.strip()
        # what Slurm itself does at the time that --signal names
        subprocess.run(["scancel", "--batch", "--signal=USR1", number], env=env, check=True)
        wait_for(lambda: state(number, env) in ("COMPLETED", "FAILED", "CANCELLED"), tmp_path)
        assert state(number, env) == "COMPLETED", logs(tmp_path)
    resumed = re.search(r"resumed at step (\d+)", logs(tmp_path))
    assert resumed, logs(tmp_path)
    assert int(resumed[1]) % EVERY, "it went on from a checkpoint of the calendar's, not from that of the signal"
    check_same(tmp_path, undisturbed)


def is_told_to_end(pid: int) -> bool:
    """Whether a stopped process has SIGTERM waiting for it."""
    pending = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(pending[1], 16) >> (signal.SIGTERM - 1) & 1)


def state(job: str, env: dict[str, str]) -> str:
    command = ["squeue", "-h", "--states=all", "-j", job, "-o", "%T"]
    return subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip()


PDSH = """#!/bin/bash
# Stands for pdsh: runs a command for every host of -w, here; %n is the host's number. -S: the largest exit code.
while [[ $1 == -* ]]; do [ "$1" = -w ] && hosts=$2; [ "$1" = -S ] && shift || shift 2; done
number=0 code=0
for host in ${hosts//,/ }; do
    command="$*"
    bash -c "${command//%n/$number}" & pids+=($!)
    number=$((number + 1))
done
for pid in "${pids[@]}"; do wait "$pid"; this=$?; [ $this -gt $code ] && code=$this; done
exit $code
"""
SSH = "#!/bin/bash\n[[ $* == *'hostname -I' ]] && echo 127.0.0.1 || hostname\n"


@pytest.mark.slow
def test_deepspeed_with_a_hostfile_goes_on_after_a_killed_worker_with_the_same_losses(files, undisturbed, tmp_path):
    pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    for name, text in (("pdsh", PDSH), ("ssh", SSH)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    line = f"hostfile={tmp_path}/hostfile port={free_port()}"
    script = edited("deepspeed_pretrain.sh", files, tmp_path, line)
    path = f"{tmp_path}/bin:{environment()['PATH']}"
    node = Node("127.0.0.1", env={"PATH": path, "GLOO_SOCKET_IFNAME": "lo"})
    first = node.start(["bash", script], tmp_path / "first.log")
    second = None
    try:
        wait_for_checkpoint(tmp_path, first)
        os.kill(deepspeed_ranks(tmp_path)[0], signal.SIGUSR1)  # on any node, says the script
        assert first.wait(PATIENCE) == 75, logs(tmp_path)
        saved = checkpoint.complete_checkpoints(tmp_path)
        second = node.start(["bash", script], tmp_path / "second.log")
        wait_for(lambda: checkpoint.complete_checkpoints(tmp_path)[-1] != saved[-1], tmp_path, second)
        os.kill(deepspeed_ranks(tmp_path)[-1], signal.SIGKILL)
        assert second.wait(PATIENCE) == 0, logs(tmp_path)
    finally:
        for process in (first, second):
            if process and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    text = logs(tmp_path)
    steps = [int(step) for step in re.findall(r"resumed at step (\d+)", text)]
    assert steps[0] % EVERY and not steps[1] % EVERY and steps[0] < steps[1] and "start 1 of 4" in text, (steps, text)
    pairs = zip(curve(tmp_path), curve(undisturbed), strict=True)
    assert max(abs(a["train/loss"] - b["train/loss"]) for a, b in pairs) <= 1e-4


def deepspeed_ranks(out: Path) -> list[int]:
    """The processes that the pattern in deepspeed_pretrain.sh finds, of this run alone."""
    pattern = re.search(r"pkill -USR1 -f -- '(.*)'", (ROOT / "launch" / "deepspeed_pretrain.sh").read_text())[1]
    found = subprocess.run(["pgrep", "-f", "--", f"{pattern}.*{out}"], capture_output=True, text=True)
    assert len(found.stdout.split()) == 2, found
    return [int(pid) for pid in found.stdout.split()]


def told_to_stop_while_rank_0_writes_slowly(files: str, out: str) -> tuple[int, bool]:
    write, collect = checkpoint.save_checkpoint, train.collect_garbage

    def slow(*args, **kwargs):
        time.sleep(2.0)
        return write(*args, **kwargs)

    def stop_at_3(step: int) -> None:
        collect(step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    checkpoint.save_checkpoint, train.collect_garbage = slow, stop_at_3
    settings = [f"out_dir={out}", "checkpoint.async_save=true", "log.console=false"]
    code = pretrain.main(["--config", f"{files}/c.yaml", "--mixture", f"{files}/mixture.yaml", "--set", *settings])
    return code, (Path(out) / "step_0000003" / "COMPLETE").exists()


@pytest.mark.slow
def test_no_rank_ends_before_the_checkpoint_of_a_signal_is_written(files, tmp_path):
    """A launcher that sees one rank end with 75 kills the others soon."""
    found = run_distributed(told_to_stop_while_rank_0_writes_slowly, 2, str(files), str(tmp_path))
    assert found == [(75, True), (75, True)]


def without_such_a_network(files: str) -> int:
    os.environ["GLOO_SOCKET_IFNAME"] = "nowhere0"
    with open(f"{files}/rank{os.environ['RANK']}.err", "w") as file, contextlib.redirect_stderr(file):
        return pretrain.main(["--config", f"{files}/c.yaml", "--mixture", f"{files}/mixture.yaml"])


@pytest.mark.slow
def test_ranks_that_cannot_join_say_where_and_what_to_set(files):
    assert run_distributed(without_such_a_network, 2, str(files)) == [2, 2]
    text = (files / "rank1.err").read_text()
    for part in (
        "rank 1 cannot join the others at 127.0.0.1:",
        "nowhere0",
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
    ):
        assert part in text


def test_tasks_of_srun_that_know_nothing_of_each_other_are_refused(files, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    code = pretrain.main(["--config", str(files / "c.yaml"), "--mixture", str(files / "mixture.yaml")])
    assert code == 2 and "srun started 8 tasks" in capsys.readouterr().err


def test_other_errors_of_a_device_are_not_taken_for_the_network(monkeypatch):
    import torch

    def fail():
        raise torch.AcceleratorError("invalid device ordinal")

    monkeypatch.setattr(Mesh, "from_env", fail)
    with pytest.raises(torch.AcceleratorError):
        pretrain.meet()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_name_only_files_and_flags_that_exist(script):
    from torch.distributed.run import get_args_parser

    path = ROOT / "launch" / script
    text = path.read_text()
    assert os.access(path, os.X_OK) and len(text.splitlines()) <= 35
    subprocess.run(["bash", "-n", str(path)], check=True)
    for name in re.findall(r"\b(?:launch|configs)/[\w./]+", text):
        assert (ROOT / name).is_file(), f"{script} names {name}"
    flags = {flag for parser in (get_args_parser(), pretrain.build_parser()) for flag in parser._option_string_actions}
    start, end = ("exec torchrun", '"$@"') if "torchrun" in script or "slurm" in script else ("run=(", ")")
    command = text[text.index(start) :]
    used = re.findall(r"(?<![\w$-])(--[a-z-]+)", command[: command.index(end)])
    assert used and not set(used) - flags, f"{script}: unknown {set(used) - flags}"
