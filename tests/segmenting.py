"""A segmentation run without a trained network: a double that labels by intensity, and a program that uses it.

``python tests/segmenting.py ARGUMENTS`` is ``synthseg segment ARGUMENTS`` with the double in place of the model, for
tests that need a process of their own. ``SEGMENTING_DELAY_S`` makes its network slow, and ``SEGMENTING_KILL_AT=3``
kills the process (SIGKILL) when it is about to give its third file its name.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import torch

from synthseg.errors import CheckpointError
from synthseg.labels import Label, LabelTable

SCRIPT = Path(__file__)
SHAPE = (17, 18, 19)
TABLE = LabelTable(
    "two",
    (
        Label(0, "Background", tissue="air"),
        Label(3, "Dark", (10, 200, 30), tissue="csf"),
        Label(7, "Bright", (250, 0, 128), tissue="gm"),
    ),
)


class Levels(torch.nn.Module):
    """Logits by the distance from three grey levels."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        time.sleep(float(os.environ.get("SEGMENTING_DELAY_S", "0")))
        return torch.cat([-100 * (image - level) ** 2 for level in (0.0, 0.5, 1.0)], 1)


@dataclass
class Fake:
    network: torch.nn.Module = field(default_factory=Levels)
    labels: LabelTable = TABLE
    voxel_size_mm: float = 2.0
    window: tuple[int, int, int] = (24, 24, 24)
    multiple: int = 8
    name: str = "fake"
    sha256: str = "0" * 64


def fake_checkpoint_module() -> ModuleType:
    """Stands for ``synthseg.networks.checkpoint``."""

    def load_model(name_or_path: str | Path, device: torch.device) -> Fake:
        if str(name_or_path) == "nothing":
            raise CheckpointError("nothing: there is no such model")
        return Fake()

    module = ModuleType("synthseg.networks.checkpoint")
    module.load_model = load_model  # type: ignore[attr-defined]
    return module


def write_scan(path: Path, seed: int = 0) -> Path:
    """A bright cube in a darker one in noise."""
    data = np.random.default_rng(seed).normal(0, 1, SHAPE)
    data[3:14, 3:14, 3:14] += 50
    data[6:12, 6:12, 6:12] += 50
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data.astype(np.float32), np.diag([-1.5, 1.5, 2.0, 1.0])), path)
    return path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def kill_at(count: int) -> None:
    """Let this process die, as by ``kill -9``, when a file is written for the ``count``-th time but has no name yet."""
    replace, lock, n_calls = os.replace, threading.Lock(), 0

    def replace_or_die(source: str | Path, target: str | Path) -> None:
        nonlocal n_calls
        with lock:
            n_calls += 1
            if n_calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replace_or_die  # type: ignore[assignment]


if __name__ == "__main__":
    if "SEGMENTING_KILL_AT" in os.environ:
        kill_at(int(os.environ["SEGMENTING_KILL_AT"]))
    sys.modules["synthseg.networks.checkpoint"] = fake_checkpoint_module()
    sys.argv = ["synthseg", "segment", *sys.argv[1:], "--device", "cpu"]
    from synthseg.cli import main

    main()
