"""Makes an lm-evaluation-harness task of held-out text: which of four pieces goes on from here? No network, no labels.

    python data_tools/local_task.py --input 'data/valid_*.jsonl' --out tasks/
    python launch/evaluate.py runs/x --tokenizer tokenizer/ --include-path tasks/ --tasks local_wiki local_code
    lm_eval run --model hf --model_args pretrained=llama/ --include_path tasks/ --tasks local_wiki

One task a file, local_<name without valid_>: tasks/local_wiki.yaml beside its items, split into `train` (for few-shot
examples) and `test`, from different documents. The wrong pieces come from other documents of the file. The same input,
flags and seed give the same files, byte for byte; the YAML names them by absolute path: make it anew where you move it.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # so that `python data_tools/local_task.py` works from a clone without installing
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from data_tools.readers import SUFFIXES, expand_inputs, read_documents, sampling_hash
from megatron_lite.files import atomic_write

FEW_SHOT_ITEMS = 32  # more than any sensible --shots, so that examples vary from item to item
PER_DOCUMENT = 4  # items that one document gives at most
BOUNDARY = re.compile(r"(?<=\S) (?=\S)")  # a text is only cut at a single blank, so that no choice is told by its space


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="held-out text: files, globs or folders; a task each")
    parser.add_argument("--json-key", default="text", help="key of a document's text (default %(default)s)")
    parser.add_argument("--out", required=True, help="folder for the YAML and JSON lines")
    parser.add_argument("--items", type=int, default=500, help="test items a task, at most (default %(default)s)")
    parser.add_argument("--choices", type=int, default=4, help="pieces to choose from (default %(default)s)")
    parser.add_argument("--context-chars", type=int, default=300, help="text before the cut (default %(default)s)")
    parser.add_argument("--piece-chars", type=int, default=60, help="text of a piece (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other items (default %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 2 a mistake in the request or the text."""
    args = build_parser().parse_args(argv)
    try:
        if min(args.items, args.choices - 1, args.context_chars, args.piece_chars) < 1:
            raise ValueError("--items, --context-chars and --piece-chars must be positive, --choices at least 2")
        for file in expand_inputs(args.input):
            write_task(file, args)
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def write_task(file: str, args: argparse.Namespace) -> None:
    """One input file -> local_<name>.yaml, .train.jsonl and .test.jsonl."""
    out, name = Path(args.out).resolve(), f"local_{task_name(file)}"
    out.mkdir(parents=True, exist_ok=True)
    items = make_items(file, args)
    for split, rows in items.items():
        atomic_write(out / f"{name}.{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    atomic_write(out / f"{name}.yaml", yaml.safe_dump(task_config(name, out), sort_keys=False))
    print(f"{name}: {len(items['test'])} items, {len(items['train'])} examples for few-shot prompts; {out}/{name}.yaml")


def task_name(file: str) -> str:
    """wiki for data/valid_wiki.jsonl.gz; what is not a letter, a digit or one of ._- becomes _."""
    stem = Path(file).name
    stem = next(
        stem.removesuffix(suffix) for suffix in sorted(SUFFIXES, key=len, reverse=True) if stem.endswith(suffix)
    )
    return re.sub(r"[^\w.-]", "_", stem.removeprefix("valid_"), flags=re.ASCII)


def task_config(name: str, folder: Path) -> dict[str, Any]:
    """What lm-evaluation-harness reads: a multiple choice with acc, and acc_norm by the pieces' bytes."""
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {s: str(folder / f"{name}.{s}.jsonl") for s in ("train", "test")}},
        "output_type": "multiple_choice",
        "training_split": "train",
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "target_delimiter": " ",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }


def make_items(file: str, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """split -> rows of {context, choices, label}."""
    texts = set(read_documents([file], args.json_key))
    texts_in_order = sorted(texts, key=lambda t: sampling_hash(t.encode(), f"local task {args.seed}"))
    found = [list(cut_passages(text, args.context_chars, args.piece_chars)) for text in texts_in_order]
    count = Counter(piece for document in found for _, piece in document)  # what is said twice answers two questions
    once = [[(context, piece) for context, piece in document if count[piece] == 1] for document in found]
    passages = [document for document in once if document]
    wanted = min(FEW_SHOT_ITEMS, sum(map(len, passages)) // 4)  # of a small file, about a quarter
    first = 0
    while first < len(passages) and (first < args.choices or sum(map(len, passages[:first])) < wanted):
        first += 1
    splits = {"train": (passages[:first], FEW_SHOT_ITEMS), "test": (passages[first:], args.items)}
    if min(len(documents) for documents, _ in splits.values()) < args.choices:
        raise ValueError(
            f"{file}: {len(passages)} documents are longer than {args.context_chars} + {args.piece_chars} characters, "
            f"too few for {args.choices} choices from different ones; add text, or lower --context-chars"
        )
    rows = {}
    for split, (documents, most) in splits.items():
        rng = random.Random(f"{args.seed} {split}")
        rows[split] = [make_item(documents, d, i, args.choices, rng) for d, i in in_turn(documents)[:most]]
    return rows


def in_turn(documents: Sequence[Sequence[Any]]) -> list[tuple[int, int]]:
    """(document, passage): every document's first passage, then every second one, ..."""
    return sorted(((d, i) for d, found in enumerate(documents) for i in range(len(found))), key=lambda x: (x[1], x[0]))


def make_item(
    documents: Sequence[Sequence[tuple[str, str]]], d: int, i: int, choices: int, rng: random.Random
) -> dict[str, Any]:
    """The true piece among pieces of other documents, in random order."""
    context, piece = documents[d][i]
    others = rng.sample([n for n in range(len(documents)) if n != d], choices - 1)
    pieces = [piece, *(rng.choice(documents[n])[1] for n in others)]
    order = rng.sample(range(choices), choices)
    return {"context": context, "choices": [pieces[n] for n in order], "label": order.index(0)}


def cut_passages(text: str, context_chars: int, piece_chars: int) -> Iterator[tuple[str, str]]:
    """(context, piece) pairs, one after the other; a passage without a blank near its cuts is left out."""
    start = 0
    for _ in range(PER_DOCUMENT):
        cut = BOUNDARY.search(text, start + context_chars)
        end = BOUNDARY.search(text, cut.end() + piece_chars) if cut else None
        if cut is None or end is None:
            return
        if cut.end() - start <= 2 * context_chars and end.start() - cut.end() <= 2 * piece_chars:
            yield text[start : cut.start()].lstrip(), text[cut.end() : end.start()]
        start = end.end()


if __name__ == "__main__":
    sys.exit(main())
