"""Going on from weights made elsewhere: RegMix's published checkpoints and other Llama folders, in one config."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from launch import initial
from launch.export import main as export
from launch.pretrain import main as pretrain
from megatron_lite.config import Config, load_config
from megatron_lite.data.sidecar import read_meta, write_meta
from megatron_lite.hf import import_hf
from megatron_lite.model import GPT
from megatron_lite.shape import resolve_shape
from megatron_lite.testing import tiny_config, write_tiny_shards
from megatron_lite.train import train
from megatron_lite.weights import read_weights

transformers = pytest.importorskip("transformers", reason="needs transformers, which writes the folders")

ROOT = Path(__file__).resolve().parents[1]
ROWS = 80  # of the embedding: the shards' 64 ids, padded, as RegMix's 50,277 are to 50,432
# config.json as RegMix's convert_lit_checkpoint.py writes it: no num_key_value_heads, the wrong bos and eos
PUBLISHED = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
    "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.35.0", "use_cache": True, "vocab_size": ROWS,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = {
    "published": {},
    "gqa": {"num_key_value_heads": 2, "rope_theta": 5e5},
    "tied, llama3": {"tie_word_embeddings": True, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}},
}
TOKENIZER = b'{"model": "stands for a tokenizer: only its hash is asked"}'


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Shards by the tokenizer of the folders, and a mixture of them."""
    folder = tmp_path_factory.mktemp("shards")
    write_tiny_shards(folder / "shards").save(folder / "mixture.yaml")
    remake(folder / "shards", tokenizer_sha256=hashlib.sha256(TOKENIZER).hexdigest())
    return folder


def remake(folder: Path, **changes) -> None:
    """Sidecars that say something else of the tokenizer."""
    for path in folder.glob("*.meta.json"):
        prefix = str(path).removesuffix(".meta.json")
        write_meta(prefix, dataclasses.replace(read_meta(prefix), **changes))


