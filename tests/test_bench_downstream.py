"""The benchmark of the four tasks runs on a tiny network, goes on where it stopped, and writes what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "downstream.py"


def test_a_row_is_trained_measured_and_kept(template_folders: dict[str, Path], tmp_path: Path) -> None:
    command = [
        *(sys.executable, str(SCRIPT), "--tasks", "bias-field", "--features", "small", "--minutes", "0.01"),
        *("--templates", str(template_folders["head"]), "--held-out", str(template_folders["other"])),
        *("--out", str(tmp_path / "out.json"), "--work", str(tmp_path / "work")),
        *("--set", "generator.shape=[16, 24, 24]", "--set", "network.channels=[4, 6, 8, 10]"),
        *("--set", "validation_contrasts=[t1]", "--set", "precision=fp32"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"].values()
    assert row["steps"] > 0
    assert row["cpu_seconds"] >= 0.6
    figures = row["contrasts"]["t1"]
    assert row["score"] == pytest.approx(1 - figures["log_l1"] / figures["baseline_log_l1"], abs=2e-3)
    assert Path(row["model"]).is_file()
    assert (Path(row["model"]).with_name("examples.png")).is_file()
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "bias-field on small" in done.stderr
    assert "bias-field on small" not in again.stderr
    assert again.stdout == done.stdout
    assert "constant field" in again.stdout


def test_what_cannot_run_is_said_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--templates", str(tmp_path / "none"), "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "out.json").exists()
