"""A recipe that trains in seconds, for tests of the loop and for the scripts that they start."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
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


@pytest.fixture(scope="session")
def two_grids(template_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The tiny head, and every other voxel of it along each axis: other voxel size and other shape."""
    folder = tmp_path_factory.mktemp("grids") / "tiny_half"
    shutil.copytree(template_folders["head"], folder)
    image = nib.load(folder / "labels.nii.gz")
    ids = np.asarray(image.dataobj)[::2, ::2, ::2]
    nib.save(nib.Nifti1Image(ids, image.affine @ np.diag([2, 2, 2, 1])), folder / "labels.nii.gz")
    record = json.loads((folder / "labels.json").read_text())
    (folder / "labels.json").write_text(json.dumps(record | {"name": folder.name}))
    return [str(template_folders["head"]), str(folder)]
