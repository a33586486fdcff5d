"""A finished search, made up: every artefact that the report reads, with a planted truth."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

DOMAINS = ("python", "tests", "cpp", "comments", "prose", "tables", "apiref", "typed", "repl", "math")
TOKENS = (8.0e6, 8.0e6, 8.0e6, 3.9e6, 2.9e6, 3.1e6, 1.7e6, 1.6e6, 1.5e6, 0.52e6)
TARGETS = ("readme", "messages", *DOMAINS)
TARGET_TOKENS, MAX_EPOCHS = 20e6, 4
NOISE = 0.03  # seed sd of a proxy, nats
START = 1_763_712_000.0  # any unix time


def transfer_of(target: str) -> np.ndarray:
    """How much each training domain teaches of a target; readme learns from prose, comments, python and math."""
    if target == "readme":
        return np.array([0.25, 0.1, 0.03, 0.6, 1.0, 0.0, 0.35, 0.05, 0.1, 0.45])
    if target == "messages":
        return np.array([0.5, 0.2, 0.1, 0.7, 0.6, 0.0, 0.3, 0.1, 0.1, 0.1])
    own = np.array([float(d == target) for d in DOMAINS])
    return own + 0.2 * np.random.default_rng([7, TARGETS.index(target)]).random(10)


def true_loss(target: str, weights: np.ndarray) -> float:
    """Nats per token of a proxy on this mixture, without noise: saturating in the exposure to each domain."""
    return 6.9 - 1.3 * float(np.sum(transfer_of(target) * np.sqrt(np.maximum(weights, 0))))


def make_search(folder: Path, gains: dict[str, float], seed_sd: float = 0.01, seeds: int = 2, trials: int = 56) -> Path:
    """Write a whole search. `gains`: exact mean loss of each control minus optimal's on readme_test, in nats."""
    rng = np.random.default_rng([1, 2])
    prior = np.array(TOKENS) / sum(TOKENS)
    caps = np.minimum(1.0, MAX_EPOCHS * np.array(TOKENS) / TARGET_TOKENS)
    optimum = np.array([0.14, 0.02, 0.0, 0.25, 0.38, 0.0, 0.07, 0.0, 0.036, 0.104])
    drawn = np.array([rng.dirichlet(12 * s * prior**0.5 / np.sum(prior**0.5)) for s in np.geomspace(0.1, 5, trials)])
    drawn = np.vstack([drawn, *[prior] * 3])
    kinds = ["holdout" if i % 7 == 3 else "train" for i in range(trials)] + ["repeat"] * 3
    losses = [{t: true_loss(t, w) + NOISE * rng.standard_normal() for t in TARGETS} for w in drawn]
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "mixtures.csv", [f"train_{d}" for d in DOMAINS], drawn.tolist())
    _write_csv(
        folder / "losses.csv",
        [f"metric/{t}_val_loss" for t in TARGETS],
        [[row[t] for t in TARGETS] for row in losses],
    )
    _write_ledger(folder / "trials.jsonl", drawn, kinds, losses)
    named = {
        n: dict(zip(DOMAINS, map(float, v), strict=True)) for n, v in {"p": prior, "c": caps, "o": optimum}.items()
    }
    _dump(
        folder / "space.json",
        {
            "domains": list(DOMAINS),
            "tokens": dict(zip(DOMAINS, TOKENS, strict=True)),
            "prior": named["p"],
            "caps": named["c"],
            "target_tokens": TARGET_TOKENS,
            "max_epochs": MAX_EPOCHS,
        },
    )
    _dump(folder / "fit.json", _fit(kinds, losses, rng))
    epochs = {d: w * TARGET_TOKENS / n for d, w, n in zip(DOMAINS, optimum, TOKENS, strict=True)}
    best = min(range(trials), key=lambda i: losses[i]["readme"])
    predicted = {t: true_loss(t, optimum) for t in TARGETS}
    _dump(
        folder / "optimum.json",
        {
            "target": "readme",
            "weights": named["o"],
            "epochs": epochs,
            "caps": named["c"],
            "at_cap": ["math"],
            "predicted": predicted,
            "prior_predicted": {t: true_loss(t, prior) for t in TARGETS},
            "interval90": [predicted["readme"] - 0.08, predicted["readme"] + 0.08],
            "unconstrained": {"weights": named["o"], "predicted": predicted["readme"] - 0.02},
            "best_observed": {"index": best, "weights": {}, "loss": losses[best]["readme"]},
            "inside_sampled_region": False,
            "distance": 0.31,
            "warnings": ["The cap on math binds: 4 epochs at 20.0M tokens."],
        },
    )
    lines = "\n".join(f"  train_{d}: {w:.6f}" for d, w in named["o"].items())
    (folder / "mixture.yaml").write_text(f"version: 1\ntrain:\n{lines}\nvalid:\n  valid_readme: 1.0\n")
    (folder / "config.yaml").write_text("name: demo\nseed: 0\nfit:\n  target: readme\n  target_test: readme_test\n")
    _dump(folder / "corpus" / "MANIFEST.json", {"fingerprint": "5d1ec0ffee", "files": []})
    single = np.eye(10)[DOMAINS.index("prose")]
    mixtures = {"optimal": optimum, "prior": prior, "uniform": np.full(10, 0.1), "best_single": single}
    _dump(folder / "train.json", _train(mixtures, {"optimal": 0.0, **gains}, seed_sd, seeds, rng))
    return folder


