"""The files of a study: tables of runs, tables of tests, and what is known about the domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.schema import nearest
from regmix_search.changes import find_changes, join_earlier, stack, translate
from regmix_search.config import SearchConfig
from regmix_search.freshness import digest, read_json
from regmix_search.space import FloatArray, Space, build_space, unlimited_space
from regmix_search.tables import TRAIN_PREFIX, Runs, read_ledger, read_runs

KEYS = ("tokens", "prior", "target_tokens", "max_epochs", "run_tokens")  # of a file that is no space.json


@dataclass(frozen=True)
class StudyFiles:
    """The files and rows that a study reads."""

    mixtures: Path  # RegMix's or Olmix's weights, or a ledger (trials.jsonl)
    losses: Path | None = None  # not needed with a ledger
    test_mixtures: Path | None = None  # runs that only score
    test_losses: Path | None = None
    limit: int | None = None  # fit on this many runs, drawn by the seed
    space: Path | None = None  # space.json: prior, caps, tokens
    earlier_mixtures: Path | None = None  # runs from before there were some of the domains, fitted too
    earlier_losses: Path | None = None

    def digests(self) -> dict[str, Any]:
        """What the results depend on, as JSON."""
        return {name: digest(value, name) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def read_study(files: StudyFiles, seed: int = 0) -> tuple[Runs, Runs | None]:
    """(runs to fit on, test runs or None). ValueError for broken tables and for tests of other domains or losses."""
    runs, test = _read(files.mixtures, files.losses)
    if files.test_mixtures:
        test, _ = _read(files.test_mixtures, files.test_losses)
    if test is not None:
        _check_same("domains", files, runs.domains, test.domains)
        test = Runs(test.index, runs.domains, _reorder(test, runs.domains), test.losses)
    runs = draw_runs(runs, files.limit, seed)
    if files.earlier_mixtures:
        return _add_earlier(runs, *_read(files.earlier_mixtures, files.earlier_losses)), test  # of any length
    return replace(runs, once=_read_once(files.space, runs.domains)), test


def _read_once(path: Path | None, domains: Sequence[str]) -> FloatArray | None:
    """Weights [k] at which a run has read each domain once: tokens over run_tokens, where --space says both."""
    content = read_json(path) if path is not None and path.suffix == ".json" else {}
    if path is None or "run_tokens" not in content:
        return None
    length, held = content["run_tokens"], content.get("tokens")
    if not (isinstance(length, int | float) and length > 0 and isinstance(held, dict)):
        raise ValueError(
            f"{path}: run_tokens {length!r} needs to be the tokens of a run, beside tokens, {{domain: count}}"
        )
    return np.array([float(count) for count in _in_order(path, held, domains).values()]) / length


def _add_earlier(runs: Runs, earlier: Runs, held: Runs | None) -> Runs:
    """Runs and earlier ones, in which a domain that they do not name had weight 0; a ledger's held-back ones too."""
    table = earlier if held is None else stack([earlier, held])
    then, now = ({name: (0, name) for name in names} for names in (table.domains, runs.domains))
    return join_earlier(runs, translate(table, find_changes(then, now), dict.fromkeys(runs.domains, 1)))


def draw_runs(runs: Runs, limit: int | None, seed: int) -> Runs:
    """`limit` of the runs: the first of a permutation seeded by `seed`. All of them when limit is None."""
    if limit is None:
        return runs
    if not 2 <= limit <= len(runs.index):
        raise ValueError(f"--limit {limit}: there are {len(runs.index)} runs; ask for 2 to {len(runs.index)}")
    picks = np.random.default_rng(seed).permutation(len(runs.index))[:limit]
    return runs.select(runs.index[i] for i in picks)


def read_space(path: Path | None, runs: Runs, config: SearchConfig) -> Space:
    """What bounds the weights, in the order of the runs' domains.

    None: no caps, and the mean mixture as prior. YAML: a mixture, whose weights are the prior. JSON: a search's
    space.json, or {"tokens": {domain: count}} with target_tokens, max_epochs and prior where they are not the config's;
    then a cap is max_epochs * tokens / target_tokens. run_tokens, the length of the runs, makes epochs a feature of the
    fit. ValueError names what is missing.
    """
    if path is None:
        return unlimited_space(runs.domains, dict(zip(runs.domains, runs.weights.mean(axis=0).tolist(), strict=True)))
    if path.suffix in (".yaml", ".yml"):
        from megatron_lite.data.mixture_file import read_yaml, section

        train = section(str(path), read_yaml(str(path)), "train")
        weights = {key.removeprefix(TRAIN_PREFIX): value for key, value in train.items()}
        shares = {name: value["weight"] if isinstance(value, dict) else value for name, value in weights.items()}
        return unlimited_space(runs.domains, _in_order(path, shares, runs.domains))
    content = read_json(path)
    if "caps" in content:
        found = Space.from_json(content)
        order = [found.domains.index(name) for name in _in_order(path, dict.fromkeys(found.domains, 0), runs.domains)]
        tokens = None if found.tokens is None else found.tokens[order]
        ends = (found.target_tokens, found.max_epochs)
        return Space(runs.domains, tokens, found.prior[order], found.caps[order], *ends)
    if unknown := sorted(set(content) - set(KEYS)):
        raise ValueError(f"{path}: unknown key {unknown[0]!r}.{nearest(unknown[0], KEYS)}")
    length = content.get("target_tokens", config.target_tokens)
    if not isinstance(content.get("tokens"), dict) or not length:
        raise ValueError(f"{path}: needs tokens, {{domain: count}}, and target_tokens (or --set target_tokens=N)")
    counts = _in_order(path, content["tokens"], runs.domains)
    prior = _in_order(path, content["prior"], runs.domains) if content.get("prior") else None
    return build_space(counts, int(length), content.get("max_epochs", config.mixtures.max_epochs), prior)


def _in_order(path: Path, given: Mapping[str, Any], domains: Sequence[str]) -> dict[str, Any]:
    if odd := sorted(set(given) ^ set(domains)):
        raise ValueError(f"{path}: domains {', '.join(odd)} are not in both the file and the runs")
    return {name: given[name] for name in domains}


def _read(mixtures: Path, losses: Path | None) -> tuple[Runs, Runs | None]:
    if mixtures.suffix == ".jsonl":
        if losses is not None:
            raise ValueError(f"{mixtures} is a ledger and has the losses too: leave {losses} out")
        runs, held = read_ledger(mixtures)
        return runs, held if held.index else None
    if losses is None:
        raise ValueError(f"{mixtures}: name the table of losses as well; only a ledger (trials.jsonl) has both")
    return read_runs(mixtures, losses), None


def _check_same(what: str, files: StudyFiles, here: Sequence[str], there: Sequence[str]) -> None:
    if odd := sorted(set(here) ^ set(there)):
        raise ValueError(f"{files.test_mixtures or files.mixtures}: {what} {', '.join(odd)} are not in both tables")


def _reorder(runs: Runs, domains: Sequence[str]) -> FloatArray:
    return runs.weights[:, [runs.domains.index(domain) for domain in domains]]
