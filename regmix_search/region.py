"""The mixtures that bounds allow: what a domain, or several together, may have at least and at most.

A bound is text: `web=0.1..0.5`, `code=..0.2`, `math=0.05` (fixed), `books=0` (left out), `web+pdf=0.3..` (together).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog, minimize

from megatron_lite.schema import nearest
from regmix_search.space import FloatArray, Space, bound

SLACK = 1e-9  # float64 noise of adding up shares
PROJECTED = 32  # mixtures outside that are moved exactly; more are many starts, and need only be inside
VERTICES = 64  # corners of a region with groups, from which its inside is sampled


@dataclass(frozen=True, eq=False)
class Group:
    """Domains whose weights together stay between two bounds."""

    members: FloatArray  # [k] 1 for a member, 0 for the others
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Region:
    """low <= w <= high, groups within their bounds, sum 1. Never empty: `build_region` checks."""

    low: FloatArray  # [k]
    high: FloatArray  # [k]
    groups: tuple[Group, ...] = field(default=())

    @property
    def is_capped_simplex(self) -> bool:
        """Only upper bounds: what the laws solve by bisection."""
        return not self.groups and not self.low.any()

    def holds(self, weights: FloatArray, slack: float = SLACK) -> bool:
        """Is this mixture [k] in the region, up to `slack`?"""
        inside = np.all(weights >= self.low - slack) and np.all(weights <= self.high + slack)
        groups = all(g.low - slack <= g.members @ weights <= g.high + slack for g in self.groups)
        return bool(inside and groups and abs(weights.sum() - 1) <= slack)

    def without(self, domains: npt.NDArray[np.bool_]) -> Region:
        """The same with these domains (mask [k]) at most at their lower bound. It may be empty."""
        return replace(self, high=np.where(domains, self.low, self.high))

    def known_only(self, sample: FloatArray) -> Region:
        """The region without domains that no run used: no loss says what they do. Itself if bounds need them."""
        rest = self.without(sample.max(axis=0) <= 0)
        return self if rest.is_empty() else rest

    def lift_caps(self, caps: FloatArray) -> Region:
        """The region without the caps: upper bounds that are just the caps become 1, all other bounds stay."""
        return replace(self, high=np.where(self.high == caps, 1.0, self.high))

    def is_empty(self) -> bool:
        """Does no mixture obey all bounds?"""
        if not self.groups:
            return bool(np.any(self.low > self.high) or self.low.sum() > 1 + SLACK or self.high.sum() < 1 - SLACK)
        return self._corner(np.zeros(len(self.low))) is None

    def cheapest(self, costs: FloatArray) -> FloatArray:
        """The mixture [k] of lowest linear cost."""
        if not self.groups:
            weights, left = self.low.copy(), 1 - float(self.low.sum())
            for i in np.argsort(costs, kind="stable"):  # fill the cheapest domain, then the next
                step = min(self.high[i] - self.low[i], left)
                weights[i], left = weights[i] + step, max(0.0, left - step)
            return weights
        corner = self._corner(costs)
        assert corner is not None, "the region is empty"
        return corner

    def pull_in(self, rows: FloatArray) -> FloatArray:
        """Each mixture [n, k] moved into the region: scaled under its caps; for groups, towards mixtures inside."""
        room = 1 - float(self.low.sum())
        width = self.high - self.low
        extra = np.where(width > 0, np.maximum(rows - self.low, 0.0), 0.0)
        short = np.where(extra > 0, width, 0.0).sum(axis=1) < room  # the domains in use cannot hold it all
        extra[short] += 1e-9 * width
        moved = self.low + (bound(extra, width / room) * room if room > SLACK else np.zeros_like(extra))
        if not self.groups:
            return moved
        inside = np.array([self.holds(row) for row in moved])
        moved[~inside] = self._nearby(moved[~inside])
        return moved

    def sample(self, count: int, rng: np.random.Generator) -> FloatArray:
        """Mixtures [count, k] all over the region, corners included: Dirichlet draws, or mixes of corners."""
        k = len(self.low)
        if not self.groups:
            draws = np.vstack([rng.dirichlet(np.full(k, s), size=-(-count // 3)) for s in (0.1, 0.5, 2.0)])
            return self.pull_in(draws[:count])
        corners = self._corners(rng)
        shares = rng.dirichlet(np.full(len(corners), 4 / len(corners)), size=count)
        return np.asarray(shares @ corners)

    def _corners(self, rng: np.random.Generator) -> FloatArray:
        found = [self._corner(rng.normal(size=len(self.low))) for _ in range(VERTICES)]
        return np.unique(np.round([corner for corner in found if corner is not None], 12), axis=0)

    def _nearby(self, rows: FloatArray) -> FloatArray:
        """Mixtures inside, near rows [n, k] outside: the nearest for a few rows, the nearest of a sample for many."""
        pool = self.sample(256, np.random.default_rng(0))
        near = np.array([pool[int(np.argmin(np.abs(pool - row).sum(axis=1)))] for row in rows]).reshape(rows.shape)
        if len(rows) > PROJECTED:
            return near
        return np.array([self._project(row, start) for row, start in zip(rows, near, strict=True)]).reshape(rows.shape)

    def _project(self, row: FloatArray, start: FloatArray) -> FloatArray:
        """The mixture inside at the least Euclidean distance from a row [k]; `start` when SLSQP does not find it."""
        matrix, limits = self.rows()
        assert matrix is not None and limits is not None
        rules = [
            {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones_like(w)},
            {"type": "ineq", "fun": lambda w: limits - matrix @ w, "jac": lambda w: -matrix},
        ]
        found = minimize(
            lambda w: 0.5 * np.sum((w - row) ** 2),
            start,
            jac=lambda w: w - row,
            bounds=list(zip(self.low, self.high, strict=True)),
            constraints=rules,
            method="SLSQP",
            options={"ftol": 1e-14},
        )
        weights = np.clip(found.x, self.low, self.high)
        return weights if self.holds(weights) else start

    def _corner(self, costs: FloatArray) -> FloatArray | None:
        matrix, limits = self.rows()
        equal = {"A_eq": np.ones((1, len(self.low))), "b_eq": [1.0]}
        box = list(zip(self.low, self.high, strict=True))
        if np.any(self.low > self.high):
            return None
        found = linprog(costs, matrix, limits, **equal, bounds=box, method="highs")
        return np.clip(found.x, self.low, self.high) if found.status == 0 else None

    def rows(self) -> tuple[FloatArray | None, FloatArray | None]:
        """The groups as A w <= b: (A [2g, k], b [2g]); (None, None) without groups."""
        if not self.groups:
            return None, None
        signs = [(sign * g.members, sign * limit) for g in self.groups for sign, limit in ((1, g.high), (-1, g.low))]
        return np.array([row for row, _ in signs]), np.array([limit for _, limit in signs])


@dataclass(frozen=True, eq=False)
class _Limit:
    """One half of a bound, as the user would name it."""

    text: str
    members: FloatArray
    low: float
    high: float


def build_region(space: Space, bounds: Sequence[str] = ()) -> Region:
    """The caps of a space and the user's bounds. ValueError naming the bounds that contradict each other."""
    k = len(space.domains)
    limits = [
        _Limit(f"{name}'s cap of {cap:.4g}{_why(space)}", row, -math.inf, cap)
        for name, cap, row in zip(space.domains, space.caps, np.eye(k), strict=True)
        if cap < 1
    ]
    for text in bounds:
        limits += _parse(text, space.domains)
    region = _assemble(limits, k)
    if region.is_empty():
        raise ValueError(f"no mixture obeys all bounds; these contradict each other: {_culprits(limits, k)}")
    return region