def publish(folder: Path, kind: str):
    """A Llama by transformers in several files, and the config.json that its publisher would have written."""
    told = PUBLISHED | KINDS[kind]
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**told | {"initializer_range": 0.3}))
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_published_folders_have_the_logits_that_transformers_finds_in_them(tmp_path, kind):
    theirs = publish(tmp_path / "llama", kind)
    tensors, config = import_hf(tmp_path / "llama")
    ours = GPT(resolve_shape(config, 32, None))
    for name, param in ours.named_parameters():
        param.copy_(tensors[name])
    tokens = torch.randint(0, ROWS, (2, 32), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    assert expected.std() > 0.5 and (ours.logits(tokens) - expected).abs().max() <= 1e-4


def go_on(shards: Path, weights: Path, out: Path, *extra: str) -> int:
    """configs/continue.yaml as it is but for batch and budget: one step that changes nothing, unless told."""
    sizes = ["data.seq_length=16", "batch={global_batch_size: 8, micro_batch_size: 4}", "optim.lr=0", "threads=1"]
    sizes += ["schedule={total_tokens: 128, warmup_steps: 0, decay: constant}", "checkpoint.every=1"]
    words = ["--config", str(ROOT / "configs/continue.yaml"), "--mixture", str(shards / "mixture.yaml")]
    return pretrain([*words, "--set", f"init_from={weights}", f"out_dir={out}", *sizes, *extra])


def test_one_config_goes_on_from_a_llama_folder_a_run_and_an_export(shards, tmp_path, capfd):
    publish(tmp_path / "llama", "published")
    assert go_on(shards, tmp_path / "llama", tmp_path / "run") == 0
    assert "new run from" in capfd.readouterr().out
    saved, (tensors, _) = read_weights(tmp_path / "run"), import_hf(tmp_path / "llama")
    assert saved.shape.vocab_size == ROWS and saved.tensors.keys() == tensors.keys()
    assert all(torch.equal(saved.tensors[name], tensor) for name, tensor in tensors.items())
    assert go_on(shards, tmp_path / "run", tmp_path / "next") == 0, "and from a run of ours"
    # what was written is the whole truth: nothing has to be looked up in the folder of weights again
    written = load_config(Config, tmp_path / "run" / "config.yaml").model
    assert (written.num_layers, written.vocab_size, written.num_kv_heads) == (2, ROWS, 4)
    assert export([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (64, 0), "padding rows and the wrong eos are gone"
    assert "from the weights of llama" in (tmp_path / "out" / "README.md").read_text()
    assert go_on(shards, tmp_path / "out", tmp_path / "third") == 0
    assert initial.tokenizer_of(tmp_path / "out") == hashlib.sha256(TOKENIZER).hexdigest(), "without its files"


@pytest.mark.slow
def test_continued_training_learns_the_new_mixture(shards, tmp_path, capfd):
    publish(tmp_path / "llama", "gqa")
    longer = ("schedule={total_tokens: 1280, warmup_steps: 2, decay: linear}", "optim.lr=1e-2")
    losses = []
    for name, extra in (("still", ()), ("learns", longer)):
        assert go_on(shards, tmp_path / "llama", tmp_path / name, *extra) == 0
        losses.append(json.loads((tmp_path / name / "result.json").read_text())["losses"]["a"])
    assert losses[1] < losses[0] - 0.3


def test_a_dry_run_of_the_config_starts_nothing(shards, tmp_path, capfd):
    publish(tmp_path / "llama", "published")
    words = ["--config", str(ROOT / "configs/continue.yaml"), "--mixture", str(shards / "mixture.yaml"), "--dry-run"]
    small = ["batch.micro_batch_size=1", "data.seq_length=64", f"out_dir={tmp_path / 'run'}", "threads=1"]
    assert pretrain([*words, "--set", f"init_from={tmp_path / 'llama'}", "model.preset=init_from", *small]) == 0
    printed = capfd.readouterr().out
    assert f"vocab {ROWS}" in printed and "2 layers x 32" in printed and not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused_and_both_are_named(shards, tmp_path, capfd):
    publish(tmp_path / "llama", "published")
    (tmp_path / "llama" / "tokenizer.json").write_bytes(b"{}")
    assert go_on(shards, tmp_path / "llama", tmp_path / "run") == 2
    error = capfd.readouterr().err
    assert hashlib.sha256(b"{}").hexdigest() in error and hashlib.sha256(TOKENIZER).hexdigest() in error
    (tmp_path / "llama" / "tokenizer.json").unlink()
    assert go_on(shards, tmp_path / "llama", tmp_path / "run") == 0, "nobody says which it was"


def test_a_checkpoint_of_ours_knows_its_tokenizer_too(shards, tmp_path, capfd):
    train(tiny_config(tmp_path / "old", "checkpoint.every=10"), write_tiny_shards(tmp_path / "shards"))
    assert go_on(shards, tmp_path / "old", tmp_path / "run") == 2
    assert "tokenizer of sha256 tiny" in capfd.readouterr().err


def test_more_token_ids_than_rows_are_refused_and_both_are_named(shards, tmp_path, capfd):
    publish(tmp_path / "llama", "published")
    shutil.copytree(shards, tmp_path / "wide")
    remake(tmp_path / "wide" / "shards", vocab_size=ROWS + 1)
    assert go_on(tmp_path / "wide", tmp_path / "llama", tmp_path / "run") == 2
    assert f"has {ROWS} token ids" in (error := capfd.readouterr().err) and f"have {ROWS + 1}" in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["init_from=null"], "set init_from=DIR"),
        (["model.num_layers=3", "model.rope_theta=5"], "remove model.num_layers, model.rope_theta"),
        (["init_from=nowhere"], "init_from=nowhere: no complete checkpoint"),
    ],
)
def test_sizes_come_from_the_folder_alone(settings, message):
    config = load_config(Config, ROOT / "configs/continue.yaml", ["mixture=m.yaml", *settings])
    with pytest.raises(ValueError, match=message):
        initial.resolve(config)


def test_weights_in_a_pickle_are_refused_with_the_way_to_convert_them(tmp_path, capfd, shards):
    publish(tmp_path / "llama", "published")
    for path in tmp_path.glob("llama/*.safetensors*"):
        path.unlink()
    (tmp_path / "llama" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert go_on(shards, tmp_path / "llama", tmp_path / "run") == 2
    assert "never pickles: AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT)" in capfd.readouterr().err
