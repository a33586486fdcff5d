"""Real text of clearly different domains, from the Python packages that are installed anyway.

    python -m data_tools.local_corpus --out DIR

writes DIR/train_<domain>.jsonl and DIR/valid_<domain>.jsonl for ten domains, and two that are only ever held out:
valid_readme.jsonl (the search's target), valid_readme_test.jsonl (its other half, for the last measurement only) and
valid_messages.jsonl. MANIFEST.json (written last) names every document's file and its sha256, SOURCES.md the licences.
A second run with the same settings and packages does nothing. The bytes do not depend on the number of workers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

if __package__ in (None, ""):  # run as a file: the repository root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_tools.corpus_extract import extract
from data_tools.corpus_filter import Document, keep_unique, line_hashes
from data_tools.corpus_leaks import remove_leaks
from data_tools.corpus_manifest import compare_with_reference, finished, summary_table, write_corpus, write_reference
from data_tools.corpus_pieces import in_pieces
from data_tools.corpus_sources import (
    ALLOWED_DISTS,
    Skipped,
    Source,
    canonical_name,
    dist_license,
    find_distributions,
    list_sources,
    read_verified,
)
from data_tools.encoding import start_worker

TRAIN_DOMAINS = ("python", "tests", "cpp", "comments", "prose", "tables", "apiref", "typed", "repl", "math")
TARGETS = ("readme", "messages")
# Bytes per token of an 8,192-token BPE trained on this corpus: the caps are in tokens, and there is no tokenizer yet.
BYTES_PER_TOKEN = {
    "python": 3.39,
    "tests": 2.97,
    "cpp": 3.09,
    "comments": 3.50,
    "prose": 3.62,
    "tables": 2.11,
    "apiref": 3.79,
    "typed": 3.12,
    "repl": 2.42,
    "math": 3.05,
    "readme": 3.12,
    "messages": 3.75,
}
VALID_SHARE = 0.06  # of all files, by hash of the path; whatever is extracted from such a file is held out
MESSAGE_SHARE = 0.25  # files below this position give messages, and their code never trains
VALID_BYTES = 300_000  # of text in each validation set
# Bytes of code that a byte of a source file gives (measured: 0.66, 0.97), rounded down for copies that will be dropped.
CODE_SHARE = {"python": 0.5, "tests": 0.85}
CHUNK_BYTES = 3_000_000
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Work:
    """One file to read: its place in the list of sources, and the domains that it is read for."""

    index: int
    source: Source
    split: str
    domains: frozenset[str]


def splits_of(sources: Sequence[Source]) -> list[str]:
    """train or valid for each file, by the hash of its path alone; readmes are valid and test, in turn by hash."""
    splits = ["valid" if source.position < VALID_SHARE else "train" for source in sources]
    readmes = sorted((source.order, i) for i, source in enumerate(sources) if source.kind == "readme")
    for turn, (_, i) in enumerate(readmes):
        splits[i] = ("valid", "test")[turn % 2]
    return splits


def plan_work(sources: Sequence[Source], max_bytes: dict[str, int], valid_bytes: int) -> list[Work]:
    """Which files to read and what for, decided before any is opened, from paths, hashes and RECORD sizes alone.

    Code that a full domain cannot take is not read for that domain: files are counted in the order of their hashes.
    """
    used: dict[tuple[str, str], float] = {}
    work = []
    splits = splits_of(sources)
    for index, source in sorted(enumerate(sources), key=lambda pair: pair[1].order):
        split = splits[index]
        domains = {"python": {"comments", "prose", "apiref", "repl", "math"}, "cpp": {"cpp", "comments"}}.get(
            source.kind, set[str]()
        )
        if source.kind == "python" and source.position < MESSAGE_SHARE:
            domains |= {"messages"}
        if source.kind in CODE_SHARE:
            budget = max_bytes[source.kind] if split == "train" else 4 * valid_bytes
            taken = used.get((source.kind, split), 0.0)
            trains = source.kind == "tests" or source.position >= MESSAGE_SHARE
            if taken < budget and (split != "train" or trains):
                domains |= {source.kind}
                used[source.kind, split] = taken + source.size * CODE_SHARE[source.kind]
        elif source.kind != "cpp":
            domains |= {source.kind}
        if domains:
            work.append(Work(index, source, split, frozenset(domains)))
    return work


def extract_chunk(chunk: Sequence[Work]) -> tuple[list[Document], list[Skipped]]:
    """The documents of some files. Runs in a worker."""
    documents, skipped = [], []
    for work in chunk:
        data = read_verified(work.source)
        if isinstance(data, Skipped):
            skipped.append(data)
            continue
        found = extract(work.source.kind, work.source.path, data, "messages" in work.domains)
        for domain in sorted(found.keys() & work.domains):
            split = "valid" if domain == "messages" else work.split
            text = found[domain]
            documents.append(Document(domain, split, work.index, work.source.order, text, line_hashes(text)))
    return documents, skipped


def chunks_of(items: Sequence[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Runs of `items` of about CHUNK_BYTES each."""
    chunk: list[T] = []
    total = 0
    for item in items:
        chunk.append(item)
        total += size(item)
        if total >= CHUNK_BYTES:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(workers: int, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`[function(item) for item in items]`, spread over `workers` processes."""
    if workers <= 1 or len(items) <= 1:
        return [function(item) for item in items]
    with ProcessPoolExecutor(min(workers, len(items)), initializer=start_worker) as pool:
        return list(pool.map(function, items))


def harvest(work: Sequence[Work], workers: int) -> tuple[dict[str, list[Document]], list[Skipped]]:
    """Every document of `work` by domain, and the files that were not what RECORD promises."""
    found: dict[str, list[Document]] = {domain: [] for domain in (*TRAIN_DOMAINS, *TARGETS)}
    skipped: list[Skipped] = []
    for documents, bad in in_order(workers, extract_chunk, list(chunks_of(work, lambda w: w.source.size + 1000))):
        skipped += bad
        for document in documents:
            found[document.domain].append(document)
    return found, skipped


def refine(
    found: dict[str, list[Document]], max_bytes: dict[str, int], valid_bytes: int, workers: int
) -> tuple[dict[str, list[Document]], dict[str, Any]]:
    """The pieces that stay, by domain, and counts of what went: copies, what is over the cap, leaks."""
    kept, removed = {}, dict[str, Any]()
    for domain, documents in found.items():
        room = {"train": max_bytes.get(domain, 0), "valid": valid_bytes, "test": valid_bytes}
        kept[domain], removed[domain] = keep_unique(documents, room)
    kept, leaks = remove_leaks(kept, partial(in_order, workers))
    return {domain: in_pieces(some) for domain, some in kept.items()}, {"copies": removed, "leaks": leaks}


def build_corpus(
    out_dir: str | Path,
    dists: Sequence[str] | None = None,
    max_tokens_per_domain: float = 8e6,
    max_bytes: int | None = None,
    valid_bytes: int = VALID_BYTES,
    workers: int | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Build the corpus in `out_dir` and return its manifest; nothing is done if it is there already.

    dists: names out of ALLOWED_DISTS, None for all that are installed. max_bytes caps each training domain in bytes and
    overrides max_tokens_per_domain, which is turned into bytes with BYTES_PER_TOKEN. workers: None for all cores.
    ValueError: a name that is not on the allow-list, a cap that is not positive, or nothing of the list is installed.
    """
    if max_tokens_per_domain <= 0 or valid_bytes <= 0 or (max_bytes is not None and max_bytes <= 0):
        raise ValueError("max_tokens_per_domain, max_bytes and valid_bytes must be positive")
    start = time.perf_counter()
    out = Path(out_dir)
    workers = workers or available_cores()
    caps = {d: max_bytes or int(max_tokens_per_domain * BYTES_PER_TOKEN[d]) for d in TRAIN_DOMAINS}
    installed, absent = find_distributions(list(dists if dists is not None else ALLOWED_DISTS))
    if not installed:
        raise ValueError(f"dists: none of {', '.join(s.package for s in absent)} is installed; install one first")
    listed = {canonical_name(meta["Name"]): (meta["Version"], dist) for dist in installed for meta in [dist.metadata]}
    settings = {"dists": {n: v for n, (v, _) in listed.items()}, "max_bytes": caps, "valid_bytes": valid_bytes}
    if (manifest := finished(out, settings)) is not None:
        log(f"corpus: {out} is complete, nothing to do")
        return manifest
    pairs = [list_sources(dist) for dist in installed]
    sources = [source for some, _ in pairs for source in some]
    work = plan_work(sources, caps, valid_bytes)
    log(f"corpus: reading {len(work):,} files of {len(installed)} packages in {workers} processes")
    found, bad = harvest(work, workers)
    log(f"corpus: {sum(map(len, found.values())):,} documents after {time.perf_counter() - start:.0f} s")
    kept, removed = refine(found, caps, valid_bytes, workers)
    log(f"corpus: copies and leaks removed after {time.perf_counter() - start:.0f} s")
    skipped = [*absent, *(s for _, some in pairs for s in some), *bad]
    return write_corpus(
        out, settings, sources, kept, skipped, removed, {n: dist_license(d) for n, (_, d) in listed.items()}
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="local_corpus", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", required=True, type=Path, help="folder for the .jsonl files, MANIFEST.json, SOURCES.md"
    )
    parser.add_argument("--dists", help="comma-separated packages (default: the whole allow-list)")
    parser.add_argument(
        "--max-tokens-per-domain", type=float, default=8e6, help="cap of a training domain (default 8e6)"
    )
    parser.add_argument("--max-bytes", type=int, help="the same cap in bytes; overrides the one in tokens")
    parser.add_argument("--valid-bytes", type=int, default=VALID_BYTES, help="cap of a validation set, in bytes")
    parser.add_argument("--workers", type=int, help="processes (default: all cores); the result does not depend on it")
    parser.add_argument("--write-reference", action="store_true", help="store the fingerprints as the new reference")
    args = parser.parse_args(argv)
    dists = [name for name in args.dists.split(",") if name] if args.dists else None
    try:
        manifest = build_corpus(
            args.out, dists, args.max_tokens_per_domain, args.max_bytes, args.valid_bytes, args.workers
        )
    except ValueError as error:
        print(f"local_corpus: {error}", file=sys.stderr)
        return 2
    if args.write_reference:
        write_reference(manifest)
    print(summary_table(manifest, BYTES_PER_TOKEN))
    print(compare_with_reference(manifest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
