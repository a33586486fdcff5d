"""Train a small BPE tokenizer on a corpus: Hugging Face byte-level (tokenizer.json) or SentencePiece (tokenizer.model).

    python data_tools/train_tokenizer.py --input 'corpus/train_*.jsonl' --vocab-size 8192 --out tokenizer/

The same text and settings give the same tokenizer on any machine. Both kinds are lossless: decode(encode(text)) is the
text, whitespace and rare characters included. A second run with the same inputs and settings does nothing.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: python data_tools/train_tokenizer.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_tools.readers import SUFFIXES, expand_inputs, fingerprint, read_documents, sampling_hash
from data_tools.tokenizer import load_tokenizer
from megatron_lite.files import atomic_write, atomic_write_json

VERSION = 1  # raise it when the same text would give another tokenizer
EOD = "<|endoftext|>"
SETTINGS_FILE = "training.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
SAMPLE_BLOCK = 4096  # characters: small enough that one huge document is sampled too, large enough to keep context
# 256 bytes and the special tokens; SentencePiece also needs room for the characters that it must cover.
MIN_VOCAB_SIZE = 300


def train_tokenizer(
    inputs: Sequence[str | Path] | str | Path,
    vocab_size: int,
    out_dir: str | Path,
    kind: str = "hf",
    max_bytes_per_file: float | None = 4e6,
    json_key: str = "text",
    on_bad_line: str = "error",
) -> Path:
    """Write a tokenizer folder and return it; a folder that these inputs and settings already made is left as it is.

    `kind` is hf or sentencepiece. At most about `max_bytes_per_file` UTF-8 bytes of each file are used, drawn from all
    over the file by content hash, so that a large domain does not own the vocabulary; None uses everything.
    """
    if kind not in ("hf", "sentencepiece"):
        raise ValueError(f"tokenizer kind is {kind!r}; it is hf or sentencepiece")
    if max_bytes_per_file is not None and not 0 < max_bytes_per_file < float("inf"):
        raise ValueError(f"max_bytes_per_file is {max_bytes_per_file}; it must be a positive number of bytes, or None")
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size}; byte-level BPE needs at least {MIN_VOCAB_SIZE}")
    if on_bad_line not in ("error", "skip"):
        raise ValueError(f"on_bad_line is {on_bad_line!r}; it is error or skip")
    out = Path(out_dir)
    files = expand_inputs([inputs] if isinstance(inputs, str | Path) else inputs)
    settings = {
        "version": VERSION,
        "kind": kind,
        "vocab_size": vocab_size,
        "max_bytes_per_file": max_bytes_per_file,
        "json_key": json_key,
        "sources": [{"size": s["size"], "xxh3_128": s["xxh3_128"]} for s in fingerprint(files)],
    }
    if _is_done(out, settings):
        return out
    _claim(out, settings)
    documents = (text for path in files for text in _sample(path, json_key, max_bytes_per_file, on_bad_line))
    if kind == "hf":
        _train_hf(documents, vocab_size, out)
    else:
        _train_sentencepiece(documents, vocab_size, out)
    found = load_tokenizer(out).vocab_size
    if found != vocab_size:
        for name in TOKENIZER_FILES:  # nobody should use it by mistake
            (out / name).unlink(missing_ok=True)
        raise ValueError(
            f"{out}: the text only gives {found} of {vocab_size} tokens; use more text or a smaller vocabulary"
        )
    atomic_write_json(out / SETTINGS_FILE, {**settings, "tokenizer_sha256": load_tokenizer(out).sha256})
    return out


def _is_done(out: Path, settings: dict[str, Any]) -> bool:
    try:
        recorded = json.loads((out / SETTINGS_FILE).read_bytes())
        return bool(recorded == {**settings, "tokenizer_sha256": load_tokenizer(out).sha256})
    except (OSError, ValueError):  # nothing there yet, or damaged: train again
        return False


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Empty the folder of an earlier tokenizer of ours, and mark it as ours; a tokenizer from elsewhere stays safe."""
    old = [out / name for name in TOKENIZER_FILES if (out / name).exists()]
    if old and not (out / SETTINGS_FILE).exists():
        raise ValueError(f"{old[0]} was not made by train_tokenizer; choose another folder or delete it yourself")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_json(out / SETTINGS_FILE, settings)
    for path in old:
        path.unlink()


def _sample(path: str, json_key: str, max_bytes: float | None, on_bad_line: str = "error") -> Iterator[str]:
    """The text of a file; when it has more than `max_bytes`, about that much in blocks drawn by keyed hash."""
    keep = 1.0
    if max_bytes is not None:
        keep = max_bytes / max(1, sum(len(text.encode()) for text in read_documents([path], json_key, on_bad_line)))
    for text in read_documents([path], json_key, on_bad_line):
        if keep >= 1.0:
            yield text
            continue
        for start in range(0, len(text), SAMPLE_BLOCK):
            block = text[start : start + SAMPLE_BLOCK]
            if sampling_hash(block.encode(), "tokenizer") < keep:
                yield block


def _train_hf(documents: Iterator[str], vocab_size: int, out: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOD,
        "eos_token": EOD,
        "unk_token": EOD,
        "clean_up_tokenization_spaces": False,
    }
    atomic_write_json(out / "tokenizer_config.json", config)
    atomic_write(out / "tokenizer.json", tokenizer.to_str(pretty=True))


def _train_sentencepiece(documents: Iterator[str], vocab_size: int, out: Path) -> None:
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError("a SentencePiece tokenizer needs `pip install sentencepiece`") from error

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=documents,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            # Lossless: no Unicode folding, no squeezed or added spaces, runs of spaces may become tokens.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 30,  # bytes; the default 4,192 silently drops longer documents
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"SentencePiece cannot train {vocab_size} tokens on this text: {error}") from error
    atomic_write(out / "tokenizer.model", model.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help=f"files, globs or folders; endings: {' '.join(SUFFIXES)}")
    add("--vocab-size", type=int, required=True, help="tokens, special ones included")
    add("--out", required=True, help="folder to write")
    add("--type", choices=("hf", "sentencepiece"), default="hf")
    add("--max-bytes-per-file", type=float, default=4e6, help="UTF-8 bytes of text taken from each file")
    add("--json-key", default="text", help="key (parquet: column) that holds text")
    add("--on-bad-line", choices=("error", "skip"), default="error", help="skip leaves bad lines out")
    args = parser.parse_args(argv)
    try:
        out = train_tokenizer(
            args.input, args.vocab_size, args.out, args.type, args.max_bytes_per_file, args.json_key, args.on_bad_line
        )
        tokenizer = load_tokenizer(out)
    except ValueError as error:
        print(f"train_tokenizer: error: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {tokenizer.vocab_size:,} tokens, EOD {tokenizer.eod_id}, sha256 {tokenizer.sha256[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
