"""DoReMi's proxy (Xie et al. 2023, algorithm 1): domains whose loss is far above a reference model's weigh more.

A domain's excess is the mean over its tokens of max(loss - reference's loss, 0), in nats. Log weights rise by eta times
it, are normalised and smoothed; the loss is the sum of weight * the domain's mean loss; the answer is the average of
the weights. Sums and means are over all ranks and micro-batches of a step, so layouts change nothing.
"""

from __future__ import annotations

import math
import sys
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lite.config import ReweightingConfig
from megatron_lite.data.loader import Batch
from megatron_lite.engine import add_by_domain
from megatron_lite.evaluate import token_losses
from megatron_lite.model import GPT
from megatron_lite.run import Run
from megatron_lite.tensor_parallel.shards import slicer
from megatron_lite.weights import initial_weights

ONE_HOT = 0.95  # a domain with more than this share has left nothing to the others


@dataclass(frozen=True)
class DomainWeights:
    """The whole state, by domain; JSON keeps it to the bit."""

    weights: list[float]  # they sum to 1
    total: list[float]  # the weights after each update, added up
    updates: int = 0

    @property
    def average(self) -> list[float]:
        """DoReMi's answer: the mean over all updates; before the first, the weights themselves."""
        return [x / self.updates for x in self.total] if self.updates else self.weights


def update(
    state: DomainWeights,
    excess: Sequence[float],
    tokens: Sequence[float],
    eta: float,
    smoothing: float,
    target: Sequence[float],
) -> DomainWeights:
    """One update of the weights.

    ``excess``: clipped excess in nats, summed over a domain's ``tokens``. A domain without tokens has no excess, as in
    group DRO (Sagawa et al. 2020): its ratio to others without excess stays. ``smoothing`` of ``target`` is mixed in.
    """
    means = mean_excess(excess, tokens)
    # a weight that smoothing=0 let fall to 0 stays there
    logs = [math.log(max(w, sys.float_info.min)) + eta * x for w, x in zip(state.weights, means, strict=True)]
    powers = [math.exp(x - max(logs)) for x in logs]
    scale = (1 - smoothing) / math.fsum(powers)
    weights = [scale * p + smoothing * u for p, u in zip(powers, target, strict=True)]
    return DomainWeights(weights, [a + b for a, b in zip(state.total, weights, strict=True)], state.updates + 1)


def mean_excess(excess: Sequence[float], tokens: Sequence[float]) -> list[float]:
    """Nats a token by domain; 0 where there is no token."""
    return [e / n if n else 0.0 for e, n in zip(excess, tokens, strict=True)]


def loss_weights(
    weights: Sequence[float], tokens: Sequence[float], objective: str, sampling: Sequence[float]
) -> list[float]:
    """Weight of a token's loss by domain, where the sum over tokens is divided by the number of all tokens.

    group_mean: sum of weight * mean loss, as in the paper. importance: as in its code, the mean of the losses weighted
    by weight / sampling weight, divided by the mean of those weights.
    """
    if objective == "importance":
        raw = [w / s for w, s in zip(weights, sampling, strict=True)]
        scale = sum(tokens) / math.fsum(r * n for r, n in zip(raw, tokens, strict=True))
        return [r * scale for r in raw]
    return [w * sum(tokens) / n if n else 0.0 for w, n in zip(weights, tokens, strict=True)]


