"""Look into a shard: counts, sidecar, a document as text; --verify reads every byte and checks it.

    python data_tools/inspect_data.py shards/train_github --verify --document 0 --tokenizer-model tokenizer/
    python data_tools/inspect_data.py old/my-gpt2_text_document --write-sidecar --tokenizer-model tokenizer/

The second gives a shard of another tool, or of an older version of this one, the sidecar with which it is opened at
once. The exit status is 0 for sound shards, 1 when one is damaged or cannot be read, 2 for a wrong command line.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

if not __package__:  # run as a file: python data_tools/inspect_data.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_tools.tokenizer import Tokenizer, load_tokenizer
from megatron_lite.data.indexed import IndexedDataset, ShardMeta, read_meta, resolve_prefix, write_meta
from megatron_lite.data.sidecar import BlockHash, Layout, measure_layout

BLOCK_TOKENS = 1 << 22  # read at a time by --verify
DECODED_TOKENS = 1 << 24  # --write-sidecar decodes about so many (tens of seconds) to count bytes of text


def describe(dataset: IndexedDataset) -> str:
    """Counts, sizes and the sidecar of a shard, for people."""
    lengths = dataset.lengths
    lines = [
        f"{dataset.prefix}",
        f"  documents   {dataset.num_documents:,}"
        + (f" in {len(dataset):,} sequences" * (len(dataset) != dataset.num_documents)),
        f"  tokens      {dataset.num_tokens:,} of {dataset.dtype.name}, {dataset.bin_size:,} bytes",
    ]
    if len(lengths):
        quantiles = np.percentile(lengths, [0, 50, 100]).astype(int)
        lines.append("  lengths     min {:,}, median {:,}, max {:,}".format(*quantiles))
    meta = dataset.meta
    if meta is None:
        unknown = "tokenizer, vocabulary size, EOD, bytes of text, checksums"
        return "\n".join([*lines, f"  sidecar     none, so unknown are: {unknown} (--write-sidecar finds them)"])
    lines += [
        f"  text        {meta.num_bytes:,} bytes, {meta.num_bytes / max(meta.num_tokens, 1):.3f} bytes/token",
        f"  tokenizer   {meta.tokenizer_sha256[:16]}, vocabulary {meta.vocab_size:,}, EOD {meta.eod_id}",
        f"  sources     {', '.join(str(s.get('path', '?')) for s in meta.sources[:5])}"
        + (f" and {len(meta.sources) - 5} more" * (len(meta.sources) > 5)),
    ]
    if meta.layout is None:
        lines.append(
            "  layout      unknown: an old sidecar, so opening reads the whole index (--write-sidecar mends it)"
        )
    else:
        checksums = f"{len(meta.layout.bin_checksums)} + {len(meta.layout.idx_checksums)}"
        lines.append(f"  checksums   {checksums} blocks of {meta.layout.checksum_block >> 20} MiB in .bin and .idx")
    lines += [f"  {key:<15} {json.dumps(value)}" for key, value in meta.extra.items() if value not in (None, 0, [], {})]
    if meta.extra.get("shuffled_seed") is not None and dataset.contiguous:
        lines.append("  advice      shuffled when written: data.sample_order=contiguous is safe, and reads are faster")
    return "\n".join(lines)


def verify(prefix: str) -> list[str]:
    """Everything that is wrong with a shard, by file and bytes; reads all of it.

    Blocks that are not what was once written come first. Then: can it be opened, do the sequences tile the .bin, is
    every token below the vocabulary size.
    """
    problems: list[str] = []
    try:
        prefix = resolve_prefix(prefix)
        meta = read_meta(prefix)
        if meta and meta.layout:
            for end in ("bin", "idx"):
                problems += _bad_blocks(f"{prefix}.{end}", meta.layout, end)
        dataset = IndexedDataset(prefix)
        dataset.check()
    except ValueError as error:
        return [*problems, str(error)]
    if not dataset.contiguous:
        problems.append(
            f"{prefix}.idx: its sequences have {dataset.num_tokens * dataset.dtype.itemsize} bytes and do not tile the "
            f".bin, which has {dataset.bin_size}: there are gaps, overlaps or bytes left over; tokenise the text again"
        )
    problems += _bad_tokens(dataset, meta.vocab_size if meta else np.iinfo(np.int32).max)
    if meta and not meta.layout and meta.bin_xxh3 and hash_file(f"{prefix}.bin", xxhash.xxh3_64()) != meta.bin_xxh3:
        problems.append(f"{prefix}.bin: not the bytes that the sidecar was written for; tokenise the text again")
    return problems


def hash_file(path: str, into: Any) -> Any:
    """Feed a file to a hash in pieces; returns its hexdigest(), or digests() by block."""
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(1 << 22):
            into.update(piece)
    return into.digests() if isinstance(into, BlockHash) else into.hexdigest()


def _bad_blocks(path: str, layout: Layout, end: str) -> list[str]:
    size, block, expected = getattr(layout, f"{end}_size"), layout.checksum_block, getattr(layout, f"{end}_checksums")
    found, problems = hash_file(path, BlockHash(block)), []
    if (real := Path(path).stat().st_size) != size:
        problems.append(f"{path}: {real} bytes, {size} were written")
    for i, (ours, theirs) in enumerate(zip_longest(found, expected)):
        if ours != theirs:
            last = min((i + 1) * block, max(size, real)) - 1
            problems.append(f"{path}: bytes {i * block} to {last} are not those that were written (block {i})")
    return problems


def _bad_tokens(dataset: IndexedDataset, limit: int) -> list[str]:
    for start in range(0, len(dataset.tokens), BLOCK_TOKENS) if dataset.dtype.kind != "f" else ():
        block = dataset.tokens[start : start + BLOCK_TOKENS]
        bad = np.flatnonzero((block < 0) | (block >= limit))
        if bad.size:
            at = start + int(bad[0])
            return [f"{dataset.prefix}.bin: token {at} is {dataset.tokens[at]}, not in the vocabulary of {limit}"]
    return []


def write_sidecar(prefix: str, tokenizer_path: str | None) -> ShardMeta:
    """Check a shard whole and write the sidecar that vouches for it. An old sidecar gives its facts to the new one.

    Bytes of text are counted by decoding; of a large shard, of documents spread evenly over it, and `extra` says so.
    Raises ValueError for a damaged shard, and where neither a sidecar nor a tokenizer says what the tokens mean.
    """
    dataset = IndexedDataset(prefix)
    prefix = dataset.prefix
    if dataset.meta is None and tokenizer_path is None:
        raise ValueError(f"{prefix} has no sidecar: --write-sidecar needs --tokenizer-model, what it was made with")
    if problems := verify(prefix):
        raise ValueError(problems[0])
    meta = dataset.meta
    if tokenizer_path is not None:
        tokenizer = load_tokenizer(tokenizer_path, need_eod=False)
        _check_tokenizer(dataset, tokenizer)
        meta = meta or _read_facts(dataset, tokenizer)
    assert meta is not None
    layout = measure_layout(
        f"{prefix}.idx",
        f"{prefix}.bin",
        dataset.document_lengths,
        hash_file(f"{prefix}.bin", BlockHash()),
        hash_file(f"{prefix}.idx", BlockHash()),
        (dataset.sequences_are_documents, dataset.contiguous),
    )
    meta = replace(meta, bin_xxh3=hash_file(f"{prefix}.bin", xxhash.xxh3_64()), layout=layout)
    if problems := _bad_tokens(dataset, meta.vocab_size):
        raise ValueError(problems[0])
    write_meta(prefix, meta)
    return meta


def _read_facts(dataset: IndexedDataset, tokenizer: Tokenizer) -> ShardMeta:
    step = max(1, -(-dataset.num_tokens // DECODED_TOKENS))
    num_bytes = num_decoded = 0
    for i in range(0, len(dataset), step):
        tokens = dataset[i]
        num_decoded += tokens.size
        text = [token for token in tokens.tolist() if token != tokenizer.eod_id]
        num_bytes += len(tokenizer.decode(text).encode())
    return ShardMeta(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        num_documents=dataset.num_documents,
        num_tokens=dataset.num_tokens,
        num_bytes=num_bytes if step == 1 else round(num_bytes * dataset.num_tokens / max(num_decoded, 1)),
        dtype=dataset.dtype.name,
        extra={"num_bytes_from_tokens": num_decoded},
    )


def document_text(dataset: IndexedDataset, number: int, tokenizer_path: str) -> str:
    """Document `number` (0-based; negative counts from the end) as text, EOD included."""
    count = dataset.num_documents
    if not -count <= number < count:
        raise ValueError(f"{dataset.prefix}: no document {number}; there are {count}, numbered from 0")
    tokenizer = load_tokenizer(tokenizer_path, need_eod=False)
    _check_tokenizer(dataset, tokenizer)
    dataset.check()
    first, last = dataset.document_indices[number % count], dataset.document_indices[number % count + 1]
    return tokenizer.decode([int(token) for i in range(first, last) for token in dataset[i]])


def _check_tokenizer(dataset: IndexedDataset, tokenizer: Tokenizer) -> None:
    if dataset.meta and dataset.meta.tokenizer_sha256 != tokenizer.sha256:
        raise ValueError(
            f"{dataset.prefix} was made with tokenizer {dataset.meta.tokenizer_sha256[:16]}, but {tokenizer.path} "
            f"is {tokenizer.sha256[:16]}: give the one it was made with"
        )


def _inspect(prefix: str, args: argparse.Namespace) -> list[str]:
    """Do what the command line asks with one shard; returns what is wrong with it."""
    try:
        if args.write_sidecar:
            write_sidecar(prefix, args.tokenizer_model)
        if args.verify and (problems := verify(prefix)):
            return problems
        dataset = IndexedDataset(prefix)
        print(describe(dataset))
        if args.verify:
            known = dataset.meta and (dataset.meta.layout or dataset.meta.bin_xxh3)
            print("  verified    every byte" if known else "  verified    structure only: no checksum to compare with")
        if args.document is not None:
            print(document_text(dataset, args.document, args.tokenizer_model))
    except ValueError as error:
        return [str(error)]
    return []


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="+", help="shard paths, with or without .bin or _text_document")
    parser.add_argument("--verify", action="store_true", help="read and check every byte, name every bad block")
    parser.add_argument("--document", type=int, metavar="N", help="print document N (from 0) as text")
    parser.add_argument("--write-sidecar", action="store_true", help="check a shard and write the sidecar it lacks")
    parser.add_argument("--tokenizer-model", help="what the shard was made with; needed by --document")
    args = parser.parse_args(argv)
    if args.document is not None and args.tokenizer_model is None:
        parser.error("--document needs --tokenizer-model to turn tokens into text")
    problems = [problem for prefix in args.prefix for problem in _inspect(prefix, args)]
    for problem in problems:
        print(f"inspect_data: error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
