"""AdamW and Muon, their parameter groups and state, and the learning rate as a pure function of the step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite.config import OptimConfig, ScheduleConfig
from megatron_lite.mesh import TensorParallel
from megatron_lite.tensor_parallel.shards import Shard, shard_of

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # AdamW's two; Muon's
Slices = Mapping[nn.Parameter, nn.Parameter]  # parameter -> what the optimizer has in its place


def learning_rate(step: int, total_steps: int, lr: float, schedule: ScheduleConfig) -> float:
    """Learning rate of the update number ``step`` (0-based). Warm-up ends, and the decay ends, exactly on time.

    Linear from lr/warmup_steps; then constant, cosine or linear to min_lr at the last step, or wsd: hold at lr and
    fall linearly to min_lr over the last ``decay_fraction`` of the steps (Hu et al. 2024, MiniCPM).
    """
    if step < schedule.warmup_steps:
        return lr * (step + 1) / schedule.warmup_steps
    if schedule.decay == "constant":
        return lr
    start = schedule.warmup_steps
    if schedule.decay == "wsd":
        start = max(start, total_steps - round(schedule.decay_fraction * total_steps))
    progress = min(1.0, max(0.0, (step + 1 - start) / max(1, total_steps - start)))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.decay == "cosine" else 1 - progress
    return schedule.min_lr + (lr - schedule.min_lr) * share


def schedule_table(total_steps: int, lr: float, schedule: ScheduleConfig) -> list[tuple[int, float]]:
    """The steps (1-based) at which the curve turns, and quarters between, with their learning rates."""
    decay = total_steps - round(schedule.decay_fraction * total_steps) if schedule.decay == "wsd" else 0
    quarters = [round(total_steps * share / 4) for share in range(5)]
    steps = sorted({max(1, s) for s in [*quarters, schedule.warmup_steps, decay]})
    return [(step, learning_rate(step - 1, total_steps, lr, schedule)) for step in steps]


def param_groups(model: nn.Module, weight_decay: float, hidden_lr_scale: float | None = None) -> list[dict[str, Any]]:
    """Two groups: matrices (the embedding included, as in TinyLlama) decay, norms do not.

    With ``hidden_lr_scale`` three: first the blocks' matrices, at that part of lr and with the same decay in a step.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = {name: p for name, p in named if hidden_lr_scale and is_hidden(name, p)}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if p.dim() >= 2 and name not in hidden], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    if hidden_lr_scale:
        entry = {"weight_decay": weight_decay / hidden_lr_scale, "lr_scale": hidden_lr_scale}
        groups.insert(0, {"params": list(hidden.values()), **entry})
    return groups


def is_hidden(name: str, param: Tensor) -> bool:
    """Whether a parameter of GPT is a matrix of its blocks: both of its sizes grow with the width."""
    return name.startswith("blocks.") and param.dim() == 2


def hidden_lr_scale(config: OptimConfig, mup_width: float) -> float | None:
    """Learning rate of the blocks' matrices over the others' (Tensor Programs V, table 8); None: they have no group."""
    if config.optimizer == "muon":
        return 1 / math.sqrt(mup_width)  # its update's spectral norm grows with the root of the width, AdamW's with it
    return None if mup_width == 1 else 1 / mup_width


