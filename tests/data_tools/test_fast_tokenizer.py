"""gigatoken in place of a tokenizer's own library: the same bytes, or not used."""

import base64
import json
from pathlib import Path

import pytest
from reference_shard import run, shard_bytes
from word_corpus import make_texts, write_jsonl

from data_tools import encoding, shard
from data_tools.fast_tokenizer import choose_backend
from data_tools.tokenizer import load_tokenizer
from megatron_lite.data.indexed import IndexedDataset, read_meta

pytest.importorskip("gigatoken")
ODD = ["a<|endoftext|>b </s>", "", "<unk>", " ", "\u00e9e\u0301\u6f22 \U0001f600\x00", "I'll 1234\r\n\t  x"]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("fast") / "a.jsonl", [*make_texts(400), *ODD, *make_texts(400, 1)])


@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("kind", ["hf", "sp", "gpt2", "tiktoken"])
def test_gigatoken_writes_the_bytes_of_the_tokenizers_own_library(
    kind: str, append_eod: bool, tmp_path: Path, source: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer, options = request.getfixturevalue(kind), {"append_eod": append_eod}
    fast = run(tmp_path, source, tokenizer, "fast", backend="gigatoken", **options)
    slow = run(tmp_path, source, tokenizer, "slow", backend="native", **options)
    assert shard_bytes(fast) == shard_bytes(slow)
    assert [read_meta(prefix).extra["backend"] for prefix in (fast, slow)] == ["gigatoken", "native"]  # type: ignore[union-attr]


def test_workers_do_not_change_what_gigatoken_writes(
    tmp_path: Path, source: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "FAST_WORKER_BYTES", 1 << 16)
    monkeypatch.setattr(encoding, "FAST_CHUNK_BYTES", 1 << 16)
    assert source.stat().st_size > 5 * encoding.FAST_CHUNK_BYTES
    one, two = (run(tmp_path, source, hf, f"w{w}", workers=w, backend="gigatoken") for w in (1, 2))
    assert shard_bytes(one) == shard_bytes(two)


@pytest.mark.parametrize("kind", ["hf", "sp", "gpt2", "tiktoken"])
def test_special_tokens_are_tokens_only_when_allowed(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    eod_id = load_tokenizer(path).eod_id
    name = next(n for n, i in load_tokenizer(path).special_tokens.items() if i == eod_id)
    text = write_jsonl(tmp_path / "a.jsonl", [f"a{name}b", name])
    for backend in ("auto", "native"):
        plain = IndexedDataset(run(tmp_path, text, path, f"plain_{backend}", backend=backend))
        assert [list(plain[i]).count(eod_id) for i in range(2)] == [1, 1]  # the one that ends the document
        options = {"tokenizer_options": {"allow_special_tokens": True}, "backend": backend}
        allowed = IndexedDataset(run(tmp_path, text, path, f"allowed_{backend}", **options))
        assert [list(allowed[i]).count(eod_id) for i in range(2)] == [2, 2]


def test_special_tokens_in_text_do_not_cost_the_fast_path(tmp_path: Path, hf: Path) -> None:
    raw = json.loads((hf / "tokenizer.json").read_text())
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 400, "content": "<|im_start|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    text = write_jsonl(tmp_path / "a.jsonl", ["a<|im_start|>b", "<|endoftext|>"])
    prefix = run(tmp_path, text, tmp_path, backend="gigatoken")  # an error if the ids were not the same
    assert 400 not in IndexedDataset(prefix).tokens


def test_eod_without_special_flag_is_spelled_out(tmp_path: Path, hf: Path) -> None:
    raw = json.loads((hf / "tokenizer.json").read_text())
    raw["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    text = write_jsonl(tmp_path / "a.jsonl", ["a<|endoftext|>b", "c", "<|endoftext|>"])
    fast, slow = (run(tmp_path, text, tmp_path, b, backend=b) for b in ("gigatoken", "native"))
    assert shard_bytes(fast) == shard_bytes(slow)
    assert [list(IndexedDataset(fast)[i]).count(0) for i in range(3)] == [1, 1, 1]


def test_other_ids_in_the_sample_mean_the_tokenizers_own_library(
    tmp_path: Path, corpus: Path, hf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = json.loads((hf / "tokenizer.json").read_text())
    wrong["model"]["merges"] = wrong["model"]["merges"][:50]
    monkeypatch.setattr("data_tools.tokenizer_kinds.HuggingFaceTokenizer.define_gigatoken", lambda _: json.dumps(wrong))
    prefix = run(tmp_path, corpus, hf, log_interval=10_000)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "own library: gigatoken gives other ids for" in error
    assert read_meta(prefix).extra["backend"] == "native"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="--backend gigatoken: gigatoken gives other ids"):
        run(tmp_path, corpus, hf, "other", backend="gigatoken")


def test_other_ids_later_on_start_the_shard_over(
    tmp_path: Path, source: Path, hf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A difference that the sample did not show is found in passing, and no wrong id is left behind."""
    monkeypatch.setattr(shard, "choose_backend", lambda tokenizer, *_: (tokenizer.define_gigatoken(), ""))
    monkeypatch.setattr(encoding, "_load_fast_once", lambda *_: lambda text: [1] * len(text))
    prefix = run(tmp_path, source, hf)
    assert "starting over" in capsys.readouterr().err
    assert shard_bytes(prefix) == shard_bytes(run(tmp_path, source, hf, "slow", backend="native"))
    with pytest.raises(ValueError, match="gigatoken gives other ids"):
        run(tmp_path, source, hf, "other", backend="gigatoken")


def test_what_gigatoken_cannot_read_is_said(tmp_path: Path, corpus: Path, hf: Path, tiktoken: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(300)), model_prefix=str(tmp_path / "uni"), vocab_size=90, minloglevel=2
    )
    assert choose_backend(load_tokenizer(tmp_path / "uni.model"), [], "auto") == (
        "",
        "only BPE sentencepiece models are supported, got model_type 'unigram'",
    )
    v2 = load_tokenizer(tiktoken, tiktoken_pattern="v2")
    assert "does not read" in choose_backend(v2, [], "auto")[1]
    with pytest.raises(ValueError, match="backend is 'rust'"):
        choose_backend(load_tokenizer(hf), [], "rust")


def test_gigatoken_is_optional(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    assert "gigatoken is not installed" in choose_backend(load_tokenizer(hf), ["fresh text"], "auto")[1]


def test_megatron_tiktoken_list_puts_special_tokens_first(tmp_path: Path, tiktoken: Path) -> None:
    ranks = [line.split()[0].decode() for line in tiktoken.read_bytes().splitlines()]
    entries = [{"rank": i, "token_bytes": t, "token_str": ""} for i, t in enumerate(ranks)]
    (tmp_path / "vocab.json").write_text(json.dumps(entries))
    tokenizer = load_tokenizer(tmp_path / "vocab.json", tiktoken_num_special_tokens=10)
    assert tokenizer.eod_id == 2 and tokenizer.vocab_size == len(ranks) + 10
    ids = tokenizer.encode_batch(["the </s> <SPECIAL_7>"])[0]
    assert tokenizer.decode(ids) == "the </s> <SPECIAL_7>" and min(ids) >= 10
    assert base64.b64decode(ranks[ids[0] - 10]).startswith(b"t")
    allowed = load_tokenizer(tmp_path / "vocab.json", allow_special_tokens=True, tiktoken_num_special_tokens=10)
    assert {2, 7} < set(allowed.encode_batch(["the </s> <SPECIAL_7>"])[0])
