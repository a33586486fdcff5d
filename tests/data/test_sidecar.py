"""The sidecar: what it says is so, a damaged or foreign one is refused, and a good one spares reading the index."""

import dataclasses
import json

import numpy as np
import pytest
import xxhash

from megatron_lite.data import sidecar
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, ShardMeta, read_meta, write_meta
from megatron_lite.data.indexed_writer import write_index

LENGTHS = np.random.default_rng(0).integers(0, 9, 3000)


def make(prefix, lengths=LENGTHS, dtype="uint16", **changes):
    """A shard of tokens 0, 1, ... with its sidecar."""
    lengths = np.asarray(lengths)
    with IndexedWriter(prefix, dtype) as writer:
        writer.add_documents(np.arange(lengths.sum()), lengths)
    facts = {
        "tokenizer_sha256": "ab" * 32,
        "vocab_size": 60000,
        "eod_id": 0,
        "num_documents": writer.num_documents,
        "num_tokens": writer.num_tokens,
        "num_bytes": 40,
        "dtype": writer.dtype.name,
        "bin_xxh3": writer.bin_xxh3,
        "layout": writer.layout,
    }
    meta = ShardMeta(**{**facts, **changes})
    write_meta(prefix, meta)
    return meta


def change(prefix, **changes):
    write_meta(prefix, dataclasses.replace(read_meta(prefix), **changes))


def flip(path, at, bit=1):
    raw = bytearray(path.read_bytes())
    raw[at] ^= bit
    path.write_bytes(raw)


def as_version_1(path):
    """What the sidecar was before it had a layout and a checksum."""
    raw = json.loads(path.read_text())
    for key in ("version", "layout", "meta_xxh3"):
        del raw[key]
    path.write_text(json.dumps(raw))


# -- opening without the index -----------------------------------------------------------------------------------------


def test_a_sidecar_opens_the_shard_without_its_index(tmp_path, monkeypatch):
    make(tmp_path / "x")
    slow = IndexedDataset(tmp_path / "x")
    slow.check()
    assert slow.checked
    with monkeypatch.context() as patch:
        patch.setattr(IndexedDataset, "_check_arrays", lambda *_: pytest.fail("the index was read to open the shard"))
        fast = IndexedDataset(tmp_path / "x")
        facts = len(fast), fast.num_documents, fast.num_tokens, fast.contiguous, fast.sequences_are_documents
        assert facts == (3000, 3000, LENGTHS.sum(), True, True) and not fast.checked and fast.bin_size == slow.bin_size
        assert np.array_equal(fast.block_tokens, np.add.reduceat(LENGTHS, range(0, 3000, 256)))
    assert all(np.array_equal(fast[i], slow[i]) for i in (0, 500, 2999, -1)) and fast.modes is None
    assert fast.meta.layout.max_document_length == 8


def test_without_a_layout_the_shard_is_checked_whole_and_says_the_same(tmp_path):
    make(tmp_path / "x")
    fast = IndexedDataset(tmp_path / "x")
    as_version_1(tmp_path / "x.meta.json")
    old = IndexedDataset(tmp_path / "x")
    (tmp_path / "x.meta.json").unlink()
    bare = IndexedDataset(tmp_path / "x")
    assert old.meta.num_bytes == 40 and old.meta.layout is None and bare.meta is None
    for other in (old, bare):
        assert other.checked
        for fact in ("num_tokens", "num_documents", "contiguous", "sequences_are_documents"):
            assert getattr(other, fact) == getattr(fast, fact), fact
        assert np.array_equal(other.block_tokens, fast.block_tokens)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 3], [7] * 256, [7] * 257, [70000] * 30, [0, 2**17]])
def test_block_tokens_survive_the_sidecar(tmp_path, lengths):
    meta = make(tmp_path / "x", lengths, "int32")
    expected = [sum(lengths[i : i + 256]) for i in range(0, len(lengths), 256)]
    assert read_meta(tmp_path / "x") == meta and meta.block_tokens.tolist() == expected
    assert IndexedDataset(tmp_path / "x").block_tokens.dtype == np.int64


