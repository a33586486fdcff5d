"""Cost on GPUs: the arithmetic done again, published times, and what --dry-run says of every config of the kit."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launch.pretrain import main
from megatron_lite.config import Config, load_config
from megatron_lite.plan import Plan
from regmix_search.config import load_search
from regmix_search.gpu_cost import A100, H100, H200, Here, gpu_seconds, published, sweep_line, table
from regmix_search.gpu_memory import GIB, memory

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
REGMIX = {  # sail-sg/regmix: model_training/pretrain/tinyllama.py, and for 1M mixture_config/synthesize_mixture.py
    "seq_length": 2048, "global_batch_size": 512, "lr": 4e-4, "betas": (0.9, 0.95), "weight_decay": 0.1,
    "clip_grad": 1.0, "eps": 1e-8,
}  # fmt: skip
DOREMI = {  # sangmichaelxie/doremi: scripts/runs/run_pile_baseline120M.sh; warm-up is .06 of 200,000 steps
    "seq_length": 1024, "global_batch_size": 512, "lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.01,
    "clip_grad": 1.0, "eps": 1e-8, "steps": 200_000, "warmup_steps": 12_000, "decay": "cosine", "min_lr": 1e-4,
    "tie_embeddings": True,
}  # fmt: skip
CONSTANT = {"steps": 1_000, "warmup_steps": 100, "decay": "constant", "micro_batch_size": 16, "every": 100}
PUBLISHED = {
    "tinyllama_1_1b": REGMIX | {
        "steps": 25_000, "warmup_steps": 1_000, "decay": "cosine", "min_lr": 1e-5, "micro_batch_size": 4,
        "every": 1_000, "sizes": (22, 16, 2048, 5632), "tie_embeddings": False,
    },
    "tinyllama_1M": REGMIX | CONSTANT | {"sizes": (2, 8, 256, 512), "tie_embeddings": False},
    "tinyllama_60M": REGMIX | CONSTANT | {"sizes": (10, 8, 768, 1536), "tie_embeddings": False},
    "doremi_120M": DOREMI | {"sizes": (12, 12, 768, 2048)},  # SwiGLU at 8/3 d for their GELU at 4 d
    "doremi_280M": DOREMI | {"sizes": (12, 12, 768, 2048)},
}  # fmt: skip


def resolve(name: str, gpus: int = 1, *overrides: str) -> tuple[Config, Plan]:
    config = load_config(Config, CONFIGS / f"model/{name}.yaml", overrides)
    return config, Plan.resolve(config, gpus, None, cuda=True, deepspeed=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_are_the_published_runs(name):
    config, plan = resolve(name)
    shape = plan.shape
    found = {
        "sizes": (shape.num_layers, shape.num_heads, shape.hidden_size, shape.ffn_hidden_size),
        "steps": plan.total_steps,
    }
    for part in (config.data, config.batch, config.schedule, config.optim, config.eval, config.model):
        found |= vars(part)
    assert {key: found[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    assert shape.num_kv_heads == shape.num_heads and plan.precision == "bf16"


def test_every_model_config_is_in_the_table_of_published_runs():
    assert {path.stem for path in (CONFIGS / "model").glob("*.yaml")} == set(PUBLISHED)


def test_gpu_hours_are_flops_over_assumed_speed_and_logits_over_bandwidth():
    """All by hand: layers, widths and data sheets as literals."""
    config, plan = resolve("tinyllama_1_1b", 8)
    flops = 6 * (22 * (4 * 2048**2 + 3 * 2048 * 5632) + 50432 * 2048) + 12 * 22 * 2048 * 2048
    seconds = 25_000 * 512 * 2048 * (flops / (0.4 * 989.5e12) + 42 * 50432 / 3.35e12)
    assert gpu_seconds(config, plan, H100, 0) == pytest.approx(seconds)
    sets = 17 * 1_638_400 * 25 / 3 / (25_000 * 512 * 2048)  # 25 evaluations, a third of a training token each
    assert gpu_seconds(config, plan, H100, 17) == pytest.approx(seconds * (1 + sets))
    assert gpu_seconds(config, plan, H200, 0) < gpu_seconds(config, plan, H100, 0) < gpu_seconds(config, plan, A100, 0)
    text = table(config, plan)
    assert f"{8 * 26_214_400_000 / seconds:,.0f} " in text and f"{seconds / 3600:.3g} " in text


def test_a_proxy_against_a_reference_costs_a_forward_pass_more_and_two_in_the_papers_order():
    plain, plan = resolve("doremi_120M", 8)
    with_reference, _ = resolve("doremi_120M", 8, "reweighting.reference=runs/reference")
    two_pass, _ = resolve("doremi_120M", 8, "reweighting={reference: runs/reference, update_order: two_pass}")
    once = gpu_seconds(plain, plan, H100, 0)
    assert gpu_seconds(with_reference, plan, H100, 0) == pytest.approx(once * 4 / 3)
    assert gpu_seconds(two_pass, plan, H100, 0) == pytest.approx(once * 5 / 3)


@pytest.mark.parametrize(
    ("name", "sets", "hours", "mfu", "ratio"),
    [
        ("tinyllama_1M", 17, 20 / 60, 27.4, 1.53),  # they score 17 domains ten times; their cross-entropy is fused
        ("tinyllama_1_1b", 1, 2 * 24 * 8, 51.7, 0.94),
        ("doremi_120M", 22, 36 * 8, 27.7, 0.61),
    ],
)
def test_published_times_stand_beside_ours_with_the_mfu_that_they_imply(name, sets, hours, mfu, ratio):
    """MFU by hand: their hours, the A100's 312 TFLOP/s, FLOPs a token."""
    config, plan = resolve(name, 8)
    run = published(config, plan)
    assert run is not None and run.a100_hours == pytest.approx(hours)
    assert 100 * plan.flops_per_token * plan.total_tokens / (312e12 * hours * 3600) == pytest.approx(mfu, abs=0.1)
    line = table(config, plan, sets).splitlines()[-1]
    assert f"MFU {mfu:.0f}%" in line and "FACTOR" not in line
    assert gpu_seconds(config, plan, A100, sets) / 3600 / hours == pytest.approx(ratio, rel=0.02)
    assert f"{gpu_seconds(config, plan, A100, sets) / 3600 / hours:.2f} of that" in line