def set_learning_rate(groups: list[dict[str, Any]], lr: float) -> None:
    """Sets ``lr`` on optimizer groups, times the scale that muP gives a group."""
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> Any:
    """The config's optimizer over groups like those of ``param_groups``; which AdamW: see ``adamw_name``."""
    if config.optimizer == "muon":
        return MuonAdamW(groups, config)
    if apex_imports(groups[0]["params"][0].device):
        return apex_adamw(groups, config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


class MuonAdamW:
    """torch's Muon for the first group, packed matrices (q, k, v; gate, up) part by part, and AdamW for the rest.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025), so both have optim.lr and its decay.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        self.adamw = build_optimizer(groups[1:], dataclasses.replace(config, optimizer="adamw"))
        self.parts: dict[Tensor, list[Tensor]] = {}  # views of a parameter
        for param in groups[0]["params"]:
            shard = cast(Shard, shard_of(param))
            self.parts[param] = [*param.detach().split(shard.parts if shard.dim == 0 else len(param))]
        views = [part for parts in self.parts.values() for part in parts]
        self.muon = torch.optim.Muon([{**groups[0], "params": views}], adjust_lr_fn="match_rms_adamw")
        self.state, self.param_groups = self.adamw.state, [*self.muon.param_groups, *self.adamw.param_groups]
        self.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in self.parts})

    def step(self) -> None:
        """One update, the parts' gradients and momenta views of the parameters'."""
        for param, parts in self.parts.items():
            wholes = (cast(Tensor, param.grad), self.state[param]["momentum_buffer"])
            pieces = (whole.split([*map(len, parts)]) for whole in wholes)
            for part, grad, momentum in zip(parts, *pieces, strict=True):
                part.grad, self.muon.state[part] = grad, {"momentum_buffer": momentum}
        self.muon.step()
        self.muon.zero_grad()
        self.adamw.step()


def apex_imports(device: torch.device) -> bool:
    """Whether NVIDIA's apex is here for a GPU. PyPI's apex is another program and has no optimizers."""
    if device.type != "cuda":
        return False
    try:
        from apex.optimizers import FusedAdam  # noqa: F401
    except Exception:  # a build for another torch or CUDA fails in many ways, and none is a reason not to train
        return False
    return True


def adamw_name(device: torch.device) -> str:
    """The AdamW that ``build_optimizer`` takes for parameters on a device."""
    return "apex's FusedAdam" if apex_imports(device) else "torch's fused AdamW"


def apex_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> Any:
    """apex's FusedAdam as AdamW, with its step count beside each parameter: there torch and our checkpoints have it."""
    from apex.optimizers import FusedAdam

    class ApexAdamW(FusedAdam):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                known = [self.state[p]["step"] for p in group["params"] if self.state.get(p)]
                group["step"] = int(known[0]) if known else 0
            super().step()
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        self.state[param]["step"] = torch.tensor(float(group["step"]))

    return ApexAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, adam_w_mode=True)


def moments(module: nn.Module, optimizer: Any, slices: Slices | None = None) -> dict[str, Tensor]:
    """The optimizer's state by parameter name; AdamW's is zeros before the first step."""
    out = {"step": torch.zeros(())}
    for name, param in module.named_parameters():
        mine = slices[param] if slices else param
        state = optimizer.state.get(mine) or {m: torch.zeros_like(mine) for m in ("exp_avg", "exp_avg_sq")}
        out |= {f"{moment}/{name}": tensor for moment, tensor in state.items() if moment != "step"}
        if "step" in state:
            out["step"] = torch.as_tensor(state["step"]).detach().float().cpu().reshape(())
    return out


def set_moments(module: nn.Module, optimizer: Any, state: dict[str, Tensor], slices: Slices | None = None) -> None:
    """Puts ``moments`` back, on the parameters' device. Fused AdamW keeps its step count beside the parameter."""
    for name, param in module.named_parameters():
        mine = slices[param] if slices else param
        kept = {m: state[f"{m}/{name}"].clone().to(param.device) for m in MOMENTS if f"{m}/{name}" in state}
        optimizer.state[mine] = {"step": state["step"].clone().to(param.device), **kept}


def clip_grad_norm(module: nn.Module, clip_grad: float, tp: TensorParallel) -> float:
    """Global norm of the gradients before clipping; scales them in place where it is above ``clip_grad`` (0: never).

    Slices count on every tensor-parallel rank, what all of them hold counts once, so the norm is one process's and
    the same on all ranks. Gradients must be reduced over data-parallel ranks already.
    """
    limit = clip_grad if clip_grad > 0 else math.inf
    if tp.size == 1:
        return nn.utils.clip_grad_norm_(module.parameters(), limit).item()
    with_grad = [(p, p.grad) for p in module.parameters() if p.grad is not None]
    sliced = [g for p, g in with_grad if getattr(p, "tensor_model_parallel", False)]
    whole = [g for p, g in with_grad if not getattr(p, "tensor_model_parallel", False)]
    squares = nn.utils.get_total_norm(sliced).double().square()
    dist.all_reduce(squares, group=tp.group)  # each rank sends its slices' sum of squares and receives the total
    norm = (squares + nn.utils.get_total_norm(whole).double().square()).sqrt()
    nn.utils.clip_grads_with_norm_([p for p, _ in with_grad], limit, norm)
    return norm.item()
