"""Held-out losses: against a sum by hand, and the same whatever the micro-batch and the number of ranks."""

import math

import pytest
import torch

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.loader import EvalSet
from megatron_lite.evaluate import evaluate, flatten
from megatron_lite.mesh import Mesh
from megatron_lite.model import GPT
from megatron_lite.shape import resolve_shape
from megatron_lite.testing import run_distributed, tiny_config, write_tiny_shards

AUTOCAST = torch.autocast("cpu", torch.bfloat16, enabled=False)
ALL = 10**9


def model() -> GPT:
    config = tiny_config("unused")
    return GPT(resolve_shape(config.model, 16, 64), seed=5)


def score(folder: str, micro_batch: int, max_tokens: int = ALL) -> dict:
    sets = [EvalSet(d, (f"{folder}/valid_{d}",), 16, max_tokens, micro_batch) for d in "ab"]
    mesh = Mesh.from_env()
    results = evaluate(model(), sets, mesh, AUTOCAST)
    mesh.close()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("eval")
    write_tiny_shards(path)
    return str(path)


def test_loss_and_bits_per_byte_by_hand(folder):
    tokens = torch.from_numpy(IndexedDataset(f"{folder}/valid_a").tokens.astype("int64"))
    gpt, nats, count = model().double(), 0.0, 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):  # windows of 16, the last one short
            window = tokens[start : start + 17]
            nats += gpt(window[None, :-1], window[None, 1:]).sum().item()
            count += len(window) - 1
    result = score(folder, 4)["a"]
    assert result.tokens == count == len(tokens) - 1
    assert result.loss == pytest.approx(nats / count, rel=1e-6)
    assert result.bpb == pytest.approx(nats / count / math.log(2) / 3)  # the tiny shards say 3 bytes a token
    assert set(flatten({"a": result})) == {"valid/a/loss", "valid/a/bpb"}


def test_micro_batch_and_ranks_change_nothing(folder):
    expected = score(folder, 1)
    results = [score(folder, 3), *run_distributed(score, 2, folder, 2)]
    for result in results:
        for name, value in expected.items():
            assert result[name].tokens == value.tokens
            assert result[name].loss == pytest.approx(value.loss, rel=1e-6)


def test_max_tokens_takes_the_start(folder):
    assert score(folder, 4, max_tokens=64)["a"].tokens == 64


def test_the_model_comes_back_in_training_mode(folder):
    gpt = model().train()
    evaluate(gpt, [EvalSet("a", (f"{folder}/valid_a",), 16, 32, 2)], Mesh(0, 1, torch.device("cpu")), AUTOCAST)
    assert gpt.training
