"""JSON lines to a shard, against Megatron's standard path and against gigatoken on the whole file at once.

    python -m benchmarks.tokenise [--json] [--megabytes 250] [--workers 1]

The corpus is text files of this machine's Python and system packages, no piece twice; the tokenizer is a 32k byte-level
BPE trained on it. Each side runs in a process of its own; the figure is MB of JSONL per CPU-second, children included,
imports excluded and everything else included: opening the tokenizer, reading, checks, checksums, fsync. `tokenize`
gives Megatron the first tenth of the corpus, `tokenize_fast` uses all of it. Needs the bench and fast extras.

Peers. Megatron: tools/preprocess_data.py as megatron-core users run it: one line a task, json.loads, the Hugging Face
tokenizer on one document a call, lists of ids sent from a pool to the process that holds IndexedDatasetBuilder.
gigatoken: encode_files on the JSONL, EOD put in and both files written by vectorised numpy.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import json
import multiprocessing
import os
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import Row, print_rows, rate_row
from data_tools.train_tokenizer import EOD, train_tokenizer

ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".c", ".cpp", ".cuh", ".html", ".js", ".css", ".yaml")
PIECE = 3000  # characters a document, at a line end
VOCAB_SIZE = 32_000
MAX_RSS_MB = 500.0


def read_pieces() -> Iterator[str]:
    """Text of this machine in pieces, none of them twice, none with EOD in it, which the peers make a token."""
    paths = sysconfig.get_paths()
    roots = [paths["purelib"], paths["stdlib"], "/usr/share", "/usr/include", "/usr/lib"]
    seen: set[bytes] = set()
    for root in map(Path, dict.fromkeys(roots)):
        for folder, subfolders, names in os.walk(root):
            subfolders.sort()
            for path in (Path(folder, name) for name in sorted(names) if name.endswith(ENDINGS)):
                try:
                    text = path.read_text(encoding="utf-8") if path.stat().st_size < 1 << 20 else ""
                except (OSError, UnicodeDecodeError):
                    continue
                for piece in cut(text):
                    digest = hashlib.blake2b(piece.encode(), digest_size=8).digest()
                    if digest not in seen and EOD not in piece:
                        seen.add(digest)
                        yield piece


def cut(text: str) -> Iterator[str]:
    """A text in pieces of about PIECE characters that end with a line."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:end]
        start = end


def make_corpus(folder: Path, megabytes: float) -> tuple[Path, Path]:
    """The corpus and its first tenth, as JSON lines."""
    whole, tenth, size = folder / "corpus.jsonl", folder / "tenth.jsonl", 0
    with open(whole, "w") as file, open(tenth, "w") as small:
        for piece in read_pieces():
            line = json.dumps({"text": piece}) + "\n"
            file.write(line)
            small.write(line if size < megabytes * 1e5 else "")
            size += len(line)
            if size >= megabytes * 1e6:
                break
    return whole, tenth


def run_ours(corpus: Path, tokenizer: Path, prefix: Path, workers: int) -> None:
    """preprocess() as a user calls it."""
    from data_tools.shard import preprocess

    preprocess(corpus, prefix, tokenizer, workers=workers, exact_prefix=True)


class MegatronEncoder:
    """tools/preprocess_data.py's Encoder: a line in, lists of ids out."""

    tokenizer: Any

    def __init__(self, path: Path) -> None:
        self.path = path

    def initializer(self) -> None:
        """Open the tokenizer in the pool's process, as Megatron does."""
        from transformers import AutoTokenizer

        MegatronEncoder.tokenizer = AutoTokenizer.from_pretrained(str(self.path))

    def encode(self, line: str) -> tuple[list[int], list[int], int]:
        """Ids with EOD, sentence lengths, bytes."""
        text = json.loads(line)["text"]
        ids = MegatronEncoder.tokenizer(text).input_ids
        if ids:
            ids.append(MegatronEncoder.tokenizer.eos_token_id)
        return ids, [len(ids)], len(line)


