"""Mixture <-> mixture.yaml: which domains, where their shards are, and how often each is drawn.

The file is a superset of RegMix's: `train: {train_<domain>: weight}`, `valid: {valid_<domain>: 1.0}`, and optionally
`data_dir` (relative to the file), `epochs`, `provenance`, `version`. A train entry may also be
`{weight: w, path: p | paths: [p, ...], max_epochs: e}`. Without `valid`, every valid_* shard of data_dir is one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from megatron_lite.data.indexed import resolve_prefix
from megatron_lite.data.mixture_file import nearest, number, read_entry, read_yaml, section
from megatron_lite.files import atomic_write

SUM_TOLERANCE = 1e-12  # weights this close to 1 are kept to the bit, so that save and load change nothing


@dataclass(frozen=True)
class Domain:
    """One domain: its shards are read as one data set. `weight` is its share of the samples, 0 means never."""

    name: str
    prefixes: tuple[str, ...]  # absolute, without .bin/.idx
    weight: float
    max_epochs: float | None = None
    written: float | None = field(default=None, compare=False)  # weight as given, not made to sum to 1


@dataclass(frozen=True)
class Mixture:
    """Domains with weights that sum to 1, and validation sets by name. Build it with load or from_weights."""

    domains: tuple[Domain, ...]
    valid: dict[str, tuple[str, ...]]
    provenance: dict[str, Any] = field(default_factory=dict)
    path: str = ""  # where it was read from or saved to; empty when it was made in memory
    data_dir: str = ""
    epochs: dict[str, float] = field(default_factory=dict)  # informational: what the search expects per domain

    @property
    def names(self) -> tuple[str, ...]:
        """Domain names, in file order."""
        return tuple(domain.name for domain in self.domains)

    @property
    def weights(self) -> npt.NDArray[np.float64]:
        """Weights in the order of names; they sum to 1."""
        return np.array([domain.weight for domain in self.domains], dtype=np.float64)

    @classmethod
    def load(cls, path: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None) -> Mixture:
        """Read a mixture.yaml. `data_dir` overrides the file's. ValueError names the file, the key, the way out."""
        where = os.path.abspath(os.fspath(path))
        raw = read_yaml(where)
        written = raw.get("data_dir", ".")
        if not isinstance(written, str):
            raise ValueError(f"{where}: data_dir is {written!r}, expected a folder")
        folder = os.path.abspath(os.fspath(data_dir or os.path.join(os.path.dirname(where), written)))
        entries = {key: read_entry(where, "train", key, value) for key, value in section(where, raw, "train").items()}
        valid: list[tuple[str, list[str]]] = [(name, []) for name in _shards(folder, "valid_")]
        if raw.get("valid") is not None:
            read = (
                (key, read_entry(where, "valid", key, value)) for key, value in section(where, raw, "valid").items()
            )
            valid = [(_domain_name(where, key, "valid_"), entry["paths"]) for key, entry in read if entry["weight"] > 0]
        return cls(
            domains=_build_domains(where, folder, entries),
            valid=_build_valid(where, folder, valid),
            provenance=section(where, raw, "provenance"),
            path=where,
            data_dir=folder,
            epochs=section(where, raw, "epochs"),
        )

    @classmethod
    def from_weights(
        cls,
        weights: Mapping[str, float],
        data_dir: str | os.PathLike[str],
        valid: Sequence[str] | None = None,
        provenance: dict[str, Any] | None = None,
        max_epochs: float | Mapping[str, float | None] | None = None,
    ) -> Mixture:
        """A mixture of the shards in `data_dir`, by domain name. `valid` None takes every valid_* shard there."""
        where, folder = "Mixture.from_weights", os.path.abspath(os.fspath(data_dir))
        entries = {}
        for name, weight in weights.items():
            cap = max_epochs.get(name) if isinstance(max_epochs, Mapping) else max_epochs
            value = {"weight": weight} if cap is None else {"weight": weight, "max_epochs": cap}
            entries[name] = read_entry(where, "train", name, value)
        names = _shards(folder, "valid_") if valid is None else [_domain_name(where, n, "valid_") for n in valid]
        return cls(
            domains=_build_domains(where, folder, entries),
            valid=_build_valid(where, folder, [(name, []) for name in names]),
            provenance=dict(provenance or {}),
            data_dir=folder,
        )

    def with_weights(self, weights: Mapping[str, float]) -> Mixture:
        """The same shards with other weights. A domain left out gets 0; an unknown one is a ValueError."""
        where = self.path or "Mixture.with_weights"
        for name in weights:
            if name not in self.names:
                known = ", ".join(self.names)
                raise ValueError(f"{where}: no domain {name!r}{nearest(name, self.names)}; the mixture has {known}")
        normalised = _normalise(where, {name: weights.get(name, 0.0) for name in self.names})
        domains = tuple(replace(domain, weight=normalised[domain.name], written=None) for domain in self.domains)
        return replace(self, domains=domains, path="", epochs={})

    def save(self, path: str | os.PathLike[str]) -> Mixture:
        """Write mixture.yaml atomically; load gives back the weights to the bit. Returns the mixture at that path."""
        where = os.path.abspath(os.fspath(path))
        folder = self.data_dir or os.path.dirname(where)
        train = {f"train_{d.name}": _entry_to_yaml(d, folder) for d in self.domains}
        valid = {f"valid_{name}": _valid_to_yaml(name, prefixes, folder) for name, prefixes in self.valid.items()}
        raw: dict[str, Any] = {"version": 1, "data_dir": os.path.relpath(folder, os.path.dirname(where))}
        raw.update({"train": train, "valid": valid})
        raw.update({"epochs": {name: float(e) for name, e in self.epochs.items()}} if self.epochs else {})
        raw.update({"provenance": self.provenance} if self.provenance else {})
        os.makedirs(os.path.dirname(where), exist_ok=True)
        atomic_write(where, yaml.safe_dump(raw, sort_keys=False, allow_unicode=True))
        return replace(self, path=where, data_dir=folder)


