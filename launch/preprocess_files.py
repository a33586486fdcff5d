"""Runs data_tools/preprocess_data.py over many files, one task a file, on this machine, on Slurm or on Ray.

    python launch/preprocess_files.py --input 'web/*.jsonl.zst' --output-dir shards/web --tokenizer-model tok/
    python launch/preprocess_files.py --input 'web/*.jsonl.zst' --output-dir shards/web --tokenizer-model tok/ \\
        --set executor=slurm --set workers=64 --set slurm.partition=cpu --merge shards/train_web

Each file becomes a shard; a mixture.yaml may name several of them for one domain (`paths:`), or --merge joins them in
the order of the files. --set takes the keys of a search's `proxies`. All other arguments are preprocess_data.py's. The
same command again makes what is missing: a shard that is there already, of the same file and settings, is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # so that `python launch/preprocess_files.py` works from a clone without installing
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_tools.merge_data import merge
from data_tools.preprocess_data import list_shards, make_shards
from megatron_lite.config import load_config
from megatron_lite.files import atomic_write_json
from regmix_search.config import ProxiesConfig
from regmix_search.drivers import Driver
from regmix_search.executors import Executor
from regmix_search.executors.task import run_task
from regmix_search.ledger import Trial
from regmix_search.proxies import build_executor


@dataclass(frozen=True)
class FilePreprocessing:
    """Makes the shards of one file: the one whose number in ``files`` is the trial's index."""

    files: tuple[str, ...]
    arguments: tuple[str, ...]  # of preprocess_data.py, without --input

    def __call__(self, trial: Trial) -> dict[str, Any]:
        """Raises ValueError for what the user can mend."""
        # the files are what runs side by side: a worker of the pool may not start processes of its own
        done = list(
            make_shards([*self.arguments, "--workers=1", "--log-interval=0", "--input", self.files[trial.index]])
        )
        return {"tokens": sum(meta.num_tokens for meta, _ in done), "said": [said for _, said in done]}

    def save(self, folder: Path) -> None:
        """Writes it into a folder, for a process on another machine."""
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_json(folder / "files.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> FilePreprocessing:
        """What ``save`` wrote."""
        facts = json.loads((folder / "files.json").read_text(encoding="utf-8"))
        return cls(tuple(facts["files"]), tuple(facts["arguments"]))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--input", nargs="+", required=True, help="files, globs or folders, as preprocess_data.py has it"
    )
    parser.add_argument("--output-dir", required=True, help="for the shards; all machines see it")
    parser.add_argument("--merge", metavar="PREFIX", help="then join the shards into this one")
    parser.add_argument("--set", action="append", default=[], metavar="A=B", help="a key of proxies; repeatable")
    args, rest = parser.parse_known_args(argv)
    arguments = (*rest, "--output-dir", os.path.abspath(args.output_dir))
    try:
        config = load_config(ProxiesConfig, None, args.set)
        shards = list_shards([*arguments, "--input", *args.input])
        if args.merge and len(shards[0][1]) > 1:
            raise ValueError("--merge joins the shards of one key, --json-keys names several: merge them one by one")
        function = FilePreprocessing(tuple(os.path.abspath(file) for files, _ in shards for file in files), arguments)
        folder = Path(args.output_dir) / "preprocessing"
        with Driver(folder / "drivers") as driver:
            module = "launch.preprocess_files"
            executor = build_executor(function, config, config.workers, 1, folder, driver.path, module, on_gpus=False)
            failed = run_files(executor, function.files, config.retries)
        if failed:
            raise ValueError(f"{len(failed)} of {len(shards)} files failed: {'; '.join(failed.values())}")
        if args.merge:
            merge([prefix for _, prefixes in shards for prefix in prefixes], args.merge)
            print(f"{args.merge}: {len(shards)} shards merged")
    except ValueError as error:
        print(f"preprocess_files: error: {error}", file=sys.stderr)
        return 1
    return 0


def run_files(executor: Executor, files: Sequence[str], retries: int) -> dict[str, str]:
    """Runs a task for each file, a line for each that ends; file -> reason of those that failed for good."""
    waiting = [Trial(index, "train", {}, 0) for index in range(len(files))]
    tries, failed, left = Counter[int](), dict[str, str](), len(files)
    with closing(executor):
        while left:
            while waiting and executor.free() > 0:
                executor.submit(waiting.pop(0))
            for outcome in executor.wait(0.5):
                index = outcome.trial.index
                tries[index] += 1
                if outcome.result is None and outcome.retry and tries[index] <= retries:
                    print(f"{files[index]}: {outcome.reason}; it will be tried again", flush=True)
                    waiting.append(outcome.trial)
                    continue
                left -= 1
                if outcome.result is None:
                    failed[files[index]] = outcome.reason
                print(*(outcome.result["said"] if outcome.result else [f"{files[index]}: {outcome.reason}"]), sep="\n")
    return failed


if __name__ == "__main__":
    if len(sys.argv) == 4 and not sys.argv[1].startswith("-"):  # as a task of a job array: FOLDER BATCH NUMBER
        sys.exit(run_task(FilePreprocessing.load(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])))
    sys.exit(main())
