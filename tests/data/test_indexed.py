"""The shard format: bytes, round trips, and every way a file can lie."""

import gc
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, optimal_dtype, resolve_prefix
from megatron_lite.data.indexed_writer import DTYPES, write_index

DOCUMENTS = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9, 10, 11]]


def write(prefix, documents=DOCUMENTS, dtype="uint16"):
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return writer


@pytest.mark.parametrize("code", DTYPES)
def test_bytes_follow_the_specification(tmp_path, code):
    """The expected files are spelled out field by field here, not taken from the writer."""
    dtype = DTYPES[code]
    write(tmp_path / "x", dtype=dtype)
    flat = [token for document in DOCUMENTS for token in document]
    assert (tmp_path / "x.bin").read_bytes() == np.array(flat, dtype=dtype).tobytes()
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 4, 5) + struct.pack("<4i", 3, 1, 0, 7)
    expected += struct.pack("<4q", *(dtype.itemsize * n for n in (0, 3, 4, 4))) + struct.pack("<5q", 0, 1, 2, 3, 4)
    assert (tmp_path / "x.idx").read_bytes() == expected
    dataset = IndexedDataset(tmp_path / "x")
    assert [list(dataset[i]) for i in range(len(dataset))] == DOCUMENTS
    assert dataset.num_tokens == 11 and dataset.num_documents == 4 and dataset.dtype == dtype and dataset.meta is None


def test_many_documents_at_once_is_the_same_as_one_by_one(tmp_path):
    write(tmp_path / "a")
    with IndexedWriter(tmp_path / "b", "uint16") as writer:
        writer.add_documents(np.array([1, 2, 3, 4]), [3, 1, 0])
        writer.add_documents(np.arange(5, 12), np.array([7]))
    for end in (".bin", ".idx"):
        assert (tmp_path / f"a{end}").read_bytes() == (tmp_path / f"b{end}").read_bytes()


def test_empty_shard(tmp_path):
    write(tmp_path / "x", [])
    dataset = IndexedDataset(tmp_path / "x")
    assert len(dataset) == 0 and dataset.num_tokens == 0 and dataset.num_documents == 0


@pytest.mark.parametrize("vocab_size, name", [(100, "uint16"), (65499, "uint16"), (65500, "int32"), (None, "int32")])
def test_optimal_dtype(vocab_size, name):
    assert optimal_dtype(vocab_size).name == name


def test_a_document_outlives_its_dataset(tmp_path):
    write(tmp_path / "x")
    document = IndexedDataset(tmp_path / "x")[3]
    tokens = IndexedDataset(tmp_path / "x").tokens
    gc.collect()
    assert document.flags.owndata and list(document) == DOCUMENTS[3] and tokens.sum() == sum(map(sum, DOCUMENTS))


@pytest.mark.parametrize("tokens", [[70000], [-1], [1.5]])
def test_tokens_that_do_not_fit_are_refused(tmp_path, tokens):
    with pytest.raises(ValueError, match="do not fit uint16"):
        write(tmp_path / "x", [tokens])
    assert not list(tmp_path.iterdir())


def test_writer_refuses_unknown_dtype_and_wrong_lengths(tmp_path):
    with pytest.raises(ValueError, match="no uint32"):
        IndexedWriter(tmp_path / "x", "uint32")
    with pytest.raises(ValueError, match="lengths that sum to 3"), IndexedWriter(tmp_path / "x", "int32") as writer:
        writer.add_documents(np.array([1, 2]), [3])


def test_an_aborted_writer_leaves_the_old_shard(tmp_path):
    write(tmp_path / "x")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "x", "uint16") as writer:
        writer.add_document([9] * 100_000)
        raise RuntimeError
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_resolve_prefix(tmp_path):
    write(tmp_path / "a_text_document")
    write(tmp_path / "b")
    for name in ("a", "a_text_document", "a_text_document.bin", "a_text_document.idx"):
        assert resolve_prefix(tmp_path / name) == str(tmp_path / "a_text_document")
    assert resolve_prefix(tmp_path / "b.bin") == str(tmp_path / "b")
    with pytest.raises(ValueError, match=r"no shard at .*/c"):
        resolve_prefix(tmp_path / "c")
    (tmp_path / "b.bin").unlink()
    with pytest.raises(ValueError, match=r"b\.bin is missing"):
        resolve_prefix(tmp_path / "b")


# -- what opening refuses ----------------------------------------------------------------------------------------------


def damaged(tmp_path, change):
    write(tmp_path / "x")
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    (tmp_path / "x.idx").write_bytes(change(raw) or raw)


