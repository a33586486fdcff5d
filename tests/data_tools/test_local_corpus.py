"""A build of two packages: every domain within its cap, no leak, and the same bytes each time."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools.corpus_leaks import find_overlaps, ngram_hashes
from data_tools.corpus_manifest import compare_with_reference, write_reference
from data_tools.corpus_sources import find_distributions, list_sources
from data_tools.local_corpus import VALID_SHARE, build_corpus

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"dists": ["numpy", "rich"], "max_bytes": 150_000, "valid_bytes": 60_000, "log": lambda line: None}


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    build_corpus(out, workers=2, **SMALL)
    return out


def read_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_workers_do_not_change_a_byte(small_corpus: Path, tmp_path: Path) -> None:
    build_corpus(tmp_path, workers=1, **SMALL)
    names = sorted(path.name for path in small_corpus.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (small_corpus / name).read_bytes(), name


def test_every_domain_is_there_within_its_cap(small_corpus: Path) -> None:
    manifest = json.loads((small_corpus / "MANIFEST.json").read_text())
    for domain in ("python", "tests", "cpp", "comments", "prose", "tables", "apiref", "typed", "repl", "math"):
        about = manifest["outputs"][f"train_{domain}.jsonl"]
        assert 0 < about["bytes"] <= SMALL["max_bytes"]
        texts = [line["text"] for line in read_lines(small_corpus / f"train_{domain}.jsonl")]
        assert len(texts) == about["documents"] and all(texts)
    for name in ("valid_readme", "valid_readme_test", "valid_messages", "valid_python", "valid_prose"):
        assert 0 < manifest["outputs"][f"{name}.jsonl"]["bytes"] <= SMALL["valid_bytes"]
    assert not (small_corpus / "train_readme.jsonl").exists() and not (small_corpus / "train_messages.jsonl").exists()


def test_train_and_valid_share_no_file(small_corpus: Path) -> None:
    train = {line["source"] for p in small_corpus.glob("train_*.jsonl") for line in read_lines(p)}
    held_out = {
        line["source"]
        for p in small_corpus.glob("valid_*.jsonl")
        if p.name not in ("valid_messages.jsonl",)
        for line in read_lines(p)
    }
    assert train and held_out and not train & held_out
    # the halves of the target are dealt piece by piece: they may share a file, never a piece of it
    halves = [
        {line["text"] for line in read_lines(small_corpus / f"valid_{n}.jsonl")} for n in ("readme", "readme_test")
    ]
    assert all(halves)
    assert not halves[0] & halves[1]
    # A file's messages are held out, its docstrings may train, its code may not.
    code = {line["source"] for line in read_lines(small_corpus / "train_python.jsonl")}
    assert not code & {line["source"] for line in read_lines(small_corpus / "valid_messages.jsonl")}


def test_targets_do_not_leak_into_training_text(small_corpus: Path) -> None:
    texts = [line["text"] for p in sorted(small_corpus.glob("train_*.jsonl")) for line in read_lines(p)]
    for target in ("readme", "readme_test", "messages"):
        grams = [ngram_hashes(line["text"])[0] for line in read_lines(small_corpus / f"valid_{target}.jsonl")]
        target_grams = np.unique(np.concatenate(grams))
        assert len(target_grams) > 300
        leaked = sum(len(found) for _, found in find_overlaps(texts, target_grams))
        assert leaked <= 0.001 * len(target_grams), target


def test_manifest_agrees_with_the_packages(small_corpus: Path) -> None:
    manifest = json.loads((small_corpus / "MANIFEST.json").read_text())
    sources = {(s.package, s.path): s for d in find_distributions(["numpy", "rich"])[0] for s in list_sources(d)[0]}
    for entry in manifest["files"]:
        source = sources[entry["package"], entry["path"]]
        assert (entry["sha256"], entry["version"]) == (source.sha256, source.version)
        if entry["split"] == "valid" and entry["domain"] not in ("readme", "messages"):
            assert source.position < VALID_SHARE
    assert [s for s in manifest["skipped"] if s["path"]] == []
    page = (small_corpus / "SOURCES.md").read_text()
    assert "| numpy |" in page and "| rich |" in page and "BSD-3-Clause" in page


def test_second_run_does_nothing_and_a_broken_folder_is_rebuilt(tmp_path: Path) -> None:
    settings = SMALL | {"dists": ["rich"], "workers": 1}
    first = build_corpus(tmp_path, **settings)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    lines: list[str] = []
    assert build_corpus(tmp_path, **(settings | {"log": lines.append})) == first
    assert "nothing to do" in lines[0]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    (tmp_path / "train_python.jsonl").write_text("cut short")
    (tmp_path / "train_tables.jsonl").write_text("from an older corpus\n")
    assert build_corpus(tmp_path, **settings)["fingerprint"] == first["fingerprint"]
    assert len(read_lines(tmp_path / "train_python.jsonl")) == first["outputs"]["train_python.jsonl"]["documents"]
    assert not (tmp_path / "train_tables.jsonl").exists()


def test_reference_names_the_packages_that_differ(tmp_path: Path) -> None:
    manifest = {
        "settings": {"dists": {"a": "1", "b": "2", "c": "3"}, "max_bytes": {"python": 5}, "valid_bytes": 2},
        "fingerprint": "f",
        "dist_fingerprints": {"a==1": "x", "b==2": "y", "c==3": "z"},
        "skipped": [],
    }
    path = tmp_path / "reference.json"
    assert "no reference" in compare_with_reference(manifest, path)
    write_reference(manifest, path)
    assert compare_with_reference(manifest, path) == "corpus matches the reference"
    assert "gave other text" in compare_with_reference(manifest | {"fingerprint": "g"}, path)
    other = {
        "dist_fingerprints": {"a==1": "edited", "b==3": "y"},
        "skipped": [{"package": "c", "path": "", "reason": ""}],
    }
    assert compare_with_reference(manifest | other, path) == (
        "corpus differs from the reference in 3 packages: a (other files), b (3, reference 2), c (not read)"
    )
    fewer = {"dist_fingerprints": {"a==1": "x"}}
    assert "packages match the reference" in compare_with_reference(manifest | fewer, path)


def test_it_runs_as_a_file(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "data_tools/local_corpus.py"),
        "--out",
        str(tmp_path / "c"),
        "--dists",
        "rich",
    ]
    done = subprocess.run([*command, "--max-bytes", "20000"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "train_python.jsonl" in done.stdout and "reference" in done.stdout.splitlines()[-1]
    assert done.stderr == ""
