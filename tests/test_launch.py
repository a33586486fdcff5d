"""launch/pretrain.py as a user starts it: python, torchrun and deepspeed take the same arguments and train the same."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import pretrain
from megatron_lite.config import dump
from megatron_lite.files import read_jsonl
from megatron_lite.testing import free_port, tiny_config, write_tiny_shards

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SCRIPT = "launch/pretrain.py"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with shards, mixture.yaml and a config of 10 steps."""
    folder = tmp_path_factory.mktemp("launch")
    write_tiny_shards(folder / "shards").save(folder / "mixture.yaml")
    (folder / "c.yaml").write_text(dump(tiny_config(folder / "run", "log.console=true")))
    return folder


def start(command: list[str], **kwargs) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, **kwargs)


def arguments(files: Path, name: str, *extra: str) -> list[str]:
    out = f"out_dir={files / name}"
    return ["--config", str(files / "c.yaml"), "--mixture", str(files / "mixture.yaml"), "--set", out, *extra]


def curve(files: Path, name: str) -> list[float]:
    return [row["train/loss"] for row in read_jsonl(files / name / "metrics.jsonl")]


@pytest.fixture(scope="module")
def reference(files) -> list[float]:
    """The curve of one plain process."""
    done = start([sys.executable, SCRIPT, *arguments(files, "plain")])
    assert done.returncode == 0, done.stderr
    assert "step 10/10" in done.stdout and "valid a" in done.stdout and "dp 1 x accumulation 2" in done.stdout
    assert len(curve(files, "plain")) == 10
    return curve(files, "plain")


def refuse(capsys: pytest.CaptureFixture[str], args: list[str]) -> tuple[int, str]:
    """The exit code and stderr of a command that is refused before anything starts, in this process: it is quicker."""
    capsys.readouterr()
    return pretrain.main(args), capsys.readouterr().err


def check(done: subprocess.CompletedProcess, files: Path, name: str, reference: list[float]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    got = curve(files, name)
    assert len(got) == 10 and max(abs(a - b) for a, b in zip(got, reference, strict=True)) <= 1e-5
    assert json.loads((files / name / "result.json").read_text())["steps"] == 10


def test_torchrun_two_ranks(files, reference):
    command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), SCRIPT]
    done = start([*command, *arguments(files, "torchrun")])
    check(done, files, "torchrun", reference)
    assert done.stdout.count("step 10/10 | loss") == 1, "rank 0 prints, the others do not"


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", ["false", "true"])
def test_torchrun_two_by_two_ranks_share_layers_and_samples(files, reference, sequence_parallel):
    command = [str(BIN / "torchrun"), "--nproc-per-node", "4", "--master-port", str(free_port()), SCRIPT]
    settings = ["parallel.tensor_parallel_size=2", f"parallel.sequence_parallel={sequence_parallel}"]
    name = f"tp2-{sequence_parallel}"
    extra = [word for setting in [*settings, "checkpoint.every=5"] for word in ("--set", setting)]
    done = start([*command, *arguments(files, name, *extra)])
    check(done, files, name, reference)
    assert "dp 2 x tp 2" in done.stdout and done.stdout.count("step 10/10 | loss") == 1
    for file in (files / name / "step_0000010").iterdir():
        file.unlink()
    (files / name / "result.json").unlink()
    done = start([sys.executable, SCRIPT, *arguments(files, name, "--set", "checkpoint.every=5")])
    assert "resumed at step 5" in done.stdout
    check(done, files, name, reference)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_trains_resumes_and_hands_over(files, reference, stage, ranks):
    pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    name = f"deepspeed-{stage}-{ranks}"
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(free_port()), SCRIPT]
    zero = ["--set", f"parallel.zero_stage={stage}", "--set", "checkpoint.every=5"]
    done = start([*launcher, *arguments(files, name, *zero)])
    check(done, files, name, reference)
    assert f"deepspeed, ZeRO {stage}" in done.stdout
    for file in (files / name / "step_0000010").iterdir():
        file.unlink()
    (files / name / "result.json").unlink()
    done = start([*launcher, *arguments(files, name, *zero)])
    assert "resumed at step 5" in done.stdout
    check(done, files, name, reference)
    # and plain PyTorch continues from what DeepSpeed's ranks wrote at step 5
    for file in (files / name / "step_0000010").iterdir():
        file.unlink()
    (files / name / "result.json").unlink()
    done = start([sys.executable, SCRIPT, *arguments(files, name, "--set", "checkpoint.every=5", "--engine", "torch")])
    assert "resumed at step 5" in done.stdout
    check(done, files, name, reference)


