"""Have proxies learned more than how frequent tokens are? Below that their losses say little of a larger model's."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from megatron_lite.data.indexed import IndexedDataset
from regmix_search.goals import parse_goal
from regmix_search.search import Search
from regmix_search.tables import Runs


def unigram_entropy(tokens: npt.NDArray[np.integer]) -> float:
    """Nats per token of the best model that knows frequencies alone, with Miller and Madow's correction for few."""
    counts = np.bincount(tokens)
    counts = counts[counts > 0]
    shares = counts / counts.sum()
    return float(-(shares @ np.log(shares)) + (len(counts) - 1) / (2 * counts.sum()))


def unigram_doubts(search: Search, runs: Runs) -> list[str]:
    """A warning for each loss of the goal on which half of the runs or more are no better than token frequencies."""
    goal, valid = parse_goal(search.config.fit.target, runs.losses), search.inventory.valid
    return [warning for name in goal.shares if name in valid for warning in _doubt(search, runs, name)]


def _doubt(search: Search, runs: Runs, name: str) -> Iterable[str]:
    scored = IndexedDataset(search.inventory.valid[name].prefix).tokens[: search.config.proxy.eval.max_tokens]
    entropy, losses = unigram_entropy(scored), runs.losses[name]
    if np.median(losses) >= entropy:
        yield (
            f"{name}: {np.mean(losses >= entropy):.0%} of the proxies score {entropy:.3f} nats or worse, which token "
            "frequencies alone reach: what differs between them says little of a larger model; train them longer"
        )
