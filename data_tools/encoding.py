"""What a preprocessing worker does: raw documents in, flat token ids out. It loads neither torch nor the core."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait

import numpy as np
import numpy.typing as npt

from data_tools.readers import BadLine, Chunk, parse, sampling_hash
from data_tools.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Recipe:
    """How documents become tokens; the same for every chunk of a shard."""

    tokenizer_path: str
    tokenizer_type: str
    tokenizer_sha256: str
    json_key: str
    append_eod: bool
    fraction: float
    stop_on_bad_line: bool
    dtype: str


@dataclass
class Encoded:
    """Documents of one chunk, end to end. `lengths` in tokens, `text_bytes` in UTF-8 bytes, one entry a document."""

    tokens: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int64]
    text_bytes: npt.NDArray[np.int64]
    num_read: int = 0  # UTF-8 bytes of all texts in the chunk, kept or not
    num_empty: int = 0  # texts without a single token, left out
    bad: list[str] = field(default_factory=list)  # "file:line: why", at most one when the recipe stops there


def encode_chunk(chunk: Chunk, recipe: Recipe) -> Encoded:
    """Parse, sample and tokenise a chunk. Bad lines are reported, not raised: the caller knows the policy."""
    texts, sizes, bad, num_read = [], [], [], 0
    for number, text in parse(chunk, recipe.json_key):
        if isinstance(text, BadLine):
            bad.append(f"{chunk.path}:{number}: {text.why}")
            if recipe.stop_on_bad_line:
                break
            continue
        raw = text.encode()
        num_read += len(raw)
        if recipe.fraction >= 1.0 or sampling_hash(raw, "fraction") < recipe.fraction:
            texts.append(text)
            sizes.append(len(raw))
    tokenizer = _load_once(recipe.tokenizer_path, recipe.tokenizer_type, recipe.append_eod, recipe.tokenizer_sha256)
    batch = tokenizer.encode_batch(texts)
    kept = [i for i, ids in enumerate(batch) if ids]  # as in Megatron, a text without tokens gets no EOD either
    if recipe.append_eod:
        assert tokenizer.eod_id is not None  # load_tokenizer was told to need it
        for i in kept:
            batch[i].append(tokenizer.eod_id)
    lengths = np.array([len(batch[i]) for i in kept], dtype=np.int64)
    return Encoded(
        tokens=np.fromiter(chain.from_iterable(batch), dtype=recipe.dtype, count=int(lengths.sum())),
        lengths=lengths,
        text_bytes=np.array([sizes[i] for i in kept], dtype=np.int64),
        num_read=num_read,
        num_empty=len(batch) - len(kept),
        bad=bad,
    )


def encode_in_order(chunks: Iterator[Chunk], recipe: Recipe, workers: int) -> Iterator[Encoded]:
    """Encode chunks, `workers` at a time, and yield them in input order. At most two chunks a worker are in flight."""
    if workers == 1:
        with _one_thread_each():
            for chunk in chunks:
                yield encode_chunk(chunk, recipe)
        return
    # spawn: forking a process whose tokenizer or torch threads hold locks can hang the child.
    context = get_context("spawn")
    with _one_thread_each(), ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
        pending: deque[Future[Encoded]] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(encode_chunk, chunk, recipe))
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
def _load_once(path: str, kind: str, need_eod: bool, sha256: str) -> Tokenizer:
    return load_tokenizer(path, kind, need_eod)
