"""What the tests of launch/'s scripts are built from: edited copies, two nodes to start them on, and what came out."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lite import checkpoint
from megatron_lite.files import read_jsonl
from megatron_lite.testing import free_port

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 600, 100  # long enough to be killed in the middle, saved often enough to go on from there
PATIENCE = 300.0  # seconds: a busy machine needs minutes to start a few ranks


def edited(script: str, folder: Path, to: Path, *lines: str, out: Path | None = None) -> str:
    """A copy of a script with two lines edited, as a user does: those that begin as `lines` do, and `run`."""
    out = out or to
    run = f"run=(--config {folder}/c.yaml --mixture {folder}/mixture.yaml --set out_dir={out})"
    text = (ROOT / "launch" / script).read_text()
    for line in (*lines, run):
        begins = re.escape(re.match(r"#SBATCH --nodes|\w+=", line)[0])
        text, count = re.subn(f"^{begins}.*$", line, text, flags=re.MULTILINE)
        assert count == 1, f"{script} has {count} lines to edit that begin with {begins}"
    to.mkdir(parents=True, exist_ok=True)
    path = to / script
    path.write_text(text)
    return str(path)


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # an activated environment
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **more}


def wait_for(what: Callable[[], object], out: Path, *needed: subprocess.Popen[bytes]) -> None:
    """Returns when `what` holds; an error with the logs when a process that it needs has ended, or too late."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert all(process.poll() is None for process in needed), logs(out)
        assert time.monotonic() < end, f"not in {PATIENCE:.0f} s: {logs(out)}"
        time.sleep(0.02)


def curve(out: Path) -> list[dict[str, float]]:
    """What must be the same, step by step: a replayed step has one line."""
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [{key: row[key] for key in row if key.startswith("train/")} for row in rows]


def result(out: Path) -> dict[str, float]:
    return json.loads((out / "result.json").read_text())["losses"]


@dataclass
class Node:
    """Where a script is started: a network namespace with an address of its own, or this machine."""

    address: str
    prefix: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)

    def start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            env = environment(**self.env)
            return subprocess.Popen(
                [*self.prefix, *command], cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
            )


@contextlib.contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Two namespaces joined by a pair of veth, where they can be made; else this machine twice, on loopback."""
    names, ends = ([f"{kind}{os.getpid()}{side}" for side in "ab"] for kind in ("node", "ve"))
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add {ends[0]} netns {names[0]} type veth peer name {ends[1]} netns {names[1]}"]
    for name, end, host in zip(names, ends, (1, 2), strict=True):
        commands += [f"ip -n {name} addr add 10.213.7.{host}/24 dev {end}"]
        commands += [f"ip -n {name} link set {link} up" for link in ("lo", end)]
    nodes = [Node("127.0.0.1", env={"GLOO_SOCKET_IFNAME": "lo"}) for _ in names]
    try:
        with contextlib.suppress(FileNotFoundError, subprocess.CalledProcessError):
            for command in commands:
                subprocess.run(command.split(), check=True, capture_output=True)
            nodes = [
                Node(f"10.213.7.{host}", ["ip", "netns", "exec", name], {"GLOO_SOCKET_IFNAME": end})
                for name, end, host in zip(names, ends, (1, 2), strict=True)
            ]
        yield nodes
    finally:
        for name in names if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextlib.contextmanager
def agents(nodes: list[Node], count: str, files: Path, out: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """torchrun_pretrain.sh on every node, one rank each; all its processes are dead in the end."""
    line = f"nodes={count} gpus=1 head={nodes[0].address}:{free_port()}"
    started = []
    try:
        for number, node in enumerate(nodes):
            script = Path(edited("torchrun_pretrain.sh", files, out / f"node{number}", line, out=out))
            # seconds to wait for a lost node, 30 if nobody says; on loopback both nodes would think that they are head
            is_head = "$is_head" if node.prefix or number == 0 else "0"
            script.write_text(script.read_text().replace("is_host=$is_head", f"is_host={is_head},last_call_timeout=3"))
            node.env["LOGLEVEL"] = "INFO"  # torchrun's
            started.append(node.start(["bash", str(script)], out / f"node{number}.log"))
        yield started
    finally:
        for process in started:
            kill_tree(process)


def workers(agent: subprocess.Popen[bytes]) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def kill_tree(agent: subprocess.Popen[bytes]) -> None:
    """What a power cut does: nobody is asked, nobody cleans up."""
    pids = workers(agent)
    agent.kill()
    agent.wait()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for_checkpoint(out: Path, *needed: subprocess.Popen[bytes]) -> None:
    wait_for(lambda: checkpoint.complete_checkpoints(out), out, *needed)
    assert not (out / "result.json").exists(), "the run was over before it could be disturbed: make STEPS larger"


def logs(out: Path) -> str:
    """What the processes said, without the steps."""
    text = "\n".join(path.read_text(errors="replace") for path in sorted(out.glob("*.log")))
    return re.sub(r"^step \d+/\d+ \| loss.*\n", "", text, flags=re.MULTILINE)
