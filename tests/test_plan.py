"""The plan's arithmetic against independent counts, and its refusals."""

import itertools
import math
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_lite.config import Config, ModelConfig, ScheduleConfig, load_config
from megatron_lite.mesh import Mesh
from megatron_lite.model import GPT
from megatron_lite.optim import build_optimizer, learning_rate, param_groups, schedule_table
from megatron_lite.plan import Plan, duration, peak_flops
from megatron_lite.run import resolve as resolve_run
from megatron_lite.shape import PRESETS, resolve_shape
from megatron_lite.testing import tiny_config, write_tiny_shards


def resolve(*overrides: str, world_size: int = 1, deepspeed: bool = False) -> Plan:
    return Plan.resolve(load_config(Config, None, overrides), world_size, 50432, cuda=False, deepspeed=deepspeed)


def test_regmix_presets_have_regmix_sizes():
    # sail-sg/regmix: non-embedding and total parameters at vocabulary 50,432, untied
    expected = {
        "tinyllama_1M": (1.312e6, 27.13e6),
        "tinyllama_60M": (59.0e6, 136.5e6),
        "tinyllama_1_1b": (1.130e9, 1.337e9),
    }
    for name, (body, total) in expected.items():
        shape = resolve_shape(ModelConfig(preset=name), 2048, None)
        assert shape.non_embedding_params == pytest.approx(body, rel=1e-3)
        assert shape.params == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_and_flop_counts_match_the_model(tied):
    config = ModelConfig(preset="demo_proxy", num_kv_heads=2, tie_embeddings=tied)
    shape = resolve_shape(config, 32, 100)
    model = GPT(shape)
    assert sum(p.numel() for p in model.parameters()) == shape.params
    tokens = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(tokens, tokens).sum().backward()
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(shape.flops_per_token, rel=0.01)


def test_steps_and_tokens_are_derived():
    plan = resolve(
        "batch={global_batch_size: 512, micro_batch_size: 4}", "schedule.total_tokens=26214400000", world_size=8
    )
    assert (plan.total_steps, plan.tokens_per_step, plan.grad_accum_steps) == (25_000, 512 * 2048, 16)
    assert plan.total_flops == plan.flops_per_token * 26_214_400_000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch={global_batch_size: 10, micro_batch_size: 4}"], "valid: 1, 2, 5, 10"),
        (["model.preset=tinylama_1M"], "Did you mean 'tinyllama_1M'?"),
        (["model.num_heads=7"], "model.hidden_size=256 is not divisible by model.num_heads=7"),
        (["model.num_kv_heads=3"], "model.num_heads=8 is not divisible by model.num_kv_heads=3"),
        (["model.vocab_size=100"], "model.vocab_size=100 is below the shards' vocabulary, 50432"),
        (["schedule.warmup_steps=9999999"], "schedule.warmup_steps=9999999 must lie in"),
        (["schedule.min_lr=1.0"], "schedule.min_lr=1.0 is above optim.lr"),
        (["parallel.zero_stage=2"], "needs the DeepSpeed engine"),
        (["parallel.zero_stage=3", "engine=deepspeed"], "0 to 2 are supported"),
        (["deepspeed={a: 1}"], "the engine is torch"),
    ],
)
def test_settings_that_clash_are_refused_with_the_numbers(overrides, message):
    with pytest.raises(ValueError) as error:
        resolve(*overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("tp", "overrides", "message"),
    [
        (3, [], "does not divide the 8 ranks of this launch; valid: 1, 2, 4, 8"),
        (8, ["model.num_kv_heads=4"], "=8 does not divide model.num_kv_heads=4: each rank holds whole heads"),
        (8, ["model.num_kv_heads=4"], "largest size that fits: 4"),
        (8, ["model={num_heads: 4, hidden_size: 256}"], "=8 does not divide model.num_heads=4"),
        (8, ["model.ffn_hidden_size=500"], "=8 does not divide model.ffn_hidden_size=500"),
        (4, ["parallel.sequence_parallel=true", "data.seq_length=30"], "data.seq_length=30 is not divisible by"),
    ],
)
def test_layers_that_tp_cannot_share_are_refused_with_the_numbers(tp, overrides, message):
    with pytest.raises(ValueError) as error:
        resolve(*overrides, f"parallel.tensor_parallel_size={tp}", world_size=8)
    assert message in str(error.value)


