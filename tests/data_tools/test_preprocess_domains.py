"""preprocess_data on several domains, on bad lines, in little memory; and against Megatron's own loop."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reference_shard import run, shard_bytes
from word_corpus import make_texts, write_jsonl

from data_tools import encoding
from data_tools.preprocess_data import main
from data_tools.train_tokenizer import main as train_main
from megatron_lite.data.indexed import IndexedDataset, read_meta

ROOT = Path(__file__).parents[2]


def test_a_shard_a_file_and_each_its_own_no_op(tmp_path: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("train_a", 1), ("train_b", 2), ("valid_a", 3)):
        write_jsonl(tmp_path / f"{name}.jsonl", make_texts(20, seed))
    arguments = ["--input", f"{tmp_path}/train_*.jsonl", "--output-dir", str(tmp_path / "shards"), "--workers", "1"]
    arguments += ["--tokenizer-model", str(hf), "--partitions", "1", "--keep-sequential-samples"]
    assert main(arguments) == 0
    names = sorted(p.name for p in (tmp_path / "shards").glob("*.bin"))
    assert names == ["train_a_text_document.bin", "train_b_text_document.bin"]
    alone = run(tmp_path, tmp_path / "train_b.jsonl", hf, "alone")
    assert shard_bytes(alone) == shard_bytes(tmp_path / "shards/train_b_text_document")
    capsys.readouterr()
    write_jsonl(tmp_path / "train_a.jsonl", make_texts(21, 1))
    assert main(arguments) == 0
    error = capsys.readouterr().err
    assert error.count("up to date, nothing to do") == 1 and "train_b_text_document: up to date" in error
    (tmp_path / "more").mkdir()
    write_jsonl(tmp_path / "more/train_a.json", ["x"])
    arguments[1:2] = [arguments[1], str(tmp_path / "more")]
    assert main(arguments) == 1 and "would both be the shard train_a" in capsys.readouterr().err


def test_bytes_need_no_file(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a\u00e9", "<|endoftext|>"])
    arguments = ["--input", str(source), "--output-prefix", str(tmp_path / "b"), "--tokenizer-type", "bytes"]
    assert main(arguments) == 0
    dataset = IndexedDataset(tmp_path / "b")
    assert [list(dataset[i]) for i in range(2)] == [[97, 195, 169, 256], [*b"<|endoftext|>", 256]]
    assert main([*arguments, "--allow-special-tokens"]) == 0
    assert list(IndexedDataset(tmp_path / "b")[1]) == [256, 256]


def test_vocab_and_merges_are_megatrons_gpt2_flags(tmp_path: Path, corpus: Path, hf: Path, gpt2: Path) -> None:
    arguments = ["--input", str(corpus), "--output-prefix", str(tmp_path / "g"), "--tokenizer-type", "GPT2BPETokenizer"]
    arguments += ["--vocab-file", str(gpt2 / "vocab.json"), "--merge-file", str(gpt2 / "merges.txt"), "--append-eod"]
    assert main(arguments) == 0
    assert shard_bytes(tmp_path / "g_text_document") == shard_bytes(run(tmp_path, corpus, hf))


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_a_bad_line_far_into_a_file_is_named(
    backend: str, tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "FAST_CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 1 << 12)
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    lines = source.read_bytes().splitlines(keepends=True)
    lines[150:150] = [b"\n", b'{"text": 3}\n', b"broken\n"]
    source.write_bytes(b"\xef\xbb\xbf" + b"".join(lines))
    with pytest.raises(ValueError, match=r"a\.jsonl:152: 'text' is '3'"):
        run(tmp_path, source, hf, backend=backend)
    meta = read_meta(run(tmp_path, source, hf, backend=backend, on_bad_line="skip"))
    assert meta is not None and (meta.num_documents, meta.extra["num_bad_lines"]) == (300, 2)
    assert [e.split(": ")[0].rpartition(":")[2] for e in meta.extra["bad_line_examples"]] == ["152", "153"]


def test_training_can_skip_bad_lines(
    tmp_path: Path, hf: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(corpus.read_bytes() + b"broken\n")
    arguments = ["--input", str(source), "--vocab-size", "400", "--out", str(tmp_path / "tok")]
    assert train_main(arguments) == 1 and "a.jsonl:301: not valid JSON" in capsys.readouterr().err
    assert train_main([*arguments, "--on-bad-line", "skip"]) == 0
    assert (tmp_path / "tok/tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_a_terminal_gets_a_bar(tmp_path: Path, corpus: Path, hf: Path) -> None:
    command = [sys.executable, "data_tools/preprocess_data.py", "--input", str(corpus), "--tokenizer-model", str(hf)]
    reader, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    process = subprocess.Popen(
        [*command, "--output-prefix", str(tmp_path / "o")], cwd=ROOT, env=environment, stderr=terminal
    )
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(reader, 4096):
            shown += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    assert process.wait() == 0 and b"300 documents" in shown and "\u2501".encode() in shown


@pytest.mark.slow
def test_kill_while_shuffling_leaves_no_shard(tmp_path: Path, hf: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(12_000))
    command = [sys.executable, "data_tools/preprocess_data.py", "--input", str(source), "--tokenizer-model", str(hf)]
    command += ["--output-prefix", str(tmp_path / "out"), "--exact-prefix", "--shuffle", "--backend", "native"]
    process = subprocess.Popen([*command, "--workers", "1", "--log-interval", "1"], cwd=ROOT, stderr=subprocess.PIPE)
    assert process.stderr is not None and b"documents" in process.stderr.readline()
    process.kill()
    process.wait()
    process.stderr.close()
    assert {p.name for p in tmp_path.iterdir()} == {
        "a.jsonl",
        *(f"out.{x}.tmp-{process.pid}" for x in ("bin", "shuffle")),
    }
    run(tmp_path, source, hf, fraction=0.02, shuffle_seed=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out.bin", "out.idx", "out.meta.json"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--shuffle"]])
def test_memory_does_not_grow_with_the_corpus(options: list[str], tmp_path: Path, hf: Path) -> None:
    pytest.importorskip("gigatoken")
    peaks = []
    piece = write_jsonl(tmp_path / "piece.jsonl", make_texts(4000)).read_bytes()
    for copies in (10, 60):
        source = tmp_path / f"{copies}.jsonl"
        with open(source, "wb") as file:
            file.writelines(piece for _ in range(copies))
        command = [sys.executable, "data_tools/preprocess_data.py", "--input", str(source), "--workers", "1", *options]
        command += ["--output-prefix", str(tmp_path / "out"), "--tokenizer-model", str(hf), "--log-interval", "0"]
        code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2);"
        code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, check=True, stdout=subprocess.PIPE)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < 300 and peaks[1] - peaks[0] < 60, f"MiB: {peaks}"  # the corpora are 25 and 150 MB


@pytest.mark.slow
def test_bytes_equal_megatrons_own_loop(tmp_path: Path, corpus: Path, hf: Path) -> None:
    """tools/preprocess_data.py: one text a call of the Hugging Face tokenizer, EOD appended, IndexedDatasetBuilder."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    theirs = transformers.AutoTokenizer.from_pretrained(str(hf))
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "megatron.bin"), dtype=indexed.DType.optimal_dtype(400))
    for text in make_texts(300):
        ids = [*theirs(text).input_ids, theirs.eos_token_id]
        builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "megatron.idx"))
    for backend in ("auto", "native"):
        assert shard_bytes(run(tmp_path, corpus, hf, backend, backend=backend)) == shard_bytes(tmp_path / "megatron")


def test_a_second_run_is_much_faster(tmp_path: Path, hf: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(3000))
    seconds = []
    for _ in range(2):
        start = time.process_time()
        run(tmp_path, source, hf, backend="native")
        seconds.append(time.process_time() - start)
    assert seconds[1] < seconds[0] / 3, seconds
