"""What a search minimises: one loss, a weighted mean of several, or the worst of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_lite.schema import nearest
from regmix_search.space import FloatArray

METRIC_PREFIX = "metric/"  # RegMix's column of a loss: metric/<name>_val_loss
METRIC_SUFFIX = "_val_loss"


@dataclass(frozen=True)
class Goal:
    """A number to minimise, made of losses. `shares` sum to 1; of the worst loss they are all equal."""

    shares: dict[str, float]
    worst: bool = False  # the largest of the losses instead of their mean
    name: str = ""  # mean or worst, when it was asked for by that word

    def of(self, columns: Mapping[str, Any]) -> FloatArray:
        """The goal [n] from a column [n] for each of its losses."""
        rows = np.array([np.asarray(columns[name], dtype=np.float64) for name in self.shares])
        return np.asarray(rows.max(axis=0) if self.worst else np.array(list(self.shares.values())) @ rows)

    def deviation(self, columns: Mapping[str, Any]) -> FloatArray:
        """The goal's standard deviation [n] from one of each of its losses, taken as independent; the largest's."""
        if self.worst:
            return self.of(columns)
        spread = np.array([share * np.asarray(columns[name], dtype=np.float64) for name, share in self.shares.items()])
        return np.asarray(np.sqrt(np.sum(spread**2, axis=0)))

    def to_json(self) -> str | dict[str, float]:
        """What fit.json and optimum.json call their target: a name, the word it was asked for by, or shares by name."""
        if self.name:
            return self.name
        return next(iter(self.shares)) if len(self.shares) == 1 else self.shares


def parse_goal(target: str | Mapping[str, float] | Goal, known: Iterable[str]) -> Goal:
    """A name, `a=0.5,b=0.5`, `mean` or `worst` (of all `known` losses), or {name: share}.

    A name may be a column as RegMix writes it (metric/x_val_loss), or the end of one name only (pile_cc for
    the_pile_pile_cc). A loss called `mean` or `worst` wins over the word. ValueError names what is unknown.
    """
    known = list(known)
    if isinstance(target, Goal):
        return target
    if isinstance(target, str) and target in ("mean", "worst") and target not in known:
        return Goal({name: 1 / len(known) for name in known}, target == "worst", target)
    terms = _parse_terms(target) if isinstance(target, str) else dict(target)
    shares: dict[str, float] = {}
    for name, share in terms.items():
        if not (isinstance(share, int | float) and share >= 0 and math.isfinite(share)):
            raise ValueError(f"target {name!r} has weight {share}: it must be a number, 0 or above")
        full = find_loss(name, known)
        if full in shares:
            raise ValueError(f"target {target!r} names {full} twice; give each loss one weight")
        shares[full] = float(share)
    total = math.fsum(shares.values())
    if not total > 0:
        raise ValueError(f"target {target!r}: give at least one loss a weight above 0")
    return Goal({name: share / total for name, share in shares.items() if share > 0})


def find_loss(name: str, known: Iterable[str]) -> str:
    """The one known loss that `name` means. ValueError when there is none, or more than one."""
    known = list(known)
    bare = name.strip().removeprefix(METRIC_PREFIX).removesuffix(METRIC_SUFFIX)
    if name in known or bare in known:
        return name if name in known else bare
    ends = [loss for loss in known if loss.endswith(("_" + bare, "/" + bare))]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise ValueError(f"target {name!r} may mean {', '.join(ends)}; write one of them out")
    raise ValueError(f"target {name!r} is not among the losses.{nearest(name, known)} (or mean, worst, a=0.5,b=0.5)")


def _parse_terms(text: str) -> dict[str, float]:
    if "=" not in text and "," not in text:
        return {text: 1.0}
    terms: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        try:
            terms[name.strip()] = float(share)
        except ValueError:
            raise ValueError(f"target {text!r}: {part!r} is not NAME=WEIGHT, as in a=0.5,b=0.5") from None
    return terms
