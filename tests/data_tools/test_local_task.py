"""data_tools/local_task.py: items of held-out text whose right answer is the text's own."""

import json
import random
from pathlib import Path

import pytest
import yaml

from data_tools.local_task import main


def write_texts(path: Path, count: int, words: int = 120, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    texts = [" ".join(f"w{rng.randrange(10**6)}" for _ in range(words)) + "\n\ttail  of it" for _ in range(count)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return texts


def make(folder: Path, out: str, *extra: str) -> dict[str, bytes]:
    assert main(["--input", str(folder / "valid_*.jsonl"), "--out", str(folder / out), *extra]) == 0
    return {path.name: path.read_bytes() for path in (folder / out).iterdir()}


def rows(files: dict[str, bytes], name: str) -> list[dict]:
    return [json.loads(line) for line in files[name].splitlines()]


def test_only_the_true_piece_goes_on_and_few_shot_documents_are_others(tmp_path):
    texts = write_texts(tmp_path / "valid_wiki.jsonl", 60)
    files = make(tmp_path, "tasks", "--items", "50", "--context-chars", "100", "--piece-chars", "30")
    test, train = rows(files, "local_wiki.test.jsonl"), rows(files, "local_wiki.train.jsonl")
    assert len(test) == 50 and len(train) == 32
    used = []
    for split in (test, train):
        documents = set()
        for row in split:
            assert len(set(row["choices"])) == 4
            follows = [any(f"{row['context']} {c}" in text for text in texts) for c in row["choices"]]
            assert follows == [i == row["label"] for i in range(4)]
            documents |= {i for i, text in enumerate(texts) if row["context"] in text}
        used.append(documents)
    assert used[0] and used[1] and used[0].isdisjoint(used[1])
    assert {row["label"] for row in test} == set(range(4))  # the answer has no usual place


def test_the_same_seed_makes_the_same_files_and_another_does_not(tmp_path):
    write_texts(tmp_path / "valid_wiki.jsonl", 60)
    write_texts(tmp_path / "valid_code.jsonl", 60, seed=1)
    first = make(tmp_path, "tasks", "--items", "20")
    assert set(first) == {
        f"local_{d}{end}" for d in ("wiki", "code") for end in (".yaml", ".train.jsonl", ".test.jsonl")
    }
    assert make(tmp_path, "tasks", "--items", "20") == first
    other = make(tmp_path, "tasks", "--items", "20", "--seed", "1")
    assert other["local_wiki.yaml"] == first["local_wiki.yaml"]
    contexts = [{row["context"] for row in rows(files, "local_wiki.test.jsonl")} for files in (first, other)]
    assert len(contexts[0] & contexts[1]) < 20  # other items, not only other choices
    config = yaml.safe_load(first["local_wiki.yaml"])
    assert config["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "tasks" / "local_wiki.test.jsonl")


def test_a_piece_that_is_said_twice_is_no_item(tmp_path):
    same = " ".join(f"same{i}" for i in range(120))
    texts = write_texts(tmp_path / "valid_wiki.jsonl", 40)
    texts += [f"{chr(65 + i)} {same}" for i in range(10)]  # other contexts, the same pieces
    (tmp_path / "valid_wiki.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    files = make(tmp_path, "tasks")
    found = rows(files, "local_wiki.test.jsonl") + rows(files, "local_wiki.train.jsonl")
    assert found and not any("same" in choice for row in found for choice in row["choices"])


@pytest.mark.parametrize(("count", "extra", "message"), [
    (5, (), "add text, or lower --context-chars"),
    (60, ("--context-chars", "5000"), "add text, or lower --context-chars"),
    (60, ("--choices", "1"), "--choices at least 2"),
])  # fmt: skip
def test_too_little_text_is_an_error_with_the_way_out(tmp_path, capsys, count, extra, message):
    write_texts(tmp_path / "valid_wiki.jsonl", count)
    assert main(["--input", str(tmp_path / "valid_wiki.jsonl"), "--out", str(tmp_path / "tasks"), *extra]) == 2
    assert message in capsys.readouterr().err
