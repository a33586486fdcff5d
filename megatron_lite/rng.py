"""Every random number is a function of (seed, what it is for). Nothing reads a global generator."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *names: object) -> int:
    """A 63-bit seed for one purpose: the same seed and names always give the same number, on any machine."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def init_generator(seed: int, param_name: str) -> torch.Generator:
    """The CPU generator that draws one parameter whole, so that initialisation knows no rank and no device."""
    return torch.Generator().manual_seed(derive_seed(seed, "init", param_name))