class GroupDRO:
    """What a run with ``reweighting`` has beside its loop (megatron_lite/run.py, Reweighting)."""

    def __init__(self, run: Run) -> None:
        assert run.config.reweighting is not None
        self.config, self.names = run.config.reweighting, run.loader.names
        self.sampling: list[float] = run.mixture.weights.tolist()
        check(self.config, run.config.phases, self.sampling)
        uniform = [1 / len(self.sampling)] * len(self.sampling)
        self.target = self.sampling if self.config.smooth_to == "sampling" else uniform
        self.state = DomainWeights(self.target, [0.0] * len(uniform))
        self.reference = load_reference(run, self.config.reference)
        self.last, self.warned = [[0.0] * len(uniform)] * 3, False  # the last step's sums

    @property
    def weights(self) -> dict[str, float]:
        """See Reweighting: the average."""
        return dict(zip(self.names, self.state.average, strict=True))

    def prepare(self, run: Run, micro_batches: Sequence[Batch]) -> None:
        """See Reweighting. Tokens are counted over the whole step first; in two_pass order losses are measured too."""
        device, autocast = run.mesh.device, run.engine.autocast
        sums = torch.zeros(3, len(self.names), dtype=torch.float64, device=device)
        for batch in micro_batches:
            batch.reference_BT = here_BT = token_losses(self.reference, batch, device, autocast)
            if self.config.update_order == "two_pass":
                here_BT = token_losses(run.engine.forward, batch, device, autocast)
            add_by_domain(sums, batch, here_BT)
        _, tokens, excess = run.mesh.sum(sums).tolist()
        if self.config.update_order == "two_pass":
            self._update(tokens, excess)
        factors = loss_weights(self.state.weights, tokens, self.config.objective, self.sampling)
        for batch in micro_batches:
            batch.weight_B = torch.tensor(factors)[batch.domain_B]

    def observe(self, run: Run, sums_3D: Tensor) -> None:
        """See Reweighting. In lagged order the update that the next step's loss sees."""
        self.last = sums_3D.tolist()
        if self.config.update_order == "lagged":
            self._update(*self.last[1:])

    def values(self, run: Run) -> dict[str, float]:
        """See Reweighting. Asserts that all ranks have the same weights; warns once where one domain has them all."""
        mark, state = zlib.crc32(repr(self.state).encode()), self.state
        assert not run.mesh.any(run.mesh.from_main(mark) != mark), f"ranks differ in their weights: {state}"
        means = mean_excess(self.last[2], self.last[1])
        if max(state.weights) > ONE_HOT and not self.warned and run.mesh.is_main:
            self.warned = True
            size = run.config.batch.global_batch_size
            warnings.warn(collapse(self.names, state.weights, means, self.config.eta, size))
        found = {"weight": state.weights, "average": state.average, "excess": means}
        return {f"{key}/{name}": x for key, row in found.items() for name, x in zip(self.names, row, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """See Reweighting."""
        return asdict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Reweighting."""
        self.state = DomainWeights(**state)

    def _update(self, tokens: Sequence[float], excess: Sequence[float]) -> None:
        self.state = update(self.state, excess, tokens, self.config.eta, self.config.smoothing, self.target)


def check(config: ReweightingConfig, phases: Sequence[Any], sampling: Sequence[float]) -> None:
    """ValueError for settings that mean nothing here."""
    if not config.eta > 0 or not 0 <= config.smoothing < 1:
        raise ValueError(
            f"reweighting.eta={config.eta} must be above 0, reweighting.smoothing={config.smoothing} in [0, 1)"
        )
    if phases or min(sampling) == 0:
        raise ValueError("reweighting: every domain is drawn from start to end: remove phases and domains of weight 0")


def load_reference(run: Run, path: str) -> GPT:
    """The model of a run or step_* folder, in evaluation mode, cut as the run's is; its shape must be the run's."""
    model = GPT(run.plan.shape, 0, run.mesh.tp).requires_grad_(False).eval()
    whole, cut = initial_weights(path, run.plan.shape, "reweighting.reference"), slicer(model, run.mesh.tp)
    for name, param in model.named_parameters():
        param.copy_(cut(name, whole[name]))
    return model.to(run.mesh.device)


def collapse(
    names: Sequence[str], weights: Sequence[float], means: Sequence[float], eta: float, global_batch_size: int
) -> str:
    """Which domain has all the weight, and the setting to blame: a tiny batch, too large an eta, or the reference."""
    largest, factor = max(range(len(names)), key=lambda i: weights[i]), math.exp(eta * (max(means) - min(means)))
    cause = "reweighting.reference stays far better there than this model gets: train it on less of that domain"
    if global_batch_size < 4 * len(names):
        cause = (
            f"batch.global_batch_size={global_batch_size} is too small for {len(names)} domains: the excess is noise"
        )
    elif factor > 1.1:
        cause = f"reweighting.eta={eta} is too large: this step changed ratios of weights by up to {factor:.3g}"
    return f"reweighting: {names[largest]} has {weights[largest]:.1%} of the weight. {cause}"
