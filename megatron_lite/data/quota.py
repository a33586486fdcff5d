"""How many of the first n samples each domain gets: exact to 1.5 samples, for any n at once, with no state kept.

A binary tree over the domains: each node gives its light child floor(share * n + 1/2) of its n samples and its heavy
child the rest. Both grow with n, so counts never go back, and any n costs O(domains). A rounding is off by at most 1/2,
and what reaches a leaf from a node above is scaled by leaf weight / node weight; `QuotaTree.build` keeps the sum of
those ratios below 3, so a count is within 1.5 of weight * n. Webster's method, the usual choice, drifts by dozens where
many small weights are equal: all of their turns come at once.

Where a blend starts with debts (a stage after others: what each domain is owed, in samples), a node rounds up from
another fraction than 1/2, so that what its light child is owed beyond its share is paid, at most half a sample a node.
A rounding is then off by less than 1, and a count within 3 of weight * n for any debts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LARGEST = 1 - 2.0**-20  # of round_up: below 1, so that no sample of none is given, whatever the rounding of doubles


@dataclass(frozen=True, eq=False)
class QuotaTree:
    """Nodes 0..num_leaves-1 are leaves, the last is the root; the arrays list inner nodes from the root down."""

    num_leaves: int
    nodes: npt.NDArray[np.int32]
    light: npt.NDArray[np.int32]  # the child with the smaller weight
    heavy: npt.NDArray[np.int32]
    share: npt.NDArray[np.float64]  # light weight / node weight, at most 1/2
    round_up: npt.NDArray[np.float64]  # the light child gets floor(share * n + round_up); 1/2 without debts, below 1

    @classmethod
    def build(cls, weights: Sequence[float], owed: Sequence[float] | None = None) -> QuotaTree:
        """Pair nodes whose weights have the same power of two, smallest first; park the one left over.

        A parked node joins a later leftover only if it weighs at least half as much: beside a much lighter sibling a
        leaf would be rounded twice at full weight. The parked ones are joined last, from the lightest up.
        """
        total, children = list(weights), [(-1, -1)] * len(weights)
        by_power: dict[int, list[int]] = {}
        parked: list[int] = []

        def join(a: int, b: int) -> int:
            total.append(total[a] + total[b])
            children.append((a, b) if total[a] <= total[b] else (b, a))
            return len(total) - 1

        def place(node: int) -> None:
            by_power.setdefault(math.frexp(total[node])[1], []).append(node)

        for leaf in range(len(weights)):
            place(leaf)
        while by_power:
            power = min(by_power)
            nodes = sorted(by_power.pop(power), key=lambda node: total[node])
            for a, b in zip(nodes[0::2], nodes[1::2], strict=False):
                place(join(a, b))
            if len(nodes) % 2 == 0:
                continue
            left = nodes[-1]
            if parked and 2 * total[parked[-1]] >= total[left]:
                left = join(parked.pop(), left)
            if math.frexp(total[left])[1] > power:
                place(left)
            else:
                parked.append(left)
        root = parked[0]
        for node in parked[1:]:
            root = join(root, node)
        inner = np.arange(len(total) - 1, len(weights) - 1, -1, dtype=np.int32)
        light, heavy = (np.array([children[node][side] for node in inner], dtype=np.int32) for side in (0, 1))
        share = np.array([total[child] / total[node] for node, child in zip(inner, light, strict=True)])
        round_up = np.full(len(inner), 0.5)
        if owed is not None:
            debt = [*owed, *([0.0] * len(inner))]
            for node in range(len(weights), len(total)):
                debt[node] = sum(debt[child] for child in children[node])
            beyond = [debt[child] - part * debt[node] for node, child, part in zip(inner, light, share, strict=True)]
            round_up = np.clip(0.5 + np.array(beyond), 0.0, LARGEST)
        return cls(len(weights), inner, light, heavy, share.astype(np.float64), round_up)
