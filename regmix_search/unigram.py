"""Have proxies learned more than how frequent tokens are? Below that their losses say little of a larger model's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from megatron_lite.data.indexed import IndexedDataset
from regmix_search.goals import parse_goal
from regmix_search.search import Search
from regmix_search.space import FloatArray
from regmix_search.tables import Runs

MOST = 1_000_000  # tokens of a domain that are counted; more would move the third digit

Tokens = npt.NDArray[np.integer]


def mixed_frequencies(domains: Mapping[str, Tokens], shares: Mapping[str, float], vocab_size: int) -> FloatArray:
    """How often each token id [vocab_size] comes in a mixture; one that never comes counts as once in all that was."""
    mixed, seen = np.zeros(vocab_size), 0
    for name, tokens in domains.items():
        mixed += shares[name] * np.bincount(tokens, minlength=vocab_size)[:vocab_size] / len(tokens)
        seen += len(tokens)
    mixed = np.maximum(mixed, 1 / seen)
    result: FloatArray = mixed / mixed.sum()
    return result


def unigram_loss(tokens: Tokens, frequencies: FloatArray) -> float:
    """Nats per token of the model that knows these frequencies alone."""
    return float(-np.log(frequencies)[tokens].mean())


def unigram_doubts(search: Search, runs: Runs) -> list[str]:
    """A warning for each loss of the goal on which half of the runs or more are no better than token frequencies."""
    goal, valid = parse_goal(search.config.fit.target, runs.losses), search.inventory.valid
    names = [name for name in goal.shares if name in valid]
    if not names:
        return []
    most = search.config.proxy.eval.max_tokens
    scored = {name: np.asarray(IndexedDataset(valid[name].prefix).tokens[:most]) for name in names}
    sizes, _ = search.inventory.usable(search.config.mixtures.domains, search.sample_tokens)
    texts = {name: IndexedDataset(search.inventory.train[name].prefix).tokens[:MOST] for name in sizes}
    vocab_size = 1 + max(int(tokens.max()) for tokens in [*texts.values(), *scored.values()])
    shares = {name: size / sum(sizes.values()) for name, size in sizes.items()}
    frequencies = mixed_frequencies(texts, shares, vocab_size)
    return [w for name in names for w in _doubt(name, runs.losses[name], unigram_loss(scored[name], frequencies))]


def _doubt(name: str, losses: FloatArray, frequent: float) -> Iterable[str]:
    if np.median(losses) >= frequent:
        yield (
            f"{name}: {np.mean(losses >= frequent):.0%} of the proxies score {frequent:.3f} nats or worse, which the "
            "token frequencies of all training text reach alone: what differs between them says little of a larger "
            "model; train them longer"
        )
