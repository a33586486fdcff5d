"""What was seen to go wrong with these files elsewhere (Megatron-Core 0.16): here each is right."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from test_sidecar import make

from megatron_lite.data import reference
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, optimal_dtype
from megatron_lite.data.indexed_writer import write_index
from megatron_lite.data.samples import DomainSamples


def run_python(code, *arguments):
    """Runs code in a process of its own, where a segmentation fault can be seen."""
    command = [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def write_sparse(prefix, lengths, dtype="<u2"):
    """A shard of zeros that takes no room on the disk, whatever its size, but for its last eight tokens: 1 to 8."""
    dtype, lengths = np.dtype(dtype), np.asarray(lengths, dtype=np.int32)
    with open(f"{prefix}.bin", "wb") as file:
        file.seek((int(lengths.sum(dtype=np.int64)) - 8) * dtype.itemsize)
        file.write(np.arange(1, 9, dtype=dtype).tobytes())
    write_index(f"{prefix}.idx", dtype, lengths)


@pytest.mark.parametrize("vocab_size", [65_499, 65_500, 65_535, 65_536, 65_537])
def test_a_vocabulary_around_65536_is_read_as_it_was_written(tmp_path, vocab_size):
    """Megatron writes int32 from 65,500 on and, told the lengths apart, read that as uint16: 100, 0, 101, 0."""
    tokens = [100, 101, vocab_size - 1]
    with IndexedWriter(tmp_path / "x", optimal_dtype(vocab_size)) as writer:
        writer.add_document(tokens)
    assert IndexedDataset(tmp_path / "x")[0].tolist() == tokens
    assert IndexedDataset(tmp_path / "x").dtype == (np.uint16 if vocab_size < 65_500 else np.int32)


def test_a_shard_made_anew_at_the_same_path_is_read_anew(tmp_path):
    """Megatron's index cache is keyed by path; here nothing is cached, and reading leaves no file behind."""
    make(tmp_path / "x", [5] * 100)
    first = DomainSamples([IndexedDataset(tmp_path / "x")], 4, 0, "d", reference).gather(np.arange(30))
    files = sorted(tmp_path.iterdir())
    make(tmp_path / "x", [50] * 10, "int32")
    domain = DomainSamples([IndexedDataset(tmp_path / "x")], 4, 0, "d", reference)
    second = domain.gather(np.arange(domain.samples_per_epoch))
    assert not np.array_equal(first, second[:30]) and second.max() <= 499 and sorted(tmp_path.iterdir()) == files
    assert (np.diff(second) == 1).mean() > 0.8  # documents of 50, no longer of 5


def test_a_writer_killed_half_way_leaves_nothing_under_the_name(tmp_path):
    code = """
        import os, sys, numpy as np
        from megatron_lite.data.indexed import IndexedWriter
        with IndexedWriter(sys.argv[1], "uint16") as writer:
            writer.add_documents(np.zeros(10**6, np.uint16), [10**6])
            os.kill(os.getpid(), 9)
    """
    assert run_python(code, tmp_path / "x").returncode == -9
    assert [path.name.split(".tmp")[0] for path in tmp_path.iterdir()] == ["x.bin"]
    with pytest.raises(ValueError, match="no shard at"):
        IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize("sidecar", [True, False])
