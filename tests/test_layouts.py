"""A hundred steps of every layout: data parallel, ZeRO-1, and ZeRO-1 with tensor parallelism, each twice."""

import os
from pathlib import Path

import pytest

from megatron_lite.data.mixture import Mixture
from megatron_lite.files import read_jsonl
from megatron_lite.mesh import Mesh
from megatron_lite.testing import run_distributed, tiny_config, write_tiny_shards
from megatron_lite.train import train

pytestmark = pytest.mark.slow

Curve = list[tuple[float, float]]  # (loss, gradient norm) of each step
LAYOUTS = {  # name: (ranks, settings)
    "dp2": (2, ""),
    "dp2 zero1": (2, "zero_stage: 1"),
    "dp2 tp2 zero1": (4, "zero_stage: 1, tensor_parallel_size: 2"),
    "dp2 tp2 sp zero1": (4, "zero_stage: 1, tensor_parallel_size: 2, sequence_parallel: true"),
}


def hundred_steps(folder: str, runs: dict[str, str]) -> dict[str, Curve]:
    """One run after another in the same ranks: name -> what was logged."""
    out = {}
    for number, (name, parallel) in enumerate(runs.items()):
        os.environ["MASTER_PORT"] = str(int(os.environ.get("MASTER_PORT", 0)) + (number > 0))
        settings = ("schedule={total_tokens: 12800, warmup_steps: 10}", "optim.lr=3e-3", f"parallel={{{parallel}}}")
        config = tiny_config(Path(folder) / name, *settings)
        train(config, Mixture.load(Path(folder) / "mixture.yaml"))
        Mesh.from_env().close()
        rows = read_jsonl(config.run_dir / "metrics.jsonl")
        out[name] = [(row["train/loss"], row["train/grad_norm"]) for row in rows]
    return out


@pytest.fixture(scope="module")
def curves(tmp_path_factory) -> dict[str, Curve]:
    folder = tmp_path_factory.mktemp("layouts")
    write_tiny_shards(folder / "shards").save(folder / "mixture.yaml")
    found = hundred_steps(str(folder), {"one": ""})
    for ranks in (2, 4):
        runs = {name: parallel for name, (n, parallel) in LAYOUTS.items() if n == ranks}
        runs |= {f"{name} again": parallel for name, parallel in runs.items()}
        found |= run_distributed(hundred_steps, ranks, str(folder), runs)[0]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hundred_steps_are_those_of_one_process(curves, layout):
    losses, norms = zip(*curves["one"], strict=True)
    got_losses, got_norms = zip(*curves[layout], strict=True)
    assert len(losses) == 100 and losses[-1] < losses[0] - 1
    assert abs(got_losses[0] - losses[0]) <= 1e-6 and got_norms[0] == pytest.approx(norms[0], rel=1e-6)
    assert max(abs(a - b) for a, b in zip(got_losses, losses, strict=True)) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_repeated_run_is_bitwise_the_same(curves, layout):
    assert curves[layout] == curves[f"{layout} again"]
