"""One search under way: its config, its folders, and where its messages go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from regmix_search.config import SearchConfig
from regmix_search.inventory import Inventory, take_inventory
from regmix_search.machine import cores


@dataclass(frozen=True)
class Search:
    """One search under way: its config, and where its messages go."""

    config: SearchConfig
    stream: TextIO

    def say(self, text: str) -> None:
        """Prints a line at once."""
        print(text, file=self.stream, flush=True)

    @property
    def out(self) -> Path:
        """The search's folder."""
        return self.config.run_dir

    @property
    def shards_dir(self) -> Path:
        """Where the shards are: the user's folder or the search's own."""
        return Path(self.config.shards.data_dir or self.out / "shards")

    @property
    def corpus_dir(self) -> Path:
        """Where the JSONL files are: the user's folder or the search's own."""
        corpus = self.config.corpus
        return Path(corpus.dir) if corpus.kind == "none" and corpus.dir else self.out / "corpus"

    @property
    def inventory(self) -> Inventory:
        """What the shards hold now."""
        return take_inventory(self.shards_dir)

    @property
    def sample_tokens(self) -> int:
        """Tokens that a domain needs to give one sample to proxies and main run alike."""
        main = self.config.train.main.data.seq_length if self.config.train.enabled else 0
        return max(self.config.proxy.data.seq_length, main)

    def goal_losses(self, inventory: Inventory) -> list[str]:
        """The validation losses that fit.target is made of; ValueError for those that are not there.

        Several are one goal of the proxies; what follows the optimum compares models on one loss, and is left out.
        """
        target, test = self.config.fit.target, self.config.fit.target_test
        if target in inventory.valid or not ("=" in target or target in ("mean", "worst")):
            inventory.check_target("fit.target", target)
            return [target]
        from regmix_search.goals import parse_goal  # numpy: --help starts without it

        names = list(parse_goal(target, [name for name in inventory.valid if name != test]).shares)
        if len(names) > 1 and self.config.train.enabled:
            raise ValueError(
                f"fit.target={target}: models are compared on one loss; set train.enabled=false and stop before them"
            )
        return names

    def workers(self, wanted: int, threads: int = 1) -> int:
        """A number of processes of so many threads; 0 is as many as fill the cores that this process may use."""
        return wanted or max(1, cores() // threads)
