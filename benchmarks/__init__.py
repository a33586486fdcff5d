"""One file a claim: each prints a table, takes --json, and compares with a peer from PyPI in the same run."""
