"""Tokenizers: lossless, deterministic, and text that spells a special token stays text."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.tokenizer import load_tokenizer
from data_tools.train_tokenizer import main, train_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [
    "plain",
    "  two  spaces\n\n\ttab\r\n",
    "Gr\u00f6\u00dfe \u6f22\u5b57 \U0001f600 \x00 \x7f",
    "a</s>b <|endoftext|> <unk> <pad>",
    " ",
]


def unigram_folder(folder: Path, vocab: list[str]) -> Path:
    """A Unigram tokenizer.json whose special token is an ordinary piece too, as in T5 and XLM-R."""
    from tokenizers import Tokenizer, models

    model = models.Unigram([(piece, -1.0 * (len(piece) == 1)) for piece in vocab], unk_id=0)
    Tokenizer(model).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kind", ["hf", "sp"])
def test_round_trip_is_exact(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("kind", ["hf", "sp"])
def test_special_tokens_in_text_stay_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    assert tokenizer.eod_id is not None
    for ids in tokenizer.encode_batch(["a <|endoftext|> b", "<|endoftext|>", "</s>", "x</s></s>y"]):
        assert ids and tokenizer.eod_id not in ids


def test_other_special_tokens_in_text_stay_text(tmp_path: Path, hf: Path) -> None:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(hf / "tokenizer.json"))
    backend.add_special_tokens(["<|im_start|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == 401
    assert load_tokenizer(tmp_path).encode_batch(["<|im_start|>"]) == load_tokenizer(hf).encode_batch(["<|im_start|>"])


def test_unigram_piece_that_is_eod_is_spelled_out(tmp_path: Path) -> None:
    folder = unigram_folder(tmp_path, ["<unk>", "</s>", *"abs</>"])
    tokenizer = load_tokenizer(folder)
    assert tokenizer._backend.encode("a</s>b").ids.count(1) == 1  # the library alone does make it EOD
    assert tokenizer.encode_batch(["a</s>b", "ab"]) == [[2, 5, 6, 4, 7, 3], [2, 3]]


def test_added_token_without_special_flag_is_spelled_out(tmp_path: Path, hf: Path) -> None:
    raw = json.loads((hf / "tokenizer.json").read_text())
    raw["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer._backend.encode("a<|endoftext|>").ids[-1] == tokenizer.eod_id
    ids = tokenizer.encode_batch(["a<|endoftext|>b"])[0]
    assert tokenizer.eod_id not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"


def test_sentencepiece_user_defined_eod_is_spelled_out(tmp_path: Path, corpus: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.read_text().splitlines()),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        eos_id=-1,
        user_defined_symbols=["</s>"],
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    text = "a</s>b</s>"
    assert tokenizer._backend.encode(text).count(tokenizer.eod_id) == 2
    ids = tokenizer.encode_batch([text])[0]
    assert tokenizer.eod_id not in ids and tokenizer.decode(ids) == text


def test_eod_that_spells_a_character_is_refused(tmp_path: Path) -> None:
    unigram_folder(tmp_path, ["<unk>", "</s>", "a"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    with pytest.raises(ValueError, match="spells ordinary text"):
        load_tokenizer(tmp_path).encode_batch(["aa"])


def test_no_bos_and_no_truncation_even_if_the_file_asks(tmp_path: Path, hf: Path) -> None:
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_file(str(hf / "tokenizer.json"))
    backend.add_special_tokens(["<|bos|>"])
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 400)])
    backend.enable_truncation(4)
    backend.enable_padding()
    backend.save(str(tmp_path / "tokenizer.json"))
    texts = ["the model of the shard " * 9, "x"]
    assert load_tokenizer(tmp_path).encode_batch(texts) == load_tokenizer(hf).encode_batch(texts)


def test_facts(hf: Path, sp: Path) -> None:
    for folder, file in ((hf, "tokenizer.json"), (sp, "tokenizer.model")):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.vocab_size == 400
        assert tokenizer.sha256 == hashlib.sha256((folder / file).read_bytes()).hexdigest()
        assert load_tokenizer(folder / file).sha256 == tokenizer.sha256
    assert load_tokenizer(hf).eod_id == 0 and load_tokenizer(sp).eod_id == 2


def test_eod_comes_from_the_config_first(tmp_path: Path) -> None:
    unigram_folder(tmp_path, ["<unk>", "</s>", "<eot>", "a"])
    assert load_tokenizer(tmp_path).eod_id == 1
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<eot>"}}')
    assert load_tokenizer(tmp_path).eod_id == 2
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}')
    with pytest.raises(ValueError, match=r"tokenizer_config.json: eos_token '<gone>' is not in the vocabulary"):
        load_tokenizer(tmp_path)


def test_vocab_size_covers_gaps_in_the_ids(tmp_path: Path, hf: Path) -> None:
    raw = json.loads((hf / "tokenizer.json").read_text())
    raw["model"]["vocab"]["zzz"] = 500
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert load_tokenizer(tmp_path).vocab_size == 501


def test_errors_say_what_to_do(tmp_path: Path, hf: Path) -> None:
    with pytest.raises(ValueError, match="no such tokenizer; give a folder or file on this machine"):
        load_tokenizer("gpt2-of-some-hub")
    with pytest.raises(ValueError, match=r"no tokenizer.json or tokenizer.model or vocab.json in this folder"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer.model in this folder"):
        load_tokenizer(hf, "SentencePieceTokenizer")
    with pytest.raises(ValueError, match="'BertWordPieceCase' is not known; use auto, HuggingFaceTokenizer,"):
        load_tokenizer(hf, "BertWordPieceCase")
    unigram_folder(tmp_path, ["<unk>", "a"])
    with pytest.raises(
        ValueError, match=r'no end-of-document token.*"eos_token".*tokenizer_config.json.*--no-append-eod'
    ):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, need_eod=False).eod_id is None
    for name in ("tokenizer.json", "broken.model"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match=f"{name}: not a "):
            load_tokenizer(tmp_path / name)


def test_training_is_deterministic(tmp_path: Path, corpus: Path, hf: Path, sp: Path) -> None:
    """In another process: hash seeds and thread timing must not matter."""
    for kind, reference in (("hf", hf / "tokenizer.json"), ("sentencepiece", sp / "tokenizer.model")):
        command = [sys.executable, "data_tools/train_tokenizer.py", "--input", str(corpus), "--vocab-size", "400"]
        subprocess.run([*command, "--type", kind, "--out", str(tmp_path / kind)], cwd=ROOT, check=True)
        assert (tmp_path / kind / reference.name).read_bytes() == reference.read_bytes()


def test_training_again_is_a_no_op(tmp_path: Path, corpus: Path) -> None:
    out = train_tokenizer(corpus, 400, tmp_path / "tok")
    before = (out / "tokenizer.json").stat().st_mtime_ns
    train_tokenizer(corpus, 400, out)
    assert (out / "tokenizer.json").stat().st_mtime_ns == before
    train_tokenizer(corpus, 401, out)
    assert load_tokenizer(out).vocab_size == 401
    train_tokenizer(corpus, 400, out, kind="sentencepiece")
    assert sorted(p.name for p in out.iterdir()) == ["tokenizer.model", "training.json"]
    (out / "tokenizer.model").unlink()
    train_tokenizer(corpus, 400, out, kind="sentencepiece")
    assert load_tokenizer(out).vocab_size == 400


def test_training_leaves_a_foreign_tokenizer_alone(tmp_path: Path, corpus: Path) -> None:
    unigram_folder(tmp_path, ["<unk>", "</s>", "a"])
    before = (tmp_path / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="was not made by train_tokenizer"):
        train_tokenizer(corpus, 400, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before


def test_max_bytes_per_file_limits_the_large_file(tmp_path: Path) -> None:
    """A large file may not own the vocabulary, and a single huge document is sampled too."""
    (tmp_path / "large.jsonl").write_text(json.dumps({"text": "".join(f"{i} zebra\n" for i in range(30_000))}) + "\n")
    (tmp_path / "small.jsonl").write_text(json.dumps({"text": "quagga " * 300}) + "\n")
    from data_tools.train_tokenizer import _sample

    sampled = {name: "".join(_sample(str(tmp_path / name), "text", 2e4)) for name in ("large.jsonl", "small.jsonl")}
    assert sampled["small.jsonl"] == "quagga " * 300
    assert 0.3e4 < len(sampled["large.jsonl"]) < 4e4


def test_training_errors(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="vocab_size is 100"):
        train_tokenizer(corpus, 100, tmp_path)
    with pytest.raises(ValueError, match=r"gives .* of 50000 tokens"):
        train_tokenizer(corpus, 50_000, tmp_path)
    with pytest.raises(ValueError, match="SentencePiece cannot train 50000 tokens"):
        train_tokenizer(corpus, 50_000, tmp_path, kind="sentencepiece")
    assert main(["--input", str(tmp_path / "absent.jsonl"), "--vocab-size", "400", "--out", str(tmp_path)]) == 1
    assert "absent.jsonl: no input there" in capsys.readouterr().err


def test_transformers_opens_what_we_trained(hf: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(str(hf)), load_tokenizer(hf)
    texts = TEXTS[:3]
    assert [theirs(text).input_ids for text in texts] == ours.encode_batch(texts)
    assert theirs.eos_token_id == ours.eod_id and len(theirs) == ours.vocab_size
