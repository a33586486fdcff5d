"""Drawing ahead changes nothing but when: the same batches, errors where they are asked for, no thread left behind."""

import signal
import threading
import time
import traceback
from dataclasses import fields

import numpy as np
import pytest
import torch

from megatron_lite.data import prefetch
from megatron_lite.data.loader import BlendedLoader
from megatron_lite.data.mixture import Mixture
from megatron_lite.data.prefetch import Prefetch
from megatron_lite.files import read_jsonl
from megatron_lite.testing import tiny_config, write_tiny_shards
from megatron_lite.train import Preempted, train

SEQ, BATCH = 16, 8
MARKS = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}


@pytest.fixture
def shards(tmp_path, make_shard, random_lengths):
    for i, name in enumerate(("a", "b", "late")):
        make_shard(f"train_{name}", random_lengths(60), "uint16", first=10_000 * i, vocab_size=60_000)
    return tmp_path


def loader(shards, weights, **kwargs):
    return BlendedLoader(Mixture.from_weights(weights, shards), SEQ, 7, BATCH, 2, **kwargs)


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        for field in fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert (a is None and b is None) or np.array_equal(a, b), field.name


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("marks", [{}, MARKS], ids=["plain", "marks"])
def test_batches_are_those_of_the_loader_in_any_order_of_steps(shards, marks):
    plain, weights = loader(shards, {"a": 0.7, "b": 0.3}, **marks), {"a": 0.7, "b": 0.3}
    with Prefetch(loader(shards, weights, **marks), 300) as ahead:
        held = [
            (step, ahead.step(step)) for step in (0, 1, 2, 3, 250, 251, 2, 3, 299)
        ]  # a resume, a step back, the end
    for step, batches in held:  # memory that is used again is not that of a batch that somebody holds
        assert_same(batches, plain.step(step))


def test_the_next_step_is_drawn_while_this_one_computes(shards):
    ours, drawn = loader(shards, {"a": 0.7, "b": 0.3}), []
    step = ours.step
    ours.step = lambda s: drawn.append((s, threading.current_thread().name)) or step(s)
    with Prefetch(ours, 3) as ahead:
        for s in range(3):
            ahead.step(s)
            deadline = time.monotonic() + 60
            while len(drawn) < min(s + 2, 3) and time.monotonic() < deadline:
                time.sleep(0.001)
    assert [s for s, _ in drawn] == [0, 1, 2], "each step once, none beyond the end"
    assert drawn[0][1] == "MainThread" and all(name.startswith("prefetch") for _, name in drawn[1:])


def test_a_mixture_that_changes_drops_what_was_drawn_ahead(shards):
    before, after = {"a": 0.75, "b": 0.25}, {"late": 0.5, "b": 0.5}
    plain = loader(shards, before)
    with Prefetch(loader(shards, before), 100) as ahead:
        for step in range(40):
            if step % 10 == 7:
                for one in (plain, ahead.loader):
                    one.change_mixture(step, Mixture.from_weights(after if step % 20 == 7 else before, shards))
            assert_same(ahead.step(step), plain.step(step))


def test_a_change_waits_for_the_draw_that_has_begun(shards):
    ours, inside, go_on, order = loader(shards, {"a": 1.0}), threading.Event(), threading.Event(), []
    gather = ours._gather.step

    def slow(*args):
        inside.set()
        assert go_on.wait(10)
        order.append("drawn")
        return gather(*args)

    def change():
        ours.change_mixture(2, Mixture.from_weights({"late": 1.0}, shards))
        order.append("changed")

    ours._gather.step = slow
    drawing, changing = threading.Thread(target=ours.step, args=(2,)), threading.Thread(target=change)
    drawing.start()
    assert inside.wait(10)
    changing.start()
    changing.join(0.2)
    assert order == [] and changing.is_alive()
    go_on.set()
    changing.join(10), drawing.join(10)
    assert order == ["drawn", "changed"]


def test_an_error_is_raised_by_the_step_that_asks_for_its_batch_with_its_own_traceback(shards):
    ours = loader(shards, {"a": 1.0})
    step = ours.step

    def broken_step(s):
        if s == 2:
            raise ValueError("the disk is gone")
        return step(s)

    ours.step = broken_step
    with Prefetch(ours, 10) as ahead:
        ahead.step(0)
        ahead.step(1)  # its batch is good; that of step 2 is not, and nobody asked for it yet
        with pytest.raises(ValueError, match="the disk is gone") as caught:
            ahead.step(2)
        frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert frames[-1] == "broken_step" and threads()
    assert not threads()


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, Preempted])
def test_no_thread_is_left(shards, error):
    with pytest.raises(error) if error else torch.no_grad(), Prefetch(loader(shards, {"a": 1.0}), 100) as ahead:
        ahead.step(0)
        assert threads()
        if error:
            raise error(1)
    assert not threads()


def test_only_a_gpu_gets_pinned_memory(shards, monkeypatch):
    pinned, devices = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append((device, threading.current_thread())))
    plain, device = loader(shards, {"a": 1.0}, **MARKS), torch.device("cuda", 3)
    with Prefetch(loader(shards, {"a": 1.0}, **MARKS), 2) as ahead:
        ahead.step(0), ahead.step(1)
    assert not pinned and not devices
    with Prefetch(loader(shards, {"a": 1.0}, **MARKS), 2, device) as ahead:
        assert_same(ahead.step(0), plain.step(0))
        assert_same(ahead.step(1), plain.step(1))
    assert [(d, t.name.startswith("prefetch")) for d, t in devices] == [(device, True)]
    tensors = {f.name for f in fields(prefetch.Batch)} - {"max_seqlen", "weight_B", "reference_BT"}  # not the loader's
    assert len(pinned) == 2 * 4 * len(tensors) and all(tensor.is_contiguous() for tensor in pinned)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_shards(tmp_path_factory.mktemp("tiny"))


def test_a_run_has_the_same_curve_with_and_without(tmp_path, tiny, monkeypatch):
    def curve(name):
        train(tiny_config(tmp_path / name, "log.every=1", "schedule.total_tokens=2560"), tiny)
        return [row["train/loss"] for row in read_jsonl(tmp_path / name / "metrics.jsonl")]

    with_thread = curve("with")
    assert not threads()
    monkeypatch.setattr(Prefetch, "step", lambda self, step: self.loader.step(step))
    assert len(with_thread) == 20 and curve("without") == with_thread


def test_a_run_that_is_stopped_leaves_no_thread(tmp_path, tiny, monkeypatch):
    step = Prefetch.step

    def stopped(self, s):
        if s == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, s)

    monkeypatch.setattr(Prefetch, "step", stopped)
    with pytest.raises(Preempted):
        train(tiny_config(tmp_path / "run", "schedule.total_tokens=2560"), tiny)
    assert not threads()


def test_a_damaged_shard_stops_a_run_with_the_loaders_words(tmp_path):
    mixture = write_tiny_shards(tmp_path)
    for path in tmp_path.glob("train_*.bin"):
        raw = np.memmap(path, dtype=np.uint16, mode="r+")
        raw[len(raw) * 4 // 5 :] = 60_000
        raw.flush()
        path.with_suffix(".meta.json").unlink()  # which would notice it at once
    with pytest.raises(ValueError, match="outside the vocabulary") as caught:
        train(tiny_config(tmp_path / "run", "schedule.total_tokens=25600"), mixture)
    assert any(frame.name == "_draw" for frame in traceback.extract_tb(caught.value.__traceback__)) and not threads()
