"""Exports: each is read back by the trainer it is for, where that is installed, or by a reader of its format."""

import argparse
import csv
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.mixture import Mixture
from regmix_search import exports
from regmix_search.exports import FILES, Blend, name_shards, write_exports

WEIGHTS = {"web": 0.7, "code": 0.1 + 0.2 - 0.05, "math": 0.05, "none": 0.0}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    blend = name_shards(WEIGHTS, "/data", ["web", "readme"], {"web": 1000, "code": 50, "math": 200}, 10_000)
    assert [path.name for path in write_exports(blend, tmp_path / "out")] == list(FILES)
    return tmp_path / "out"


def test_regmix_reads_its_yaml(written: Path) -> None:
    found = yaml.safe_load((written / "regmix.yaml").read_text())
    assert found["train"] == {f"train_{name}": weight for name, weight in WEIGHTS.items()}
    assert found["valid"] == {"valid_web": 1.0, "valid_readme": 1.0}


def test_megatron_reads_its_arguments(written: Path) -> None:
    """As Megatron's own code does: the file's words become --data-path, and the blend is made of pairs."""
    blend = pytest.importorskip("megatron.core.datasets.utils").get_blend_from_list
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-path", nargs="*")
    words = (written / "megatron.args").read_text().split()
    paths, weights = blend(parser.parse_args(["--data-path", *words]).data_path)
    assert paths == ["/data/train_web", "/data/train_code", "/data/train_math"]
    assert weights == [0.7, 0.1 + 0.2 - 0.05, 0.05], "to the last digit"
    splits = json.loads((written / "megatron.json").read_text())
    assert blend(splits["train"]) == (paths, weights)
    assert blend(splits["valid"]) == (["/data/valid_web", "/data/valid_readme"], [1.0, 1.0])


def test_nemo_and_nanotron_lists_belong_together(written: Path) -> None:
    nemo = yaml.safe_load((written / "nemo.yaml").read_text())["dataset"]["paths"]
    assert [float(w) for w in nemo["train"][::2]] == [w for w in WEIGHTS.values() if w]
    assert nemo["train"][1::2] == [f"/data/train_{name}" for name, w in WEIGHTS.items() if w]
    (stage,) = yaml.safe_load((written / "nanotron.yaml").read_text())["data_stages"]
    data = stage["data"]["dataset"]
    assert dict(zip(data["dataset_folder"], data["dataset_weights"], strict=True)) == {
        name: weight for name, weight in WEIGHTS.items() if weight
    }


def test_torchtitan_packs_each_domain_and_then_mixes(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights count elements: of documents before packing, of tokens after. None may be 0."""
    fake = types.ModuleType("torchtitan.components.data")
    for name in ("ConcatThenSplitPackingConfig", "DatasetMixConfig", "WeightedDataset"):
        setattr(fake, name, type(name, (types.SimpleNamespace,), {}))
    for name in ("torchtitan", "torchtitan.components"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchtitan.components.data", fake)
    spec = importlib.util.spec_from_file_location("mixture", written / "torchtitan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.mix({"web": "W", "code": "C", "math": "M", "none": "N"}).datasets
    assert [(d.dataset.dataset, d.weight) for d in found] == [("W", 0.7), ("C", 0.1 + 0.2 - 0.05), ("M", 0.05)]
    with pytest.raises(ValueError, match="no dataset for"):
        module.mix({"web": "W"})


def test_tokens_and_epochs_by_domain(written: Path) -> None:
    rows = {row["domain"]: row for row in csv.DictReader((written / "epochs.csv").open())}
    assert rows["web"] == {"domain": "web", "weight": "0.7", "tokens": "7000", "available": "1000", "epochs": "7.0"}
    assert rows["code"]["epochs"] == "50.0" and rows["none"]["tokens"] == "0" and rows["none"]["epochs"] == ""
    text = exports.to_epochs(name_shards({"a": 1.0}))
    assert text.splitlines()[1] == "a,1.0,,,", "nothing is made up where nothing is known"


def make_shard(prefix: Path, tokens: int) -> None:
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(np.zeros(tokens, dtype=np.uint16))


def test_a_mixture_file_is_exported_with_its_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two shards of one domain share its weight by their size."""
    for name, tokens in (("train_web", 300), ("more", 100), ("train_code", 50), ("valid_web", 10)):
        make_shard(tmp_path / name, tokens)
    file = tmp_path / "mixture.yaml"
    file.write_text("train:\n  train_web: {weight: 0.8, paths: [train_web, more]}\n  train_code: 0.2\n")
    assert Mixture.load(file).names == ("web", "code")
    assert exports.main([str(file), "--out", str(tmp_path / "out"), "--run-tokens", "1000"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(FILES)
    words = (tmp_path / "out/megatron.args").read_text().split()
    assert [float(w) for w in words[::2]] == pytest.approx([0.6, 0.2, 0.2], abs=0.01)
    assert words[1::2] == [str(tmp_path / name) for name in ("train_web", "more", "train_code")]
    rows = {row["domain"]: row for row in csv.DictReader((tmp_path / "out/epochs.csv").open())}
    assert rows["web"]["available"] == "400" and rows["web"]["epochs"] == "2.0" and rows["code"]["epochs"] == "4.0"
    assert exports.main([str(tmp_path / "gone.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert "gone.yaml" in capsys.readouterr().err


def test_shards_that_are_not_there_yet_share_evenly() -> None:
    blend = Blend({"a": 1.0}, {"a": ("x", "y")}, {})
    assert blend.shares() == [(0.5, "x"), (0.5, "y")]
