"""Resume over changes: planned phases are bitwise, allowed changes are recorded, all others name the flag."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_lite.data.mixture import Mixture
from megatron_lite.data.sidecar import read_meta
from megatron_lite.files import read_jsonl
from megatron_lite.mesh import Mesh
from megatron_lite.testing import run_distributed, tiny_config, write_tiny_shards
from megatron_lite.train import train
from tests.test_train import last_state, losses


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Mixture:
    return write_tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def phases(tmp_path, mixture):
    """From step 4 on b and c alone, from step 7 on all three: as --set phases=..."""
    for number, weights in enumerate([{"b": 0.5, "c": 0.5}, {"c": 0.1, "a": 0.9}]):
        Mixture.from_weights(weights, mixture.data_dir).save(tmp_path / f"phase{number}.yaml")
    at = [
        f"{{mixture: {tmp_path}/phase{number}.yaml, from_tokens: {tokens}}}" for number, tokens in ((0, 512), (1, 800))
    ]
    return f"phases=[{', '.join(at)}]"


def cut_back(run: Path, step: int) -> None:
    """As if the run had been killed after the checkpoint of `step`."""
    for folder in run.glob("step_*"):
        if int(folder.name[-7:]) > step:
            shutil.rmtree(folder)
    (run / "result.json").unlink(missing_ok=True)


def state_of(run: Path) -> dict:
    return json.loads((sorted(run.glob("step_*"))[-1] / "state.json").read_text())


@pytest.mark.parametrize("step", [3, 4, 5, 8])
def test_a_resume_before_at_and_after_a_phase_is_bitwise(tmp_path, mixture, phases, step):
    every = "checkpoint={every: 1, keep: 99}"
    train(tiny_config(tmp_path / "run", every, phases), mixture)
    before, whole, data = (
        last_state(tmp_path / "run"),
        losses(tmp_path / "run"),
        (tmp_path / "run/data.json").read_text(),
    )
    cut_back(tmp_path / "run", step)
    train(tiny_config(tmp_path / "run", every, phases), mixture)
    after = last_state(tmp_path / "run")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert losses(tmp_path / "run") == whole and (tmp_path / "run/data.json").read_text() == data
    stages = state_of(tmp_path / "run")["data"]["stages"]
    assert [stage["first_step"] for stage in stages] == [0, 4, 7]  # 800 tokens are 6.25 steps


@pytest.mark.slow
def test_a_resume_at_each_of_20_steps_is_bitwise(tmp_path, mixture, phases):
    """Parameters, moments, loss, learning rate, gradient norm and samples, in the second epoch of a domain too."""
    steps = ("schedule={total_tokens: 2560, warmup_steps: 4}", phases, "checkpoint={every: 1, keep: 99}")
    train(tiny_config(tmp_path / "whole", *steps), mixture)
    expected, rows = last_state(tmp_path / "whole"), computed(tmp_path / "whole")
    assert len(rows) == 20 and len({row["train/lr"] for row in rows}) > 15
    for step in range(1, 20):
        run = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole", run)
        cut_back(run, step)
        train(tiny_config(run, *steps), mixture)
        got = last_state(run)
        assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in got), step
        assert computed(run) == rows, step
        assert (run / "data.json").read_text() == (tmp_path / "whole" / "data.json").read_text()
        shutil.rmtree(run)


def computed(run: Path) -> list[dict[str, float]]:
    """Every logged line without what a clock says."""
    return [{k: v for k, v in row.items() if k[:5] in ("step", "train")} for row in read_jsonl(run / "metrics.jsonl")]


def test_allowed_weights_at_a_resume_are_the_run_with_that_phase(tmp_path, mixture, phases, capfd):
    every = "checkpoint={every: 1, keep: 99}"
    one = phases.split("}, {")[0] + "}]"
    planned = train(tiny_config(tmp_path / "planned", every, one), mixture)
    train(tiny_config(tmp_path / "run", every), mixture)
    cut_back(tmp_path / "run", 4)
    other = Mixture.load(tmp_path / "phase0.yaml")
    with pytest.raises(ValueError, match=r"mixture: from step 4: a 0.166667 -> 0, b .*\n.*--allow-change mixture\n"):
        train(tiny_config(tmp_path / "run", every), other)
    allow = "checkpoint={every: 1, keep: 99, allow_change: [mixture]}"
    assert train(tiny_config(tmp_path / "run", allow), other).losses == planned.losses
    assert "allowed to change at step 4: mixture: from step 4: a 0.166667 -> 0" in capfd.readouterr().out
    first, second = last_state(tmp_path / "planned"), last_state(tmp_path / "run")
    assert all(torch.equal(first[k], second[k]) for k in first)
    (record,) = state_of(tmp_path / "run")["allowed"]
    assert record["step"] == 4 and record["key"] == "mixture"
    cut_back(tmp_path / "run", 6)  # what was allowed once needs no flag again, and stays on record
    assert train(tiny_config(tmp_path / "run", every), other).losses == planned.losses
    assert state_of(tmp_path / "run")["allowed"] == [record]


def test_config_keys_and_grown_shards_may_change_when_named(tmp_path, mixture):
    folder = tmp_path / "data"
    shutil.copytree(mixture.data_dir, folder)
    weights = dict(zip(mixture.names, mixture.weights.tolist(), strict=True))
    train(tiny_config(tmp_path / "run", "checkpoint={every: 5}"), Mixture.from_weights(weights, folder))
    cut_back(tmp_path / "run", 5)
    write_tiny_shards(folder, ("a",), documents=90)
    grown = Mixture.from_weights(weights, folder)
    changes = ("optim.lr=0.5", "seed=99", "schedule.total_tokens=1408")
    with pytest.raises(ValueError) as caught:
        train(tiny_config(tmp_path / "run", "checkpoint.allow_change=[seed]", *changes), grown)
    text = str(caught.value)
    assert "data: train_a: shard train_a: bin " in text and "seed" not in text
    for key in ("data", "optim.lr", "schedule.total_tokens"):
        assert f"to allow it: --allow-change {key}\n" in text
    keys = "checkpoint={every: 5, allow_change: [seed, data, optim.lr, schedule.total_tokens]}"
    assert train(tiny_config(tmp_path / "run", keys, *changes), grown).steps == 11
    recorded = state_of(tmp_path / "run")["allowed"]
    assert {x["key"] for x in recorded} == {"seed", "data", "optim.lr", "schedule.total_tokens"}
    assert {"step": 5, "key": "optim.lr", "change": "0.01 -> 0.5"} in recorded


@pytest.mark.parametrize(
    "key, message",
    [
        ("tokenizer", "no flag allows it: the same ids"),
        ("batch.global_batch_size", "no flag allows it: a step"),
        ("optim.lrr", "unknown key. Did you mean 'optim.lr'?"),
    ],
)
def test_a_flag_that_allows_nothing_is_refused(tmp_path, mixture, key, message):
    with pytest.raises(ValueError) as caught:
        train(tiny_config(tmp_path / "run", f"checkpoint.allow_change=[{key}]"), mixture)
    assert f"--allow-change {key}: {message}" in str(caught.value)


@pytest.mark.parametrize("at", [[0], [16], [512, 500], [513, 600], [1280]])
def test_phases_must_rise_within_the_run(tmp_path, mixture, phases, at):
    spans = [f"{{mixture: {tmp_path}/phase0.yaml, from_tokens: {tokens}}}" for tokens in at]
    config = tiny_config(tmp_path / "run", f"phases=[{', '.join(spans)}]")
    if at == [16]:  # rounded up to a step
        train(config, mixture)
        assert [s["first_step"] for s in json.loads((tmp_path / "run/data.json").read_text())["stages"]] == [0, 1]
        return
    with pytest.raises(ValueError, match=r"phases: from_tokens \[.*they must rise"):
        train(config, mixture)


def test_the_cap_on_epochs_counts_every_phase(tmp_path, mixture, phases):
    tokens = read_meta(f"{mixture.data_dir}/train_b").num_tokens
    cap = {"b": 360 / tokens}  # 320 tokens before the phases need less than this, 256 + 144 more
    capped = Mixture.from_weights({"a": 0.5, "b": 0.5}, mixture.data_dir, max_epochs=cap)
    train(tiny_config(tmp_path / "alone", "schedule.total_tokens=640"), capped)
    with pytest.raises(
        ValueError, match=r"train_b has \d+ tokens and weight 0.5 from step 0, 0.5 from step 4; 80 samples"
    ):
        train(tiny_config(tmp_path / "run", phases), capped)


def test_the_cap_on_epochs_counts_what_was_drawn_before_a_resume(tmp_path, mixture):
    tokens = read_meta(f"{mixture.data_dir}/train_b").num_tokens
    first = Mixture.from_weights({"a": 0.2, "b": 0.8}, mixture.data_dir)
    capped = Mixture.from_weights({"a": 0.7, "b": 0.3}, mixture.data_dir, max_epochs={"b": 500 / tokens})
    tiny = ("schedule.total_tokens=1280", "checkpoint.every=5")
    train(tiny_config(tmp_path / "alone", *tiny), capped)  # 0.3 * 1280 = 384 tokens of b
    train(tiny_config(tmp_path / "run", *tiny), first)
    cut_back(tmp_path / "run", 5)
    with pytest.raises(ValueError, match=r"train_b has \d+ tokens and weight 0.8 from step 0, 0.3 from step 5"):
        train(tiny_config(tmp_path / "run", *tiny, "checkpoint.allow_change=[mixture]"), capped)  # 512 + 192


def drawn(folder: str, phases: str) -> dict[int, float]:
    config = tiny_config(Path(folder) / "run", "checkpoint={every: 6}", phases)
    train(config, Mixture.load(Path(folder) / "mixture.yaml"))
    Mesh.from_env().close()
    return losses(Path(folder) / "run")


@pytest.mark.slow
def test_two_ranks_go_through_phases_as_one_and_resume_each_other(tmp_path, mixture, phases):
    (tmp_path / "two").mkdir()
    for folder in (tmp_path, tmp_path / "two"):
        mixture.save(folder / "mixture.yaml")
    one = drawn(str(tmp_path), phases)
    two = run_distributed(drawn, 2, str(tmp_path / "two"), phases)[0]
    cut_back(tmp_path / "two" / "run", 6)
    again = drawn(str(tmp_path / "two"), phases)
    assert max(abs(one[s] - two[s]) + abs(one[s] - again[s]) for s in one) <= 2e-5