def test_the_sidecar_of_100_million_documents_is_small():
    tokens = np.random.default_rng(0).normal(128_000, 10_000, 100_000_000 // 256).astype(np.int64)
    text = sidecar._pack(tokens)
    assert len(text) < 2.2e6 and np.array_equal(sidecar._unpack(text, 256 * tokens.size, tokens.sum()), tokens)


def test_sentences_and_gaps_are_not_vouched_for(tmp_path):
    np.arange(12, dtype="<u2").tofile(tmp_path / "x.bin")
    write_index(str(tmp_path / "x.idx"), np.dtype("<u2"), np.array([3, 3, 4], np.int32), np.array([0, 2, 2, 3]))
    dataset = IndexedDataset(tmp_path / "x")
    assert not dataset.contiguous and not dataset.sequences_are_documents and dataset.num_documents == 3
    assert dataset.document_lengths.tolist() == [6, 0, 4] and dataset.block_tokens.tolist() == [10]


# -- a sidecar of other files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end, at", [("bin", 0), ("bin", 0.6), ("idx", 34), ("idx", 34 + 12 * 3000 - 8)])
def test_files_made_anew_with_the_same_sizes_are_noticed(tmp_path, end, at):
    make(tmp_path / "x", [4] * 3000)
    flip(tmp_path / f"x.{end}", at if isinstance(at, int) else int(at * 24000))
    with pytest.raises(ValueError, match=r"x\.meta\.json: probe is '\w+', but .* the files changed after"):
        IndexedDataset(tmp_path / "x")


def test_another_shard_under_an_old_sidecar_is_refused(tmp_path):
    make(tmp_path / "x")
    make(tmp_path / "y", LENGTHS[::-1])  # as many documents and tokens
    for end in ("bin", "idx"):
        (tmp_path / f"y.{end}").rename(tmp_path / f"x.{end}")
    with pytest.raises(ValueError, match=r"x\.meta\.json: probe is"):
        IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize("end", ["bin", "idx"])
@pytest.mark.parametrize("change", [-1, 1, 2])
def test_cut_or_longer_files_are_refused(tmp_path, end, change):
    make(tmp_path / "x")
    raw = (tmp_path / f"x.{end}").read_bytes()
    (tmp_path / f"x.{end}").write_bytes(raw[:change] if change < 0 else raw + bytes(change))
    with pytest.raises(ValueError, match=r"x\.idx, offset \d+: |x\.meta\.json: bin_size is"):
        IndexedDataset(tmp_path / "x")


def test_a_damaged_index_under_a_good_sidecar_gives_no_wrong_document(tmp_path):
    make(tmp_path / "x")
    right = [list(document) for document in map(IndexedDataset(tmp_path / "x").__getitem__, range(3000))]
    for at, bit in ((34 + 8000, 1), (34 + 8003, 128), (34 + 12000 + 8000, 2), (34 + 12000 + 8007, 64)):
        flip(tmp_path / "x.idx", at, bit)
        dataset, refused = IndexedDataset(tmp_path / "x"), 0
        assert not dataset.checked
        for i in range(3000):
            try:
                assert list(dataset[i]) == right[i]
            except ValueError as error:
                assert f"x.idx, offset {34 + 4 * i}" in str(error)
                refused += 1
        assert 1 <= refused <= 2
        with pytest.raises(ValueError, match=r"x\.idx, offset"):
            dataset.check()
        flip(tmp_path / "x.idx", at, bit)


@pytest.mark.parametrize("key, value", [("num_tokens", 12), ("num_documents", 3), ("dtype", "int32")])
@pytest.mark.parametrize("version", [1, 2])
def test_a_sidecar_of_another_shard_is_refused(tmp_path, key, value, version):
    make(tmp_path / "x")
    change(tmp_path / "x", **{key: value})
    if version == 1:
        as_version_1(tmp_path / "x.meta.json")
    with pytest.raises(ValueError, match=rf"x\.meta\.json: {key} is .*another shard"):
        IndexedDataset(tmp_path / "x")


def test_a_new_shard_drops_the_old_sidecar(tmp_path):
    make(tmp_path / "x")
    with IndexedWriter(tmp_path / "x", "uint16") as writer:
        writer.add_document([1])
    assert IndexedDataset(tmp_path / "x").meta is None


# -- the file itself ---------------------------------------------------------------------------------------------------


def test_sidecar_round_trip_keeps_unknown_keys(tmp_path):
    meta = make(tmp_path / "x", sources=[{"path": "a.jsonl"}], extra={"later": [1]})
    assert read_meta(tmp_path / "x") == meta == IndexedDataset(tmp_path / "x").meta
    raw = json.loads((tmp_path / "x.meta.json").read_text())
    assert raw["later"] == [1] and raw["version"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.meta.json"]


def test_no_flipped_bit_of_a_sidecar_is_believed(tmp_path):
    meta, path = make(tmp_path / "x", [3, 4]), tmp_path / "x.meta.json"
    for at in range(0, path.stat().st_size, 3):
        flip(path, at, 1 << at % 8)
        try:
            assert IndexedDataset(tmp_path / "x").meta == meta, at  # white space after the last key
        except ValueError as error:
            assert "x.meta.json" in str(error)
        flip(path, at, 1 << at % 8)


@pytest.mark.parametrize(
    "text, what",
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "JSON object"),
        ("{}", "vocab_size is None"),
        ('{"version": 2}', "edited or damaged"),
    ],
)
def test_a_broken_sidecar_is_refused(tmp_path, text, what):
    make(tmp_path / "x")
    (tmp_path / "x.meta.json").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.meta\.json: .*{what}"):
        IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize("change", [{"contiguous": 1}, {"block_tokens": None}, {"later": 0}])
def test_a_layout_of_another_form_is_refused(tmp_path, change):
    meta = make(tmp_path / "x")
    write_meta(
        tmp_path / "x", dataclasses.replace(meta, layout=None, extra={"layout": {**vars(meta.layout), **change}})
    )
    with pytest.raises(ValueError, match="layout does not hold"):
        read_meta(tmp_path / "x")


def test_block_tokens_that_do_not_add_up_are_refused(tmp_path):
    meta = make(tmp_path / "x")
    for text in ("", "AAAA", sidecar._pack(np.array([0] * 4))):
        change(tmp_path / "x", layout=dataclasses.replace(meta.layout, block_tokens=text))
        with pytest.raises(ValueError, match=r"x\.meta\.json: block_tokens"):
            _ = IndexedDataset(tmp_path / "x").block_tokens


def test_checksums_are_those_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sidecar, "CHECKSUM_BLOCK", 1000)
    monkeypatch.setattr(sidecar.BlockHash.__init__, "__defaults__", (1000,))
    meta = make(tmp_path / "x")
    for end, found in (("bin", meta.layout.bin_checksums), ("idx", meta.layout.idx_checksums)):
        raw = (tmp_path / f"x.{end}").read_bytes()
        assert found == [xxhash.xxh3_64_hexdigest(raw[i : i + 1000]) for i in range(0, len(raw), 1000)]
        assert len(found) > 5
    assert meta.bin_xxh3 == xxhash.xxh3_64_hexdigest((tmp_path / "x.bin").read_bytes())
    assert meta.layout.checksum_block == 1000
