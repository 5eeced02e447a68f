"""The generator's benchmark runs on a tiny grid and writes what it says. No time is judged."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from synthseg.templates import Template

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "bench_generator.py"
JOB: dict[str, Any] = {
    "method": "synthseg", "name": "tiny", "template": "phantom", "preset": None, "points": 1, "every_stage": True,
    "tuned": False, "threads": 1, "device": "cpu", "seed": 0, "size": 24, "rounds": 1, "copy_mb": 4,
    "volumes": [16], "batches": [1, 2], "round": 0, "pairs": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs() -> Iterator[ModuleType]:
    """benchmarks/generator_jobs.py, which a benchmark runs in a process of its own; threads as before afterwards."""
    spec = importlib.util.spec_from_file_location("generator_jobs", SCRIPT.with_name("generator_jobs.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_the_command_writes_a_table_and_json(tmp_path: Path) -> None:
    preset = tmp_path / "plain.yaml"
    preset.write_text("subsamples: 2\n")
    out = tmp_path / "new" / "figures.json"
    command = [sys.executable, str(SCRIPT), "--preset", str(preset), "--peers", "--parts", "pairs", "--threads", "1"]
    command += ["--size", "24", "--rounds", "1", "--pairs", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert [row["name"] for row in record["pairs"]] == ["plain", "plain, every stage on"]
    for row in record["pairs"]:
        assert row["name"] in done.stdout
        assert 0 < row["seconds"] < 60
        assert 0.05 < row["loaded_gb"] <= row["peak_gb"] < 16
        assert row["device_gb"] is None
        assert len(row["all_seconds"]) == 1


@pytest.mark.parametrize("peer", ["torchio", "cornucopia"])
def test_a_peer_makes_a_pair_from_the_same_labels(jobs: ModuleType, peer: str) -> None:
    pytest.importorskip(peer)
    template = jobs.prepare(JOB)
    image, labels = jobs.pair_maker({**JOB, "method": peer}, template, 24)(0)
    assert image.shape == labels.shape == (1, 24, 24, 24)
    assert image.is_floating_point()
    assert float(image.std()) > 0
    known = set(template.labels.unique().tolist())
    assert 1 < len(labels.unique()) <= len(known)
    assert set(labels.unique().tolist()) <= known


def test_the_patch_of_the_peers_is_the_template_at_one_mm(jobs: ModuleType, tiny_template: Template) -> None:
    size = 61  # 1 mm voxels; the template has 1.5, 1 and 2 mm and is smaller
    patch = jobs.patch_1mm(tiny_template, size)
    assert patch.shape == (size,) * 3
    assert patch.dtype == torch.uint8
    assert not patch[0].any()
    assert not patch[:, -1].any()
    found = set()
    for at in ((30, 30, 30), (27, 31, 34), (33, 30, 26), (24, 28, 37)):
        steps = [(i - (size - 1) / 2) / s for i, s in zip(at, tiny_template.spacing_mm, strict=True)]
        x, y, z = (round(c + step) for c, step in zip(tiny_template.center, steps, strict=True))
        assert patch[at] == tiny_template.labels[x, y, z]
        found.add(int(patch[at]))
    assert len(found) > 2


def test_pairs_are_timed_and_counted(jobs: ModuleType) -> None:
    record = jobs.JOBS["pairs"](JOB)
    assert len(record["seconds"]) == len(record["cpu_seconds"]) == JOB["pairs"]
    assert json.loads(json.dumps(record)) == record


def test_every_stage_of_the_rendering_has_its_time_and_bytes(jobs: ModuleType) -> None:
    record = jobs.JOBS["stages"](JOB)
    stages = record["stages"]
    for name in ("deform.coordinates", "reading.read_points", "contrast.paint", "intensity.normalise"):
        assert stages[name]["seconds"] > 0
        assert stages[name]["one_pass_mb"] > 0
        assert stages[name]["moved_mb"] > 0
    tops = [row for name, row in stages.items() if ">" not in name and "sample_plan" not in name]
    assert sum(row["share"] for row in tops) == pytest.approx(1, abs=0.3)  # medians of parts, not parts of a median
    voxels = JOB["size"] ** 3
    # reads coordinates of 12 bytes and the label volume, writes a label
    assert stages["reading.read_points"]["one_pass_mb"] * 1e6 >= voxels * 13
    assert stages["intensity.normalise"]["one_pass_mb"] * 1e6 <= voxels * 8 + 100
    assert record["least_seconds"] < record["render_seconds"]
    assert record["copy_gb_per_second"] > 0.1
    assert sys.getprofile() is None


def test_operations_are_counted_by_what_they_read_and_write(jobs: ModuleType) -> None:
    stages = jobs.Stages(jobs.Stopwatch("cpu"))
    a = torch.ones(10, 100)
    with stages.counting():
        a.view(-1)[:500].t()  # views move nothing
        assert "render" not in stages.moved
        b = a + a[:1].expand(10, 100)  # reads 4000 and 400 bytes, writes 4000
        assert stages.moved["render"] == 8400
        b.zero_()  # writes only
        assert stages.moved["render"] == 12400
        b.add_(1.0)
        assert stages.moved["render"] == 20400


def test_the_cost_is_measured_against_volume_and_batch(jobs: ModuleType) -> None:
    rows = jobs.JOBS["scaling"](JOB)["rows"]
    assert [(row["size"], row["batch"]) for row in rows] == [(16, 1), (24, 2)]
    assert all(row["seconds_per_image"] > 0 for row in rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_events_time_the_device(jobs: ModuleType) -> None:
    record = jobs.JOBS["pairs"]({**JOB, "device": "cuda"})
    assert record["device_gb"] > 0
    assert jobs.JOBS["stages"]({**JOB, "device": "cuda"})["stages"]["contrast.paint"]["seconds"] > 0
