"""The model card of an export: what the model was trained on, how, how good it is, and where all that is known from.

Every figure is read from the checkpoint's state.json and from what stands beside it in the run's folder (evals.jsonl,
starts.jsonl, data.json); paths of this machine are left out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import yaml

from megatron_lite import __version__, tally
from megatron_lite.checkpoint import load_state
from megatron_lite.data.loader import BlendedLoader
from megatron_lite.data.native import kernels
from megatron_lite.data.stages import Stage, StagedBlend
from megatron_lite.files import read_jsonl
from megatron_lite.hf_config import read_json
from megatron_lite.shape import ModelShape
from megatron_lite.weights import Weights

Rows = Iterable[Sequence[object]]
LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids)[0]))
```"""
PHASES = 8  # that are told one by one; a run that reweights its domains has hundreds
NO_TOKENIZER = """`AutoModelForCausalLM.from_pretrained("{name}")`; the tokenizer is not part of this folder."""
LIMITS = """This is a base model: it continues text, it was not trained to follow instructions, and nothing was done to
keep what it writes true, harmless or free of the biases of its training text. {seen}It was trained on sequences of
at most {length:,} tokens. {eod}"""


@dataclass(frozen=True)
class CardOptions:
    """What only the person who publishes knows."""

    name: str  # title, and the repository in the example; "" : the run's name
    license: str | None = None  # the Hub's identifier, such as mit
    tokenizer: bool = True  # the folder has it
    datasets: tuple[str, ...] = ()  # data sets on the Hub that the shards were made from
    evaluation: tuple[Path, ...] = ()  # evaluation.json of launch/evaluate.py, or the harness's own results


def write_card(weights: Weights, dtype: str, options: CardOptions) -> str:
    """README.md of an export. Weights that no checkpoint of ours holds get a card of their shape alone."""
    state = load_state(weights.source) if (weights.source / "state.json").is_file() else {}
    known, run_dir = "config" in state, weights.source.parent  # one that was imported has none
    state = state if known else {}
    name = options.name or (state["config"]["name"] if known else weights.source.name)
    parts = [front_matter(options), f"# {name}", summary(weights.shape, state)]
    if known:
        parts += ["## Data mixture", mixture(state, run_dir), "## Training", table(("", ""), training(state))]
        if rows := held_out(run_dir, state["step"]):
            head = f"At step {state['step']:,}, on the run's fixed validation shards."
            parts += ["## Held-out loss", head, table(("domain", "nats/token", "perplexity", "bits/byte"), rows)]
    if rows := benchmarks(options, weights.source):
        text = "By lm-evaluation-harness; each is the mean over its numbers of shots, +- the standard error over items."
        parts += ["## Evaluation", text, table(("task", "shots", "metric", "score"), rows)]
    parts += ["## How to load", LOAD.format(name=name) if options.tokenizer else NO_TOKENIZER.format(name=name)]
    parts += ["## Provenance", "\n".join(f"- {line}" for line in provenance(weights, state, run_dir, dtype))]
    parts += ["## Limits", limits(weights, state)]
    return "\n\n".join(parts) + "\n"


def front_matter(options: CardOptions) -> str:
    """The YAML that the Hub reads."""
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head |= {"license": options.license} if options.license else {}
    head |= {"datasets": list(options.datasets)} if options.datasets else {}
    head["tags"] = ["llama", "data-mixture", "megatron_lite"]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"


def summary(shape: ModelShape, state: Mapping[str, Any]) -> str:
    """What it is, in two sentences."""
    text = f"A Llama with {shape.params:,} parameters, {shape.non_embedding_params:,} of them outside the embeddings"
    if not state:
        return f"{text}."
    plan, start = state["plan"], state["config"]["init_from"]
    begun = f"from the weights of {Path(start).name}" if start else "from scratch"
    domains = sum(any(stage["weights"].get(n, 0) > 0 for stage in state["data"]["stages"]) for n in domains_of(state))
    tokens = state["step"] * plan["tokens_per_step"]
    return f"{text}, trained {begun} on {tokens:,} tokens of a mixture of {domains} domains by megatron_lite."


def domains_of(state: Mapping[str, Any]) -> list[str]:
    """Names of all domains, in the order in which the run's stages first name them."""
    return list(dict.fromkeys(name for stage in state["data"]["stages"] for name in stage["weights"]))