def put(form, offset, value):
    return lambda raw: struct.pack_into(form, raw, offset, value)


# Offsets for 4 sequences: lengths at 34, pointers at 50, document indices at 82, end at 122.
LIES = {
    "magic": (put("<b", 0, 1), 0, "magic"),
    "short": (lambda raw: raw[:20], 0, "20 bytes"),
    "version": (put("<Q", 9, 2), 9, "version 2"),
    "dtype": (put("<B", 17, 9), 17, "dtype code 9"),
    "count": (put("<Q", 18, 5), 18, "5 sequences"),
    "huge count": (put("<Q", 18, 2**63), 18, "need"),
    "truncated": (lambda raw: raw[:-1], 18, "need 122 bytes, the file has 121"),
    "negative length": (put("<i", 38, -1), 38, "negative length -1"),
    "long length": (put("<i", 46, 8), 74, "sequence 3 ends at byte 24 of .*has 22 bytes"),
    "pointer back": (put("<q", 66, 2), 66, "pointer 2 goes backwards"),
    "pointer negative": (put("<q", 50, -2), 50, "pointer -2 goes backwards"),
    "pointer odd": (put("<q", 74, 9), 74, "pointer 9 splits a 2-byte token"),
    "pointer overflow": (put("<q", 74, 2**63 - 2), 74, "sequence 3 ends at"),
    "first document": (put("<q", 82, 1), 82, "start with 0"),
    "last document": (put("<q", 114, 3), 114, "last document index 3, expected 4"),
    "document order": (put("<q", 98, 0), 98, "document indices go backwards"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_damaged_index_is_named_with_its_offset(tmp_path, name):
    change, offset, what = LIES[name]
    damaged(tmp_path, change)
    with pytest.raises(ValueError, match=rf"x\.idx, offset {offset}: .*{what}.*again"):
        IndexedDataset(tmp_path / "x")


def test_a_truncated_bin_is_refused(tmp_path):
    write(tmp_path / "x")
    (tmp_path / "x.bin").write_bytes((tmp_path / "x.bin").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"offset 74: sequence 3 ends at byte 22 of .*x\.bin, which has 21 bytes"):
        IndexedDataset(tmp_path / "x")


def test_fairseq_is_refused_by_name(tmp_path):
    damaged(tmp_path, lambda raw: b"TNTIDX\x00\x00" + bytes(64))
    with pytest.raises(ValueError, match="fairseq's legacy TNTIDX"):
        IndexedDataset(tmp_path / "x")


def test_multimodal_modes_and_neox_floats(tmp_path):
    damaged(tmp_path, lambda raw: raw + bytes([0, 1, 0, 1]))
    assert list(IndexedDataset(tmp_path / "x").modes) == [0, 1, 0, 1]
    write(tmp_path / "f", dtype="float32")
    raw = bytearray((tmp_path / "f.idx").read_bytes())
    assert raw[17] == 7
    raw[17] = 6  # what GPT-NeoX writes for float32
    (tmp_path / "f.idx").write_bytes(raw)
    assert list(IndexedDataset(tmp_path / "f", neox_float_codes=True)[0]) == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="splits a 8-byte token"):
        IndexedDataset(tmp_path / "f")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 121), value=st.integers(0, 255), cut=st.integers(0, 122))
def test_no_byte_makes_the_reader_read_out_of_bounds(tmp_path, position, value, cut):
    if not (tmp_path / "good.idx").exists():
        write(tmp_path / "good")
        (tmp_path / "x.bin").write_bytes((tmp_path / "good.bin").read_bytes())
    raw = bytearray((tmp_path / "good.idx").read_bytes())
    raw[position] = value
    (tmp_path / "x.idx").write_bytes(raw[:cut] if cut % 2 else raw)
    try:
        dataset = IndexedDataset(tmp_path / "x")
    except ValueError as error:
        assert "x.idx" in str(error)
    else:
        assert all(len(dataset[i]) == dataset.lengths[i] for i in range(len(dataset)))


def test_sentences_of_a_document(tmp_path):
    np.arange(10, dtype="<u2").tofile(tmp_path / "x.bin")
    write_index(str(tmp_path / "x.idx"), np.dtype("<u2"), np.array([3, 3, 4], np.int32), np.array([0, 2, 3]))
    dataset = IndexedDataset(tmp_path / "x")
    assert len(dataset) == 3 and dataset.num_documents == 2 and list(dataset[1]) == [3, 4, 5]
