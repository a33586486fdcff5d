"""run_distributed: answers by rank, and a failure that names the ranks."""

import os
import time

import pytest

from megatron_lite import testing
from megatron_lite.testing import run_distributed


def falls_silent(how: str) -> int:
    rank = int(os.environ["RANK"])
    if rank == 1 and how == "dies":
        os._exit(7)
    if rank == 1 and how == "raises":
        raise RuntimeError("of its own")
    if rank == 1 and how == "hangs":
        time.sleep(600)
    return rank


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", r"(?s)rank 1 failed:.*of its own"),
        ("dies", r"no answer .*\b1: 7\b"),
        ("hangs", r"no answer .*\b1: None\b"),
    ],
)
def test_a_rank_that_does_not_answer_is_named(monkeypatch, how, message):
    monkeypatch.setattr(testing, "TIMEOUT_S", 12)
    with pytest.raises(AssertionError, match=message):
        run_distributed(falls_silent, 2, how)