def run_megatron(corpus: Path, tokenizer: Path, prefix: Path, workers: int) -> None:
    """The loop of tools/preprocess_data.py around megatron-core's builder."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    encoder = MegatronEncoder(tokenizer)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(VOCAB_SIZE))
    context = multiprocessing.get_context("fork")
    with open(corpus, encoding="utf-8") as lines, context.Pool(workers, initializer=encoder.initializer) as pool:
        for ids, lengths, _ in pool.imap(encoder.encode, lines, 32):
            builder.add_document(torch.IntTensor(ids), lengths)
        pool.close()
        pool.join()
    builder.finalize(f"{prefix}.idx")


def run_gigatoken(corpus: Path, tokenizer: Path, prefix: Path, workers: int) -> None:
    """The whole file at once, and a writer without a Python loop."""
    import gigatoken
    import numpy as np

    encoded = gigatoken.Tokenizer(tokenizer / "tokenizer.json").encode_files(gigatoken.JsonlFileSource([corpus]))
    offsets, ids = np.asarray(encoded.layout.offsets.data), np.asarray(encoded.layout.content.data)
    lengths = np.diff(offsets) + 1
    ends = np.cumsum(lengths)
    tokens = np.empty(ids.size + lengths.size, dtype=np.uint16)
    is_text = np.ones(tokens.size, dtype=bool)
    is_text[ends - 1] = False
    tokens[is_text] = ids
    tokens[ends - 1] = 0
    tokens.tofile(f"{prefix}.bin")
    with open(f"{prefix}.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, lengths.size, lengths.size + 1))
        for array in (lengths.astype(np.int32), (ends - lengths) * 2, np.arange(lengths.size + 1)):
            array.tofile(file)


SIDES = {"ours": run_ours, "megatron": run_megatron, "gigatoken": run_gigatoken}


def import_all(side: str) -> None:
    """What a side imports: paid before the clock starts."""
    import numpy  # noqa: F401

    if side == "megatron":
        import torch  # noqa: F401
        import transformers  # noqa: F401
        from megatron.core.datasets import indexed_dataset  # noqa: F401
        from transformers import AutoTokenizer  # noqa: F401
    else:
        import awkward  # noqa: F401
        import gigatoken  # noqa: F401
        import rich  # noqa: F401
        import tokenizers  # noqa: F401

        import data_tools.shard  # noqa: F401


def run_side(side: str, arguments: Sequence[str]) -> None:
    """One side in this process: prints its CPU-seconds and the most memory that it and each of its workers held."""
    import resource

    corpus, tokenizer, prefix, workers = (*map(Path, arguments[:3]), int(arguments[3]))
    import_all(side)
    before = sum(os.times()[:4])
    SIDES[side](corpus, tokenizer, prefix, workers)
    seconds = sum(os.times()[:4]) - before
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own = int(status["VmHWM"].split()[0])  # not ru_maxrss: that begins with what the parent had when it started us
    workers_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps({"seconds": seconds, "rss_mb": own / 1e3, "worker_rss_mb": workers_kb / 1e3}))


def measure(side: str, corpus: Path, tokenizer: Path, workers: int) -> dict[str, float]:
    """One side in a fresh process, its shard beside the corpus."""
    prefix = corpus.with_name(f"{corpus.stem}_{side}")
    for end in (".bin", ".idx", ".meta.json"):
        prefix.with_name(prefix.name + end).unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.tokenise", "--side", side]
    command += [str(corpus), str(tokenizer), str(prefix), str(workers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    found["rate"] = corpus.stat().st_size / 1e6 / found["seconds"]
    return found


def check_same(corpus: Path, one: str, other: str) -> None:
    """Both sides wrote the same two files."""
    for end in (".bin", ".idx"):
        a, b = (corpus.with_name(f"{corpus.stem}_{side}{end}") for side in (one, other))
        assert filecmp.cmp(a, b, shallow=False), f"{a} and {b} differ"


def run(megabytes: float = 250, workers: int = 1, repetitions: int = 3, folder: str | None = None) -> list[Row]:
    """Both claims; raises if the bytes differ, or if memory is not bounded."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        whole, tenth = make_corpus(Path(name), megabytes)
        tokenizer = train_tokenizer(tenth, VOCAB_SIZE, Path(name, "tokenizer"), max_bytes_per_file=2e7)
        megatron = measure("megatron", tenth, tokenizer, 1)
        measure("ours", tenth, tokenizer, workers)
        check_same(tenth, "ours", "megatron")
        best: dict[str, dict[str, float]] = {}
        for _ in range(repetitions):
            for side in ("ours", "gigatoken"):
                found = measure(side, whole, tokenizer, workers)
                best[side] = max(found, best.get(side, found), key=lambda f: f["rate"])
        check_same(whole, "ours", "gigatoken")
    ours, peer = best["ours"], best["gigatoken"]
    memory = ours["rss_mb"] + workers * ours["worker_rss_mb"] * (workers > 1)
    assert memory < MAX_RSS_MB, f"{memory:.0f} MB of memory"
    return [
        rate_row("tokenize", ours["rate"], megatron["rate"], "MB/CPU-s"),
        rate_row("tokenize_fast", ours["rate"], peer["rate"], "MB/CPU-s"),
        Row("tokenize_fast_rss", memory, peer["rss_mb"], peer["rss_mb"] / memory, "MB held at most; less is better"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--megabytes", type=float, default=250, help="of JSON lines")
    parser.add_argument("--workers", type=int, default=1, help="processes of ours")
    parser.add_argument("--side", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        run_side(args.side[0], args.side[1:])
        return 0
    print_rows(run(args.megabytes, args.workers), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
