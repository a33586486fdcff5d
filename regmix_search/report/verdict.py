"""The statistics of the report, and the words that say what they allow one to claim."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
OPTIMAL = "optimal"
# Of runs with one seed on two mixtures; measured on the demo's text: 0.6 to 0.9 (docs/decisions.md).
PAIRED = 0.5
# Below this Spearman a search should not be relied on (research/ux.md, 2.3); above the other it ranks well.
UNRELIABLE, RELIABLE = 0.5, 0.8
# A spread over mixtures under three noise sds leaves the surrogate little but noise to rank.
LOW_SIGNAL = 3.0


@dataclass(frozen=True)
class Comparison:
    """Optimal, or whatever `compare` takes as first, against one control.

    `gain` = control loss - optimal loss: positive means that optimal is better.

    `interval` holds for this comparison alone, `joint` for all of the family together (Bonferroni). Both are None
    when no seed was repeated. `outcome`: "better", "worse", "unclear" (by `joint`), or "unknown" (no interval).
    """

    control: str
    label: str
    optimal_loss: float
    control_loss: float
    gain: float
    interval: tuple[float, float] | None
    joint: tuple[float, float] | None
    p_value: float | None
    outcome: str

    @property
    def outcome_alone(self) -> str:
        return _outcome(self.interval)


@dataclass(frozen=True)
class Agreement:
    """Predicted against true: rank and linear correlation, root mean square error in nats, number of points."""

    n: int
    spearman: float
    pearson: float
    rmse: float
    interval: tuple[float, float] | None  # 95% for Spearman


def pooled_sd(groups: Mapping[str, Sequence[float]]) -> tuple[float, int]:
    """Seed sd pooled over mixtures, and its degrees of freedom: sum over mixtures of (seeds - 1). NaN, 0 if none."""
    df = sum(len(g) - 1 for g in groups.values() if g)
    if df == 0:
        return math.nan, 0
    squares = sum(float(np.sum((np.asarray(g) - np.mean(g)) ** 2)) for g in groups.values() if g)
    return math.sqrt(squares / df), df


def compare(
    groups: Mapping[str, Sequence[float]],
    labels: Mapping[str, str],
    first: str = OPTIMAL,
    sets: int = 1,
    aligned: bool = False,
) -> list[Comparison]:
    """Compare the group ``first`` with every other non-empty group, with one pooled seed sd for all.

    The seeds are taken as unpaired, which is conservative where runs of one seed share their start. No interval is
    given when no mixture has two seeds, or when the seeds came out identical (then they measured nothing).
    ``sets``: how many such families of comparisons, one for each set of losses, `joint` is to hold for at once.
    ``aligned``: the values of a seed are at one place in all groups, and may count as pairs (see `prefers_pairs`).
    """
    groups = {name: values for name, values in groups.items() if len(values)}
    if first not in groups:
        return []
    pooled, pooled_df = pooled_sd(groups)
    controls = [name for name in groups if name != first]
    family = len(controls) * sets
    pairs = aligned and prefers_pairs(len(groups[first]), len(groups), family)
    optimal = float(np.mean(groups[first]))
    rows = []
    for name in controls:
        control = float(np.mean(groups[name]))
        gain = control - optimal
        interval = joint = p_value = None
        if pooled_df > 0 and pooled > 0:
            error, df = pooled * math.sqrt(1 / len(groups[first]) + 1 / len(groups[name])), pooled_df
            if pairs and (spread := float(np.std(np.subtract(groups[name], groups[first]), ddof=1))) > 0:
                error, df = spread / math.sqrt(len(groups[first])), len(groups[first]) - 1
            interval = _interval(gain, error, df, 1 - CONFIDENCE)
            joint = _interval(gain, error, df, (1 - CONFIDENCE) / family)
            p_value = min(1.0, family * 2 * float(stats.t.sf(abs(gain) / error, df)))
        rows.append(
            Comparison(name, labels.get(name, name), optimal, control, gain, interval, joint, p_value, _outcome(joint))
        )
    return rows


def prefers_pairs(seeds: int, mixtures: int, family: int) -> bool:
    """Whether pairs give narrower joint intervals than pooled seeds if runs of one seed correlate at PAIRED.

    A pair's interval has n - 1 degrees of freedom, fewer. Nothing measured decides, so either keeps its promise.
    """
    if seeds < 2:
        return False
    alone, pooled = (stats.t.isf((1 - CONFIDENCE) / family / 2, df) for df in (seeds - 1, mixtures * (seeds - 1)))
    return bool(alone * math.sqrt(1 - PAIRED) <= pooled)


def agreement(predicted: Sequence[float], true: Sequence[float]) -> Agreement | None:
    """How well predictions match the truth over the finite pairs; None under three pairs or without any spread."""
    pairs = [(p, t) for p, t in zip(predicted, true, strict=False) if math.isfinite(p) and math.isfinite(t)]
    if len(pairs) < 3:
        return None
    x, y = np.array(pairs).T
    rmse = float(np.sqrt(np.mean((x - y) ** 2)))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Agreement(len(pairs), math.nan, math.nan, rmse, None)
    rho = float(stats.spearmanr(x, y).statistic)
    return Agreement(len(pairs), rho, float(stats.pearsonr(x, y).statistic), rmse, spearman_interval(rho, len(pairs)))


def spearman_interval(rho: float, n: int) -> tuple[float, float] | None:
    """95% interval of a Spearman coefficient: Fisher's z with variance 1.06 / (n - 3) (Fieller et al., 1957)."""
    if n <= 3 or abs(rho) >= 1:
        return None
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(1.06 / (n - 3))
    return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)


