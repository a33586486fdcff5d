"""merge_data: the bytes of one shard made in one go, and no mixing of tokenizers."""

import os
from pathlib import Path

import pytest
from reference_shard import reference_shard, run, shard_bytes
from word_corpus import make_texts, write_jsonl

from data_tools.merge_data import merge
from megatron_lite.data.indexed import IndexedDataset, read_meta, write_meta


def test_merge_equals_preprocessing_in_one_go(tmp_path: Path, hf: Path) -> None:
    a, b = (write_jsonl(tmp_path / f"{n}.jsonl", make_texts(5000, seed=i)) for i, n in enumerate("ab"))
    parts = [
        run(tmp_path / "parts", source, hf, source.stem, max_tokens=10**5 * (i + 1)) for i, source in enumerate((a, b))
    ]
    documents = [IndexedDataset(part) for part in parts]
    merged = merge([tmp_path / "parts"], tmp_path / "merged")
    whole = IndexedDataset(tmp_path / "merged")
    expected = [[int(t) for t in d[i]] for d in documents for i in range(len(d))]
    assert shard_bytes(tmp_path / "merged") == reference_shard(expected, 8, "H")
    metas = [read_meta(part) for part in parts]
    assert merged is not None and merged == whole.meta
    assert merged.num_bytes == sum(m.num_bytes for m in metas if m) and merged.num_documents == len(expected)
    assert merged.sources == [s for m in metas if m for s in m.sources]


def test_merge_refuses_what_does_not_belong_together(tmp_path: Path, corpus: Path, hf: Path, sp: Path) -> None:
    a, b, c = run(tmp_path, corpus, hf, "a"), run(tmp_path, corpus, sp, "b"), run(tmp_path, corpus, hf, "c")
    with pytest.raises(ValueError, match=rf"{a} and {b} differ in tokenizer_sha256"):
        merge([a, b], tmp_path / "out")
    with pytest.raises(ValueError, match=f"{a}: given twice"):
        merge([a, f"{a}.bin"], tmp_path / "out")
    with pytest.raises(ValueError, match="both input and output"):
        merge([a, c], a)
    os.unlink(f"{c}.meta.json")
    with pytest.raises(ValueError, match=rf"{c} has no \.meta\.json"):
        merge([a, c], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    os.unlink(f"{a}.meta.json")
    assert merge([a, c], tmp_path / "out") is None and len(IndexedDataset(tmp_path / "out")) == 600


def test_merge_refuses_another_dtype(tmp_path: Path, corpus: Path, hf: Path) -> None:
    a, b = run(tmp_path, corpus, hf, "a"), tmp_path / "b"
    payload, index = reference_shard([[1, 2, 3]], 4, "i")
    Path(f"{b}.bin").write_bytes(payload)
    Path(f"{b}.idx").write_bytes(index)
    meta = read_meta(a)
    assert meta is not None
    facts = {"num_documents": 1, "num_tokens": 3, "dtype": "int32", "layout": None}
    write_meta(b, type(meta)(**{**meta.__dict__, **facts}))
    with pytest.raises(ValueError, match=rf"{a} is uint16, {b} is int32"):
        merge([a, b], tmp_path / "out")
