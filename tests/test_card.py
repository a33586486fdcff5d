"""An export for the Hub: its card says what the run's own files say, and transformers stops where documents end."""

import dataclasses
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from data_tools.preprocess_data import main as preprocess
from data_tools.tokenizer import load_tokenizer
from data_tools.train_tokenizer import train_tokenizer
from launch import provenance
from launch.card import CardOptions, write_card
from launch.export import main as export
from launch.pretrain import main as pretrain
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.mixture import Mixture
from megatron_lite.files import read_jsonl
from megatron_lite.mesh import Mesh
from megatron_lite.model import GPT
from megatron_lite.testing import TINY_MODEL, tiny_config, write_tiny_shards
from megatron_lite.train import train
from megatron_lite.weights import read_weights

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {"web": ["the cat sat on the mat.", "a dog ran to the park."], "code": ["def f(x): return x", "print(i + 9)"]}
TEXTS["math"] = ["one plus one is two", "two plus two is four"]
SMALL = ("data.seq_length=32", "batch={global_batch_size: 8, micro_batch_size: 8}", "optim.lr=1e-2", "threads=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of 10 steps in two phases that was saved and evaluated at 5 and 10."""
    folder = tmp_path_factory.mktemp("card")
    mixture = write_tiny_shards(folder / "shards")
    Mixture.from_weights({"c": 0.25, "b": 0.75}, folder / "shards").save(folder / "late.yaml")
    phases = f"phases=[{{mixture: {folder}/late.yaml, from_tokens: 896}}]"
    train(tiny_config(folder / "run", phases, "checkpoint={every: 5}", "eval.every=5", "name=tiny"), mixture)
    return folder / "run"


def tables(card: str) -> list[list[list[str]]]:
    """The rows of each table below its head."""
    found = re.findall(r"(?:^\|.*\|\n)+", card, re.MULTILINE)
    return [[[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()[2:]] for text in found]


def test_the_cards_tables_are_the_runs_data_json(run):
    card = write_card(read_weights(run), "fp32", CardOptions("org/tiny", "mit", datasets=("org/data",)))
    found = json.loads((run / "data.json").read_text())
    for rows, domains in zip(tables(card), [found["domains"], *(s["domains"] for s in found["stages"])], strict=False):
        assert {row[0] for row in rows} == {name for name, told in domains.items() if told["requested"]}
        for name, requested, realised, tokens, epochs in rows:
            told = domains[name]
            assert (requested, realised) == (f"{told['requested']:.4f}", f"{told['realised']:.4f}")
            assert (tokens, epochs) == (f"{told['tokens']:,}", f"{told['epochs']:.2f}")
    assert "Phase from step 1 to 7" in card and "Phase from step 8 to 10" in card
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["datasets"], head["library_name"]) == ("mit", ["org/data"], "transformers")
    losses = {row["step"]: row for row in read_jsonl(run / "evals.jsonl")}[10]
    assert [row[1] for row in tables(card)[-1]] == [f"{losses[f'valid/{name}/loss']:.4f}" for name in "abc"]
    assert "1,280 tokens of a mixture of 3 domains" in card and "sha256 tiny, 64 ids" in card
    assert str(run.parent) not in card, "paths of this machine are nobody's business"


def test_the_card_of_an_earlier_step_is_of_that_step(run):
    card = write_card(read_weights(run / "step_0000005"), "bf16", CardOptions(""))
    assert card.count("# tiny") == 1 and "Phase" not in card and "license" not in card
    whole = tables(card)[0]
    assert sum(int(row[3].replace(",", "")) for row in whole) == 5 * 8 * 16
    losses = {row["step"]: row for row in read_jsonl(run / "evals.jsonl")}[5]
    assert tables(card)[-1][0][1] == f"{losses['valid/a/loss']:.4f}"


def test_a_run_that_changed_its_weights_at_every_step_has_a_short_card_and_names_no_paths(run, tmp_path):
    shutil.copytree(run / "step_0000010", tmp_path / "step_0000010")
    state = json.loads((tmp_path / "step_0000010" / "state.json").read_text())
    stages = [{"first_step": i, "weights": {"a": i / 10, "b": 1 - i / 10}, "seq_length": 16} for i in range(10)]
    state["data"]["stages"] = stages
    changes = {"mixture": "from step 3: a 0.5 -> 0.4", "init_from": "'/home/me/a' -> '/home/me/b'"}
    state["allowed"] = [{"step": 3, "key": key, "change": change} for key, change in changes.items()]
    (tmp_path / "step_0000010" / "state.json").write_text(json.dumps(state))
    weights = dataclasses.replace(read_weights(run), source=tmp_path / "step_0000010")
    card = write_card(weights, "fp32", CardOptions("x"))
    assert "changed 9 times" in card and card.count("```yaml") == 1 and "train_a: 0.9" in card
    assert sum(int(row[3].replace(",", "")) for row in tables(card)[0]) == 10 * 8 * 16
    assert "- changed at step 3: init_from\n" in card and "a 0.5 -> 0.4" in card and "/home" not in card


def test_the_card_has_the_harness_scores_with_their_errors(run, tmp_path):
    scores = {"alias": "piqa", "acc,none": 0.61234, "acc_stderr,none": 0.0114, "acc_norm,none": 0.5, "sample_len": 9}
    (tmp_path / "r.json").write_text(json.dumps({"results": {"piqa": scores}, "n-shot": {"piqa": 3}}))
    card = write_card(read_weights(run), "fp32", CardOptions("x", evaluation=(tmp_path / "r.json",)))
    assert tables(card)[-1] == [["piqa", "3", "acc", "0.6123 +- 0.0114"], ["piqa", "3", "acc_norm", "0.5000"]]
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(ValueError, match=r"wrong.json: no scores in it"):
        write_card(read_weights(run), "fp32", CardOptions("x", evaluation=(tmp_path / "wrong.json",)))


def test_the_card_has_the_seed_of_evaluation_json_that_it_is_of(run, tmp_path):
    found = {"models": {"a": ["x/step_0000001", str(run / "step_0000010")], "b": ["y", "z"]}}
    found["setting"] = {"shots": [0, 5], "limit": None}
    cells = {"a": {"values": [0.25, 0.5], "stderr": 0.01}, "b": {"values": [0.1, 0.2], "stderr": None}}
    found["tasks"] = {"piqa": {"metric": "acc_norm", "scores": cells}}
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    options = CardOptions("x", evaluation=(tmp_path / "evaluation.json",))
    assert tables(write_card(read_weights(run), "fp32", options))[-1] == [
        ["piqa", "0, 5", "acc_norm", "0.5000 +- 0.0100"]
    ]
    with pytest.raises(ValueError, match=r"not of .*step_0000005"):
        write_card(read_weights(run / "step_0000005"), "fp32", options)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "evaluation").mkdir()
    found["models"]["a"][1] = str(tmp_path / "run" / "step_0000010")
    (tmp_path / "run" / "evaluation" / "evaluation.json").write_text(json.dumps(found))
    assert "piqa" in write_card(read_weights(tmp_path / "run"), "fp32", CardOptions("x"))
    assert "piqa" not in write_card(read_weights(tmp_path / "run" / "step_0000005"), "fp32", CardOptions("x"))
    del found["tasks"]  # as launch/evaluate.py --perplexity leaves it
    (tmp_path / "run" / "evaluation" / "evaluation.json").write_text(json.dumps(found))
    assert "piqa" not in write_card(read_weights(tmp_path / "run"), "fp32", CardOptions("x"))


