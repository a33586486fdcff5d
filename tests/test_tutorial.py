"""docs/tutorial.md: its commands run as they are written, and print lines like those that it shows."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
LIMIT = 900  # s for one block of commands on a busy machine; alone the whole takes about two minutes


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def run(block: str, folder: Path) -> str:
    """One block of commands in a shell that stops at the first that fails; what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    shell = ["bash", "-euo", "pipefail", "-c", block]
    with open(folder / "log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(shell, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(LIMIT)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        printed = log.read()
    assert code == 0, f"exit code {code}\n{block}\n{printed[-3000:]}"
    return printed


def shape_of(line: str) -> str:
    """A line without its numbers and the width of its columns."""
    return re.sub(r"\s+", " ", re.sub(r"[+-]?[0-9](?:[0-9.,:e+-]*[0-9])?", "0", line)).strip()


def unseen(shown: str, printed: str) -> list[str]:
    """Lines that the document shows and no command printed; `...` stands for anything."""
    found = shape_of(printed)
    parts = [(line, part) for line in shown.splitlines() for part in line.split("...")]
    return [line for line, part in parts if shape_of(part) not in found]


@pytest.mark.slow
def test_the_tutorial_runs_as_it_is_written(tmp_path):
    for name in ("configs", "data_tools", "launch", "megatron_lite", "regmix_search"):
        (tmp_path / name).symlink_to(ROOT / name)
    printed = "".join(run(block, tmp_path) for block in blocks("sh"))
    assert [line for text in blocks("text") for line in unseen(text, printed)] == []
    runs = tmp_path / "runs"
    weights = json.loads((runs / "mine" / "optimum.json").read_text())["weights"]
    assert sum(weights.values()) == pytest.approx(1) and (runs / "mine" / "report.html").is_file()
    result = json.loads((runs / "large" / "result.json").read_text())
    assert result["losses"]["python"] < 4, "ln 1024 is 6.9, and 3.1 is what this model came to once"
    assert 0.28 < weights["python"] < 0.30, "the code is at its cap of four epochs"


def test_a_line_that_nothing_printed_is_noticed():
    printed = "step 20/600 | loss 5.8627\n  prose   0.8155\ndone: 614,400 tokens in 21.5 s\n"
    assert unseen("step 400/600 | loss 4.1\n\nprose 0.25\ndone: ... in 3 s", printed) == []
    assert unseen("step 400/600 | nats 4.1\n", printed) == ["step 400/600 | nats 4.1"]


def test_every_block_is_commands_or_what_they_print():
    assert len(blocks("sh")) >= 8 and len(blocks("text")) >= 4
    assert TEXT.count("\n```") == 2 * (len(blocks("sh")) + len(blocks("text")))
