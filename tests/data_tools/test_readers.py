"""Input forms: every one gives the same shard, and whatever cannot be read is named by file and line."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from reference_shard import run, shard_bytes
from word_corpus import make_texts, write_jsonl

from data_tools.readers import BadLine, Chunk, parse, read_chunks
from data_tools.tokenizer import load_tokenizer
from megatron_lite.data.indexed import IndexedDataset, read_meta


def test_every_input_form_gives_the_same_shard(tmp_path: Path, corpus: Path, hf: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    raw, expected = corpus.read_bytes(), shard_bytes(run(tmp_path, corpus, hf))
    half = raw.index(b"\n", len(raw) // 2) + 1
    frames = zstandard.compress(raw[:half]) + zstandard.compress(raw[half:])
    files = {
        "a.json": raw,
        "a.jsonl.gz": gzip.compress(raw[:half]) + gzip.compress(raw[half:]),  # members, as `cat a.gz b.gz` makes
        "a.jsonl.zst": frames,
        "crlf.jsonl": b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n\r\n"),
        "unended.jsonl": raw.rstrip(b"\n"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    table = pyarrow.table({"id": list(range(300)), "text": make_texts(300)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    for name in (*files, "a.parquet"):
        assert shard_bytes(run(tmp_path, tmp_path / name, hf, "from_" + name)) == expected, name


def test_text_files_are_one_document_each_and_folders_are_sorted(tmp_path: Path, hf: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name, text in {"b.txt": "two\nlines", "a.txt": "one", "sub/c.txt": "three", ".hidden/d.txt": "no"}.items():
        (folder / name).write_text(text)
    (folder / "notes.md").write_text("not read")
    tokenizer = load_tokenizer(hf)
    for source in (folder, folder / "**" / "*.txt"):
        dataset = IndexedDataset(run(tmp_path, source, hf, f"out{len(str(source))}", append_eod=False))
        assert [tokenizer.decode(dataset[i]) for i in range(len(dataset))] == ["one", "two\nlines", "three"]


def test_chunk_boundaries_lose_no_line_and_no_number(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    expected = list(enumerate(make_texts(50), start=1))
    for size in (1, 37, 1000, 10**6):
        assert [pair for chunk in read_chunks(str(path), "text", size) for pair in parse(chunk, "text")] == expected


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "a"', "not valid JSON"),
        (b'{"text": "\xff"}', "not valid JSON"),
        (b'{"id": 3, "content": "x"}', "no key 'text'; the keys of this line are id, content (choose: --json-keys)"),
        (b"{}", "the keys of this line are none at all"),
        (b'{"text": 17}', "'text' is '17' (int), not text"),
        (b'{"text": null}', "'text' is 'None' (NoneType), not text"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'[{"text": "a"}]', "a JSON list, not an object; one object a line is expected"),
        (b"[", "not valid JSON"),
        (b'"text"', "a JSON str, not an object"),
    ],
)
def test_a_bad_line_is_named_or_skipped_and_counted(line: bytes, why: str, tmp_path: Path, hf: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good", "score": NaN}\n\n' + line + b'\n{"text": "also good"}\n' + line + b"\n")
    with pytest.raises(ValueError) as error:
        run(tmp_path, path, hf)
    assert f"{path}:3: " in str(error.value) and why in str(error.value)
    assert "--on-bad-line skip" in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
    meta = read_meta(run(tmp_path, path, hf, on_bad_line="skip"))
    assert meta is not None and meta.num_documents == 2 and meta.extra["num_bad_lines"] == 2
    assert [example.split(": ")[0] for example in meta.extra["bad_line_examples"]] == [f"{path}:3", f"{path}:5"]


def test_a_bad_line_far_into_the_file_has_the_right_number(tmp_path: Path, hf: Path) -> None:
    """Several chunks in, in several processes."""
    lines = [json.dumps({"text": text}) for text in make_texts(1500)]
    lines[1300], lines[1400] = "{broken", "{broken too"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"a\.jsonl:1301: not valid JSON"):
        run(tmp_path, tmp_path / "a.jsonl", hf, workers=2)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_bad_parquet_and_text_files(tmp_path: Path, hf: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None, "b"], "url": ["u", "v", "w"]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'body'; the columns are text, url"):
        run(tmp_path, path, hf, json_key="body")
    with pytest.raises(ValueError, match=r"a\.parquet:2: 'text' is 'None' \(NoneType\), not text"):
        run(tmp_path, path, hf)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable parquet file"):
        run(tmp_path, path, hf)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"b\.txt:1: not UTF-8"):
        run(tmp_path, tmp_path / "b.txt", hf)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_a_damaged_archive_is_no_short_corpus(suffix: str, damage: str, tmp_path: Path, corpus: Path, hf: Path) -> None:
    raw = corpus.read_bytes()
    packed = gzip.compress(raw) if suffix == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    packed = packed[: len(packed) // 2] if damage == "cut" else packed[:200] + bytes(200) + packed[400:]
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(packed)
    with pytest.raises(ValueError, match=rf"a\.jsonl\.{suffix}: truncated or corrupt after line"):
        run(tmp_path, path, hf, on_bad_line="skip")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_bad_line_is_not_text() -> None:
    chunk = Chunk("f", 7, b'{"text": "a"}\n{}\n')
    first, second = parse(chunk, "text")
    assert first == (7, "a") and second[0] == 8 and isinstance(second[1], BadLine)