def test_the_card_says_which_search_found_the_mixture_and_no_paths(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    told = {"made_by": "regmix_search", "search": "mine", "proxies": 64, "fit": "abc", "from": "/home/me/x"}
    path = tmp_path / "run" / "mixture.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"provenance": told}, sort_keys=False))
    card = write_card(read_weights(tmp_path / "run"), "fp32", CardOptions("x"))
    assert "- mixture: made_by regmix_search, search mine, proxies 64\n" in card


def test_weights_that_were_imported_get_a_card_of_what_is_known(run, tmp_path):
    assert export([str(run), "--out", str(tmp_path / "llama"), "--no-verify"]) == 0
    assert "tokenizer is not part of this folder" in (tmp_path / "llama" / "README.md").read_text()
    assert export(["--from-hf", str(tmp_path / "llama"), "--out", str(tmp_path / "imported")]) == 0
    assert export([str(tmp_path / "imported"), "--out", str(tmp_path / "again"), "--no-verify"]) == 0
    card = (tmp_path / "again" / "README.md").read_text()
    assert "# imported" in card and "parameters" in card and "Data mixture" not in card and "nothing but" not in card


def test_a_start_is_recorded_once_as_long_as_nothing_changed(run, monkeypatch):
    for code in ("a" * 40, "a" * 40, "b" * 40):
        monkeypatch.setattr(provenance, "commit", lambda code=code: code)
        provenance.record_start(run, Mesh.from_env())
    starts = read_jsonl(run / "starts.jsonl")
    assert [start["commit"][0] for start in starts] == ["a", "b"]
    card = write_card(read_weights(run), "fp32", CardOptions("x"))
    assert f"commit {'a' * 40}" in card and f"commit {'b' * 40}" in card


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Short texts of three domains, their tokenizer and shards, as the command line makes them."""
    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for name, texts in TEXTS.items():
        for split, count in (("train", 200), ("valid", 8)):
            lines = [json.dumps({"text": draw.choice(texts)}) for _ in range(count)]
            (folder / f"{split}_{name}.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer(sorted(folder.glob("train_*.jsonl")), 300, folder / "tokenizer")
    words = ["--input", str(folder / "*.jsonl"), "--output-dir", str(folder / "shards"), "--exact-prefix"]
    assert preprocess([*words, "--tokenizer-model", str(folder / "tokenizer"), "--workers", "1"]) in (0, None)
    return folder


@pytest.mark.slow
def test_web_then_code_and_math_becomes_a_folder_that_generates_and_stops_at_eos(corpus, tmp_path, monkeypatch, capfd):
    """configs/anneal.yaml on a small corpus, to the end: every figure of it but the sizes is the config's own."""
    transformers = pytest.importorskip("transformers", reason="needs the hf extra")
    monkeypatch.chdir(ROOT)
    schedule = "schedule={total_tokens: 20480, warmup_steps: 4, decay: wsd, decay_fraction: 0.2}"
    phases = "phases=[{mixture: configs/mixture/code_math.yaml, from_tokens: 16384}]"
    out, data = f"out_dir={tmp_path / 'run'}", f"data.data_dir={corpus / 'shards'}"
    settings = [TINY_MODEL[0], out, data, schedule, phases, *SMALL, "eval.every=40"]
    assert pretrain(["--config", "configs/anneal.yaml", "--set", *settings]) == 0
    printed = capfd.readouterr().out.split("drawn:")[1]
    assert all(title in printed for title in ("steps 1 to 80", "steps 1 to 64", "steps 65 to 80"))
    rates = {row["step"]: row["train/lr"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")}
    assert rates[60] == 1e-2 and rates[70] < 1e-2, "phase and decay begin together"

    names = ["--tokenizer", str(corpus / "tokenizer"), "--name", "org/anneal"]
    assert export([str(tmp_path / "run"), "--out", str(tmp_path / "llama"), *names]) == 0
    card = (tmp_path / "llama" / "README.md").read_text()
    assert 'from_pretrained("org/anneal")' in card and "Phase from step 65 to 80" in card and "commit" in card

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    eod, shard = load_tokenizer(corpus / "tokenizer").eod_id, IndexedDataset(str(corpus / "shards" / "train_web"))
    first = json.loads((corpus / "train_web.jsonl").read_text().splitlines()[0])["text"]
    assert [*tokenizer(first)["input_ids"], eod] == shard[0].tolist(), "what training saw is what transformers makes"
    weights = read_weights(tmp_path / "run")
    ours = GPT(weights.shape)
    ours.load_state_dict(weights.tensors)
    for prompt, rest in (("the cat", " sat on the mat."), ("def f", "(x): return x"), ("one plus", " one is two")):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(ids)[0]
        assert made[-1] == eod and tokenizer.decode(made[ids.shape[1] : -1]) == rest
        expected, going = ids, model.generate(ids, max_new_tokens=32 - ids.shape[1], eos_token_id=None)[0]
        with torch.no_grad():
            while expected.shape[1] < 32:
                expected = torch.cat((expected, ours.logits(expected)[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(expected[0], going), "greedy decoding goes the same way, past the EOS too"
