"""Our files against megatron-core's own reader, writer and merge, where it is installed (`make` installs it)."""

import importlib.util
import warnings

import numpy as np
import pytest

from data_tools.merge_data import merge
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, optimal_dtype
from megatron_lite.data.indexed_writer import DTYPES

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [], [12]]


@pytest.fixture(scope="module")
def megatron():
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed: pip install --no-deps megatron-core")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core does not import")


def theirs(megatron, prefix, documents, dtype, modes=None):
    """A shard by their builder; a document is a list of sequences."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type, multimodal=modes is not None)
    for sequences in documents:
        flat = [token for sequence in sequences for token in sequence]
        kinds, modes = (modes[: len(sequences)], modes[len(sequences) :]) if modes else (None, None)
        builder.add_document(flat, [len(s) for s in sequences], kinds)
    builder.finalize(f"{prefix}.idx")


def ours(prefix, documents, dtype):
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)


def raw(prefix):
    return [prefix.with_name(f"{prefix.name}.{end}").read_bytes() for end in ("bin", "idx")]


@pytest.mark.parametrize("code", DTYPES)
def test_both_write_the_same_bytes_and_read_each_other(tmp_path, megatron, code):
    dtype = DTYPES[code]
    ours(tmp_path / "ours", DOCUMENTS, dtype)
    theirs(megatron, tmp_path / "theirs", [[document] for document in DOCUMENTS], dtype)
    assert raw(tmp_path / "ours") == raw(tmp_path / "theirs")
    their_reader, our_reader = megatron.IndexedDataset(str(tmp_path / "ours")), IndexedDataset(tmp_path / "theirs")
    assert [list(their_reader[i]) for i in range(len(their_reader))] == DOCUMENTS
    assert [list(our_reader[i]) for i in range(len(our_reader))] == DOCUMENTS
    assert our_reader.dtype == dtype and our_reader.contiguous and our_reader.sequences_are_documents


def test_sentences_and_modes_of_theirs_are_read(tmp_path, megatron):
    documents, modes = [[[1, 2], [3]], [[4, 5, 6]], [[7], [], [8, 9]]], [0, 1, 0, 1, 0, 1]
    theirs(megatron, tmp_path / "text", documents, "uint16")
    theirs(megatron, tmp_path / "modes", documents, "uint16", modes)
    for name in ("text", "modes"):
        dataset = IndexedDataset(tmp_path / name)
        assert [list(dataset[i]) for i in range(6)] == [sequence for document in documents for sequence in document]
        assert dataset.document_lengths.tolist() == [3, 3, 3] and dataset.document_indices.tolist() == [0, 2, 3, 6]
        assert (dataset.modes is None) == (name == "text")
    assert dataset.modes.tolist() == modes
    with pytest.raises(ValueError, match=r"modes holds modes, so it is multimodal; merge"):
        merge([tmp_path / "modes"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"text has documents of several sequences; merge"):
        merge([tmp_path / "text"], tmp_path / "out")


def test_merge_gives_the_bytes_of_their_add_index(tmp_path, megatron):
    rng = np.random.default_rng(0)
    for i in range(3):
        ours(tmp_path / f"part{i}", [rng.integers(0, 99, n) for n in rng.integers(0, 50, 200)], "int32")
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for i in range(3):
        builder.add_index(str(tmp_path / f"part{i}"))
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert merge([tmp_path / f"part{i}" for i in range(3)], tmp_path / "ours") is None
    assert raw(tmp_path / "ours") == raw(tmp_path / "theirs")


@pytest.mark.parametrize("vocab_size", [1, 255, 32_000, 65_499, 65_500, 65_535, 65_536, 65_537, 256_000, None])
def test_the_dtype_is_theirs_for_every_vocabulary(megatron, vocab_size):
    assert optimal_dtype(vocab_size) == megatron.DType.optimal_dtype(vocab_size)
