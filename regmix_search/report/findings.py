"""What the evidence amounts to: the figures that the report states, as one nested dict, and the warnings."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from regmix_search.report.corpus import missing_files, shared_files
from regmix_search.report.evidence import Evidence, finite, finite_dict
from regmix_search.report.numerals import count
from regmix_search.report.verdict import (
    LOW_SIGNAL,
    OPTIMAL,
    UNRELIABLE,
    Agreement,
    Comparison,
    agreement,
    compare,
    headline,
    interval_note,
    pooled_sd,
    sentence,
    transfer,
    trust,
)

MIXTURE_ORDER = (OPTIMAL, "prior", "uniform", "best_single")


def gather_facts(evidence: Evidence) -> dict[str, Any]:
    """The figures that the report rests on, as one nested dict (the future report.json)."""
    target = _target(evidence)
    facts: dict[str, Any] = {
        "version": 1,
        "run": evidence.run_dir.resolve().name,
        "target": target,
        "missing": missing_files(evidence),
        "weights": _weights(evidence),
        "trials": _count_trials(evidence),
        **_noise(evidence, target),
        **_retrained(evidence, target),
        **_surrogate(evidence, target),
    }
    comparisons: list[Comparison] = facts["comparisons"]
    facts["verdict"] = headline(comparisons, _reached(evidence, facts))
    bits: dict[str, Comparison] = {c.control: c for c in facts["comparisons_bpb"]}
    facts["sentences"] = [sentence(c, bits.get(c.control), facts["judged_on"], len(comparisons)) for c in comparisons]
    facts["interval_note"] = interval_note(facts["seed_df"], len(comparisons)) if facts["seed_sd"] > 0 else ""
    facts["trust"] = trust(facts["holdout"], facts["cross_validation"], facts["noise_sd"])
    facts["transfer"] = transfer(facts["predicted_gain"], facts["search_half_vs_prior"])
    facts["reuse"] = evidence.optimum.get("reuse", "").splitlines()
    facts["repetition"] = _repetition_note(evidence.optimum.get("repetition") or {})
    facts["warnings"] = _collect_warnings(evidence, facts)
    others = map(as_sentence, evidence.fit.get("warnings") or [])
    facts["other_warnings"] = [warning for warning in others if warning not in facts["warnings"]]
    return facts


def _target(evidence: Evidence) -> str:
    """The domain whose loss the search minimises; guessed (first one that is not trained on) if no file names it."""
    guesses = [name for name in evidence.targets if name not in evidence.domains] or list(evidence.targets) or [""]
    return _named_target(evidence) or guesses[0]


def _named_target(evidence: Evidence) -> str:
    sources = (evidence.fit, evidence.optimum, evidence.train, evidence.config.get("fit") or {})
    target = next((source["target"] for source in sources if source.get("target")), "")
    return max(target, key=lambda name: finite(target[name])) if isinstance(target, dict) else str(target)


def _reached(evidence: Evidence, facts: dict[str, Any]) -> str:
    """How far the search has come: "models", "prediction", "proxies" or "mixtures"."""
    if evidence.runs:
        return "models"
    if facts["predicted_optimal"] == facts["predicted_optimal"]:
        return "prediction"
    return "proxies" if evidence.finished else "mixtures"


def _weights(evidence: Evidence) -> dict[str, dict[str, float]]:
    """Prior, optimal, epochs and caps by domain; the retrained runs' weights where space or optimum are missing."""
    by_run = {run.mixture: run.weights for run in evidence.runs}
    return {
        "prior": finite_dict(evidence.space.get("prior")) or by_run.get("prior", {}),
        "optimal": finite_dict(evidence.optimum.get("weights")) or by_run.get(OPTIMAL, {}),
        "epochs": finite_dict(evidence.optimum.get("epochs")),
        "caps": finite_dict(evidence.optimum.get("caps")) or finite_dict(evidence.space.get("caps")),
    }


def _count_trials(evidence: Evidence) -> dict[str, int]:
    statuses = [trial.status for trial in evidence.trials]
    counts = {status: statuses.count(status) for status in ("finished", "failed", "unfinished", "planned")}
    kinds = {kind: sum(t.kind == kind for t in evidence.finished) for kind in ("train", "holdout")}
    early = sum(trial.stopped_at is not None for trial in evidence.trials)
    retried = sum(1 for t in evidence.trials if t.failures and t.status == "finished")
    return {**counts, **kinds, "repeat": len(evidence.repeats), "retried": retried, "ended_early": early}


def _noise(evidence: Evidence, target: str) -> dict[str, Any]:
    noise, spread = noise_sd(evidence, target), spread_sd(evidence, target)
    return {"noise_sd": noise, "spread_sd": spread, "spread_over_noise": spread / noise if noise > 0 else math.nan}


