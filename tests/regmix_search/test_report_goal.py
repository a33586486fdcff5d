"""A goal of several losses is what the report follows: verdict, tables and figures."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_search import TARGETS, make_search
from scipy import stats

from regmix_search.report import write_report

SHARES = {"prose": 0.25, "python": 0.75}
GOALS: tuple[tuple[str, Any, dict[str, float], bool], ...] = (
    ("mean of 12 losses", "mean", dict.fromkeys(TARGETS, 1 / 12), False),
    ("worst of 12 losses", "worst", dict.fromkeys(TARGETS, 1 / 12), True),
    ("0.25 prose + 0.75 python", SHARES, SHARES, False),
)


def combine(columns: dict[str, Any], shares: dict[str, float], worst: bool) -> np.ndarray:
    """The goal from columns, by numpy alone."""
    rows = np.array([columns[name] for name in shares])
    return rows.max(axis=0) if worst else np.average(rows, axis=0, weights=list(shares.values()))


@pytest.fixture(params=GOALS, ids=[name for name, *_ in GOALS])
def search(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, dict[str, float], bool]:
    """A search of a goal of several losses, before the large models."""
    name, target, shares, worst = request.param
    folder = make_search(tmp_path / "goal", {"prior": 0.1, "uniform": 0.1, "best_single": 0.1})
    (folder / "train.json").unlink()
    for file, more in (("fit.json", {}), ("optimum.json", {"objective": {"predicted": 5.01, "prior": 5.25}})):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **more, "target": target}))
    (folder / "config.yaml").write_text(f"fit: {{target: {json.dumps(target)}}}\n")
    return folder, name, shares, worst


def test_verdict_tables_and_figures_follow_the_goal(search: tuple[Path, str, dict[str, float], bool]) -> None:
    folder, name, shares, worst = search
    fit = json.loads((folder / "fit.json").read_text())["targets"]
    facts, page = write_report(folder), (folder / "report.html").read_text()
    assert facts["target"] == name and f"target <b>{name}</b>" in page and "report follows" not in page

    for key, predicted, true in (("cross_validation", "cv_predicted", "true"), ("holdout", "predicted", "true")):
        sides = {t: entry if key == "cross_validation" else entry["holdout"] for t, entry in fit.items()}
        x, y = (combine({t: side[k] for t, side in sides.items()}, shares, worst) for k in (predicted, true))
        assert facts[key]["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
        assert facts[key]["rmse"] == pytest.approx(np.sqrt(np.mean((x - y) ** 2)))
    assert facts["predicted_gain"] == pytest.approx(0.24)
    assert f"The five best proxies on {name}" in page
    assert page.count("<svg") == 5, "weights, two scatters, design, noise"


def test_best_proxy_and_noise_are_the_goals(search: tuple[Path, str, dict[str, float], bool]) -> None:
    folder, _, shares, worst = search
    with (folder / "losses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {t: np.array([float(row[f"metric/{t}_val_loss"]) for row in rows]) for t in TARGETS}
    losses = combine(columns, shares, worst)
    facts = write_report(folder)
    assert facts["noise_sd"] == pytest.approx(np.std(losses[-3:], ddof=1)), "the last three repeat the prior"
    assert facts["spread_sd"] == pytest.approx(np.std(losses[:-3], ddof=1))
    best = next(line for line in (folder / "report.md").read_text().splitlines() if re.match(r"\| t\d{4}", line))
    assert best.split("|")[1].strip() == f"t{int(np.argmin(losses[:-3])):04d}"


def test_a_goal_that_only_the_config_names_is_followed(tmp_path: Path) -> None:
    folder = make_search(tmp_path / "early", {"prior": 0.1, "uniform": 0.1, "best_single": 0.1})
    for name in ("train.json", "fit.json", "optimum.json", "mixture.yaml"):
        (folder / name).unlink()
    (folder / "config.yaml").write_text("fit: {target: mean}\n")
    assert write_report(folder)["target"] == "mean of 12 losses"


def test_a_goal_of_unknown_losses_leaves_the_report_standing(tmp_path: Path) -> None:
    folder = make_search(tmp_path / "odd", {"prior": 0.1, "uniform": 0.1, "best_single": 0.1})
    fit = json.loads((folder / "fit.json").read_text())
    (folder / "fit.json").write_text(json.dumps({**fit, "target": {"prose": 0.4, "no such loss": 0.6}}))
    assert write_report(folder)["target"] == "no such loss"
