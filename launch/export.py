"""Takes weights to Hugging Face and back.

    python launch/export.py runs/x --out llama/ --tokenizer tokenizer/            # the newest complete checkpoint
    python launch/export.py runs/x/step_0001000 --out llama/ --tokenizer tokenizer/ --dtype bf16
    hf upload ORG/MODEL llama/                                                   # publishes it (huggingface_hub)
    python launch/export.py --from-hf llama/ --out imported/                     # a checkpoint of ours, at step 0

An export is compared with transformers before it gets its name. Exit codes: 0 done, 2 a mistake in the request or a
folder that cannot be represented.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # so that `python launch/export.py` works from a clone without installing
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_tools.tokenizer import Tokenizer, load_tokenizer
from data_tools.tokenizer_kinds import SentencePieceTokenizer
from launch.card import CardOptions, write_card
from megatron_lite.checkpoint import save_checkpoint
from megatron_lite.hf import TokenizerFiles, export_hf
from megatron_lite.weights import Weights, read_weights

PROBES = ("Hello world", " two  spaces\n\ttab", "na\u00efve \u6771\u4eac", "def f(x): return x**2  # 1,234.5")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="a step_* folder, or a run folder: its newest complete one")
    parser.add_argument("--from-hf", metavar="DIR", help="read this Hugging Face Llama folder and write a checkpoint")
    parser.add_argument("--out", required=True, help="folder to make; it must not exist, or be empty")
    parser.add_argument("--tokenizer", help="folder or file of the tokenizer that made the shards; checked by its hash")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="fp32 (as trained) or bf16 (rounded)")
    parser.add_argument("--name", default="", help="title of the card, such as ORG/MODEL; default: the run's name")
    parser.add_argument("--license", help="of the weights, as the Hub spells it (mit, apache-2.0); default: not said")
    parser.add_argument(
        "--dataset", action="append", default=[], metavar="ORG/NAME", help="for the card: data on the Hub; repeatable"
    )
    parser.add_argument(
        "--evaluation",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="for the card: evaluation.json of launch/evaluate.py (default: RUN/evaluation/), or the harness's results",
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare logits with transformers")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        if (args.checkpoint is None) == (args.from_hf is None):
            raise ValueError("name one thing: a checkpoint to export, or --from-hf DIR to import")
        return import_folder(args) if args.from_hf else export_checkpoint(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def export_checkpoint(args: argparse.Namespace) -> int:
    """Checkpoint -> Hugging Face folder, and what was done on the console."""
    weights = read_weights(args.checkpoint)
    tokenizer = read_tokenizer(args.tokenizer, weights) if args.tokenizer else None
    facts, verify = weights.tokenizer, not args.no_verify
    options = CardOptions(args.name, args.license, bool(tokenizer), tuple(args.dataset), tuple(args.evaluation))
    worst = export_hf(
        weights.tensors,
        weights.shape,
        args.out,
        tokenizer,
        facts,
        args.dtype,
        verify,
        str(weights.source),
        write_card(weights, args.dtype, options),
    )
    size = tokenizer.vocab_size if tokenizer else facts.get("vocab_size") or weights.shape.vocab_size
    cut = f" (of the model's {weights.shape.vocab_size:,})" if size < weights.shape.vocab_size else ""
    print(f"{weights.source} -> {args.out}: Llama, vocabulary {size:,}{cut}, {args.dtype}")
    if tokenizer:
        print(
            f"tokenizer: {tokenizer.path}; bos = eos = {tokenizer.eod_token!r} ({tokenizer.eod_id}), neither is added"
        )
    else:
        print("tokenizer: none written; name the one that made the shards with --tokenizer")
    if worst is not None:
        print(f"verified: transformers' fp32 logits differ from ours by at most {worst:.1e}")
    elif verify:
        print("NOT verified: comparing logits needs transformers: pip install 'megatron_lite[hf]'")
    return 0


def import_folder(args: argparse.Namespace) -> int:
    """Hugging Face folder -> checkpoint of step 0 for ``init_from``; nothing resumes from it, it has no moments."""
    weights, out = read_weights(args.from_hf), Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not an empty folder; name another, or delete it")
    facts = tokenizer_facts(load_tokenizer(args.tokenizer)) if args.tokenizer else weights.tokenizer
    state = {"plan": {"shape": dataclasses.asdict(weights.shape)}, "tokenizer": facts, "source": str(weights.source)}
    temp = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    save_checkpoint(temp, 0, weights.tensors, {}, state, keep=1).rename(out)
    temp.rmdir()
    print(f"{args.from_hf} -> {out}: {weights.shape.params:,} parameters, vocabulary {weights.shape.vocab_size:,}")
    print(f"start a run from it: launch/pretrain.py ... --set init_from={out}")
    return 0


def read_tokenizer(path: str, weights: Weights) -> TokenizerFiles:
    """Opens the tokenizer; ValueError when the shards behind the checkpoint were made with another one."""
    tokenizer = load_tokenizer(path)
    for key, found in tokenizer_facts(tokenizer).items():
        if weights.tokenizer.get(key) not in (None, found):
            raise ValueError(
                f"{tokenizer.path}: {key} is {found}, {weights.source} was trained with {weights.tokenizer[key]}: "
                "not the tokenizer that made its shards"
            )
    assert tokenizer.eod_id is not None  # load_tokenizer refuses one without
    if not isinstance(tokenizer, SentencePieceTokenizer) and not getattr(tokenizer, "is_tokenizer_json", False):
        raise ValueError(f"{tokenizer.path}: only a tokenizer.json or a SentencePiece *.model can be exported")
    probes = [(text, list(ids)) for text, ids in zip(PROBES, tokenizer.encode_batch(list(PROBES)), strict=True)]
    facts = (tokenizer.path, tokenizer.vocab_size, tokenizer.eod_id)
    if tokenizer.path.suffix == ".json":
        return TokenizerFiles(*facts, tokenizer.decode([tokenizer.eod_id]), probes)
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    dummy_prefix = model.encode("a", out_type=str)[0].startswith("\u2581")
    return TokenizerFiles(*facts, str(model.id_to_piece(tokenizer.eod_id)), probes, dummy_prefix)


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, object]:
    """What a checkpoint's state.json says about its tokenizer."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "tokenizer_sha256": tokenizer.sha256,
    }


if __name__ == "__main__":
    sys.exit(main())
