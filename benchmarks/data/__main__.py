"""Reading data against megatron-core's own classes, in one run on the same synthetic shards; then benchmarks.tokenise.

    python -m benchmarks.data [--json] [--only KEY,...] [--scale full|small] [--dir FOLDER]

Each figure is taken in a process of its own, in CPU seconds without imports, `cold` by the clock. `full` is what the
targets speak of: 100M documents, 5 GB of disk, 10 minutes. `small` has a fiftieth of the documents and takes a few
minutes; its ratios of what grows with the data are smaller. Needs the bench and fast extras (megatron-core, gigatoken).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tokenise
from benchmarks.data.cases import SEQ_LENGTH
from benchmarks.data.shards import Corpus, write_hollow
from benchmarks.table import Row, cost_row, pick_keys, print_rows, rate_row

BLENDS = {"blend_17": (17, 2_000_000), "blend_100": (100, 1_000_000), "blend_1000": (1000, 200_000)}
READS = {  # key: our sample order, masks
    "batch": ("documents", False),
    "batch_contiguous": ("contiguous", False),
    "masks": ("documents", True),
    "masks_contiguous": ("contiguous", True),
}
TEXT = ("tokenize", "tokenize_fast")  # measured together, by benchmarks.tokenise
KEYS = ("open_17", "open_1000", *BLENDS, *READS, "cold", "megatron_index", *TEXT)


class Bench:
    """The shards of one run, written when a row first needs them, and its measuring processes."""

    def __init__(self, folder: Path, scale: int) -> None:
        self.folder, self.scale = folder, scale
        self._written: Corpus | None = None

    def shards(self, corpus: Corpus) -> dict[str, Any]:
        """The corpus on disk; the one before makes room for it."""
        if corpus != self._written:
            if self._written:
                shutil.rmtree(self.folder / self._written.name)
            corpus.write(self.folder)
            self._written = corpus
        prefixes = corpus.prefixes(self.folder)
        weights = [1 / corpus.domains] * corpus.domains
        return {"prefixes": prefixes, "weights": weights, "samples": corpus.samples(self.folder, SEQ_LENGTH)}

    def read_shards(self) -> dict[str, Any]:
        """17 domains of documents of 500 tokens, 3.4 GB."""
        return self.shards(Corpus("read", 17, 200_000 // self.scale, 500))

    def measure(self, what: str, side: str, **case: Any) -> dict[str, float]:
        """One case of cases.py in a fresh process."""
        given = {"order": "documents", "masks": False, "cache": str(self.folder / "cache"), **case}
        command = [sys.executable, "-m", "benchmarks.data.cases", json.dumps({"what": what, "side": side, **given})]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{what} of {side} failed:\n{done.stderr[-4000:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def both(self, what: str, **case: Any) -> tuple[float, float]:
        """(ours, the peer's) for a case that measures one number."""
        ours, peer = (next(iter(self.measure(what, side, **case).values())) for side in ("ours", "peer"))
        return ours, peer

    def opening(self, key: str) -> list[Row]:
        """Opening, nothing cached; with what is allocated and left on disk. 1,000 domains also against its cache."""
        wide = key == "open_1000"
        domains, documents = (1000, 10_000) if wide else (17, 100_000_000 // 17)
        corpus = Corpus(key, domains, documents // self.scale, 500, hollow=True)
        case = self.shards(corpus)
        ours, peer = self.both("open_first", **case)
        rows = [cost_row(key, ours, peer, f"CPU-s, {corpus.domains} domains, {corpus.documents:,} documents each")]
        if wide:
            cached = self.measure("open_first", "peer", keep_cache=True, **case)["cpu_s"]
            rows.append(
                cost_row(f"{key}_cached", ours, cached, "CPU-s, the peer with its cache from before, ours none")
            )
        aux = sum(entry.stat().st_size for entry in os.scandir(self.folder / "cache"))
        sidecars = sum(os.path.getsize(prefix + ".meta.json") for prefix in case["prefixes"])
        memory = self.both("open_memory", **case)
        rows.append(cost_row(f"{key}_memory", memory[0] / 1e6, memory[1] / 1e6, "MB allocated at the peak"))
        rows.append(cost_row(f"{key}_disk", sidecars / 1e6, aux / 1e6, "MB on disk: sidecars, the peer's index cache"))
        return rows

    def blending(self, key: str) -> list[Row]:
        """The blend's schedule."""
        k, samples = BLENDS[key]
        weights = [1 / (i + 1) for i in range(k)]
        ours, peer = self.both("blend", weights=weights, samples=samples)
        return [cost_row(key, 1e9 * ours, 1e9 * peer, f"CPU-ns a sample, {k} domains")]

    def reading(self, key: str) -> list[Row]:
        """Batches from a warm page cache."""
        order, masks = READS[key]
        ours, peer = self.both("warm_batches", **self.read_shards(), order=order, masks=masks, batches=30)
        extra = "positions, loss mask (ours: 32 bits, cu_seqlens)" if masks else "tokens, labels (ours: 32 bits)"
        return [cost_row(key, 1e6 * ours, 1e6 * peer, f"CPU-us a sample of {SEQ_LENGTH + 1}: {extra}")]

    def cold(self, key: str) -> list[Row]:
        """Batches with nothing in the page cache; the peer reads documents in its order, ours is contiguous."""
        case = self.read_shards()
        ours = self.measure("cold_batches", "ours", **case, order="contiguous", batches=32)["per_s"]
        peer = self.measure("cold_batches", "peer", **case, batches=8)["per_s"]
        return [rate_row(key, ours, peer, "samples/s by the clock")]

    def megatron_index(self, key: str) -> list[Row]:
        """Megatron's three indices over one shard; a difference in one entry is an error."""
        prefix, documents = str(self.folder / "hollow" / "train_d0"), 100_000_000 // self.scale
        write_hollow(prefix, documents, 500, sidecar=False)
        case = {"prefixes": [prefix], "samples": documents * 200 // SEQ_LENGTH}  # less than an epoch: one
        peer = self.measure("megatron_index", "peer", **case)["cpu_s"]
        ours = self.measure("megatron_index", "ours", **case, keep_cache=True)["cpu_s"]
        shutil.rmtree(self.folder / "hollow")
        return [cost_row(key, ours, peer, f"CPU-s, {documents:,} documents, equal arrays")]

    def rows(self, key: str) -> list[Row]:
        """The row of that name, and those that go with it."""
        of: dict[str, Callable[[str], list[Row]]] = {"cold": self.cold, "megatron_index": self.megatron_index}
        of |= dict.fromkeys(BLENDS, self.blending) | dict.fromkeys(READS, self.reading)
        of |= dict.fromkeys(("open_17", "open_1000"), self.opening)
        return of[key](key)


def run(keys: Sequence[str] = KEYS, scale: str = "full", folder: str | None = None) -> list[Row]:
    """These rows; the shards go to a temporary folder inside `folder` and are removed."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-data-", dir=folder) as room:
        bench = Bench(Path(room), 50 if scale == "small" else 1)
        for key in [key for key in keys if key not in TEXT]:
            found = bench.rows(key)
            for row in found:  # at once: what is measured is not lost if a later row fails
                print(f"{row.key}: {row.ours:.4g} against {row.peer:.4g} {row.unit}", file=sys.stderr, flush=True)
            rows += found
    if text := set(keys) & set(TEXT):
        found = tokenise.run(250 if scale == "full" else 50, folder=folder)
        rows += [row for row in found if row.key.removesuffix("_rss") in text]
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--only", default=",".join(KEYS), help="rows to measure, with commas between")
    parser.add_argument("--scale", choices=("full", "small"), default="full", help="full: 100M documents")
    parser.add_argument("--dir", help="where the shards are written (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    keys = pick_keys(parser, args.only, KEYS)
    print_rows(run(keys, args.scale, args.dir), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
