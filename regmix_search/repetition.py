"""How often a run repeats each domain, and shards in which a short proxy repeats them as the long target run will.

A run of R tokens reads domain i, of N_i tokens, w_i R / N_i times. A proxy of r tokens reads it r / R as often, so
what repetition costs is not in its losses: its best mixture leans on scarce domains (arXiv 2606.07597). Given N_i r / R
tokens of each domain to read from, the same weights mean the same epochs.
"""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regmix_search.freshness import Stage, bring_up_to_date
from regmix_search.inventory import Inventory
from regmix_search.search import Search

if TYPE_CHECKING:
    from regmix_search.tables import Runs  # numpy: --help starts without it

FEWER = 0.9  # a proxy that sees this share of the target's epochs, or more, matches: samples and steps are rounded
ENDS = (".bin", ".idx", ".meta.json")


@dataclass(frozen=True)
class Exposure:
    """What target run and proxies read of each domain. `tokens` and `proxy_domains` are by domain name."""

    target_tokens: int  # length of the target run
    proxy_tokens: int  # length of a proxy
    tokens: Mapping[str, int]  # what exists
    proxy_domains: Mapping[str, int]  # what proxies read from

    def epochs(self, weights: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """(epochs in the target run, epochs in a proxy) of each domain under these weights."""
        ratios = {
            d: (self.target_tokens / n, self.proxy_tokens / self.proxy_domains[d]) for d, n in self.tokens.items()
        }
        return {d: (w * ratios[d][0], w * ratios[d][1]) for d, w in weights.items()}

    def unmatched(self, weights: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Domains that the target run repeats and a proxy repeats less; epochs as above, the largest first."""
        found = self.epochs(weights).items()
        less = {d: e for d, e in found if e[0] > 1 and max(1.0, e[1]) < FEWER * e[0]}
        return dict(sorted(less.items(), key=lambda item: -item[1][0]))

    def to_json(self, weights: Mapping[str, float]) -> dict[str, Any]:
        """What optimum.json says about repetition, with its warnings."""
        less, epochs = self.unmatched(weights), self.epochs(weights)
        named = ", ".join(f"{d} {target:.2g} times (a proxy: {proxy:.2g})" for d, (target, proxy) in less.items())
        way_out = "; shards.match_repetition=true lets proxies repeat as often"
        if dict(self.tokens) != dict(self.proxy_domains):
            way_out = ": too little text is left of them for a shorter proxy; train longer ones, or add text"
        warning = f"the target run reads {named}: what repetition costs is not in the proxies' losses{way_out}"
        return {
            "proxy_tokens": self.proxy_tokens,
            "target_tokens": self.target_tokens,
            "epochs": {d: {"target": target, "proxy": proxy} for d, (target, proxy) in epochs.items()},
            "matches": not less,
            "warnings": [warning] if less else [],
        }


def exposure(search: Search, inventory: Inventory) -> Exposure:
    """What target run and proxies of this search read; the domains are those that are mixed."""
    config = search.config
    tokens, _ = inventory.usable(config.mixtures.domains, search.sample_tokens)
    target, proxy = config.run_tokens, config.proxy.schedule.total_tokens
    read = match(tokens, target, proxy, config.proxy.data.seq_length) if config.shards.match_repetition else tokens
    return Exposure(target, proxy, tokens, read)


def with_epochs(search: Search, runs: Runs) -> Runs:
    """The runs of a search, with the weights at which they have read each domain once.

    Not known, and left out, where an earlier search's runs are among them: those repeated at other weights.
    """
    import numpy as np

    if (search.out / "earlier_losses.csv").is_file():
        return runs
    seen = exposure(search, search.inventory)
    return replace(runs, once=np.array([seen.proxy_domains[domain] for domain in runs.domains]) / seen.proxy_tokens)


def match(tokens: Mapping[str, int], target_tokens: int, proxy_tokens: int, seq_length: int) -> dict[str, int]:
    """Tokens of each domain that a proxy needs to repeat it as the target run does.

    At least one sample, never more than there is, and no more than a proxy can read: beyond that nothing repeats.
    """
    share = proxy_tokens / target_tokens
    wanted = {d: min(math.ceil(n * share), max(proxy_tokens, 1)) for d, n in tokens.items()}
    return {d: min(n, max(seq_length + 1, wanted[d])) for d, n in tokens.items()}


def proxy_shards(search: Search) -> Path:
    """The folder that proxies read: the search's shards, or with shards.match_repetition subsets, made when needed.

    Documents are picked by the domain's name alone, so all proxies read the same ones, whatever their seed; the last
    is cut so that the count is exact. Validation sets, and domains that are needed whole, are links.
    """
    if not search.config.shards.match_repetition:
        return search.shards_dir
    inventory, folder = search.inventory, search.out / "proxy_shards"
    seen = exposure(search, inventory)
    linked = [shard.prefix for shard in inventory.valid.values()]
    linked += [inventory.train[d].prefix for d, n in seen.proxy_domains.items() if n == seen.tokens[d]]
    thinned = {d: n for d, n in seen.proxy_domains.items() if n < seen.tokens[d]}

    def make() -> str:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for prefix in linked:
            for end in ENDS:
                if (source := prefix.with_name(prefix.name + end)).exists():
                    (folder / source.name).symlink_to(source.resolve())
        for domain, count in thinned.items():
            prefix = inventory.train[domain].prefix
            write_subset(prefix, folder / prefix.name, count, domain)
        return f"{sum(thinned.values()):,} tokens of {len(thinned)} domains"

    inputs = {"shards": inventory.digest, "tokens": dict(seen.proxy_domains), "from": str(search.shards_dir.resolve())}
    prefixes = [*linked, *(inventory.train[d].prefix for d in thinned)]
    outputs = tuple(folder / (prefix.name + end) for prefix in prefixes for end in ENDS[:2])
    outcome = bring_up_to_date(Stage("proxy_shards", inputs, outputs, make), search.out / "stages")
    if outcome.ran:
        search.say(f"proxy shards: {outcome.summary} in {folder}, so that proxies repeat as the target run will")
    return folder


def write_subset(source: Path, output: Path, count: int, domain: str) -> None:
    """Writes a shard of exactly `count` tokens, from documents of `source` picked by a permutation of its own."""
    import numpy as np

    from megatron_lite.data.indexed import IndexedDataset, IndexedWriter, write_meta

    data = IndexedDataset(source)
    data.check()
    lengths, first = data.document_lengths, data.document_indices
    order = np.random.default_rng([zlib.crc32(b"repetition"), zlib.crc32(domain.encode())]).permutation(len(lengths))
    ends = np.cumsum(lengths[order], dtype=np.int64)
    last = int(np.searchsorted(ends, count))
    picks, taken = order[: last + 1], lengths[order[: last + 1]].astype(np.int64)
    taken[-1] -= ends[last] - count
    with IndexedWriter(output, data.dtype) as writer:
        for row in np.argsort(picks):  # as they lie in the file
            if taken[row]:
                pieces = [data[i] for i in range(int(first[picks[row]]), int(first[picks[row] + 1]))]
                writer.add_document(np.concatenate(pieces)[: taken[row]])
    if data.meta is not None:
        made = replace(data.meta, num_documents=writer.num_documents, num_tokens=writer.num_tokens)
        made = replace(made, num_bytes=round(made.num_bytes * count / data.num_tokens))  # as if all tokens were alike
        extra = {**made.extra, "subset_of": source.name}
        write_meta(output, replace(made, bin_xxh3=writer.bin_xxh3, layout=writer.layout, extra=extra))
