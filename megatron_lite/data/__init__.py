"""Shards to batches: mixture and indexed are files, samples and blend are pure functions, loader joins them."""
