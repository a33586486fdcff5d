"""What the report says of files that are not there, of text that the target's halves share, and of rounds."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from finished_search import make_search

from regmix_search.report import write_report

GAINS = {"prior": 0.22, "uniform": 0.115, "best_single": 0.02}
MANIFEST = "corpus/MANIFEST.json"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("name: demo\n", True),
        ("corpus: {kind: local}\nshards: {data_dir: null}\n", True),
        ("shards: {data_dir: /my/shards}\n", False),
        ("corpus: {kind: none, dir: /my/text}\n", False),
    ],
)
def test_a_manifest_is_missed_only_where_the_search_collects_text(tmp_path: Path, config: str, named: bool) -> None:
    folder = make_search(tmp_path, GAINS)
    (folder / MANIFEST).unlink()
    (folder / "config.yaml").write_text(config)
    assert (MANIFEST in write_report(folder)["missing"]) == named
    assert (MANIFEST in (folder / "report.md").read_text()) == named


def test_a_study_of_tables_misses_no_manifest(tmp_path: Path) -> None:
    folder = make_search(tmp_path, GAINS)
    for name in (MANIFEST, "trials.jsonl", "config.yaml"):
        (folder / name).unlink()
    assert MANIFEST not in write_report(folder)["missing"]


def files(*places: tuple[str, str, str]) -> dict[str, Any]:
    return {
        "files": [{"package": "p", "path": path, "domain": domain, "split": split} for path, domain, split in places]
    }


def test_halves_with_pieces_of_the_same_files_are_named_and_counted(tmp_path: Path) -> None:
    folder = make_search(tmp_path, GAINS)
    both = [(path, "readme", split) for path in ("a", "b") for split in ("valid", "test", "test")]
    (folder / MANIFEST).write_text(json.dumps(files(*both, ("c", "readme", "test"), ("d", "prose", "test"))))
    said = [warning for warning in write_report(folder)["warnings"] if "halves" in warning]
    assert len(said) == 1 and "halves of readme" in said[0] and "2 of the 3 files" in said[0]
    apart = files(("a", "readme", "valid"), ("b", "readme", "test"), ("a", "prose", "test"))
    (folder / MANIFEST).write_text(json.dumps(apart))
    assert not any("halves" in warning for warning in write_report(folder)["warnings"])


def test_the_design_figure_marks_what_rounds_proposed(tmp_path: Path) -> None:
    """Of 56 mixtures the first 45 are the design, the others two rounds of 8, the last cut short."""
    folder = make_search(tmp_path, GAINS)
    rows = (folder / "mixtures.csv").read_text().splitlines(keepends=True)
    kept, repeats = rows[:57], rows[57:]
    (folder / "design.csv").write_text("".join(kept[:46] + repeats))
    (folder / "config.yaml").write_text("mixtures: {rounds: 2, batch: 8}\n")
    write_report(folder)
    page = (folder / "report.html").read_text()
    figure = next(svg for svg in re.findall(r"<svg.*?</svg>", page, re.S) if "Sampled weights" in svg)
    marked = re.findall(r"late\"[^>]*><title>round (\d)</title>", figure)
    assert (marked.count("1"), marked.count("2"), len(marked)) == (80, 30, 110), "8 and 3 mixtures of ten domains"
    assert "by a round" in figure and "that later rounds proposed" in page
    (folder / "design.csv").unlink()
    write_report(folder)
    assert " late" not in re.sub(r"<style>.*?</style>", "", (folder / "report.html").read_text(), flags=re.S)


def early_fit(runs: int, moved: float | None, left: float) -> dict[str, Any]:
    mixture = {"prose": 0.6, "math": 0.3, "cpp": 0.1}
    told = {"predicted": 5.1, "interval90": [5.0, 5.2], "prior": 5.3, "left_to_gain": left, "reach": 0.2, "noise": 0.02}
    facts = {"time": 1.0, "runs": runs, "mixtures": runs, "surrogate": "gp", "target": "readme", "weights90": {}}
    return {**facts, **told, "weights": mixture, "moved": moved}


def test_the_report_shows_early_fits_and_that_they_stopped_the_search(tmp_path: Path) -> None:
    folder = make_search(tmp_path, GAINS)
    assert "While proxies ran" not in (write_report(folder), (folder / "report.html").read_text())[1]
    (folder / "config.yaml").write_text("proxies: {until_precise: true}\n")
    fits = [early_fit(30, None, 0.09), early_fit(40, 0.1, 0.01), early_fit(52, 0.15, 0.01)]
    (folder / "early.json").write_text(json.dumps({"identity": "x", "fits": fits, "stopped": None}))
    write_report(folder)
    text = (folder / "report.md").read_text()
    assert "has not stopped the search: of 3 early fits 2 were settled" in text
    rows = [line for line in text.splitlines() if "5.0000 to 5.2000" in line]
    assert len(rows) == 3 and "| 30 | gp | 5.1000 |" in rows[0] and "| no | prose 60.0%, math 30.0%" in rows[0]
    assert "| 0.15 | 0.20 | 0.0100 | 0.0200 | yes |" in rows[2]
    mixtures = (folder / "mixtures.csv").read_text().splitlines()
    (folder / "mixtures.csv").write_text("\n".join([*mixtures, *(f"{i},{mixtures[1][2:]}" for i in (95, 96))]))
    (folder / "early.json").write_text(json.dumps({"fits": fits, "stopped": "it is settled"}))
    warnings = write_report(folder)["warnings"]
    assert "it is settled. 2 of the planned ones were saved" in (folder / "report.html").read_text()
    assert not any("have not been trained" in warning for warning in warnings), "that was the plan"
    (folder / "early.json").write_text(json.dumps({"fits": [{"runs": 3}]}))
    write_report(folder)
    assert "early.json is of another version" in (folder / "report.md").read_text()


def test_proxies_that_ended_early_are_marked_as_estimates(tmp_path: Path) -> None:
    folder = make_search(tmp_path, GAINS)
    fit = json.loads((folder / "fit.json").read_text())
    assert write_report(folder)["trials"]["ended_early"] == 0
    lines = []
    for line in (folder / "trials.jsonl").read_text().splitlines():
        stops = '"event": "finish", ' in line and any(f'"trial": {i},' in line for i in (7, 9))
        ended = line.replace('"tokens": 983040', '"stopped": {"tokens": 4096}, "tokens": 40960')
        lines.append(ended if stops else line)
    (folder / "trials.jsonl").write_text("\n".join(lines))
    fit["train_index"] = [i for i in range(56) if i % 7 != 3]
    (folder / "fit.json").write_text(json.dumps(fit))
    report, page = write_report(folder), (folder / "report.html").read_text()
    assert report["trials"]["ended_early"] == 2 and "; 2 ended early" in page
    assert page.count("ended early, after 41.0k tokens: losses are estimates") == 2
    true = fit["targets"]["readme"]["true"]
    marked = re.findall(r'told"[^>]*><title>[^<]* estimated ([\d.]+)<', page)
    assert sorted(marked) == sorted(f"{true[fit['train_index'].index(i)]:.3f}" for i in (7, 9))
