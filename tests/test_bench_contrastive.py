"""The benchmark of the contrastive losses: what it counts as memory, and that a loss keeps within its limit."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_contrastive.py"


@pytest.fixture(scope="module")
def bench(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)


def test_the_highest_memory_is_that_of_a_step_or_of_its_masks(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"loss": "ucl", "seconds": 1.0, "cpu_seconds": 1.0, "held_gb": 0.5, "more_gb": 0.25, "masks_gb": 0.5}
    assert bench.peak_gb(row) == 0.75
    assert bench.peak_gb(row | {"masks_gb": 2.5}) == 2.5
    bench.show([row, row | {"loss": "scl", "masks_gb": 2.5}], [], 2.0)
    found = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in found if "above 2 GB" in line] == ["scl"]


@pytest.mark.slow
def test_memory_above_the_limit_is_an_error(tmp_path: Path) -> None:
    words = ["--losses", "dhel", "--voxels", "64", "--levels", "1", "--steps", "1", "--rounds", "1"]
    found = run(*words, "--limit-gb", "0.01", "--out", str(tmp_path / "figures.json"))
    assert found.returncode == 1, found.stderr
    assert "above 0.01 GB" in found.stdout
    assert json.loads((tmp_path / "figures.json").read_text())["limit_gb"] == 0.01


@pytest.mark.slow
def test_six_levels_of_4096_voxels_fit_into_2_gb(bench: ModuleType, tmp_path: Path) -> None:
    """The sizes are those of the command without options; whole matrices of all levels would not fit."""
    found = run("--losses", "dhel", "--steps", "1", "--rounds", "1", "--out", str(tmp_path / "figures.json"))
    assert found.returncode == 0, found.stderr
    (row,) = json.loads((tmp_path / "figures.json").read_text())["steps"]
    assert (row["loss"], row["voxels"], row["levels"]) == ("dhel", 4096, 6)
    masks = 2 * 6 * 4096**2 / 1e9  # positives and weights of all levels, one byte a pair
    assert masks < row["held_gb"]
    assert row["masks_gb"] > row["held_gb"] + masks / 6
    assert bench.peak_gb(row) < 2.0