def tokens_to_reach(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Tokens at which a loss curve first falls to `loss`, interpolated; None when it never does."""
    for (t0, l0), (t1, l1) in zip([(0.0, math.inf), *curve], curve, strict=False):
        if l1 <= loss:
            return t1 if math.isinf(l0) or l0 == l1 else t0 + (t1 - t0) * (l0 - loss) / (l0 - l1)
    return None


def headline(comparisons: Sequence[Comparison], reached: str) -> str:
    """One sentence that is true to every comparison. `reached`: "models", "prediction", "proxies" or "mixtures"."""
    if reached == "mixtures":
        return "Nothing has been trained yet: these are the mixtures to try"
    if reached == "proxies":
        return "No optimum has been solved for yet: what follows are the proxies"
    if reached == "prediction":
        return "No large model has been trained on these mixtures yet: what follows is prediction"
    if not comparisons:
        return "The optimal mixture has no control to be compared with"
    if all(c.outcome == "unknown" for c in comparisons):
        lower = [c.label for c in comparisons if c.gain > 0]
        found = f"measured lower than {join_names(lower)}" if lower else "measured lower than none of the controls"
        return f"The optimal mixture {found}, but without a noise estimate nothing is claimed"
    better, unclear, worse = (
        [c.label for c in comparisons if c.outcome == outcome] for outcome in ("better", "unclear", "worse")
    )
    parts = [f"beats {join_names(better)}"] if better else []
    parts += [f"shows no significant gain over {join_names(unclear, 'or')}"] if unclear else []
    parts += [f"is worse than {join_names(worse)}"] if worse else []
    glue = ", but " if better else ", and "
    return "The optimal mixture " + (glue.join([parts[0], ", and ".join(parts[1:])]) if parts[1:] else parts[0])


def sentence(c: Comparison, bits: Comparison | None, domain: str, family: int) -> str:
    """What one comparison shows, with its numbers: nats per token on `domain`, and bits per byte where known."""
    numbers = f"{c.optimal_loss:.3f} against {c.control_loss:.3f} nats per token on {domain}"
    if c.outcome == "unknown" or c.joint is None:
        return f"Against {c.label}: {numbers}, a gain of {c.gain:+.3f}; no interval, so no claim."
    gain = f"a gain of {c.gain:+.3f} nats ({c.joint[0]:+.3f} to {c.joint[1]:+.3f})"
    if bits and bits.joint:
        gain += f" or {bits.gain:+.3f} bits per byte ({bits.joint[0]:+.3f} to {bits.joint[1]:+.3f})"
    if c.outcome in ("better", "worse"):
        return f"{c.outcome.capitalize()} than {c.label}: {numbers}, {gain}."
    alone = ""
    if c.outcome_alone in ("better", "worse"):
        alone = f" Taken alone it would count as {c.outcome_alone}; as one of {family} comparisons it does not."
    return f"No significant gain over {c.label}: {numbers}, {gain}, which the seed spread cannot tell from zero.{alone}"


def interval_note(df: int, family: int) -> str:
    """How to read the intervals of `sentence`."""
    together = f", wide enough to hold for all {family} comparisons at once" if family > 1 else ""
    return f"In brackets: {CONFIDENCE:.0%} intervals from the seed spread ({df} degrees of freedom){together}."


def trust(held: Agreement | None, cross: Agreement | None, noise: float) -> str:
    """How far the surrogate's ranking can be relied on, from the held-back set first, cross-validation second."""
    judge, source = (held, "proxies that the fit never saw") if held else (cross, "cross-validated proxies")
    if judge is None or math.isnan(judge.spearman):
        return "There is nothing to judge the surrogate by: no predicted-versus-true pairs were found."
    if judge.spearman >= RELIABLE:
        word = "ranks mixtures well"
    elif judge.spearman >= UNRELIABLE:
        word = "ranks mixtures roughly"
    else:
        word = "does not rank mixtures reliably"
    text = f"The surrogate {word}: Spearman {judge.spearman:.2f} over {judge.n} {source}"
    if judge.interval:
        few = ", so wide that they could rank little" if judge.interval[0] < UNRELIABLE <= judge.spearman else ""
        text += f" (95% interval {judge.interval[0]:.2f} to {judge.interval[1]:.2f}{few})"
    text += f", root mean square error {judge.rmse:.3f} nats"
    if noise > 0:
        text += f", {judge.rmse / noise:.1f} times the seed noise of one proxy"
    return text + "."


def transfer(predicted_gain: float, measured: Comparison | None) -> str:
    """Predicted gain over the prior at proxy scale beside the retrained one, on the same half of the target."""
    if math.isnan(predicted_gain):
        return ""
    text = f"The surrogate predicted a gain over the token prior of {predicted_gain:+.3f} nats at proxy scale"
    if measured is None:
        return text + "; no retrained pair is there to compare with."
    text += f"; the retrained, larger model gained {measured.gain:+.3f} on the same half of the target"
    if measured.interval:
        text += f" (95% interval {measured.interval[0]:+.3f} to {measured.interval[1]:+.3f})"
    if measured.outcome_alone == "unclear":
        return text + ": too close to zero to confirm even the sign."
    agrees = (predicted_gain > 0) == (measured.gain > 0)
    if measured.outcome_alone == "unknown":
        return text + (": the same sign, with no interval." if agrees else ": the opposite sign, with no interval.")
    return text + (": the sign was right." if agrees else ": the sign was wrong.")


def join_names(names: Sequence[str], word: str = "and") -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}" if names else ""


def _interval(center: float, error: float, df: int, alpha: float) -> tuple[float, float]:
    half = float(stats.t.ppf(1 - alpha / 2, df)) * error
    return center - half, center + half


def _outcome(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "unknown"
    if interval[0] > 0:
        return "better"
    return "worse" if interval[1] < 0 else "unclear"
