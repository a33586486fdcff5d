"""One shard from some text: read, encode, perhaps shuffle, write, describe; or find that it is there already.

Streams: memory does not grow with the corpus (20 bytes of index a document aside), and the bytes written depend neither
on the number of workers nor on which library encodes.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.encoding import Encoded, Recipe, cut_chunks, encode_in_order, read_texts
from data_tools.fast_tokenizer import SAMPLE_CHARACTERS, choose_backend, same_ids
from data_tools.progress import Progress
from data_tools.readers import CHUNK_BYTES, Chunk, expand_inputs, fingerprint
from data_tools.shuffle import DocumentShuffler
from data_tools.tokenizer import Tokenizer, load_tokenizer
from megatron_lite.data.indexed import IndexedWriter, ShardMeta, optimal_dtype, read_meta, write_meta

# Part of every shard's settings: raise it when the same input would give other tokens, and shards are made anew.
VERSION = 1
FAST_WORKER_BYTES = 1 << 28  # of input: a process more costs 0.3 s and the trip of its ids, this takes gigatoken 1.5 s


class DifferentIdsError(ValueError):
    """A fast backend was caught giving ids that are not the tokenizer's."""


@dataclass
class Tally:
    """Running totals of one shard."""

    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0  # UTF-8 bytes of the kept texts
    num_read: int = 0  # UTF-8 bytes of all texts
    num_input: int = 0  # bytes of input
    num_empty: int = 0
    num_bad: int = 0
    bad_examples: list[str] = field(default_factory=list)

    def add(self, encoded: Encoded) -> None:
        """Count the documents of one chunk."""
        self.num_documents += encoded.lengths.size
        self.num_tokens += encoded.tokens.size
        self.num_bytes += int(encoded.text_bytes.sum())
        self.num_read += encoded.num_read
        self.num_input += encoded.num_input
        self.num_empty += encoded.num_empty
        self.num_bad += len(encoded.bad)
        self.bad_examples += map(str, encoded.bad[: 5 - len(self.bad_examples)])


def preprocess(
    inputs: Sequence[str | Path] | str | Path,
    output_prefix: str | Path,
    tokenizer_path: str | Path,
    *,
    json_key: str = "text",
    append_eod: bool = True,
    workers: int | None = None,
    fraction: float = 1.0,
    max_tokens: int | None = None,
    on_bad_line: str = "error",
    log_interval: int = 0,
    tokenizer_type: str = "auto",
    tokenizer_options: dict[str, Any] | None = None,
    backend: str = "auto",
    shuffle_seed: int | None = None,
    exact_prefix: bool = False,
) -> ShardMeta:
    """Write the shard <output_prefix>_<json_key>_document (or exactly the prefix), or find it up to date.

    `fraction` keeps the documents whose content hash is below it: a smaller share is a subset of a larger one.
    `max_tokens` stops before the first document that would pass it. `log_interval` is in documents; 0 is silent.
    `workers` None means one a core; they are spawned, so a script that calls this needs `if __name__ == "__main__":`.
    `tokenizer_options` are the other arguments of load_tokenizer. `backend` is auto, gigatoken or native: who encodes,
    never what. `shuffle_seed` writes the documents in random order. Raises ValueError naming file and line for text
    that cannot be read.
    """
    _check_options(fraction, max_tokens, on_bad_line, workers)
    prefix = os.path.abspath(output_prefix if exact_prefix else f"{output_prefix}_{json_key}_document")
    files = expand_inputs([inputs] if isinstance(inputs, str | Path) else inputs)
    arguments: dict[str, Any] = {"path": str(tokenizer_path), "kind": tokenizer_type, "need_eod": append_eod}
    arguments |= tokenizer_options or {}
    tokenizer, sources = load_tokenizer(**arguments), fingerprint(files)
    settings: dict[str, Any] = {
        "version": VERSION,
        "json_key": json_key,
        "append_eod": append_eod,
        "fraction": fraction,
        "max_tokens": max_tokens,
        "on_bad_line": on_bad_line,
    }
    if arguments.get("allow_special_tokens"):
        settings["allow_special_tokens"] = True
    if shuffle_seed is not None:
        settings["shuffle_seed"] = shuffle_seed
    done = _find_done(prefix, tokenizer, sources, settings)
    if done is not None:
        if log_interval:
            _say(f"{prefix}: up to date, nothing to do")
        return done
    plan = _Plan(prefix, files, sources, tokenizer, workers or _num_cores(), settings, log_interval)
    meta = _make(plan, arguments, backend)
    write_meta(prefix, meta)
    return meta


