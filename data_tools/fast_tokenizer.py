"""gigatoken in place of a tokenizer's own library, as long as both give the same ids: 40 to 100 times faster.

It is trusted after a check and kept under one: odd texts and a sample of the corpus before the first shard, then one
document in every 16 MiB. What it cannot load or encodes otherwise goes to the tokenizer's own library.
"""

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from data_tools.tokenizer import Tokenizer

BACKENDS = ("auto", "gigatoken", "native")
SAMPLE_CHARACTERS = 1 << 16  # of corpus text, checked before the first document is written: 0.03 s of `tokenizers`
CHECK_CHARACTERS = 2048  # the longest document that is checked in passing
# Where tokenizers differ: spaces at ends and in runs, line ends, contractions, digits, marks, scripts, NUL, emoji.
PROBES = (
    "  two  spaces\n\n\ttab\r\n   ",
    " " * 300 + "x" + "\n" * 70 + "\t" * 33,
    "I'll don't WE'RE they\u2019ve 'S",
    "1 12 123 1234567890 3.14e-10 0x1F \u00b2\u0663\u0967",
    "e\u0301 \u00e9 \u1e9b\u0323 \ufb01 \u212b \uff21\u3000\u00a0\u200b\u2028\ufeff",
    "\u6f22\u5b57\u304b\u306a\ud55c\uae00 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U00010000\x00\x01\x7f\x85",
    "def f(x_1):\n    return {'a': [x_1]*2}  # \u2192 ok!?\n",
    "a" * 500 + "Ab" * 200,
    "\u2581x \u2581\u2581 <0x0A> <0x41>",
)


def choose_backend(
    tokenizer: Tokenizer, texts: Iterable[str], wanted: str, allow_special_tokens: bool = False
) -> tuple[str, str]:
    """gigatoken's definition of this tokenizer and "", or "" and why not, after a comparison on the texts.

    `wanted` is one of BACKENDS; with "gigatoken" the reason why not is a ValueError.
    """
    if wanted not in BACKENDS:
        raise ValueError(f"backend is {wanted!r}; it is {', '.join(BACKENDS)}")
    if wanted == "native" or tokenizer.name == "bytes":
        return "", ""
    definition = ""
    try:
        definition = tokenizer.define_gigatoken()
        why = _difference(tokenizer, build_gigatoken(definition), texts, allow_special_tokens)
    except (KeyboardInterrupt, SystemExit):
        raise
    except ImportError:
        why = "gigatoken is not installed: pip install 'megatron_lite[fast]' is 40 times faster"
    except BaseException as error:  # a panic in Rust is no Exception
        why = " ".join(str(error).split())[:300] or type(error).__name__
    if why and wanted == "gigatoken":
        raise ValueError(f"{tokenizer.path}: --backend gigatoken: {why}")
    return ("", why) if why else (definition, "")


@lru_cache(maxsize=1)  # the check, then the encoding, use the same
def build_gigatoken(definition: str) -> Any:
    """A gigatoken backend from Tokenizer.define_gigatoken()."""
    import gigatoken

    if definition.startswith('{"tiktoken"'):
        return gigatoken.Tokenizer.from_tiktoken(*json.loads(definition)["tiktoken"]).backend
    return gigatoken.Tokenizer.from_json(definition).backend


def same_ids(tokenizer: Tokenizer, text: str, ids: Any) -> bool:
    """Whether the tokenizer's own library gives these ids to a text."""
    return np.array_equal(np.asarray(tokenizer.encode_batch([text])[0], dtype=np.int64), ids)


def _difference(tokenizer: Tokenizer, fast: Any, texts: Iterable[str], allow_special_tokens: bool) -> str:
    special = list(tokenizer.special_tokens)[:16]
    spelled = [text for name in special for text in (name, f"a{name}b", f"x {name} {name}\n")]
    for text in (*PROBES, *spelled, *texts):
        ids = fast.encode(text)
        if not allow_special_tokens and tokenizer.eod_id is not None and tokenizer.eod_id in ids:
            continue  # encode_chunk gives such a document to the tokenizer's own library
        if not same_ids(tokenizer, text, ids):
            return f"gigatoken gives other ids for {text[:40]!r}"
    return ""
