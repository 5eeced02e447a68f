"""The walk-through of docs/train_your_own.md: exactly its commands, in an empty folder."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "train_your_own.md"
MOST_S = 600  # on two cores, which nothing else uses


@pytest.mark.slow
@pytest.mark.training
@pytest.mark.timeout(1800)
def test_the_walk_through_ends_with_a_segmentation(tmp_path: Path) -> None:
    script = "set -e\n" + "".join(re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    assert script.count("synthseg ") == 5
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    begun = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**os.environ, "PATH": programs}, capture_output=True, text=True
    )
    took_s = time.monotonic() - begun
    assert done.returncode == 0, done.stderr[-3000:]
    assert took_s < MOST_S
    for word in ("16 of mine", "56 x 64 x 64 voxels", "held out: 1 of 6", "steps an hour (measured", "GB (measured"):
        assert word in done.stderr
    assert (tmp_path / "runs" / "mine" / "first_batch.png").stat().st_size > 5000
    found = json.loads((tmp_path / "runs" / "mine" / "train.json").read_text())["validation"]["dice"]["t1"]
    assert found["Skin-and-Muscle"] > 0.8, found
    assert found["White-Matter"] > 0.5, found
    result, truth = (
        np.asarray(nib.load(tmp_path / name).dataobj) for name in ("segmentation.nii.gz", "maps/0003_label.nii.gz")
    )
    assert result.shape == truth.shape
    head = 2 * ((result > 0) & (truth > 0)).sum() / ((result > 0).sum() + (truth > 0).sum())
    assert head > 0.9
    assert (tmp_path / "volumes.csv").read_text().count("Thalamus") >= 1
