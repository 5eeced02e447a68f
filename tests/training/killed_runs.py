"""Train one recipe twice: in one go, and in processes that are killed (SIGKILL) at random moments. See test_state.py.

    python killed_runs.py RECIPE.json FOLDER KILLS SEED

Writes FOLDER/whole and FOLDER/killed, each a run folder with losses.txt, one line for each step that was taken.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from synthseg.config import TrainConfig
from synthseg.training.loop import Trainer

torch.set_num_threads(1)


def train(config: TrainConfig, folder: Path) -> None:
    class Recorder(Trainer):
        def step(self, batch: Any) -> tuple[float, float]:
            found = super().step(batch)
            with (folder / "losses.txt").open("a") as file:
                file.write(f"{self.state.step} {found[0]!r}\n")
            return found

    Recorder(config, folder, resume=(folder / "state.safetensors").is_file()).run()


def start(config: TrainConfig, folder: Path) -> int:
    """Fork a process that trains; returns its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 2) if os.environ.get("QUIET") else None
                train(config, folder)
            code = 0
        finally:
            os._exit(code)
    return child


def main(recipe: str, out: str, kills: str, seed: str) -> None:
    config = TrainConfig.model_validate_json(Path(recipe).read_text())
    whole, killed = Path(out) / "whole", Path(out) / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    begun = time.monotonic()
    assert os.waitpid(start(config, whole), 0)[1] == 0
    duration = time.monotonic() - begun
    chance = random.Random(int(seed))
    died = 0
    for _ in range(int(kills)):
        child = start(config, killed)
        time.sleep(chance.uniform(0.1, 0.6) * duration)
        os.kill(child, signal.SIGKILL)
        died += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert os.waitpid(start(config, killed), 0)[1] == 0
    print(f"{died} of {kills} were killed; in one go it takes {duration:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
