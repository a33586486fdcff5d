"""One face for the tokenizers that a shard may be made with, and how to find out which one a path means."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from data_tools.tokenizer_kinds import EOD_NAMES, BytesTokenizer, HuggingFaceTokenizer, Ids, SentencePieceTokenizer
from data_tools.tokenizer_tiktoken import TIKTOKEN_NAMES, TiktokenTokenizer

# Megatron's --tokenizer-type names, and one of ours that has no file behind it.
KINDS = (
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",  # the same files under Megatron's other name
    "GPT2BPETokenizer",
    "TikTokenizer",
    "bytes",
)


class Tokenizer(Protocol):
    """What preprocessing needs. `vocab_size` is the largest id + 1; `sha256` hashes what defines the ids."""

    name: str
    path: Path
    vocab_size: int
    eod_id: int | None
    sha256: str
    special_tokens: dict[str, int]  # spellings that this tokenizer could take for control tokens

    def encode_batch(self, texts: list[str]) -> Sequence[Ids]:
        """Ids of each text, without BOS or EOD. Text that spells a special token stays text unless that was allowed."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included."""
        ...

    def define_gigatoken(self) -> str:
        """What gigatoken needs to be the same tokenizer: a tokenizer.json, or JSON of how to read a .tiktoken file.

        Raises ValueError when gigatoken has nothing of the kind.
        """
        ...


def load_tokenizer(
    path: str | Path,
    kind: str = "auto",
    need_eod: bool = True,
    *,
    allow_special_tokens: bool = False,
    merge_file: str | None = None,
    tiktoken_pattern: str | None = None,
    tiktoken_num_special_tokens: int = 1000,
    vocab_size: int | None = None,
) -> Tokenizer:
    """Open a tokenizer: a file that defines one, a folder with such a file, a tiktoken encoding's name, or "bytes".

    `kind` is auto or one of KINDS. `allow_special_tokens` turns "<|endoftext|>" inside a document into that token. The
    last four are Megatron's flags: `merge_file` goes with a GPT-2 vocab.json; `tiktoken_pattern` (r50k, cl100k, o200k,
    v1, v2) is how a tiktoken file splits text, when its name does not say; the last two lay out Megatron's .json files.
    Raises ValueError when nothing readable is there, or when `need_eod` and no end-of-document token can be found.
    """
    if kind not in ("auto", *KINDS):
        raise ValueError(f"tokenizer type {kind!r} is not known; use auto, {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    file, found = _recognise(str(path), kind, merge_file)
    tokenizer: Tokenizer
    if found == "bytes":
        tokenizer = BytesTokenizer(allow_special_tokens)
    elif found == "TikTokenizer":
        tokenizer = TiktokenTokenizer(
            file, allow_special_tokens, tiktoken_pattern, tiktoken_num_special_tokens, vocab_size
        )
    elif found == "GPT2BPETokenizer":
        tokenizer = HuggingFaceTokenizer(file, allow_special_tokens, Path(merge_file or file.parent / "merges.txt"))
    elif found == "HuggingFaceTokenizer":
        tokenizer = HuggingFaceTokenizer(file, allow_special_tokens)
    else:
        tokenizer = SentencePieceTokenizer(file, allow_special_tokens)
    if need_eod and tokenizer.eod_id is None:
        raise ValueError(
            f"{file}: no end-of-document token: none of {', '.join(EOD_NAMES)} is in the vocabulary. Name yours as "
            f'{{"eos_token": "..."}} in {file.parent / "tokenizer_config.json"}, or use --no-append-eod'
        )
    return tokenizer


def _recognise(name: str, kind: str, merge_file: str | None) -> tuple[Path, str]:
    """The file that defines the tokenizer, and its kind."""
    path = Path(name)
    if kind == "bytes" or (name == "bytes" and not path.exists()):
        return Path("bytes"), "bytes"
    if name in TIKTOKEN_NAMES and kind in ("auto", "TikTokenizer") and not path.exists():
        return path, "TikTokenizer"
    if path.is_dir():
        return _look_into(path, kind)
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer; give a folder or file on this machine (nothing is downloaded)")
    if kind != "auto":
        return path, kind
    if path.suffix == ".tiktoken":
        return path, "TikTokenizer"
    if path.suffix != ".json":
        return path, "SentencePieceTokenizer"
    if merge_file or (path.name == "vocab.json" and (path.parent / "merges.txt").is_file()):
        return path, "GPT2BPETokenizer"
    return path, "TikTokenizer" if _starts_with_list(path) else "HuggingFaceTokenizer"


def _look_into(folder: Path, kind: str) -> tuple[Path, str]:
    """The first file in a folder that defines a tokenizer of this kind; tokenizer.json is preferred."""
    names = [
        ("HuggingFaceTokenizer", "tokenizer.json"),
        ("SentencePieceTokenizer", "tokenizer.model"),
        *[("SentencePieceTokenizer", p.name) for p in sorted(folder.glob("*.model"))],
        *[("TikTokenizer", p.name) for p in sorted(folder.glob("*.tiktoken"))],
        ("GPT2BPETokenizer", "vocab.json"),
    ]
    wanted = kind.removeprefix("GPT") if kind == "GPTSentencePieceTokenizer" else kind
    names = [(found, name) for found, name in names if wanted in ("auto", found)]
    for found, name in names:
        if (folder / name).is_file():
            return folder / name, found
    expected = " or ".join(dict.fromkeys(name for _, name in names)) or "*.tiktoken"
    raise ValueError(
        f"{folder}: no {expected} in this folder. An older "
        "Hugging Face tokenizer gets one from AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _starts_with_list(path: Path) -> bool:
    """Megatron's tiktoken vocabularies are a JSON list, a tokenizer.json is an object."""
    with open(path, "rb") as file:
        return file.read(64).lstrip().startswith(b"[")
