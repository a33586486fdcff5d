"""Documents in the seed's order: all of them, once, whatever the memory and the workers."""

from pathlib import Path

import numpy as np
import pytest
from reference_shard import run, shard_bytes
from word_corpus import make_texts, write_jsonl

from data_tools.shuffle import DocumentShuffler, document_keys
from megatron_lite.data.indexed import IndexedDataset, read_meta


def shuffled(folder: Path, documents: list[np.ndarray], seed: int, sort_bytes: int, step: int) -> list[bytes]:
    found: list[bytes] = []
    with DocumentShuffler(str(folder), "uint16", seed, sort_bytes) as shuffler:
        for start in range(0, len(documents), step):
            batch = documents[start : start + step]
            shuffler.add_documents(np.concatenate(batch), np.array([len(d) for d in batch]))
        for tokens, lengths in shuffler.drain():
            found += [part.tobytes() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    assert not folder.exists()
    return found


def test_order_is_the_keys_and_depends_on_nothing_else(tmp_path: Path) -> None:
    documents = [np.array([i, *range(i % 7)], dtype=np.uint16) for i in range(5000)]
    expected = [documents[i].tobytes() for i in np.argsort(document_keys(3, 0, 5000))]
    for sort_bytes, step in ((1 << 20, 5000), (200, 777), (20, 64)):  # one level, two, three
        assert shuffled(tmp_path / "s", documents, 3, sort_bytes, step) == expected
    assert shuffled(tmp_path / "s", documents, 4, 1 << 20, 100) != expected


def test_keys_are_distinct_and_look_random() -> None:
    keys = document_keys(0, 0, 100_000)
    assert np.unique(keys).size == 100_000
    np.testing.assert_array_equal(keys[500:900], document_keys(0, 500, 400))
    order = np.argsort(keys).astype(float)
    for other in (np.arange(100_000), np.argsort(document_keys(1, 0, 100_000)), np.roll(order, 1)):
        assert abs(np.corrcoef(order, other)[0, 1]) < 0.0127  # four standard deviations of 1/sqrt(n)


def test_shuffled_shard_has_the_same_documents_in_another_order(tmp_path: Path, hf: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(1500))
    plain = IndexedDataset(run(tmp_path, source, hf, "plain"))
    prefixes = [
        run(tmp_path, source, hf, f"s{workers}{backend}", shuffle_seed=7, workers=workers, backend=backend)
        for workers, backend in ((1, "native"), (2, "native"), (1, "auto"))
    ]
    assert shard_bytes(prefixes[0]) == shard_bytes(prefixes[1]) == shard_bytes(prefixes[2])
    mixed = IndexedDataset(prefixes[0])
    a, b = ([d[i].tobytes() for i in range(len(d))] for d in (plain, mixed))
    assert a != b and sorted(a) == sorted(b) and b == [a[i] for i in np.argsort(document_keys(7, 0, 1500))]
    meta = read_meta(prefixes[0])
    assert meta is not None and meta.extra["shuffled_seed"] == 7 and meta.num_tokens == plain.num_tokens
    before = Path(f"{prefixes[0]}.bin").stat().st_ino
    run(tmp_path, source, hf, "s1native", shuffle_seed=7)
    assert Path(f"{prefixes[0]}.bin").stat().st_ino == before
    run(tmp_path, source, hf, "s1native", shuffle_seed=8)
    assert Path(f"{prefixes[0]}.bin").stat().st_ino != before


@pytest.mark.parametrize("seed", [0, -1, 2**63])
def test_any_seed_will_do(seed: int) -> None:
    assert document_keys(seed, 0, 10).dtype == np.uint64
