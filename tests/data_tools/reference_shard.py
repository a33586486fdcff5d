"""Megatron's shard format written by hand, and the shortest way to make a shard."""

import struct
from pathlib import Path

from data_tools.preprocess_data import preprocess


def reference_shard(documents: list[list[int]], dtype_code: int, form: str) -> tuple[bytes, bytes]:
    """The .bin and .idx of Megatron's format table, one field at a time."""
    payload, pointers, offset = b"", [], 0
    for ids in documents:
        pointers.append(offset)
        packed = struct.pack(f"<{len(ids)}{form}", *ids)
        payload += packed
        offset += len(packed)
    index = bytes.fromhex("4D4D49444944580000")
    index += struct.pack("<Q", 1)
    index += struct.pack("<B", dtype_code)
    index += struct.pack("<Q", len(documents))
    index += struct.pack("<Q", len(documents) + 1)
    for ids in documents:
        index += struct.pack("<i", len(ids))
    for pointer in pointers:
        index += struct.pack("<q", pointer)
    for i in range(len(documents) + 1):
        index += struct.pack("<q", i)
    return payload, index


def shard_bytes(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def run(tmp_path: Path, source: Path | list[Path], tokenizer: Path, name: str = "out", **options: object) -> Path:
    preprocess(source, tmp_path / name, tokenizer, exact_prefix=True, **{"workers": 1, **options})
    return tmp_path / name
