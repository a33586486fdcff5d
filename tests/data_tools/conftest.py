"""One corpus and two tokenizers trained on it, for the whole session."""

import base64
import json
from pathlib import Path

import pytest
from word_corpus import make_texts, write_jsonl

from data_tools.train_tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "train_words.jsonl", make_texts(300))


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return train_tokenizer(corpus, 400, tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def sp(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return train_tokenizer(corpus, 400, tmp_path_factory.mktemp("sp"), kind="sentencepiece")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory, hf: Path) -> Path:
    """vocab.json and merges.txt, as GPT-2 and Megatron have them, of the tokenizer `hf`."""
    folder, model = tmp_path_factory.mktemp("gpt2"), json.loads((hf / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in model["merges"]))
    return folder


@pytest.fixture(scope="session")
def tiktoken(tmp_path_factory: pytest.TempPathFactory, hf: Path) -> Path:
    """A .tiktoken file with the merges of `hf`: 256 bytes, then its merges in their order."""
    from tokenizers.pre_tokenizers import ByteLevel

    pytest.importorskip("tiktoken")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's map from bytes to characters
    others = [byte for byte in range(256) if byte not in printable]
    of_char = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    assert set(of_char) == set(ByteLevel.alphabet())
    merges = json.loads((hf / "tokenizer.json").read_text())["model"]["merges"]
    tokens = [bytes([i]) for i in range(256)] + [bytes(of_char[c] for c in a + b) for a, b in merges]
    path = tmp_path_factory.mktemp("tiktoken") / "cl100k_base.tiktoken"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(dict.fromkeys(tokens))))
    return path
