"""Look into a shard: counts, sidecar, a document as text; --verify reads every byte and checks it.

python data_tools/inspect_data.py shards/train_github --verify --document 0 --tokenizer-model tokenizer/
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

if not __package__:  # run as a file: python data_tools/inspect_data.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_tools.tokenizer import load_tokenizer
from megatron_lite.data.indexed import IndexedDataset

BLOCK_TOKENS = 1 << 22  # read at a time by --verify


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
        return "\n".join(
            [*lines, "  sidecar     none: made by another tool, so no bits per byte and no tokenizer check"]
        )
    lines += [
        f"  text        {meta.num_bytes:,} bytes, {meta.num_bytes / max(meta.num_tokens, 1):.3f} bytes/token",
        f"  tokenizer   {meta.tokenizer_sha256[:16]}, vocabulary {meta.vocab_size:,}, EOD {meta.eod_id}",
        f"  sources     {', '.join(str(s.get('path', '?')) for s in meta.sources[:5])}"
        + (f" and {len(meta.sources) - 5} more" * (len(meta.sources) > 5)),
    ]
    lines += [f"  {key:<15} {json.dumps(value)}" for key, value in meta.extra.items() if value not in (0, [], {})]
    return "\n".join(lines)


def verify(dataset: IndexedDataset) -> None:
    """Read the whole shard and raise ValueError at the first thing that is wrong.

    Opening it has checked sizes, pointers, document indices and the sidecar's counts; what is left is that the
    sequences tile the .bin, that every token is below the vocabulary size, and that the bytes are those once written.
    """
    item = dataset.dtype.itemsize
    ends = dataset.pointers + dataset.lengths.astype(np.int64) * item
    gaps = np.flatnonzero(dataset.pointers != np.concatenate([[0], ends[:-1]]))
    if gaps.size:
        raise ValueError(f"{dataset.prefix}.idx: sequence {gaps[0]} does not start where the one before it ends")
    if dataset.num_tokens * item != dataset.bin_size:
        raise ValueError(
            f"{dataset.prefix}.bin: {dataset.bin_size} bytes, the index accounts for {dataset.num_tokens * item}; "
            "tokenise the text again"
        )
    digest = xxhash.xxh3_64()
    for start in range(0, dataset.num_tokens, BLOCK_TOKENS):
        block = dataset.tokens[start : start + BLOCK_TOKENS]
        digest.update(block.tobytes())
        limit = dataset.meta.vocab_size if dataset.meta else np.iinfo(np.int32).max
        bad = np.flatnonzero((block < 0) | (block >= limit))
        if bad.size:
            at = start + int(bad[0])
            raise ValueError(
                f"{dataset.prefix}.bin: token {at} is {dataset.tokens[at]}, not in the vocabulary of {limit}"
            )
    expected = dataset.meta.bin_xxh3 if dataset.meta else ""
    if expected and digest.hexdigest() != expected:
        raise ValueError(
            f"{dataset.prefix}.bin: content hash {digest.hexdigest()}, the sidecar says {expected}; "
            "the file was changed after it was written: tokenise the text again"
        )


def document_text(dataset: IndexedDataset, number: int, tokenizer_path: str) -> str:
    """Document `number` (0-based; negative counts from the end) as text, EOD included."""
    count = dataset.num_documents
    if not -count <= number < count:
        raise ValueError(f"{dataset.prefix}: no document {number}; there are {count}, numbered from 0")
    tokenizer = load_tokenizer(tokenizer_path, need_eod=False)
    if dataset.meta and dataset.meta.tokenizer_sha256 != tokenizer.sha256:
        raise ValueError(
            f"{dataset.prefix} was made with tokenizer {dataset.meta.tokenizer_sha256[:16]}, but {tokenizer.path} "
            f"is {tokenizer.sha256[:16]}: give the one it was made with"
        )
    first, last = dataset.document_indices[number % count], dataset.document_indices[number % count + 1]
    return tokenizer.decode([int(token) for i in range(first, last) for token in dataset[i]])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 for a shard that is damaged."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="+", help="shard paths, with or without .bin or _text_document")
    parser.add_argument("--verify", action="store_true", help="read and check every byte")
    parser.add_argument("--document", type=int, metavar="N", help="print document N (from 0) as text")
    parser.add_argument("--tokenizer-model", help="what the shard was made with; needed by --document")
    args = parser.parse_args(argv)
    try:
        if args.document is not None and args.tokenizer_model is None:
            raise ValueError("--document needs --tokenizer-model to turn tokens into text")
        for prefix in args.prefix:
            dataset = IndexedDataset(prefix)
            print(describe(dataset))
            if args.verify:
                verify(dataset)
                print("  verified    every byte")
            if args.document is not None:
                print(document_text(dataset, args.document, args.tokenizer_model))
    except ValueError as error:
        print(f"inspect_data: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
