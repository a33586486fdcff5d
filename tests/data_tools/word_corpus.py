"""Texts made of a few words: small enough to read, odd enough to break a tokenizer."""

import json
import random
from pathlib import Path

WORDS = [
    *("the", "of", "model", "shard", "token", "mixture", "weight", "domain", "proxy", "loss", "def", "return", "0.125"),
    *("x_BTD", "+=", "//", "\t", "\n\n", "Gr\u00f6\u00dfe", "\u6f22\u5b57"),
]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 5 to 200 words, lines and tabs and non-ASCII included."""
    rng = random.Random(seed)
    return [f"{i}. " + " ".join(rng.choices(WORDS, k=rng.randint(5, 200))) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """One object a line, as Megatron and RegMix expect."""
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path
