"""A checkpoint is complete or absent, and a damaged one never trains."""

import itertools
import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from megatron_lite import checkpoint
from megatron_lite.files import atomic_write, folder_lock

MODEL = {"w": torch.arange(6.0).reshape(2, 3)}
OPTIM = {"step": torch.tensor(3.0), "exp_avg/w": torch.ones(2, 3)}


def save(run_dir, step, keep=2):
    return checkpoint.save_checkpoint(run_dir, step, MODEL, OPTIM, {"note": "x"}, keep)


def test_round_trip_is_exact(tmp_path):
    path = save(tmp_path, 100)
    assert path.name == "step_0000100"
    loaded = checkpoint.load_tensors(path, "model.safetensors", {"w": torch.Size([2, 3])})
    assert torch.equal(loaded["w"], MODEL["w"])
    assert checkpoint.load_state(path) == {"step": 100, "note": "x"}


def test_the_newest_complete_one_is_found_and_old_ones_go(tmp_path):
    for step in (9, 10, 11):
        save(tmp_path, step)
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path)] == ["step_0000010", "step_0000011"]
    os.utime(tmp_path / "step_0000010")  # newer on the clock, older in the run
    assert checkpoint.find_checkpoint(tmp_path, "auto").name == "step_0000011"
    assert checkpoint.find_checkpoint(tmp_path, "never") is None
    (tmp_path / "step_0000012").mkdir()  # no COMPLETE: as if the writer had died
    assert checkpoint.find_checkpoint(tmp_path, "auto").name == "step_0000011"


@pytest.mark.parametrize("name", checkpoint.FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named_and_auto_falls_back(tmp_path, capsys, name, damage):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    data = bytearray((bad / name).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        (bad / name).write_bytes(data)
    elif damage == "truncate":
        (bad / name).write_bytes(data[:-1])
    else:
        (bad / name).unlink()
    with pytest.raises(ValueError, match=f"damaged checkpoint: {name}"):
        checkpoint.verify(bad)
    assert checkpoint.find_checkpoint(tmp_path, "auto") == good
    assert name in capsys.readouterr().out
    with pytest.raises(ValueError, match=name):
        checkpoint.find_checkpoint(tmp_path, str(bad))


def test_tensors_that_do_not_fit_are_named(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"w is \(2, 3\), the model has \(3, 2\)"):
        checkpoint.load_tensors(path, "model.safetensors", {"w": torch.Size([3, 2])})
    with pytest.raises(ValueError, match=r"v is missing; w is not in the model"):
        checkpoint.load_tensors(path, "model.safetensors", {"v": torch.Size([3, 2])})


def save_and_die(run_dir, at: int) -> int:
    """Saves step 2 in a forked child that dies at its ``at``-th file operation; returns the child's exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    calls = itertools.count(1)

    def counted(real):
        return lambda *args, **kwargs: os._exit(9) if next(calls) == at else real(*args, **kwargs)

    for name in ("fsync", "replace", "rename", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    save(run_dir, 2)
    os._exit(0)


def test_death_at_any_file_operation_leaves_the_old_state_or_the_new(tmp_path):
    for at in range(1, 40):
        run_dir = tmp_path / str(at)
        save(run_dir, 1)
        code = save_and_die(run_dir, at)
        found = checkpoint.find_checkpoint(run_dir, "auto")
        assert found is not None and found.name in ("step_0000001", "step_0000002"), at
        assert save(run_dir, 3).is_dir()  # and the next save is not in its way
        if code == 0:
            break
        assert code == 9
    assert code == 0 and at > 5, "the enumeration must reach the end of a save"


def test_a_folder_has_one_owner_and_death_frees_it(tmp_path):
    holder = "import sys; from megatron_lite.files import folder_lock\n"
    holder += "with folder_lock(sys.argv[1]): print(1, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", holder, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"1\n"
    with pytest.raises(ValueError, match=f"output folder in use by pid {process.pid}"), folder_lock(tmp_path):
        pass
    process.kill()
    process.wait()
    with folder_lock(tmp_path):
        pass


def test_atomic_write_replaces_whole_files(tmp_path):
    path = tmp_path / "x.json"
    atomic_write(path, json.dumps([1]))
    atomic_write(path, json.dumps([2]))
    assert json.loads(path.read_text()) == [2] and os.listdir(tmp_path) == ["x.json"]


def slow_writer(monkeypatch, gate: threading.Event) -> list[int]:
    """Every checkpoint waits for `gate`; the steps whose writing has begun."""
    real, begun = checkpoint.save_checkpoint, []

    def wait_then_save(run_dir, step, *rest):
        begun.append(step)
        assert gate.wait(20)
        return real(run_dir, step, *rest)

    monkeypatch.setattr(checkpoint, "save_checkpoint", wait_then_save)
    return begun


def test_an_asynchronous_save_holds_the_tensors_of_its_moment(tmp_path, monkeypatch):
    gate = threading.Event()
    slow_writer(monkeypatch, gate)
    weights, saver = torch.zeros(4), checkpoint.Saver(tmp_path, 2, asynchronous=True)
    saver.save(1, {"w": weights}, {"step": torch.zeros(())}, {})
    weights += 1  # the next step's update, while the writer has not begun to write
    assert checkpoint.complete_checkpoints(tmp_path) == []
    gate.set()
    saver.close()
    loaded = checkpoint.load_tensors(tmp_path / "step_0000001", "model.safetensors", {"w": weights.shape})
    assert torch.equal(loaded["w"], torch.zeros(4))


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    gate = threading.Event()
    begun = slow_writer(monkeypatch, gate)
    saver = checkpoint.Saver(tmp_path, 2, asynchronous=True)
    saver.save(1, MODEL, OPTIM, {})
    second = threading.Thread(target=saver.save, args=(2, MODEL, OPTIM, {}))
    second.start()
    second.join(0.2)
    assert second.is_alive() and begun == [1]
    gate.set()
    second.join(20)
    saver.close()
    assert begun == [1, 2] and len(checkpoint.complete_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("at", ["next save", "close"])
def test_what_the_writer_meets_is_raised(tmp_path, monkeypatch, at):
    def broken(*_):
        raise OSError("no space left on device")

    saver = checkpoint.Saver(tmp_path, 2, asynchronous=True)
    monkeypatch.setattr(checkpoint, "save_checkpoint", broken)
    saver.save(1, MODEL, OPTIM, {})
    with pytest.raises(OSError, match="no space left"):
        saver.save(2, MODEL, OPTIM, {}) if at == "next save" else saver.close()
