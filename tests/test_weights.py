"""A run that starts from weights has them in every engine and on every rank. Formats are test_hf.py's business."""

import pytest
import torch

from megatron_lite.mesh import Mesh
from megatron_lite.testing import run_distributed, tiny_config, write_tiny_shards
from megatron_lite.train import train
from megatron_lite.weights import read_weights


def train_on_this_rank(*args) -> None:
    train(*args)
    Mesh.from_env().close()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["torch, tp 2", "torch, ZeRO 1", "deepspeed, ZeRO 1"])
def test_every_engine_and_layout_starts_from_the_same_weights(tmp_path, layout):
    """With a learning rate of 0 a step writes back what the optimizer takes for the weights, fp32 copies too."""
    if "deepspeed" in layout:
        pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    mixture = write_tiny_shards(tmp_path / "shards")
    train(tiny_config(tmp_path / "source", "checkpoint={every: 10}"), mixture)
    still = ("checkpoint={every: 1}", "schedule={total_tokens: 128, warmup_steps: 0, decay: constant}", "optim.lr=0")
    parallel = "parallel.tensor_parallel_size=2" if "tp 2" in layout else "parallel.zero_stage=1"
    extra = (f"engine={layout.split(',')[0]}", parallel, "seed=99", f"init_from={tmp_path / 'source'}")
    run_distributed(train_on_this_rank, 2, tiny_config(tmp_path / "run", *still, *extra), mixture)
    source, read = read_weights(tmp_path / "source"), read_weights(tmp_path / "run")
    assert read.source.name == "step_0000001" and read.shape == source.shape
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in source.tensors.items())
