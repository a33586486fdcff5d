"""launch/evaluate.py: RegMix's tasks by their names, a local task through the real harness, its tokens and ours."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
import yaml

from data_tools.local_task import main as local_task
from data_tools.tokenizer import load_tokenizer
from data_tools.train_tokenizer import train_tokenizer
from launch.evaluate import main
from launch.harness import METRICS, TASKS, Harness, open_tasks
from megatron_lite.checkpoint import save_checkpoint
from megatron_lite.config import ModelConfig
from megatron_lite.model import GPT
from megatron_lite.shape import resolve_shape

lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'megatron_lite[eval]'")
pytest.importorskip("transformers", reason="needs transformers, which lm_eval runs")

VOCAB, T = 300, 128


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Text of two domains, tasks made of it, a tokenizer."""
    folder, rng = tmp_path_factory.mktemp("evaluate"), random.Random(0)
    for domain in ("wiki", "code"):
        words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(100)]
        texts = [" ".join(rng.choices(words, k=120)) for _ in range(40)]
        (folder / f"valid_{domain}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    train_tokenizer([folder / "valid_wiki.jsonl"], VOCAB, folder / "tokenizer", "hf")
    sizes = ["--items", "20", "--context-chars", "60", "--piece-chars", "20"]
    assert local_task(["--input", str(folder / "valid_*.jsonl"), "--out", str(folder / "tasks"), *sizes]) == 0
    return folder


def checkpoint(files: Path, name: str, seed: int) -> Path:
    """A run folder with one checkpoint of a model that has opinions."""
    config = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=48)
    model, tokenizer = GPT(resolve_shape(config, T, VOCAB), seed=seed), load_tokenizer(files / "tokenizer")
    tensors = {n: p.detach() * (4.0 if p.dim() > 1 else 1.0) for n, p in model.named_parameters()}
    facts = {"vocab_size": VOCAB, "eod_id": tokenizer.eod_id, "tokenizer_sha256": tokenizer.sha256}
    state = {"plan": {"shape": dataclasses.asdict(model.shape)}, "tokenizer": facts}
    save_checkpoint(files / name, 1, tensors, {}, state, keep=1)
    return files / name