def fixed_domains(bounds: Sequence[str]) -> list[str]:
    """Domains whose weight a bound fixes."""
    parts = [text.partition("=") for text in bounds]
    return [name.strip() for name, _, value in parts if "+" not in name and ".." not in value]


def _why(space: Space) -> str:
    return f" ({space.max_epochs:g} epochs of its text)" if space.max_epochs and space.tokens is not None else ""


def _parse(text: str, domains: tuple[str, ...]) -> list[_Limit]:
    names, found, value = text.partition("=")
    low, between, high = value.partition("..")
    try:
        ends = (float(low or 0), float(high or 1)) if between else (float(value), float(value))
    except ValueError:
        ends = (math.nan, math.nan)
    if not found or not (0 <= ends[0] <= 1 and 0 <= ends[1] <= 1):
        raise ValueError(f"bound {text!r}: write NAME=LOW..HIGH, NAME=WEIGHT or A+B=LOW..HIGH, with weights in 0..1")
    if ends[0] > ends[1]:
        raise ValueError(f"bound {text!r} contradicts itself: {ends[0]:g} is above {ends[1]:g}")
    members = np.zeros(len(domains))
    for name in (part.strip() for part in names.split("+")):
        if name not in domains:
            raise ValueError(f"bound {text!r}: there is no domain {name!r}.{nearest(name, domains)}")
        members[domains.index(name)] = 1
    lower = [_Limit(f"{text} (at least {ends[0]:g})", members, ends[0], math.inf)] if ends[0] > 0 else []
    return [*lower, *([_Limit(f"{text} (at most {ends[1]:g})", members, -math.inf, ends[1])] if ends[1] < 1 else [])]


def _assemble(limits: Sequence[_Limit], k: int) -> Region:
    low, high, groups = np.zeros(k), np.ones(k), dict[tuple[float, ...], Group]()
    for limit in limits:
        if limit.members.sum() == 1:
            i = int(np.argmax(limit.members))
            low[i], high[i] = max(low[i], limit.low), min(high[i], limit.high)
        else:
            key = tuple(limit.members)
            old = groups.get(key, Group(limit.members, 0.0, 1.0))
            groups[key] = Group(limit.members, max(limit.low, old.low), min(limit.high, old.high))
    return Region(low, high, tuple(groups.values()))


def _culprits(limits: list[_Limit], k: int) -> str:
    """A smallest set of bounds that no mixture obeys: any one of them given up would do."""
    needed = list(limits)
    for limit in limits:
        rest = [other for other in needed if other is not limit]
        if _assemble(rest, k).is_empty():
            needed = rest
    return "; ".join(limit.text for limit in needed) + "; and weights sum to 1"
