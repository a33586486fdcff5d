"""What a preprocessing worker does: raw documents in, flat token ids out. It loads neither torch nor the core."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, count
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from data_tools.fast_tokenizer import CHECK_CHARACTERS, build_gigatoken
from data_tools.readers import BYTE_ORDER_MARK, CHUNK_BYTES, BadLine, Chunk, parse, read_chunks, sampling_hash
from data_tools.tokenizer import Tokenizer, load_tokenizer
from data_tools.tokenizer_kinds import Ids

FAST_CHUNK_BYTES = 1 << 20  # of input: 5 ms of gigatoken, and its working set stays in cache; 16 MiB is a tenth slower
CHECK_EVERY = 16  # chunks: one document in 16 MiB is encoded twice


@dataclass(frozen=True)
class Recipe:
    """How documents become tokens; the same for every chunk of a shard."""

    tokenizer: tuple[tuple[str, Any], ...]  # arguments of load_tokenizer
    tokenizer_sha256: str
    backend: str  # native or gigatoken
    definition: str  # file with gigatoken's definition of the tokenizer
    eod_id: int | None
    json_key: str
    append_eod: bool
    allow_special_tokens: bool
    fraction: float
    stop_on_bad_line: bool
    dtype: str

    @property
    def chunk_bytes(self) -> int:
        """Bytes of input that a worker takes at once."""
        return CHUNK_BYTES if self.backend == "native" else FAST_CHUNK_BYTES


@dataclass(frozen=True)
class Span:
    """Whole lines of an uncompressed file, by byte offsets: the worker reads them, nobody sends them."""

    path: str
    start: int
    end: int


@dataclass(frozen=True)
class BadDocument:
    """A line without text, and why; `line` counts from 1 at byte `start` of the file."""

    path: str
    start: int
    line: int
    why: str

    def __str__(self) -> str:
        before, left = 0, self.start
        if left:
            with open(self.path, "rb") as file:
                while left and (piece := file.read(min(left, 1 << 20))):
                    before, left = before + piece.count(b"\n"), left - len(piece)
        return f"{self.path}:{before + self.line}: {self.why}"


@dataclass
class Encoded:
    """Documents of one chunk, end to end. `lengths` in tokens, `text_bytes` in UTF-8 bytes, one entry a document."""

    tokens: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int64]
    text_bytes: npt.NDArray[np.int64]
    num_read: int = 0  # UTF-8 bytes of all texts in the chunk, kept or not
    num_input: int = 0  # bytes of input, where that is known
    num_empty: int = 0  # texts without a single token, left out
    bad: list[BadDocument] = field(default_factory=list)  # at most one when the recipe stops there
    sample: tuple[str, Ids] | None = None  # a text and its ids, for the check of a fast backend


def cut_chunks(path: str, key: str, chunk_bytes: int) -> Iterator[Chunk | Span]:
    """A file in pieces of about `chunk_bytes`; plain JSON lines are only pointed at."""
    if not path.endswith((".json", ".jsonl")):
        yield from read_chunks(path, key, chunk_bytes)
        return
    with open(path, "rb") as file:
        start, size = 0, os.fstat(file.fileno()).st_size
        while start < size:
            file.seek(start + chunk_bytes)
            file.readline()
            end = min(file.tell(), size)
            yield Span(path, start, end)
            start = end


def encode_chunk(chunk: Chunk | Span, recipe: Recipe, check: bool = False) -> Encoded:
    """Parse, sample and tokenise a chunk. Bad lines are reported, not raised: the caller knows the policy."""
    texts, wrong = read_texts(chunk, recipe.json_key)
    ascii_only = all(map(str.isascii, texts))
    sizes = list(map(len, texts)) if ascii_only else [len(text.encode()) for text in texts]
    num_read = sum(sizes)
    if recipe.fraction < 1.0:
        drawn = [i for i, text in enumerate(texts) if sampling_hash(text.encode(), "fraction") < recipe.fraction]
        texts, sizes = [texts[i] for i in drawn], [sizes[i] for i in drawn]
    batch, eod_id = _encode(texts, recipe), recipe.eod_id
    kept = [i for i, ids in enumerate(batch) if len(ids)]  # as in Megatron, a text without tokens gets no EOD either
    append = eod_id if recipe.append_eod else None
    tokens, lengths = flatten([batch[i] for i in kept], append, recipe.dtype)
    fast = recipe.backend != "native" and eod_id is not None and not recipe.allow_special_tokens
    if fast and np.count_nonzero(tokens == eod_id) != (append is not None) * len(kept):  # an EOD came out of text
        for i in kept:
            if eod_id in batch[i]:  # the tokenizer knows how to spell it out
                batch[i] = _encode_native([texts[i]], recipe)[0]
        tokens, lengths = flatten([batch[i] for i in kept], append, recipe.dtype)
    short = (i for i in kept if len(texts[i]) <= CHECK_CHARACTERS)
    sampled = next(short, None) if check else None
    start = chunk.start if isinstance(chunk, Span) else 0
    return Encoded(
        tokens=tokens,
        lengths=lengths,
        text_bytes=np.array([sizes[i] for i in kept], dtype=np.int64),
        num_read=num_read,
        num_input=chunk.end - chunk.start if isinstance(chunk, Span) else 0,
        num_empty=len(batch) - len(kept),
        bad=[
            BadDocument(chunk.path, start, line, why) for line, why in wrong[: 1 if recipe.stop_on_bad_line else None]
        ],
        sample=None if sampled is None else (texts[sampled], batch[sampled]),
    )


def read_texts(chunk: Chunk | Span, key: str) -> tuple[list[str], list[tuple[int, str]]]:
    """The texts of a chunk, and line number and fault of each line that has none."""
    if isinstance(chunk, Span):
        with open(chunk.path, "rb", buffering=0) as file:
            file.seek(chunk.start)
            payload = file.read(chunk.end - chunk.start)
        chunk = Chunk(chunk.path, 1, payload.removeprefix(BYTE_ORDER_MARK) if chunk.start == 0 else payload)
    if isinstance(chunk.payload, bytes):
        try:  # the short way, which a blank or bad line anywhere ends; whatever orjson accepts is valid Unicode
            texts = [orjson.loads(line)[key] for line in _lines(chunk.payload)]
        except (ValueError, LookupError, TypeError):
            texts = []
        if texts and set(map(type, texts)) == {str}:
            return texts, []
    texts, wrong = [], []
    for number, text in parse(chunk, key):
        if isinstance(text, BadLine):
            wrong.append((number, text.why))
        else:
            texts.append(text)
    return texts, wrong


def _lines(payload: bytes) -> Iterator[memoryview]:
    """Lines without their ends, not copied."""
    view, start = memoryview(payload), 0
    while (end := payload.find(b"\n", start)) >= 0:
        yield view[start:end]
        start = end + 1
    if start < len(payload):
        yield view[start:]


def flatten(
    batch: Sequence[Ids], eod_id: int | None, dtype: npt.DTypeLike
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Documents end to end with EOD after each (None: without), and their lengths, EOD included."""
    extra = eod_id is not None
    lengths = np.fromiter(map(len, batch), dtype=np.int64, count=len(batch)) + extra
    if any(isinstance(ids, np.ndarray) for ids in batch):
        pieces: list[Any] = [np.array([eod_id])] * (2 * len(batch)) if extra else list(batch)
        pieces[:: 1 + extra] = batch
        return np.concatenate(pieces, dtype=dtype, casting="unsafe"), lengths  # the dtype is that of the vocabulary
    tail = [eod_id] if extra else []
    ids = chain.from_iterable(part for ids in batch for part in (ids, tail))
    return np.fromiter(ids, dtype=dtype, count=int(lengths.sum())), lengths


