"""Any bytes at all in .idx, .bin or .meta.json: a ValueError or the right data, no crash and no read out of bounds."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sidecar import make

from data_tools.inspect_data import verify
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.indexed_writer import DTYPES, HEADER, MAGIC
from megatron_lite.data.native import kernels as default_kernels
from megatron_lite.data.samples import DomainSamples

LENGTHS = np.random.default_rng(1).integers(0, 9, 2000)  # 40 kB of .idx: more than the probes see
EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_all(prefix):
    """Every document, and some samples through the kernels; what is damaged is a ValueError."""
    dataset = IndexedDataset(prefix)
    documents = []
    for i in range(min(len(dataset), 3000)):
        try:
            documents.append(dataset[i])
        except ValueError:
            documents.append(None)
    if dataset.checked:
        assert all(d is not None and len(d) == n for d, n in zip(documents, dataset.lengths, strict=False))
    for order in ("documents", "contiguous"):
        try:
            domain = DomainSamples([dataset], 64, 0, "d", default_kernels(), order)
            assert domain.gather(np.arange(40)).shape == (40, 65)
        except ValueError as error:
            assert str(prefix) in str(error)
    return documents


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    make(folder / "x", LENGTHS)
    return {end: (folder / f"x.{end}").read_bytes() for end in ("idx", "bin", "meta.json")}, read_all(folder / "x")


def put(tmp_path, files):
    for end in ("idx", "bin", "meta.json"):
        (tmp_path / f"x.{end}").unlink(missing_ok=True)
        if end in files:
            (tmp_path / f"x.{end}").write_bytes(files[end])


@EXAMPLES
@given(
    head=st.binary(max_size=60), counts=st.tuples(st.integers(0, 4), st.integers(0, 5)), tail=st.binary(max_size=200)
)
def test_arbitrary_bytes_as_an_index(tmp_path, head, counts, tail):
    code = 1 + len(tail) % len(DTYPES)
    for idx in (head + tail, HEADER.pack(MAGIC, 1, code, *counts) + tail, HEADER.pack(MAGIC, 1, code, 2**60, 1) + tail):
        put(tmp_path, {"idx": idx, "bin": head})
        try:
            read_all(tmp_path / "x")
        except ValueError as error:
            assert "x.idx" in str(error)


@EXAMPLES
@given(st.integers(0, 2**32), st.booleans(), st.booleans(), st.sampled_from(["idx", "idx", "bin", "meta.json"]))
def test_flipped_bits_and_cut_files(tmp_path, good, seed, cut, sidecar, end):
    files, documents = good
    rng = np.random.default_rng(seed)  # places evenly over the file, which hypothesis would not choose
    raw = np.frombuffer(files[end], dtype=np.uint8).copy()
    raw[rng.integers(0, raw.size, rng.integers(1, 4))] ^= np.uint8(1 << rng.integers(0, 8))
    raw = raw[: rng.integers(0, raw.size)] if cut and rng.random() < 0.5 else raw
    put(tmp_path, {k: v for k, v in {**files, end: raw.tobytes()}.items() if sidecar or k != "meta.json"})
    damaged = raw.tobytes() != files[end] and (sidecar or end != "meta.json")
    try:
        found = read_all(tmp_path / "x")
    except ValueError as error:
        assert damaged and str(tmp_path / "x") in str(error)
        return
    if sidecar and end != "bin":  # tokens are compared by --verify alone
        wrong = [
            i for i, (a, b) in enumerate(zip(found, documents, strict=True)) if a is not None and list(a) != list(b)
        ]
        assert not wrong
    if sidecar and damaged and end != "meta.json":
        assert verify(str(tmp_path / "x"))


LOOP = """
import sys, warnings
sys.path[:0] = [sys.argv[1]]
import numpy as np
import test_fuzz, pathlib
from test_sidecar import make
folder = pathlib.Path(sys.argv[2])
make(folder / "x", test_fuzz.LENGTHS)
good = {end: (folder / f"x.{end}").read_bytes() for end in ("idx", "bin", "meta.json")}
rng = np.random.default_rng(0)
opened = 0
for _ in range(int(sys.argv[3])):
    end = rng.choice(list(good))
    raw = np.frombuffer(good[end], dtype=np.uint8).copy()
    for at in rng.integers(0, raw.size, rng.integers(1, 5)):
        raw[at : at + rng.integers(1, 9)] = rng.integers(0, 256)
    raw = raw[: rng.integers(0, raw.size)] if rng.random() < 0.2 else raw
    sidecar = rng.random() < 0.5
    test_fuzz.put(folder, {k: v for k, v in {**good, end: raw.tobytes()}.items() if sidecar or k != "meta.json"})
    try:
        test_fuzz.read_all(folder / "x")
        opened += 1
    except ValueError:
        pass
print(opened)
"""


@pytest.mark.slow
def test_a_thousand_damaged_shards_crash_no_process(tmp_path):
    here = str(__file__).rpartition("/")[0]
    command = [sys.executable, "-X", "faulthandler", "-c", LOOP, here, str(tmp_path), "1000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 50 < int(done.stdout) < 950  # some were read, some refused
