"""The config is strict: what is written is what is read, and every mistake names its key and a way out."""

import dataclasses

import pytest

from megatron_lite.config import Config, config_hash, diff, dump, load_config, to_dict
from megatron_lite.schema import parse


def test_defaults_survive_a_trip_through_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(dump(Config()))
    assert load_config(Config, path) == Config()


def test_precedence_is_defaults_base_file_set(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 1\noptim: {lr: 1.0e-2, weight_decay: 0.5}\nname: base\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\noptim: {lr: 2.0e-2}\nname: run\n")
    config = load_config(Config, tmp_path / "run.yaml", ["name=set"])
    assert (config.seed, config.optim.lr, config.optim.weight_decay, config.name) == (1, 0.02, 0.5, "set")
    assert config.optim.eps == Config().optim.eps


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'. Did you mean 'lr'?"),
        ("optim.lr=fast", "optim.lr must be float, got 'fast'"),
        ("optim.lr=null", "optim.lr must be float, got None"),
        ("batch.micro_batch_size=1.5", "batch.micro_batch_size must be int, got 1.5"),
        ("compile=1", "compile must be bool, got 1"),
        ("engine=horovod", "engine must be one of auto, torch, deepspeed, got 'horovod'"),
        ("optim.betas=[0.9]", "optim.betas must be a list of 2"),
        ("optim=3", "optim must be a mapping"),
        ("seed", "write it as key=value"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_a_wrong_override_says_what_and_why(override, message):
    with pytest.raises(ValueError) as error:
        load_config(Config, None, [override])
    assert message in str(error.value)
    assert f"--set {override}" in str(error.value)


def test_a_wrong_key_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("optim: {learning_rate: 1}\n")
    with pytest.raises(ValueError, match=r"bad.yaml: unknown key 'optim.learning_rate'"):
        load_config(Config, path)
    with pytest.raises(ValueError, match=r"missing.yaml: no such config file"):
        load_config(Config, tmp_path / "missing.yaml")


def test_numbers_in_scientific_notation_are_numbers():
    config = load_config(Config, None, ["schedule.total_tokens=1e9", "optim.lr=3e-4"])
    assert config.schedule.total_tokens == 1_000_000_000 and isinstance(config.schedule.total_tokens, int)
    assert config.optim.lr == 3e-4


def test_yaml_cannot_run_code(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text(f"name: !!python/object/apply:pathlib.Path.touch [{tmp_path}/touched]\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(Config, path)
    assert not (tmp_path / "touched").exists()


def test_hash_and_diff_see_every_leaf():
    old = Config()
    new = dataclasses.replace(old, optim=dataclasses.replace(old.optim, lr=1.0))
    assert config_hash(old) == config_hash(Config()) != config_hash(new)
    assert diff(to_dict(old), to_dict(new)) == ["optim.lr: 0.0004 -> 1.0"]
    assert parse(Config, to_dict(new), "test") == new
