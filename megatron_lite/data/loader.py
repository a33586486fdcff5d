"""Global batches -> this rank's micro-batches. The only state is the step: the same samples for any layout and resume.

Global step s is samples [s * G, (s + 1) * G) of the blend. They are dealt out micro-batch by micro-batch and, inside
one, rank by rank, so that reading m = 0, 1, ... and ranks 0, 1, ... gives the global order back.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_lite.data.batch import Batch, DocumentOptions, Rows
from megatron_lite.data.blend import Blend
from megatron_lite.data.evalset import EvalSet
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.mixture import Mixture
from megatron_lite.data.native import kernels as default_kernels
from megatron_lite.data.samples import DomainSamples, SampleOrder
from megatron_lite.data.sidecar import ShardMeta, read_meta

__all__ = ["Batch", "BlendedLoader", "EvalSet", "TokenizerFacts"]

ORDER_VERSION = 1  # of the sample order: raise it when the same seed would draw other samples
PEEK = 1 << 16  # bytes at either end of a file that stand for its content where there is no sidecar


@dataclass(frozen=True)
class TokenizerFacts:
    """What all sidecars agree on; None where no shard says."""

    vocab_size: int | None
    eod_id: int | None
    tokenizer_sha256: str | None


def shared_facts(prefixes: Sequence[str]) -> TokenizerFacts:
    """The tokenizer behind these shards. ValueError names two that disagree. Shards without a sidecar are not asked."""
    first: tuple[str, ShardMeta] | None = None
    for prefix in prefixes:
        meta = read_meta(prefix)
        if meta is None:
            continue
        first = first or (prefix, meta)
        for key in ("tokenizer_sha256", "vocab_size", "eod_id"):
            ours, theirs = getattr(first[1], key), getattr(meta, key)
            if ours != theirs:
                raise ValueError(
                    f"{prefix}.meta.json says {key} {theirs!r}, {first[0]}.meta.json says {ours!r}: "
                    "all shards of a mixture need one tokenizer; tokenise one of the two again"
                )
    if first is None:
        return TokenizerFacts(None, None, None)
    return TokenizerFacts(first[1].vocab_size, first[1].eod_id, first[1].tokenizer_sha256)


class BlendedLoader:
    """Draws a mixture. `step(s)` is a pure function of (mixture, seed, seq_length, sizes, s); there is nothing to save.

    All shards, validation sets included, must come from one tokenizer. `vocab_size` is what token ids are checked
    against when no sidecar says. Not for concurrent use.
    """

    def __init__(
        self,
        mixture: Mixture,
        seq_length: int,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        vocab_size: int | None = None,
        sample_order: SampleOrder = "documents",
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
        eod_mask_loss: bool = False,
    ) -> None:
        if min(seq_length, global_batch_size, micro_batch_size, dp_size) < 1:
            raise ValueError("seq_length, global_batch_size, micro_batch_size and dp_size must be at least 1")
        if global_batch_size % (micro_batch_size * dp_size):
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} "
                f"* data-parallel size {dp_size}; change one of them"
            )
        assert 0 <= dp_rank < dp_size
        self.mixture, self.seq_length, self.seed = mixture, seq_length, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        train = [prefix for domain in mixture.domains for prefix in domain.prefixes]
        self.meta = shared_facts([*train, *(prefix for prefixes in mixture.valid.values() for prefix in prefixes)])
        self.options = DocumentOptions(self.meta.eod_id, reset_position_ids, reset_attention_mask, eod_mask_loss)
        kernels = default_kernels()
        self._blend = Blend(mixture.weights, seed, kernels, window=global_batch_size)
        self._samples = {  # a domain with weight 0 is never opened
            i: DomainSamples(
                [IndexedDataset(p) for p in domain.prefixes], seq_length, seed, domain.name, kernels, sample_order
            )
            for i, domain in enumerate(mixture.domains)
            if domain.weight > 0
        }
        sources = [self._samples.get(i) for i in range(len(mixture.domains))]
        known = vocab_size if self.meta.vocab_size is None else self.meta.vocab_size
        self._gather = kernels.Gather(sources, micro_batch_size, self.options, known)
        self._first = np.zeros(len(mixture.domains), dtype=np.int64)
        order = np.arange(global_batch_size).reshape(-1, dp_size, micro_batch_size)
        self._mine = np.ascontiguousarray(order[:, dp_rank].reshape(-1))

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of global step `step`, counted from 0."""
        start, size = step * self.global_batch_size, self.global_batch_size
        rows: Rows = self._gather.step(self._blend, self._first, start, size, self._mine)
        return rows.split(self.micro_batch_size)

    def realised(self, consumed_samples: int) -> dict[str, int]:
        """Samples drawn from each domain among the first `consumed_samples`."""
        return dict(zip(self.mixture.names, self._blend.counts(consumed_samples).tolist(), strict=True))

    def epochs(self, consumed_samples: int) -> dict[str, float]:
        """How often each domain's tokens were seen after `consumed_samples`; 0 where the weight is 0."""
        counts = self._blend.counts(consumed_samples)
        return {
            domain.name: float(counts[i]) / self._samples[i].samples_per_epoch if i in self._samples else 0.0
            for i, domain in enumerate(self.mixture.domains)
        }

    def check_epochs(self, total_samples: int) -> None:
        """ValueError if a run of `total_samples` would repeat a domain more often than its max_epochs allows."""
        for i, domain in enumerate(self.mixture.domains):
            if domain.max_epochs is None or i not in self._samples:
                continue
            tokens, needed = self._samples[i].num_tokens, domain.weight * total_samples * self.seq_length
            if needed > domain.max_epochs * tokens * (1 + 1e-9):  # a weight computed as cap * tokens / budget passes
                allowed = domain.max_epochs * tokens / (total_samples * self.seq_length)
                raise ValueError(
                    f"{self.mixture.path or 'mixture'}: train_{domain.name} has {tokens} tokens and weight "
                    f"{domain.weight:.6g}; {total_samples} samples of {self.seq_length} tokens need "
                    f"{needed / tokens:.2f} epochs of it, max_epochs is {domain.max_epochs:g}. "
                    f"The largest weight allowed is {allowed:.6g}: lower it, raise max_epochs, or train for less"
                )

    def fingerprint(self) -> str:
        """Changes when another order or other data would be drawn: shards, weights, seed, sample and batch size."""
        shards = {d.name: [_shard_identity(prefix) for prefix in d.prefixes] for d in self.mixture.domains if d.weight}
        order = [self.mixture.names, self.mixture.weights.tolist(), self.seed, self.seq_length, self._blend.window]
        facts = [ORDER_VERSION, shards, *order]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _shard_identity(prefix: str) -> list[int | str]:
    """Sizes, and a hash of the sidecar; without one, of both ends of the two files."""
    paths = [Path(prefix + end) for end in (".bin", ".idx")]
    sidecar = Path(prefix + ".meta.json")
    digest = hashlib.sha256()
    if sidecar.is_file():
        digest.update(sidecar.read_bytes())
    else:
        for path in paths:
            with open(path, "rb") as file:
                digest.update(file.read(PEEK))
                file.seek(max(0, os.path.getsize(path) - PEEK))
                digest.update(file.read(PEEK))
    return [*(path.stat().st_size for path in paths), digest.hexdigest()]
