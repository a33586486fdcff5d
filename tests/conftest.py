"""What every test gets: one thread, seeded torch, its own folder for compiled DeepSpeed ops, the shared data if any."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; child processes inherit it

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_private_extensions(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests run side by side on few cores; an interrupted DeepSpeed build must not hang the next session."""
    torch.set_num_threads(1)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path_factory.mktemp("torch_extensions"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of large shared test data: $MEGATRON_LITE_SHARED, or `shared` beside the repository."""
    folder = os.environ.get("MEGATRON_LITE_SHARED") or Path(__file__).resolve().parents[2] / "shared"
    if not Path(folder).is_dir():
        pytest.skip(f"no shared data at {folder}: set MEGATRON_LITE_SHARED")
    return Path(folder)


def wants_gpus(marks: str) -> bool:
    """Whether a pytest -m asks for the tests that need a GPU."""
    return "gpu" in marks.replace("not gpu", "")


def pytest_configure(config: pytest.Config) -> None:
    """All other tests are for the CPU, and would compare bf16 with fp32, or miss a second GPU, where there is one."""
    if torch.version.cuda and not wants_gpus(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, with the reason, where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