def test_ranks_are_shared_between_data_and_tensor_parallelism():
    batch = "batch={global_batch_size: 16, micro_batch_size: 2}"
    parallel = "parallel={tensor_parallel_size: 4, sequence_parallel: true}"
    plan = resolve(batch, parallel, "model.vocab_size=50433", world_size=8)
    assert (plan.dp_size, plan.tp_size, plan.grad_accum_steps, plan.sequence_parallel) == (2, 4, 4, True)
    assert "dp 2 x tp 4 with sequence parallelism x accumulation 4" in plan.table()
    assert "vocab 50,433 (padded to 50,688)" in plan.table() and plan.params == resolve("model.vocab_size=50433").params
    assert "padded" not in resolve(batch, parallel, world_size=8).table()


def test_batch_must_divide_over_ranks():
    with pytest.raises(ValueError, match="not divisible by the data-parallel size 3"):
        resolve(world_size=3)


def test_engine_follows_the_launcher_only_when_auto():
    assert resolve(deepspeed=True).engine == "deepspeed"
    assert resolve().engine == "torch"
    assert resolve("engine=torch", deepspeed=True).engine == "torch"


def test_learning_rate_table():
    cosine = ScheduleConfig(warmup_steps=10, decay="cosine", min_lr=0.1)
    rates = [learning_rate(s, 100, 1.0, cosine) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0  # warm-up ends at the peak
    assert rates[54] == pytest.approx(0.55, rel=1e-15) and rates[99] == 0.1  # half-way, and min_lr at the last step
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    wsd = ScheduleConfig(warmup_steps=10, decay="wsd", min_lr=0.0, decay_fraction=0.2)
    rates = [learning_rate(s, 100, 1.0, wsd) for s in range(100)]
    assert rates[9:80] == [1.0] * 71 and rates[80] < 1.0 and rates[89] == 0.5 and rates[99] == 0.0
    assert learning_rate(50, 100, 1.0, ScheduleConfig(warmup_steps=0, decay="constant")) == 1.0
    linear = ScheduleConfig(warmup_steps=0, decay="linear", min_lr=0.0)
    assert learning_rate(49, 100, 1.0, linear) == 0.5


def test_the_previewed_curve_names_where_it_turns():
    wsd = ScheduleConfig(warmup_steps=10, decay="wsd", min_lr=0.0, decay_fraction=0.2)
    assert schedule_table(100, 1.0, wsd) == [
        (1, 0.1),
        (10, 1.0),
        (25, 1.0),
        (50, 1.0),
        (75, 1.0),
        (80, 1.0),
        (100, 0.0),
    ]


def test_only_matrices_decay():
    model = GPT(resolve_shape(ModelConfig(preset="demo_proxy"), 32, 100))
    decayed, plain = build_optimizer(param_groups(model, Config().optim.weight_decay), Config().optim).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(names[id(p)].endswith("norm.weight") for p in plain["params"]) and plain["weight_decay"] == 0.0
    assert decayed["weight_decay"] == 0.1 and len(plain["params"]) == 5
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_durations_and_peaks():
    assert [duration(s) for s in (42, 750, 12240, 200000)] == ["42 s", "12.5 min", "3.4 h", "2.3 days"]
    assert peak_flops("NVIDIA H200") == 989.5e12 and peak_flops("NVIDIA GeForce GTX 1080") is None
    assert not math.isnan(resolve().total_flops) and "tinyllama_1M" in PRESETS


def test_a_vocabulary_that_nobody_says_is_assumed_aloud(tmp_path):
    mixture = write_tiny_shards(tmp_path / "shards")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_run(tiny_config(tmp_path / "run"), mixture, Mesh.from_env())
        for sidecar in (tmp_path / "shards").glob("*.meta.json"):
            sidecar.unlink()
        resolve_run(tiny_config(tmp_path / "run", "model.vocab_size=64"), mixture, Mesh.from_env())
    with pytest.warns(UserWarning, match=r"no sidecar says .* 50,432 is assumed; set model.vocab_size, or let"):
        resolve_run(tiny_config(tmp_path / "run"), mixture, Mesh.from_env())
