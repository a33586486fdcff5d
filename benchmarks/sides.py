"""One training step of the same Llama three times: ours, Hugging Face's, litgpt's. For benchmarks.train and .gpu.

Each side has the same weights, tokens, AdamW (fused, the same groups), clipping and type of compute (fp32, or bf16 by
autocast over fp32 parameters), SDPA attention, no padding and no dropout. Ours is the engine that trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_lite.config import BatchConfig, Config, DataConfig, ModelConfig, OptimConfig, ScheduleConfig
from megatron_lite.data.batch import Batch
from megatron_lite.engine import choose_kernels
from megatron_lite.engine.torch_engine import TorchEngine
from megatron_lite.hf import export_hf
from megatron_lite.mesh import Mesh
from megatron_lite.model import GPT
from megatron_lite.optim import param_groups
from megatron_lite.plan import Plan
from megatron_lite.shape import ModelShape, resolve_shape

Step = Callable[[Tensor, Tensor], Tensor]  # (tokens [B, T], labels [B, T]) -> mean loss before the update, detached
OPTIM = OptimConfig()


@dataclass(frozen=True)
class Case:
    """What all sides train."""

    preset: str
    vocab_size: int
    seq_length: int
    sequences: int  # of one step
    precision: Literal["fp32", "bf16"]
    compile: bool = False
    num_heads: int | None = None  # None: the preset's
    num_kv_heads: int | None = None

    @property
    def config(self) -> Config:
        """The run of which one step is taken."""
        return Config(
            precision=self.precision,
            compile=self.compile,
            model=ModelConfig(self.preset, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads),
            data=DataConfig(seq_length=self.seq_length),
            batch=BatchConfig(self.sequences, self.sequences),
            schedule=ScheduleConfig(warmup_steps=0),
        )

    @property
    def shape(self) -> ModelShape:
        """Every size of the model."""
        return resolve_shape(self.config.model, self.seq_length, self.vocab_size)

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.sequences * self.seq_length

    def batch(self) -> tuple[Tensor, Tensor]:
        """(tokens, labels), the same for every side and step."""
        size, generator = (self.sequences, self.seq_length + 1), torch.Generator().manual_seed(0)
        drawn = torch.randint(0, self.vocab_size, size, generator=generator)
        return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def export_weights(case: Case, folder: Path) -> None:
    """Our first weights as a Hugging Face folder: where the peers begin."""
    export_hf(dict(GPT(case.shape, Config().seed).named_parameters()), case.shape, folder, verify=False)


def build_ours(case: Case, weights: Path, device: torch.device) -> Step:
    """The engine as the training loop builds and calls it; its first weights are those of ``weights`` by seed."""
    config = case.config
    choose_kernels(config, device)
    plan = Plan.resolve(config, 1, case.vocab_size, device.type == "cuda", deepspeed=False)
    engine = TorchEngine(config, plan, Mesh(0, 1, device, 0, 1))

    def step(tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        mask_BT = torch.ones((), dtype=torch.bool, device=device).expand(tokens_BT.shape)
        batch = Batch(tokens_BT.int(), labels_BT.int(), mask_BT, torch.zeros(len(tokens_BT), dtype=torch.long))
        loss = engine.forward_backward([batch], tokens_BT.numel())
        engine.step(OPTIM.lr)
        return loss / tokens_BT.numel()

    return step


def build_hf(case: Case, weights: Path, device: torch.device) -> Step:
    """transformers' LlamaForCausalLM."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.LlamaForCausalLM.from_pretrained(
        weights, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True, use_cache=False
    )
    return peer_step(case, model.train(), lambda output: output.logits, device)


def build_litgpt(case: Case, weights: Path, device: torch.device) -> Step:
    """litgpt's GPT, its weights by its own conversion."""
    import litgpt
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from safetensors.torch import load_file

    shape = case.shape
    config = litgpt.Config(
        block_size=shape.seq_length, n_layer=shape.num_layers, n_embd=shape.hidden_size, n_head=shape.num_heads,
        n_query_groups=shape.num_kv_heads, intermediate_size=shape.ffn_hidden_size, vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size, rotary_percentage=1.0, rope_base=int(shape.rope_theta), bias=False,
        parallel_residual=False, norm_class_name="RMSNorm", norm_eps=shape.norm_eps, mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    state: dict[str, Tensor] = {}
    copy_weights_hf_llama(config, {}, state, load_file(weights / "model.safetensors"))
    model = litgpt.GPT(config)
    model.load_state_dict(state, assign=True)
    return peer_step(case, model, lambda output: output, device)


def peer_step(case: Case, model: nn.Module, logits_of: Callable[[Any], Tensor], device: torch.device) -> Step:
    """A plain PyTorch training step, everything fused that PyTorch fuses."""
    model.to(device)
    if case.compile:
        model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(param_groups(model, OPTIM.weight_decay), OPTIM.lr, OPTIM.betas, OPTIM.eps, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16")

    def step(tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        with autocast:
            logits_BTV = logits_of(model(tokens_BT))
            loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())
            del logits_BTV
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


SIDES = {"ours": build_ours, "hf": build_hf, "litgpt": build_litgpt}
