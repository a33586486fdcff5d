"""The ledger: nothing that was finished is lost or repeated, whatever dies when."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from regmix_search.config import SearchConfig
from regmix_search.fingerprint import settings
from regmix_search.freshness import digest_of
from regmix_search.ledger import Counts, Ledger, Trial, check_fingerprint, fingerprint_path, replay

FINGERPRINT = {"settings": {"proxy": {"optim": {"lr": 0.003}}, "seed": 0}, "shards": "abc"}


def plan(n: int = 4) -> list[Trial]:
    return [Trial(i, "train", {"a": i / 10, "b": 1 - i / 10}, seed=7) for i in range(n)]


def open_ledger(tmp_path: Path, n: int = 4, retries: int = 2, **changes: object) -> Ledger:
    return Ledger(tmp_path / "trials.jsonl", plan(n), {**FINGERPRINT, **changes}, retries)


def claim(ledger: Ledger) -> Trial:
    trial = ledger.ask()
    assert trial is not None
    return trial


def test_ask_tell_hands_out_every_trial_once(tmp_path):
    ledger, seen = open_ledger(tmp_path), []
    while (trial := ledger.ask()) is not None:
        seen.append(trial.index)
        ledger.tell(trial, losses={"readme": 5.0 - trial.index}, tokens=100, seconds=1.5)
    assert seen == [0, 1, 2, 3]
    assert ledger.counts == Counts(finished=4, running=0, failed=0, waiting=0)
    again = open_ledger(tmp_path)
    assert again.ask() is None
    assert again.finished[3]["losses"] == {"readme": 2.0} and again.finished[3]["weights"] == plan()[3].weights


def test_events_are_json_lines_that_say_who_and_what(tmp_path):
    ledger = open_ledger(tmp_path)
    ledger.tell(claim(ledger), losses={"readme": 5.0})
    claimed, finished = map(json.loads, (tmp_path / "trials.jsonl").read_text().splitlines())
    assert (claimed["event"], finished["event"]) == ("claim", "finish")
    for event in (claimed, finished):
        assert event["trial"] == 0 and event["kind"] == "train" and event["seed"] == 7
        assert event["pid"] == os.getpid() and event["time"] > 1e9 and event["config_hash"] == ledger.config_hash


def test_claims_of_a_dead_owner_are_free_again(tmp_path):
    first = open_ledger(tmp_path)
    done, _lost = claim(first), claim(first)
    first.tell(done, losses={"readme": 1.0})
    second = open_ledger(tmp_path)
    assert second.counts == Counts(finished=1, running=1, failed=0, waiting=2)
    assert claim(second).index == 2
    first.driver.close()
    second.driver._seen.clear()
    assert second.counts == Counts(finished=1, running=1, failed=0, waiting=2)
    assert claim(second).index == 1


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_skipped_and_the_next_append_starts_a_new_one(tmp_path, cut):
    first = open_ledger(tmp_path)
    for _ in range(2):
        first.tell(claim(first), losses={"readme": 1.0})
    path = tmp_path / "trials.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    first.driver.close()
    second = open_ledger(tmp_path)
    whole = cut == 1  # only the newline is gone: the event itself is complete
    assert sorted(second.finished) == ([0, 1] if whole else [0])
    second.tell(claim(second), losses={"readme": 2.0})
    second.driver.close()
    third = open_ledger(tmp_path)
    assert sorted(third.finished) == ([0, 1, 2] if whole else [0, 1])
    assert third.torn_lines == ([] if whole else [4])
    assert third.finished[max(third.finished)]["losses"] == {"readme": 2.0}


def test_every_truncation_replays_to_a_prefix_of_the_truth(tmp_path):
    ledger = open_ledger(tmp_path)
    for _ in range(3):
        ledger.tell(claim(ledger), losses={"readme": 1.0})
    path = tmp_path / "trials.jsonl"
    data = path.read_bytes()
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        assert sorted(replay(path).finished) == list(range(len(replay(path).finished)))


def test_failures_are_retried_last_and_only_so_often(tmp_path):
    ledger = open_ledger(tmp_path, n=2, retries=1)
    assert ledger.fail(claim(ledger), "worker killed by SIGKILL", retry=True) is True
    assert claim(ledger).index == 1
    again = claim(ledger)
    assert again.index == 0
    assert ledger.fail(again, "worker killed by SIGKILL again", retry=True) is False
    ledger.tell(Trial(1, "train", plan()[1].weights, 7), losses={"readme": 1.0})
    assert ledger.failed == {0: "worker killed by SIGKILL again"}
    assert open_ledger(tmp_path, n=2, retries=1).failed == {0: "worker killed by SIGKILL again"}
    assert claim(open_ledger(tmp_path, n=2, retries=2)).index == 0, "more retries give it another chance"


def test_a_diverged_trial_is_not_retried(tmp_path):
    ledger = open_ledger(tmp_path, n=1)
    assert ledger.fail(claim(ledger), "FloatingPointError: step 3", retry=False) is False
    assert ledger.ask() is None and ledger.counts.failed == 1


def test_other_settings_are_refused_with_the_difference(tmp_path):
    ledger = open_ledger(tmp_path)
    ledger.tell(claim(ledger), losses={"readme": 1.0})
    before = (tmp_path / "trials.jsonl").read_bytes()
    changed = {"proxy": {"optim": {"lr": 0.1}}, "seed": 0}
    with pytest.raises(ValueError, match=r"settings\.proxy\.optim\.lr: 0\.003 -> 0\.1") as caught:
        open_ledger(tmp_path, settings=changed)
    assert "out_dir" in str(caught.value)
    assert (tmp_path / "trials.jsonl").read_bytes() == before
    assert sorted(open_ledger(tmp_path).finished) == [0], "the refusal must not have touched the fingerprint"


def test_a_partial_fingerprint_compares_only_what_it_names(tmp_path):
    ledger = open_ledger(tmp_path)
    ledger.tell(claim(ledger), losses={"readme": 1.0})
    check_fingerprint(ledger.path, {"settings": FINGERPRINT["settings"]})
    with pytest.raises(ValueError, match="shards"):
        check_fingerprint(ledger.path, {"shards": "other"})


def forget(path: Path, *keys: tuple[str, ...]) -> None:
    """Takes keys out of a ledger's fingerprint and names its lines by what is left, as an older version wrote them."""
    facts = json.loads(fingerprint_path(path).read_text())
    before = digest_of(facts)
    for *sections, key in keys:
        part = facts["settings"]
        for section in sections:
            part = part[section]
        del part[key]
    fingerprint_path(path).write_text(json.dumps(facts))
    path.write_text(path.read_text().replace(before, digest_of(facts)))


