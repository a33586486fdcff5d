"""The report says what the numbers say: planted searches in, words and figures out."""

import json
import math
import re
import statistics
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from finished_search import DOMAINS, TARGETS, make_search
from scipy import stats

from regmix_search.report import write_report
from regmix_search.report.evidence import WITHOUT, read_evidence
from regmix_search.report.numerals import markdown_cell, minus

GAINS = {"prior": 0.22, "uniform": 0.115, "best_single": 0.02}


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run_dir = make_search(tmp_path_factory.mktemp("report") / "demo", GAINS)
    return run_dir, write_report(run_dir)


def gain_intervals(run_dir: Path, control: str, family: int) -> tuple[float, tuple[float, float]]:
    """Gain of optimal over a control on readme_test and its interval, from train.json and nothing of ours."""
    runs = json.loads((run_dir / "train.json").read_text())["runs"]
    groups: dict[str, list[float]] = {}
    for run in runs:
        groups.setdefault(run["mixture"], []).append(run["losses"]["readme_test"])
    df = sum(len(g) - 1 for g in groups.values())
    variance = sum((len(g) - 1) * statistics.variance(g) for g in groups.values()) / df
    gain = statistics.mean(groups[control]) - statistics.mean(groups["optimal"])
    error = math.sqrt(variance * (1 / len(groups["optimal"]) + 1 / len(groups[control])))
    half = stats.t.ppf(1 - 0.05 / family / 2, df) * error
    return gain, (gain - half, gain + half)


