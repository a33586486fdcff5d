"""launch/evaluate.py: RegMix's tasks by their names, a local task through the real harness, its tokens and ours."""

import importlib.util
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from data_tools import preprocess_data
from data_tools.local_task import main as local_task
from data_tools.tokenizer import load_tokenizer
from data_tools.train_tokenizer import train_tokenizer
from launch import export
from launch.evaluate import main, read_shots
from launch.harness import METRICS, TASKS, Harness, check_tokens, open_tasks
from megatron_lite.data.mixture import Mixture
from megatron_lite.files import read_jsonl
from megatron_lite.model import GPT
from megatron_lite.testing import tiny_config
from megatron_lite.train import train
from megatron_lite.weights import read_weights

WITH_HARNESS = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("lm_eval", "accelerate", "transformers")),
    reason="needs lm_eval: pip install 'megatron_lite[eval]'",
)
ROOT = Path(__file__).resolve().parents[1]
VOCAB, T = 300, 128
SIZES = ["--items", "60", "--context-chars", "60", "--piece-chars", "20"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Text of two domains, tokenizer, shards, and a run of 10 steps with its losses."""
    folder, rng = tmp_path_factory.mktemp("evaluate"), random.Random(0)
    for name in ("train_wiki", "train_code", "valid_wiki", "valid_code"):
        words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(100)]
        texts = [" ".join(rng.choices(words, k=120)) for _ in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    train_tokenizer([folder / "train_wiki.jsonl"], VOCAB, folder / "tokenizer", "hf")
    shards = ["--input", str(folder / "*.jsonl"), "--output-dir", str(folder / "shards"), "--exact-prefix"]
    assert preprocess_data.main([*shards, "--tokenizer-model", str(folder / "tokenizer"), "--workers", "1"]) == 0
    run(folder, "run", 0)
    return folder


def run(folder: Path, name: str, seed: int) -> Path:
    """A run of 10 steps that is saved and evaluated at its end."""
    mixture = Mixture.from_weights({"wiki": 2.0, "code": 1.0}, folder / "shards")
    settings = ["checkpoint.every=10", "eval.every=10", f"data.seq_length={T}", "schedule.total_tokens=10240"]
    train(tiny_config(folder / name, *settings, f"seed={seed}"), mixture)
    return folder / name


def evaluate(files: Path, out: str, *arguments: str) -> dict:
    """Runs the command on the CPU; returns evaluation.json."""
    assert main([*arguments, "--out", str(files / out), "--device", "cpu"]) == 0
    return json.loads((files / out / "evaluation.json").read_text())


def check_held_out(files: Path, model: Path, *where: str) -> None:
    """--perplexity says what the run's own last evaluation said."""
    told = read_jsonl(files / "run" / "evals.jsonl")[-1]
    (rows,) = evaluate(files, "losses", str(model), "--perplexity", *where)["domains"].values()
    assert set(rows) == {"wiki", "code"}
    for name, row in rows.items():
        assert row["loss"]["mean"] == pytest.approx(told[f"valid/{name}/loss"], abs=1e-5)
        assert row["bpb"]["mean"] == pytest.approx(told[f"valid/{name}/bpb"], abs=1e-5)
        assert row["perplexity"]["mean"] == pytest.approx(math.exp(told[f"valid/{name}/loss"]), rel=1e-4)


def test_held_out_losses_are_those_of_the_run(files, capsys):
    check_held_out(files, files / "run")
    check_held_out(files, files / "run" / "step_0000010")
    check_held_out(files, files / "run", "--data-dir", str(files / "shards"))
    assert "| wiki |" in capsys.readouterr().out


def test_held_out_losses_refuse_shards_of_another_tokenizer(files, tmp_path, capsys):
    shutil.copytree(files / "shards", tmp_path / "shards")
    train_tokenizer([files / "train_code.jsonl"], VOCAB, tmp_path / "other", "hf")
    shards = ["--input", str(files / "valid_wiki.jsonl"), "--output-dir", str(tmp_path / "shards"), "--exact-prefix"]
    assert preprocess_data.main([*shards, "--tokenizer-model", str(tmp_path / "other"), "--workers", "1"]) == 0
    command = [str(files / "run"), "--perplexity", "--data-dir", str(tmp_path / "shards"), "--out", str(tmp_path / "o")]
    assert main([*command, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "valid_wiki was made with tokenizer" in error and "was trained with" in error


def test_what_is_asked_is_read_or_refused(files, capsys):
    assert read_shots("0-5") == [0, 1, 2, 3, 4, 5] and read_shots("0,2") == [0, 2] and read_shots("3") == [3]
    for arguments, message in (
        (["--shots", "five"], "--shots five: expected"),
        (["--shots", "0,0-2"], "--shots 0,0-2: expected"),
        ([f"a={files / 'run'},{files / 'run' / 'step_0000010'}"], "named twice; it is no second seed"),
        ([f"run={files / 'run'}"], "the name 'run' is taken"),
        ([str(files / "nothing")], "no complete checkpoint here"),
    ):
        assert main([str(files / "run"), *arguments, "--out", str(files / "asked")]) == 2
        assert message in capsys.readouterr().err, arguments


@WITH_HARNESS
def test_regmixs_tasks_are_the_harnesss_with_the_metric_that_we_report():
    package = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    places = {  # task: (its file, the metric of RegMix's rule: acc_norm if the task has it, else acc)
        "social_iqa": ("siqa/siqa", "acc"), "hellaswag": ("hellaswag/hellaswag", "acc_norm"),
        "piqa": ("piqa/piqa", "acc_norm"), "openbookqa": ("openbookqa/openbookqa", "acc_norm"),
        "lambada_standard": ("lambada/lambada_standard", "acc"), "sciq": ("sciq/sciq", "acc_norm"),
        "arc_easy": ("arc/arc_easy", "acc_norm"), "copa": ("super_glue/copa/default", "acc"),
        "race": ("race/race", "acc"), "logiqa": ("logiqa/logiqa", "acc_norm"), "qqp": ("glue/qqp/default", "acc"),
        "winogrande": ("winogrande/default", "acc"), "multirc": ("super_glue/multirc/default", "acc"),
    }  # fmt: skip
    assert set(TASKS) == set(places) and len(TASKS) == 13

    class Loader(yaml.SafeLoader):
        """Leaves !function unread."""

    Loader.add_constructor("!function", lambda loader, node: None)
    for task, (place, metric) in places.items():
        config = yaml.load((package / f"{place}.yaml").read_text(), Loader)
        assert config["task"] == task
        names = [m["metric"] for m in config["metric_list"]]
        assert next(m for m in METRICS if m in names) == metric, task
        assert "num_fewshot" not in config, "a fixed number of shots would override --shots"


def rows_of_each_task(letters: str) -> dict[str, dict]:
    """A row in the form of each benchmark's data set, by the data set's name."""
    a, b, c, d = letters
    problem = {"question": f"{a}?", "answer": "B", "options": [a, b, c, d]}
    return {
        "lighteval/siqa": {"context": a, "question": b, "answerA": a, "answerB": b, "answerC": c, "label": "2"},
        "Rowan/hellaswag": {"ctx_a": a, "ctx_b": b, "activity_label": c, "endings": [a, b, c, d], "label": "1"},
        "baber/piqa": {"goal": a, "sol1": b, "sol2": c, "label": 1},
        "allenai/openbookqa": {"question_stem": a, "choices": {"text": [a, b], "label": ["A", "B"]}, "answerKey": "A"},
        "cimec/lambada": {"text": f"{a} {b} {c} {d}"},
        "allenai/sciq": {
            "support": a, "question": b, "distractor1": a, "distractor2": b, "distractor3": c, "correct_answer": d,
        },
        "allenai/ai2_arc": {"question": a, "choices": {"text": [a, b], "label": ["A", "B"]}, "answerKey": "B"},
        "aps/super_glue copa": {"premise": f"{a}.", "question": "cause", "choice1": a, "choice2": b, "label": 1},
        "EleutherAI/race": {"article": a, "problems": str([problem, problem])},
        "EleutherAI/logiqa": {"context": a, "question": b, "options": [a, b, c, d], "label": "c"},
        "nyu-mll/glue": {"question1": a, "question2": b, "label": 0},
        "allenai/winogrande": {"sentence": f"{a} _ {b}.", "option1": c, "option2": d, "answer": "2"},
        "aps/super_glue multirc": {"paragraph": a, "question": b, "answer": c, "label": 1},
    }  # fmt: skip


@pytest.mark.slow
def test_the_script_does_not_stand_in_the_way_of_hugging_faces_evaluate(tmp_path):
    show = "import atexit, importlib.util as u; atexit.register(lambda: print('found', u.find_spec('evaluate')))\n"
    (tmp_path / "sitecustomize.py").write_text(show)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    script = [sys.executable, str(ROOT / "launch" / "evaluate.py"), "--help"]
    done = subprocess.run(script, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "found" in done.stdout, done.stderr
    assert "launch/evaluate.py" not in done.stdout.split("found")[1]


class Broken:
    """A training tokenizer that disagrees about one text."""

    def __init__(self, real):
        self.real, self.decode = real, real.decode

    def encode_batch(self, texts):
        return [
            [*ids, 5] if "cat" in text else ids for text, ids in zip(texts, self.real.encode_batch(texts), strict=True)
        ]


def test_a_token_that_differs_from_training_is_named_with_both(files):
    ours = load_tokenizer(files / "tokenizer")
    eod = ours.eod_id
    encode = lambda text: list(ours.encode_batch([text])[0])  # noqa: E731
    whole, context = encode("a bag of bad"), encode("a bag")
    right = [(("a bag", " of bad"), context, whole[len(context) :]), (("", "a bag"), [eod], context)]
    check_tokens(right, ours, eod, files)
    check_tokens([(("a bag ", "of bad"), context, whole[len(context) :])], ours, eod, files)  # the blank goes over
    for wrong in (
        (("a bag", " of bad"), [eod, *context], whole[len(context) :]),  # a BOS
        (("a bag", " of bad"), context, [*whole[len(context) :], eod]),  # an EOS
        (("", "a bag"), [eod + 1], context),  # another start
    ):
        with pytest.raises(
            ValueError, match=r"is \[.*\] from token (0|10) .* in lm_eval and \[.*\] from .* in training"
        ):
            check_tokens([*right, wrong], ours, eod, files)
    cat = encode("the cat")
    with pytest.raises(ValueError, match="'the cat' is"):
        check_tokens([(("", "the cat"), [eod], cat)], Broken(ours), eod, files)


@pytest.fixture(scope="module")
def local(files) -> Path:
    """Local tasks, an export, and no way to the Hub."""
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", files / "cache")
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert local_task(["--input", str(files / "valid_*.jsonl"), "--out", str(files / "tasks"), *SIZES]) == 0
    hf = ["--out", str(files / "llama"), "--tokenizer", str(files / "tokenizer")]
    assert export.main([str(files / "run"), *hf]) == 0
    yield files
    patch.undo()


@pytest.mark.slow
@WITH_HARNESS
def test_held_out_losses_of_an_export_are_those_of_its_run(local):
    check_held_out(local, local / "llama", "--data-dir", str(local / "shards"))


@pytest.mark.slow
@WITH_HARNESS
@torch.no_grad()
def test_the_harnesss_log_likelihoods_are_ours(local):
    import lm_eval
    from lm_eval.api.instance import Instance

    manager = open_tasks(["local_wiki"], str(local / "tasks"))
    asked = Harness(local / "llama", manager, "cpu", "7", "fp32")
    results = lm_eval.simple_evaluate(model=asked.lm, tasks=["local_wiki"], num_fewshot=1, task_manager=manager)
    samples = results["samples"]["local_wiki"]
    pairs = [(pair, found[0]) for s in samples for pair, found in zip(s["arguments"], s["resps"], strict=True)]
    more = [("", "bad cab"), ("abc ", "bad"), ("a b c d", " e f g h")]
    extra = asked.lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(more)])
    pairs += zip(more, extra, strict=True)
    weights, ours = read_weights(local / "run"), load_tokenizer(local / "tokenizer")
    model = GPT(weights.shape)
    for name, param in model.named_parameters():
        param.copy_(weights.tensors[name])
    assert len(pairs) >= 50 * 4
    for (context, continuation), (nats, greedy) in pairs:
        start, whole = ours.encode_batch([context.rstrip(), context + continuation])
        whole, n = (list(whole), len(whole) - len(start)) if context else ([ours.eod_id, *whole], len(whole))
        tokens = torch.tensor([whole[-(T + 1) :]])
        logits = model.logits(tokens[:, :-1])[0, -n:].double().log_softmax(-1)
        expected = logits.gather(1, tokens[0, -n:, None])
        assert nats == pytest.approx(expected.sum().item(), abs=1e-4), (context, continuation)
        assert greedy == torch.equal(logits.argmax(-1), tokens[0, -n:]) and nats < -1


@pytest.mark.slow
@WITH_HARNESS
def test_local_tasks_through_the_command_give_a_table_and_are_never_run_twice(local, monkeypatch, capsys):
    models = [f"a={run(local, 'a1', 1)},{run(local, 'a2', 2)}", f"b={run(local, 'b1', 3)},{run(local, 'b2', 4)}"]
    where = ["--tokenizer", str(local / "tokenizer"), "--include-path", str(local / "tasks"), "--limit", "30"]
    command = [*models, *where, "--tasks", "local_wiki", "local_code", "--shots", "0-1"]
    real, calls = Harness.score, []

    def score(self, task, shots, limit):
        calls.append((task, shots))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, task, shots, limit)

    monkeypatch.setattr(Harness, "score", score)
    with pytest.raises(KeyboardInterrupt):
        evaluate(local, "table", *command)
    found = evaluate(local, "table", *command)
    assert len(calls) == 17  # 2 tasks x 2 shots x 4 models, and the one that was cut
    capsys.readouterr()
    assert evaluate(local, "table", *command) == found and len(calls) == 17
    table = capsys.readouterr().out
    assert table == (local / "table" / "table.md").read_text()
    assert "| local_wiki | acc_norm |" in table and "| b - a |" in table and "ONLY THE FIRST 30 ITEMS" in table
    for name in "ab":
        seeds = found["tasks"]["local_wiki"]["scores"][name]["values"]
        assert len(seeds) == 2 and all(0 <= value <= 1 for value in seeds)
        shots = found["by_shots"][name]["local_wiki"]
        assert sum(shots) / 2 == pytest.approx(sum(seeds) / 2)
    assert not list((local / "table").glob(".export-*"))
    publish = ["--tokenizer", str(local / "tokenizer"), "--no-verify", "--evaluation"]
    publish += [str(local / "table" / "evaluation.json"), "--out"]
    assert export.main([str(local / "b2"), *publish, str(local / "b2-llama")]) == 0
    score = found["tasks"]["local_wiki"]["scores"]["b"]["values"][1]
    card = (local / "b2-llama" / "README.md").read_text()
    assert f"| local_wiki | 0, 1 (first 30 items) | acc_norm | {score:.4f} +- " in card
    assert export.main([str(local / "run"), *publish, str(local / "run-llama")]) == 2
    assert "not of" in capsys.readouterr().err
    evaluate(local, "table", *command, "--limit", "20")
    assert len(calls) == 17 + 16  # other items: other scores
    assert main([*command, "--json", "--out", str(local / "table")]) == 0
    assert json.loads(capsys.readouterr().out[-len(json.dumps(found, indent=1)) - 1 :]) == found


@pytest.mark.slow
@WITH_HARNESS
def test_all_of_regmixs_tasks_run_from_their_own_definitions_with_0_and_5_shots(local, monkeypatch, capsys):
    import datasets

    def load_dataset(path, name=None, **kwargs):
        rng, key = random.Random(path), f"{path} {name}" if path == "aps/super_glue" else path
        rows = [rows_of_each_task(rng.sample(WORDS, 4))[key] for _ in range(8)]
        found = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), found))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = evaluate(local, "thirteen", str(local / "llama"), "--shots", "0,5", "--limit", "4")
    assert list(found["tasks"]) == list(TASKS)
    stored = [json.loads(path.read_text()) for path in (local / "thirteen" / "scores").rglob("*.json")]
    assert {(r["task"], r["shots"]) for r in stored} == {(task, shots) for task in TASKS for shots in (0, 5)}
    assert all(r["items"] == 4 and r["stderr"] is not None and 0 <= r["value"] <= 1 for r in stored)
    table = capsys.readouterr().out
    assert "| multirc | acc |" in table and "| hellaswag | acc_norm |" in table and "| **average** |" in table