KEYS = [("proxy", "cuda_graphs"), ("proxy", "reweighting"), ("proxy", "optim", "clip_grad"), ("proxy", "eval")]


def test_a_search_from_before_there_were_some_keys_goes_on(tmp_path):
    """They were at their defaults; its lines are known by the fingerprint that they were written under."""
    known = settings(SearchConfig())["settings"]
    ledger = open_ledger(tmp_path, settings=known)
    ledger.tell(claim(ledger), losses={"readme": 1.0})
    ledger.fail(claim(ledger), "FloatingPointError: step 3", retry=False)
    forget(ledger.path, *KEYS, ("shards", "match_repetition"))
    again = open_ledger(tmp_path, settings=known)
    assert sorted(again.finished) == [0] and sorted(again.failed) == [1] and claim(again).index == 2
    again.tell(again.trials[2], losses={"readme": 2.0})
    third = open_ledger(tmp_path, settings=known)
    assert sorted(third.finished) == [0, 2] and sorted(third.failed) == [1]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (KEYS[0], True, r"proxy\.cuda_graphs: False -> True"),
        (KEYS[2], 0.5, r"proxy\.optim\.clip_grad: 1\.0 -> 0\.5"),
        (("corpus",), {"kind": "local"}, r"settings\.corpus: None -> "),
    ],
)
def test_a_key_that_there_was_not_yet_must_be_at_its_default(tmp_path, key, value, said):
    known = settings(SearchConfig())["settings"]
    ledger = open_ledger(tmp_path, settings=known)
    ledger.tell(claim(ledger), losses={"readme": 1.0})
    forget(ledger.path, key)
    *sections, last = key
    part = known
    for section in sections:
        part = part[section]
    part[last] = value
    with pytest.raises(ValueError, match=said):
        open_ledger(tmp_path, settings=known)


