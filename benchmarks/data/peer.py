"""megatron-core's side: its own classes, configured as its training script does. Imported in measuring processes."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch.utils.data import default_collate

from benchmarks.data.shards import EOD, SEED, VOCAB

logging.disable(logging.WARNING)


def join_group() -> None:
    """A process group of one: with a cache folder BlendedDataset asks for its rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def config_of(seq_length: int, cache: str, masks: bool = False, **blend: Any) -> GPTDatasetConfig:
    """As pretrain_gpt.py builds it; masks: positions reset and EOD's loss masked (0.16 has no cu_seqlens)."""
    tokenizer = SimpleNamespace(vocab_size=VOCAB, eod=EOD, unique_identifiers={"class": "synthetic"})
    return GPTDatasetConfig(
        random_seed=SEED, sequence_length=seq_length, tokenizer=tokenizer, path_to_cache=cache,
        reset_position_ids=masks, reset_attention_mask=False, eod_mask_loss=masks, create_attention_mask=False, **blend,
    )  # fmt: skip


def build(
    prefixes: list[str], weights: list[float], samples: int, seq_length: int, cache: str, masks: bool, mmap: bool = True
) -> Any:
    """The blended training set."""
    os.makedirs(cache, exist_ok=True)
    config = config_of(seq_length, cache, masks, blend_per_split=[(prefixes, weights), None, None], mmap_bin_files=mmap)
    return BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]


def batch(dataset: Any, start: int, size: int) -> dict[str, torch.Tensor]:
    """Samples start .. start + size - 1, collated."""
    return default_collate([dataset[i] for i in range(start, start + size)])


def blend(weights: list[float], samples: int) -> None:
    """The blend's two indices."""
    which, ordinal = np.zeros(samples, dtype=np.int16), np.zeros(samples, dtype=np.int64)
    helpers.build_blending_indices(which, ordinal, weights, len(weights), samples, False)


def indices(prefix: str, samples: int | None, seq_length: int, cache: str) -> tuple[Any, Any, Any]:
    """Document, sample and shuffle index of one data set, built and cached as Megatron does."""
    low = IndexedDataset(prefix)
    everything = np.arange(len(low), dtype=np.int32)
    config = config_of(seq_length, cache, blend_per_split=[([prefix], None), None, None])
    found = GPTDataset(low, prefix, everything, samples, Split.train, config)
    return found.document_index, found.sample_index, found.shuffle_index
