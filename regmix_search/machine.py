"""What this process may use of its machine: cores and memory."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # inside a container its own group is the root


def cores() -> int:
    """Cores that this process may use: those that it may run on, or its container's quota where that is less."""
    allowed = len(os.sched_getaffinity(0))
    for read in (_quota_v2, _quota_v1):
        with contextlib.suppress(OSError, ValueError):  # no such file, or `max`: no limit
            quota, period = read()
            return max(1, min(allowed, quota // period)) if quota > 0 else allowed
    return allowed


def free_memory() -> int:
    """Bytes that new processes can have."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.M) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _quota_v2() -> tuple[int, int]:
    """Microseconds of CPU, in so many."""
    quota, period = (CGROUPS / "cpu.max").read_text(encoding="utf-8").split()
    return int(quota), int(period)


def _quota_v1() -> tuple[int, int]:
    """The same; -1: no limit."""
    quota, period = (
        (CGROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period")
    )
    return int(quota), int(period)