def mixture(state: Mapping[str, Any], run_dir: Path) -> str:
    """Weights asked for and realised, tokens and epochs by domain, whole and by phase; the weights as mixture.yaml."""
    begun = [s for s in state["data"]["stages"] if s["first_step"] < state["step"] or s["first_step"] == 0]
    found, parts = drawn(state, run_dir), list[str]()
    head = ("domain", "requested", "realised", "tokens", "epochs")
    if found:
        parts = ["An epoch is all tokens of a domain's shards.", table(head, mixture_rows(found["domains"]))]
    if len(begun) > PHASES:
        parts.append(f"Its weights changed {len(begun) - 1:,} times while it trained. The last were:")
    elif found and len(begun) > 1:
        ends = [stage["first_step"] for stage in found["stages"][1:]] + [found["steps"]]
        for stage, end in zip(found["stages"], ends, strict=True):
            title = f"### Phase from step {stage['first_step'] + 1:,} to {end:,}"
            parts += [title, table(head, mixture_rows(stage["domains"]))]
    for stage in begun if len(begun) <= PHASES else begun[-1:]:
        train = {f"train_{name}": weight for name, weight in stage["weights"].items() if weight > 0}
        first = f"# from step {stage['first_step'] + 1}\n" if len(begun) > 1 else ""
        parts.append(f"```yaml\n{first}{yaml.safe_dump({'train': train}, sort_keys=False)}```")
    return "\n\n".join(parts)


def drawn(state: Mapping[str, Any], run_dir: Path) -> dict[str, Any] | None:
    """What tally.report says at the checkpoint's step, from its stages alone: the shards need not be here."""
    data, config = state["data"], state["config"]
    if data["megatron"]:  # its order follows from the shards; the run's last report serves where it is of this step
        found = read_json(run_dir / "data.json") if (run_dir / "data.json").is_file() else {}
        return found if found.get("steps") == state["step"] else None
    size = config["batch"]["global_batch_size"]
    blend = StagedBlend([Stage(**stage) for stage in data["stages"]], data["seed"], kernels(), size)
    loader = SimpleNamespace(blend=blend, names=blend.names, facts=data["domains"], global_batch_size=size)
    return tally.report(cast(BlendedLoader, loader), state["step"])