def _retrained(evidence: Evidence, target: str) -> dict[str, Any]:
    """Losses of the retrained models and the comparisons, on the test half where there is one."""
    test = str(evidence.train.get("target_test") or "")
    judged = test if any(test in run.losses for run in evidence.runs) else target
    names = [*MIXTURE_ORDER, *sorted({run.mixture for run in evidence.runs} - set(MIXTURE_ORDER))]
    labels = control_labels(evidence)

    def groups(domain: str, unit: str) -> dict[str, list[float]]:
        values = {name: [getattr(r, unit).get(domain) for r in evidence.runs if r.mixture == name] for name in names}
        return {name: found for name, group in values.items() if (found := [v for v in group if v is not None])}

    losses, bits = groups(judged, "losses"), groups(judged, "bpb")
    sd, df = pooled_sd(losses)
    on_search_half = compare(groups(target, "losses"), labels)
    return {
        "judged_on": judged,
        "losses": {
            name: {
                "mean": float(np.mean(group)),
                "seeds": group,
                "bpb": float(np.mean(bits[name])) if name in bits else math.nan,
            }
            for name, group in losses.items()
        },
        "seed_sd": sd,
        "seed_df": df,
        "comparisons": compare(losses, labels),
        "comparisons_bpb": compare(bits, labels),
        "search_half_vs_prior": next((c for c in on_search_half if c.control == "prior"), None),
    }


def _surrogate(evidence: Evidence, target: str) -> dict[str, Any]:
    """Which surrogate, how well it predicts, and what it predicts for prior and optimum (proxy scale)."""
    fitted = (evidence.fit.get("targets") or {}).get(target) or {}
    predicted = finite((evidence.optimum.get("predicted") or {}).get(target))
    prior = finite((evidence.optimum.get("prior_predicted") or {}).get(target))
    return {
        "chosen": str(fitted.get("chosen") or ""),
        "why": str(fitted.get("why") or ""),
        "holdout": held_back(fitted),
        "cross_validation": _agree(fitted.get("cv_predicted"), fitted.get("true")),
        "predicted_optimal": predicted,
        "predicted_prior": prior,
        "predicted_gain": prior - predicted,
        "interval90": evidence.optimum.get("interval90"),
        "best_observed": evidence.optimum.get("best_observed"),
        "unconstrained": evidence.optimum.get("unconstrained"),
        "inside_sampled_region": evidence.optimum.get("inside_sampled_region"),
        "distance": evidence.optimum.get("distance"),
        "usual_distance": evidence.optimum.get("usual_distance"),
        "gain_note": _gain_note(evidence.optimum.get("gain") or {}),
    }


def _repetition_note(repetition: dict[str, Any]) -> str:
    """Whether proxies repeat the domains as the target run does, in words; empty where nothing is known."""
    if not repetition:
        return ""
    proxy, target = (count(repetition[f"{run}_tokens"]) for run in ("proxy", "target"))
    if repetition["matches"]:
        return f"In {proxy} tokens proxies repeat every domain as often as the target run does in {target}."
    return f"In {proxy} tokens proxies repeat some domains less than the target run does in {target}."


def _gain_note(gain: dict[str, Any]) -> str:
    """The predicted gain on the goal in words; empty when the optimum has none."""
    nats, interval = finite(gain.get("nats")), [finite(v) for v in gain.get("interval90") or []]
    if nats != nats:
        return ""
    saved = finite((gain.get("tokens_saved") or {}).get("share"))
    text = f"Predicted gain over the prior: {nats:.3f} nats"
    text += f", by refits {interval[0]:.3f} to {interval[1]:.3f}" if all(v == v for v in interval) and interval else ""
    if not gain.get("significant"):
        return text + "; not significant."
    return text + (f"; that saves {saved:.0%} of the tokens, {gain['tokens_saved']['why']}." if saved == saved else ".")


def _agree(predicted: Iterable[Any] | None, true: Iterable[Any] | None) -> Agreement | None:
    return agreement([finite(v) for v in predicted or ()], [finite(v) for v in true or ()])


