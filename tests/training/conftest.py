"""A recipe that trains in seconds, for tests of the loop and for the scripts that they start."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from synthseg.config import TrainConfig, parse

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def make_config(template_folders: dict[str, Path]) -> MakeConfig:
    """``make_config(steps=3, optimiser__name="muon")``: the recipe, with changes."""

    def make(**changes: Any) -> TrainConfig:
        record: dict[str, Any] = {
            "templates": [str(template_folders["head"]), str(template_folders["coarse"])],
            "steps": 6,
            "precision": "fp32",
            "report": False,
            "generator": {"shape": [16, 24, 16], "voxel_size_mm": 2.5, "subsamples": 2},
            "network": {"channels": [6, 8, 10]},
            "optimiser": {"warmup_steps": 2, "learning_rate": 0.02},
        }
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = record
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
        return parse(TrainConfig, record, "test")

    return make


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, so that runs can be compared bit by bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
