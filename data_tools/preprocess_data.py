"""Tokenise text into Megatron shards: <prefix>.bin, .idx and a .meta.json that says what the tokens mean.

    python data_tools/preprocess_data.py --input corpus/train_github.jsonl.zst --output-prefix shards/train_github \\
        --tokenizer-model tokenizer/ --workers 8

Streams: memory does not grow with the corpus (20 bytes of index a document aside), and the bytes written are the same
for any number of workers. A second run with the same inputs and settings does nothing.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a file: python data_tools/preprocess_data.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_tools.encoding import Encoded, Recipe, encode_in_order
from data_tools.readers import CHUNK_BYTES, SUFFIXES, expand_inputs, fingerprint, read_chunks
from data_tools.tokenizer import Tokenizer, load_tokenizer
from megatron_lite.data.indexed import IndexedWriter, ShardMeta, optimal_dtype, read_meta, write_meta

# Part of every shard's settings: raise it when the same input would give other tokens, and shards are made anew.
VERSION = 1


@dataclass
class Tally:
    """Running totals of one shard."""

    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0  # UTF-8 bytes of the kept texts
    num_read: int = 0  # UTF-8 bytes of all texts
    num_empty: int = 0
    num_bad: int = 0
    bad_examples: list[str] = field(default_factory=list)

    def add(self, encoded: Encoded) -> None:
        """Count the documents of one chunk."""
        self.num_documents += encoded.lengths.size
        self.num_tokens += encoded.tokens.size
        self.num_bytes += int(encoded.text_bytes.sum())
        self.num_read += encoded.num_read
        self.num_empty += encoded.num_empty
        self.num_bad += len(encoded.bad)
        self.bad_examples += encoded.bad[: 5 - len(self.bad_examples)]


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
    exact_prefix: bool = False,
) -> ShardMeta:
    """Write the shard <output_prefix>_<json_key>_document (or exactly the prefix), or find it up to date.

    `fraction` keeps the documents whose content hash is below it: a smaller share is a subset of a larger one.
    `max_tokens` stops before the first document that would pass it. `log_interval` is in documents; 0 is silent.
    `workers` None means one a core; they are spawned, so a script that calls this needs `if __name__ == "__main__":`.
    Raises ValueError naming file and line for text that cannot be read.
    """
    _check_options(fraction, max_tokens, on_bad_line, workers)
    prefix = os.path.abspath(output_prefix if exact_prefix else f"{output_prefix}_{json_key}_document")
    files = expand_inputs([inputs] if isinstance(inputs, str | Path) else inputs)
    tokenizer = load_tokenizer(tokenizer_path, tokenizer_type, need_eod=append_eod)
    sources = fingerprint(files)
    settings = {
        "version": VERSION,
        "json_key": json_key,
        "append_eod": append_eod,
        "fraction": fraction,
        "max_tokens": max_tokens,
        "on_bad_line": on_bad_line,
    }
    done = _find_done(prefix, tokenizer, sources, settings)
    if done is not None:
        if log_interval:
            _say(f"{prefix}: up to date, nothing to do")
        return done
    recipe = Recipe(
        tokenizer_path=str(tokenizer.path),
        tokenizer_type=tokenizer_type,
        tokenizer_sha256=tokenizer.sha256,
        json_key=json_key,
        append_eod=append_eod,
        fraction=fraction,
        stop_on_bad_line=on_bad_line == "error",
        dtype=optimal_dtype(tokenizer.vocab_size).name,
    )
    most_workers = 1 + sum(source["size"] for source in sources) // CHUNK_BYTES  # more would have nothing to do
    tally, writer = _write(prefix, files, recipe, min(workers or _num_cores(), most_workers), max_tokens, log_interval)
    meta = _describe(tally, tokenizer, recipe, sources, settings, writer)
    write_meta(prefix, meta)
    return meta


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
    if [(s["size"], s["sha256"]) for s in meta.sources] != [(s["size"], s["sha256"]) for s in sources]:
        return None
    # 42 = 34 header bytes and document index 0; 20 a document: length 4, pointer 8, document index 8.
    expected = {".bin": meta.num_tokens * np.dtype(meta.dtype).itemsize, ".idx": 42 + 20 * meta.num_documents}
    whole = all(os.path.isfile(prefix + end) and os.path.getsize(prefix + end) == n for end, n in expected.items())
    return meta if whole else None


def _write(
    prefix: str, files: list[str], recipe: Recipe, workers: int, max_tokens: int | None, log_interval: int
) -> tuple[Tally, IndexedWriter]:
    """Write .bin and .idx; returns the totals, and the writer with its checksums. An error leaves nothing behind."""
    tally, start, next_log = Tally(), time.monotonic(), log_interval
    _remove_leftovers(prefix)
    chunks = (chunk for path in files for chunk in read_chunks(path, recipe.json_key))
    with IndexedWriter(prefix, recipe.dtype) as writer:
        for encoded in encode_in_order(chunks, recipe, workers):
            if encoded.bad and recipe.stop_on_bad_line:
                raise ValueError(f"{encoded.bad[0]}. --on-bad-line skip leaves such lines out and counts them")
            kept = encoded if max_tokens is None else _cut(encoded, max_tokens - tally.num_tokens)
            tally.add(kept)
            writer.add_documents(kept.tokens, kept.lengths)
            if log_interval and tally.num_documents >= next_log:
                _say(_progress(tally, time.monotonic() - start))
                next_log = (tally.num_documents // log_interval + 1) * log_interval
            if kept is not encoded:
                break
        if tally.num_documents == 0:
            raise ValueError(
                f"{', '.join(files[:3])}: no document to write ({tally.num_empty} empty, {tally.num_bad} bad lines, "
                f"fraction {recipe.fraction}, max_tokens {max_tokens}); check the input or keep more of it"
            )
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


def _describe(
    tally: Tally,
    tokenizer: Tokenizer,
    recipe: Recipe,
    sources: list[dict[str, Any]],
    settings: dict[str, Any],
    writer: IndexedWriter,
) -> ShardMeta:
    return ShardMeta(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        num_documents=tally.num_documents,
        num_tokens=tally.num_tokens,
        num_bytes=tally.num_bytes,
        dtype=recipe.dtype,
        sources=sources,
        bin_xxh3=writer.bin_xxh3,
        layout=writer.layout,
        extra={
            "tokenizer_name": tokenizer.name,
            "settings": settings,
            "num_bad_lines": tally.num_bad,
            "bad_line_examples": tally.bad_examples,
            "num_empty": tally.num_empty,
        },
    )


def _remove_leftovers(prefix: str) -> None:
    """Delete what a killed run left under a temporary name; those of a live process stay."""
    for end in (".bin", ".idx", ".meta.json"):
        for path in Path(prefix).parent.glob(f"{Path(prefix).name}{end}.tmp-*"):
            pid = path.name.rpartition("-")[2]
            if pid.isdecimal() and not Path("/proc", pid).exists():
                path.unlink(missing_ok=True)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _progress(tally: Tally, seconds: float) -> str:
    rate = tally.num_read / 1e6 / max(seconds, 1e-9)
    return f"{tally.num_documents:,} documents, {tally.num_tokens:,} tokens, {rate:.1f} MB/s"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        help=f"files, globs or folders; endings: {' '.join(SUFFIXES)} (one document)",
    )
    add("--output-prefix", required=True, help="writes <prefix>_<key>_document.{bin,idx,meta.json}")
    add("--exact-prefix", action="store_true", help="write <prefix>.{bin,idx,meta.json} instead")
    add("--json-keys", nargs="+", default=["text"], help="keys (parquet: columns) that hold text; a shard each")
    add("--tokenizer-model", required=True, help="tokenizer folder, tokenizer.json or SentencePiece *.model")
    add("--tokenizer-type", choices=("auto", "HuggingFaceTokenizer", "SentencePieceTokenizer"), default="auto")
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True, help="end each document with EOD")
    add("--workers", type=int, help="processes; default: one a core")
    add("--log-interval", type=int, default=10_000, help="documents between progress lines; 0: silent")
    add("--on-bad-line", choices=("error", "skip"), default="error", help="skip leaves bad lines out and counts them")
    add("--fraction", type=float, default=1.0, help="share of documents to keep, by content hash")
    add("--max-tokens", type=int, help="stop before the document that would pass this many tokens")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        if args.exact_prefix and len(args.json_keys) > 1:
            raise ValueError(f"--exact-prefix names one shard, --json-keys asks for {len(args.json_keys)}: drop one")
        for key in args.json_keys:
            meta = preprocess(
                args.input,
                args.output_prefix,
                args.tokenizer_model,
                json_key=key,
                append_eod=args.append_eod,
                workers=args.workers,
                fraction=args.fraction,
                max_tokens=args.max_tokens,
                on_bad_line=args.on_bad_line,
                log_interval=args.log_interval,
                tokenizer_type=args.tokenizer_type,
                exact_prefix=args.exact_prefix,
            )
            skipped = meta.extra["num_bad_lines"]
            print(
                f"{args.output_prefix} [{key}]: {meta.num_documents:,} documents, {meta.num_tokens:,} tokens, "
                f"{meta.num_bytes / meta.num_tokens:.2f} bytes/token"
                + (f", {skipped:,} bad lines skipped" * (skipped > 0))
            )
    except ValueError as error:
        print(f"preprocess_data: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