def _collect_warnings(evidence: Evidence, facts: dict[str, Any]) -> list[str]:
    """What the reader must know before believing anything: from fit and optimum first, then what we see ourselves."""
    # optimum.json repeats the warnings of fit.json that concern its target; those of other targets are listed apart.
    found = list(map(as_sentence, evidence.optimum.get("warnings") or evidence.fit.get("warnings") or []))
    found += evidence.problems
    target, trials = facts["target"], facts["trials"]
    if evidence.runs:
        found += _retraining_warnings(evidence, facts)
    if target and not _named_target(evidence):
        found.append(f"No file says which target the search is for; {target} was taken.")
    if target in evidence.domains:
        found.append(f"The target {target} is itself a training domain: training on it alone is a trivial answer.")
    if facts["spread_over_noise"] < LOW_SIGNAL:
        found.append(
            f"Over mixtures the loss on {target} varies only {facts['spread_over_noise']:.1f} times as much as over"
            " seeds: the surrogate has little but noise to rank."
        )
    judge = facts["holdout"] or facts["cross_validation"]
    if judge and judge.spearman < UNRELIABLE:
        found.append(f"The surrogate's Spearman is {judge.spearman:.2f}: its optimum should not be relied on.")
    if facts["inside_sampled_region"] is False and not any("region" in w or "extrapol" in w.lower() for w in found):
        found.append("The optimum lies outside the region that the proxies sampled: its prediction is extrapolation.")
    open_trials = trials["unfinished"] + trials["planned"]
    if open_trials and not evidence.early.get("stopped"):
        found.append(f"{open_trials} of {len(evidence.trials)} planned proxies have not been trained.")
    if trials["failed"]:
        words = "1 proxy failed and is" if trials["failed"] == 1 else f"{trials['failed']} proxies failed and are"
        found.append(f"{words} left out; the reasons are listed with the cost.")
    return list(dict.fromkeys(found))


def as_sentence(warning: Any) -> str:
    """A warning from another stage with a capital (unless it starts with a domain's name) and a full stop."""
    text = str(warning).strip()
    first = text.split(" ")[0]
    start = text[:1] if first.endswith(":") or not first.isalpha() else text[:1].upper()
    return start + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _retraining_warnings(evidence: Evidence, facts: dict[str, Any]) -> list[str]:
    judged, found = facts["judged_on"], []
    if judged == facts["target"]:
        found.append(
            f"The retrained models were not scored on a test half: the verdict rests on {judged}, on which the search"
            " was fitted, and flatters the optimum."
        )
    elif shared := shared_files(evidence, facts["target"]):
        found.append(shared)
    if facts["seed_df"] == 0:
        found.append("Every mixture was retrained with one seed: there is no interval, so no claim is made.")
    elif facts["seed_sd"] == 0:
        found.append("The seeds gave identical losses, so they measured no noise: no claim is made.")
    for name, reason in (evidence.train.get("failed") or {}).items():
        found.append(f"The model {name} failed and is left out: {reason}.")
    for run in evidence.runs:
        if judged not in run.losses:
            found.append(f"The model {run.mixture}, seed {run.seed}, has no finite loss on {judged} and is left out.")
    budget, planned = finite(evidence.train.get("budget_tokens")), finite(evidence.space.get("target_tokens"))
    if abs(budget / planned - 1) > 0.01 if planned else False:
        found.append(
            f"Caps and epochs were solved for {count(planned)} tokens, the models were retrained on {count(budget)}:"
            f" every domain repeated {budget / planned:.2f} times as often as stated."
        )
    return found


def held_back(fitted: dict[str, Any]) -> Agreement | None:
    """Predicted against true on the held-back proxies of one target of fit.json."""
    held = fitted.get("holdout") or {}
    return _agree(held.get("predicted"), held.get("true"))


def control_labels(evidence: Evidence) -> dict[str, str]:
    """The controls in running text; the best single domain by its name."""
    name = single_domain(evidence)
    single = f"the best single domain ({name})" if name else "the best single domain"
    return {"prior": "the token prior", "uniform": "uniform", "best_single": single}


def single_domain(evidence: Evidence) -> str:
    """The domain that the control "best_single" was trained on; empty when there is no such run."""
    weights = next((run.weights for run in evidence.runs if run.mixture == "best_single"), {})
    return max(weights, key=lambda name: weights[name]) if weights else ""


def noise_sd(evidence: Evidence, target: str) -> float:
    """Seed sd of one proxy's loss in nats, from fit.json or from the repeats of the prior; NaN when unknown."""
    noise = finite((evidence.fit.get("noise") or {}).get(target))
    repeats = [t.losses[target] for t in evidence.repeats if target in t.losses]
    return float(np.std(repeats, ddof=1)) if math.isnan(noise) and len(repeats) > 1 else noise


def spread_sd(evidence: Evidence, target: str) -> float:
    """Sd of a target's loss over the distinct mixtures, in nats; NaN under two of them."""
    losses = [t.losses[target] for t in evidence.finished if target in t.losses]
    return float(np.std(losses, ddof=1)) if len(losses) > 1 else math.nan
