"""Tokenise text into Megatron shards: <prefix>.bin, .idx and a .meta.json that says what the tokens mean.

    python data_tools/preprocess_data.py --input corpus/train_github.jsonl.zst --output-prefix shards/train_github \\
        --tokenizer-model tokenizer/ --workers 8
    python data_tools/preprocess_data.py --input 'corpus/train_*.jsonl' --output-dir shards/ --tokenizer-model tok/

The first writes one shard from all inputs, the second a shard an input file. Memory does not grow with the corpus, and
the bytes written are the same for any number of workers. A second run with the same inputs and settings does nothing.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if not __package__:  # run as a file: python data_tools/preprocess_data.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_tools.fast_tokenizer import BACKENDS
from data_tools.readers import SUFFIXES, expand_inputs
from data_tools.shard import preprocess
from data_tools.tokenizer import KINDS
from megatron_lite.data.indexed import ShardMeta

__all__ = ["list_shards", "main", "make_shards", "preprocess"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        help=f"files, globs or folders; endings: {' '.join(SUFFIXES)} (one document)",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output-prefix", help="one shard: <prefix>_<key>_document.{bin,idx,meta.json}")
    where.add_argument("--output-dir", help="a shard an input file: <dir>/<file name>_<key>_document.{bin,...}")
    add("--exact-prefix", action="store_true", help="write <prefix>.{bin,idx,meta.json} instead")
    add("--json-keys", nargs="+", default=["text"], help="keys (parquet: columns) that hold text; a shard each")
    add("--tokenizer-model", help="tokenizer folder or file, or the name of a tiktoken encoding")
    add("--tokenizer-type", choices=("auto", *KINDS), default="auto", help="auto: as the file says")
    add("--vocab-file", help="GPT-2's vocab.json")
    add("--merge-file", help="GPT-2's merges.txt")
    add("--vocab-size", type=int, help="Megatron's tiktoken .json: ids in use; default 131072")
    add("--tiktoken-pattern", help="how a tiktoken vocabulary splits text: r50k, cl100k, o200k, v1, v2")
    add("--tiktoken-num-special-tokens", type=int, default=1000, help="Megatron's tiktoken .json: ids before the first")
    add("--allow-special-tokens", action="store_true", help="'<|endoftext|>' in a text is that token, not characters")
    add("--backend", choices=BACKENDS, default="auto", help="auto: gigatoken where it gives identical ids")
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True, help="end each document with EOD")
    add("--workers", type=int, help="processes; default: one a core")
    add(
        "--log-interval",
        type=int,
        default=10_000,
        help="documents between progress lines; terminals get a bar; 0: silent",
    )
    add("--on-bad-line", choices=("error", "skip"), default="error", help="skip leaves bad lines out and counts them")
    add("--fraction", type=float, default=1.0, help="share of documents to keep, by content hash")
    add("--max-tokens", type=int, help="stop before the document that would pass this many tokens")
    add("--shuffle", action="store_true", help="write the documents in random order; see --seed")
    add("--seed", type=int, default=1234, help="of --shuffle")
    add("--partitions", type=int, default=1, help="Megatron's; accepted: the input is never split into files")
    add("--keep-sequential-samples", action="store_true", help="Megatron's; accepted: the order is always kept")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        for _, said in make_shards(argv):
            print(said)
    except ValueError as error:
        print(f"preprocess_data: error: {error}", file=sys.stderr)
        return 1
    return 0


def make_shards(argv: Sequence[str] | None = None) -> Iterator[tuple[ShardMeta, str]]:
    """What the command line does: makes each shard in turn; (its sidecar, a line about it). ValueError: a mistake."""
    args = _parser().parse_args(argv)
    for files, prefix in _shards(args):
        for key in args.json_keys:
            yield _make(args, files, prefix, key)


def list_shards(argv: Sequence[str] | None = None) -> list[tuple[list[str], list[str]]]:
    """What a command line asks for: input files, and the prefixes of the shards that they become, one a key."""
    args = _parser().parse_args(argv)
    endings = [""] if args.exact_prefix else [f"_{key}_document" for key in args.json_keys]
    return [(files, [prefix + ending for ending in endings]) for files, prefix in _shards(args)]


def _shards(args: argparse.Namespace) -> list[tuple[list[str], str]]:
    """The files and the prefix of every shard that was asked for."""
    if args.exact_prefix and len(args.json_keys) > 1:
        raise ValueError(f"--exact-prefix names one shard, --json-keys asks for {len(args.json_keys)}: drop one")
    if args.output_prefix is not None:
        return [(args.input, args.output_prefix)]
    shards: dict[str, str] = {}
    for path in expand_inputs(args.input):
        name = os.path.basename(path).removesuffix(next(s for s in sorted(SUFFIXES, key=len)[::-1] if path.endswith(s)))
        if name in shards:
            raise ValueError(f"{shards[name]} and {path} would both be the shard {name}: rename one")
        shards[name] = path
    return [([path], os.path.join(args.output_dir, name)) for name, path in shards.items()]


def _make(args: argparse.Namespace, files: list[str], prefix: str, key: str) -> tuple[ShardMeta, str]:
    """Make one shard; returns its sidecar and the line that says what is in it."""
    tokenizer = args.tokenizer_model or args.vocab_file or ("bytes" if args.tokenizer_type == "bytes" else None)
    if tokenizer is None:
        raise ValueError("name a tokenizer: --tokenizer-model PATH, or --vocab-file and --merge-file, or bytes")
    meta = preprocess(
        files,
        prefix,
        tokenizer,
        json_key=key,
        append_eod=args.append_eod,
        workers=args.workers,
        fraction=args.fraction,
        max_tokens=args.max_tokens,
        on_bad_line=args.on_bad_line,
        log_interval=args.log_interval,
        tokenizer_type=args.tokenizer_type,
        tokenizer_options={
            "allow_special_tokens": args.allow_special_tokens,
            "merge_file": args.merge_file,
            "tiktoken_pattern": args.tiktoken_pattern,
            "tiktoken_num_special_tokens": args.tiktoken_num_special_tokens,
            "vocab_size": args.vocab_size,
        },
        backend=args.backend,
        shuffle_seed=args.seed if args.shuffle else None,
        exact_prefix=args.exact_prefix,
    )
    skipped, shuffled = meta.extra["num_bad_lines"], meta.extra.get("shuffled_seed")
    said: str = (
        f"{prefix} [{key}]: {meta.num_documents:,} documents, {meta.num_tokens:,} tokens, "
        f"{meta.num_bytes / meta.num_tokens:.2f} bytes/token, encoded by {meta.extra.get('backend', 'native')}"
        + (f", shuffled with seed {shuffled}" * (shuffled is not None))
        + (f", {skipped:,} bad lines skipped" * (skipped > 0))
    )
    return meta, said


if __name__ == "__main__":
    sys.exit(main())
