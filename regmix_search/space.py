"""The mixtures that are allowed: the simplex over domains, cut by caps on repetition. Bounding, sampling, controls."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
OverCap = Literal["reject", "project", "ignore"]

SUM_TOLERANCE = 1e-9  # float64 noise of adding up a few hundred shares
STRENGTHS = 15  # log-spaced Dirichlet strengths, as in RegMix's synthesize_mixture.py
DUPLICATE_L1 = 1e-5  # two mixtures closer than this are one: RegMix's threshold
BLOCK = 1024  # mixtures drawn from one generator, so that asking for more keeps those drawn before


@dataclass(frozen=True, eq=False)
class Space:
    """Domains and what bounds their weights. Arrays are in the order of `domains`.

    `tokens` may be None (nothing is known about repetition): then caps do not come from it and epochs are not reported.
    """

    domains: tuple[str, ...]
    tokens: FloatArray | None  # [k] tokens that exist
    prior: FloatArray  # [k] sums to 1: each domain's share of all tokens, unless the user gave another
    caps: FloatArray  # [k] largest weight each domain may have, in (0, 1]
    target_tokens: int | None  # budget R of the run that the mixture is for
    max_epochs: float | None  # how often a domain may be repeated in that run

    def __post_init__(self) -> None:
        k = len(self.domains)
        assert self.prior.shape == self.caps.shape == (k,), "prior and caps are one number a domain"
        if k < 2 or len(set(self.domains)) < k:
            raise ValueError(f"domains {list(self.domains)}: a mixture needs two or more different names")
        if not np.all(self.prior > 0) or abs(self.prior.sum() - 1) > SUM_TOLERANCE:
            raise ValueError(f"prior {self.named(self.prior)}: needs positive shares that sum to 1; drop empty domains")
        if not np.all((self.caps > 0) & (self.caps <= 1)):
            raise ValueError(f"caps {self.named(self.caps)}: each must be above 0 and at most 1")
        if self.caps.sum() < 1 - SUM_TOLERANCE:
            raise ValueError(self._infeasible())

    def _infeasible(self) -> str:
        text = f"caps {self.named(self.caps.round(4))} sum to {self.caps.sum():.4g}, below 1: no mixture obeys them"
        if self.tokens is None or not self.target_tokens or not self.max_epochs:
            return text + "; raise the caps"
        held = self.tokens.sum()
        # half of what there is leaves a choice: at the very limit the prior is the only mixture
        most, fits = held * self.max_epochs, held * min(self.max_epochs / 2, 2)
        return (
            f"{text}. {self.max_epochs:g} epochs of the {held:,.0f} tokens of {len(self.domains)} domains are "
            f"{most:,.0f}, but target_tokens is {self.target_tokens:,}, the length of the run that the mixture is for. "
            f"Lower target_tokens to your own (--set target_tokens={fits:.0f} reads all text {fits / held:.3g} times), "
            f"add text, or raise max_epochs (to {self.target_tokens / held:.3g} at least)"
        )

    def named(self, values: FloatArray) -> dict[str, float]:
        """One number a domain -> {domain: number}, for JSON and messages."""
        return {name: float(value) for name, value in zip(self.domains, values, strict=True)}

    def epochs(self, weights: FloatArray) -> dict[str, float]:
        """How often each domain is read in target_tokens under these weights; empty when token counts are unknown."""
        if self.tokens is None or self.target_tokens is None:
            return {}
        return self.named(weights * self.target_tokens / self.tokens)

    def to_json(self) -> dict[str, Any]:
        """The content of space.json."""
        return {
            "domains": list(self.domains),
            "tokens": None if self.tokens is None else {d: int(n) for d, n in self.named(self.tokens).items()},
            "prior": self.named(self.prior),
            "caps": self.named(self.caps),
            "target_tokens": self.target_tokens,
            "max_epochs": self.max_epochs,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Space:
        """Inverse of to_json. Raises ValueError naming a key that is missing."""
        try:
            domains = tuple(value["domains"])
            tokens, prior, caps = (
                None if value[key] is None else np.array([value[key][d] for d in domains], dtype=np.float64)
                for key in ("tokens", "prior", "caps")
            )
            assert prior is not None and caps is not None
            return Space(domains, tokens, prior, caps, value["target_tokens"], value["max_epochs"])
        except KeyError as error:
            raise ValueError(f"space.json: no {error.args[0]!r}; run `--stage mixtures` again") from None


def build_space(
    tokens: Mapping[str, int],
    target_tokens: int,
    max_epochs: float | None = 4.0,
    prior: Mapping[str, float] | None = None,
    maximum_usage: float | None = None,
) -> Space:
    """Space from token counts: cap = min(1, max_epochs * tokens / target_tokens), prior = shares of the tokens.

    max_epochs 4: Muennighoff et al. 2023 find repetition nearly free up to there; None: no cap from epochs.
    maximum_usage: RegMix's cap, a multiple of the prior (it uses 15), applied on top. ValueError with the numbers.
    """
    bad = {d: n for d, n in tokens.items() if not n > 0}
    if bad:
        raise ValueError(f"tokens {bad}: every domain needs some text; remove the empty ones")
    for name, value in (("target_tokens", target_tokens), ("max_epochs", max_epochs), ("maximum_usage", maximum_usage)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}: it must be a positive number")
    counts = np.array(list(tokens.values()), dtype=np.float64)
    shares = counts if prior is None else _match(prior, tuple(tokens))
    shares = shares / shares.sum()
    caps = np.ones_like(counts)
    if max_epochs is not None:
        caps = np.minimum(caps, max_epochs * counts / target_tokens)
    if maximum_usage is not None:
        caps = np.minimum(caps, maximum_usage * shares)
    return Space(tuple(tokens), counts, shares, caps, int(target_tokens), max_epochs)


def unlimited_space(domains: tuple[str, ...], prior: Mapping[str, float] | None = None) -> Space:
    """Space without token counts (runs that someone else made): no caps, uniform prior unless one is given."""
    shares = np.ones(len(domains)) if prior is None else _match(prior, domains)
    return Space(domains, None, shares / shares.sum(), np.ones(len(domains)), None, None)


def _match(prior: Mapping[str, float], domains: tuple[str, ...]) -> FloatArray:
    if set(prior) != set(domains):
        wrong = sorted(set(prior) ^ set(domains))
        raise ValueError(f"prior and domains differ in {wrong}: give every domain one share, and no other name")
    return np.array([prior[d] for d in domains], dtype=np.float64)


def bound(weights: FloatArray, caps: FloatArray) -> FloatArray:
    """Scale positive weights until they sum to 1 with none above its cap: min(cap, scale * weight), by water-filling.

    weights [k] or [n, k], not negative; a zero stays zero. Raises ValueError when a row's non-zero caps sum below 1.
    """
    rows = np.atleast_2d(np.asarray(weights, dtype=np.float64))
    used = rows > 0
    room = np.where(used, caps, 0.0).sum(axis=1)
    if np.any(room < 1 - SUM_TOLERANCE):
        raise ValueError(f"the caps of the domains in use sum to {room.min():.4g}, below 1: use more domains")
    full = np.zeros_like(used)
    for _ in range(len(caps) + 1):
        free = np.where(used & ~full, rows, 0.0)
        left = 1.0 - np.where(full, caps, 0.0).sum(axis=1, keepdims=True)
        total = free.sum(axis=1, keepdims=True)
        result = np.where(full, caps, free * np.divide(left, total, out=np.zeros_like(left), where=total > 0))
        over = ~full & (result > caps)
        if not over.any():
            break
        full |= over
    return result.reshape(np.shape(weights))


def fill_cheapest(costs: FloatArray, caps: FloatArray) -> FloatArray:
    """The weights [k] that minimise a linear cost under caps: fill the cheapest domain, then the next."""
    weights, left = np.zeros_like(caps), 1.0
    for i in np.argsort(costs, kind="stable"):
        weights[i] = min(caps[i], left)
        left = max(0.0, left - weights[i])
    return weights


def controls(space: Space) -> dict[str, FloatArray]:
    """The mixtures a search must beat: prior and uniform (both under the caps), and each domain alone, uncapped."""
    k = len(space.domains)
    single = {f"single({name})": row for name, row in zip(space.domains, np.eye(k), strict=True)}
    return {"prior": bound(space.prior, space.caps), "uniform": bound(np.full(k, 1 / k), space.caps), **single}


def draw_mixtures(centre: FloatArray, strengths: FloatArray, count: int, rng: np.random.Generator) -> FloatArray:
    """Dirichlet(strength * centre) draws [count, k], each with a strength picked at random from the list."""
    picks = rng.integers(len(strengths), size=count)
    rows = np.empty((count, len(centre)))
    for i, strength in enumerate(strengths):
        mine = picks == i
        # a Dirichlet parameter of exactly 0 is refused; this one is as good as never drawn
        rows[mine] = rng.dirichlet(np.maximum(strength * centre, 1e-12), size=int(mine.sum()))
    return rows


def sample_mixtures(
    space: Space,
    n: int,
    seed: int,
    temperature: float = 0.5,
    min_strength: float = 0.1,
    max_strength: float = 5.0,
    minimum: float = 2e-4,
    over_cap: OverCap = "reject",
    multiplier: int = 100,
    min_distance: float = DUPLICATE_L1,
) -> FloatArray:
    """n different mixtures [n, k] to train proxies on: RegMix's Dirichlet around prior^temperature (its defaults).

    Weights below `minimum` become 0, the rest multiples of 1/round(1/minimum) (minimum 0: not rounded) that sum to 1.
    Rows over a cap are rejected, before and after rounding; "project" water-fills them first; "ignore" has no caps.
    Rows nearer than `min_distance` (L1) to an earlier one are dropped. The first rows do not depend on n.
    Raises ValueError when `multiplier` * n draws leave fewer than n, naming the caps that cost most.
    """
    if n < 1 or not 0 <= minimum < 1 or temperature < 0 or not 0 < min_strength <= max_strength:
        raise ValueError(
            f"n {n}, minimum {minimum}, temperature {temperature}, strengths {min_strength} to {max_strength}: needs "
            "n >= 1, 0 <= minimum < 1, temperature >= 0 and 0 < min_strength <= max_strength"
        )
    centre = space.prior**temperature / (space.prior**temperature).sum()
    strengths = np.geomspace(min_strength, max_strength, STRENGTHS)
    caps = np.ones_like(space.caps) if over_cap == "ignore" else space.caps
    kept, blocks = np.empty((0, len(caps))), max(1, math.ceil(multiplier * n / BLOCK))
    over = np.zeros(len(caps))
    for block in range(blocks):
        rng = np.random.default_rng([seed, zlib.crc32(b"mixtures"), block])
        rows = draw_mixtures(centre, strengths, BLOCK, rng)
        over += (rows > caps).sum(axis=0)
        kept = _keep_new(kept, _settle(rows, space.prior, caps, minimum, over_cap == "project"), n, min_distance)
        if len(kept) == n:
            return kept
    raise ValueError(_too_few(space, n, len(kept), blocks * BLOCK, over))


def _settle(rows: FloatArray, prior: FloatArray, caps: FloatArray, minimum: float, project: bool) -> FloatArray:
    """Rows under the caps, clipped and rounded, sums exact; those that do not obey the caps afterwards are left out."""
    units = round(1 / minimum) if minimum else 0
    if project:
        # whole units under each cap, so that rounding up cannot pass it; the prior takes what a full cap turns away
        floor = np.floor(caps * units + 1e-9) / units if units else caps
        if floor.sum() < 1 - SUM_TOLERANCE:
            raise ValueError(
                f"caps rounded down to multiples of minimum {minimum} sum to {floor.sum():.4g}: lower minimum"
            )
        rows = _clip(bound(rows + 1e-9 * prior, floor), minimum)
        rows = bound(rows[np.where(rows > 0, floor, 0.0).sum(axis=1) >= 1], floor)
    else:
        rows = _clip(rows[(rows <= caps).all(axis=1)], minimum)
    if units:
        rows = _round_rows(rows * units) / units
    return rows[(rows <= caps + 1e-12).all(axis=1)]


def _clip(rows: FloatArray, minimum: float) -> FloatArray:
    rows = np.where(rows < minimum, 0.0, rows)
    rows = rows[rows.sum(axis=1) > 0]
    result: FloatArray = rows / rows.sum(axis=1, keepdims=True)
    return result


def _round_rows(shares: FloatArray) -> FloatArray:
    """Rounds rows of shares to whole numbers that keep the row's (whole) sum: the largest remainders go up."""
    down = np.floor(shares + 1e-9)
    remainder = shares - down
    missing = np.rint(remainder.sum(axis=1, keepdims=True))
    rank = np.argsort(np.argsort(-remainder, axis=1, kind="stable"), axis=1)
    result: FloatArray = down + (rank < missing)
    return result


def _keep_new(kept: FloatArray, rows: FloatArray, n: int, min_distance: float) -> FloatArray:
    buffer, size = np.vstack([kept, np.empty((n - len(kept), rows.shape[1]))]), len(kept)
    for row in rows:
        if size == n:
            break
        if size == 0 or np.abs(buffer[:size] - row).sum(axis=1).min() >= min_distance:
            buffer[size] = row
            size += 1
    return buffer[:size]


def _too_few(space: Space, n: int, kept: int, draws: int, over: FloatArray) -> str:
    worst = sorted(zip(over / draws, space.domains, space.caps, strict=True), reverse=True)[:3]
    caps = ", ".join(f"{name} (cap {cap:.4g}) {share:.0%}" for share, name, cap in worst if share > 0)
    return (
        f"only {kept} of {n} mixtures were left of {draws:,} draws; over their caps most often: {caps or 'none'}. "
        "Raise max_epochs or lower target_tokens, raise min_strength, or set over_cap to project"
    )
