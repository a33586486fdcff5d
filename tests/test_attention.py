"""Document masks: what one document says changes no bit of another, and a packed row is its documents one by one."""

import dataclasses
import itertools
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import megatron_lite.model as model_module
from megatron_lite.attention import Documents, causal_attention, choose_attention, packed, varlen_kernel
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


def rotate(x_BHTK: torch.Tensor, places_BT: torch.Tensor) -> torch.Tensor:
    """Rotary positions by complex numbers, one a pair (i, i + K/2)."""
    half = x_BHTK.shape[-1] // 2
    angle = places_BT[:, None, :, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x_BHTK[..., :half], x_BHTK[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


def eager(q_BHTK, k_BGTK, v_BGTK, mask_BTT):
    """The whole square of scores, and a mask written out."""
    k, v = (x.repeat_interleave(q_BHTK.shape[1] // x.shape[1], dim=1) for x in (k_BGTK, v_BGTK))
    scores = (q_BHTK @ k.mT / q_BHTK.shape[-1] ** 0.5).masked_fill(~mask_BTT[:, None], -torch.inf)
    return scores.softmax(-1) @ v


def hidden_and_gradients(model: GPT, documents: Documents) -> list[torch.Tensor]:
    out = model.hidden(TOKENS, documents)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), [p for n, p in model.named_parameters() if n[0] != "h"])]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("placed", [False, True])
def test_hidden_states_and_gradients_are_those_of_eager_attention(monkeypatch, masked, placed):
    """Rotary angles know distances alone: behind a document mask, places that are not reset change nothing."""
    model = GPT(MODEL.shape).double()
    documents = Documents(DOCUMENTS.position_ids_BT if placed else None, DOCUMENTS.cu_seqlens if masked else None)
    ours = hidden_and_gradients(model, documents)
    places = PLACES if placed else torch.arange(24).expand(2, 24)
    number = torch.bucketize(torch.arange(48), torch.tensor(STARTS), right=True).view(2, 24)
    mask = torch.ones(24, 24, dtype=torch.bool).tril() & ((number[:, :, None] == number[:, None]) | (not masked))
    monkeypatch.setattr(model_module, "apply_rope", lambda x, *_: rotate(x, places))
    monkeypatch.setattr(model_module, "causal_attention", lambda q, k, v, _: eager(q, k, v, mask))
    for a, b in zip(ours, hidden_and_gradients(model, documents), strict=True):
        assert (a - b).norm() <= 1e-7 * b.norm()  # the model's angles are rounded to fp32 once


@pytest.mark.parametrize("key", ["reset_position_ids", "reset_attention_mask", "eod_mask_loss"])
def test_each_document_option_reaches_training_and_validation(tmp_path, key):
    mixture = write_tiny_shards(tmp_path / "shards")
    plain = train(tiny_config(tmp_path / "plain"), mixture)
    marked = train(tiny_config(tmp_path / "marked", f"data.{key}=true"), mixture)
    assert all(marked.losses[name] != plain.losses[name] for name in plain.losses)
    untrained = [f"data.{key}={value}" for value in ("false", "true")]
    at_start = [train(tiny_config(tmp_path / v[-4:], v, "optim.lr=0", "schedule.min_lr=0"), mixture) for v in untrained]
    assert at_start[0].losses != at_start[1].losses, "validation sees the option as training does"


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The definition: softmax under a mask of all pairs, key and value heads repeated."""
    place = torch.bucketize(torch.arange(48), torch.tensor(STARTS), right=True).view(2, 24)
    allowed = (place[:, :, None] == place[:, None, :]).tril()[:, None]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v


def heads(groups: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(groups)
    sizes = [(2, count, 24, 8) for count in (4, groups, groups)]
    return [torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True) for size in sizes]


def varlen(q, k, v, cu_seqlens, _, longest, __, *, window_size, enable_gqa):
    """What torch.nn.attention.varlen.varlen_attn does, document by document."""
    assert longest == 17 and window_size == (-1, 0) and enable_gqa == (q.shape[1] != k.shape[1])
    assert cu_seqlens.dtype == torch.int32
    pieces = [[x[a:b].transpose(0, 1) for x in (q, k, v)] for a, b in itertools.pairwise(cu_seqlens.tolist())]
    options = {"is_causal": True, "enable_gqa": enable_gqa}
    return torch.cat([F.scaled_dot_product_attention(*piece, **options).transpose(0, 1) for piece in pieces])


def flash_varlen(q, k, v, cu_seqlens, cu_seqlens_k, longest, longest_k, causal):
    """flash_attn.flash_attn_varlen_func: grouped heads by themselves."""
    assert causal
    return varlen(q, k, v, cu_seqlens, cu_seqlens_k, longest, longest_k, window_size=(-1, 0),
                  enable_gqa=q.shape[1] != k.shape[1])  # fmt: skip


def old_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    """The signature of torch 2.10: no grouped heads."""
    raise AssertionError("not to be called")


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("backend", ["document by document", "torch", "flash-attn 2"])
def test_every_way_through_documents_is_the_masked_softmax(monkeypatch, groups, backend):
    documents = dataclasses.replace(DOCUMENTS, max_seqlen=17)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen if backend == "torch" else old_varlen)
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_varlen
    monkeypatch.setitem(sys.modules, "flash_attn", module if backend == "flash-attn 2" else None)
    inputs, kernel = heads(groups), varlen_kernel()
    assert (kernel is None) == (backend == "document by document")
    out = packed(*inputs, documents, kernel) if kernel else causal_attention(*inputs, documents)
    expected = masked(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grads, wanted = (torch.autograd.grad((x * weight).sum(), inputs) for x in (out, expected))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-11)


def test_flash_is_refused_by_name_where_there_is_none():
    cpu = torch.device("cpu")
    assert choose_attention("auto", cpu) == choose_attention("sdpa", cpu) == "PyTorch's SDPA"
    with pytest.raises(ValueError, match=r"attention: flash cannot be had \(cpu here is no GPU.*set attention: auto"):
        choose_attention("flash", cpu)


@pytest.mark.parametrize(("major", "tried"), [(8, []), (9, ["FA3", "FA4"]), (10, ["FA4"])])
@pytest.mark.parametrize("error", [None, ModuleNotFoundError("no flash_attn_interface"), RuntimeError("no kernel")])
def test_the_best_flash_attention_is_activated_once_or_warned_of(monkeypatch, recwarn, major, tried, error):
    seen = []

    def activate(name):
        seen.append(name)
        if error:
            raise error

    monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", activate)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (major, 0))
    chosen = choose_attention("auto", torch.device("cuda"))
    assert seen == (tried if error else tried[:1])
    worked = tried and not error
    assert chosen == (f"SDPA with FlashAttention {tried[0][2:]}" if worked else "PyTorch's SDPA")
    assert len(recwarn) == (len(tried) if isinstance(error, RuntimeError) else 0)
    if not worked:
        with pytest.raises(ValueError, match="FA4: no" if tried else "no GPU from Hopper on"):
            choose_attention("flash", torch.device("cuda"))
