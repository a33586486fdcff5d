"""Memory of one training run on its fullest rank, by arithmetic: nothing is allocated, and no GPU is needed.

What autograd keeps is counted tensor by tensor, as the eager model saves it; tests/regmix_search/test_gpu_memory.py
compares it with what the real model holds. D hidden, F ffn, N tokens of a micro-batch, V vocabulary, all of one rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from megatron_lite.config import Config
from megatron_lite.plan import Plan
from megatron_lite.shape import padded_vocab_size
from megatron_lite.tensor_parallel import loss

GIB = 2**30
OVERHEAD = 2 * GIB  # assumed: CUDA's context, NCCL's buffers, the allocator's gaps; the rest is counted
DEEPSPEED_BUCKET = 500_000_000  # elements, DeepSpeed's default reduce_bucket_size: it takes them whatever the model


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank at the peak of a step."""

    weights: int
    gradients: int
    moments: int
    activations: int  # kept for the backward pass
    work: int  # what comes and goes at the peak: the loss's chunk of logits, weights in bf16, one block's gradients
    overhead: int = OVERHEAD

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        """The parts in GiB."""
        parts = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return f"{self.total / GIB:.1f} GiB = " + ", ".join(f"{name} {size / GIB:.3g}" for name, size in parts)


def memory(config: Config, plan: Plan, device: str = "cuda") -> Memory:
    """Peak memory of one rank. ``device`` cpu: as PyTorch's CPU kernels need it, without a GPU's overhead."""
    params, moments = _params(plan), _moments(config, plan)
    weights = gradients = 4 * params
    if config.reweighting and config.reweighting.reference:
        weights += 4 * params  # the reference model, unless its losses are stored
    activations, work = _step(config, plan, device == "cuda")
    if plan.engine == "deepspeed":
        share = 4 * params // plan.dp_size if plan.zero_stage else 0
        weights += share  # its partition of them, which the optimizer updates
        gradients = share + (0 if plan.zero_stage == 2 else gradients)
        work = max(work, _deepspeed_work(config, plan, activations))
    return Memory(weights, gradients, moments, activations, work, OVERHEAD if device == "cuda" else 0)


def largest_micro_batch(config: Config, plan: Plan, limit: int) -> int:
    """Largest micro-batch that divides a rank's share and stays within ``limit`` bytes; 0 where none does."""
    share = plan.grad_accum_steps * config.batch.micro_batch_size
    for size in (size for size in range(share, 0, -1) if share % size == 0):
        batch = dataclasses.replace(config.batch, micro_batch_size=size)
        if memory(dataclasses.replace(config, batch=batch), plan).total <= limit:
            return size
    return 0


def _params(plan: Plan) -> int:
    s, tp = plan.shape, plan.tp_size
    tables = (1 if s.tie_embeddings else 2) * padded_vocab_size(s.vocab_size, tp) // tp * s.hidden_size
    return s.body_matmul_params // tp + (2 * s.num_layers + 1) * s.hidden_size + tables


def _moments(config: Config, plan: Plan) -> int:
    if "offload_optimizer" in config.deepspeed.get("zero_optimization", {}):
        return 0
    muon = plan.shape.body_matmul_params // plan.tp_size if config.optim.optimizer == "muon" else 0
    return (8 * _params(plan) - 4 * muon) // (plan.dp_size if plan.zero_stage else 1)


