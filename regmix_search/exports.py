"""A mixture as other trainers read it: RegMix's YAML, Megatron's arguments, NeMo, nanotron (datatrove), torchtitan.

    python -m regmix_search.exports runs/demo/mixture.yaml --out exports --run-tokens 100000000000

Weights are shares of tokens. Domains of weight 0 are left out where a trainer would refuse or read them.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from megatron_lite.files import atomic_write

FILES = ("regmix.yaml", "megatron.args", "megatron.json", "nemo.yaml", "nanotron.yaml", "torchtitan.py", "epochs.csv")


@dataclass(frozen=True)
class Blend:
    """What is exported. Paths are Megatron prefixes, without .bin and .idx; tokens and run_tokens may be unknown."""

    weights: dict[str, float]  # sum to 1
    paths: dict[str, tuple[str, ...]]  # domain -> its shards, read as one data set
    valid: dict[str, tuple[str, ...]]  # validation set -> its shards
    tokens: dict[str, int] = field(default_factory=dict)  # domain -> tokens that exist
    run_tokens: int | None = None  # length of the run

    @property
    def used(self) -> dict[str, float]:
        """Weights of the domains that are read at all."""
        return {name: weight for name, weight in self.weights.items() if weight > 0}

    def shares(self) -> list[tuple[float, str]]:
        """(weight, prefix) of every shard of every domain in use; a domain's weight goes by the size of its shards."""
        rows = []
        for name, weight in self.used.items():
            sizes = [_size(path) for path in self.paths[name]]
            known = all(size > 0 for size in sizes)
            for path, size in zip(self.paths[name], sizes, strict=True):
                rows.append((weight * (size / sum(sizes) if known else 1 / len(sizes)), path))
        return rows


def name_shards(
    weights: Mapping[str, float],
    data_dir: str = "",
    valid: Sequence[str] | None = None,
    tokens: Mapping[str, int] | None = None,
    run_tokens: int | None = None,
) -> Blend:
    """A blend of shards named as our tools name them, <data_dir>/train_<domain> and valid_<name>, there or not yet."""
    folder = Path(data_dir)
    return Blend(
        dict(weights),
        {name: (str(folder / f"train_{name}"),) for name in weights},
        {name: (str(folder / f"valid_{name}"),) for name in (weights if valid is None else valid)},
        dict(tokens or {}),
        run_tokens,
    )


def read_blend(path: str | Path, run_tokens: int | None = None) -> Blend:
    """A blend from a mixture.yaml and its shards. ValueError names what the file says wrongly."""
    from megatron_lite.data.indexed import IndexedDataset
    from megatron_lite.data.mixture import Mixture

    mixture = Mixture.load(path)
    tokens = {d.name: sum(IndexedDataset(p).num_tokens for p in d.prefixes) for d in mixture.domains}
    told = mixture.provenance.get("run_tokens")
    return Blend(
        {domain.name: domain.weight for domain in mixture.domains},
        {domain.name: domain.prefixes for domain in mixture.domains},
        mixture.valid,
        tokens,
        run_tokens or (told if isinstance(told, int) else None),
    )


def write_exports(blend: Blend, folder: str | Path) -> list[Path]:
    """Writes every format into a folder, atomically; returns the paths in the order of FILES."""
    made = (to_regmix, to_megatron, to_megatron_json, to_nemo, to_nanotron, to_torchtitan, to_epochs)
    paths = [Path(folder) / name for name in FILES]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path, make in zip(paths, made, strict=True):
        atomic_write(path, make(blend))
    return paths


def to_regmix(blend: Blend) -> str:
    """RegMix's n1.yaml: `train: {train_<domain>: weight}`, `valid: {valid_<name>: 1.0}`, read by its tinyllama.py."""
    train = {f"train_{name}": weight for name, weight in blend.weights.items()}
    return yaml.safe_dump({"train": train, "valid": {f"valid_{name}": 1.0 for name in blend.valid}}, sort_keys=False)


def to_megatron(blend: Blend) -> str:
    """Lines `weight prefix`: the file of --data-args-path, or after --data-path on one line."""
    return "".join(f"{weight!r} {path}\n" for weight, path in blend.shares())


def to_megatron_json(blend: Blend) -> str:
    """The file of --per-split-data-args-path: our validation sets stay apart, whatever --split says."""
    return json.dumps(_splits(blend), indent=1) + "\n"


def to_nemo(blend: Blend) -> str:
    """The `paths` of NeMo's MegatronPretraining: flat lists of weight and prefix, by split."""
    return yaml.safe_dump({"dataset": {"paths": _splits(blend)}}, sort_keys=False)


def to_nanotron(blend: Blend) -> str:
    """nanotron's data stage over datatrove's tokenized folders, one a domain: DocumentTokenizer writes into them."""
    data = {"dataset_folder": list(blend.used), "dataset_weights": list(blend.used.values())}
    stage = {"name": "mixture", "start_training_step": 1, "data": {"dataset": data, "seed": 0}}
    return yaml.safe_dump({"data_stages": [stage]}, sort_keys=False)


def to_torchtitan(blend: Blend) -> str:
    """A module for torchtitan's Grain data: every domain is packed by itself, so that weights count tokens."""
    lines = [f"    {json.dumps(name)}: {weight!r}," for name, weight in blend.used.items()]
    return "\n".join([TORCHTITAN_HEAD, *lines, TORCHTITAN_TAIL])


def to_epochs(blend: Blend) -> str:
    """domain,weight,tokens,available,epochs: tokens of the run, tokens that exist; empty where not known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["domain", "weight", "tokens", "available", "epochs"])
    for name, weight in blend.weights.items():
        asked = None if blend.run_tokens is None else round(weight * blend.run_tokens)
        there = blend.tokens.get(name)
        epochs = None if asked is None or not there else round(asked / there, 4)
        writer.writerow([name, repr(weight), *("" if v is None else v for v in (asked, there, epochs))])
    return text.getvalue()


TORCHTITAN_HEAD = '''"""Weights of a mixture, for torchtitan's torchtitan.components.data."""

WEIGHTS = {'''
TORCHTITAN_TAIL = '''}


def mix(datasets):
    """A DatasetMixConfig from {domain: dataset config of documents}: packed first, so that weights count tokens."""
    from torchtitan.components.data import ConcatThenSplitPackingConfig, DatasetMixConfig, WeightedDataset

    missing = sorted(set(WEIGHTS) - set(datasets))
    if missing:
        raise ValueError(f"no dataset for {missing}")
    return DatasetMixConfig(
        datasets=tuple(
            WeightedDataset(dataset=ConcatThenSplitPackingConfig(dataset=datasets[name]), weight=weight)
            for name, weight in WEIGHTS.items()
        )
    )
'''


def _splits(blend: Blend) -> dict[str, list[str]]:
    valid = [path for paths in blend.valid.values() for path in paths]
    flat = [text for weight, path in blend.shares() for text in (repr(weight), path)]
    return {"train": flat, "valid": [text for path in valid for text in ("1.0", path)], "test": []}


def _size(prefix: str) -> int:
    file = Path(prefix + ".bin")
    return file.stat().st_size if file.is_file() else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exports a mixture.yaml; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m regmix_search.exports",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("mixture", help="a mixture.yaml with its shards")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--run-tokens", type=int, metavar="N", help="length of the run, for epochs.csv")
    args = parser.parse_args(argv)
    try:
        for path in write_exports(read_blend(args.mixture, args.run_tokens), args.out):
            print(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
