"""Entry points: train, and what starts it on one or many nodes."""
