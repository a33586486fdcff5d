"""Tensor and sequence parallelism: Megatron's layers on plain tensors, the group passed in as a value."""

from megatron_lite.mesh import TensorParallel

__all__ = ["TensorParallel"]
