"""Keys: 64-bit numbers that name one purpose. Every order of data is a function of a key and of nothing else."""

from __future__ import annotations

import hashlib
from typing import Any

MASK = (1 << 64) - 1


def key_of(*purpose: Any) -> int:
    """A 64-bit key from (seed, what it is for), the same on every machine and Python."""
    digest = hashlib.blake2b("\0".join(map(str, purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mix64(key: int, value: int) -> int:
    """A new key for each value: splitmix64's finaliser over a counter."""
    z = (key + 0x9E3779B97F4A7C15 * (value + 1)) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)
