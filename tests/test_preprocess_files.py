"""launch/preprocess_files.py: many files, one task each, give what preprocess_data.py gives for all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_tools import preprocess_data
from launch.preprocess_files import FilePreprocessing, main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "web"
    folder.mkdir()
    for file in range(4):
        lines = [f'{{"text": "document {i} of file {file}, with {"words " * (i % 7)}"}}' for i in range(50 + file)]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    return folder


def arguments(texts: Path, out: Path) -> list[str]:
    return ["--input", f"{texts}/*.jsonl", "--output-dir", str(out), "--tokenizer-type", "bytes"]


def test_files_become_shards_and_their_merge_is_the_shard_of_all_files(texts, tmp_path, capfd):
    assert (
        main([*arguments(texts, tmp_path / "out"), "--merge", str(tmp_path / "train_web"), "--set", "workers=2"]) == 0
    )
    assert capfd.readouterr().out.count("encoded by") == 4
    assert sorted(path.name for path in (tmp_path / "out").glob("*.idx")) == [
        f"{i}_text_document.idx" for i in range(4)
    ]
    whole = ["--input", f"{texts}/*.jsonl", "--output-prefix", str(tmp_path / "whole"), "--tokenizer-type", "bytes"]
    assert preprocess_data.main(whole) == 0
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"train_web{ending}").read_bytes() == (
            tmp_path / f"whole_text_document{ending}"
        ).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*_document.bin")}
    (texts / "1.jsonl").write_text('{"text": "another text"}\n')
    assert main([*arguments(texts, tmp_path / "out"), "--set", "workers=2"]) == 0
    changed = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert changed == ["1_text_document.bin"], "what is there and unchanged must not be made again"


def test_a_file_that_fails_is_named_and_the_others_are_made(texts, tmp_path, capfd):
    (texts / "2.jsonl").write_text("this is no JSON\n")
    assert main([*arguments(texts, tmp_path / "out"), "--set", "workers=2"]) == 1
    error = capfd.readouterr().err
    assert "1 of 4 files failed" in error and "2.jsonl:1" in error and "Traceback" not in error
    assert len(list((tmp_path / "out").glob("*.idx"))) == 3


def test_mistakes_are_refused_before_anything_starts(texts, tmp_path, capfd):
    assert main([*arguments(texts, tmp_path / "out"), "--set", "executer=ray"]) == 1
    assert "executor" in capfd.readouterr().err
    two = ["--json-keys", "text", "title", "--merge", str(tmp_path / "m")]
    assert main([*arguments(texts, tmp_path / "out"), *two]) == 1
    assert "--merge joins the shards of one key" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_saved_for_another_machine_is_what_is_loaded(tmp_path):
    function = FilePreprocessing(("a.jsonl", "b.jsonl"), ("--tokenizer-type", "bytes"))
    function.save(tmp_path)
    assert FilePreprocessing.load(tmp_path) == function


@pytest.mark.slow
def test_slurm_makes_the_same_shards(texts, tmp_path):
    from loopback_slurm import slurm_cluster, why_not

    if reason := why_not():
        pytest.skip(reason)
    assert main([*arguments(texts, tmp_path / "local"), "--set", "workers=2"]) == 0
    with slurm_cluster(tmp_path / "cluster") as environment:
        settings = ["--set", "executor=slurm", "--set", "slurm.chunk=2"]
        command = [sys.executable, "launch/preprocess_files.py", *arguments(texts, tmp_path / "slurm"), *settings]
        environment = {**environment, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (tmp_path / "local").glob("*_document.[bi]*"):
        assert (tmp_path / "slurm" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "slurm" / "preprocessing" / "slurm").glob("*/t000*.log"))) == 4
