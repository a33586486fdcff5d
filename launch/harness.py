"""lm-evaluation-harness on a Hugging Face folder: RegMix's tasks, their metric, and no token that training did not see.

The one file that imports lm_eval. An export says in megatron_lite.json how documents were made: EOD after each, nothing
before (`bos: null`). The harness must do the same, or it asks a model questions in a form that it never saw; so its
tokens are compared with the training tokenizer's, for probes and for the first requests of every task.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.tokenizer import Tokenizer, load_tokenizer
from launch.export import PROBES

TASKS = (  # of RegMix's table of 1B models (Liu et al. 2024), by the harness's names
    *("social_iqa", "hellaswag", "piqa", "openbookqa", "lambada_standard", "sciq", "arc_easy", "copa", "race"),
    *("logiqa", "qqp", "winogrande", "multirc"),
)
# the first that a task has: acc_norm if there, else acc, as in RegMix's model cards
METRICS = ("acc_norm", "acc", "exact_match")
CHECKED = 100  # requests of each task whose tokens are compared with ours
BOOTSTRAP = 100  # resamples for errors of f1 and perplexity, which are not shown; the others have formulas
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def import_lm_eval() -> Any:
    """The lm_eval package; ValueError with the way to install it."""
    try:
        import lm_eval.tasks  # before the package's own names: it loads them on demand
    except ImportError as error:
        raise ValueError(f"lm_eval cannot be imported ({error}): pip install 'megatron_lite[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # else a warning for every request that is too long
    return lm_eval


def lm_eval_version() -> str:
    """The installed version; ValueError where there is none."""
    if importlib.util.find_spec("lm_eval") is None:
        import_lm_eval()  # says how to install it
    return importlib.metadata.version("lm_eval")


def open_tasks(names: Sequence[str], include_path: str | None) -> Any:
    """The harness's TaskManager, every name known and every data set at hand; ValueError for one that is not."""
    build = import_lm_eval().tasks.TaskManager
    manager = build(include_path=include_path, include_defaults=include_path is None)
    if include_path and not set(names) <= set(manager.all_subtasks):  # its own 10,000 take several seconds
        manager = build(include_path=include_path)
    for name in names:
        if name not in manager.all_subtasks:
            near = difflib.get_close_matches(name, manager.all_subtasks, n=3)
            what = "a group; name its tasks" if name in manager.all_tasks else "not a task of lm_eval"
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ValueError(f"--tasks {name}: {what}{hint}; tasks of your own need --include-path FOLDER")
    for name in names:
        try:
            manager.load([name])
        except Exception as error:  # a data set's server, cache, script: every library below has errors of its own
            first = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            raise ValueError(
                f"--tasks {name}: its data cannot be read ({first}); the harness fetches it from the Hugging Face Hub "
                "once and keeps it in HF_HOME: run where there is a network, or copy that folder here"
            ) from error
    return manager


class Harness:
    """A model in a Hugging Face folder, ready to be asked."""

    training: Tokenizer | None  # what made the shards; None where the folder does not say

    def __init__(self, folder: Path, manager: Any, device: str, batch_size: str, dtype: str) -> None:
        """ValueError when the folder's tokens are not those of training."""
        self.manager, self.folder = manager, folder
        if not any(
            (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
        ):
            raise ValueError(f"{folder}: no tokenizer in it; export it with --tokenizer")
        self.policy, self.training, self.truncated = read_policy(folder), None, 0
        self.requests = 0
        self.lm = build_lm(folder, self._check, pretrained=str(folder), device=device, batch_size=batch_size,
                           dtype=DTYPES[dtype], softmax_dtype="float32")  # fmt: skip
        if self.policy is None:
            print(
                f"{folder}: no megatron_lite.json says how its documents were made: tokens are not checked", flush=True
            )
            return
        self.training = load_tokenizer(folder)
        check_special_tokens(self.lm, self.policy, folder)
        self._check([((text, ""), self.lm.tok_encode(text), []) for text in PROBES])

    def score(self, task: str, shots: int, limit: int | None) -> dict[str, Any]:
        """Runs one task: metric, value, stderr, all metrics, items. ValueError when the task fixes its own shots."""
        started, self.truncated, self.requests = time.monotonic(), 0, 0
        results = import_lm_eval().simple_evaluate(
            model=self.lm, tasks=[task], num_fewshot=shots, limit=limit, task_manager=self.manager,
            bootstrap_iters=BOOTSTRAP, log_samples=False,
        )  # fmt: skip
        if results["n-shot"][task] != shots:
            raise ValueError(f"--shots {shots}: {task} fixes num_fewshot: {results['n-shot'][task]} in its YAML")
        numbers = {k: v for k, v in results["results"][task].items() if isinstance(v, int | float) and math.isfinite(v)}
        found = {k.partition(",")[0]: v for k, v in numbers.items()}
        metric = next((name for name in METRICS if name in found), None)
        if metric is None:
            raise ValueError(f"--tasks {task}: none of {', '.join(METRICS)} is among its metrics: {', '.join(found)}")
        return {
            "task": task, "shots": shots, "metric": metric, "value": found[metric],
            "stderr": found.get(f"{metric}_stderr"), "metrics": found, "items": results["n-samples"][task]["effective"],
            "requests": self.requests, "truncated_requests": self.truncated, "version": results["versions"][task],
            "seconds": round(time.monotonic() - started, 2),
        }  # fmt: skip

    def _check(self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]]) -> None:
        self.requests += len(requests)
        self.truncated += sum(len(context) + len(rest) > self.lm.max_length + 1 for _, context, rest in requests)
        if self.training is not None and self.policy is not None:
            check_tokens(requests[:CHECKED], self.training, self.policy["eod_id"], self.folder)


