"""Training loss by domain: what each domain would give alone, whatever ranks and micro-batches do."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lite.data.mixture import Mixture
from megatron_lite.engine import build_engine
from megatron_lite.files import read_jsonl
from megatron_lite.mesh import Mesh
from megatron_lite.run import resolve
from megatron_lite.testing import run_distributed, tiny_config, write_tiny_shards
from megatron_lite.train import train


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Mixture:
    mixture = write_tiny_shards(tmp_path_factory.mktemp("shards"))
    mixture.save(Path(mixture.data_dir) / "mixture.yaml")
    return mixture


def one_step(folder: str, *overrides: str) -> tuple[list[list[float]], float, float, list[list[float]]]:
    """[sums, tokens] by domain, the loss and its tokens, and [sums, tokens] of one domain at a time by the model."""
    config = tiny_config(Path(folder) / "unused", *overrides)
    mesh = Mesh.from_env(config.parallel)
    loader, plan = resolve(config, Mixture.load(Path(folder) / "mixture.yaml"), mesh)
    engine = build_engine(config, plan, mesh)
    batches = loader.step(0)
    for batch in batches:  # a mask that depends on the sample alone, and differs between samples
        batch.loss_mask_BT = (batch.tokens_BT % 5 != batch.tokens_BT[:, :1] % 5).float()
    tokens = mesh.sum(torch.stack([b.loss_mask_BT.sum() for b in batches]).sum()).item()
    alone = torch.zeros(2, len(loader.names), dtype=torch.float64)
    for batch in batches:
        for domain in batch.domain_B.unique():
            rows = batch.domain_B == domain
            with torch.no_grad():
                losses = engine.module(batch.tokens_BT[rows], batch.labels_BT[rows])
            mask = batch.loss_mask_BT[rows].bool()
            alone[:, domain] += torch.tensor([losses[mask].double().sum().item(), mask.sum().item()])
    by_domain = torch.zeros(3, len(loader.names), dtype=torch.float64)
    loss = mesh.sum(engine.forward_backward(batches, tokens, by_domain)).item()
    result = mesh.sum(by_domain)[:2].tolist(), loss, tokens, mesh.sum(alone).tolist()
    engine.close()
    mesh.close()
    return result


@pytest.fixture(scope="module")
def whole(mixture) -> list[list[float]]:
    """[sums, tokens] by domain of one process and one micro-batch."""
    by_domain, loss, tokens, alone = one_step(str(mixture.data_dir), "batch.micro_batch_size=8")
    np.testing.assert_allclose(by_domain, alone, rtol=1e-6)
    assert sum(by_domain[0]) == pytest.approx(loss, rel=1e-6) and sum(by_domain[1]) == tokens
    assert min(by_domain[1]) > 0 and len(set(by_domain[1])) == 3, "three domains with unequal tokens"
    return by_domain


DEEPSPEED = ["engine=deepspeed", "parallel.zero_stage=2"]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["batch.micro_batch_size=1"]),
        (1, ["batch.micro_batch_size=2", "activation_checkpointing=full"]),
        pytest.param(2, ["batch.micro_batch_size=2"], marks=pytest.mark.slow),
        pytest.param(2, ["parallel={tensor_parallel_size: 2, sequence_parallel: true}"], marks=pytest.mark.slow),
        pytest.param(2, ["batch.micro_batch_size=2", *DEEPSPEED], marks=pytest.mark.slow),
    ],
)
def test_ranks_accumulation_and_engines_do_not_change_the_sums_by_domain(mixture, whole, ranks, overrides):
    if DEEPSPEED[0] in overrides:
        pytest.importorskip("deepspeed")
    folder = str(mixture.data_dir)
    results = [one_step(folder, *overrides)] if ranks == 1 else run_distributed(one_step, ranks, folder, *overrides)
    for by_domain, *_ in results:
        assert by_domain[1] == whole[1], "tokens are counted exactly"
        np.testing.assert_allclose(by_domain[0], whole[0], rtol=1e-6)


def test_lines_have_the_domains_of_their_step_and_add_up_to_the_loss(tmp_path, mixture):
    rare = mixture.with_weights({"a": 0.9, "b": 0.1, "c": 0.0})
    config = tiny_config(tmp_path / "run", "log.every=3")
    train(config, rare)
    loader, _ = resolve(config, rare, Mesh.from_env())
    rows, seen = read_jsonl(tmp_path / "run" / "metrics.jsonl"), set()
    assert [row["step"] for row in rows] == [3, 6, 9, 10]
    for row in rows:
        drawn = torch.cat([batch.domain_B for batch in loader.step(row["step"] - 1)])
        tokens = {name: (drawn == i).sum().item() / len(drawn) for i, name in enumerate(loader.names)}
        found = {key.rpartition("/")[2]: loss for key, loss in row.items() if key.startswith("train/loss/")}
        assert found.keys() == {name for name, share in tokens.items() if share}
        assert sum(tokens[name] * loss for name, loss in found.items()) == pytest.approx(row["train/loss"], rel=1e-6)
        seen.add(tuple(found))
    assert seen == {("a",), ("a", "b")}, "b is left out where it has no token"
