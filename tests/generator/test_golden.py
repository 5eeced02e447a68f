"""Images of every preset are those that were kept: a change of the generator's output is always deliberate.

    python tests/generator/test_golden.py      writes golden_images.json anew, after such a change

Means of blocks are compared everywhere; hashes of Plans, labels and images on the kind of CPU and with the version of
PyTorch that made the file, since other instructions round otherwise.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from synthseg.config import generator_config, shipped_presets
from synthseg.generator.anomalies import with_anomalies
from synthseg.generator.plan import Plan, sample_plan
from synthseg.generator.synthesis import render
from synthseg.templates import load_template

GOLDEN = Path(__file__).with_name("golden_images.json")
NUMBERS = (0, 1, 2)
BLOCK = 8


def machine() -> dict[str, str]:
    """What decides how an operation rounds: the version of PyTorch and the instructions of the CPU."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else [platform.processor()]
    kinds = ("cpu family", "model", "flags", "Features")
    cpu = sorted({line for line in lines if line.split(":")[0].strip() in kinds}) or lines
    return {"torch": torch.__version__.split("+")[0], "cpu": digest("".join(cpu).encode())}


def made(preset: str) -> tuple[list[Plan], torch.Tensor, torch.Tensor]:
    """Plans, images (B, D, H, W) and labels of the first images of a preset, from the phantom at 3 mm."""
    config = generator_config(None, ["voxel_size_mm=3", "shape=[48, 56, 40]"], preset)
    template = with_anomalies(load_template("phantom"), config.anomalies)
    plans = [sample_plan(config, template.name, template.table, 5, number) for number in NUMBERS]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        images, labels = render([template] * len(plans), plans)
    finally:
        torch.set_num_threads(threads)
    return plans, images[:, 0], labels


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def summary(preset: str) -> dict[str, Any]:
    plans, images, labels = made(preset)
    blocks = F.avg_pool3d(images[:, None], BLOCK)[:, 0].flatten(1)
    return {
        "plans": [digest(plan.model_dump_json().encode()) for plan in plans],
        "labels": [digest(one.numpy().tobytes()) for one in labels],
        "images": [digest(one.numpy().tobytes()) for one in images],
        "block_means": [[round(value, 3) for value in row[::7]] for row in blocks.tolist()],
    }


@pytest.mark.parametrize("preset", sorted(shipped_presets()))
def test_images_are_those_that_were_kept(preset: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    expected, found = golden["presets"][preset], summary(preset)
    torch.testing.assert_close(
        torch.tensor(found["block_means"]), torch.tensor(expected["block_means"]), atol=2e-3, rtol=0
    )
    if machine() == golden["machine"]:
        assert found["plans"] == expected["plans"]
        assert found["labels"] == expected["labels"]
        assert found["images"] == expected["images"]


def test_no_preset_is_kept_that_does_not_ship() -> None:
    assert set(json.loads(GOLDEN.read_text())["presets"]) == set(shipped_presets())


if __name__ == "__main__":
    record = {"machine": machine(), "presets": {name: summary(name) for name in sorted(shipped_presets())}}
    GOLDEN.write_text(json.dumps(record, indent=1) + "\n")
