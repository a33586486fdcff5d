"""The kinds of tokenizer, each by the library that made it popular and by no other: nothing is downloaded or run.

In all of them a document that spells a special token, "<|endoftext|>" say, is encoded as the characters that it is,
unless special tokens were allowed. Megatron turns such text into control tokens.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = list[int] | npt.NDArray[Any]

# Names that end a document in the tokenizers people use, tried in this order when no config names one.
EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


class HuggingFaceTokenizer:
    """A tokenizer.json, or GPT-2's vocab.json and merges.txt, run by the `tokenizers` library alone."""

    def __init__(self, path: Path, allow_special_tokens: bool = False, merges: Path | None = None) -> None:
        from tokenizers import Tokenizer as Backend

        self.path, self.name, self._allow = path, path.absolute().parent.name, allow_special_tokens
        self.is_tokenizer_json = merges is None
        self.sha256 = _sha256(path) if merges is None else _sha256(path, merges)
        try:
            self._backend = Backend.from_file(str(path)) if merges is None else _gpt2(path, merges)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer.json that `tokenizers` can read ({error})") from error
        self._backend.no_padding()
        self._backend.no_truncation()
        # True reads "<|endoftext|>" inside a document as the characters that it is; Megatron turns it into EOD.
        self._backend.encode_special_tokens = not allow_special_tokens
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.special_tokens = {t.content: i for i, t in self._backend.get_added_tokens_decoder().items()}
        self.eod_id = self._find_eod()

    def _find_eod(self) -> int | None:
        for config_name in ("tokenizer_config.json", "special_tokens_map.json"):
            config_path = self.path.parent / config_name
            token = _read_object(config_path).get("eos_token") if config_path.is_file() else None
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
        return batch if self._allow else _keep_text_as_text(texts, batch, self.eod_id, self._spell_out_eod)

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

    def define_gigatoken(self) -> str:
        definition = self.path.read_bytes() if self.is_tokenizer_json else self._backend.to_str()
        return _without_special(definition, self._allow)


class SentencePieceTokenizer:
    """A SentencePiece *.model file."""

    def __init__(self, path: Path, allow_special_tokens: bool = False) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise ValueError(f"{path}: reading a SentencePiece model needs `pip install sentencepiece`") from error

        self.path, self._allow = path, allow_special_tokens
        self.name = path.stem if path.stem != "tokenizer" else path.absolute().parent.name
        self.sha256 = _sha256(path)
        try:
            self._backend = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path}: not a SentencePiece model ({error})") from error
        self.vocab_size = self._backend.vocab_size()
        self.eod_id = self._find_eod()
        control = [i for i in range(self.vocab_size) if self._backend.is_control(i) or i == self.eod_id]
        self.special_tokens = {self._backend.id_to_piece(i): i for i in control}

    def _find_eod(self) -> int | None:
        if self._backend.eos_id() >= 0:
            return self._backend.eos_id()
        ids = {name: self._backend.piece_to_id(name) for name in EOD_NAMES}
        return next((i for name, i in ids.items() if self._backend.id_to_piece(i) == name), None)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self._allow:  # the library itself never reads control tokens out of text
            return [_read_special_tokens(text, self.special_tokens, self._backend.encode) for text in texts]
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

    def define_gigatoken(self) -> str:
        import gigatoken

        return _without_special(gigatoken.Tokenizer.from_sentencepiece(self.path)._hf_json, self._allow)


class BytesTokenizer:
    """UTF-8 bytes as they are; 256 ends a document."""

    name, path, vocab_size = "bytes", Path("bytes"), 257
    eod_id: int | None = 256
    sha256 = hashlib.sha256(b"bytes, 256 is EOD").hexdigest()

    def __init__(self, allow_special_tokens: bool = False) -> None:
        self._allow, self.special_tokens = allow_special_tokens, {EOD_NAMES[0]: 256}

    def encode_batch(self, texts: list[str]) -> Sequence[Ids]:
        if self._allow:
            return [_read_special_tokens(t, self.special_tokens, lambda part: list(part.encode())) for t in texts]
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        spelled = (EOD_NAMES[0].encode() if i == self.eod_id else bytes([i]) for i in ids)
        return b"".join(spelled).decode(errors="replace")

    def define_gigatoken(self) -> str:
        raise ValueError("bytes need no tokenizer")


def _gpt2(vocab: Path, merges: Path) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(EOD_NAMES[0]) is not None:
        backend.add_special_tokens([AddedToken(EOD_NAMES[0], normalized=False, special=True)])
    return backend


def _without_special(definition: str | bytes | None, allow_special_tokens: bool) -> str:
    """gigatoken always reads special tokens out of text, so it is not told of any, unless they are wanted."""
    raw = json.loads(definition or "{}")
    if not allow_special_tokens:
        raw["added_tokens"] = [token for token in raw["added_tokens"] if not token["special"]]
    return json.dumps(raw)


def _read_special_tokens(text: str, special: dict[str, int], encode: Callable[[str], list[int]]) -> list[int]:
    """Ids of a text in which special tokens are recognised, the longest spelling first."""
    names = sorted(special, key=len, reverse=True)
    ids: list[int] = []
    for i, part in enumerate(re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]):
        ids += [special[part]] if i % 2 else encode(part) if part else []
    return ids


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


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def _sha256(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
