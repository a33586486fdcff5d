"""The search on RegMix's published runs: how well few runs rank unseen mixtures, how fast the optimum is found.

    python -m benchmarks.search [--json]

Every choice is made on training rows: which surrogate by nested cross-validation, which runs by a design that sees no
loss. Test rows only score. Subsets are drawn by seeds 0 to 4, figures are means over them. The peer is RegMix's
LightGBM as in its paper, fitted to all 512 runs in the same process: for the optimum its simulation, for fit_auto its
13 fits. Rows without .1M or .60M are the mean of both. `until_precise` is precise.py's, `transfer` scales.py's; its row
1B needs RegMix's test_mixture_1B.csv and test_pile_loss_1B.csv beside the others. The runs are in
$MEGATRON_LITE_SHARED/data/regmix, or ../shared; it takes some six minutes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import lightgbm
import numpy as np

from benchmarks.precise import precise_rows
from benchmarks.reuse import reuse_rows
from benchmarks.scales import large_rows, transfer_rows
from benchmarks.table import Row, cost_row, parse_args, print_rows, rate_row
from regmix_search.choice import choose
from regmix_search.designs import law_optimal, maximin
from regmix_search.fits import fit_targets
from regmix_search.objective import Objective
from regmix_search.proposals import fit_runs, propose_rows
from regmix_search.region import Region
from regmix_search.solver import solve
from regmix_search.space import FloatArray, unlimited_space
from regmix_search.study_files import draw_runs
from regmix_search.surrogates import build_surrogate, score
from regmix_search.tables import Runs, read_runs

TARGET = "the_pile_pile_cc"
SEEDS = range(5)
DESIGNED = 24
CORES = 2
ROUNDS = (16, 8, 8, 8, 8)  # runs by design, then by expected improvement
ONE_SHOT = 96
EPOCHS = 4.0  # cap of every domain in the optimum: this many times its share of the Pile
SIMULATED, BATCH, TOP = 1_000_000, 50_000, 100  # RegMix's paper: the mean of the 100 best of a million
DRAWS = 100_000  # of RegMix's simulation where its mixture is the peer and not its time
REPEATS = 5  # of the timings below a second; the best counts
PILE = (  # configs/mixture/natural.yaml: shares of the Pile's tokens in the order of RegMix's tables
    *(0.113285273, 0.079608651, 0.003913491, 0.185375901, 0.051081359, 0.015962925, 0.101750772, 0.003707518),
    *(0.066529351, 0.001750772, 0.027085479, 0.236869207, 0.01184346, 0.007929969, 0.008032956, 0.038825953),
    0.046446962,
)
Predict = Callable[[FloatArray], FloatArray]


def published(name: str, size: str) -> Runs:
    """RegMix's runs: name train or test, size 1m, 60m or 1B. ValueError where they are not."""
    folder = published_folder()
    return read_runs(folder / f"{name}_mixture_{size}.csv", folder / f"{name}_pile_loss_{size}.csv")


def published_folder() -> Path:
    """Where RegMix's runs are."""
    root = os.environ.get("MEGATRON_LITE_SHARED") or Path(__file__).resolve().parents[2] / "shared"
    return Path(root) / "data" / "regmix"


def has_large() -> bool:
    """Are RegMix's 64 1B runs there too?"""
    return (published_folder() / "test_pile_loss_1B.csv").is_file()


def fit_regmix(runs: Runs, target: str = TARGET) -> Predict:
    """RegMix's regression: its notebook's settings, without its early stopping on the test runs."""
    settings = {"objective": "l2", "learning_rate": 0.01, "seed": 42, "num_threads": 1, "verbosity": -1}
    model = lightgbm.train(settings, lightgbm.Dataset(runs.weights, runs.losses[target]), 1000)
    return lambda weights: np.asarray(model.predict(weights, num_threads=1))


def fit_ours(runs: Runs, target: str = TARGET) -> Predict:
    """What `--surrogate auto` fits: chosen by nested cross-validation on these runs."""
    losses = runs.losses[target]
    return build_surrogate(choose(runs.weights, losses).chosen).fit(runs.weights, losses).predict


def rank(predicts: Sequence[tuple[Predict, str]], tests: dict[str, Runs]) -> dict[str, float]:
    """Mean Spearman on each test, over fits of (predict, target)."""
    return {
        size: float(np.mean([score(predict(test.weights), test.losses[t])["spearman"] for predict, t in predicts]))
        for size, test in tests.items()
    }


def rank_rows(key: str, ours: dict[str, float], peer: dict[str, float]) -> list[Row]:
    """The mean over tests, then each test."""
    means = [float(np.mean(list(side.values()))) for side in (ours, peer)]
    return [rate_row(key, *means, "Spearman"), *(rate_row(f"{key}.{s}", ours[s], peer[s], "Spearman") for s in ours)]


def correlations(train: Runs, tests: dict[str, Runs]) -> list[Row]:
    """How well the chosen surrogate ranks unseen mixtures, from all runs down to 24 designed ones."""
    samples = {"cc_512": [train]}
    samples |= {f"cc_{n}": [draw_runs(train, n, seed) for seed in SEEDS] for n in (128, 64)}
    samples["cc_24_designed"] = [pick(train, law_optimal(train.weights, DESIGNED, seed)) for seed in SEEDS]
    peer = rank([(fit_regmix(train), TARGET)], tests)
    rows = []
    for key, drawn in samples.items():
        rows += rank_rows(key, rank([(fit_ours(runs), TARGET) for runs in drawn], tests), peer)
    ours = [(fit_ours(runs, t), t) for runs in samples["cc_64"] for t in train.losses]
    theirs = [(fit_regmix(train, t), t) for t in train.losses]
    return rows + rank_rows("mean13_64", rank(ours, tests), rank(theirs, tests))


