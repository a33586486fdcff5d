"""Domains whose ratio is kept, as one virtual domain: fewer numbers to search, and the same real mixtures.

A reduced mixture r [m] has the virtual domain first, then the free ones; a real one w [k] has all domains. Outside,
mixtures stay real: proxies train on them and surrogates are fitted to them; only drawing and solving are reduced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from regmix_search.objective import TINY, Objective
from regmix_search.region import Region, build_region
from regmix_search.space import FloatArray, Space
from regmix_search.surrogates import Surrogate
from regmix_search.tables import Runs

KEPT = "kept"  # what the virtual domain is called where it is shown
SLACK = 1e-9  # float64 noise of a few hundred products


@dataclass(frozen=True, eq=False)
class Reduction:
    """Real domains, and the ratio in which some of them always stay."""

    domains: tuple[str, ...]  # [k] all real domains
    ratios: Mapping[str, float]  # kept domain -> its share of the virtual domain; they sum to 1

    def __post_init__(self) -> None:
        assert set(self.ratios) <= set(self.domains) and abs(sum(self.ratios.values()) - 1) < SLACK, self.ratios
        assert len(self.ratios) < len(self.domains), "nothing is left to search"

    @property
    def free(self) -> tuple[str, ...]:
        """The domains that are searched one by one."""
        return tuple(name for name in self.domains if name not in self.ratios)

    @property
    def matrix(self) -> FloatArray:
        """[m, k]: a row for each reduced domain, the real weights that it stands for."""
        kept = np.array([self.ratios.get(name, 0.0) for name in self.domains])
        return np.vstack([kept, *(np.eye(len(self.domains))[self.domains.index(name)] for name in self.free)])

    def expand(self, reduced: FloatArray) -> FloatArray:
        """Real mixtures [..., k] of reduced ones [..., m]."""
        return np.asarray(reduced @ self.matrix)

    def reduce(self, weights: FloatArray) -> FloatArray:
        """Reduced mixtures [..., m] of real ones [..., k]: kept domains are added up, whatever their ratio."""
        kept = [self.domains.index(name) for name in self.ratios]
        free = [self.domains.index(name) for name in self.free]
        return np.concatenate([weights[..., kept].sum(axis=-1, keepdims=True), weights[..., free]], axis=-1)

    def holds(self, weights: FloatArray, slack: float = SLACK) -> bool:
        """Are the kept domains of a real mixture [k] in their ratio, up to `slack`?"""
        return bool(np.all(np.abs(self.expand(self.reduce(weights)) - weights) <= slack))

    def space(self, real: Space) -> Space:
        """The reduced space: tokens, prior and caps of the virtual domain and of the free ones.

        The virtual domain may have as much as its scarcest member allows, min over j of max_epochs tokens_j / (ratio_j
        target_tokens) (Olmix), and its tokens are what it gives at one epoch of that member. ValueError names the
        member when no mixture is left.
        """
        limits = {name: real.named(real.caps)[name] / share for name, share in self.ratios.items() if share > 0}
        scarce = min(limits, key=lambda name: limits[name])
        caps = np.append(min(1.0, limits[scarce]), [real.named(real.caps)[name] for name in self.free])
        if caps.sum() < 1 - SLACK:
            raise ValueError(
                f"the kept domains may have {caps[0]:.4g} together, {scarce} is the scarcest of them, and the others "
                f"{caps[1:].sum():.4g}: no mixture obeys all caps. Add {scarce} to reuse.free, or lower target_tokens"
            )
        tokens = None
        if real.tokens is not None:
            held = real.named(real.tokens)
            whole = min(held[name] / share for name, share in self.ratios.items() if share > 0)
            tokens = np.append(whole, [held[name] for name in self.free])
        ends = (real.target_tokens, real.max_epochs)
        return Space((KEPT, *self.free), tokens, self.reduce(real.prior), caps, *ends)

    def region(self, real: Space, bounds: Sequence[str] = ()) -> Slice:
        """The real mixtures in this ratio that obey caps and bounds. ValueError for a bound on a kept domain."""
        for text in bounds:
            names = {part.strip() for part in text.partition("=")[0].split("+")}
            if fixed := sorted(names & set(self.ratios)):
                raise ValueError(f"bound {text!r}: {', '.join(fixed)} keep their ratio; add them to reuse.free")
        inside, matrix = build_region(self.space(real), bounds), self.matrix
        low, high = inside.low @ matrix, inside.high @ matrix
        return Slice(low, high, inside=inside, reduction=self, caps=self.space(real).caps)

    def reduced(self, objective: Objective) -> Objective:
        """An objective on real mixtures as one on reduced ones [m], of the same value (ratios are in the prior)."""
        prior = objective.prior
        if prior is not None:
            kept = np.array(list(self.ratios.values()))
            known = np.array([prior[self.domains.index(name)] for name in self.ratios])
            toward = float(np.exp(np.sum(kept * np.log(known / np.maximum(kept, TINY)))))
            prior = np.append(toward, [prior[self.domains.index(name)] for name in self.free])
        return replace(
            objective,
            terms=tuple((share, lift(model, self.matrix)) for share, model in objective.terms),
            ceilings=tuple((lift(model, self.matrix), limit) for model, limit in objective.ceilings),
            prior=prior,
        )


@dataclass(frozen=True, eq=False)
class Slice(Region):
    """The part of a region in which some domains keep their ratio. low and high are real, and not its only bounds."""

    inside: Region = field(kw_only=True)  # of reduced mixtures
    reduction: Reduction = field(kw_only=True)
    caps: FloatArray = field(kw_only=True)  # [m] of the reduced space

    @property
    def is_capped_simplex(self) -> bool:
        """Never: ratios are more than upper bounds."""
        return False

    def holds(self, weights: FloatArray, slack: float = SLACK) -> bool:
        """Is this real mixture [k] in the ratio and in the region, up to `slack`?"""
        return self.reduction.holds(weights, slack) and self.inside.holds(self.reduction.reduce(weights), slack)

    def is_empty(self) -> bool:
        """Does no mixture obey all bounds?"""
        return self.inside.is_empty()

    def cheapest(self, costs: FloatArray) -> FloatArray:
        """The mixture [k] of lowest linear cost."""
        return self.reduction.expand(self.inside.cheapest(self.reduction.matrix @ costs))

    def pull_in(self, rows: FloatArray) -> FloatArray:
        """Each mixture [n, k] moved into the region: its kept domains take their ratio, then as in any region."""
        return self.reduction.expand(self.inside.pull_in(self.reduction.reduce(rows)))

    def sample(self, count: int, rng: np.random.Generator) -> FloatArray:
        """Mixtures [count, k] all over the region, corners included."""
        return self.reduction.expand(self.inside.sample(count, rng))

    def known_only(self, sample: FloatArray) -> Slice:
        """The region without free domains that no run used."""
        return replace(self, inside=self.inside.known_only(self.reduction.reduce(sample)))

    def lift_caps(self, caps: FloatArray) -> Slice:
        """The region without the caps; the ratio stays."""
        return replace(self, inside=self.inside.lift_caps(self.caps))


@dataclass(frozen=True, eq=False)
class Lifted:
    """A surrogate of real mixtures, asked about reduced ones."""

    model: Surrogate
    matrix: FloatArray  # [m, k]

    @property
    def name(self) -> str:
        """The surrogate's own."""
        return self.model.name

    @property
    def is_convex(self) -> bool:
        """A convex law is one along any linear map too."""
        return bool(getattr(self.model, "is_convex", callable(getattr(self.model, "argmin", None))))

    def fit(self, weights: FloatArray, losses: FloatArray, seed: int = 0) -> Self:
        """Not fitted here: a surrogate learns from real mixtures."""
        raise AssertionError("fit the surrogate itself")

    def predict(self, weights: FloatArray) -> FloatArray:
        """Losses [n] of reduced mixtures [n, m]."""
        return self.model.predict(weights @ self.matrix)

    def deviation(self, weights: FloatArray) -> FloatArray:
        """Standard deviations [n] of what runs of reduced mixtures [n, m] would show."""
        return self.model.deviation(weights @ self.matrix)


class LiftedSmooth(Lifted):
    """The same with slopes."""

    def gradient(self, weights: FloatArray) -> FloatArray:
        """d loss / d reduced weights at [n, m], as [n, m]."""
        return np.asarray(self.model.gradient(weights @ self.matrix) @ self.matrix.T)  # type: ignore[attr-defined]


def today(model: Surrogate, runs: Runs) -> Surrogate:
    """A surrogate fitted to these runs as one of mixtures without text that is gone: of that they have 0."""
    k = len(runs.domains)
    return lift(model, np.eye(k - runs.gone, k)) if runs.gone else model


def lift(model: Surrogate, matrix: FloatArray) -> Lifted:
    """A surrogate of real mixtures as one of reduced mixtures [m]; with slopes where it has them."""
    return (LiftedSmooth if callable(getattr(model, "gradient", None)) else Lifted)(model, matrix)
