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
