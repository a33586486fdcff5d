"""Join shards into one, documents in the order given, without holding them in memory.

python data_tools/merge_data.py --input shards/github_0 shards/github_1 --output-prefix shards/train_github
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

if not __package__:  # run as a file: python data_tools/merge_data.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, ShardMeta, resolve_prefix, write_meta

CHUNK = 1 << 20  # documents whose lengths are in memory at a time
BLOCK_TOKENS = 1 << 22  # copied at a time, or one document


def merge(prefixes: Sequence[str | Path], output_prefix: str | Path) -> ShardMeta | None:
    """Write the shard `output_prefix` from others and return its sidecar: theirs summed, None when none has one.

    A folder stands for the shards in it, sorted by name. Raises ValueError, naming two shards, when their tokenizer,
    vocabulary, EOD or dtype differ or when only one has a sidecar, and when documents hold several sequences.
    """
    shards = [IndexedDataset(prefix) for prefix in _expand(prefixes)]
    for shard in shards:
        shard.check()
        _check_same(shards[0], shard)
        if Path(shard.prefix) == Path(output_prefix).absolute():
            raise ValueError(f"{output_prefix} is both input and output; choose another output prefix")
    with IndexedWriter(output_prefix, shards[0].dtype) as writer:
        for shard in shards:
            _copy(shard, writer)
    metas = [shard.meta for shard in shards if shard.meta is not None]
    if not metas:
        return None
    merged = ShardMeta(
        tokenizer_sha256=metas[0].tokenizer_sha256,
        vocab_size=metas[0].vocab_size,
        eod_id=metas[0].eod_id,
        num_documents=writer.num_documents,
        num_tokens=writer.num_tokens,
        num_bytes=sum(meta.num_bytes for meta in metas),
        dtype=metas[0].dtype,
        sources=[source for meta in metas for source in meta.sources],
        bin_xxh3=writer.bin_xxh3,
        layout=writer.layout,
        extra={
            "merged_from": [Path(shard.prefix).name for shard in shards],
            "num_bad_lines": sum(meta.extra.get("num_bad_lines", 0) for meta in metas),
            "num_empty": sum(meta.extra.get("num_empty", 0) for meta in metas),
        },
    )
    write_meta(output_prefix, merged)
    return merged


def _expand(prefixes: Sequence[str | Path]) -> list[str]:
    found = []
    for item in prefixes:
        if Path(item).is_dir():
            inside = sorted(str(path)[: -len(".idx")] for path in Path(item).glob("*.idx"))
            if not inside:
                raise ValueError(f"{item}: no shard in this folder (no .idx file)")
            found += inside
        else:
            found.append(resolve_prefix(item))
    for prefix in found:
        if found.count(prefix) > 1:
            raise ValueError(f"{prefix}: given twice; every document would count twice")
    if not found:
        raise ValueError("nothing to merge: name at least one shard")
    return found


def _check_same(first: IndexedDataset, other: IndexedDataset) -> None:
    if not other.sequences_are_documents or other.modes is not None:
        kind = "holds modes, so it is multimodal" if other.modes is not None else "has documents of several sequences"
        raise ValueError(f"{other.prefix} {kind}; merge copies plain text shards, one sequence a document")
    if (first.meta is None) != (other.meta is None):
        without = first if first.meta is None else other
        raise ValueError(f"{without.prefix} has no .meta.json, the others do: tokenise it again, or remove theirs")
    for key in ("tokenizer_sha256", "vocab_size", "eod_id"):
        a, b = getattr(first.meta, key, None), getattr(other.meta, key, None)
        if a != b:
            raise ValueError(f"{first.prefix} and {other.prefix} differ in {key}: {a} and {b}; tokenise both with one")
    if first.dtype != other.dtype:
        raise ValueError(
            f"{first.prefix} is {first.dtype.name}, {other.prefix} is {other.dtype.name}; tokenise one again"
        )


def _copy(shard: IndexedDataset, writer: IndexedWriter) -> None:
    """Append a shard's documents. Pointers are followed, so sequences need not lie end to end in its .bin."""
    item = shard.dtype.itemsize
    for start in range(0, len(shard), CHUNK):
        ends = np.cumsum(shard.lengths[start : start + CHUNK], dtype=np.int64)
        first = 0
        while first < len(ends):
            before = int(ends[first - 1]) if first else 0
            after = max(first + 1, int(np.searchsorted(ends, before + BLOCK_TOKENS, side="right")))
            lengths = shard.lengths[start + first : start + after]
            begins = shard.pointers[start + first : start + after] // item
            if shard.contiguous:
                tokens = shard.tokens[int(begins[0]) : int(begins[0]) + int(ends[after - 1]) - before]
            else:
                tokens = np.concatenate([shard.tokens[a : a + n] for a, n in zip(begins, lengths, strict=True)])
            writer.add_documents(tokens, lengths)
            first = after


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="shards, or folders of shards")
    parser.add_argument("--output-prefix", required=True, help="writes <prefix>.{bin,idx,meta.json}")
    args = parser.parse_args(argv)
    try:
        merge(args.input, args.output_prefix)
        merged = IndexedDataset(args.output_prefix)
    except ValueError as error:
        print(f"merge_data: error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output_prefix}: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
