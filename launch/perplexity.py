"""Loss, perplexity and bits per byte of any model on held-out domains, by the code that evaluates while training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from launch.scores import Cell, Table, spread
from megatron_lite.checkpoint import load_state
from megatron_lite.data.batch import DocumentOptions
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.loader import EvalSet
from megatron_lite.data.mixture import Mixture
from megatron_lite.evaluate import EvalResult, evaluate
from megatron_lite.hf_config import read_json
from megatron_lite.mesh import Mesh
from megatron_lite.model import GPT
from megatron_lite.weights import Weights, read_weights

MARKS = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")


def domain_losses(
    path: Path, valid: Mapping[str, Sequence[str]], max_tokens: int | None, batch: int, device: str, dtype: str
) -> dict[str, EvalResult]:
    """Scores a checkpoint, a run or a Hugging Face folder on shards by domain, document marks as in its training.

    ValueError when the shards were made with another tokenizer than the model's.
    """
    weights = read_weights(path)
    marks = training_marks(weights.source)
    sets = [
        EvalSet(name, prefixes, weights.shape.seq_length, max_tokens, batch, options)
        for name, prefixes in valid.items()
        for options in [DocumentOptions(check_shards(name, prefixes, weights), **marks)]
    ]
    model = GPT(weights.shape)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(weights.tensors[name])
    mesh = Mesh(0, 1, torch.device(device))
    autocast = torch.autocast(mesh.device.type, torch.bfloat16, enabled=dtype == "bf16")
    return evaluate(model.to(mesh.device), sets, mesh, autocast)


def held_out_sets(path: Path, mixture: str | None, data_dir: str | None) -> dict[str, tuple[str, ...]]:
    """Domain -> shard prefixes: the mixture's `valid:`, every valid_* shard of the folder, or those of the run."""
    own = next((p for p in (path / "mixture.yaml", path.parent / "mixture.yaml") if p.is_file()), None)
    if mixture or (own and not data_dir):
        return Mixture.load(mixture or str(own), data_dir).valid
    if not data_dir:
        raise ValueError(f"{path}: no mixture.yaml of a run here; name the shards with --data-dir or --mixture")
    stems = sorted(Path(data_dir).resolve().glob("valid_*.idx"))
    if not stems:
        raise ValueError(f"--data-dir {data_dir}: no valid_*.idx in it")
    return {p.stem.removeprefix("valid_").removesuffix("_text_document"): (str(p.with_suffix("")),) for p in stems}


def training_marks(folder: Path) -> dict[str, bool]:
    """The document marks that a checkpoint was trained with; none for a Hugging Face folder."""
    data = load_state(folder).get("config", {}).get("data", {}) if (folder / "state.json").is_file() else {}
    return {name: bool(data.get(name)) for name in MARKS}


def check_shards(name: str, prefixes: Sequence[str], weights: Weights) -> int | None:
    """The shards' EOD id; ValueError when their tokenizer, where both say one, is not the model's."""
    record = weights.source / "megatron_lite.json"
    trained = weights.tokenizer or (read_json(record) if record.is_file() else {})
    metas = [meta for prefix in prefixes if (meta := IndexedDataset(prefix).meta)]
    for meta in metas:
        ours, theirs = trained.get("tokenizer_sha256"), meta.tokenizer_sha256
        if ours and theirs and ours != theirs:
            raise ValueError(
                f"valid_{name} was made with tokenizer {theirs[:12]}, {weights.source} was trained with {ours[:12]}: "
                "tokenise the text with the model's own tokenizer"
            )
        if meta.vocab_size > weights.shape.vocab_size:
            raise ValueError(
                f"valid_{name} has {meta.vocab_size} token ids, the model {weights.source} {weights.shape.vocab_size}"
            )
    return metas[0].eod_id if metas else None


def domain_cells(results: Sequence[Mapping[str, EvalResult]]) -> dict[str, dict[str, Any]]:
    """Domain -> {loss, perplexity, bpb: Cell over seeds, tokens}."""
    rows: dict[str, dict[str, Any]] = {}
    for name in results[0]:
        found = [r[name] for r in results]
        bpb = [r.bpb for r in found if r.bpb is not None]
        rows[name] = {
            "tokens": found[0].tokens,
            "loss": Cell(tuple(r.loss for r in found)),
            "perplexity": Cell(tuple(math.exp(r.loss) for r in found)),
            "bpb": Cell(tuple(bpb)) if len(bpb) == len(found) else None,
        }
    return rows


def domain_table(name: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One model's table in Markdown."""
    lines = [f"| {name} | tokens | nats/token | perplexity | bits/byte |", "|---|---:|---:|---:|---:|"]
    for domain, row in rows.items():
        bpb = spread(row["bpb"], 4) if row["bpb"] else ""
        lines.append(
            f"| {domain} | {row['tokens']:,} | {spread(row['loss'], 4)} | {spread(row['perplexity'], 2)} | {bpb} |"
        )
    return "\n".join(lines)


def loss_table(models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Domain -> mixture -> losses, for comparisons; only domains that all have."""
    first = next(iter(models.values()))
    return {
        d: {m: rows[d]["loss"] for m, rows in models.items()} for d in first if all(d in r for r in models.values())
    }
