"""What belongs to the process and not to the run: threads, memory, signals and garbage collection."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import signal
from collections.abc import Iterator

import torch

GC_EVERY = 1000  # steps between garbage collections, the same on every rank: a step leaves no cycles of tensors
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def use_cpu(threads: int) -> None:
    """Sets torch's threads (0: as they are), and keeps freed memory in the process where the C library is glibc.

    By default glibc returns every freed buffer above 32 MiB to the kernel, which fills it with zeros, page by page,
    when the next step asks for it again. No result changes.
    """
    if threads > 0:
        torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)  # larger buffers than this still come from the kernel, one by one
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def collect_garbage(step: int) -> None:
    """Collects at fixed steps, so that all ranks pause together; for use inside ``manual_gc``."""
    if step % GC_EVERY == 0:
        gc.collect()


@contextlib.contextmanager
def manual_gc() -> Iterator[None]:
    """No automatic garbage collection inside: it strikes ranks at different steps, and all wait for the slowest."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextlib.contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that fills when SIGTERM or SIGUSR1 arrives; the handlers of before come back at the end."""
    received: list[int] = []
    try:
        before = {s: signal.signal(s, lambda n, _: received.append(n)) for s in (signal.SIGTERM, signal.SIGUSR1)}
    except ValueError:  # not the main thread: signals are somebody else's business
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