def _build_domains(where: str, folder: str, entries: dict[str, dict[str, Any]]) -> tuple[Domain, ...]:
    named: dict[str, dict[str, Any]] = {}
    for key, entry in entries.items():
        name = _domain_name(where, key, "train_")
        if name in named:
            raise ValueError(f"{where}: domain {name!r} is given twice, as {key} and as {name}; keep one")
        named[name] = entry
    weights = _normalise(where, {name: entry["weight"] for name, entry in named.items()})
    return tuple(
        Domain(
            name, _find(where, folder, "train_", name, e["paths"]), weights[name], e["max_epochs"], float(e["weight"])
        )
        for name, e in named.items()
    )


def _build_valid(where: str, folder: str, names: Sequence[tuple[str, list[str]]]) -> dict[str, tuple[str, ...]]:
    valid: dict[str, tuple[str, ...]] = {}
    for name, paths in names:
        if name in valid:
            raise ValueError(f"{where}: validation set {name!r} is given twice; keep one")
        valid[name] = _find(where, folder, "valid_", name, paths)
    return valid


def _normalise(where: str, weights: Mapping[str, float]) -> dict[str, float]:
    if not weights:
        raise ValueError(f"{where}: no domains; add a `train:` section with lines like `train_<domain>: weight`")
    numbers = {name: number(where, f"train_{name}", weight) for name, weight in weights.items()}
    for name, weight in numbers.items():
        if weight < 0:
            raise ValueError(f"{where}: train_{name} is {weight:g}; a weight is 0 (never) or positive")
    total = math.fsum(numbers.values())
    if not 0 < total < math.inf:
        raise ValueError(f"{where}: the weights sum to {total:g}; at least one domain needs a positive weight")
    scale = 1.0 if abs(total - 1) <= SUM_TOLERANCE else total
    return {name: weight / scale for name, weight in numbers.items()}


def _domain_name(where: str, key: str, prefix: str) -> str:
    name = key.removeprefix(prefix)
    if not name or "/" in name:
        raise ValueError(f"{where}: {key!r} is no domain; write {prefix}<domain>, and put a path under `path:`")
    return name


def _find(where: str, folder: str, kind: str, name: str, paths: list[str]) -> tuple[str, ...]:
    """Absolute prefixes of a domain's shards. The error lists what is there and the nearest name."""
    if paths:
        return tuple(_resolve(where, f"{kind}{name}", os.path.join(folder, path)) for path in paths)
    present = _shards(folder, kind)
    if name in present:
        return (_resolve(where, f"{kind}{name}", os.path.join(folder, kind + name)),)
    have = ", ".join(kind + other for other in present) or f"no {kind}* shards at all"
    near = nearest(kind + name, [kind + other for other in present])
    raise ValueError(f"{where}: {kind}{name} has no shard in {folder}{near}; there are: {have}")


def _resolve(where: str, key: str, path: str) -> str:
    try:
        return resolve_prefix(path)
    except ValueError as error:
        raise ValueError(f"{where}: {key}: {error}") from error


def _shards(folder: str, kind: str) -> list[str]:
    """Names of the shards in a folder that start with train_ or valid_, without that prefix."""
    stems = (path.stem for path in Path(folder).glob(f"{kind}*.idx"))
    return sorted(stem.removeprefix(kind).removesuffix("_text_document") for stem in stems)


def _is_default(kind: str, name: str, prefixes: tuple[str, ...], folder: str) -> bool:
    stem = os.path.join(folder, kind + name)
    return prefixes in ((stem,), (stem + "_text_document",))


def _entry_to_yaml(domain: Domain, folder: str) -> Any:
    default = _is_default("train_", domain.name, domain.prefixes, folder)
    if default and domain.max_epochs is None:
        return domain.weight
    entry: dict[str, Any] = {"weight": domain.weight}
    if not default:
        entry["paths"] = [os.path.relpath(prefix, folder) for prefix in domain.prefixes]
    return entry if domain.max_epochs is None else {**entry, "max_epochs": domain.max_epochs}


def _valid_to_yaml(name: str, prefixes: tuple[str, ...], folder: str) -> Any:
    if _is_default("valid_", name, prefixes, folder):
        return 1.0
    return {"weight": 1.0, "paths": [os.path.relpath(prefix, folder) for prefix in prefixes]}
