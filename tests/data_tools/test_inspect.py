"""inspect_data: what it says about a shard is so, and --verify finds what opening a shard does not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from word_corpus import make_texts

from data_tools import inspect_data
from data_tools.inspect_data import describe, document_text, hash_file, main, verify, write_sidecar
from data_tools.preprocess_data import preprocess
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, ShardMeta, read_meta, write_meta
from megatron_lite.data.sidecar import BlockHash, measure_layout

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def shard(tmp_path: Path, corpus: Path, hf: Path) -> Path:
    preprocess(corpus, tmp_path / "train_words", hf, workers=1)
    return tmp_path / "train_words_text_document"


def test_describe_and_decode(shard: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = read_meta(shard)
    assert meta is not None
    short = str(shard).removesuffix("_text_document")
    assert main([short, "--verify", "--document", "299", "--tokenizer-model", str(hf)]) == 0
    out = capsys.readouterr().out
    for fact in ("300", f"{meta.num_tokens:,} of uint16", f"{meta.num_bytes:,} bytes", meta.tokenizer_sha256[:16]):
        assert fact in out
    assert "verified" in out and out.rstrip("\n").endswith(make_texts(300)[299] + "<|endoftext|>")
    assert document_text(IndexedDataset(shard), -300, str(hf)) == make_texts(300)[0] + "<|endoftext|>"


def test_shuffled_shards_are_advised_to_be_read_contiguously(tmp_path: Path, corpus: Path, hf: Path) -> None:
    advice = "shuffled when written: data.sample_order=contiguous is safe"
    for seed, expected in ((None, False), (0, True), (7, True)):
        preprocess(corpus, tmp_path / f"train_{seed}", hf, workers=1, shuffle_seed=seed)
        assert (advice in describe(IndexedDataset(tmp_path / f"train_{seed}_text_document"))) == expected


def test_a_shard_without_sidecar_or_documents(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "empty", np.uint16):
        pass
    assert verify(str(tmp_path / "empty")) == []
    said = describe(IndexedDataset(tmp_path / "empty"))
    assert "none, so unknown are: tokenizer, vocabulary size, EOD, bytes of text, checksums" in said


def test_verify_names_every_bad_block_with_its_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks of 1,000 bytes: three bits flipped in the .bin, one in the .idx."""
    tokens, lengths = np.arange(5000) % 400, np.full(500, 10)
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_documents(tokens, lengths)
    layout = measure_layout(
        str(tmp_path / "x.idx"),
        str(tmp_path / "x.bin"),
        lengths,
        hash_file(str(tmp_path / "x.bin"), BlockHash(1000)),
        hash_file(str(tmp_path / "x.idx"), BlockHash(1000)),
    )
    layout = replace(layout, checksum_block=1000)
    write_meta(tmp_path / "x", ShardMeta("ab", 400, 0, 500, 5000, 99, "uint16", layout=layout))
    assert main([str(tmp_path / "x"), "--verify"]) == 0
    assert "verified    every byte" in capsys.readouterr().out
    for end, places in (("bin", (4500, 8999, 9000)), ("idx", (9999,))):
        raw = bytearray((tmp_path / f"x.{end}").read_bytes())
        for at in places:
            raw[at] ^= 1
        (tmp_path / f"x.{end}").write_bytes(raw)
    assert main([str(tmp_path / "x"), "--verify"]) == 1
    error = capsys.readouterr().err
    for end, first, last, block in (("bin", 4000, 4999, 4), ("bin", 8000, 8999, 8), ("bin", 9000, 9999, 9)):
        assert f"x.{end}: bytes {first} to {last} are not those that were written (block {block})" in error
    assert "x.idx: bytes 9000 to 9999 are not" in error and error.count("are not those that were written") == 4
    with open(tmp_path / "x.bin", "ab") as file:
        file.write(b"12")
    main([str(tmp_path / "x"), "--verify"])
    error = capsys.readouterr().err
    assert "x.bin: 10002 bytes, 10000 were written" in error and "bytes 10000 to 10001 are not" in error


