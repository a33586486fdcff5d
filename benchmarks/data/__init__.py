"""Reading data against megatron-core's own classes: python -m benchmarks.data."""
