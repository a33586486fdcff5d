"""Files as arrays, by mmap(2) itself: Python's own mmap keeps a file open for each, too many for 1,000 shards."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import numpy as np
import numpy.typing as npt

PROBE = 4096  # bytes read at each of two places of a file whenever it is opened
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_int64]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def map_file(path: str) -> tuple[npt.NDArray[np.uint8], bytes]:
    """A whole file as a read-only array that keeps its own map alive, and a probe of the content.

    The probe is the first 4 KiB and 2 KiB on either side of 3/5 of the file: in an .idx that is where pointers end. It
    is read without the map, whose first touch would read megabytes ahead.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(handle).st_size
        if size == 0:  # cannot be mapped
            return np.zeros(0, dtype=np.uint8), b""
        probe = os.pread(handle, PROBE, 0) + os.pread(handle, PROBE, max(0, size * 3 // 5 - PROBE // 2))
        address = LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
    finally:
        os.close(handle)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    owner = (ctypes.c_uint8 * size).from_address(address)
    unmap = weakref.finalize(owner, LIBC.munmap, address, size)
    unmap.atexit = False  # a thread may still be reading then
    array = np.frombuffer(memoryview(owner), dtype=np.uint8)
    array.flags.writeable = False
    return array, probe