class Page(HTMLParser):
    """Text, tags and everything that would be loaded; fails on a tag that is not closed in order."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.loads: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(run_dir: Path) -> Page:
    return Page((run_dir / "report.html").read_text(encoding="utf-8"))


def test_page_is_one_valid_file_that_loads_nothing(search: tuple[Path, dict[str, Any]]) -> None:
    html = (search[0] / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.loads == []
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    for forbidden in ("http:", "https:", "//cdn", "@import", "url(", "@font-face"):
        assert forbidden not in html
    drawings = html.split("<svg ")[1:]
    assert len(drawings) == 8
    for drawing in drawings:
        ElementTree.fromstring("<svg " + drawing.split("</svg>")[0] + "</svg>")
        assert "nan" not in drawing.split("</svg>")[0].lower().replace("tenant", "")
    assert "prefers-color-scheme: dark" in html and "@media print" in html and 'name="viewport"' in html


def test_gains_and_intervals_match_an_independent_calculation(search: tuple[Path, dict[str, Any]]) -> None:
    run_dir, report = search
    text, markdown = page_of(run_dir).text, (run_dir / "report.md").read_text(encoding="utf-8")
    for row in report["comparisons"]:
        gain, joint = gain_intervals(run_dir, row["control"], family=3)
        alone = gain_intervals(run_dir, row["control"], family=1)[1]
        assert row["gain"] == pytest.approx(gain, abs=1e-12) == pytest.approx(GAINS[row["control"]], abs=1e-9)
        assert row["joint"] == pytest.approx(joint) and row["interval"] == pytest.approx(alone)
        for shown in (f"{gain:+.3f}", f"{joint[0]:+.3f} to {joint[1]:+.3f}", f"{alone[0]:+.3f} to {alone[1]:+.3f}"):
            assert minus(shown) in text and shown in markdown
    assert (report["seed_sd"], report["seed_df"]) == (pytest.approx(0.01), 4)
    bits = {row["control"]: row for row in report["comparisons_bpb"]}
    assert bits["prior"]["gain"] == pytest.approx(GAINS["prior"] / math.log(2) / 3.12)
    assert f"{bits['prior']['gain']:+.3f} bits per byte" in text


@pytest.mark.parametrize(
    ("gains", "seed_sd", "verdict"),
    [
        (
            {"prior": 0.2, "uniform": 0.1, "best_single": 0.05},
            0.002,
            "The optimal mixture beats the token prior, uniform and the best single domain (prose)",
        ),
        (
            {"prior": 0.02, "uniform": 0.01, "best_single": -0.01},
            0.02,
            "The optimal mixture shows no significant gain over the token prior, uniform or"
            " the best single domain (prose)",
        ),
        (
            {"prior": -0.2, "uniform": -0.1, "best_single": -0.3},
            0.002,
            "The optimal mixture is worse than the token prior, uniform and the best single domain (prose)",
        ),
        (
            {"prior": 0.3, "uniform": 0.0, "best_single": -0.3},
            0.01,
            "The optimal mixture beats the token prior, but shows no significant gain over uniform, and is worse than"
            " the best single domain (prose)",
        ),
    ],
)
def test_verdict_turns_with_the_numbers(tmp_path: Path, gains: dict[str, float], seed_sd: float, verdict: str) -> None:
    report = write_report(make_search(tmp_path, gains, seed_sd=seed_sd))
    assert report["verdict"] == verdict
    assert verdict in page_of(tmp_path).text and markdown_cell(verdict) in (tmp_path / "report.md").read_text()
    openings = {"better": "Better than", "worse": "Worse than", "unclear": "No significant gain over"}
    for row, words in zip(report["comparisons"], report["sentences"], strict=True):
        _, (low, high) = gain_intervals(tmp_path, row["control"], family=3)
        expected = "better" if low > 0 else "worse" if high < 0 else "unclear"
        assert row["outcome"] == expected and words.startswith(f"{openings[expected]} {row['label']}:")


def test_one_comparison_among_three_is_corrected(tmp_path: Path) -> None:
    # sd 0.01, 2 seeds each, 4 degrees of freedom: alone +-0.028, jointly +-0.040.
    report = write_report(make_search(tmp_path, {"prior": 0.034, "uniform": 0.2, "best_single": 0.2}))
    prior = report["comparisons"][0]
    assert prior["interval"][0] > 0 > prior["joint"][0] and prior["outcome"] == "unclear"
    assert "no significant gain over the token prior" in report["verdict"]
    assert "Taken alone it would count as better; as one of 3 comparisons it does not." in report["sentences"][0]


@pytest.mark.parametrize(("seeds", "seed_sd", "warning"), [(1, 0.01, "one seed"), (2, 0.0, "identical losses")])
def test_without_noise_nothing_is_claimed(tmp_path: Path, seeds: int, seed_sd: float, warning: str) -> None:
    report = write_report(make_search(tmp_path, GAINS, seed_sd=seed_sd, seeds=seeds))
    assert "nothing is claimed" in report["verdict"] and any(warning in w for w in report["warnings"])
    assert all(row["interval"] is None and row["outcome"] == "unknown" for row in report["comparisons"])
    assert "beats" not in page_of(tmp_path).text


def test_a_verdict_without_a_test_half_says_so(tmp_path: Path) -> None:
    train = json.loads((make_search(tmp_path, GAINS) / "train.json").read_text())
    for run in train["runs"]:
        del run["losses"]["readme_test"]
    train["runs"][2]["losses"]["readme"] = None
    (tmp_path / "train.json").write_text(json.dumps(train))
    report = write_report(tmp_path)
    assert report["judged_on"] == "readme"
    assert any("flatters the optimum" in w for w in report["warnings"])
    assert any("The model prior, seed 0, has no finite loss on readme" in w for w in report["warnings"])
    assert report["seed_df"] == 3 and len(report["losses"]["prior"]["seeds"]) == 1


def test_surrogate_figures_are_those_of_the_points(search: tuple[Path, dict[str, Any]]) -> None:
    run_dir, report = search
    fit = json.loads((run_dir / "fit.json").read_text())["targets"]["readme"]
    text = page_of(run_dir).text
    for name, predicted, true in (
        ("cross_validation", fit["cv_predicted"], fit["true"]),
        ("holdout", fit["holdout"]["predicted"], fit["holdout"]["true"]),
    ):
        assert report[name]["n"] == len(true)
        assert report[name]["spearman"] == pytest.approx(stats.spearmanr(predicted, true).statistic)
        rmse = math.sqrt(statistics.mean((p - t) ** 2 for p, t in zip(predicted, true, strict=True)))
        assert report[name]["rmse"] == pytest.approx(rmse)
        assert f"Spearman {report[name]['spearman']:.2f}" in text and f"RMSE {rmse:.3f} nats" in text
    assert "log_linear (chosen)" in text and "was chosen: lowest cross-validated error" in text
    assert "the retrained model is larger, so the levels cannot be compared" in text
    assert f"{report['predicted_gain']:+.3f}" in text


def test_noise_cost_and_failures(search: tuple[Path, dict[str, Any]]) -> None:
    run_dir, report = search
    evidence = read_evidence(run_dir)
    repeats = [t.losses["readme"] for t in evidence.trials if t.kind == "repeat"]
    others = [t.losses["readme"] for t in evidence.trials if t.kind != "repeat" and t.losses]
    assert (len(repeats), len(others)) == (3, 56)
    assert report["noise_sd"] == pytest.approx(statistics.stdev(repeats))
    assert report["spread_over_noise"] == pytest.approx(statistics.stdev(others) / statistics.stdev(repeats))
    text = page_of(run_dir).text
    assert report["trials"] == {
        "finished": 59, "failed": 1, "unfinished": 0, "planned": 0, "train": 48, "holdout": 8, "repeat": 3,
        "retried": 1, "ended_early": 0,
    }  # fmt: skip
    assert "all proxies 60 58.0M 1 h 09 min 35 min 14.0k" in text  # 59 x 70 s on two workers; 59 x 983,040 tokens
    assert "retrained models 8 160.0M 55 min" in text and "4.03e+15" in text  # 6 x 4.2e6 x 20e6 x 8
    assert "t0005 finished at attempt 2 killed by signal 9" in text
    assert "t0090 failed FloatingPointError: loss is nan at step 212" in text
    assert "outside the region" in text and "The cap on math binds" in text
    best = sorted((t for t in evidence.trials if t.kind != "repeat" and t.losses), key=lambda t: t.losses["readme"])
    assert " ".join(f"t{t.index:04d}" for t in best[:1]) + f" {best[0].losses['readme']:.3f}" in text
    assert "--mixture" in text and str(run_dir / "mixture.yaml") in text
    assert all(f"{value:.2f}" in text for name, value in report["weights"]["epochs"].items() if value)


def test_domain_table_marks_the_lowest_of_each_row(search: tuple[Path, dict[str, Any]]) -> None:
    runs = json.loads((search[0] / "train.json").read_text())["runs"]
    markdown = (search[0] / "report.md").read_text(encoding="utf-8")
    for target in (*TARGETS, "readme_test"):
        means: dict[str, float] = {}
        for name in ("optimal", "prior", "uniform", "best_single"):
            means[name] = statistics.mean(run["losses"][target] for run in runs if run["mixture"] == name)
        cells = [f"**{v:.3f}**" if v == min(means.values()) else f"{v:.3f}" for v in means.values()]
        assert f"| {markdown_cell(target)} | {' | '.join(cells)} |" in markdown


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_a_missing_file_is_named_and_the_rest_is_reported(tmp_path: Path, name: str) -> None:
    (make_search(tmp_path, GAINS) / name).unlink()
    report = write_report(tmp_path)
    assert list(report["missing"]) == [name]
    assert f"{name} : {WITHOUT[name]}" in page_of(tmp_path).text and name in (tmp_path / "report.md").read_text()
    if name == "train.json":
        assert "No large model has been trained" in report["verdict"] and report["comparisons"] == []
    else:
        assert report["comparisons"][0]["outcome"] == "better"


def test_mixtures_alone_make_a_report_and_nothing_else_is_required(tmp_path: Path) -> None:
    make_search(tmp_path / "all", GAINS)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mixtures.csv").write_bytes((tmp_path / "all" / "mixtures.csv").read_bytes())
    report = write_report(tmp_path / "run")
    assert set(report["missing"]) == set(WITHOUT) and report["trials"]["planned"] == 59
    assert "Nothing has been trained yet" in page_of(tmp_path / "run").text
    (tmp_path / "run" / "losses.csv").write_bytes((tmp_path / "all" / "losses.csv").read_bytes())
    report = write_report(tmp_path / "run")
    assert (report["target"], report["trials"]["finished"]) == ("readme", 59)
    assert (report["trials"]["train"], report["trials"]["repeat"]) == (57, 2)  # equal weights again: a repeat
    assert "The five best proxies on readme" in page_of(tmp_path / "run").text
    (tmp_path / "run" / "mixtures.csv").unlink()
    with pytest.raises(ValueError, match=r"mixtures\.csv: not found.*--stage mixtures"):
        write_report(tmp_path / "run")


def test_broken_files_lose_their_own_part_only(tmp_path: Path) -> None:
    make_search(tmp_path, GAINS)
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    lines[3] = lines[3][:20]
    (tmp_path / "trials.jsonl").write_text("\n".join(lines))
    (tmp_path / "fit.json").write_text('{"target": ')
    report = write_report(tmp_path)
    assert any("trials.jsonl, line 4 cannot be read" in w for w in report["warnings"])
    assert any("fit.json cannot be read" in w for w in report["warnings"])
    assert report["comparisons"][0]["outcome"] == "better"
    (tmp_path / "mixtures.csv").write_text("index,train_a,train_b\n0,0.5,half\n")
    with pytest.raises(ValueError, match=r"mixtures\.csv, line 2: .*half"):
        write_report(tmp_path)


def test_text_from_files_cannot_become_markup(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>|*&'
    make_search(tmp_path, GAINS)
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        quoted = evil.replace('"', '""') if path.suffix == ".csv" else evil.replace('"', '\\"')
        column = f'"train_{quoted}"' if path.suffix == ".csv" else f"train_{quoted}"
        text = path.read_text().replace("train_prose", column).replace('"prose"', f'"{quoted}"')
        path.write_text(text.replace("killed by signal 9", quoted))
    report = write_report(tmp_path)
    assert evil in report["weights"]["optimal"] and evil in report["comparisons"][2]["label"]
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "script" not in Page(html).tags and evil in Page(html).text and "<script" not in html
    table_rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| ")]
    assert not re.search(r"(?<!\\)<", "".join(table_rows))
    assert all(line.replace("\\|", "").count("|") > 2 for line in table_rows)


def test_report_json_is_the_returned_dict_and_a_second_run_agrees(search: tuple[Path, dict[str, Any]]) -> None:
    run_dir, report = search
    assert json.loads((run_dir / "report.json").read_text()) == report == write_report(run_dir)
    assert set(report["weights"]["optimal"]) == set(DOMAINS)
    assert [p.name for p in run_dir.iterdir() if "tmp" in p.name] == []
