"""Who works on a ledger: a small file for each driver, touched while it lives, so that the others can tell.

Every time here is the shared file system's own, read off a file that was touched just now: clocks of machines differ.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import threading
import time
from pathlib import Path
from typing import IO

LEASE = 120.0  # seconds of silence after which a driver is dead: NFS may show a sign of life 60 s late (acregmax)
SIGNS = 8  # signs of life in a lease
REMEMBERED = 1.0  # seconds for which an answer about another driver is not asked for again


class Driver:
    """This process as one of those that work on a ledger. After ``close()``, or a ``with``, its claims are free.

    A driver is dead when it has no file any more, when its file was not touched for ``lease`` seconds or, on the same
    machine, when the kernel has dropped the lock on its file. ``joined``: it helps a driver that leads the search.
    """

    def __init__(self, folder: str | Path, joined: bool = False, lease: float = LEASE) -> None:
        self.folder, self.joined, self.lease = Path(folder), joined, lease
        self.folder.mkdir(parents=True, exist_ok=True)
        self.id = f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(4)}"
        self.path, self.boot = self.folder / self.id, _boot_id()
        temp = self.folder / f".{self.id}"
        self._file = open(temp, "x", encoding="utf-8")  # noqa: SIM115 (its lock lasts as long as this driver)
        _lock(self._file)
        json.dump({"boot": self.boot, "joined": joined}, self._file)
        self._file.flush()
        os.replace(temp, self.path)
        self._seen: dict[str, tuple[float, bool]] = {}
        self._stop = threading.Event()
        threading.Thread(target=_give_signs, args=(self.path, self._stop, lease / SIGNS), daemon=True).start()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Says that this driver is gone; it is not alive for anybody from now on."""
        self._stop.set()
        self.path.unlink(missing_ok=True)
        self._file.close()

    def alive(self, name: str) -> bool:
        """Whether a driver still works. Wrong about a suspended one, which is why the ledger's order decides."""
        if name == self.id:
            return not self._stop.is_set()
        asked, answer = self._seen.get(name, (-REMEMBERED, False))
        if time.monotonic() - asked >= REMEMBERED:
            answer = bool(self._look(self.folder / name))
            self._seen[name] = time.monotonic(), answer
        return answer

    def led(self) -> bool:
        """Whether a living driver, this one or another, leads the search and has not only joined it."""
        names = [path for path in self.folder.iterdir() if not path.name.startswith(".")]
        return any(not (self._look(path) or {"joined": True}).get("joined") for path in names)

    def _look(self, path: Path) -> dict[str, object]:
        """What a living driver's file says; {} for a dead one."""
        try:
            with open(path, "r+", encoding="utf-8") as file:  # opening asks the server; a bare stat may be old on NFS
                if path != self.path and silence(file.fileno(), self.path) > self.lease:
                    return {}
                facts: dict[str, object] = json.load(file)
                if path != self.path and facts["boot"] == self.boot and _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    path.unlink(missing_ok=True)  # the process is gone for certain
                    return {}
                return facts
        except FileNotFoundError:
            return {}


def living(folder: Path) -> set[str]:
    """Drivers that work now, for somebody who is none and touches nothing: the clocks of machines are believed."""
    found, boot = set(), _boot_id()
    for path in folder.glob("[!.]*"):
        with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
            silent = time.time() - os.stat(file.fileno()).st_mtime > LEASE
            gone = json.load(file)["boot"] == boot and _lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if not (silent or gone):
                found.add(path.name)
    return found


def silence(file: int | Path, own: Path) -> float:
    """Seconds since a file was touched, on the clock of its file system; ``own``: a file there that may be touched."""
    with contextlib.suppress(FileNotFoundError):  # closed meanwhile, or somebody cleaned the folder
        os.utime(own)
        return own.stat().st_mtime - os.stat(file).st_mtime
    return time.time() - os.stat(file).st_mtime


def _lock(file: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    """Takes the lock of an open file; False when another process has it, or when locks do not exist there."""
    try:
        fcntl.flock(file, how)
    except OSError:
        return False
    return True


def _give_signs(path: Path, stop: threading.Event, interval: float) -> None:
    while not stop.wait(interval):
        with contextlib.suppress(OSError):  # the file system is away for a moment: the next sign may arrive
            os.utime(path)


def _boot_id() -> str:
    """Names this start of this machine's kernel: only under the same one does a file's lock say who lives."""
    host = os.uname().nodename  # too: machines restored from one snapshot have one boot id
    with contextlib.suppress(OSError):
        return f"{host} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    return host