@pytest.mark.parametrize("end", ["bin", "idx"])
def test_a_half_written_file_is_refused(tmp_path, end, sidecar):
    make(tmp_path / "x", [3] * 50)
    if not sidecar:
        (tmp_path / "x.meta.json").unlink()
    raw = (tmp_path / f"x.{end}").read_bytes()
    for size in (0, 1, 33, 34, 35, 100, 101, len(raw) // 2, len(raw) - 1):
        (tmp_path / f"x.{end}").write_bytes(raw[:size])
        with pytest.raises(ValueError, match=r"x\.idx, offset \d+"):
            IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize("sidecar", [True, False])
def test_views_outlive_their_dataset(tmp_path, sidecar):
    """`IndexedDataset(p)[0]` kept after the dataset was collected was a segmentation fault."""
    make(tmp_path / "x", [1000] * 3000, "int32")
    if not sidecar:
        (tmp_path / "x.meta.json").unlink()
    code = """
        import gc, sys
        from megatron_lite.data.indexed import IndexedDataset
        def views(dataset):
            return dataset[0], dataset.tokens[-5:], dataset.lengths[1:], dataset.pointers, dataset.document_indices
        kept = [views(IndexedDataset(sys.argv[1])) for _ in range(20)]
        gc.collect()
        assert all(len(set(map(int, column))) == 1 for column in zip(*[[v.sum() for v in row] for row in kept]))
        alive = sum(line.rstrip().endswith(("x.bin", "x.idx")) for line in open("/proc/self/maps"))
        kept = kept[:1]
        gc.collect()
        left = sum(line.rstrip().endswith(("x.bin", "x.idx")) for line in open("/proc/self/maps"))
        print(alive, left, kept[0][0].sum())
    """
    done = run_python(code, tmp_path / "x")
    assert done.returncode == 0, done.stderr
    alive, left, total = map(int, done.stdout.split())
    assert alive > left >= 1 and total == 999 * 500  # and what nobody keeps is unmapped


def test_shards_keep_no_files_open(tmp_path):
    make(tmp_path / "x")
    code = """
        import resource, sys
        from megatron_lite.data.indexed import IndexedDataset
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        kept = [IndexedDataset(sys.argv[1]) for _ in range(200)]
        print(sum(int(dataset[2999].size) for dataset in kept))
    """
    done = run_python(code, tmp_path / "x")
    assert done.returncode == 0, done.stderr


def test_samples_are_counted_in_integers(tmp_path, kernels):
    """33,556,482 tokens: float32 made 16,385 of 16,386 samples, and the last one an index error."""
    write_sparse(tmp_path / "x", [33_556_482])
    domain = DomainSamples([IndexedDataset(tmp_path / "x")], 2048, 0, "d", kernels)
    assert domain.samples_per_epoch == 16_385 == (33_556_482 - 1) // 2048
    sums = domain.gather(np.arange(16_385 - 64, 16_385 + 64)).sum(axis=1)
    assert len(sums) == 128
    write_sparse(tmp_path / "y", [33_556_481])  # the last window ends with the last token
    domain = DomainSamples([IndexedDataset(tmp_path / "y")], 2048, 0, "d", reference)
    assert domain.samples_per_epoch == 16_385


@pytest.mark.parametrize("before", [[2**30], [2**31 - 1], [2**31 - 1, 2**31 - 1], [2**31 - 1] * 3])
def test_pointers_beyond_32_bits(tmp_path, before, kernels):
    """Bytes from 2^31 to 1.3e10 into the .bin, tokens beyond 2^32; the files are sparse."""
    write_sparse(tmp_path / "x", [*before, 5, 3])
    dataset, n = IndexedDataset(tmp_path / "x"), len(before)
    assert dataset[n].tolist() == [1, 2, 3, 4, 5] and dataset[n + 1].tolist() == [6, 7, 8]
    assert dataset.num_tokens == sum(before) + 8 and dataset.pointers[n] == 2 * sum(before)
    assert dataset.block_tokens.tolist() == [sum(before) + 8] and dataset.contiguous
    domain = DomainSamples([dataset], 2**20, 0, "d", kernels)
    assert domain.samples_per_epoch == (sum(before) + 7) // 2**20 and domain.gather(np.array([0])).max() <= 8


def test_no_documents_and_empty_documents(tmp_path, kernels):
    make(tmp_path / "none", [])
    make(tmp_path / "empty", [0] * 600)
    make(tmp_path / "some", [0, 0, 7, 0, 6, 0])
    for prefix in ("none", "empty"):
        dataset = IndexedDataset(tmp_path / prefix)
        assert dataset.num_tokens == 0 and dataset.block_tokens.sum() == 0 and not dataset.checked
        dataset.check()
        (tmp_path / f"{prefix}.meta.json").unlink()  # with and without sidecar in one domain
    shards = [IndexedDataset(tmp_path / name) for name in ("none", "empty", "some", "empty", "none")]
    domain = DomainSamples(shards, 4, 0, "d", kernels)
    assert domain.num_tokens == 13 and set(domain.gather(np.arange(30)).ravel().tolist()) <= set(range(13))


def test_shards_with_and_without_sidecar_are_one_domain(tmp_path, kernels):
    for name in "abc":
        make(tmp_path / name, [9] * 700)
    shards = [IndexedDataset(tmp_path / name) for name in "abc"]
    expected = DomainSamples(shards, 16, 0, "d", kernels).gather(np.arange(200))
    (tmp_path / "b.meta.json").unlink()
    mixed = [IndexedDataset(tmp_path / name) for name in "abc"]
    assert [shard.checked for shard in mixed] == [False, True, False]
    assert np.array_equal(DomainSamples(mixed, 16, 0, "d", kernels).gather(np.arange(200)), expected)
