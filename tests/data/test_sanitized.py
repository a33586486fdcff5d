"""Every kernel once under AddressSanitizer and UBSan: the tests of the kernels, run with a library built for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-O1", "-g", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-DML_NO_CLONES"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
TESTS = ["test_gather.py", "test_native.py", "test_megatron_order.py", "test_stages.py"]
PROBE = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"


def run(command, folder, **environment):
    known = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        command, env={**os.environ, **known, **environment}, cwd=folder, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A copy of the packages whose only library is the sanitized one, and the runtime to preload."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the kernels with")
    folder = tmp_path_factory.mktemp("sanitized")
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    for package in ("megatron_lite", "data_tools"):
        shutil.copytree(ROOT / package, folder / package, ignore=skip)
    shutil.copytree(ROOT / "tests" / "data", folder / "tests", ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", folder)
    library = folder / "megatron_lite" / "data" / "_native_sanitized.so"
    sources = sorted((folder / "megatron_lite" / "data" / "csrc").glob("*.cpp"))
    built = run([compiler, *FLAGS, *SANITIZE, *map(str, sources), "-o", str(library)], folder)
    if "cannot find" in built.stderr and "asan" in built.stderr:
        pytest.skip(f"the compiler has no sanitizer runtime: {built.stderr.splitlines()[0]}")
    assert built.returncode == 0, built.stderr
    runtime = run([compiler, "-print-file-name=libasan.so"], folder).stdout.strip()
    loaded = run([sys.executable, "-c", PROBE, str(library)], folder, LD_PRELOAD=runtime)
    if loaded.returncode:
        pytest.skip(f"the sanitizer runtime cannot be preloaded: {loaded.stderr[-300:]}")
    return folder, runtime


@pytest.mark.slow
def test_the_sanitizer_sees_a_read_behind_an_array(sanitized):
    folder, runtime = sanitized
    code = (
        "import numpy as np; from megatron_lite.data import native; a = np.zeros(4, np.int64)\n"
        "native.library().ml_block_prefix(a.ctypes.data, 5, 1, np.zeros(9, np.int64).ctypes.data)"
    )
    found = run([sys.executable, "-c", code], folder, LD_PRELOAD=runtime)
    assert found.returncode != 0 and "heap-buffer-overflow" in found.stderr, found.stderr[-2000:]


@pytest.mark.slow
def test_the_kernels_are_clean_under_the_sanitizers(sanitized):
    folder, runtime = sanitized
    tests = [f"tests/{name}" for name in TESTS if (folder / "tests" / name).is_file()]
    options = ["-q", "-x", "-n0", "-p", "no:cacheprovider", "-k", "not numpy"]
    done = run([sys.executable, "-m", "pytest", *options, *tests], folder, LD_PRELOAD=runtime)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout and "numpy is used" not in done.stdout
