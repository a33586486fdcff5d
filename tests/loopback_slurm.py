"""A Slurm on loopback, for tests: munged, slurmctld and a slurmd a node, with everything of theirs in one folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=2
ReturnToService=2
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# A node's name is an address, because programs of a job want to connect to it.
NODE = "NodeName={address} NodeHostname={host} NodeAddr={address} Port={port} CPUs=4 RealMemory=8000 Gres=gpu:{gpus}\n"


def why_not() -> str:
    """Why no Slurm can be started here; empty when it can."""
    missing = [program for program in PROGRAMS if _find(program) is None]
    if missing:
        return f"no {', '.join(missing)} here (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "slurmd needs root"
    with tempfile.TemporaryDirectory() as folder:
        try:
            _make_gpus(Path(folder))
        except PermissionError:
            return "devices may not be made here, and some stand for GPUs"
    return ""


@contextlib.contextmanager
def slurm_cluster(folder: Path, nodes: int = 1, gpus: int = 2) -> Iterator[dict[str, str]]:
    """Starts a cluster; gives the environment in which sbatch and squeue reach it, and stops it in the end.

    ``folder``: a short path, for it becomes part of the names of sockets, which end at 108 characters.
    """
    assert len(str(folder)) < 74, folder
    ctld, *ports = _free_ports(1 + nodes)
    (folder / "state").mkdir(parents=True)
    host, addresses = socket.gethostname().split(".")[0], [f"127.0.0.{1 + node}" for node in range(nodes)]
    lines = [NODE.format(address=a, port=p, host=host, gpus=gpus) for a, p in zip(addresses, ports, strict=True)]
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, ctld=ctld, host=host) + "".join(lines))
    _make_gpus(folder)
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{gpus - 1}]\n")
    (folder / "munge.key").write_bytes(secrets.token_bytes(64))
    (folder / "munge.key").chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder}/munge.{ending}" for option, ending in files.items()]
    commands = [["munged", "--foreground", "--force", *options], ["slurmctld", "-D"]]
    commands += [["slurmd", "-D", "-N", address] for address in addresses]
    daemons = []
    try:
        for name, *arguments in commands:
            log = (folder / f"{name}.out").open("ab")
            daemons.append(subprocess.Popen([_find(name) or name, *arguments], env=environment, stdout=log, stderr=log))
        _wait_until_idle(environment, folder)
        try:
            yield environment
        finally:
            _end_jobs(environment)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()


def _end_jobs(environment: dict[str, str]) -> None:
    """A step that outlives its controller waits for it for ever."""
    subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        squeue = subprocess.run(["squeue", "-h"], env=environment, capture_output=True, text=True)
        if not squeue.stdout.strip():
            return
        time.sleep(0.2)


def _make_gpus(folder: Path) -> None:
    for gpu, minor in enumerate((3, 5)):  # /dev/null and /dev/zero: Slurm wants devices, and nobody opens them
        os.mknod(folder / f"gpu{gpu}", stat.S_IFCHR | 0o600, os.makedev(1, minor))


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    end = time.monotonic() + 60
    while True:
        sinfo = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=environment, capture_output=True, text=True)
        if set(sinfo.stdout.split()) == {"idle"}:
            return
        if time.monotonic() > end:
            logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in folder.glob("*.log"))
            raise RuntimeError(f"slurm did not start: {sinfo.stdout}{sinfo.stderr}\n{logs}")
        time.sleep(0.2)


def _find(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/local/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
