"""(weights, seed, i) -> (domain, sample): exact quotas window by window, and a keyed shuffle inside each window.

The loader's window is the global batch, so every optimizer step starts and ends on an exact quota (quota.py). The
shuffle inside a window keeps a data-parallel rank from seeing only some domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt

from megatron_lite.data.keys import key_of
from megatron_lite.data.quota import QuotaTree

WINDOW = 1024  # samples between two exact quotas where no batch size is given
MAX_SAMPLES = 1 << 48  # far below 2^53, so that counts are exact as doubles


class Blend:
    """The order in which domains are drawn. Weight 0 is never drawn. Pure: nothing depends on what was drawn before."""

    def __init__(
        self,
        weights: Sequence[float] | npt.NDArray[np.float64],
        seed: int,
        kernels: ModuleType,
        window: int = WINDOW,
        owed: npt.NDArray[np.float64] | None = None,
        first_step: int = 0,
    ):
        """`owed`: samples that each domain should have had and has not, from stages before; `first_step` is theirs."""
        assert window >= 1
        self.window = window
        array = np.asarray(weights, dtype=np.float64)
        if array.ndim != 1 or not np.isfinite(array).all() or (array < 0).any() or array.sum() <= 0:
            raise ValueError(f"blend weights {array.tolist()}: expected finite numbers >= 0 with a positive sum")
        self.num_domains = len(array)
        self.domains = np.flatnonzero(array).astype(np.int32)  # of each leaf of the tree
        debts = None if owed is None else owed[self.domains].tolist()
        self.tree = QuotaTree.build(array[self.domains].tolist(), debts)
        self.key = key_of(seed, "blend", *([first_step] if first_step else []))  # no two stages start alike
        self._kernels = kernels

    def draw(self, start: int, count: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Samples start .. start + count - 1: their domain [count] and their ordinal within it [count].

        Over any prefix the ordinals of a domain are 0, 1, 2, ... in order, each once.
        """
        assert start >= 0 and count >= 0 and start + count <= MAX_SAMPLES
        leaf, ordinal = self._kernels.draw(self.tree, self.key, start, count, self.window)
        return self.domains[leaf], ordinal

    def counts(self, consumed: int) -> npt.NDArray[np.int64]:
        """Samples of each domain among the first `consumed` [num_domains]."""
        assert 0 <= consumed <= MAX_SAMPLES
        edge = consumed // self.window * self.window
        found = np.zeros(self.num_domains, dtype=np.int64)
        found[self.domains] = self._kernels.counts(self.tree, np.array([edge]))[0]
        return found + np.bincount(self.draw(edge, consumed - edge)[0], minlength=self.num_domains)