def build_lm(folder: Path, check: Any, **kwargs: Any) -> Any:
    """The harness's own Hugging Face model, which shows each batch of requests to ``check`` before it answers."""
    import_lm_eval()
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:  # accelerate
        raise ValueError(f"lm_eval cannot run a model ({error}): pip install 'megatron_lite[eval]'") from None
    lm: Any = HFLM(**kwargs)
    answer = lm._loglikelihood_tokens

    def checked(requests: Any, *args: Any, **options: Any) -> Any:
        check(requests)
        return answer(requests, *args, **options)

    lm._loglikelihood_tokens = checked
    return lm


def read_policy(folder: Path) -> dict[str, Any] | None:
    """What the export says of its documents: {bos, eod_id, ...}; None where the folder is not an export of ours."""
    path = folder / "megatron_lite.json"
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record.get("bos", 0) is not None or not isinstance(record.get("eod_id"), int):
        raise ValueError(f"{path}: bos and eod_id must be null and an id, not {record.get('bos', 'missing')!r} and "
                         f"{record.get('eod_id')!r}; export again with --tokenizer")  # fmt: skip
    return record


def check_special_tokens(lm: Any, policy: dict[str, Any], folder: Path) -> None:
    """ValueError when the harness would begin or end texts with another token than training did."""
    found = {"starts an empty context with": lm.prefix_token_id, "ends texts with": lm.eot_token_id}
    for what, token in found.items():
        if token != policy["eod_id"]:
            raise ValueError(f"{folder}: lm_eval {what} token {token}, training with its EOD, {policy['eod_id']}")


def check_tokens(
    requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], training: Tokenizer, eod: int, folder: Path
) -> None:
    """ValueError naming a text, the harness's ids and the training tokenizer's, when they differ.

    A request is ((context, continuation), ids of the context, ids of the continuation), as lm_eval's ``_encode_pair``
    makes them: blanks at the end of the context go to the continuation, and an empty context is EOD.
    """
    spelled = training.decode([eod])
    for texts, context_ids, rest_ids in requests:
        if texts is None or spelled in "".join(texts):  # that was text in training, and is a token in transformers
            continue
        context = texts[0].rstrip() if texts[1] else texts[0]
        start, whole = ([], []) if not texts[0] else (training.encode_batch([context, "".join(texts)]))
        expected = (list(start), list(whole)[len(start) :])
        if not texts[0]:
            expected = ([eod], list(training.encode_batch([texts[1]])[0]))
        found = (list(context_ids), list(rest_ids))
        if found != expected:
            raise ValueError(
                f"{folder}: {''.join(texts)[:60]!r} is {_from_difference(found, expected)} in lm_eval and "
                f"{_from_difference(expected, found)} in training (documents there have no BOS and end in EOD, {eod}): "
                "export the run again with the tokenizer that made its shards"
            )


def _from_difference(shown: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> str:
    """Eight ids from the first that differs, and how many there are in context and continuation."""
    ids, against = ([*pair[0], *pair[1]] for pair in (shown, other))
    first = next((i for i, (a, b) in enumerate(zip(ids, against, strict=False)) if a != b), min(len(ids), len(against)))
    return f"{ids[first : first + 8]} from token {first} of {len(shown[0])} + {len(shown[1])}"
