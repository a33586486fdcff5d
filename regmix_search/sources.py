"""The first stages of a search, from nothing to tokenized shards: corpus, tokenizer, shards."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from regmix_search.freshness import Stage, digest, listing
from regmix_search.inventory import TRAIN, VALID
from regmix_search.search import Search


def corpus(search: Search) -> Stage | None:
    """Text by domain; None when the user brings shards or JSONL."""
    config = search.config.corpus
    if search.config.shards.data_dir or config.kind == "none":
        return None
    folder = search.corpus_dir

    def make() -> str:
        from data_tools.corpus_manifest import compare_with_reference
        from data_tools.local_corpus import build_corpus

        manifest = build_corpus(
            folder,
            dists=list(config.dists) or None,
            max_tokens_per_domain=config.max_tokens_per_domain,
            workers=search.workers(config.workers),
            log=search.say,
        )
        search.say(compare_with_reference(manifest))
        files = len(_jsonl(folder, TRAIN))
        return f"{files} domains from {len(manifest['settings']['dists'])} packages, see {folder / 'SOURCES.md'}"

    from data_tools.corpus_manifest import FORMAT

    inputs = {"dists": config.dists, "max_tokens_per_domain": config.max_tokens_per_domain, "format": FORMAT}
    return Stage("corpus", inputs, (folder / "MANIFEST.json", folder / "SOURCES.md"), make)


def tokenizer(search: Search) -> Stage | None:
    """A tokenizer trained on the training text; None when the user brings shards."""
    config, folder = search.config.tokenizer, search.out / "tokenizer"
    if search.config.shards.data_dir:
        return None
    texts = _jsonl(search.corpus_dir, TRAIN)

    def make() -> str:
        from data_tools.train_tokenizer import train_tokenizer

        train_tokenizer(texts, config.vocab_size, folder, config.type, json_key=search.config.shards.json_key)
        return f"{config.vocab_size:,} tokens ({config.type})"

    inputs = {**dataclasses.asdict(config), "json_key": search.config.shards.json_key, "corpus": listing(texts)}
    model = "tokenizer.json" if config.type == "hf" else "tokenizer.model"
    return Stage("tokenizer", inputs, (folder / model,), make)


def shards(search: Search) -> Stage | None:
    """Megatron shards of the domains that are mixed, thinned to ``shards.fraction``, and of what they are scored on.

    With ``mixtures.domains``, the other training domains are left out, and so are their validation sets; domains that
    only exist for validation are always in. None when the user brings shards.
    """
    config, folder = search.config.shards, search.out / "shards"
    if config.data_dir:
        return None
    training = {_stem(text).removeprefix(TRAIN): text for text in _jsonl(search.corpus_dir, TRAIN)}
    unmixed = training.keys() - search.config.mixtures.domains if search.config.mixtures.domains else set()
    texts = [text for domain, text in training.items() if domain not in unmixed]
    texts += [text for text in _jsonl(search.corpus_dir, VALID) if _stem(text).removeprefix(VALID) not in unmixed]

    def make() -> str:
        from data_tools.preprocess_data import preprocess

        folder.mkdir(parents=True, exist_ok=True)
        tokens = 0
        for text in texts:
            name = _stem(text)
            training = name.startswith(TRAIN)
            meta = preprocess(
                text,
                folder / name,
                search.out / "tokenizer",
                json_key=config.json_key,
                workers=search.workers(config.workers),
                fraction=config.fraction if training else 1.0,
                exact_prefix=True,
            )
            tokens += meta.num_tokens if training else 0
        return f"{tokens:,} training tokens in {folder}"

    inputs = {
        "corpus": listing(texts),
        "tokenizer": digest(search.out / "stages/tokenizer.json", "tokenizer"),
        "fraction": config.fraction,
        "json_key": config.json_key,
    }
    outputs = tuple(folder / f"{_stem(text)}{end}" for text in texts for end in (".bin", ".idx", ".meta.json"))
    return Stage("shards", inputs, outputs, make)


def _jsonl(folder: Path, prefix: str) -> list[Path]:
    """The text files of a folder with this prefix, plain or compressed. ValueError when there is none to train on."""
    found = [p for p in sorted(folder.glob(f"{prefix}*")) if _stem(p) != p.name]
    if prefix == TRAIN and not found:
        raise ValueError(f"{folder}: no train_<domain>.jsonl; run `--stage corpus` first, or set corpus.dir")
    return found


def _stem(path: Path) -> str:
    """The name without .jsonl, .jsonl.gz, .jsonl.zst, .json, .json.gz, .parquet; the name itself for other files."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    for end in (".jsonl", ".json", ".parquet"):
        if name.endswith(end):
            return name.removesuffix(end)
    return path.name