def _train(
    mixtures: dict[str, np.ndarray], gains: dict[str, float], seed_sd: float, seeds: int, rng: np.random.Generator
) -> dict[str, Any]:
    runs = []
    for name, weights in mixtures.items():
        # Seeds at exactly +-seed_sd / sqrt(2) around the mean, so that each pair's sample sd is seed_sd.
        shifts = [0.0] if seeds == 1 else [seed_sd * math.sqrt(0.5) * (-1) ** s for s in range(seeds)]
        for seed, shift in enumerate(shifts):
            losses = {t: true_loss(t, weights) - 0.9 + 0.01 * rng.standard_normal() for t in TARGETS}
            losses["readme_test"] = 4.6 + gains[name] + shift
            losses["readme"] = 4.55 + 0.9 * gains[name] + shift
            tokens = np.linspace(20e6 / 400, 20e6, 400)
            fall = 1.4 * (1 - tokens / 20e6) ** 2 + 3 * np.exp(-tokens / 6e5)
            train_loss = true_loss(str(DOMAINS[int(np.argmax(weights))]), weights) - 1.6 + fall
            runs.append(
                {
                    "mixture": name,
                    "seed": seed,
                    "weights": dict(zip(DOMAINS, map(float, weights), strict=True)),
                    "losses": losses,
                    "bpb": {t: loss / math.log(2) / 3.12 for t, loss in losses.items()},
                    "curve": np.stack([tokens, train_loss + 0.15 * rng.standard_normal(400)], 1).tolist(),
                    "valid_curve": np.stack([tokens, losses["readme"] + fall], 1)[19::20].tolist(),
                    "tokens": 20_000_000,
                    "seconds": 410.0 + seed,
                    "run_dir": f"train/{name}-s{seed}",
                }
            )
    model = {"name": "demo_4m", "params": 4_200_000, "non_embedding_params": 3_100_000}
    return {"target": "readme", "target_test": "readme_test", "model": model, "budget_tokens": 20e6, "runs": runs}


def _fit(kinds: list[str], losses: list[dict[str, float]], rng: np.random.Generator) -> dict[str, Any]:
    split = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in ("train", "holdout", "repeat")}
    targets = {}
    for t in TARGETS:
        true, held = ([losses[i][t] for i in split[kind]] for kind in ("train", "holdout"))
        scores = {
            name: {"spearman": rho, "pearson": rho + 0.01, "mse": rmse**2, "rmse": rmse}
            for name, rho, rmse in (("linear", 0.83, 0.12), ("log_linear", 0.94, 0.06), ("lightgbm", 0.79, 0.14))
        }
        predicted = [v + 0.05 * rng.standard_normal() for v in held]
        targets[t] = {
            "chosen": "log_linear",
            "why": "lowest cross-validated error; lightgbm needs more than 64 runs",
            "candidates": scores,
            "holdout": {"index": split["holdout"], "predicted": predicted, "true": held},
            "cv_predicted": [v + 0.06 * rng.standard_normal() for v in true],
            "true": true,
        }
    noise = {t: float(np.std([losses[i][t] for i in split["repeat"]], ddof=1)) for t in TARGETS}
    sizes = {"n_train": len(split["train"]), "n_holdout": len(split["holdout"])}
    return {"target": "readme", **sizes, "seed": 0, "noise": noise, "targets": targets, "warnings": []}


def _write_ledger(path: Path, drawn: np.ndarray, kinds: list[str], losses: list[dict[str, float]]) -> None:
    """Two workers in turn, 70 s a trial; trial 5 crashes once and is retried; trial 90 fails for good; a torn end."""
    events: list[dict[str, Any]] = []
    for i, (weights, kind, scored) in enumerate(zip(drawn, kinds, losses, strict=True)):
        begin = START + 70.0 * (i // 2)
        facts = {"trial": i, "kind": kind, "seed": 0 if kind != "repeat" else i}
        events.append({"event": "claim", "time": begin, **facts})
        if i == 5:
            events.append({"event": "fail", "time": begin, "reason": "killed by signal 9", **facts})
            events.append({"event": "claim", "time": begin, **facts})
        mixture = dict(zip(DOMAINS, map(float, weights), strict=True))
        done = {"losses": scored, "seconds": 70.0, "tokens": 983_040, "weights": mixture}
        events.append({"event": "finish", "time": begin + 70, **facts, **done})
    reason = "FloatingPointError: loss is nan at step 212"
    events.append({"event": "fail", "trial": 90, "time": START + 3000, "reason": reason, "kind": "train"})
    path.write_text("".join(json.dumps(e) + "\n" for e in events) + '{"event": "claim", "tri')


def _write_csv(path: Path, columns: list[str], rows: list[list[float]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", *columns])
        writer.writerows([i, *row] for i, row in enumerate(rows))


def _dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