def test_only_the_published_run_itself_is_compared():
    for name, change in (
        ("tinyllama_1_1b", "schedule.total_tokens=1e11"),
        ("tinyllama_1_1b", "model.num_layers=24"),
        ("tinyllama_1M", "model.vocab_size=8192"),
    ):
        assert published(*resolve(name, 1, change)) is None
    assert published(*resolve("doremi_280M")) is None and published(*resolve("tinyllama_60M")) is None
    proxy = published(*resolve("doremi_120M", 1, "reweighting.reference=runs/reference"))
    assert proxy is not None and proxy.a100_hours == 44 * 8


def test_a_gpu_at_hand_is_measured_not_assumed():
    config, plan = resolve("tinyllama_1M")
    text = table(config, plan, 0, Here("NVIDIA H200", 140 * GIB, 1e6))
    assert "measured" in text and "assumed" not in text and "H100" not in text
    assert f"{1e6 * plan.flops_per_token / 989.5e12:.1%}" in text and "17.5 min" in text
    assert " ? " in table(config, plan, 0, Here("NVIDIA GeForce GTX 1080", 8 * GIB, 1e6))  # no peak, no MFU


def test_memory_that_is_not_there_is_said_so():
    config, plan = resolve("tinyllama_1_1b", 1, "batch.micro_batch_size=64")
    assert "TOO MUCH" in table(config, plan)


@pytest.mark.parametrize("name", PUBLISHED)
def test_dry_run_of_every_config_needs_no_data(name, capsys):
    assert main(["--config", str(CONFIGS / f"model/{name}.yaml"), "--gpus", "8", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for text in ("on 8 GPUs", "H100", "H200", "GPU-hours", "of 79 GiB", "assumed: matmuls at MFU 40%", "FLOPs a token"):
        assert text in out, text
    assert ("published: " in out) == (name not in ("tinyllama_60M", "doremi_280M"))


def test_dry_run_says_what_is_wrong_with_the_data_after_the_cost(capsys):
    command = ["--config", str(CONFIGS / "model/tinyllama_1M.yaml"), "--gpus", "1", "--dry-run"]
    assert main([*command, "--mixture", str(CONFIGS / "mixture/regmix.yaml")]) == 2
    printed = capsys.readouterr()
    assert "GPU-hours" in printed.out and "train_the_pile_arxiv has no shard" in printed.err


def test_gpus_must_divide_the_batch_and_belong_to_a_dry_run(capsys):
    config = ["--config", str(CONFIGS / "model/tinyllama_1M.yaml")]
    for arguments, message in (
        (["--gpus", "7", "--dry-run"], "not divisible by the data-parallel size 7"),
        (["--gpus", "0", "--dry-run"], "--gpus 0: must be at least 1"),
        (["--gpus", "8"], "--gpus is for --dry-run"),
    ):
        assert main([*config, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_regmix_search_is_the_published_one():
    """mixture_config/synthesize_mixture.py and config_proxy runs; LightGBM, then the paper's simulation."""
    search = load_search(CONFIGS / "search/regmix_1m.yaml")
    mixtures, model = search.mixtures, load_config(Config, CONFIGS / "model/tinyllama_1M.yaml")
    assert (mixtures.count, mixtures.holdout) == (512, 256)
    assert (mixtures.temperature, mixtures.min_strength, mixtures.max_strength, mixtures.minimum) == (0.5, 0.1, 5, 2e-4)
    # their cap is 15 times the prior; ours is in epochs of the 250B tokens that they have, over 25,000 steps
    assert mixtures.max_epochs * 250e9 / search.run_tokens == pytest.approx(15, rel=0.01)
    assert (search.fit.surrogates, search.optimum.method) == (("lightgbm",), "simulate")
    assert (search.optimum.samples, search.optimum.top) == (1_000_000, 100)
    for part in ("model", "data", "batch", "schedule", "optim", "eval"):
        assert getattr(search.proxy, part) == getattr(model, part), part
    sixty = load_search(CONFIGS / "search/regmix_60m.yaml")
    assert (sixty.proxy.model.preset, sixty.mixtures.count) == ("tinyllama_60M", 256)


def test_a_sweep_is_as_many_runs_on_one_gpu_each():
    config, plan = resolve("tinyllama_1M")
    hours = 512 * gpu_seconds(config, plan, H100, 17) / 3600
    line = sweep_line(config, plan, 512, 17)
    assert f"= {hours:.3g} H100-hours" in line and f"{memory(config, plan).total / GIB:.1f} GiB each" in line


def test_mixtures_of_the_kit_have_the_papers_domains():
    domains = {name: set(yaml.safe_load((CONFIGS / f"mixture/{name}.yaml").read_text())["train"]) for name in
               ("human", "doremi", "pile_cc_only", "regmix", "pile_uniform", "pile_baseline")}  # fmt: skip
    assert domains["human"] == domains["doremi"] == domains["regmix"] and len(domains["human"]) == 17
    assert domains["pile_cc_only"] == {"train_the_pile_pile_cc"} < domains["human"]
    assert domains["pile_uniform"] == domains["pile_baseline"] > domains["human"]
