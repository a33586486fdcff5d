"""Training speed of a proxy on one CPU thread against Hugging Face's Llama: forward, backward, clipping, AdamW.

    python -m benchmarks.proxy [--json]

Both models have the same sizes and the same batches and run in turn in one process; the figure is tokens per
CPU-second, the best of several repetitions, since the machine may be shared. Needs the bench extra (transformers).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.table import Row, parse_args, print_rows, rate_row
from megatron_lite.config import ModelConfig, OptimConfig
from megatron_lite.model import GPT
from megatron_lite.optim import build_optimizer, param_groups
from megatron_lite.shape import ModelShape, resolve_shape

# key: preset, vocabulary, sequence length, sequences a step, steps a repetition
CASES = {
    "demo_proxy_v2048": ("demo_proxy", 2048, 128, 8, 20),
    "tinyllama_1M_v8192": ("tinyllama_1M", 8192, 512, 2, 4),
}
REPETITIONS = 5


def hugging_face(shape: ModelShape) -> nn.Module:
    """LlamaForCausalLM of the same sizes, with SDPA as ours has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.seq_length,
        rms_norm_eps=shape.norm_eps,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def stepper(model: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    """One training step of a model, as the engine does it."""
    optimizer = build_optimizer(param_groups(model, OptimConfig().weight_decay), OptimConfig())

    def step(tokens: Tensor) -> None:
        loss_of(tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def tokens_per_cpu_second(step: Callable[[Tensor], None], tokens: Tensor, steps: int) -> float:
    """Tokens a CPU-second over ``steps`` steps."""
    start = time.process_time()
    for _ in range(steps):
        step(tokens)
    return steps * (tokens.numel() - len(tokens)) / (time.process_time() - start)


def measure(preset: str, vocab: int, seq_length: int, batch: int, steps: int) -> tuple[float, float]:
    """Best tokens per CPU-second of ours and of the peer, repetitions taken in turn."""
    shape = resolve_shape(ModelConfig(preset=preset), seq_length, vocab)
    ours, peer = GPT(shape), hugging_face(shape)
    tokens = torch.randint(0, vocab, (batch, seq_length + 1), generator=torch.Generator().manual_seed(0))
    steppers = (
        stepper(ours, lambda t: ours(t[:, :-1], t[:, 1:]).mean()),
        stepper(peer, lambda t: nn.functional.cross_entropy(peer(t[:, :-1]).logits.flatten(0, 1), t[:, 1:].flatten())),
    )
    best = [0.0, 0.0]
    for step in steppers:
        step(tokens)  # allocators and caches
    for _ in range(REPETITIONS):
        for i, step in enumerate(steppers):
            best[i] = max(best[i], tokens_per_cpu_second(step, tokens, steps))
    return best[0], best[1]


def run() -> list[Row]:
    """Every case as a row."""
    torch.set_num_threads(1)
    return [rate_row(f"proxy_{key}", *measure(*case), "tokens/CPU-s") for key, case in CASES.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs and prints; returns the exit code."""
    args = parse_args(__doc__, argv)
    print_rows(run(), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
