"""mixture.yaml: what is accepted, what is written back, and what a user's mistake is told."""

import math

import numpy as np
import pytest

from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.mixture import Mixture


@pytest.fixture
def folder(tmp_path):
    shards = tmp_path / "shards"
    for name in ("train_github", "train_prose_text_document", "train_math", "valid_github", "valid_prose", "other"):
        with IndexedWriter(shards / name, "uint16") as writer:
            writer.add_document([1, 2, 3])
    return shards


def load(folder, text, **kwargs):
    (folder / "mixture.yaml").write_text(text)
    return Mixture.load(folder / "mixture.yaml", **kwargs)


REGMIX = """
train:
  train_github: 0.5
  train_prose: 0.2502
  train_math: 0.25
valid:
  valid_github: 1.0
  valid_prose: 1.0
seed: 42
temperature: 0.5
maximum_usage: 15
model_name: tinyllama_1M
global_batch_size: 512
max_step: 1001
warmup_steps: 100
"""


def test_a_regmix_file_is_read_as_it_is(folder):
    mixture = load(folder, REGMIX)
    assert mixture.names == ("github", "prose", "math")
    assert math.isclose(mixture.weights.sum(), 1, abs_tol=1e-15) and mixture.weights.dtype == np.float64
    np.testing.assert_allclose(mixture.weights, np.array([0.5, 0.2502, 0.25]) / 1.0002)
    assert mixture.domains[1].prefixes == (str(folder / "train_prose_text_document"),)
    assert mixture.valid == {"github": (str(folder / "valid_github"),), "prose": (str(folder / "valid_prose"),)}
    assert mixture.path == str(folder / "mixture.yaml")


def test_long_entries_data_dir_and_text_numbers(folder, tmp_path):
    (tmp_path / "m.yaml").write_text(
        "data_dir: shards\nversion: 1\nprovenance: {target: prose}\nepochs: {github: 2.0}\ntrain:\n"
        "  train_github: {weight: 3, max_epochs: 4}\n  train_mine: {weight: 1e-5, path: other}\n"
        "  train_two: {weight: 0, paths: [train_math, train_prose.bin]}\n"
        "valid: {valid_github: 0, valid_else: {weight: 1, path: other}}\n"
    )
    mixture = Mixture.load(tmp_path / "m.yaml")
    github, mine, two = mixture.domains
    assert (github.max_epochs, mine.max_epochs) == (4.0, None)
    assert mine.weight == 1e-5 / 3.00001 and mine.prefixes == (str(folder / "other"),)
    assert two.weight == 0 and two.prefixes == (str(folder / "train_math"), str(folder / "train_prose_text_document"))
    assert mixture.valid == {"else": (str(folder / "other"),)}
    assert mixture.provenance == {"target": "prose"} and mixture.epochs == {"github": 2.0}


def test_data_dir_argument_wins_and_valid_defaults_to_what_is_there(folder, tmp_path):
    (tmp_path / "m.yaml").write_text("data_dir: nowhere\ntrain: {train_math: 1}\n")
    assert Mixture.load(tmp_path / "m.yaml", data_dir=folder).valid.keys() == {"github", "prose"}
    assert load(folder, "train: {train_math: 1}\nvalid: {}\n").valid == {}


def test_save_and_load_are_exact(folder, tmp_path):
    weights = dict(zip(("github", "prose", "math"), np.random.default_rng(0).dirichlet([1, 1, 1]), strict=True))
    mixture = Mixture.from_weights(weights, folder, ["github"], {"seed": 1}, max_epochs={"math": 4})
    long = load(folder, "train: {train_a: {weight: 1, paths: [other, train_math]}, train_math: 2}\nvalid: {}")
    for original in (mixture, long):
        saved = original.save(tmp_path / "deep" / "m.yaml")
        again = Mixture.load(tmp_path / "deep" / "m.yaml")
        assert again == saved and again.domains == original.domains and again.valid == original.valid
        assert again.save(tmp_path / "deep" / "m.yaml") == again
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["m.yaml"]


def test_saved_folders_can_be_moved_together(folder, tmp_path):
    Mixture.from_weights({"math": 1}, folder).save(tmp_path / "m.yaml")
    (tmp_path / "moved").mkdir()
    (tmp_path / "m.yaml").rename(tmp_path / "moved" / "m.yaml")
    folder.rename(tmp_path / "moved" / "shards")
    mixture = Mixture.load(tmp_path / "moved" / "m.yaml")
    assert mixture.domains[0].prefixes == (str(tmp_path / "moved" / "shards" / "train_math"),)


