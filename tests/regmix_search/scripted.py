"""A trial function that misbehaves on purpose, and the program that runs it as a task of a Slurm array."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regmix_search.executors.task import run_task
from regmix_search.ledger import Trial


@dataclass(frozen=True)
class Scripted:
    """A trial function that does what its table says on the first try, and succeeds on the next."""

    folder: str
    first: dict[int, str]

    def __call__(self, trial: Trial) -> dict[str, Any]:
        mark = Path(self.folder) / f"tried{trial.index}"
        action = self.first.get(trial.index, "") if not mark.exists() else ""
        mark.write_text(str(os.getpid()))
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "exit":
            os._exit(3)
        if action == "nan":
            raise FloatingPointError("step 3: the gradient norm is nan")
        if action == "mistake":
            raise ValueError("shards: no train_* shards")
        if action == "oserror":
            raise OSError("disk went away")
        if action == "hang":
            time.sleep(600)
        if action == "meet":  # until as many others are here as the trial's seed says
            while len(list(Path(self.folder).glob("tried*"))) < trial.seed:
                time.sleep(0.02)
        facts = {"tokens": 10, "pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}
        facts["gpu"] = os.environ.get("CUDA_VISIBLE_DEVICES")
        return {"losses": {"readme": 1.0 + trial.index}, "worker": facts, "tokens": 10}


if __name__ == "__main__":
    table = {int(index): action for index, action in json.loads(sys.argv[2]).items()}
    sys.exit(run_task(Scripted(sys.argv[1], table), Path(sys.argv[3]), int(sys.argv[4]), lease=3))
