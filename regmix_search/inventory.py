"""What a folder of shards holds: domains, tokens, validation sets, and a digest that changes with any of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.schema import nearest
from regmix_search.freshness import digest_of, listing

TRAIN, VALID = "train_", "valid_"


@dataclass(frozen=True)
class Shard:
    """One shard: its domain, its prefix without extension, and how much it holds."""

    domain: str
    prefix: Path
    tokens: int
    content: str  # hash of the tokens; without a sidecar, of the files' names, sizes and times
    bytes: int = 0  # of the text, by the sidecar; 0: not known


@dataclass(frozen=True)
class Inventory:
    """All shards of a folder, by domain name."""

    folder: Path
    train: dict[str, Shard]
    valid: dict[str, Shard]

    @property
    def contents(self) -> dict[str, dict[str, list[Any]]]:
        """{train_: {domain: [tokens, content]}, valid_: ...}: everything that a model could learn or be measured on."""
        both = {TRAIN: self.train, VALID: self.valid}
        return {kind: {d: [s.tokens, s.content] for d, s in held.items()} for kind, held in both.items()}

    @property
    def digest(self) -> str:
        """16 hex digits of the contents."""
        return digest_of(self.contents)

    @property
    def tokenizer(self) -> str:
        """Hash of the tokenizer that made the shards; empty when they have no sidecar."""
        from megatron_lite.data.sidecar import read_meta

        meta = read_meta(next(iter(self.train.values())).prefix)
        return meta.tokenizer_sha256 if meta else ""

    def usable(self, wanted: tuple[str, ...], seq_length: int) -> tuple[dict[str, int], list[str]]:
        """(tokens of the training domains that give at least one sample, names of those that do not).

        A domain in ``wanted`` that does not exist or is too small is a ValueError; by default the small are left out.
        """
        for name in wanted:
            if name not in self.train:
                raise ValueError(f"mixtures.domains: {self.folder} has no train_{name}.{nearest(name, self.train)}")
        tokens = {name: self.train[name].tokens for name in wanted or self.train}
        small = [name for name, count in tokens.items() if count <= seq_length]
        if wanted and small:
            raise ValueError(
                f"mixtures.domains: {', '.join(small)} hold fewer than {seq_length + 1} tokens, not one sample; "
                "take them out or add text"
            )
        kept = {name: count for name, count in tokens.items() if name not in small}
        if len(kept) < 2:
            raise ValueError(f"{self.folder}: a mixture needs two training domains, there are {len(kept)}")
        return kept, small

    def check_target(self, key: str, name: str) -> None:
        """ValueError unless there is a validation set of this name."""
        if name not in self.valid:
            raise ValueError(f"{key}={name}: {self.folder} has no valid_{name}.{nearest(name, self.valid)}")


def take_inventory(folder: Path) -> Inventory:
    """Reads the sidecars (without one: the index) of every shard in a folder. ValueError when there is none."""
    if not list(folder.glob(f"{TRAIN}*.idx")):
        raise ValueError(f"{folder}: no train_* shards; run `--stage shards` first, or set shards.data_dir")
    valid = _shards(folder, VALID)
    return Inventory(folder, _shards(folder, TRAIN), {d: s for d, s in valid.items() if s.tokens > 1})


def _shards(folder: Path, kind: str) -> dict[str, Shard]:
    found = {}
    for index in sorted(folder.glob(f"{kind}*.idx")):
        prefix = index.with_suffix("")
        domain = prefix.name.removeprefix(kind).removesuffix("_text_document")
        found[domain] = _shard(domain, prefix)
    return found


def _shard(domain: str, prefix: Path) -> Shard:
    from megatron_lite.data.sidecar import read_meta  # numpy: --help starts without it

    meta = read_meta(prefix)
    if meta is not None and meta.bin_xxh3:
        return Shard(domain, prefix, meta.num_tokens, meta.bin_xxh3, meta.num_bytes)
    from megatron_lite.data.indexed import IndexedDataset

    files = [prefix.with_name(prefix.name + end) for end in (".bin", ".idx")]
    known = meta.num_bytes if meta is not None else 0
    return Shard(domain, prefix, IndexedDataset(str(prefix)).num_tokens, digest_of(listing(files)), known)