def _make(plan: "_Plan", arguments: dict[str, Any], backend: str) -> ShardMeta:
    """Choose a backend, write the shard with it, and describe it."""
    settings, tokenizer = plan.settings, plan.tokenizer
    allow_special_tokens = settings.get("allow_special_tokens", False)
    definition, why = choose_backend(
        tokenizer, _sample(plan.files, settings["json_key"]), backend, allow_special_tokens
    )
    if why and plan.log_interval:
        _say(f"{plan.prefix}: encoding with the tokenizer's own library: {why}")
    recipe = Recipe(
        tokenizer=tuple({**arguments, "path": str(tokenizer.path)}.items()),
        tokenizer_sha256=tokenizer.sha256,
        backend="gigatoken" if definition else "native",
        definition="",
        eod_id=tokenizer.eod_id,
        json_key=settings["json_key"],
        append_eod=settings["append_eod"],
        allow_special_tokens=allow_special_tokens,
        fraction=settings["fraction"],
        stop_on_bad_line=settings["on_bad_line"] == "error",
        dtype=optimal_dtype(tokenizer.vocab_size).newbyteorder("=").name,
    )
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:  # for the workers
        file.write(definition)
        file.flush()
        try:
            tally, writer = _write(plan, replace(recipe, definition=file.name))
        except DifferentIdsError as error:
            if backend == "gigatoken":
                raise
            _say(f"{plan.prefix}: {error}; starting over with the tokenizer's own library")
            recipe = replace(recipe, backend="native")
            tally, writer = _write(plan, recipe)
    return _describe(tally, plan, recipe, writer)


def _sample(files: list[str], key: str) -> Iterator[str]:
    """Texts from the start of up to eight files, to compare two tokenizers on."""
    for path in files[:8]:
        room = SAMPLE_CHARACTERS // min(8, len(files))
        for text in read_texts(next(cut_chunks(path, key, 2 * room), Chunk(path, 1, b"")), key)[0]:
            if room > 0:
                yield text[:room]
                room -= len(text)


def _check_options(fraction: float, max_tokens: int | None, on_bad_line: str, workers: int | None) -> None:
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}; it is the share of documents to keep, above 0 and at most 1")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
    if on_bad_line not in ("error", "skip"):
        raise ValueError(f"on_bad_line is {on_bad_line!r}; it is error or skip")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")


def _find_done(
    prefix: str, tokenizer: Tokenizer, sources: list[dict[str, Any]], settings: dict[str, Any]
) -> ShardMeta | None:
    """The sidecar of a shard that this run would write again, byte for byte; None when there is none."""
    try:
        meta = read_meta(prefix)
    except ValueError:  # a damaged sidecar: the shard is made anew
        return None
    if meta is None or meta.extra.get("settings") != settings:
        return None
    if (meta.tokenizer_sha256, meta.eod_id) != (tokenizer.sha256, tokenizer.eod_id):
        return None
    if [(s["size"], s.get("xxh3_128")) for s in meta.sources] != [(s["size"], s["xxh3_128"]) for s in sources]:
        return None
    # 42 = 34 header bytes and document index 0; 20 a document: length 4, pointer 8, document index 8.
    expected = {".bin": meta.num_tokens * np.dtype(meta.dtype).itemsize, ".idx": 42 + 20 * meta.num_documents}
    whole = all(os.path.isfile(prefix + end) and os.path.getsize(prefix + end) == n for end, n in expected.items())
    return meta if whole else None


@dataclass(frozen=True)
class _Plan:
    """What one shard is made of, and where it goes."""

    prefix: str
    files: list[str]
    sources: list[dict[str, Any]]
    tokenizer: Tokenizer
    workers: int
    settings: dict[str, Any]
    log_interval: int