def pick(runs: Runs, rows: Iterable[int]) -> Runs:
    """The runs in these rows."""
    return runs.select(runs.index[row] for row in rows)


def adaptive_row(pool: Runs) -> Row:
    """Regret of 48 runs picked in rounds out of 768, in nats: how far the best of them is from the best of all.

    The peer's is of 95 random runs and the one that LightGBM, fitted to these, predicts to be best.
    """
    losses, ours, peer = pool.losses[TARGET], [], []
    for seed in SEEDS:
        rows = list(maximin(pool.weights, ROUNDS[0], seed))
        for batch in ROUNDS[1:]:
            fitted = fit_runs(pick(pool, rows), TARGET)
            rows += list(propose_rows(fitted, pool.weights, batch)[0])
        ours.append(losses[rows].min() - losses.min())
        drawn = list(np.random.default_rng(seed).permutation(len(losses))[: ONE_SHOT - 1])
        drawn.append(int(np.argmin(fit_regmix(pick(pool, drawn))(pool.weights))))
        peer.append(losses[drawn].min() - losses.min())
    mean = float(np.mean(ours))
    return Row("adaptive_48", mean, float(np.mean(peer)), float(np.mean(peer)) / max(mean, 1e-4), "nats regret")


def join(first: Runs, second: Runs) -> Runs:
    """Both tables as one pool, numbered from 0."""
    losses = {name: np.concatenate([values, second.losses[name]]) for name, values in first.losses.items()}
    weights = np.vstack([first.weights, second.weights])
    return Runs(tuple(range(len(weights))), first.domains, weights, losses)


def best_ms(solve_once: Callable[[], FloatArray]) -> float:
    """Milliseconds of the fastest of REPEATS."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        solve_once()
        times.append(time.perf_counter() - start)
    return min(times) * 1000


def simulate_regmix(predict: Predict, prior: FloatArray, samples: int = SIMULATED) -> FloatArray:
    """RegMix's optimum [k]: the mean of the best 100 of `samples` mixtures from Dirichlet(prior)."""
    rng, best, losses = np.random.default_rng(42), np.empty((0, len(prior))), np.empty(0)
    for _ in range(samples // BATCH):
        drawn = rng.dirichlet(prior, size=BATCH)
        best, losses = np.vstack([best, drawn]), np.concatenate([losses, predict(drawn)])
        keep = np.argsort(losses, kind="stable")[:TOP]
        best, losses = best[keep], losses[keep]
    return np.asarray(best.mean(axis=0))


def optima(train: Runs) -> list[Row]:
    """The capped optimum of a law and of a process, against RegMix's simulation."""
    prior = np.array(PILE) / sum(PILE)
    predict, start = fit_regmix(train), time.perf_counter()
    simulate_regmix(predict, prior)
    peer = (time.perf_counter() - start) * 1000
    region = Region(np.zeros(len(prior)), np.minimum(1.0, EPOCHS * prior))
    rows = []
    for key, name in (("optimum_law", "effective"), ("optimum_gp", "gp")):
        objective = Objective(((1.0, build_surrogate(name).fit(train.weights, train.losses[TARGET])),))
        ms = best_ms(lambda o=objective: solve(o, region, prior, train.weights))  # type: ignore[misc]
        rows.append(cost_row(key, ms, peer, "ms"))
    return rows


def early_rows(train: Runs, pool: Runs) -> list[Row]:
    """`until_precise`: the peer takes all 512 runs, and RegMix's simulation."""
    space, prior = unlimited_space(train.domains, dict(zip(train.domains, PILE, strict=True))), np.array(PILE)
    peer = simulate_regmix(fit_regmix(train), prior / prior.sum(), DRAWS)
    return precise_rows(train, pool, TARGET, space, peer, SEEDS)


def auto_row(train: Runs) -> Row:
    """Seconds of choosing and fitting a surrogate for each of the 13 losses, on two cores."""
    start = time.perf_counter()
    fit_targets(train, TARGET, workers=CORES)
    ours, start = time.perf_counter() - start, time.perf_counter()
    for target in train.losses:
        fit_regmix(train, target)
    return cost_row("fit_auto", ours, time.perf_counter() - start, "s")


def run() -> list[Row]:
    """Every row of the table."""
    train, tests = published("train", "1m"), {"1M": published("test", "1m"), "60M": published("test", "60m")}
    pool = join(train, tests["1M"])
    moved = transfer_rows(train, tests["60M"], SEEDS)
    if has_large():
        moved += large_rows(train, tests["60M"], published("test", "1B"), TARGET)
    moved += reuse_rows(train, tests, pool, TARGET, np.array(PILE), EPOCHS)
    return [
        *correlations(train, tests),
        adaptive_row(pool),
        *optima(train),
        auto_row(train),
        *early_rows(train, pool),
        *moved,
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs and prints; returns the exit code: 2 without the published runs."""
    args = parse_args(__doc__, argv)
    try:
        rows = run()
    except ValueError as error:
        print(f"error: {error}; set MEGATRON_LITE_SHARED to the folder above data/regmix", file=sys.stderr)
        return 2
    print_rows(rows, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