WORDS = ["a bag", "bad cab", "the deaf", "head", "a cafe", "beach", "face", "dad had"]


@pytest.mark.slow
@WITH_HARNESS
def test_an_export_whose_tokenizer_adds_bos_is_refused_and_one_that_says_nothing_is_told(local, tmp_path, capsys):
    def ask(folder: Path, *extra: str) -> str:
        where = [
            "--include-path",
            str(local / "tasks"),
            "--out",
            str(tmp_path / "out"),
            "--device",
            "cpu",
            "--limit",
            "4",
        ]
        main([str(folder), *where, "--shots", "0", *(extra or ("--tasks", "local_wiki"))])
        said = capsys.readouterr()
        return said.err + said.out

    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    eod = load_tokenizer(local / "tokenizer").eod_id
    shutil.copytree(local / "llama", tmp_path / "bos")
    backend = Tokenizer.from_file(str(tmp_path / "bos" / "tokenizer.json"))
    backend.post_processor = TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", eod)])
    backend.save(str(tmp_path / "bos" / "tokenizer.json"))
    assert f"is [{eod}, " in (said := ask(tmp_path / "bos")) and "in lm_eval and" in said
    (tmp_path / "bos" / "megatron_lite.json").unlink()
    assert "tokens are not checked" in (said := ask(tmp_path / "bos")) and "| local_wiki |" in said
    shutil.copytree(local / "llama", tmp_path / "eod")
    record = json.loads((tmp_path / "eod" / "megatron_lite.json").read_text())
    (tmp_path / "eod" / "megatron_lite.json").write_text(json.dumps(record | {"eod_id": eod + 1}))
    assert f"starts an empty context with token {eod}, training with its EOD, {eod + 1}" in ask(tmp_path / "eod")
    (tmp_path / "eod" / "megatron_lite.json").write_text(json.dumps(record | {"bos": 7}))
    assert "bos and eod_id must be null and an id" in ask(tmp_path / "eod")
    assert "near it: local_wiki" in ask(local / "llama", "--tasks", "local_wikii")
    assert "its data cannot be read" in ask(local / "llama", "--tasks", "piqa")
    config = yaml.safe_load((local / "tasks" / "local_wiki.yaml").read_text()) | {"task": "fixed", "num_fewshot": 0}
    (local / "tasks" / "fixed.yaml").write_text(yaml.safe_dump(config))
    assert "fixed fixes num_fewshot: 0" in ask(local / "llama", "--tasks", "fixed", "--shots", "1")
