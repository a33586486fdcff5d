"""Hugging Face Llama folders, out and in: safetensors and JSON alone, no network, no remote code, logits verified.

Both rotate halves (i, i + K/2), so no row is permuted: q, k, v and gate, up are cut apart and stacked, nothing else.
The policy on special tokens: documents end in EOD and nothing is put before them, so a document starts after an EOD.
Exports say bos = eos = EOD, as GPT-2 and GPT-NeoX do, and their tokenizer adds neither.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_lite.config import ModelConfig
from megatron_lite.files import atomic_write, atomic_write_json, sync
from megatron_lite.hf_config import hf_config, model_config, read_json
from megatron_lite.model import GPT
from megatron_lite.shape import ModelShape, resolve_shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD_BYTES = 5_000_000_000  # a file's size above which weights are split, transformers' long-time max_shard_size
TOLERANCE = 1e-4  # of logits in units of max(1, their deviation); a right export shows 1e-6 to 1e-5, a wrong eps 1e-2


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer that made the shards, as data_tools.tokenizer.load_tokenizer tells it."""

    path: Path  # tokenizer.json or a SentencePiece *.model
    vocab_size: int  # largest id + 1
    eod_id: int
    eod_token: str
    probes: list[tuple[str, list[int]]]  # texts and the ids that training saw: Hugging Face must give the same
    dummy_prefix: bool = False  # SentencePiece only: a space is put before every text


