"""The report's tables, made from the evidence and the facts; the same ones serve HTML and Markdown."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from regmix_search.report.costs import list_costs
from regmix_search.report.evidence import Evidence, Trial, finite, finite_dict
from regmix_search.report.findings import held_back, noise_sd, single_domain, spread_sd
from regmix_search.report.numerals import DASH, count, duration, fixed, percent, ratio, signed, span
from regmix_search.report.verdict import OPTIMAL, Comparison

BEST_COUNT = 5
SHORT = {OPTIMAL: "optimal", "prior": "prior", "uniform": "uniform"}


@dataclass(frozen=True)
class Cell:
    """One table cell. `heat` in [-1, 1] colours it: below zero cool, above zero warm."""

    text: str
    cls: str = ""
    heat: float | None = None


@dataclass(frozen=True)
class Table:
    """Header and rows; the first `left` columns are set left, the others are numbers."""

    head: tuple[str, ...]
    rows: list[list[Cell]]
    left: int = 1


def build_tables(evidence: Evidence, facts: dict[str, Any]) -> dict[str, Any]:
    """All tables by name; one without rows where the evidence is not there."""
    return {
        "results": _results(facts, evidence),
        "weights": _weights(evidence, facts),
        "beside": _beside(evidence),
        "transfer": _transfer(facts),
        "candidates": _candidates(evidence, facts),
        "all_targets": _all_targets(evidence, facts),
        "domain_losses": _domain_losses(evidence, facts),
        "best": _best(evidence, facts),
        "correlation": _correlation(evidence, facts),
        "cost": _cost(evidence),
        "failures": Table(
            ("trial", "state", "reason"),
            [
                [Cell(f"t{t.index:04d}"), Cell(_fate(t)), Cell("; then ".join(t.failures) or DASH, "wrap")]
                for t in evidence.trials
                if t.failures or t.stopped_at is not None or t.status in ("failed", "unfinished")
            ],
            left=3,
        ),
    }


def short_labels(evidence: Evidence) -> dict[str, str]:
    """Mixtures as column heads and curve labels."""
    name = single_domain(evidence)
    return {**SHORT, "best_single": f"{name} only" if name else "single domain"}


def _results(facts: dict[str, Any], evidence: Evidence) -> Table:
    """Per mixture: mean loss over seeds, each seed, bits/byte, gain of optimal over it with both intervals."""
    by_control: dict[str, Comparison] = {c.control: c for c in facts["comparisons"]}
    bits: dict[str, Comparison] = {c.control: c for c in facts["comparisons_bpb"]}
    words = {"better": "optimal better", "worse": "optimal worse", "unclear": "no significant gain"}
    labels, rows = short_labels(evidence), []
    lowest = min((m["mean"] for m in facts["losses"].values()), default=math.nan)
    for name, loss in facts["losses"].items():
        row = [
            Cell(labels.get(name, name), f"key k-{name}"),
            Cell(_nats(loss["mean"]), "best" if loss["mean"] == lowest else ""),
            Cell(" ".join(_nats(v) for v in loss["seeds"]), "quiet"),
            Cell(_nats(loss["bpb"])),
        ]
        if c := by_control.get(name):
            gain_bits = signed(bits[name].gain) if name in bits else DASH
            row += [Cell(signed(c.gain), "strong"), Cell(span(c.interval)), Cell(span(c.joint)), Cell(gain_bits)]
            row += [Cell(words.get(c.outcome, "no interval"), f"verdict {c.outcome}")]
        else:
            row += [Cell("")] * 5
        rows.append(row)
    head = ("mixture", "nats/token", "each seed", "bits/byte", "gain, nats", "95% alone", "95% joint", "gain, bits")
    return Table((*head, "verdict"), rows)


def _weights(evidence: Evidence, facts: dict[str, Any]) -> Table:
    weights = facts["weights"]
    at_cap = evidence.optimum.get("at_cap") or []
    tokens = finite_dict(evidence.space.get("tokens"))
    read = (evidence.optimum.get("repetition") or {}).get("epochs") or {}
    rows = [
        [
            Cell(name),
            Cell(count(tokens.get(name, math.nan))),
            Cell(percent(weights["prior"].get(name))),
            Cell(percent(weights["optimal"].get(name)), "strong"),
            Cell(percent(weights["caps"].get(name))),
            Cell(fixed(weights["epochs"].get(name), 2) + (" (at cap)" if name in at_cap else "")),
            *([Cell(fixed(finite(read.get(name, {}).get("proxy")), 2))] if read else []),
        ]
        for name in by_weight(evidence, facts)
    ]
    return Table(("domain", "tokens", "prior", "optimal", "cap", "epochs", *(["in a proxy"] if read else [])), rows)


def _beside(evidence: Evidence) -> Table:
    """Optimum, controls and near-ties by predicted loss of the goal, and which of them the runs cannot tell apart."""
    optimum, rows = evidence.optimum, []
    told = {"predicted": (optimum.get("objective") or {}).get("predicted"), "interval90": optimum.get("interval90")}
    ties = {f"tie {i}": tie for i, tie in enumerate((optimum.get("near_ties") or {}).get("examples") or [], 1)}
    entries = {"optimum": told, **(optimum.get("controls") or {}), **ties}
    for name, entry in entries.items() if len(entries) > 1 else ():
        interval = [finite(v) for v in entry.get("interval90") or []]
        largest = sorted((entry.get("weights") or optimum.get("weights") or {}).items(), key=lambda item: -item[1])[:4]
        apart = "-" if name == "optimum" else "no" if name in ties or entry.get("ties_with_optimum") else "yes"
        shown = ", ".join(f"{domain} {percent(weight)}" for domain, weight in largest)
        cells = [Cell(_nats(finite(entry.get("predicted")))), Cell(" to ".join(f"{v:.3f}" for v in interval) or DASH)]
        rows.append([Cell(name), *cells, Cell(apart), Cell(shown, "wrap")])
    return Table(("mixture", "predicted", "90% interval", "told apart", "largest weights"), rows)


def _transfer(facts: dict[str, Any]) -> Table:
    """Predicted for proxies beside measured on the retrained models: levels differ, gains can be compared."""
    search, judged = facts["search_half_vs_prior"], facts["judged_on"]
    test = next((c for c in facts["comparisons"] if c.control == "prior"), None)
    rows = []
    if math.isfinite(facts["predicted_gain"]):
        interval = [finite(v) for v in facts["interval90"] or []]
        shown = _nats(facts["predicted_optimal"])
        shown += f" ({interval[0]:.3f} to {interval[1]:.3f})" if len(interval) == 2 else ""
        row = [Cell(f"proxies, predicted, {facts['target']}"), Cell(_nats(facts["predicted_prior"])), Cell(shown)]
        rows.append([*row, Cell(signed(facts["predicted_gain"]), "strong")])
    pairs = [(f"large model, measured, {facts['target']}", search)]
    pairs += [(f"large model, measured, {judged}", test)] if judged != facts["target"] else []
    for label, c in pairs:
        if c is not None:
            gain = signed(c.gain) + (f" ({span(c.interval)})" if c.interval else "")
            rows.append([Cell(label), Cell(_nats(c.control_loss)), Cell(_nats(c.optimal_loss)), Cell(gain, "strong")])
    return Table(("nats per token", "prior", "optimal", "gain"), rows)


def _candidates(evidence: Evidence, facts: dict[str, Any]) -> Table:
    """Cross-validation scores of every surrogate on the target, and the gain over the prior that each predicts."""
    fitted = (evidence.fit.get("targets") or {}).get(facts["target"]) or {}
    opinions = evidence.optimum.get("second_opinion") or {}
    keys = (("spearman", 3), ("pearson", 3), ("rmse", 4), ("mse", 5))
    rows = []
    for name, scores in (fitted.get("candidates") or {}).items():
        mark = "best" if name == facts["chosen"] else ""
        values = [fixed(finite(scores.get(key)), places) for key, places in keys]
        opinion = opinions.get(name) or {}
        gain = finite(opinion.get("prior")) - finite(opinion.get("optimum"))
        values += [signed(gain)] if opinions else []
        rows.append([Cell(name + (" (chosen)" if mark else ""), mark), *(Cell(v, mark) for v in values)])
    head = ("surrogate", "Spearman", "Pearson", "RMSE", "MSE", *(["gain it predicts"] if opinions else []))
    return Table(head, rows)


def _all_targets(evidence: Evidence, facts: dict[str, Any]) -> Table:
    """Every target: CV Spearman of each surrogate, the held-back figure, and noise against spread."""
    targets = evidence.fit.get("targets") or {}
    names = list(dict.fromkeys(name for t in targets.values() for name in t.get("candidates") or {}))
    rows = []
    for target in sorted(targets, key=lambda t: t != facts["target"]):
        fitted, cells = targets[target], []
        for name in names:
            score = finite(((fitted.get("candidates") or {}).get(name) or {}).get("spearman"))
            cells.append(Cell(fixed(score, 2), "best" if name == fitted.get("chosen") else ""))
        held = held_back(fitted)
        noise, spread = noise_sd(evidence, target), spread_sd(evidence, target)
        cells += [
            Cell(fixed(held.spearman if held else math.nan, 2)),
            Cell(fixed(noise, 4)),
            Cell(fixed(spread, 4)),
            Cell(ratio(spread, noise)),
        ]
        rows.append([Cell(target), *cells])
    head = ("target", *(f"CV {name}" for name in names), "held back", "noise sd", "spread sd", "spread / noise")
    return Table(head, rows)


def _domain_losses(evidence: Evidence, facts: dict[str, Any]) -> Table:
    """Mean loss of every retrained mixture on every domain; heat: its difference from the prior (or the row's mean)."""
    names, labels = list(facts["losses"]), short_labels(evidence)
    if not names:
        return Table((), [])
    first = [facts["judged_on"], facts["target"]]
    domains = dict.fromkeys([*first, *(d for run in evidence.runs for d in run.losses)])
    means = {
        (domain, name): float(np.mean(found))
        for domain in domains
        for name in names
        if (found := [r.losses[domain] for r in evidence.runs if r.mixture == name and domain in r.losses])
    }
    base = {
        domain: means.get((domain, "prior"), float(np.mean([means.get((domain, n), math.nan) for n in names])))
        for domain in domains
    }
    scale = max((abs(v - base[d]) for (d, _), v in means.items()), default=1.0) or 1.0
    rows = []
    for domain in domains:
        lowest = min((means[domain, n] for n in names if (domain, n) in means), default=math.nan)
        row = [Cell(domain, "strong" if domain in first else "")]
        for name in names:
            value = means.get((domain, name), math.nan)
            heat = None if math.isnan(value - base[domain]) else (value - base[domain]) / scale
            row.append(Cell(_nats(value), "best" if value == lowest else "", heat))
        rows.append(row)
    return Table(("validation domain", *(labels.get(n, n) for n in names)), rows)


def _best(evidence: Evidence, facts: dict[str, Any]) -> Table:
    """The proxies with the lowest losses on the target, with the optimum and the prior for comparison."""
    target, order = facts["target"], by_weight(evidence, facts)
    ranked = best_trials(evidence, target)
    weights = facts["weights"]
    entries = [(f"t{t.index:04d}", _nats(t.losses[target]), t.weights) for t in ranked]
    entries += [("optimum (predicted)", _nats(facts["predicted_optimal"]), weights["optimal"])]
    entries += [("prior (predicted)", _nats(facts["predicted_prior"]), weights["prior"])]
    top = max((w for _, _, mixture in entries for w in mixture.values()), default=1.0)
    rows = [
        [Cell(name), Cell(loss, "strong"), *(_share(mixture.get(domain, 0.0), top) for domain in order)]
        for name, loss, mixture in entries
        if mixture
    ]
    return Table(("mixture", "nats/token", *order), rows if ranked else [])


def _correlation(evidence: Evidence, facts: dict[str, Any]) -> Table:
    """Spearman between a domain's weight and a target's loss over the proxies: negative means that it helps."""
    order = by_weight(evidence, facts)
    rows = []
    for target in sorted(evidence.targets, key=lambda t: t != facts["target"]):
        trials = [t for t in evidence.finished if target in t.losses and t.weights]
        if len(trials) < 4:
            continue
        losses = [t.losses[target] for t in trials]
        row = [Cell(target)]
        for domain in order:
            column = [t.weights.get(domain, 0.0) for t in trials]
            rho = float(stats.spearmanr(column, losses).statistic) if np.ptp(column) and np.ptp(losses) else math.nan
            row.append(Cell(fixed(rho, 2), heat=None if math.isnan(rho) else rho))
        rows.append(row)
    return Table(("loss on \\ weight of", *order), rows)


def _cost(evidence: Evidence) -> Table:
    rows = [
        [
            Cell(c.name, "strong" if c.total else ""),
            Cell(str(c.runs)),
            Cell(count(c.tokens)),
            Cell(duration(c.seconds)),
            Cell(duration(c.elapsed)),
            Cell(count(c.tokens / c.seconds) if c.seconds else DASH),
            Cell(f"{c.flops:.2e}" if c.flops else DASH),
        ]
        for c in list_costs(evidence)
    ]
    return Table(("stage", "attempted", "tokens", "compute", "elapsed", "tokens/s a worker", "FLOP"), rows)


def best_trials(evidence: Evidence, target: str) -> list[Trial]:
    """The BEST_COUNT proxies with the lowest loss on the target, best first."""
    scored = [t for t in evidence.finished if target in t.losses]
    return sorted(scored, key=lambda t: t.losses[target])[:BEST_COUNT]


def by_weight(evidence: Evidence, facts: dict[str, Any]) -> list[str]:
    """Training domains by falling optimal weight (prior weight where there is no optimum)."""
    weights = facts["weights"]["optimal"] or facts["weights"]["prior"]
    return sorted(evidence.domains, key=lambda name: -weights.get(name, 0.0))


def _fate(trial: Trial) -> str:
    if trial.stopped_at is not None:
        return f"ended early, after {count(trial.stopped_at)} tokens: losses are estimates"
    return f"finished at attempt {len(trial.failures) + 1}" if trial.status == "finished" else trial.status


def _share(weight: float, top: float) -> Cell:
    return Cell(f"{100 * weight:.1f}" if weight else "\u00b7", heat=-weight / top if top else None)


def _nats(value: float) -> str:
    return fixed(value, 3)
