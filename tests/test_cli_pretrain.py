"""The command `pretrain`: from a recipe to features, and from features to a segmentation; what it refuses."""

import json
from pathlib import Path

import pytest
import yaml

from synthseg.cli import run
from synthseg.cli.runs import read_recipe
from synthseg.config import GeneratorConfig, PretrainConfig, load_yaml, parse, preset_file, read_yaml
from synthseg.networks.feature_file import load_features
from synthseg.paths import data_dir
from synthseg.training.pretraining import check

RECIPE = """
name: tiny
templates: [{template}]
steps: 2
precision: fp32
contrast: {{loss: info_nce, hidden: 8, dimensions: 8, sampling: {{voxels: 16}}}}
generator: {{shape: [16, 24, 16], voxel_size_mm: 2.5, subsamples: 2, views: {{severities: [0, 1]}}}}
network: {{channels: [6, 8, 10]}}
"""
QUIET = ["--device", "cpu"]


@pytest.fixture
def recipe(template_folders: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(template=template_folders["head"]))
    return path


def test_from_a_recipe_to_features_and_on_to_a_segmentation(
    recipe: Path, template_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(["pretrain", str(recipe), "-o", str(out), *QUIET]) == 0
    said = capsys.readouterr().err
    assert f"train a segmentation on it with: synthseg train RECIPE --from {out / 'pretrained.safetensors'}" in said
    assert "steps an hour" in said
    assert load_features(out / "pretrained.safetensors").heads == {"anatomy": {"task": "reconstruction"}}
    assert (out / "views.png").is_file()
    assert run(["pretrain", str(recipe), "-o", str(out), *QUIET]) == 2
    assert "holds a run already; use --resume" in capsys.readouterr().err
    assert run(["pretrain", str(recipe), "-o", str(out), "--resume", "--set", "steps=3", *QUIET]) == 0
    assert json.loads((out / "train.json").read_text())["steps"] == 3
    segmentation = tmp_path / "segmentation.yaml"
    segmentation.write_text(yaml.safe_dump({"templates": [str(template_folders["head"])], "steps": 1, "report": False}))
    start = ["--init", str(out / "pretrained.safetensors")]
    assert run(["train", str(segmentation), "-o", str(tmp_path / "seg"), *start, *QUIET]) == 0
    assert "% of the weights from" in capsys.readouterr().err
    config = json.loads((tmp_path / "seg" / "config.json").read_text())
    assert config["network"]["channels"] == [6, 8, 10]  # those of the features
    assert config["generator"]["shape"] == [16, 24, 16]
    (out / "pretrained.safetensors").unlink()  # which a run that goes on needs no more
    more = ["--resume", "--set", "steps=2"]
    assert run(["train", str(segmentation), "-o", str(tmp_path / "seg"), *start, *more, *QUIET]) == 0
    assert json.loads((tmp_path / "seg" / "config.json").read_text()) == config | {"steps": 2}


def test_a_dry_run_draws_and_does_not_train(recipe: Path, tmp_path: Path) -> None:
    assert run(["pretrain", str(recipe), "-o", str(tmp_path / "run"), "--dry-run", *QUIET]) == 0
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["first_batch.png"]


def test_it_refuses_before_it_writes(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for setting, message in (
        ("contrast.loss=hcsl", "contrast"),
        ("generator.views.severities=[1]", "compares views of one anatomy"),
        ("templates=[nowhere]", "nowhere"),
        ("anatomy_wieght=1", "did you mean 'anatomy_weight'"),
    ):
        assert run(["pretrain", str(recipe), "-o", str(tmp_path / "run"), "--set", setting, *QUIET]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line
    assert run(["pretrain", str(recipe), "-o", str(tmp_path / "run"), "--resume", *QUIET]) == 2
    assert "holds no run to resume" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_state_of_a_run_is_no_network_to_start_from(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["pretrain", str(recipe), "-o", str(tmp_path / "run"), *QUIET]) == 0
    capsys.readouterr()
    state = str(tmp_path / "run" / "state.safetensors")
    for command in (["--init", state], ["--set", f"init={state}"]):
        assert run(["pretrain", str(recipe), "-o", str(tmp_path / "next"), *command, *QUIET]) == 2
        assert "holds no network (it may be the state of a run)" in capsys.readouterr().err
        assert not (tmp_path / "next").exists()


def test_a_term_of_a_recipe_that_ships_can_be_changed() -> None:
    term = read_recipe(PretrainConfig, "hard_negatives", ["contrast.0.beta=10", "contrast.0.loss=hucl"]).contrast[0]
    assert (term.beta, term.loss, term.projection) == (10, "hucl", "ball")


@pytest.mark.parametrize("name", ["brain_id", "voxel_contrast", "hard_negatives"])
def test_the_recipes_that_ship_can_run(name: str) -> None:
    config = load_yaml(PretrainConfig, name)
    check(config)
    assert config.name == name
    assert (data_dir("pipelines") / f"{name}.yaml").is_file()


def test_brain_id_has_the_ranges_of_its_preset() -> None:
    ours = load_yaml(PretrainConfig, "brain_id").generator
    preset = parse(GeneratorConfig, read_yaml(preset_file("brain-id")), "preset")
    grid = {"voxel_size_mm": ours.voxel_size_mm, "shape": ours.shape, "subsamples": ours.subsamples}
    assert preset.model_copy(update=grid) == ours


def test_views_are_four_where_a_recipe_does_not_say() -> None:
    default = PretrainConfig().generator.views.severities
    assert default == [0.0, 0.0, 1.0, 1.0]
    assert parse(PretrainConfig, {"generator": {"subsamples": 2}}, "t").generator.views.severities == default
    moved = parse(PretrainConfig, {"generator": {"views": {"perturbation_mm": 2.0}}}, "t").generator.views
    assert (moved.severities, moved.perturbation_mm) == (default, 2.0)
    own = {"generator": {"views": {"severities": [1.0]}}}
    assert parse(PretrainConfig, own, "t").generator.views.severities == [1.0]
