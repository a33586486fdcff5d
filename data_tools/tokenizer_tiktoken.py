"""tiktoken vocabularies: OpenAI's files, Megatron's JSON form of them, and encodings known by name."""

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from data_tools.tokenizer_kinds import EOD_NAMES

TIKTOKEN_NAMES = ("gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base")
# What a .tiktoken file does not hold; from tiktoken_ext/openai_public.py 0.14: how text is split, and special tokens.
TIKTOKEN_SPECIAL = {
    "r50k": {"<|endoftext|>": 50256},
    "cl100k": {
        "<|endoftext|>": 100257,
        "<|fim_prefix|>": 100258,
        "<|fim_middle|>": 100259,
        "<|fim_suffix|>": 100260,
        "<|endofprompt|>": 100276,
    },
    "o200k": {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
}
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+", rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
TIKTOKEN_PATTERNS = {
    "r50k": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": rf"{_WORD[0]}{_SUFFIX}|{_WORD[1]}{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # The next two: megatron/core/tokenizers/text/libraries/tiktoken_tokenizer.py 0.16.
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": rf"{_WORD[0]}|{_WORD[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
MEGATRON_SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")  # the same file
MEGATRON_VOCAB_SIZE = 1 << 17


class TiktokenTokenizer:
    """A *.tiktoken file, Megatron's .json form of one, or an encoding that `tiktoken` knows by name."""

    def __init__(
        self,
        path: Path,
        allow_special_tokens: bool = False,
        pattern: str | None = None,
        num_special_tokens: int = 1000,
        vocab_size: int | None = None,
    ) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise ValueError(f"{path}: a tiktoken vocabulary needs `pip install tiktoken`") from error

        self.path, self.name, self._allow = path, path.stem, allow_special_tokens
        self._scheme = pattern or {"gpt2": "r50k", "p50k_base": "r50k"}.get(path.stem, path.stem.removesuffix("_base"))
        if path.suffix == ".json":
            self._scheme = pattern or "v2"  # Megatron's default
            room = (vocab_size or MEGATRON_VOCAB_SIZE) - num_special_tokens
            ranks = {token: i + num_special_tokens for i, token in enumerate(_read_megatron_ranks(path)[:room])}
            fillers = [f"<SPECIAL_{i}>" for i in range(len(MEGATRON_SPECIAL), num_special_tokens)]
            special = {token: i for i, token in enumerate([*MEGATRON_SPECIAL, *fillers])}
        elif path.is_file():
            ranks = _read_tiktoken_ranks(path)
            special = {} if pattern else TIKTOKEN_SPECIAL.get(self._scheme, {})
            special = special or {"<|endoftext|>": max(ranks.values()) + 1}
        else:
            try:
                self._backend = tiktoken.get_encoding(str(path))
            except Exception as error:  # requests' own, when there is no network and no cached copy
                raise ValueError(f"{path}: tiktoken could not fetch it ({error}); give its .tiktoken file") from error
            ranks, special = self._backend._mergeable_ranks, self._backend._special_tokens
        self._ranks, self.special_tokens = ranks, dict(special)
        if path.is_file():
            if self._scheme not in TIKTOKEN_PATTERNS:
                names = ", ".join(TIKTOKEN_PATTERNS)
                raise ValueError(f"{path}: its name does not say how it splits text: --tiktoken-pattern {names}")
            self._backend = tiktoken.Encoding(
                path.stem, pat_str=TIKTOKEN_PATTERNS[self._scheme], mergeable_ranks=ranks, special_tokens=special
            )
        content = path.read_bytes() if path.is_file() else b"".join(ranks)
        self.sha256 = hashlib.sha256(content + self._backend._pat_str.encode()).hexdigest()
        self.vocab_size = self._backend.max_token_value + 1
        self.eod_id = next((special[name] for name in EOD_NAMES if name in special), None)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self._allow:
            return self._backend.encode_batch(texts, num_threads=1, allowed_special="all")
        return self._backend.encode_ordinary_batch(texts, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids])

    def define_gigatoken(self) -> str:
        scheme = {"r50k": "gpt2", "cl100k": "gpt4", "o200k": "o200k"}.get(self._scheme)
        if scheme is None or self.path.suffix != ".tiktoken":
            raise ValueError(f"gigatoken does not read {self.path.name} with pattern {self._scheme}")
        special = self.special_tokens if self._allow else {}
        return json.dumps({"tiktoken": [str(self.path), scheme, special]})


def _read_tiktoken_ranks(path: Path) -> dict[bytes, int]:
    """tiktoken's own reader keeps a copy under the file's name, and would miss that the file has changed."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"{path}: not a tiktoken file: a line is a base64 token and its rank ({error})") from error


def _read_megatron_ranks(path: Path) -> list[bytes]:
    try:
        return [base64.b64decode(entry["token_bytes"]) for entry in json.loads(path.read_bytes())]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not Megatron's tiktoken list of token_bytes ({error!r})") from error
