"""Text in the forms that people keep it in: JSON lines (plain, gzip, zstd), parquet, text files; streamed in chunks.

A chunk is a run of whole documents of one file, still unparsed where possible, so that parsing happens in the worker
that tokenises it. Line numbers (row numbers for parquet) are 1-based and count blank lines.
"""

import difflib
import glob
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import xxhash

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
SUFFIXES = (*JSON_SUFFIXES, ".parquet", ".txt")
CHUNK_BYTES = 1 << 18  # about 0.1 s of tokenising: small enough to balance workers, large enough to amortise the trip
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of one file; `first` is the line of the first. Payload: raw JSON lines, or texts."""

    path: str
    first: int
    payload: bytes | list[Any]


@dataclass(frozen=True)
class BadLine:
    """A line that holds no text, and why."""

    why: str


def expand_inputs(inputs: Sequence[str | Path]) -> list[str]:
    """Files behind some files, globs and folders (searched recursively), each expansion sorted by path.

    Raises ValueError for a path that does not exist, an unknown ending, an empty folder or glob, a file named twice.
    """
    files: list[str] = []
    for item in map(str, inputs):
        path = Path(item)
        if path.is_dir():
            found = sorted(str(p) for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
            found = [f for f in found if not any(part.startswith(".") for part in Path(f).relative_to(path).parts)]
        elif path.is_file():
            if not path.name.endswith(SUFFIXES):
                raise ValueError(f"{item}: this ending is not read; known are {' '.join(SUFFIXES)}")
            found = [item]
        else:
            found = sorted(f for f in glob.glob(item, recursive=True) if f.endswith(SUFFIXES) and Path(f).is_file())
        if not found:
            raise ValueError(f"{item}: no input there{_nearest(path)}; known endings are {' '.join(SUFFIXES)}")
        files += found
    seen: set[Path] = set()
    for file in files:
        real = Path(file).resolve()
        if real in seen:
            raise ValueError(f"{file}: given twice; every document would count twice")
        seen.add(real)
    if not files:
        raise ValueError("no input: name at least one file, glob or folder")
    return files


def fingerprint(files: Sequence[str]) -> list[dict[str, Any]]:
    """Path, size in bytes and xxh3-128 of each file: what decides whether a shard is up to date.

    Not sha256: it notices change, not malice, and must cost little beside tokenising at 200 MB a CPU-second.
    """
    entries, buffer = [], bytearray(1 << 18)  # small enough to stay in cache
    for path in files:
        with open(path, "rb", buffering=0) as file:
            digest = xxhash.xxh3_128()
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
            entries.append({"path": path, "size": file.tell(), "xxh3_128": digest.hexdigest()})
    return entries


def read_chunks(path: str, key: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Stream a file as chunks of about `chunk_bytes` of text. `key` is the column of a parquet file."""
    if path.endswith(".parquet"):
        yield from _read_parquet(path, key)
    elif path.endswith(".txt"):
        yield Chunk(path, 1, [Path(path).read_bytes()])
    else:
        yield from _read_lines(path, chunk_bytes)


def parse(chunk: Chunk, key: str) -> Iterator[tuple[int, str | BadLine]]:
    """Line number and text of each document in a chunk. Blank lines are no documents; text is valid Unicode."""
    if isinstance(chunk.payload, bytes):
        for number, line in enumerate(chunk.payload.split(b"\n"), start=chunk.first):
            if line and not line.isspace():
                yield number, _text_of(line, key)
    else:
        for number, value in enumerate(chunk.payload, start=chunk.first):
            yield number, _check_text(value, key)


def read_documents(files: Sequence[str], key: str, on_bad_line: str = "error") -> Iterator[str]:
    """The text of every document in some files; a bad line is a ValueError with file and line, or skipped."""
    for path in files:
        for chunk in read_chunks(path, key):
            for number, text in parse(chunk, key):
                if not isinstance(text, BadLine):
                    yield text
                elif on_bad_line == "error":
                    raise ValueError(f"{path}:{number}: {text.why}. --on-bad-line skip leaves such lines out")


def sampling_hash(text: bytes, purpose: str) -> float:
    """A number in [0, 1) that depends on the text and on what it is for, so adding files never reshuffles."""
    digest = hashlib.blake2b(text, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little") / 2**64


def _read_lines(path: str, chunk_bytes: int) -> Iterator[Chunk]:
    first = 1
    try:
        with _open(path) as file:
            while block := file.read(chunk_bytes):
                block += file.readline()
                yield Chunk(path, first, block.removeprefix(BYTE_ORDER_MARK) if first == 1 else block)
                first += block.count(b"\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: truncated or corrupt after line {first - 1} ({error}); copy it again") from error


def _open(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(path), buffer_size=1 << 20)
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """A .zst of any number of frames. Unlike zstandard's own stream reader it notices a file that was cut off."""

    def __init__(self, path: str) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"{path}: reading .zst needs `pip install zstandard`") from error

        self._zstandard = zstandard
        self._file = open(path, "rb")  # noqa: SIM115
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._fresh = True  # between frames: the only place where the file may end
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._fresh = self._zstandard.ZstdDecompressor().decompressobj(), True
            compressed = compressed or self._file.read(1 << 17)
            if not compressed:
                if self._fresh:
                    return 0
                raise EOFError("the last zstd frame is incomplete")
            self._fresh = False
            try:
                self._ready = memoryview(self._frame.decompress(compressed))
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_parquet(path: str, key: str) -> Iterator[Chunk]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs `pip install pyarrow`") from error

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if key not in names:
                raise ValueError(f"{path}: no column {key!r}; the columns are {', '.join(names)} (choose: --json-keys)")
            first = 1
            for batch in file.iter_batches(batch_size=256, columns=[key]):
                yield Chunk(path, first, batch.column(0).to_pylist())
                first += batch.num_rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}); copy it again") from error


def _text_of(line: bytes, key: str) -> str | BadLine:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:  # the standard module also takes NaN and Infinity, which Python's own json writes
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            return BadLine(f"not valid JSON ({error}){_array_hint(line)}")
    if not isinstance(record, dict):
        return BadLine(f"a JSON {type(record).__name__}, not an object{_array_hint(line)}")
    if key not in record:
        keys = ", ".join(list(record)[:20]) or "none at all"
        return BadLine(f"no key {key!r}; the keys of this line are {keys} (choose: --json-keys)")
    return _check_text(record[key], key)


def _array_hint(line: bytes) -> str:
    hint = "; one object a line is expected: `jq -c '.[]' FILE > FILE.jsonl` turns an array into that"
    return hint if line.lstrip().startswith(b"[") else ""


def _check_text(value: Any, key: str) -> str | BadLine:
    if isinstance(value, bytes):  # a .txt file
        try:
            return value.removeprefix(BYTE_ORDER_MARK).decode()
        except UnicodeDecodeError as error:
            return BadLine(f"not UTF-8 ({error})")
    if not isinstance(value, str):
        return BadLine(f"{key!r} is {str(value)[:40]!r} ({type(value).__name__}), not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        return BadLine(f"{key!r} holds a lone surrogate, which no UTF-8 text can")
    return value


def _nearest(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""
