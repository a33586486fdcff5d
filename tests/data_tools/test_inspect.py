"""inspect_data: what it says about a shard is so, and --verify finds what opening a shard does not."""

from pathlib import Path

import numpy as np
import pytest
from word_corpus import make_texts

from data_tools.inspect_data import describe, document_text, main, verify
from data_tools.preprocess_data import preprocess
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, read_meta, write_meta


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


def test_a_shard_without_sidecar_or_documents(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "empty", np.uint16):
        pass
    dataset = IndexedDataset(tmp_path / "empty")
    verify(dataset)
    assert "none: made by another tool" in describe(dataset)


def test_verify_finds_a_flipped_bit(shard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray(Path(f"{shard}.bin").read_bytes())
    content[len(content) // 2 & ~1] ^= 1
    Path(f"{shard}.bin").write_bytes(content)
    IndexedDataset(shard)  # opens: the sizes are right
    assert main([str(shard), "--verify"]) == 1
    assert "content hash" in capsys.readouterr().err


def test_verify_finds_a_token_outside_the_vocabulary(tmp_path: Path, shard: Path) -> None:
    meta = read_meta(shard)
    assert meta is not None
    dataset = IndexedDataset(shard)
    tokens = np.array(dataset.tokens)
    tokens[1234] = 400
    with IndexedWriter(tmp_path / "bad", np.uint16) as writer:
        writer.add_documents(tokens, dataset.lengths)
    write_meta(tmp_path / "bad", type(meta)(**{**meta.__dict__, "bin_xxh3": writer.bin_xxh3, "layout": writer.layout}))
    with pytest.raises(ValueError, match="token 1234 is 400, not in the vocabulary of 400"):
        verify(IndexedDataset(tmp_path / "bad"))


def test_verify_finds_trailing_bytes_and_gaps(shard: Path) -> None:
    Path(f"{shard}.meta.json").unlink()
    with open(f"{shard}.bin", "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ValueError, match="the index accounts for"):
        verify(IndexedDataset(shard))
    idx = bytearray(Path(f"{shard}.idx").read_bytes())
    at = 34 + 4 * 300 + 8 * 299
    idx[at : at + 8] = (int.from_bytes(idx[at : at + 8], "little") + 2).to_bytes(8, "little")
    Path(f"{shard}.idx").write_bytes(idx)
    with pytest.raises(ValueError, match="sequence 299 does not start where the one before it ends"):
        verify(IndexedDataset(shard))


def test_errors(shard: Path, sp: Path, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(shard) + "x"], "no shard at"),
        ([str(shard), "--document", "0"], "--document needs --tokenizer-model"),
        ([str(shard), "--document", "300", "--tokenizer-model", str(hf)], "no document 300; there are 300"),
        ([str(shard), "--document", "0", "--tokenizer-model", str(sp)], "give the one it was made with"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