@pytest.mark.slow
def test_deepspeed_launcher_with_tensor_parallelism(files, reference):
    pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "4", "--master_port", str(free_port()), SCRIPT]
    settings = ("parallel.zero_stage=1", "parallel.tensor_parallel_size=2")
    done = start([*launcher, *arguments(files, "deepspeed-tp2", *[w for s in settings for w in ("--set", s)])])
    check(done, files, "deepspeed-tp2", reference)
    assert "dp 2 x tp 2" in done.stdout and "deepspeed, ZeRO 1" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_an_error_of_one_rank_alone_ends_all(files, tmp_path, launcher):
    """Rank 0 cannot write more than 8 kB a file, as on a full disk: its first save fails while the others wait."""
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    name = f"alone-{launcher}"
    command = [sys.executable, SCRIPT, *arguments(files, name, "--engine", "torch", "--set", "checkpoint.every=5")]
    script = tmp_path / "rank.sh"
    script.write_text(f'#!/bin/bash\n[ "$RANK" = 0 ] && ulimit -f 8\nexec {shlex.join(command)}\n')
    script.chmod(0o755)
    flags = {
        "torchrun": ["--nproc-per-node", "2", "--no-python", "--master-port"],
        "deepspeed": ["--num_accelerators", "2", "--no_python", "--master_port"],
    }
    done = start([str(BIN / launcher), *flags[launcher], str(free_port()), str(script)])
    assert done.returncode != 0 and "File too large" in done.stdout + done.stderr
    assert len(curve(files, name)) == 5 and not (files / name / "result.json").exists()


@pytest.mark.slow
def test_compile_with_tensor_parallelism(files, reference):
    command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), SCRIPT]
    settings = ("compile=true", "parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true")
    done = start([*command, *arguments(files, "compile-tp2", *[w for s in settings for w in ("--set", s)])])
    check(done, files, "compile-tp2", reference)
    assert "dp 1 x tp 2" in done.stdout and "does not work here" not in done.stdout + done.stderr


@pytest.mark.slow
def test_deepspeed_offloads_the_optimizer_and_draws_the_same_curve(files, reference):
    pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    offload = "deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}"
    extra = ["--engine", "deepspeed", "--set", "parallel.zero_stage=2", "--set", offload]
    check(start([sys.executable, SCRIPT, *arguments(files, "offload", *extra)]), files, "offload", reference)