def export_hf(
    tensors: Mapping[str, Tensor],
    shape: ModelShape,
    out_dir: str | Path,
    tokenizer: TokenizerFiles | None = None,
    facts: Mapping[str, Any] | None = None,
    dtype: str = "fp32",
    verify: bool = True,
    source: str = "",
    card: str = "",
) -> float | None:
    """Writes a Llama folder that transformers loads, whole or not at all; returns what ``verify_export`` measured.

    ``facts`` (vocab_size, eod_id, tokenizer_sha256) serve where there is no tokenizer; the vocabulary is cut to theirs.
    ``card``: README.md. None: not verified (``verify``=False, or no transformers). ValueError when the two disagree.
    """
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not an empty folder; name another, or delete it")
    known: dict[str, Any] = {"vocab_size": None, "eod_id": None, "tokenizer_sha256": None} | dict(facts or {})
    if tokenizer:
        sha256 = hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
        known = {"vocab_size": tokenizer.vocab_size, "eod_id": tokenizer.eod_id, "tokenizer_sha256": sha256}
    vocab_size, eod_id = known["vocab_size"] or shape.vocab_size, known["eod_id"]
    if vocab_size > shape.vocab_size:
        raise ValueError(f"the tokenizer has {vocab_size} tokens, the model {shape.vocab_size}: it is another model's")
    tensors, shape = fold_multipliers(tensors, dataclasses.replace(shape, vocab_size=vocab_size))
    rounded = {n: t[:vocab_size] if n in _TABLES else t for n, t in tensors.items()}
    rounded = {n: t.detach().cpu().to(DTYPES[dtype]) for n, t in rounded.items()}
    temp = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir(parents=True)
    try:
        _write_weights(rounded, shape, temp)
        atomic_write_json(temp / "config.json", hf_config(shape, eod_id, DTYPES[dtype]))
        # pad = EOD here for batched generate; not in config.json, where it would stop EOD's row from being trained
        ids = {"bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": eod_id}
        length = min(256, shape.seq_length // 2)  # of generate: by default it stops after 20, mostly before an EOD
        atomic_write_json(temp / "generation_config.json", ids | {"max_new_tokens": length})
        if card:
            atomic_write(temp / "README.md", card)
        if tokenizer:
            _write_tokenizer(tokenizer, shape.seq_length, temp)
        difference = None
        if verify and importlib.util.find_spec("transformers"):
            difference = verify_export(temp, rounded, shape, tokenizer)
        record = {"source": source, **known, "bos": None, "max_logit_difference": difference}
        atomic_write_json(temp / "megatron_lite.json", record)
        os.replace(temp, out)
        sync(out.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return difference


def fold_multipliers(tensors: Mapping[str, Tensor], shape: ModelShape) -> tuple[dict[str, Tensor], ModelShape]:
    """The same function in the standard parametrisation: muP's attention scale goes into q, 1 / width into the norm."""
    out = dict(tensors)
    for name in out if shape.mup_base_width else ():
        if name.endswith("attention.qkv.weight"):
            q, kv = out[name].tensor_split([shape.hidden_size])
            out[name] = torch.cat((q * shape.attention_multiplier, kv))
        elif name == "norm.weight":
            out[name] = out[name] / shape.mup_width
    return out, dataclasses.replace(shape, mup_base_width=None)


def verify_export(
    folder: Path, tensors: Mapping[str, Tensor], shape: ModelShape, tokenizer: TokenizerFiles | None = None
) -> float:
    """Loads the folder with transformers; returns the largest fp32 logit difference to ours on random tokens.

    In units of max(1, deviation of the logits). ValueError above TOLERANCE, and when its tokenizer gives other ids.
    """
    transformers = import_transformers()
    transformers.utils.logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **local)
    # short: transformers rounds rotary angles to fp32, an error that grows with the position (docs/decisions.md)
    ours = GPT(dataclasses.replace(shape, seq_length=min(shape.seq_length, 64)))
    with torch.no_grad():
        for name, param in ours.named_parameters():
            param.copy_(tensors[name])
        generator = torch.Generator().manual_seed(0)
        tokens_BT = torch.randint(0, shape.vocab_size, (2, ours.shape.seq_length), generator=generator)
        expected = theirs.float().eval()(tokens_BT).logits
        worst = (ours.logits(tokens_BT) - expected).abs().max().item() / max(1.0, expected.std().item())
    if not worst <= TOLERANCE:
        raise ValueError(f"{folder}: transformers' logits differ from ours by {worst:.2e}, at most {TOLERANCE:.0e}")
    if tokenizer:
        _verify_tokenizer(transformers.AutoTokenizer.from_pretrained(folder, **local), tokenizer)
    return worst


def _verify_tokenizer(loaded: Any, tokenizer: TokenizerFiles) -> None:
    named = {"bos": loaded.bos_token_id, "eos": loaded.eos_token_id}
    if named != {"bos": tokenizer.eod_id, "eos": tokenizer.eod_id}:
        raise ValueError(f"{tokenizer.path}: transformers reads {named}, both must be EOD, {tokenizer.eod_id}")
    for text, ids in tokenizer.probes:
        if (found := loaded(text)["input_ids"]) != ids:
            what = f"{tokenizer.path}: {text!r} is {ids} in training and {found} in transformers"
            raise ValueError(f"{what}; --no-verify exports it with that difference")


def import_hf(folder: str | Path) -> tuple[dict[str, Tensor], ModelConfig]:
    """A Llama folder -> fp32 weights by our names, and the model block of a config with every size in it.

    ValueError names each setting or tensor that our model cannot represent.
    """
    folder = Path(folder)
    config = model_config(folder / "config.json")
    shape = resolve_shape(config, 1, None)
    state = _read_weights(folder)
    if shape.tie_embeddings and "lm_head.weight" in state:
        if not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"]):
            raise ValueError(f"{folder}: config.json ties the embeddings, but lm_head.weight is a tensor of its own")
        del state["lm_head.weight"]
    layout, sizes = _layout(shape), our_shapes(shape)
    expected = {n: (rows, *sizes[ours][1:]) for ours, parts in layout.items() for n, rows in parts}
    wrong = [f"{n} is missing" for n in expected if n not in state]
    wrong += [f"{n} has no place in our model" for n in state if n not in expected]
    for name in expected.keys() & state.keys():
        if tuple(state[name].shape) != expected[name]:
            wrong.append(f"{name} is {tuple(state[name].shape)}, config.json says {expected[name]}")
        if state[name].dtype not in (torch.float32, torch.bfloat16, torch.float16):
            wrong.append(f"{name} is {state[name].dtype}, only fp32, bf16 and fp16 are read")
    if wrong:
        raise ValueError(f"{folder}: {'; '.join(sorted(wrong)[:5])}")
    return {ours: torch.cat([state[n].float() for n, _ in parts]) for ours, parts in layout.items()}, config


def our_shapes(shape: ModelShape) -> dict[str, torch.Size]:
    """The logical parameters of a model, by name."""
    with torch.device("meta"):
        return {name: param.shape for name, param in GPT(shape).named_parameters()}


def import_transformers() -> Any:
    """The transformers module; ValueError with the way to install it."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"transformers cannot be imported ({error}): pip install 'megatron_lite[hf]'") from None
    return transformers


_TABLES = ("embedding.weight", "head.weight")  # a row a token


def _layout(shape: ModelShape) -> dict[str, list[tuple[str, int]]]:
    """Our parameter -> the Hugging Face tensors that it is made of, each with its rows, top to bottom."""
    D, F, q, kv = shape.hidden_size, shape.ffn_hidden_size, shape.hidden_size, shape.num_kv_heads * shape.head_dim
    parts = {"embedding": [("model.embed_tokens", shape.vocab_size)], "norm": [("model.norm", D)]}
    for i in range(shape.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        parts[f"{ours}.attention.qkv"] = [(f"{attention}.{n}_proj", {"q": q}.get(n, kv)) for n in "qkv"]
        parts[f"{ours}.attention.out"] = [(f"{attention}.o_proj", D)]
        parts[f"{ours}.mlp.gate_up"] = [(f"{mlp}.gate_proj", F), (f"{mlp}.up_proj", F)]
        parts[f"{ours}.mlp.down"] = [(f"{mlp}.down_proj", D)]
        parts[f"{ours}.attention_norm"] = [(f"{theirs}.input_layernorm", D)]
        parts[f"{ours}.mlp_norm"] = [(f"{theirs}.post_attention_layernorm", D)]
    if not shape.tie_embeddings:
        parts["head"] = [("lm_head", shape.vocab_size)]
    return {f"{ours}.weight": [(f"{n}.weight", rows) for n, rows in names] for ours, names in parts.items()}


def _write_weights(tensors: Mapping[str, Tensor], shape: ModelShape, folder: Path) -> None:
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for ours, parts in _layout(shape).items():
        for (name, _), part in zip(parts, tensors[ours].split([rows for _, rows in parts]), strict=True):
            if files[-1] and size + part.nbytes > SHARD_BYTES:
                files, size = [*files, {}], 0
            files[-1][name], size = part.clone(), size + part.nbytes  # parts of one storage are refused by safetensors
    of = f"-of-{len(files):05d}" if len(files) > 1 else ""
    names = [f"model{of and f'-{i:05d}{of}'}.safetensors" for i in range(1, len(files) + 1)]
    for name, content in zip(names, files, strict=True):
        save_file(content, folder / name, {"format": "pt"})  # transformers refuses a file that does not say so
        sync(folder / name)
    if len(files) > 1:
        total = sum(part.nbytes for content in files for part in content.values())
        where = {n: name for name, content in zip(names, files, strict=True) for n in content}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        atomic_write_json(folder / "model.safetensors.index.json", index)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    state: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            what = f"{folder}: no weight file {name!r} in it; only safetensors are read, never pickles"
            raise ValueError(f"{what}: AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT) converts them")
        state |= load_file(folder / name)
    return {n: t for n, t in state.items() if not n.endswith("rotary_emb.inv_freq")}  # a buffer of old releases


def _write_tokenizer(tokenizer: TokenizerFiles, seq_length: int, folder: Path) -> None:
    """The definition as it is, and a config under which transformers runs it as training did."""
    content, fast = tokenizer.path.read_bytes(), tokenizer.path.suffix == ".json"
    definition = json.loads(content) if fast else {}
    if "SpecialToken" in json.dumps(definition.get("post_processor")):
        # it would put a BOS that was never trained before every text: transformers 4 heeds no add_bos_token here
        content = json.dumps({**definition, "post_processor": None}, ensure_ascii=False).encode()
    atomic_write(folder / ("tokenizer.json" if fast else "tokenizer.model"), content)
    # PreTrainedTokenizerFast runs tokenizer.json as it is; named classes rebuild parts of it
    kind = "PreTrainedTokenizerFast" if fast else "LlamaTokenizer"
    config = {"tokenizer_class": kind, "model_max_length": seq_length, "clean_up_tokenization_spaces": False}
    config |= {"bos_token": tokenizer.eod_token, "eos_token": tokenizer.eod_token, "add_bos_token": False}
    # transformers 4 puts its default into a tokenizer.json that says otherwise, and 5 into a SentencePiece model
    space = (definition.get("pre_tokenizer") or {}).get("add_prefix_space", tokenizer.dummy_prefix)
    config |= {"add_eos_token": False, "add_prefix_space": space, "legacy": False}
    atomic_write_json(folder / "tokenizer_config.json", config)
