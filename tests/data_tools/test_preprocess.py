"""preprocess_data: Megatron's bytes, whatever the workers, the options or the interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from reference_shard import reference_shard, run, shard_bytes
from word_corpus import make_texts, write_jsonl

from data_tools.preprocess_data import main
from data_tools.readers import CHUNK_BYTES, read_documents, sampling_hash
from data_tools.tokenizer import load_tokenizer
from megatron_lite.data.indexed import IndexedDataset, read_meta

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("kind", ["hf", "sp"])
def test_bytes_equal_the_format_table(
    kind: str, append_eod: bool, tmp_path: Path, corpus: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    tokenizer, texts = load_tokenizer(folder), make_texts(300)
    documents = [ids + [tokenizer.eod_id] * append_eod for ids in tokenizer.encode_batch(texts)]
    prefix = run(tmp_path, corpus, folder, append_eod=append_eod)
    assert shard_bytes(prefix) == reference_shard(documents, 8, "H")
    meta = read_meta(prefix)
    assert meta is not None and meta.num_bytes == sum(len(text.encode()) for text in texts)
    assert (meta.num_documents, meta.num_tokens) == (300, sum(map(len, documents)))
    assert meta.tokenizer_sha256 == tokenizer.sha256 and meta.eod_id == tokenizer.eod_id and meta.vocab_size == 400


def test_large_vocabulary_is_int32(tmp_path: Path, corpus: Path, hf: Path) -> None:
    raw = json.loads((hf / "tokenizer.json").read_text())
    raw["model"]["vocab"]["padding"] = 65_499  # 65,500 ids: Megatron's first int32 vocabulary
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    documents = [[*ids, 0] for ids in load_tokenizer(hf).encode_batch(make_texts(300))]
    assert shard_bytes(run(tmp_path, corpus, tmp_path)) == reference_shard(documents, 4, "i")


def test_text_survives_the_round_trip(tmp_path: Path, corpus: Path, hf: Path) -> None:
    dataset, tokenizer = IndexedDataset(run(tmp_path, corpus, hf)), load_tokenizer(hf)
    assert [tokenizer.decode(dataset[i][:-1]) for i in range(300)] == make_texts(300)
    assert all(dataset[i][-1] == tokenizer.eod_id for i in range(300))


def test_every_worker_count_writes_the_same_bytes(tmp_path: Path, hf: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(3500))
    assert source.stat().st_size > 5 * CHUNK_BYTES  # more than two workers hold at once
    one, two = run(tmp_path, source, hf, "one"), run(tmp_path, source, hf, "two", workers=2)
    assert shard_bytes(one) == shard_bytes(two)
    assert Path(f"{one}.meta.json").read_bytes() == Path(f"{two}.meta.json").read_bytes()
    assert len(IndexedDataset(one)) == 3500


def test_fraction_is_monotone_and_ignores_other_files(tmp_path: Path, hf: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(2000))
    other = write_jsonl(tmp_path / "b.jsonl", make_texts(100, seed=1))
    kept: list[list[bytes]] = []
    for name, source, fraction in (("5", [path], 0.05), ("10", [path], 0.1), ("more", [other, path], 0.1)):
        dataset = IndexedDataset(run(tmp_path, source, hf, name, fraction=fraction))
        kept.append([dataset[i].tobytes() for i in range(len(dataset))])
    assert 60 < len(kept[0]) < 140 and 150 < len(kept[1]) < 250  # 100 and 200 expected, four standard deviations
    assert set(kept[0]) < set(kept[1])
    assert kept[2][-len(kept[1]) :] == kept[1]


def test_sampling_never_changes() -> None:
    """Pinned: another value here reshuffles every shard that was made with --fraction."""
    assert [round(sampling_hash(b"text", purpose), 6) for purpose in ("fraction", "tokenizer")] == [0.80723, 0.243965]


def test_max_tokens_keeps_whole_documents(tmp_path: Path, corpus: Path, hf: Path) -> None:
    whole = IndexedDataset(run(tmp_path, corpus, hf, "whole"))
    ends = np.cumsum(whole.lengths)
    for limit, count in ((int(ends[9]), 10), (int(ends[9]) - 1, 9), (int(ends[-1]), 300), (10**9, 300)):
        part = IndexedDataset(run(tmp_path, corpus, hf, f"part{limit}", max_tokens=limit))
        assert len(part) == count and part.tokens.tobytes() == whole.tokens[: ends[count - 1]].tobytes()
        assert part.meta is not None
        assert part.meta.num_bytes == sum(len(text.encode()) for text in make_texts(300)[:count])
    with pytest.raises(ValueError, match="no document to write"):
        run(tmp_path, corpus, hf, "none", max_tokens=1)


def test_empty_texts_are_left_out_and_counted(tmp_path: Path, hf: Path) -> None:
    meta = read_meta(run(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["a", "", "b", ""]), hf))
    assert meta is not None and (meta.num_documents, meta.extra["num_empty"], meta.num_bytes) == (2, 2, 2)


def test_a_second_run_does_nothing_until_something_changes(tmp_path: Path, corpus: Path, hf: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(corpus.read_bytes())
    prefix = run(tmp_path, source, hf)

    def rewritten(**options: object) -> bool:
        before = os.stat(f"{prefix}.bin").st_ino
        run(tmp_path, source, hf, **options)
        return os.stat(f"{prefix}.bin").st_ino != before

    assert not rewritten() and not rewritten(workers=2) and not rewritten(log_interval=10)
    assert rewritten(append_eod=False) and not rewritten(append_eod=False) and rewritten()
    raw = source.read_bytes()
    source.write_bytes(raw.replace(b"0. ", b"9. ", 1))  # same size
    os.utime(source, ns=(0, 0))
    assert rewritten() and not rewritten()
    for damage in (b"", b"{}", b"not json"):
        Path(f"{prefix}.meta.json").write_bytes(damage)
        assert rewritten() and not rewritten()
    os.truncate(f"{prefix}.idx", 100)
    assert rewritten()
    assert shard_bytes(prefix) == shard_bytes(run(tmp_path, source, hf, "fresh"))


def test_a_failed_rebuild_keeps_the_old_shard(tmp_path: Path, corpus: Path, hf: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(corpus.read_bytes())
    before = shard_bytes(run(tmp_path, source, hf))
    source.write_bytes(corpus.read_bytes() + b"{broken")
    with pytest.raises(ValueError, match=r"a\.jsonl:301"):
        run(tmp_path, source, hf)
    assert shard_bytes(tmp_path / "out") == before and IndexedDataset(tmp_path / "out").meta is not None


def test_kill_leaves_no_shard_and_the_next_run_finishes(tmp_path: Path, hf: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(12_000))
    command = [sys.executable, "data_tools/preprocess_data.py", "--input", str(source), "--tokenizer-model", str(hf)]
    command += ["--output-prefix", str(tmp_path / "out"), "--exact-prefix", "--workers", "2", "--log-interval", "1"]
    command += ["--backend", "native"]  # slow enough to be killed in the middle
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "documents" in process.stderr.readline()  # in the middle: the first chunk is written
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["a.jsonl", f"out.bin.tmp-{process.pid}"]
    deadline = time.monotonic() + 60
    while any(Path("/proc", child).exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(children) >= 2 and not any(Path("/proc", child).exists() for child in children)
    run(tmp_path, source, hf, workers=2, fraction=0.02)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out.bin", "out.idx", "out.meta.json"]


def test_command_line(tmp_path: Path, corpus: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron's flags and file names; a key a shard; the no-op says so; a mistake is one line and status 1."""
    (tmp_path / "a.jsonl").write_text('{"text": "the model", "title": "shard"}\nbroken\n')
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "out"), "--append-eod"]
    arguments += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(hf), "--workers", "1"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path / 'a.jsonl'}:2: not valid JSON" in error
    arguments += ["--json-keys", "text", "title", "--on-bad-line", "skip"]
    assert main(arguments) == 0
    assert "[title]: 1 documents" in (out := capsys.readouterr().out) and "1 bad lines skipped" in out
    tokenizer, dataset = load_tokenizer(hf), IndexedDataset(tmp_path / "out_title_document")
    assert tokenizer.decode(dataset[0]) == "shard<|endoftext|>"
    assert len(IndexedDataset(tmp_path / "out")) == 1  # finds out_text_document
    assert main(arguments) == 0 and "up to date" in capsys.readouterr().err
    assert main([*arguments, "--exact-prefix"]) == 1 and "names one shard" in capsys.readouterr().err


def test_both_ways_to_start_each_program() -> None:
    for name in ("preprocess_data", "train_tokenizer", "inspect_data", "merge_data"):
        for command in ([f"data_tools/{name}.py"], ["-m", f"data_tools.{name}"]):
            done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0 and "usage:" in done.stdout, command


def test_option_and_input_errors(tmp_path: Path, corpus: Path, hf: Path) -> None:
    for options, message in (
        ({"fraction": 0.0}, "fraction is 0.0"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"on_bad_line": "ignore"}, "on_bad_line is 'ignore'; it is error or skip"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, corpus, hf, **options)
    (tmp_path / "notes.md").write_text("x")
    for source, message in (
        (corpus.parent / "train_word.jsonl", r"did you mean .*train_words\.jsonl"),
        (tmp_path, "no input there"),
        (tmp_path / "notes.md", "this ending is not read; known are .jsonl"),
        ([corpus, corpus.parent], "given twice"),
        ([], "no input: name at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, source, hf)
    with pytest.raises(ValueError, match=rf"{corpus}:1: no key 'body'; the keys of this line are id, text"):
        list(read_documents([str(corpus)], "body"))