def test_verify_of_an_old_sidecar_finds_a_flipped_bit(shard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = read_meta(shard)
    assert meta is not None
    write_meta(shard, replace(meta, layout=None))
    assert main([str(shard), "--verify"]) == 0
    content = bytearray(Path(f"{shard}.bin").read_bytes())
    content[len(content) // 2 & ~1] ^= 1
    Path(f"{shard}.bin").write_bytes(content)
    IndexedDataset(shard)  # opens: the sizes are right
    assert main([str(shard), "--verify"]) == 1
    assert "not the bytes that the sidecar was written for" in capsys.readouterr().err


def test_verify_finds_a_token_outside_the_vocabulary(tmp_path: Path, shard: Path) -> None:
    meta = read_meta(shard)
    assert meta is not None
    dataset = IndexedDataset(shard)
    tokens = np.array(dataset.tokens)
    tokens[1234] = 400
    with IndexedWriter(tmp_path / "bad", np.uint16) as writer:
        writer.add_documents(tokens, dataset.lengths)
    write_meta(tmp_path / "bad", replace(meta, bin_xxh3=writer.bin_xxh3, layout=writer.layout))
    (problem,) = verify(str(tmp_path / "bad"))
    assert "token 1234 is 400, not in the vocabulary of 400" in problem


def test_verify_finds_trailing_bytes_and_gaps(shard: Path) -> None:
    Path(f"{shard}.meta.json").unlink()
    with open(f"{shard}.bin", "ab") as file:
        file.write(b"\0\0")
    assert "do not tile the .bin" in verify(str(shard))[0]
    idx = bytearray(Path(f"{shard}.idx").read_bytes())
    at = 34 + 4 * 300 + 8 * 299
    idx[at : at + 8] = (int.from_bytes(idx[at : at + 8], "little") + 2).to_bytes(8, "little")
    Path(f"{shard}.idx").write_bytes(idx)
    assert "do not tile the .bin" in verify(str(shard))[0]


def test_one_damaged_shard_does_not_hide_the_others(tmp_path: Path, shard: Path, capsys: Capture) -> None:
    assert main([str(tmp_path / "none"), str(shard)]) == 1
    said = capsys.readouterr()
    assert "no shard at" in said.err and "documents   300" in said.out


def test_write_sidecar_finds_what_the_tokeniser_knew(
    tmp_path: Path, shard: Path, hf: Path, sp: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_meta(shard)
    Path(f"{shard}.meta.json").unlink()
    assert main([str(shard), "--write-sidecar"]) == 1
    assert "needs --tokenizer-model" in capsys.readouterr().err and read_meta(shard) is None
    assert main([str(shard), "--write-sidecar", "--tokenizer-model", str(hf)]) == 0
    after = read_meta(shard)
    assert before is not None and after is not None
    assert after == replace(before, sources=[], extra={"num_bytes_from_tokens": before.num_tokens})
    assert not IndexedDataset(shard).checked
    monkeypatch.setattr(inspect_data, "DECODED_TOKENS", before.num_tokens // 3)
    Path(f"{shard}.meta.json").unlink()
    sampled = write_sidecar(str(shard), str(hf))
    assert sampled.extra["num_bytes_from_tokens"] < before.num_tokens / 2
    assert abs(sampled.num_bytes / before.num_bytes - 1) < 0.05
    write_meta(shard, replace(before, layout=None))
    assert main([str(shard), "--write-sidecar"]) == 0 and read_meta(shard) == before  # an old one says all but layout
    assert main([str(shard), "--write-sidecar", "--tokenizer-model", str(sp)]) == 1
    assert "give the one it was made with" in capsys.readouterr().err


def test_write_sidecar_refuses_a_tokenizer_that_is_too_small(tmp_path: Path, hf: Path, capsys: Capture) -> None:
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1, 2, 60000])
    assert main([str(tmp_path / "x"), "--write-sidecar", "--tokenizer-model", str(hf)]) == 1
    assert "token 2 is 60000, not in the vocabulary of 400" in capsys.readouterr().err


def test_errors(shard: Path, sp: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(shard), "--document", "0"])
    assert "--document needs --tokenizer-model" in capsys.readouterr().err
    for arguments, message in (
        ([str(shard) + "x"], "no shard at"),
        ([str(shard), "--document", "300", "--tokenizer-model", str(hf)], "no document 300; there are 300"),
        ([str(shard), "--document", "0", "--tokenizer-model", str(sp)], "give the one it was made with"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
