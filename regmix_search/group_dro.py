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

from megatron_lite.data.loader import Batch
from megatron_lite.engine import add_by_domain
from megatron_lite.evaluate import evaluate, token_losses
from megatron_lite.run import Run
from regmix_search.reference import open_reference

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
    """What a run with ``reweighting`` has beside its loop (megatron_lite/run.py, Reweighting).

    Another method is another excess, by domain and in nats: ``heldout_excess`` is dynamic batch loading's.
    """

    def __init__(self, run: Run) -> None:
        assert run.config.reweighting is not None
        self.config, self.names = run.config.reweighting, run.loader.names
        self.sampling: list[float] = run.mixture.weights.tolist()
        check(run)
        zeros, uniform = [0.0] * len(self.sampling), [1 / len(self.sampling)] * len(self.sampling)
        self.target = self.sampling if self.config.smooth_to == "sampling" else uniform
        self.state = DomainWeights(self.target, zeros)
        self.reference = open_reference(run) if self.config.reference else None
        self.last, self.window, self.warned = [zeros] * 3, [zeros] * 2, False  # of the step, since the last change

    @property
    def weights(self) -> dict[str, float]:
        """See Reweighting: the average."""
        return dict(zip(self.names, self.state.average, strict=True))

    def prepare(self, run: Run, micro_batches: Sequence[Batch]) -> None:
        """See Reweighting. Tokens are counted over the whole step first; in two_pass order losses are measured too."""
        if self.reference is not None:
            self.reference.attach(run, micro_batches)
        if self.config.sampling_every:
            return
        sums = torch.zeros(3, len(self.names), dtype=torch.float64, device=run.mesh.device)
        for batch in micro_batches:
            assert batch.reference_BT is not None
            losses_BT = batch.reference_BT  # lagged: only the tokens are asked for
            if self.config.update_order == "two_pass":
                losses_BT = token_losses(run.engine.forward, batch, run.mesh.device, run.engine.autocast)
            add_by_domain(sums, batch, losses_BT)
        _, tokens, excess = run.mesh.sum(sums).tolist()
        if self.config.update_order == "two_pass":
            self._update(tokens, excess)
        factors = loss_weights(self.state.weights, tokens, self.config.objective, self.sampling)
        for batch in micro_batches:
            batch.weight_B = torch.tensor(factors)[batch.domain_B]

    def observe(self, run: Run, sums_3D: Tensor) -> None:
        """See Reweighting. Updates the weights of the next step's loss, or now and then what is sampled."""
        every, self.last = self.config.sampling_every, sums_3D.tolist()
        if not every:
            if self.config.update_order == "lagged":
                self._update(*self.last[1:])
            return
        self.window = [
            [a + b for a, b in zip(*rows, strict=True)] for rows in zip(self.window, self.last[1:], strict=True)
        ]
        if run.step % every == 0 and run.step < run.plan.total_steps:
            self._update(*(heldout_excess(run, self.config.targets) if self.config.targets else self.window))
            self.window = [[0.0] * len(self.names)] * 2
            now = dict(zip(self.names, self.state.weights, strict=True))
            run.loader.change_mixture(run.step, run.mixture.with_weights(now))

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
        return {**asdict(self.state), "window": self.window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Reweighting."""
        self.window = state["window"]
        self.state = DomainWeights(state["weights"], state["total"], state["updates"])

    def _update(self, tokens: Sequence[float], excess: Sequence[float]) -> None:
        self.state = update(self.state, excess, tokens, self.config.eta, self.config.smoothing, self.target)


def heldout_excess(run: Run, targets: dict[str, float]) -> tuple[list[float], list[float]]:
    """(1 for each domain, held-out loss over its target): dynamic batch loading (Xia et al. 2023, algorithm 1).

    There weights are w * exp(max(loss - target, 0)), normalised: eta 1, smoothing 0, smooth_to sampling.
    """
    sets = [one for one in run.eval_sets if one.name in targets]
    found = evaluate(run.engine.forward, sets, run.mesh, run.engine.autocast)
    return [1.0] * len(targets), [max(found[name].loss - targets[name], 0.0) for name in run.loader.names]


def check(run: Run) -> None:
    """ValueError for settings that mean nothing together, or not with this mixture."""
    config, names, valid = run.config.reweighting, run.loader.names, {one.name for one in run.eval_sets}
    assert config is not None
    every, targets = config.sampling_every, config.targets
    named = targets.keys() == set(names) and valid.issuperset(names)
    capped = any(domain.max_epochs is not None for domain in run.mixture.domains)
    weighting = (config.objective, config.update_order) != ("group_mean", "lagged")
    for wrong, text in (
        (not config.eta > 0, f"eta={config.eta} must be above 0"),
        (not 0 <= config.smoothing < 1, f"smoothing={config.smoothing} must lie in [0, 1)"),
        (every < 0, f"sampling_every={every} must be at least 0"),
        (bool(config.reference) == bool(targets), "reference or targets: set the one or the other"),
        (targets and not every, "targets change what is sampled: set sampling_every"),
        (targets and not named, f"targets: name {', '.join(names)}, each with a validation set"),
        (every and weighting, "objective and update_order are of a weighted loss, sampling_every weights none"),
        (every and capped, "max_epochs: what sampling_every will draw is not known: take the caps out of the mixture"),
        (run.config.phases or min(run.mixture.weights) == 0, "remove phases, and domains of weight 0: all are drawn"),
    ):
        if wrong:
            raise ValueError(f"reweighting: {text}")


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