def mixture_rows(domains: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    """The largest share first; domains that were neither asked for nor drawn are left out."""
    kept = {name: row for name, row in domains.items() if row["requested"] or row["samples"]}
    return [
        (name, f"{row['requested']:.4f}", f"{row['realised']:.4f}", f"{row['tokens']:,}", f"{row['epochs']:.2f}")
        for name, row in sorted(kept.items(), key=lambda item: -item[1]["samples"])
    ]


def training(state: Mapping[str, Any]) -> Rows:
    """Shape, batch, schedule and optimizer, as they were used."""
    config, plan = state["config"], state["plan"]
    shape, schedule, optim, batch = plan["shape"], config["schedule"], config["optim"], config["batch"]
    heads = f"{shape['num_heads']} heads, {shape['num_kv_heads']} of keys and values"
    decay = {"wsd": f"held, then linear over the last {schedule['decay_fraction']:.0%}"}
    low = "" if schedule["decay"] == "constant" else f" to {schedule['min_lr']:g}"
    size, tokens = batch["global_batch_size"], plan["tokens_per_step"]
    yield "layers x width", f"{shape['num_layers']} x {shape['hidden_size']}, ffn {shape['ffn_hidden_size']}, {heads}"
    yield "vocabulary", f"{shape['vocab_size']:,} rows"
    yield "sequence length", f"{shape['seq_length']:,}"
    yield "batch", f"{size:,} sequences, {tokens:,} tokens"
    yield "steps", f"{state['step']:,} of {plan['total_steps']:,}, {state['step'] * tokens:,} tokens"
    yield "training FLOPs", f"{plan['flops_per_token'] * state['step'] * tokens:.3g}"
    yield "learning rate", f"{optim['lr']:g}{low}, {decay.get(schedule['decay'], schedule['decay'])}"
    yield "warm-up", f"{schedule['warmup_steps']:,} steps"
    yield "optimizer", f"{optim['optimizer']}, betas {tuple(optim['betas'])}, eps {optim['eps']:g}"
    yield "weight decay, clipping", f"{optim['weight_decay']:g}, {optim['clip_grad']:g}"
    yield "precision, seed", f"{plan['precision']}, {config['seed']}"


def held_out(run_dir: Path, step: int) -> list[tuple[str, ...]]:
    """Losses of the run's own evaluation at that step, by domain; empty where there was none."""
    found = [row for row in read_jsonl(run_dir / "evals.jsonl") if row["step"] == step][-1:]
    names = [key.split("/")[1] for row in found for key in row if key.startswith("valid/") and key.endswith("/loss")]
    rows = list[tuple[str, ...]]()
    for name in names:
        loss, bpb = found[0][f"valid/{name}/loss"], found[0].get(f"valid/{name}/bpb")
        rows.append((name, f"{loss:.4f}", f"{math.exp(loss):.2f}", f"{bpb:.4f}" if bpb is not None else ""))
    return rows


def benchmarks(options: CardOptions, source: Path) -> list[tuple[str, ...]]:
    """Rows of scores: those that were named, else those that launch/evaluate.py left in the run's own folder."""
    ours = source.parent / "evaluation" / "evaluation.json"
    files = options.evaluation or ((ours,) if ours.is_file() else ())
    return [row for path in files for row in scores(path, source, path in options.evaluation)]


def scores(path: Path, source: Path, asked: bool) -> list[tuple[str, ...]]:
    """A result file of launch/evaluate.py or of lm-evaluation-harness, one row a task, number of shots and metric.

    ValueError for a file of something else; of other models, if it was asked for.
    """
    found = read_json(path)
    if isinstance(found.get("results"), dict):
        return harness(found)
    if not isinstance(found.get("tasks"), dict):
        if not asked:  # launch/evaluate.py --perplexity left it, with held-out losses alone
            return []
        raise ValueError(f"{path}: no scores in it; give evaluation.json of launch/evaluate.py, or the harness's own")
    seeds = [(name, i, Path(p)) for name, paths in found["models"].items() for i, p in enumerate(paths)]
    mine = [(name, i) for name, i, p in seeds if p.resolve() == source.resolve()]
    if asked and not mine and len(seeds) == 1:  # the same weights in a folder of Hugging Face's
        mine = [seeds[0][:2]]
    if asked and not mine:
        raise ValueError(f"{path}: scores of {', '.join(str(p) for _, _, p in seeds)}, not of {source}")
    setting, rows = found["setting"], list[tuple[str, ...]]()
    shots = ", ".join(map(str, setting["shots"])) + (f" (first {setting['limit']} items)" if setting["limit"] else "")
    for task, told in found["tasks"].items() if mine else ():
        cell = told["scores"][mine[0][0]]
        rows.append((task, shots, told["metric"], with_error(cell["values"][mine[0][1]], cell["stderr"])))
    return rows


def harness(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What lm-evaluation-harness itself writes."""
    rows = list[tuple[str, ...]]()
    for task, told in found["results"].items():
        shots = found.get("n-shot", {}).get(task, "")
        for key, value in told.items():
            metric, comma, how = key.partition(",")
            if comma and isinstance(value, int | float) and not metric.endswith("_stderr"):  # not an alias or a count
                rows.append((task, str(shots), metric, with_error(value, told.get(f"{metric}_stderr,{how}"))))
    return rows


def with_error(value: float, error: object) -> str:
    """A score, and its standard error where there is one."""
    return f"{value:.4f}" + (f" +- {error:.4f}" if isinstance(error, float) else "")


def provenance(weights: Weights, state: Mapping[str, Any], run_dir: Path, dtype: str) -> Iterable[str]:
    """Where weights, code, tokenizer and data come from."""
    yield f"weights: {weights.source.name}, exported as {dtype} by megatron_lite {__version__}"
    for start in read_jsonl(run_dir / "starts.jsonl") if state else []:
        code = f"megatron_lite {start['version']}" + (f", commit {start['commit']}" if start["commit"] else "")
        yield f"started {start['date']}: {code}, torch {start['torch']}, {start['ranks']} x {start['device']}"
    if weights.tokenizer.get("tokenizer_sha256"):
        yield f"tokenizer: sha256 {weights.tokenizer['tokenizer_sha256']}, {weights.tokenizer['vocab_size']:,} ids"
    if found := search_of(run_dir) if state else "":
        yield f"mixture: {found}"
    for change in state.get("allowed", []):
        what = "" if "/" in change["change"] else f": {change['change']}"  # no paths
        yield f"changed at step {change['step']:,}: {change['key']}{what}"
    for name, facts in state["data"]["domains"].items() if state else ():
        digest = hashlib.sha256(json.dumps(facts["shards"], sort_keys=True).encode()).hexdigest()[:16]
        yield f"train_{name}: {facts['tokens']:,} tokens, shards {len(facts['shards'])}, fingerprint {digest}"


def search_of(run_dir: Path) -> str:
    """What the run's mixture.yaml says of how its weights were found; empty where it says nothing."""
    path = run_dir / "mixture.yaml"
    told = (yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}).get("provenance") or {}
    plain = {key: value for key, value in told.items() if isinstance(value, str | int | float) and key != "fit"}
    return ", ".join(f"{key} {value}" for key, value in plain.items() if "/" not in str(value))


def limits(weights: Weights, state: Mapping[str, Any]) -> str:
    """What nobody should expect of it, and how its texts begin and end."""
    seen = "" if not state or state["config"]["init_from"] else "It has seen nothing but the domains above. "
    known = weights.tokenizer.get("eod_id") is not None
    eod = "A text ends in the end-of-document token, which is bos and eos; nothing stands before it." * known
    return LIMITS.format(length=weights.shape.seq_length, seen=seen, eod=eod).strip()


def table(head: Sequence[str], rows: Rows) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
