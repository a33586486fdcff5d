"""Small shards to test with, and both sets of kernels."""

import shutil

import numpy as np
import pytest

from megatron_lite.data import native, reference
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, ShardMeta, write_meta


@pytest.fixture(params=["c++", "numpy"])
def kernels(request):
    """Each test that asks runs twice. Without a library it is skipped, unless there is a compiler to blame."""
    if request.param == "numpy":
        return reference
    if native.library() is None:
        assert shutil.which("g++") is None, "g++ is here but the library was not built: pip install -e ."
        pytest.skip("no compiler, so no library")
    return native


@pytest.fixture
def make_shard(tmp_path):
    """make_shard(name, lengths, dtype, first=0, **meta): documents of these lengths with ids first, first + 1, ..."""

    def make(name, lengths, dtype="int32", first=0, **meta):
        lengths = np.asarray(lengths)
        with IndexedWriter(tmp_path / name, dtype) as writer:
            writer.add_documents(first + np.arange(lengths.sum()), lengths)
        if meta:
            facts = {
                "tokenizer_sha256": "ab" * 32,
                "vocab_size": 60000,
                "eod_id": 0,
                "num_documents": writer.num_documents,
                "num_tokens": writer.num_tokens,
                "num_bytes": 3 * writer.num_tokens,
                "dtype": writer.dtype.name,
                "layout": writer.layout,
            }
            write_meta(tmp_path / name, ShardMeta(**{**facts, **meta}))
        return IndexedDataset(tmp_path / name)

    return make


@pytest.fixture
def random_lengths():
    """Document lengths as the web has them: many short, a few long, some empty."""
    rng = np.random.default_rng(0)
    return lambda count: np.where(rng.random(count) < 0.05, 0, rng.lognormal(2.5, 1.2, count)).astype(np.int64)
