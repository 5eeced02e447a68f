"""Contrast over several processes is that of one process with all anatomies: the embeddings of all are compared."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from synthseg.config import PretrainConfig, parse

SCRIPT = Path(__file__).with_name("two_devices_pretraining.py")


def run(recipe: Path, out: Path, devices: int) -> dict[str, torch.Tensor]:
    ours = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith(("SLURM_", "TORCHELASTIC"))}
    command = [sys.executable, str(SCRIPT), str(recipe), str(out), str(devices)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, env=kept | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "gradients.safetensors")


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(template_folders: dict[str, Path], tmp_path: Path) -> None:
    """With a supervised, an unsupervised and a per-anatomy loss, several heads with temperatures, and label sets."""
    small = {"hidden": 12, "dimensions": 16, "sampling": {"voxels": 20}}
    config = parse(
        PretrainConfig,
        {
            "templates": [str(template_folders["head"]), str(template_folders["coarse"])],
            "steps": 2,
            "batch_size": 2,
            "precision": "fp32",
            "report": False,
            "contrast": [
                {"loss": "hscl", **small},
                {"loss": "info_nce", "heads": 2, "adaptive_temperature": True, **small},
                {"loss": "pix_pro", **small, "sampling": {"voxels": 20, "levels": [-2]}},
            ],
            "segmentation_weight": 1.0,
            "generator": {
                "shape": [16, 24, 16],
                "voxel_size_mm": 2.5,
                "subsamples": 2,
                "views": {"severities": [0.0, 1.0]},
            },
            "network": {"channels": [6, 8, 10]},
            "optimiser": {"learning_rate": 1e-4, "gradient_clip": 1e9},
        },
        "test",
    )
    recipe = tmp_path / "recipe.json"
    recipe.write_text(config.model_dump_json())
    one, two = (run(recipe, tmp_path / str(devices), devices) for devices in (1, 2))
    assert set(one) == set(two)
    moved = 0
    for name in [name for name in one if name.startswith("1.")]:
        assert torch.allclose(two[name], one[name], rtol=1e-3, atol=1e-5), name
        moved += bool(one[name].abs().max() > 1e-4)
    assert moved > 20
    assert any("keys" in name for name in one)
    torch.testing.assert_close(two["2.loss"], one["2.loss"], rtol=1e-3, atol=1e-4)
