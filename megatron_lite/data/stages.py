"""Weights that change at a step: a list of stages, still a pure function of (stages, seed, i).

A stage is (first step, weights by domain name, seq_length). Each domain's ordinals go on from the counts of the stages
before, so nothing is lost or repeated; a domain that leaves and comes back goes on where it was. A stage also starts
with what each domain is owed, so that over any number of stages counts stay near the sum of weight * n: begun afresh,
every stage of a few samples would round a small weight the same way: drawn twice as often as it should be, or never.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

import numpy as np
import numpy.typing as npt

from megatron_lite.data.blend import Blend
from megatron_lite.data.megatron_order import MegatronBlend

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stage:
    """From `first_step` on domains are drawn with these weights. A name that a later stage leaves out has weight 0."""

    first_step: int
    weights: dict[str, float]  # they sum to 1; 0: never
    seq_length: int  # tokens a sample predicts

    @property
    def drawn(self) -> dict[str, float]:
        """The domains that are drawn at all."""
        return {name: weight for name, weight in self.weights.items() if weight > 0}


@dataclass(frozen=True, eq=False)
class _Part:
    """A stage, ready to draw. The arrays are by domain [domains known by then], as of the stage's first sample."""

    stage: Stage
    start: int  # the stage's first sample
    blend: Blend | MegatronBlend
    before: IntArray  # samples drawn, in units of this stage's seq_length
    tokens: IntArray
    owed: npt.NDArray[np.float64]  # samples


class StagedBlend:
    """The order of samples over all stages: `Blend`, stage after stage. Indices of domains never change."""

    def __init__(self, stages: Iterable[Stage], seed: int, kernels: ModuleType, window: int, earliest: int = 0) -> None:
        """`earliest`: samples before it are counted, never drawn: some of their domains may be gone."""
        self.earliest, self.window, self._seed, self._kernels = earliest, window, seed, kernels
        self.stages: tuple[Stage, ...] = ()  # by first step
        self.names: tuple[str, ...] = ()  # all domains as they first appear: what domain indices mean
        self._parts: list[_Part] = []
        for stage in stages:
            self.add(stage)

    def add(self, stage: Stage, blend: Blend | MegatronBlend | None = None) -> None:
        """One more stage, after all others. What was drawn before it stays as it was. `blend`: its own order."""
        assert stage.first_step > self._parts[-1].stage.first_step if self._parts else stage.first_step == 0
        start = stage.first_step * self.window
        self.stages, self.names = (*self.stages, stage), tuple(dict.fromkeys([*self.names, *stage.weights]))
        weights = np.array([stage.weights.get(name, 0.0) for name in self.names])
        tokens, owed = np.zeros(len(weights), dtype=np.int64), np.zeros(len(weights))
        if self._parts:
            last = self._parts[-1]
            drawn = last.blend.counts(start - last.start)
            tokens[: len(drawn)] = last.tokens + drawn * last.stage.seq_length
            target = np.array([last.stage.weights.get(name, 0.0) for name in self.names[: len(drawn)]])
            owed[: len(drawn)] = last.owed + target * (start - last.start) - drawn
        before = -(-tokens // stage.seq_length)
        blend = blend or Blend(weights, self._seed, self._kernels, self.window, owed, stage.first_step)
        self._parts.append(_Part(stage, start, blend, before, tokens, owed))

    def at(self, start: int) -> tuple[Blend | MegatronBlend, IntArray, int]:
        """The blend of sample `start`'s stage, each domain's first ordinal there, and the sample's place in it."""
        assert start >= self.earliest
        part = self._parts[bisect_right(self._parts, start, key=lambda part: part.start) - 1]
        return part.blend, part.before, start - part.start

    def draw(self, start: int, count: int) -> tuple[npt.NDArray[np.int32], IntArray]:
        """Samples start .. start + count - 1: their domain [count] and their ordinal within it [count]."""
        found, ends = [(np.zeros(0, np.int32), np.zeros(0, np.int64))], [part.start for part in self._parts[1:]]
        for begin, end in pairwise([start, *(end for end in ends if start < end < start + count), start + count]):
            blend, before, place = self.at(begin)
            domain, ordinal = blend.draw(place, end - begin)
            found.append((domain, before[domain] + ordinal))
        return np.concatenate([d for d, _ in found]), np.concatenate([o for _, o in found])

    def by_stage(self, consumed: int) -> list[tuple[Stage, IntArray]]:
        """Samples of each domain [domains] drawn in each stage that began, when `consumed` are drawn in all."""
        begun = [part for part in self._parts if part.start < consumed] or self._parts[:1]
        ends = [*(part.start for part in begun[1:]), consumed]
        drawn = [part.blend.counts(end - part.start) for part, end in zip(begun, ends, strict=True)]
        whole = [np.pad(counts, (0, len(self.names) - len(counts))) for counts in drawn]
        return [(part.stage, counts) for part, counts in zip(begun, whole, strict=True)]

    def counts(self, consumed: int) -> IntArray:
        """Samples of each domain among the first `consumed` [domains]."""
        return np.sum([drawn for _, drawn in self.by_stage(consumed)], axis=0)


def resumed_stages(old: Sequence[Stage], new: Sequence[Stage], step: int) -> list[Stage]:
    """What happened before `step`, as in `old`, and what `new` says from there on. Without a change that is `old`."""
    past = [stage for stage in old if stage.first_step < step]
    active = [stage for stage in new if stage.first_step <= step][-1]
    if not past or (active.drawn, active.seq_length) != (past[-1].drawn, past[-1].seq_length):
        past.append(Stage(step, active.weights, active.seq_length))
    return past + [stage for stage in new if stage.first_step > step]
