"""What the loader hands to the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Batch:
    """One micro-batch on the CPU, rows of seq_length tokens. labels_BT[b, t] is the token after tokens_BT[b, t]."""

    tokens_BT: Tensor  # int64
    labels_BT: Tensor  # int64
    loss_mask_BT: Tensor  # float32: 1 where the label counts
    domain_B: Tensor  # int64: index into mixture.domains; 0 in an EvalSet
