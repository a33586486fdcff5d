"""One face for the tokenizers that a shard may be made with: a Hugging Face tokenizer.json or a SentencePiece model."""

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

# Names that end a document in the tokenizers people use, tried in this order when no config names one.
EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


class Tokenizer(Protocol):
    """What preprocessing needs. `vocab_size` is the largest id + 1; `sha256` hashes the file that defines the ids."""

    name: str
    path: Path
    vocab_size: int
    eod_id: int | None
    sha256: str

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without BOS or EOD. Text that spells a special token stays text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included."""
        ...


class HuggingFaceTokenizer:
    """A tokenizer.json, run by the `tokenizers` library alone: no transformers, no remote code."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        self.path = path
        self.name = path.parent.name
        self.sha256 = _sha256(path)
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer.json that `tokenizers` can read ({error})") from error
        self._backend.no_padding()
        self._backend.no_truncation()
        # True reads "<|endoftext|>" inside a document as the characters that it is; Megatron turns it into EOD.
        self._backend.encode_special_tokens = True
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.eod_id = self._find_eod()

    def _find_eod(self) -> int | None:
        for config_name in ("tokenizer_config.json", "special_tokens_map.json"):
            config_path = self.path.parent / config_name
            token = _read_json(config_path).get("eos_token") if config_path.is_file() else None
            token = token.get("content") if isinstance(token, dict) else token
            if token is None:
                continue
            token_id = self._backend.token_to_id(token)
            if token_id is None:
                raise ValueError(f"{config_path}: eos_token {token!r} is not in the vocabulary of {self.path}")
            return token_id
        return next((i for i in map(self._backend.token_to_id, EOD_NAMES) if i is not None), None)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        batch = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        return _keep_text_as_text(texts, batch, self.eod_id, self._spell_out_eod)

    def _spell_out_eod(self, text: str) -> list[int]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids: list[int] = []
        for token_id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            characters = text[begin:end] if token_id == self.eod_id else ""
            spelled = [self._backend.encode(character, add_special_tokens=False).ids for character in characters]
            ids += chain.from_iterable(spelled) if characters else [token_id]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)


class SentencePieceTokenizer:
    """A SentencePiece *.model file."""

    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise ValueError(f"{path}: reading a SentencePiece model needs `pip install sentencepiece`") from error

        self.path = path
        self.name = path.stem if path.stem != "tokenizer" else path.parent.name
        self.sha256 = _sha256(path)
        try:
            self._backend = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path}: not a SentencePiece model ({error})") from error
        self.vocab_size = self._backend.vocab_size()
        self.eod_id = self._find_eod()

    def _find_eod(self) -> int | None:
        if self._backend.eos_id() >= 0:
            return self._backend.eos_id()
        ids = {name: self._backend.piece_to_id(name) for name in EOD_NAMES}
        return next((i for name, i in ids.items() if self._backend.id_to_piece(i) == name), None)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        batch = self._backend.encode(texts, num_threads=1)
        return _keep_text_as_text(texts, batch, self.eod_id, self._spell_out_eod)

    def _spell_out_eod(self, text: str) -> list[int]:
        assert self.eod_id is not None
        piece = self._backend.id_to_piece(self.eod_id)
        parts: list[str] = []
        for part in text.split(piece):
            parts += [*(piece if parts else ""), part]
        return list(chain.from_iterable(self._backend.encode(parts, num_threads=1)))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode([int(i) for i in ids]))


def load_tokenizer(path: str | Path, kind: str = "auto", need_eod: bool = True) -> Tokenizer:
    """Open a tokenizer: a folder with tokenizer.json or tokenizer.model, or one of these files itself.

    `kind` is auto, HuggingFaceTokenizer or SentencePieceTokenizer (Megatron's names); auto prefers tokenizer.json.
    Raises ValueError when nothing readable is there, or when `need_eod` and no end-of-document token can be found.
    """
    kinds: dict[str, type[HuggingFaceTokenizer] | type[SentencePieceTokenizer]] = {
        "HuggingFaceTokenizer": HuggingFaceTokenizer,
        "SentencePieceTokenizer": SentencePieceTokenizer,
    }
    if kind not in ("auto", *kinds):
        raise ValueError(f"tokenizer type {kind!r} is not known; use auto, {' or '.join(kinds)}")
    file = _definition_file(Path(path), kind)
    found = kind if kind != "auto" else next(iter(kinds)) if file.suffix == ".json" else "SentencePieceTokenizer"
    tokenizer = kinds[found](file)
    if need_eod and tokenizer.eod_id is None:
        raise ValueError(
            f"{file}: no end-of-document token: none of {', '.join(EOD_NAMES)} is in the vocabulary. Name yours as "
            f'{{"eos_token": "..."}} in {file.parent / "tokenizer_config.json"}, or use --no-append-eod'
        )
    return tokenizer


def _definition_file(path: Path, kind: str) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such tokenizer; give a folder or file on this machine (nothing is downloaded)")
    candidates = [] if kind == "SentencePieceTokenizer" else [path / "tokenizer.json"]
    candidates += [] if kind == "HuggingFaceTokenizer" else [path / "tokenizer.model", *sorted(path.glob("*.model"))]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ValueError(
        f"{path}: no {' or '.join(dict.fromkeys(c.name for c in candidates))} in this folder. An older Hugging Face "
        "tokenizer gets one from AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _keep_text_as_text(
    texts: list[str], batch: list[list[int]], eod_id: int | None, spell_out_eod: Callable[[str], list[int]]
) -> list[list[int]]:
    """Spell out, character by character, every EOD that came from the characters of a text.

    Needed where the library alone does not do it: Unigram vocabularies that hold "</s>" as an ordinary piece,
    an EOD that is an added token without the special flag, normalisers that fold other characters into it.
    """
    for number, ids in enumerate(batch):
        if eod_id in ids:
            batch[number] = spell_out_eod(texts[number])
            if eod_id in batch[number]:
                raise ValueError(f"token {eod_id} is end-of-document and also spells ordinary text: choose another EOD")
    return batch


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