def test_from_weights_and_with_weights(folder):
    mixture = Mixture.from_weights({"github": 1, "train_math": 3}, folder, max_epochs=4.0)
    assert mixture.names == ("github", "math") and list(mixture.weights) == [0.25, 0.75]
    assert {d.max_epochs for d in mixture.domains} == {4.0} and mixture.valid.keys() == {"github", "prose"}
    other = mixture.with_weights({"math": 2})
    assert list(other.weights) == [0, 1] and other.domains[1].max_epochs == 4.0
    with pytest.raises(ValueError, match=r"no domain 'maths' \(did you mean math\?\); the mixture has github, math"):
        mixture.with_weights({"maths": 1})
    with pytest.raises(ValueError, match="sum to 0"):
        mixture.with_weights({"math": 0})
    with pytest.raises(ValueError, match="train_math is nan"):
        mixture.with_weights({"math": math.nan})


MISTAKES = {
    "negative": ("train: {train_math: -0.1}", r"train\.train_math is -0\.1; a weight is 0"),
    "nan": ("train: {train_math: .nan}", r"train\.train_math is nan, expected a finite number"),
    "inf": ("train: {train_math: .inf}", r"train\.train_math is inf, expected a finite number"),
    "text": ("train: {train_math: lots}", r"train\.train_math is 'lots', expected a finite number"),
    "bool": ("train: {train_math: true}", r"train\.train_math is True, expected a finite number"),
    "empty": ("train: {train_math: }", r"train\.train_math is None"),
    "all zero": ("train: {train_math: 0, train_github: 0}", "the weights sum to 0; at least one domain"),
    "no train": ("seed: 1", "no domains; add a `train:` section"),
    "list": ("train: [train_math]", r"train is \['train_math'\], expected a mapping"),
    "number key": ("train: {1: 0.5}", "expected a mapping of names"),
    "not a mapping": ("hello", "expected a mapping with a `train:` section"),
    "broken": ("train: {", "not valid YAML"),
    "misspelt": (
        "train: {train_githb: 1}",
        r"train_githb has no shard in .*shards \(did you mean train_github\?\); "
        "there are: train_github, train_math, train_prose",
    ),
    "misspelt valid": ("train: {train_math: 1}\nvalid: {valid_pros: 1}", r"valid_pros has no shard .*valid_prose\?"),
    "duplicate": ("train:\n  train_math: 1\n  train_math: 2", "line 3: train_math was already given on line 2"),
    "duplicate flow": ("train: {train_math: 1, train_math: 2}", "train_math was already given"),
    "twice": ("train: {train_math: 1, math: 2}", "domain 'math' is given twice"),
    "valid twice": ("train: {train_math: 1}\nvalid: {valid_prose: 1, prose: 1}", "'prose' is given twice"),
    "top key": ("trian: {train_math: 1}", r"unknown key 'trian' \(did you mean train\?\)"),
    "entry key": ("train: {train_math: {wieght: 1}}", r"unknown key 'wieght' \(did you mean weight\?\)"),
    "path and paths": ("train: {train_math: {weight: 1, path: a, paths: [b]}}", "both path and paths"),
    "same path": ("train: {train_math: {weight: 1, paths: [other, other]}}", "names a shard twice"),
    "no paths": ("train: {train_math: {weight: 1, paths: []}}", "paths is empty"),
    "bad path": ("train: {train_math: {weight: 1, path: gone}}", "train_math: no shard at .*gone"),
    "cap": ("train: {train_math: {weight: 1, max_epochs: 0}}", r"train\.train_math\.max_epochs is 0; give a positive"),
    "version": ("version: 2\ntrain: {train_math: 1}", "version is 2"),
    "data_dir": ("data_dir: [a]\ntrain: {train_math: 1}", "data_dir is"),
    "slash": ("train: {a/b: 1}", "'a/b' is no domain"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(folder, name):
    text, message = MISTAKES[name]
    with pytest.raises(ValueError, match=rf"(?s)mixture\.yaml.*{message}"):
        load(folder, text)


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"m\.yaml: no such mixture file"):
        Mixture.load(tmp_path / "m.yaml")
    with pytest.raises(ValueError, match=r"there are: no train_\* shards at all"):
        Mixture.from_weights({"math": 1}, tmp_path)