def test_another_mixture_under_the_same_number_is_refused(tmp_path):
    ledger = open_ledger(tmp_path)
    ledger.tell(claim(ledger), losses={"readme": 1.0})
    other = [Trial(0, "train", {"a": 0.5, "b": 0.5}, seed=7)]
    with pytest.raises(ValueError, match=r"t0000\.weights\.a: 0\.0 -> 0\.5"):
        Ledger(tmp_path / "trials.jsonl", other, FINGERPRINT)


def test_a_search_can_be_extended(tmp_path):
    ledger = open_ledger(tmp_path, n=1)
    ledger.tell(claim(ledger), losses={"readme": 1.0})
    longer = open_ledger(tmp_path, n=3)
    assert longer.counts == Counts(finished=1, running=0, failed=0, waiting=2)


def test_a_search_in_which_nothing_worked_starts_afresh(tmp_path):
    ledger = open_ledger(tmp_path, n=1)
    ledger.fail(claim(ledger), "FloatingPointError: a bug that was mended since", retry=False)
    assert claim(open_ledger(tmp_path, n=1)).index == 0


def test_failures_of_mended_settings_do_not_count(tmp_path):
    ledger = open_ledger(tmp_path, n=2)
    ledger.fail(claim(ledger), "FloatingPointError: lr too high", retry=False)
    settings = {"proxy": {"optim": {"lr": 0.001}}, "seed": 0}
    mended = open_ledger(tmp_path, n=2, settings=settings)
    assert claim(mended).index == 0
    mended.tell(claim(mended), losses={"readme": 1.0})
    mended.driver.close()
    assert claim(open_ledger(tmp_path, n=2, settings=settings)).index == 0


def test_trials_without_a_fingerprint_are_refused(tmp_path):
    ledger = open_ledger(tmp_path)
    ledger.tell(claim(ledger), losses={"readme": 1.0})
    fingerprint_path(ledger.path).unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        open_ledger(tmp_path)


def test_junk_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_text('{"event": "finish", "trial": 0, "losses": {"a": 1}}\n{"something": "else"}\n')
    with pytest.raises(ValueError, match=r"trials\.jsonl, line 2"):
        replay(path)


def test_nan_never_enters(tmp_path):
    ledger = open_ledger(tmp_path)
    with pytest.raises(ValueError):
        ledger.tell(claim(ledger), losses={"readme": float("nan")})
    assert replay(ledger.path).finished == {}


def test_a_kill_between_any_two_writes_loses_nothing_that_was_told(tmp_path):
    """A real process told to finish trials for ever is killed -9: what it said was finished is in the file."""
    script = (
        f"import sys; sys.path[:0] = {sys.path}\n"
        "from pathlib import Path; from regmix_search.ledger import Ledger, Trial\n"
        "trials = [Trial(i, 'train', {'a': 1.0}, 0) for i in range(100000)]\n"
        f"ledger = Ledger(Path({str(tmp_path)!r}) / 'trials.jsonl', trials, {{}})\n"
        "for trial in trials:\n"
        "    ledger.tell(trial, losses={'x': float(trial.index)})\n"
        "    print(trial.index, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    told = [int(child.stdout.readline()) for _ in range(25)]
    child.send_signal(signal.SIGKILL)
    told += [int(line) for line in child.stdout.read().split("\n")[:-1]]
    child.wait()
    finished = replay(tmp_path / "trials.jsonl").finished
    assert set(told) <= set(finished) and len(finished) <= len(told) + 1
    assert all(event["losses"] == {"x": float(i)} for i, event in finished.items())
