"""Document masks: what one document says changes no bit of another, and a packed row is its documents one by one."""

import itertools

import pytest
import torch

from megatron_lite.attention import Documents
from megatron_lite.config import ModelConfig
from megatron_lite.model import GPT
from megatron_lite.shape import resolve_shape
from megatron_lite.testing import tiny_config, write_tiny_shards
from megatron_lite.train import train

SIZES = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=48)
MODEL = GPT(resolve_shape(SIZES, 24, 61))
TOKENS = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(0))
STARTS = [0, 7, 8, 20, 24, 41, 48]  # in the flattened two rows; 24 is where the second begins
PLACES = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(STARTS)]).view(2, 24)
DOCUMENTS = Documents(PLACES, torch.tensor(STARTS, dtype=torch.int32))


@torch.no_grad()
def hidden(tokens: torch.Tensor, documents: Documents) -> torch.Tensor:
    return MODEL.hidden(tokens, documents).flatten(0, 1)


@pytest.mark.parametrize("number", range(6))
def test_a_document_leaks_into_no_other(number):
    start, end = STARTS[number : number + 2]
    changed = TOKENS.clone().flatten()
    changed[start:end] = (changed[start:end] + 1) % 61
    before, after = hidden(TOKENS, DOCUMENTS), hidden(changed.view(2, 24), DOCUMENTS)
    same = (before == after).all(dim=1)
    assert same[:start].all() and same[end:].all() and not same[start:end].any()


@pytest.mark.parametrize("number", range(6))
def test_a_packed_document_is_the_document_alone(number):
    start, end = STARTS[number : number + 2]
    alone = hidden(TOKENS.flatten()[None, start:end], Documents())
    torch.testing.assert_close(hidden(TOKENS, DOCUMENTS)[start:end], alone, rtol=1e-5, atol=1e-5)


def test_a_token_changes_nothing_before_it():
    changed = TOKENS.clone()
    changed[:, 11] = (changed[:, 11] + 1) % 61
    before, after = (hidden(tokens, Documents()).view(2, 24, -1) for tokens in (TOKENS, changed))
    assert torch.equal(before[:, :11], after[:, :11]) and not torch.equal(before[:, 11:], after[:, 11:])


@pytest.mark.parametrize("key", ["reset_position_ids", "reset_attention_mask", "eod_mask_loss"])
def test_each_document_option_reaches_training_and_validation(tmp_path, key):
    mixture = write_tiny_shards(tmp_path / "shards")
    plain = train(tiny_config(tmp_path / "plain"), mixture)
    marked = train(tiny_config(tmp_path / "marked", f"data.{key}=true"), mixture)
    assert all(marked.losses[name] != plain.losses[name] for name in plain.losses)
    untrained = [f"data.{key}={value}" for value in ("false", "true")]
    at_start = [train(tiny_config(tmp_path / v[-4:], v, "optim.lr=0", "schedule.min_lr=0"), mixture) for v in untrained]
    assert at_start[0].losses != at_start[1].losses, "validation sees the option as training does"
