"""Global batches -> this rank's micro-batches. The only state is the step: the same samples for any layout and resume.

Global step s is samples [s * G, (s + 1) * G) of the blend. They are dealt out micro-batch by micro-batch and, inside
one, rank by rank, so that reading m = 0, 1, ... and ranks 0, 1, ... gives the global order back.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from megatron_lite.data.batch import Batch, DocumentOptions, IntArray, Rows
from megatron_lite.data.evalset import EvalSet
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.megatron_order import MegatronOptions, build_megatron
from megatron_lite.data.mixture import Domain, Mixture
from megatron_lite.data.native import kernels as default_kernels
from megatron_lite.data.samples import DomainSamples, SampleOrder
from megatron_lite.data.sidecar import ShardMeta, TokenizerFacts, read_meta, shared_facts
from megatron_lite.data.stages import Stage, StagedBlend, resumed_stages

__all__ = ["Batch", "BlendedLoader", "EvalSet", "TokenizerFacts"]

ORDER_VERSION = 1  # of the sample order: raise it when the same seed would draw other samples


class BlendedLoader:
    """Draws a mixture. `step(s)` is a pure function of (stages, seed, seq_length, sizes, s): nothing counts up.

    `change_mixture` says what is drawn from a later step on; domain indices are those of `names`. All shards,
    validation sets included, must come from one tokenizer. `vocab_size` is what token ids are checked against when no
    sidecar says. One thread may draw while another changes the mixture.
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
        megatron: MegatronOptions | None = None,
    ) -> None:
        if min(seq_length, global_batch_size, micro_batch_size, dp_size) < 1:
            raise ValueError("seq_length, global_batch_size, micro_batch_size and dp_size must be at least 1")
        if global_batch_size % (micro_batch_size * dp_size):
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} "
                f"* data-parallel size {dp_size}; change one of them"
            )
        assert 0 <= dp_rank < dp_size and (megatron is not None) == (sample_order == "megatron")
        self.mixture, self.seq_length, self.seed = mixture, seq_length, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self._vocab_size, self._sample_order, self._kernels = vocab_size, sample_order, default_kernels()
        self._megatron = megatron
        self._marks = (reset_position_ids, reset_attention_mask, eod_mask_loss)
        self.valid: dict[str, tuple[str, ...]] = {}  # validation sets of all stages
        self.domains: dict[str, Domain] = {}  # as the last mixture that has each says, but a cap stays
        self.facts: dict[str, Any] = {}  # of each domain ever drawn: its tokens, and what tells its shards from others
        self._samples: dict[str, DomainSamples] = {}  # a domain that is never drawn is never opened
        self._sources: list[DomainSamples | None] = []  # by domain index
        self._lock = threading.Lock()  # blend and gather belong together: for whoever draws, and whoever changes them
        self.blend = StagedBlend([], seed, self._kernels, global_batch_size)
        self.change_mixture(0, mixture)
        order = np.arange(global_batch_size).reshape(-1, dp_size, micro_batch_size)
        self._mine = np.ascontiguousarray(order[:, dp_rank].reshape(-1))

    @property
    def names(self) -> tuple[str, ...]:
        """All domains of all stages, in the order in which they first appear; Batch.domain_B counts in it."""
        return self.blend.names

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What is drawn from which step on. A new tuple after each change: whoever draws ahead can compare."""
        return self.blend.stages

    def change_mixture(self, first_step: int, mixture: Mixture) -> None:
        """Draw `mixture` from step `first_step` on: at or after the last change. No sample is lost or repeated.

        Domains are matched by name, and go on where they were. ValueError where a name has other shards than before.
        """
        stages = self.stages
        if first_step < 0 or (stages and first_step < stages[-1].first_step):
            raise ValueError(f"a change at step {first_step} would rewrite the stage from step {stages[-1].first_step}")
        domains = dict(self.domains)
        for domain in mixture.domains:
            known = self.domains.get(domain.name, domain)
            cap = known.max_epochs if domain.max_epochs is None else domain.max_epochs
            domains[domain.name] = replace(domain, max_epochs=cap)
            if known.prefixes != domain.prefixes:
                raise ValueError(
                    f"{mixture.path or 'mixture'}: domain {domain.name!r} is {', '.join(domain.prefixes)}, before step "
                    f"{first_step} it was {', '.join(known.prefixes)}: other data is another domain, give it a new name"
                )
        past, metas = [stage for stage in stages if stage.first_step < first_step], dict[str, ShardMeta | None]()
        valid = {**self.valid, **mixture.valid}
        if (domains.keys(), valid) != (self.domains.keys(), self.valid):
            shards = [*(domain.prefixes for domain in domains.values()), *valid.values()]
            metas = {prefix: read_meta(prefix) for prefixes in shards for prefix in prefixes}
            self.meta = shared_facts(metas)
        self.domains, self.valid = domains, valid
        stage = Stage(first_step, dict(zip(mixture.names, mixture.weights.tolist(), strict=True)), self.seq_length)
        blend = None
        if self._megatron:
            if stages:
                raise ValueError("data.sample_order=megatron has one mixture from the first step to the last")
            sizes = (self.seq_length, self.global_batch_size)
            blend, self._samples = build_megatron(mixture, *sizes, self.seed, self._megatron, self._kernels)
        self._open(stage.drawn, metas)
        with self._lock:
            if len(past) == len(stages):
                self.blend.add(stage, blend)
            else:
                self.blend = StagedBlend([*past, stage], self.seed, self._kernels, self.global_batch_size)
            self._connect()

    def _open(self, names: Iterable[str], metas: Mapping[str, ShardMeta | None]) -> None:
        for name in [n for n in dict.fromkeys(names) if n in self.domains and n not in self._samples]:
            datasets = [IndexedDataset(prefix, meta=metas.get(prefix)) for prefix in self.domains[name].prefixes]
            samples = DomainSamples(datasets, self.seq_length, self.seed, name, self._kernels, self._sample_order)
            self._samples[name] = samples
        for name, samples in self._samples.items():
            shards = [dataset.identity for dataset in samples.datasets]
            self.facts.setdefault(name, {"tokens": samples.num_tokens, "shards": shards})

    def _connect(self) -> None:
        """A reader for what is open; the same one as long as that and its numbers stay the same."""
        sources = [self._samples.get(name) for name in self.names]
        if sources != self._sources:
            self.options = DocumentOptions(self.meta.eod_id, *self._marks)
            known = self._vocab_size if self.meta.vocab_size is None else self.meta.vocab_size
            self._gather = self._kernels.Gather(sources, self.micro_batch_size, self.options, known)
            self._sources = sources

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of global step `step`, counted from 0."""
        with self._lock:
            blend, first, start = self.blend.at(step * self.global_batch_size)
            rows: Rows = self._gather.step(blend, first, start, self.global_batch_size, self._mine)
        return rows.split(self.micro_batch_size)

    def drawn(self, step: int) -> tuple[IntArray, IntArray]:
        """Domain index and ordinal of this rank's samples of a step, in the order of its micro-batches."""
        domain, ordinal = self.blend.draw(step * self.global_batch_size, self.global_batch_size)
        return domain[self._mine].astype(np.int64), ordinal[self._mine]

    def realised(self, consumed_samples: int) -> dict[str, int]:
        """Samples drawn from each domain among the first `consumed_samples`."""
        return dict(zip(self.names, self.blend.counts(consumed_samples).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What is drawn, as JSON: settings, tokenizer, shards, stages. All positions follow from the step."""
        return {
            "order": ORDER_VERSION,
            "seed": self.seed,
            "data.seq_length": self.seq_length,
            "data.sample_order": self._sample_order,
            "megatron": self._megatron and str((*self._megatron, *(d.written for d in self.mixture.domains))),
            "batch.global_batch_size": self.global_batch_size,
            "tokenizer": asdict(self.meta),
            "domains": {name: self.facts[name] for name in self.names if name in self.facts},
            "stages": [asdict(stage) for stage in self.stages],
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Go on at `step` of a run that saved `state`: its stages until then, ours from then on; see resume.py."""
        gone = state["domains"].keys() - self.domains.keys()  # nothing of theirs is drawn again
        self.facts |= {name: state["domains"][name] for name in gone}
        earliest = step * self.global_batch_size if gone else 0
        stages = resumed_stages([Stage(**stage) for stage in state["stages"]], self.stages, step)
        if self._megatron:
            assert len(stages) == 1, "data.sample_order=megatron has one mixture from the first step to the last"
            return
        self._open((name for stage in stages for name in stage.drawn), {})
        with self._lock:
            self.blend = StagedBlend(stages, self.seed, self._kernels, self.global_batch_size, earliest)
            self._connect()

    def fingerprint(self) -> str:
        """Changes when another order or other data would be drawn: shards, weights, seed, sample and batch size."""
        return hashlib.sha256(json.dumps(self.state_dict()).encode()).hexdigest()
