"""One corpus and two tokenizers trained on it, for the whole session."""

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
