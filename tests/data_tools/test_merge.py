"""merge_data: the bytes of one shard made in one go, and no mixing of tokenizers."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reference_shard import reference_shard, run, shard_bytes
from word_corpus import make_texts, write_jsonl

from data_tools import merge_data
from data_tools.inspect_data import verify
from data_tools.merge_data import merge
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, read_meta, write_meta
from megatron_lite.data.sidecar import count_blocks


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


def test_merge_streams_documents_of_any_size_and_follows_pointers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied in pieces of 64 documents and of 100 tokens: short, long and empty documents, and a .bin with gaps."""
    rng = np.random.default_rng(0)
    parts, expected = [], []
    for name in "ab":
        documents = [rng.integers(0, 999, n).tolist() for n in rng.choice([0, 1, 7, 99, 100, 101, 350], 300)]
        payload, index = reference_shard(documents, 8, "H")
        if name == "b":  # two bytes that belong to no document before each one
            gap = 2 * np.arange(1, 301)
            raw = bytearray(index)
            at = slice(34 + 4 * 300, 34 + 12 * 300)
            pointers = np.frombuffer(index[at], "<i8")
            raw[at] = (pointers + gap).tobytes()
            index = bytes(raw)
            payload = b"".join(b"\xff\xff" + np.array(d, "<u2").tobytes() for d in documents)
        Path(tmp_path / f"{name}.bin").write_bytes(payload)
        Path(tmp_path / f"{name}.idx").write_bytes(index)
        parts.append(tmp_path / name)
        expected += documents
    monkeypatch.setattr(merge_data, "CHUNK", 64)
    monkeypatch.setattr(merge_data, "BLOCK_TOKENS", 100)
    assert IndexedDataset(parts[0]).contiguous and not IndexedDataset(parts[1]).contiguous
    assert merge(parts, tmp_path / "out") is None
    assert shard_bytes(tmp_path / "out") == reference_shard(expected, 8, "H")


def test_the_merged_sidecar_vouches_for_the_merged_shard(tmp_path: Path, corpus: Path, hf: Path) -> None:
    parts = [run(tmp_path, corpus, hf, name) for name in "ab"]
    merge(parts, tmp_path / "out")
    dataset = IndexedDataset(tmp_path / "out")
    assert not dataset.checked and dataset.num_documents == 600
    dataset.check()
    assert dataset.meta is not None and np.array_equal(dataset.block_tokens, count_blocks(dataset.lengths))
    assert verify(str(tmp_path / "out")) == []


@pytest.mark.slow
def test_merge_needs_no_memory_for_the_tokens(tmp_path: Path) -> None:
    """Four shards of 128 MB each; the process stays within 60 MB of what it was when it started."""
    for i in range(4):
        with IndexedWriter(tmp_path / f"part{i}", np.int32) as writer:
            for _ in range(8):
                writer.add_documents(np.zeros(4 << 20, np.int32), [1 << 12] * (1 << 10))
    code = (
        "import resource, sys; from data_tools.merge_data import merge; from pathlib import Path\n"
        "anonymous = lambda: int([l for l in open('/proc/self/status') if l.startswith('RssAnon')][0].split()[1])\n"
        "import threading, time; peak = [0]; before = anonymous()\n"
        "def watch():\n    while True: peak[0] = max(peak[0], anonymous()); time.sleep(0.002)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "merge(sorted(Path(sys.argv[1]).glob('part*.idx')), Path(sys.argv[1]) / 'out')\n"
        "print((peak[0] - before) // 1024)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) < 60 and (tmp_path / "out.bin").stat().st_size == 512 << 20