def _write(plan: _Plan, recipe: Recipe) -> tuple[Tally, IndexedWriter]:
    """Write .bin and .idx; returns the totals, and the writer with its checksums. An error leaves nothing behind."""
    tally, max_tokens, seed = Tally(), plan.settings["max_tokens"], plan.settings.get("shuffle_seed")
    _remove_leftovers(plan.prefix)
    num_bytes = sum(source["size"] for source in plan.sources)
    workers = min(plan.workers, 1 + num_bytes // (CHUNK_BYTES if recipe.backend == "native" else FAST_WORKER_BYTES))
    total = num_bytes if all(path.endswith((".json", ".jsonl")) for path in plan.files) else None
    chunks = (chunk for path in plan.files for chunk in cut_chunks(path, recipe.json_key, recipe.chunk_bytes))
    with ExitStack() as stack:
        writer = stack.enter_context(IndexedWriter(plan.prefix, recipe.dtype))
        sink: IndexedWriter | DocumentShuffler = writer
        if seed is not None:
            folder = f"{plan.prefix}.shuffle.tmp-{os.getpid()}"
            sink = stack.enter_context(DocumentShuffler(folder, recipe.dtype, seed))
        progress = stack.enter_context(Progress(os.path.basename(plan.prefix), total, plan.log_interval))
        for encoded in encode_in_order(chunks, recipe, workers):
            if encoded.bad and recipe.stop_on_bad_line:
                raise ValueError(f"{encoded.bad[0]}. --on-bad-line skip leaves such lines out and counts them")
            if encoded.sample is not None and not same_ids(plan.tokenizer, *encoded.sample):
                raise DifferentIdsError(f"gigatoken gives other ids for {encoded.sample[0][:40]!r}")
            kept = encoded if max_tokens is None else _cut(encoded, max_tokens - tally.num_tokens)
            tally.add(kept)
            sink.add_documents(kept.tokens, kept.lengths)
            progress.update(tally.num_documents, tally.num_tokens, tally.num_read, tally.num_input)
            if kept is not encoded:
                break
        if tally.num_documents == 0:
            raise ValueError(
                f"{', '.join(plan.files[:3])}: no document to write ({tally.num_empty} empty, {tally.num_bad} bad "
                f"lines, fraction {recipe.fraction}, max_tokens {max_tokens}); check the input or keep more of it"
            )
        if isinstance(sink, DocumentShuffler):
            for tokens, lengths in sink.drain():
                writer.add_documents(tokens, lengths)
    return tally, writer


def _cut(encoded: Encoded, room: int) -> Encoded:
    """The whole documents that fit into `room` tokens; the same object when all do."""
    ends = np.cumsum(encoded.lengths)
    keep = int(np.searchsorted(ends, room, side="right"))
    if keep == ends.size:
        return encoded
    num_tokens = int(ends[keep - 1]) if keep else 0
    return replace(
        encoded,
        tokens=encoded.tokens[:num_tokens],
        lengths=encoded.lengths[:keep],
        text_bytes=encoded.text_bytes[:keep],
    )


def _describe(tally: Tally, plan: _Plan, recipe: Recipe, writer: IndexedWriter) -> ShardMeta:
    return ShardMeta(
        tokenizer_sha256=plan.tokenizer.sha256,
        vocab_size=plan.tokenizer.vocab_size,
        eod_id=plan.tokenizer.eod_id,
        num_documents=tally.num_documents,
        num_tokens=tally.num_tokens,
        num_bytes=tally.num_bytes,
        dtype=recipe.dtype,
        sources=plan.sources,
        bin_xxh3=writer.bin_xxh3,
        layout=writer.layout,
        extra={
            "tokenizer_name": plan.tokenizer.name,
            "backend": recipe.backend,
            "settings": plan.settings,
            "shuffled_seed": plan.settings.get("shuffle_seed"),
            "num_bad_lines": tally.num_bad,
            "bad_line_examples": tally.bad_examples,
            "num_empty": tally.num_empty,
        },
    )


def _remove_leftovers(prefix: str) -> None:
    """Delete what a killed run left under a temporary name; those of a live process stay."""
    for end in (".bin", ".idx", ".meta.json", ".shuffle"):
        for path in Path(prefix).parent.glob(f"{Path(prefix).name}{end}.tmp-*"):
            pid = path.name.rpartition("-")[2]
            if pid.isdecimal() and not Path("/proc", pid).exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
