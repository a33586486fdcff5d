"""One proxy as a training script of its own: a plain PyTorch loop around Hugging Face's Llama. For benchmarks.proxies.

    python -m benchmarks.plain_proxy '{"shards": ..., "weights": {...}, "steps": 60, ...}'

What a shell loop over a training script starts once for each mixture. It imports nothing of ours, so that neither its
start nor its speed pays for us. It reads the shards' tokens by numpy, draws every row from a domain by the weights, and
trains as benchmarks.sides does: fused AdamW with decay on matrices, clipping, SDPA, autocast for bf16. It prints
"step 1" when the first step is done, and at the end its held-out losses as JSON.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM


def build(job: dict) -> LlamaForCausalLM:
    """The job's model with Hugging Face's own start."""
    torch.manual_seed(job["seed"])
    return LlamaForCausalLM(LlamaConfig(**job["model"], attn_implementation="sdpa", use_cache=False))


def train(job: dict, model: LlamaForCausalLM, autocast: torch.autocast) -> None:
    """All steps, with the learning rate's warm-up and cosine."""
    rng, length, rows = np.random.default_rng(job["seed"]), job["seq_length"], job["batch"]
    streams = [np.memmap(Path(job["shards"], f"train_{name}.bin"), np.uint16, "r") for name in job["weights"]]
    shares = np.array([*job["weights"].values()]) / sum(job["weights"].values())
    matrices, rest = ([p for p in model.parameters() if (p.dim() > 1) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, job["lr"], (0.9, 0.95), fused=True)
    for step in range(job["steps"]):
        chosen = [streams[i] for i in rng.choice(len(streams), rows, p=shares)]
        starts = [int(rng.integers(0, len(stream) - length - 1)) for stream in chosen]
        drawn = [stream[at : at + length + 1].astype(np.int64) for stream, at in zip(chosen, starts, strict=True)]
        batch = torch.from_numpy(np.stack(drawn))
        with autocast:
            loss = losses(model, batch).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm, along = min(1.0, (step + 1) / job["warmup"]), math.pi * step / job["steps"]
        for group in optimizer.param_groups:
            group["lr"] = job["lr"] * warm * (0.55 + 0.45 * math.cos(along))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 0:
            print("step 1", flush=True)


def losses(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Cross-entropy of every token in nats."""
    logits = model(batch[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def evaluate(job: dict, model: LlamaForCausalLM, autocast: torch.autocast) -> dict[str, float]:
    """Mean loss on the first tokens of each validation set."""
    found, length = {}, job["seq_length"]
    for name in job["weights"]:
        stream = np.memmap(Path(job["shards"], f"valid_{name}.bin"), np.uint16, "r")
        windows = range(0, job["eval_tokens"], length)
        rows = torch.from_numpy(np.stack([stream[at : at + length + 1].astype(np.int64) for at in windows]))
        with autocast:
            parts = [losses(model, part) for part in rows.split(job["batch"])]
        found[name] = torch.cat(parts).mean().item()
    return found


def main() -> None:
    """Trains and evaluates what the argument says."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    model = build(job)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=job["precision"] == "bf16")
    train(job, model, autocast)
    print(json.dumps(evaluate(job, model, autocast)), flush=True)


if __name__ == "__main__":
    main()