def _step(config: Config, plan: Plan, cuda: bool) -> tuple[int, int]:
    """(kept, work) in bytes at whichever is higher: the loss at the end of the forward, or the first backward."""
    s, tp, N = plan.shape, plan.tp_size, config.batch.micro_batch_size * plan.shape.seq_length
    D, L, mode, bf16 = s.hidden_size, s.num_layers, config.activation_checkpointing, plan.precision == "bf16"
    e, share = (2 if bf16 else 4), (tp if plan.sequence_parallel else 1)
    q, kv, F = (n // tp for n in (D, s.num_kv_heads * s.head_dim, s.ffn_hidden_size))
    rope = 4 * s.seq_length * s.head_dim // 2 if bf16 else 0  # cos and sin in bf16
    block = _block(plan, e, cuda) * N + rope
    stream = 4 * D // share * N  # the residual stream is fp32
    kept_ops = (e * (2 * q + 2 * kv + 2 * F) + 4 * s.num_heads // tp) * N  # selective: what the backward wants,
    kept = {"none": block, "full": stream, "selective": stream + kept_ops + 2 * e * D * N}[mode] * L  # and two more
    norm = _norm(D, share, cuda) * N
    copies = 2 * s.body_matmul_params // tp if bf16 else 0  # the blocks' weights in bf16
    head = 4 * padded_vocab_size(s.vocab_size, tp) // tp * D
    h = (4 if tp == 1 else e) * D * N
    at_loss = (
        4 * N + norm + h + head,
        copies + _loss_work(plan, N, cuda, config.loss_chunk),
    )  # kept: the gradients of h and head
    if mode == "none":
        backward = norm, copies + 12 * D * N  # the final norm's
    else:  # a block is computed again, less what was kept of it; 2 e F or 6 D: its first gradients
        again = block - (kept_ops + e * D * N if mode == "selective" else 0)
        backward = 0, again + max(2 * e * F, 6 * D) * N + copies // L
    kept_here, work = max(at_loss, backward, key=sum)
    return kept + kept_here, work


def _deepspeed_work(config: Config, plan: Plan, activations: int) -> int:
    """Bytes beside activations while gradients are reduced; measured with DeepSpeed 0.19.8, see the test."""
    whole = 4 * _params(plan)
    if plan.zero_stage == 0:
        return whole - activations  # all gradients once more, at the end
    bucket = 4 * int(config.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", DEEPSPEED_BUCKET))
    return max(bucket, bucket + min(whole, 2 * bucket) - activations if plan.zero_stage == 2 else 0)


def _norm(D: int, share: int, cuda: bool) -> int:
    """Bytes a token that an RMSNorm keeps: its input and 1 / rms; CPU kernels keep the normalised input too."""
    return (4 * D + 4 + (0 if cuda else 4 * D)) // share


def _block(plan: Plan, e: int, cuda: bool) -> int:
    """Bytes a token that the backward of one block wants, ``e`` bytes an element of its matmuls."""
    s, tp = plan.shape, plan.tp_size
    D, q, kv, F = s.hidden_size, s.hidden_size // tp, s.num_kv_heads * s.head_dim // tp, s.ffn_hidden_size // tp
    outputs = 1 if cuda else 2  # of attention: a GPU's kernels write them in the order that the projection reads
    attention = e * (D + (q + 2 * kv) + (q + kv) + outputs * q) + 4 * s.num_heads // tp  # input, qkv, rotated, out, lse
    mlp = e * (D + 2 * F + F + F)  # input, gate and up, silu(gate), their product
    return 2 * _norm(D, plan.tp_size if plan.sequence_parallel else 1, cuda) + attention + mlp


def _loss_work(plan: Plan, N: int, cuda: bool, chunk: int) -> int:
    """Final hidden states, the head in the type of the matmuls, one chunk of logits with what is made of it."""
    s, V = plan.shape, padded_vocab_size(plan.shape.vocab_size, plan.tp_size) // plan.tp_size
    e, D = (2 if plan.precision == "bf16" else 4), s.hidden_size
    chunks = -(-N // max(1, (chunk or loss.CHUNK["cuda" if cuda else "cpu"]) // V))
    rows = -(-N // chunks)
    wide = rows if cuda else min(2 * max(1, loss.BLOCK * torch.get_num_threads() // V), rows)  # of fp32 beside bf16
    cast = (2 * D * N + 2 * D * V, 4 * V * wide) if e == 2 else (0, 0)
    temporary = max(cast[1], (6 if e == 2 else 4) * D * rows, 2 * D * V if e == 2 else 0)
    return 4 * D * N + cast[0] + e * V * rows + temporary