def _encode(texts: list[str], recipe: Recipe) -> list[Ids]:
    """Ids of each text. What gigatoken cannot do is done by the tokenizer's own library."""
    if recipe.backend == "native":
        return _encode_native(texts, recipe)
    try:
        return list(map(_load_fast_once(recipe.definition, recipe.tokenizer_sha256), texts))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic in Rust is no Exception
        return _encode_native(texts, recipe)


def _encode_native(texts: list[str], recipe: Recipe) -> list[Ids]:
    return list(_load_once(recipe.tokenizer, recipe.tokenizer_sha256).encode_batch(texts))


def encode_in_order(chunks: Iterable[Chunk | Span], recipe: Recipe, workers: int) -> Iterator[Encoded]:
    """Encode chunks, `workers` at a time, and yield them in input order. At most two chunks a worker are in flight."""
    checks = (recipe.backend != "native" and number % CHECK_EVERY == 0 for number in count())
    if workers == 1:
        with _one_thread_each():
            for chunk, check in zip(chunks, checks, strict=False):
                yield encode_chunk(chunk, recipe, check)
        return
    # spawn: forking a process whose tokenizer or torch threads hold locks can hang the child.
    context = get_context("spawn")
    with _one_thread_each(), ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
        pending: deque[Future[Encoded]] = deque()
        try:
            for chunk, check in zip(chunks, checks, strict=False):
                pending.append(pool.submit(encode_chunk, chunk, recipe, check))
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is killed: the pool alone would leave this worker waiting."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep `tokenizers` from starting a thread per core in every worker. Children inherit the environment."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@lru_cache(maxsize=1)  # one tokenizer a worker, opened with its first chunk; the hash renews it when the file changes
def _load_once(tokenizer: tuple[tuple[str, Any], ...], sha256: str) -> Tokenizer:
    return load_tokenizer(**dict(tokenizer))


@lru_cache(maxsize=1)
def _load_fast_once(path: str, sha256: str) -> Callable[[str], Ids]:
    encode: Callable[[str], Ids] = build_gigatoken(Path(path).read_text()).encode
    return encode