@pytest.mark.slow
def test_deepspeed_hostfile_with_two_nodes(files, reference, tmp_path):
    """Two launchers on this machine stand for two nodes: --no_ssh is how DeepSpeed starts where ssh is not allowed."""
    pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    (tmp_path / "hostfile").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    nodes = ["--hostfile", str(tmp_path / "hostfile"), "--no_ssh", "--master_addr", "127.0.0.1"]
    launcher = [str(BIN / "deepspeed"), *nodes, "--master_port", str(free_port())]
    command = [SCRIPT, *arguments(files, "hostfile")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    second = subprocess.Popen([*launcher, "--node_rank", "1", *command], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    done = start([*launcher, "--node_rank", "0", *command])
    assert second.wait(60) == 0
    check(done, files, "hostfile", reference)
    assert "dp 2 x" in done.stdout


@pytest.mark.slow
def test_deepspeed_refuses_keys_that_are_ours(files):
    pytest.importorskip("deepspeed", reason="needs the deepspeed extra")
    extra = ["--engine", "deepspeed", "--set", "deepspeed={gradient_clipping: 2}"]
    done = start([sys.executable, SCRIPT, *arguments(files, "clash", *extra)])
    assert done.returncode == 2 and "set optim.clip_grad instead" in done.stderr


def test_dry_run_prints_every_number_and_starts_nothing(files):
    done = start([sys.executable, SCRIPT, *arguments(files, "dry", "--dry-run")])
    assert done.returncode == 0, done.stderr
    for text in ("parameters", "10 steps, 1,280 tokens", "FLOPs a token", "tokens/s (measured on this machine)"):
        assert text in done.stdout
    # weight 3/6 of 80 samples of 16 tokens, over domain c's tokens
    row = re.search(r"c +0\.5000 +0\.5000 +40 +640 +(\d+\.\d\d)", done.stdout)
    tokens = json.loads((files / "shards" / "train_c.meta.json").read_text())["num_tokens"]
    assert row and float(row[1]) == pytest.approx(40 * 16 / tokens, abs=0.03)
    assert not (files / "dry" / "metrics.jsonl").exists()


def test_print_config_round_trips(files, tmp_path):
    done = start([sys.executable, SCRIPT, "--print-config", "--set", "optim.lr=1e-3", "seed=3"])
    assert done.returncode == 0 and "lr: 0.001" in done.stdout and "seed: 3" in done.stdout
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert (
        start([sys.executable, SCRIPT, "--print-config", "--config", str(tmp_path / "again.yaml")]).stdout
        == done.stdout
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--set", "optim.lrr=1"], "Did you mean 'lr'?"),
        (["--mixture", "nowhere.yaml"], "nowhere.yaml"),
        (["--set", "batch.micro_batch_size=3"], "valid: 1, 2, 4, 8"),
        (["--resume", "runs/nowhere/step_0000001"], "not a complete checkpoint"),
    ],
)
def test_mistakes_end_with_code_2_and_one_line(files, capsys, extra, message):
    code, said = refuse(capsys, arguments(files, "wrong", *extra))
    assert code == 2 and message in said and said.startswith("error: ") and said.count("error") == 1


def test_a_mistake_is_the_exit_code_of_the_process(files):
    done = start([sys.executable, SCRIPT, *arguments(files, "wrong", "--set", "optim.lrr=1")])
    assert done.returncode == 2 and "Did you mean 'lr'?" in done.stderr and "Traceback" not in done.stderr


def test_names_and_paths_are_taken_literally(files, tmp_path):
    path = tmp_path / "a: b #2.yaml"
    path.write_text((files / "mixture.yaml").read_text().replace("data_dir: shards", f"data_dir: {files / 'shards'}"))
    done = start(
        [sys.executable, SCRIPT, *arguments(files, "odd", "--mixture", str(path), "--name", "2024", "--dry-run")]
    )
    assert done.returncode == 0 and done.stdout.startswith("2024: dry run"), done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train_a: -0.5", "train_a"),
        ("train_a: .nan", "train_a"),
        ("train_aa: 1.0", "train_aa"),
        ("train_a: 0.0", "the weights sum to 0"),
    ],
)
def test_wrong_mixtures_are_named(files, tmp_path, capsys, line, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(f"data_dir: {files / 'shards'}\ntrain:\n  {line}\n")
    code, said = refuse(capsys, arguments(files, "wrong", "--mixture", str(path)))
    assert code == 2 and message in said and "wrong.yaml" in said


def test_a_domain_too_small_for_its_weight_is_refused_with_the_numbers(files, tmp_path, capsys):
    path = tmp_path / "small.yaml"
    path.write_text(f"data_dir: {files / 'shards'}\ntrain:\n  train_a: {{weight: 1.0, max_epochs: 0.1}}\n")
    code, said = refuse(capsys, arguments(files, "small", "--mixture", str(path)))
    assert code == 2 and "max_epochs" in said and "0.1" in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_on_all_and_the_run_goes_on_from_there(files, tmp_path, number):
    command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), SCRIPT]
    command += arguments(files, "signalled", "--set", "schedule.total_tokens=1e7", "--set", f"out_dir={tmp_path}")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), number)  # not rank 0, which writes
    process.stdout.read()
    assert process.wait(60) != 0, "torchrun reports the exit code 75 of its ranks as a failure, so a scheduler requeues"
    (saved,) = tmp_path.glob("step_*")
    step = json.loads((saved / "state.json").read_text())["step"]
    assert step >= 5 and len(curve(tmp_path, "")) == step


@pytest.mark.slow
def test_a_killed_rank_ends_the_whole_run(files):
    command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), SCRIPT]
    command += arguments(files, "killed", "--set", "schedule.total_tokens=1e8")
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    began = time.monotonic()
    process.stdout.read()
    assert process.wait(60) != 0 and time.monotonic() - began < 45
