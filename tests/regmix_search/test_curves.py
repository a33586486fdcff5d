"""Learning curves: which trial may be stopped, what its end is taken to be, and that no fit is bent by it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from planted_law import NOISE, K, draw, planted

from megatron_lite.process import stop_signal
from megatron_lite.train import Preempted
from regmix_search.config import load_search
from regmix_search.curves import LEAST, Watch, build_rule, estimate, may_stop, read_curve
from regmix_search.goals import Goal, parse_goal
from regmix_search.laws import Effective
from regmix_search.ledger import Trial
from regmix_search.proxies import ProxyTraining

GOAL = parse_goal("a", ["a", "b"])
TRIAL = Trial(1, "train", {"web": 1.0}, 0)


def event(early: float, end: float, **facts: Any) -> dict[str, Any]:
    """A finished trial with one evaluation on the way; the loss b ends 1 above a."""
    points = [{"tokens": t, "losses": {"a": loss, "b": 1 + loss}} for t, loss in ((50, early), (100, end))]
    return {"losses": {"a": end, "b": 1 + end}, "curve": points, **facts}


def line(n: int, noise: float = 0.0, seed: int = 0) -> list[dict[str, Any]]:
    """Trials that end at 1 + early / 2, from 2 to 3, and noise."""
    rng = np.random.default_rng(seed)
    early = np.linspace(2, 4, n)
    return [event(float(x), float(1 + x / 2 + noise * rng.normal())) for x in early]


def point(loss: float, tokens: int = 50) -> dict[str, Any]:
    return {"tokens": tokens, "losses": {"a": loss, "b": 1 + loss}}


def test_the_end_is_estimated_for_every_loss_and_only_far_from_the_better_half() -> None:
    rule = json.loads(json.dumps(build_rule(line(40, noise=0.01), GOAL, ["a", "b"])))
    margin, limit = rule["rungs"]["50"]["margin"], rule["limit"]
    assert limit == pytest.approx(2.5, abs=0.02) and margin == pytest.approx(0.03, rel=0.4)
    found = estimate(rule, point(3.8))
    assert found == {"a": pytest.approx(2.9, abs=0.01), "b": pytest.approx(3.9, abs=0.01)}
    just = 2 * (limit - 1)  # the early loss of a trial that ends at the limit
    assert estimate(rule, point(just + 2 * margin + 0.02)) is not None
    assert estimate(rule, point(just + 2 * margin - 0.02)) is None and estimate(rule, point(2.2)) is None
    assert estimate(rule, point(3.8, tokens=51)) is None and estimate({}, point(3.8)) is None


def test_nobody_is_stopped_before_the_rule_is_known_to_hold() -> None:
    whole = line(LEAST, noise=0.01)
    assert build_rule(whole, GOAL, ["a", "b"]) and not build_rule(whole[1:], GOAL, ["a", "b"])
    stopped = [event(3.0, 2.5, stopped=point(3.0))]
    assert not build_rule(whole[1:] + stopped, GOAL, ["a", "b"]), "an estimate is no evidence"
    assert not build_rule([{**e, "curve": []} for e in whole], GOAL, ["a", "b"])
    assert not build_rule(line(40, noise=0.3), GOAL, ["a", "b"]), "the early loss says too little"


def test_a_rung_that_would_have_stopped_a_good_trial_is_not_used() -> None:
    late = event(4.5, 1.9)  # the worst on the way and the best in the end: 0.2 of the spread still hold
    events = line(400, noise=0.01)
    assert build_rule(events, GOAL, ["a", "b"])["rungs"].keys() == {"50"}
    assert build_rule([*events, late], GOAL, ["a", "b"]) == {}


def test_the_worst_of_several_losses_decides() -> None:
    rule = build_rule(line(40, noise=0.01), Goal({"a": 0.5, "b": 0.5}, worst=True), ["a", "b"])
    assert rule["limit"] == pytest.approx(3.5, abs=0.02) and estimate(rule, point(3.8)) is not None


def test_repeats_held_back_and_every_fifth_trial_always_end() -> None:
    kinds = [(i, kind) for kind in ("train", "holdout", "repeat") for i in range(10)]
    assert [pair for pair in kinds if may_stop(Trial(*pair, {}, 0))] == [(i, "train") for i in (1, 2, 3, 4, 6, 7, 8, 9)]


def sweep(seed: int, n: int = 96) -> dict[str, np.ndarray]:
    """A search of n trials in order under a known law, by what is put in the place of a stopped trial's loss.

    Curves converge at speeds that depend on the mixture, so that one straight line is not the truth either.
    """
    rng, weights = np.random.default_rng(seed), draw(n, seed)
    ends = planted(weights, seed)
    early = ends + 0.4 + 0.5 * (ends - 4.2) + 0.05 * weights[:, 0] + NOISE * rng.normal(size=n)
    kept = {"estimated": [], "early": [], "dropped": [], "all": ends}
    events: list[dict[str, Any]] = []
    for i in range(n):
        told = estimate(build_rule(events, GOAL, ["a", "b"]), point(early[i])) if i % 5 else None
        facts = {} if told is None else {"stopped": point(early[i])}
        end = ends[i] if told is None else told["a"]
        events.append(event(early[i], end, **facts))
        kept["estimated"].append(end)
        kept["early"].append(ends[i] if told is None else early[i])
        kept["dropped"].append(told is None)
    return {name: np.array(values) for name, values in kept.items()} | {"weights": weights}


def test_stopped_trials_do_not_bend_the_fit() -> None:
    """The law fitted with estimates is where the law fitted to all ends is; with early losses as they are it is not."""
    grid, shifts, cost, share = draw(400, 99), dict[str, list[float]](), dict[str, list[float]](), []
    for seed in range(8):
        found = sweep(seed)
        share.append(1 - found["dropped"].mean())
        whole = Effective().fit(found["weights"], found["all"])
        for name in ("estimated", "early"):
            law = Effective().fit(found["weights"], found[name])
            shifts.setdefault(name, []).append(float(np.mean(law.predict(grid) - whole.predict(grid))))
            best = [planted(model.argmin(np.ones(K))[None])[0] for model in (law, whole)]
            cost.setdefault(name, []).append(float(best[0] - best[1]))
    mean = {name: (np.mean(values), np.std(values) / np.sqrt(8)) for name, values in shifts.items()}
    print(np.mean(share), mean, {name: np.mean(values) for name, values in cost.items()})
    assert 0.2 < np.mean(share) < 0.5
    assert abs(mean["estimated"][0]) < 0.3 * NOISE and mean["early"][0] > 3 * NOISE
    assert abs(np.mean(cost["estimated"])) < 0.2 * NOISE


def test_curves_are_kept_with_their_last_whole_line(tmp_path: Path) -> None:
    row = {"step": 5, "tokens": 50, "valid/a/loss": 3.0, "valid/a/bpb": 1.0, "valid/b/loss": 4.0}
    (tmp_path / "evals.jsonl").write_text(json.dumps(row) + "\n" + '{"step": 10, "tok')
    assert read_curve(tmp_path) == [point(3.0)] and read_curve(tmp_path / "none") == []


class Loop:
    """Stands for megatron_lite.train.train: evaluates once and goes on until it is stopped, or for 0.7 s."""

    def __init__(self, early: float) -> None:
        self.early = early

    def __call__(self, config: Any, mixture: object) -> Any:
        config.run_dir.mkdir(parents=True)
        (config.run_dir / "plan.json").write_text('{"total_flops": 1000.0, "total_tokens": 100}')
        (config.run_dir / "step_0000005").mkdir()
        row = {"step": 5, "tokens": 50, "valid/a/loss": self.early, "valid/b/loss": 1 + self.early}
        (config.run_dir / "evals.jsonl").write_text(json.dumps(row) + "\n")
        with stop_signal() as stop:
            end = time.monotonic() + 0.7
            while time.monotonic() < end and not stop:
                time.sleep(0.01)
        if stop:
            raise Preempted(6)
        done = {"losses": {"a": 2.0, "b": 3.0}, "bpb": {}, "tokens": 100, "steps": 10, "seconds": 1.0, "flops": 1000.0}
        return SimpleNamespace(**done, eval_seconds=0.1)


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("regmix_search.curves.POLL", 0.05)
    monkeypatch.setattr("megatron_lite.data.mixture.Mixture.from_weights", lambda *args, **facts: None)
    rule = build_rule(line(40, noise=0.01), GOAL, ["a", "b"])
    (tmp_path / "stopping.json").write_text(json.dumps(rule))

    def run(early: float, trial: Trial = TRIAL, stops: bool = True) -> dict[str, Any]:
        monkeypatch.setattr("megatron_lite.train.train", Loop(early))
        config = load_search(None).proxy
        return ProxyTraining(config, "shards", ("a", "b"), str(tmp_path / "proxies"), stops)(trial)

    return run


def test_a_hopeless_proxy_is_stopped_and_its_end_estimated(proxy: Any, tmp_path: Path) -> None:
    found = proxy(3.8)
    assert found["losses"] == {"a": pytest.approx(2.9, abs=0.01), "b": pytest.approx(3.9, abs=0.01)}
    assert found["stopped"] == point(3.8) and (found["tokens"], found["flops"]) == (50, 500.0)
    assert found["curve"] == [point(3.8)] and found["run_dir"] == "proxies/t0001"
    assert not list((tmp_path / "proxies").rglob("step_*"))
    json.dumps(found, allow_nan=False)


def test_others_go_to_their_end(proxy: Any) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    whole = [proxy(2.5), proxy(3.8, stops=False), proxy(3.8, Trial(5, "train", {"web": 1.0}, 0))]
    whole.append(proxy(3.8, Trial(1, "holdout", {"web": 1.0}, 0)))
    assert all("stopped" not in found and found["losses"]["a"] == 2.0 for found in whole)
    assert signal.getsignal(signal.SIGUSR1) == before


def test_somebody_elses_signal_is_not_taken_for_a_stop(tmp_path: Path) -> None:
    with pytest.raises(Preempted), Watch(tmp_path, tmp_path / "none.json") as watch, stop_signal() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        while not stop:
            time.sleep(0.01)
        assert watch.losses is None
        raise Preempted(1)


def test_stopping_needs_evaluations_on_the_way() -> None:
    with pytest.raises(ValueError, match=r"set proxy.eval.every \(is 0\)"):
        load_search(None, overrides=("proxies.stop_hopeless=true",))
    assert load_search(None, overrides=("proxies.stop_hopeless=true", "proxy.eval.every=5")).proxies.stop_hopeless
