"""What runs of several sizes say, for the report: scales.json as a table and sentences."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from regmix_search.report.exhibits import Cell, Table
from regmix_search.report.numerals import count, fixed, percent

SAID = ("predicted", "prior", "gain")  # keys of at_target with a loss and an interval


@dataclass(frozen=True)
class Sizes:
    """Rank correlations between sizes, the best mixture at the target's size, and doubts. Empty without scales.json."""

    ranks: Table = field(default_factory=lambda: Table((), []))
    weights: Table = field(default_factory=lambda: Table((), []))
    sentences: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def read_sizes(run_dir: Path) -> Sizes:
    """The section on scale transfer, from scales.json where it is."""
    path = run_dir / "scales.json"
    if not path.is_file():
        return Sizes()
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for pair in content["ranks"]:
        how = (
            "both ran them" if pair["shared"] == pair["mixtures"] else f"ranks of {pair['small']} predicted by its law"
        )
        interval = " to ".join(fixed(end, 3) for end in pair["interval90"]) if pair["interval90"] else "too few"
        spearman = Cell(fixed(pair["spearman"], 3), "strong")
        rows.append([Cell(pair["small"]), Cell(pair["large"]), Cell(str(pair["mixtures"])), Cell(how), spearman])
        rows[-1].append(Cell(interval))
    ranks = Table(("small", "large", "mixtures", "compared on", "Spearman", "90% interval"), rows, left=2)
    at = content["at_target"]
    order = sorted(at["weights"], key=lambda name: -at["weights"][name])
    cells = [[Cell(d), Cell(percent(at["weights"][d]), "strong"), Cell(percent(at["small_weights"][d]))] for d in order]
    weights = Table(("domain", "best at the target's size", f"best at {content['scales'][0]['name']}"), cells)
    sizes = "; ".join(
        f"{s['name']}: {count(s['params'])} parameters, {count(s['tokens'])} tokens, {s['runs']} runs"
        for s in content["scales"]
    )
    spans = {
        key: f"{at[key]['loss']:.3f} ({at[key]['interval90'][0]:.3f} to {at[key]['interval90'][1]:.3f})" for key in SAID
    }
    target = f"At {count(at['params'])} parameters and {count(at['tokens'])} tokens"
    forms = ", ".join(f"{name} {law['form']}" for name, law in content["law"].items())
    sentences = (
        f"{sizes}.",
        f"{target} the best mixture is predicted at {spans['predicted']} nats, the prior at {spans['prior']}, the gain "
        f"{spans['gain']}. The smallest size's own optimum loses {at['cost_of_small']:.4f} nats there. "
        f"Form of the law over sizes: {forms}.",
    )
    return Sizes(ranks, weights, sentences, tuple(content["warnings"]))
