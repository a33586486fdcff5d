"""DeepSpeed's engine at ZeRO 0, 1 and 2, drawing the same curve as TorchEngine. The only file that imports deepspeed.

Its JSON is generated from our config: a user's ``deepspeed:`` block may only add keys that we do not own. Learning rate
and weights at rest stay ours. Facts about DeepSpeed 0.19 that shape this file are in docs/decisions.md.
"""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite import optim
from megatron_lite.config import Config
from megatron_lite.engine import StepStats
from megatron_lite.engine.torch_engine import TorchEngine
from megatron_lite.mesh import MegatronUnit, Mesh
from megatron_lite.plan import Plan

OWNED = {  # DeepSpeed's key: the key of ours that decides it
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_size and batch.micro_batch_size",
    "gradient_clipping": "optim.clip_grad",
    "optimizer": "optim",
    "scheduler": "schedule",
    "fp16": "precision",
    "bf16": "precision",
    "torch_autocast": "precision",
}


class DeepSpeedEngine(TorchEngine):
    """Model, loss and groups as in TorchEngine; reduction, sharding and, from ZeRO 1 on, clipping by DeepSpeed."""

    def _wrap(self, groups: list[dict[str, Any]], config: Config, plan: Plan) -> tuple[Any, Any]:
        deepspeed = import_deepspeed()
        optimizer = optim.build_optimizer(groups, config.optim)
        _ensure_process_group(self.mesh)
        mpu = MegatronUnit(self.mesh) if self.mesh.tp.size > 1 else None
        settings = {"config": deepspeed_json(config, plan), "dist_init_required": False, "mpu": mpu}
        return deepspeed.initialize(model=self.module, optimizer=optimizer, **settings)[0], optimizer

    def _micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        self.wrapped.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def _backward(self, loss: Tensor) -> None:
        self.wrapped.backward(loss, scale_wrt_gas=False)  # it averages over ranks as DDP does; no scaling of its own

    def step(self, lr: float) -> StepStats:
        """See Engine.step. From ZeRO 1 on the norm is known after the update, so a non-finite one is only reported."""
        optim.set_learning_rate(self.wrapped.optimizer.param_groups, lr)
        # at stage 0 DeepSpeed clips and forgets the norm; gradients are reduced by now, so we clip ourselves
        norm = 0.0 if self.stage else optim.clip_grad_norm(self.module, self.clip_grad, self.mesh.tp)
        if math.isfinite(norm):
            self.wrapped.step()
        norm = float(self.wrapped.get_global_grad_norm()) if self.stage else norm
        return StepStats(norm, skipped=not math.isfinite(norm))

    def state_dict(self) -> dict[str, Tensor]:
        """See Engine.state_dict: ZeRO's partitions are gathered parameter by parameter into logical tensors."""
        if self.stage == 0:
            return super().state_dict()
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_partitions()
        steps = [s["step"] for s in self.optimizer.state.values() if "step" in s]
        out = {"step": torch.as_tensor(steps[0] if steps else 0.0).detach().float().cpu().reshape(())}
        for name, param in self.module.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                # every rank sends its partition of this parameter and receives the whole
                out[f"{moment}/{name}"] = safe_get_full_optimizer_state(param, moment)
        return out

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See Engine.load_state_dict. The module's parameters must already hold the checkpoint's weights."""
        if self.stage == 0:
            super().load_state_dict(state)
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for group in self.optimizer.param_groups:
            for flat in group["params"]:  # ZeRO replaced the parameters by its flat partitions
                zeros = {moment: torch.zeros_like(flat) for moment in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[flat] = {"step": state["step"].clone().to(flat.device), **zeros}
        self._link_partitions()
        for name, param in self.module.named_parameters():
            safe_set_full_fp32_param(param, param.data)
            for moment in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(param, state[f"{moment}/{name}"].to(param.device), moment)

    def close(self) -> None:
        """See Engine.close: DeepSpeed calls its groups by name and holds none."""

    def _link_partitions(self) -> None:
        # 0.19.8 links the first parameter group only when it does so by itself; asked again, it links them all
        self.wrapped.optimizer._hp_optimizer_states_linked = False
        self.wrapped.optimizer._lazy_init_hp_params_optimizer_state()


def import_deepspeed() -> Any:
    """The deepspeed module, quiet, with its JIT-built CPU op left out; ValueError with the way to install it."""
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        way_out = "install it after torch: pip install --no-build-isolation 'megatron_lite[deepspeed]'"
        raise ValueError(f"engine: deepspeed cannot be imported ({error}); {way_out}") from None
    # serves inference only, takes half a minute to build, and an interrupted build hangs every later run
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    return deepspeed


def deepspeed_json(config: Config, plan: Plan) -> dict[str, Any]:
    """DeepSpeed's settings from ours, plus the user's extra keys; ValueError for a key that we own."""
    extra = config.deepspeed
    for key in extra:
        if key in OWNED:
            raise ValueError(
                f"deepspeed.{key}: set {OWNED[key]} instead; DeepSpeed's JSON is generated from our config"
            )
    zero = dict(extra.get("zero_optimization", {}))
    if "stage" in zero:
        raise ValueError("deepspeed.zero_optimization.stage: set parallel.zero_stage instead")
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro_batch_size,
        "gradient_accumulation_steps": plan.grad_accum_steps,
        "gradient_clipping": config.optim.clip_grad if plan.zero_stage else 0.0,
        "zero_optimization": {**zero, "stage": plan.zero_stage},
        "zero_allow_untested_optimizer": True,
        # offloaded moments: torch's fused AdamW needs no build of minutes, and DeepSpeed's is 5 to 8 % faster
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    if plan.precision == "bf16":
        ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return {**extra, **ours}


def _ensure_process_group(mesh: Mesh) -> None:
    """DeepSpeed wants a process group and LOCAL_RANK even for a single process."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        backend = "nccl" if mesh.device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
