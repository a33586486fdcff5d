"""What a run draws from each domain: weights asked for and realised, samples, tokens, epochs; the caps on epochs."""

from __future__ import annotations

from typing import Any

from megatron_lite.data.loader import BlendedLoader
from megatron_lite.data.stages import Stage

ROWS = 40  # domains that the console's table shows; the JSON has all
STAGES = 8  # in a table: the last of them, for a run that changed its own weights hundreds of times


def check_epochs(loader: BlendedLoader, total_samples: int) -> None:
    """ValueError if a run of `total_samples` would repeat a domain beyond its max_epochs; all stages count."""
    stages = [(stage, int(counts.sum())) for stage, counts in loader.blend.by_stage(total_samples)]
    for name in loader.names:
        if name not in loader.facts or name not in loader.domains or loader.domains[name].max_epochs is None:
            continue  # never drawn, gone, or without a cap
        cap, tokens = loader.domains[name].max_epochs, loader.facts[name]["tokens"]
        drawn = [(s.first_step, s.drawn[name], n * s.seq_length) for s, n in stages if name in s.drawn]
        needed = sum(weight * size for _, weight, size in drawn)
        if needed <= cap * tokens * (1 + 1e-9):  # a weight computed as cap * tokens / budget passes
            continue
        _, weight, size = drawn[-1]
        allowed = max(0.0, (cap * tokens - (needed - weight * size)) / size)
        several = len(stages) > 1
        weights = ", ".join(f"{w:.6g}" + several * f" from step {first}" for first, w, _ in drawn)
        raise ValueError(
            f"{loader.mixture.path or 'mixture'}: train_{name} has {tokens} tokens and weight {weights}; "
            f"{total_samples} samples of {loader.seq_length} tokens need {needed / tokens:.2f} epochs of it, "
            f"max_epochs is {cap:g}. The largest weight allowed{several * ' in the last of these stages'} is "
            f"{allowed:.6g}: lower it, raise max_epochs, or train for less"
        )


def report(loader: BlendedLoader, steps: int) -> dict[str, Any]:
    """Requested and realised share, samples, tokens, epochs of each domain in the first `steps` steps, and by stage."""
    begun = [(stage, counts.tolist()) for stage, counts in loader.blend.by_stage(steps * loader.global_batch_size)]
    stages = [{"first_step": one[0].first_step, "domains": _rows(loader, [one])} for one in begun]
    return {"steps": steps, "domains": _rows(loader, begun), "stages": stages}


def table(found: dict[str, Any]) -> str:
    """A report as aligned text: all steps, and each of the last stages where there are several."""
    starts = [stage["first_step"] for stage in found["stages"]]
    parts = [(f"steps 1 to {found['steps']}", found["domains"])]
    if len(starts) > 1:
        titles = [f"steps {a + 1} to {b}" for a, b in zip(starts, [*starts[1:], found["steps"]], strict=True)]
        parts += [(title, stage["domains"]) for title, stage in zip(titles, found["stages"], strict=True)][-STAGES:]
    more = f"\n  and {len(starts) - STAGES} stages before these" if len(starts) > STAGES else ""
    return "\n".join(_table(title, rows) for title, rows in parts) + more


def _rows(loader: BlendedLoader, begun: list[tuple[Stage, list[int]]]) -> dict[str, dict[str, float]]:
    """By domain, over these stages; an epoch is all tokens of the domain's shards."""
    total, rows = max(1, sum(sum(drawn) for _, drawn in begun)), {}
    for i, name in enumerate(loader.names):
        counts = [(drawn[i], stage.seq_length) for stage, drawn in begun]
        tokens, held = sum(n * length for n, length in counts), loader.facts.get(name, {"tokens": 1})["tokens"]
        rows[name] = {
            "requested": sum(stage.weights.get(name, 0.0) * sum(drawn) for stage, drawn in begun) / total,
            "realised": sum(n for n, _ in counts) / total,
            "samples": sum(n for n, _ in counts),
            "tokens": tokens,
            "epochs": tokens / held,
        }
    return rows


def _table(title: str, rows: dict[str, dict[str, float]]) -> str:
    width = max(20, *map(len, rows))
    lines = [f"  {title:<{width}} requested realised      samples           tokens   epochs"]
    for name in sorted(rows, key=lambda name: -rows[name]["samples"])[:ROWS]:
        row = rows[name]
        counts = f"{row['samples']:12,} {row['tokens']:16,} {row['epochs']:8.2f}"
        lines.append(f"  {name:<{width}} {row['requested']:9.4f} {row['realised']:8.4f} {counts}")
    return "\n".join([*lines, *([f"  and {len(rows) - ROWS} more"] if len(rows) > ROWS else [])])
