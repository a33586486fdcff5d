"""Megatron-style training of language models on data mixtures that are searched for, not guessed."""

__version__ = "0.1.0"
