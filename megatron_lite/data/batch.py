"""What the loader hands to the model."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]
TOKEN_LIMIT = 1 << 31  # token ids are below: batches hold 32 bits


@dataclass
class Batch:
    """One micro-batch on the CPU, rows of seq_length tokens. labels_BT[b, t] is the token after tokens_BT[b, t].

    Both may be views of one array [B, T + 1]: half of the memory to fill. Neither is to be written to.
    """

    tokens_BT: Tensor  # int32, half of the memory of int64; torch.nn.functional.cross_entropy wants labels_BT.long()
    labels_BT: Tensor  # int32
    loss_mask_BT: Tensor  # bool: true where the label counts; read-only unless eod_mask_loss
    domain_B: Tensor  # int64: index into loader.names; 0 in an EvalSet
    position_ids_BT: Tensor | None = None  # int32: place in the document; None: 0 to seq_length - 1
    cu_seqlens: Tensor | None = None  # int32: where documents start in the flattened B*T, and B*T; None: rows are whole
    max_seqlen: int | None = None  # tokens of the longest document piece in cu_seqlens
    weight_B: Tensor | None = None  # float32: factor of the row's losses (megatron_lite/run.py, Reweighting); None: 1
    reference_BT: Tensor | None = None  # float32: another model's losses, to measure the excess over them


@dataclass(frozen=True)
class DocumentOptions:
    """What the end of a document means to the model: Megatron's flags of these names. EOD belongs to what it ends."""

    eod_id: int | None = None
    reset_position_ids: bool = False  # positions count from 0 after each EOD
    reset_attention_mask: bool = False  # no attention from one document to another
    eod_mask_loss: bool = False  # what follows an EOD is not learned

    def __post_init__(self) -> None:
        wanted = [name for name, value in vars(self).items() if value is True]
        if wanted and self.eod_id is None:
            raise ValueError(
                f"data.{wanted[0]} needs the EOD id, and no sidecar of this mixture has one: tokenise with "
                "--append-eod, give old shards a sidecar (data_tools/inspect_data.py --write-sidecar), or set "
                f"data.{wanted[0]} to false"
            )

    @property
    def any(self) -> bool:
        """True where documents mean something."""
        return self.reset_position_ids or self.reset_attention_mask or self.eod_mask_loss


NO_MARKS = DocumentOptions()


@dataclass
class Rows:
    """Samples [rows, seq_length] of consecutive micro-batches in numpy. The last four are None where nobody asked."""

    domain: IntArray
    ordinal: IntArray
    tokens: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_] | None = None
    position_ids: npt.NDArray[np.int32] | None = None
    cu_seqlens: list[npt.NDArray[np.int32]] | None = None  # of each micro-batch
    max_seqlen: list[int] | None = None

    def split(self, micro_batch_size: int) -> list[Batch]:
        """The micro-batches, sharing memory with the rows."""
        micro_batches, optional = [], (self.loss_mask, self.position_ids)
        for i, start in enumerate(range(0, len(self.tokens), micro_batch_size)):
            end = start + micro_batch_size
            tokens, labels, domain = (
                torch.from_numpy(array[start:end]) for array in (self.tokens, self.labels, self.domain)
            )
            mask, position_ids = (None if array is None else torch.from_numpy(array[start:end]) for array in optional)
            cu_seqlens = None if self.cu_seqlens is None else torch.from_numpy(self.cu_seqlens[i])
            longest = None if self.max_seqlen is None else self.max_seqlen[i]
            mask = _ones(*tokens.shape) if mask is None else mask
            micro_batches.append(Batch(tokens, labels, mask, domain, position_ids, cu_seqlens, longest))
        return micro_batches


@functools.cache
def _ones(rows: int, seq_length: int) -> Tensor:
    """One value seen as a whole mask: it is never written, and torch refuses to write to it."""
    return torch.ones(1, dtype=torch.bool).expand(rows, seq_length)


def mark_documents(rows: Rows, options: DocumentOptions, micro_batch_size: int) -> None:
    """Fill loss_mask, position_ids, cu_seqlens and max_seqlen of `rows` from its tokens: csrc/rows.cpp in numpy."""
    count, seq_length = rows.tokens.shape
    eod = rows.tokens == options.eod_id
    if options.eod_mask_loss:
        rows.loss_mask = ~eod
    begins = np.zeros((count, seq_length), dtype=bool)
    begins[:, 0], begins[:, 1:] = True, eod[:, :-1]
    if options.reset_position_ids:
        place = np.arange(seq_length, dtype=np.int32)
        rows.position_ids = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    if options.reset_attention_mask:
        pieces: list[npt.NDArray[Any]] = [
            begins[i : i + micro_batch_size].reshape(-1) for i in range(0, count, micro_batch_size)
        ]
        rows.cu_seqlens = [np.append(np.flatnonzero(piece), piece.size).astype(np.int32) for piece in pieces]
        rows.max_seqlen = [int(np.diff(cu).max()) for cu in rows.cu_seqlens]
