"""benchmarks/average_models.py: the mean of weights, with its own validation, and only if it is better."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from synthseg.config import TrainConfig, parse
from synthseg.labels import load_scheme
from synthseg.networks.backbone import SegmentationNetwork
from synthseg.networks.checkpoint import read_tensors, save_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

average_models = pytest.importorskip("average_models")

CONFIG = parse(
    TrainConfig,
    {"generator": {"shape": [16, 24, 24], "voxel_size_mm": 3}, "network": {"channels": [4, 8, 12], "norm": "batch"}},
    "test",
)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    labels = load_scheme("siam16")
    for seed in range(2):
        torch.manual_seed(seed)
        network = SegmentationNetwork(CONFIG.network, len(labels))
        record = {"steps": 10 * (seed + 1), "templates": ["other"], "validation": {"mean": 0.9}}
        save_model(tmp_path / f"{seed}.safetensors", network, CONFIG, labels, record)
    return [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]


def test_the_mean_is_written_with_figures_of_its_own(files: list[Path], template_folders: dict[str, Path]) -> None:
    out = files[0].with_name("mean.safetensors")
    held_out = ["--held-out", str(template_folders["head"]), "--threads", "1"]
    average_models.main([f"{files[0]}=3", str(files[1]), *held_out, "--out", str(out)])
    (first, _), (second, _), (mean, record) = (read_tensors(path) for path in (*files, out))
    for key, tensor in mean.items():
        assert tensor.dtype == first[key].dtype
        if tensor.is_floating_point():
            expected = 0.75 * first[key].float() + 0.25 * second[key].float()
            torch.testing.assert_close(tensor.float(), expected, atol=1e-3, rtol=1e-3)
    assert record["averaged"].startswith("mean of the weights of 2 runs (0.75 of a run of 10 steps, 0.25 of")
    assert record["validation"]["mean"] != 0.9
    assert set(record["validation"]["dice"]) == {"t1", "t2", "random"}
    assert len(record["validation_templates"]) == 1


def test_what_is_not_better_replaces_nothing(files: list[Path], template_folders: dict[str, Path]) -> None:
    out = files[0].with_name("new.safetensors")
    held_out = ["--held-out", str(template_folders["head"]), "--threads", "1"]
    with pytest.raises(SystemExit, match="nothing was written"):
        average_models.main([str(files[0]), *held_out, "--out", str(out), "--replace", str(files[0])])
    assert sorted(path.name for path in out.parent.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_both_see_the_same_images_whatever_recipe_made_the_old_one(
    files: list[Path], template_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, record = read_tensors(files[0])
    generator = {**record["config"]["generator"], "shape": [24, 16, 16]}
    other = files[0].with_name("other.safetensors")
    average_models.save_tensors(other, tensors, {**record, "config": {**record["config"], "generator": generator}})
    held_out = ["--held-out", str(template_folders["head"]), "--threads", "1"]
    with pytest.raises(SystemExit, match="nothing was written"):
        average_models.main([str(files[0]), *held_out, "--out", f"{other}.new", "--replace", str(other)])
    told = capsys.readouterr().out.split()
    assert told[2] == told[-1]


def test_a_map_that_was_trained_on_validates_nothing(files: list[Path], template_folders: dict[str, Path]) -> None:
    tensors, record = read_tensors(files[0])
    name = average_models.load_template(template_folders["head"]).name
    average_models.save_tensors(files[0], tensors, {**record, "templates": [name]})
    out = files[0].with_name("new.safetensors")
    with pytest.raises(SystemExit, match="was trained on"):
        average_models.main([str(files[0]), "--held-out", str(template_folders["head"]), "--out", str(out)])
