"""``synthseg finetune``, ``synthesize-t1`` and ``correct-bias``: from a recipe to an image, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

from synthseg.cli import run
from synthseg.cli.finetune import load_recipe
from synthseg.config.finetuning import TASKS
from synthseg.errors import ConfigError
from synthseg.networks.feature_file import load_features

TINY: dict[str, Any] = {
    "steps": 2,
    "init": None,
    "frozen": False,
    "precision": "fp32",
    "validation_templates": [],
    "generator": {"shape": [16, 24, 24], "voxel_size_mm": 4.0, "subsamples": 1},
    "network": {"channels": [4, 6, 8], "subpixel": 1},
}


@pytest.fixture(scope="session")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ball with a field along its second axis, int16, in LPS order."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in (40, 44, 32)], indexing="ij")
    data = np.where(x**2 + y**2 + z**2 < 0.6, 800 * np.exp(0.4 * y), 0).astype(np.int16)
    affine = np.diag([-4.0, -3.5, 5.0, 1.0])
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


@pytest.fixture(scope="session")
def models(template_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A network for each of two tasks, made by the command."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for task in ("reconstruction", "bias-field"):
        (folder / "recipe.yaml").write_text(yaml.safe_dump({"task": task, **TINY}))
        arguments = ["--templates", str(template_folders["head"]), "--device", "cpu", "-o", str(folder / task)]
        assert run(["finetune", str(folder / "recipe.yaml"), *arguments]) == 0
        found[task] = folder / task / "finetuned.safetensors"
        assert load_features(found[task]).head_for(task) == task
    return found


def test_a_t1_is_written_on_the_grid_of_the_scan(scan: Path, models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "t1.nii.gz"
    arguments = [
        "synthesize-t1",
        str(scan),
        "-o",
        str(out),
        "--model",
        str(models["reconstruction"]),
        "--device",
        "cpu",
    ]
    assert run(arguments) == 0
    image, source = nib.load(out), nib.load(scan)
    assert image.shape == source.shape
    assert np.allclose(image.affine, source.affine)
    data = np.asarray(image.dataobj)
    assert data.min() >= 0
    assert data.max() <= 1
    assert run(arguments) == 2  # exists already
    assert run([*arguments[:3], str(tmp_path / "many"), *arguments[4:], "--spacing", "model"]) == 0
    coarse = nib.load(tmp_path / "many" / "scan_t1synth.nii.gz")
    assert coarse.header.get_zooms() == pytest.approx((4.0, 4.0, 4.0))


def test_a_t1_says_where_it_lies_as_its_scan_does(models: dict[str, Path], scan: Path, tmp_path: Path) -> None:
    """Codes of qform and sform, such as that of a template space, are kept on any grid."""
    image = nib.load(scan)
    for setter, code in ((image.set_qform, 1), (image.set_sform, 4)):
        setter(image.affine, code)
    nib.save(image, tmp_path / "mni.nii.gz")
    for more in ([], ["--spacing", "6"]):
        arguments = ["synthesize-t1", str(tmp_path / "mni.nii.gz"), "-o", str(tmp_path / "out.nii.gz"), "--overwrite"]
        assert run([*arguments, "--model", str(models["reconstruction"]), "--device", "cpu", *more]) == 0
        made = nib.load(tmp_path / "out.nii.gz")
        assert (int(made.header["qform_code"]), int(made.header["sform_code"])) == (1, 4)
        assert made.get_data_dtype() == np.float32
        np.testing.assert_allclose(made.get_qform(), made.get_sform(), atol=1e-3)


def test_what_a_folder_holds_beside_scans_leaves_them_alone(
    models: dict[str, Path], scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.nii.gz").write_bytes(scan.read_bytes())
    (tmp_path / "in" / "a.nii.gz").write_bytes(b"")
    arguments = ["correct-bias", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert run([*arguments, "--model", str(models["bias-field"])]) == 1
    assert "a.nii.gz: the file is empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b_unbiased.nii.gz"]


def test_a_corrected_scan_and_its_field_make_the_scan(scan: Path, models: dict[str, Path], tmp_path: Path) -> None:
    out, field = tmp_path / "even.nii.gz", tmp_path / "field.nii.gz"
    arguments = ["correct-bias", str(scan), "-o", str(out), "--field", str(field), "--device", "cpu"]
    assert run([*arguments, "--model", str(models["bias-field"])]) == 0
    source, even, factor = (nib.load(path) for path in (scan, out, field))
    assert np.allclose(even.affine, source.affine)
    assert np.allclose(factor.affine, source.affine)
    product = np.asarray(even.dataobj, dtype=float) * np.asarray(factor.dataobj)
    np.testing.assert_allclose(product, np.asarray(source.dataobj), rtol=1e-3, atol=0.5)


def test_what_is_doubtful_about_a_scan_is_said(
    scan: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = nib.load(scan)
    for setter in (image.set_sform, image.set_qform):
        setter(image.affine, code=0)
    nib.save(image, tmp_path / "lost.nii.gz")
    for command, task in (("synthesize-t1", "reconstruction"), ("correct-bias", "bias-field")):
        arguments = [command, str(tmp_path / "lost.nii.gz"), "-o", str(tmp_path / f"{command}.nii.gz")]
        assert run([*arguments, "--model", str(models[task]), "--device", "cpu"]) == 0
        assert f"warning: {tmp_path / 'lost.nii.gz'}: the header states no orientation" in capsys.readouterr().err


@pytest.mark.parametrize(("factor", "offset"), [(1e30, 0.0), (1e-30, 0.0), (1.0, 1e9)])
def test_a_field_is_not_divided_out_of_values_that_had_to_be_changed(
    factor: float,
    offset: float,
    scan: Path,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is written times the field would not be the scan."""
    image = nib.load(scan)
    path, out = tmp_path / "far.nii", tmp_path / "out.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) * factor + offset, image.affine), path)
    arguments = ["correct-bias", str(path), "-o", str(out), "--model", str(models["bias-field"]), "--device", "cpu"]
    assert run(arguments) == 2
    assert f"error: {path}: its intensities are too large, too small or too far" in capsys.readouterr().err
    assert not out.exists()


def test_a_run_goes_on_without_the_file_that_it_began_from(
    models: dict[str, Path], template_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init, out = tmp_path / "init.safetensors", tmp_path / "run"
    init.write_bytes(models["reconstruction"].read_bytes())
    recipe = tmp_path / "recipe.yaml"
    bare = {key: value for key, value in TINY.items() if key not in ("generator", "network", "init")}
    recipe.write_text(yaml.safe_dump({"task": "reconstruction", **bare, "generator": {"subsamples": 1}}))
    arguments = ["finetune", str(recipe), "-o", str(out), "--templates", str(template_folders["head"]), "--init"]
    assert run([*arguments, str(init), "--frozen", "--device", "cpu"]) == 0
    init.unlink()
    capsys.readouterr()
    assert run([*arguments, str(tmp_path / "other.safetensors"), "--frozen", "--resume", "--device", "cpu"]) == 2
    assert "other.safetensors: no such weights file" in capsys.readouterr().err
    assert run([*arguments, str(init), "--frozen", "--resume", "--set", "steps=3", "--device", "cpu"]) == 0
    assert json.loads((out / "train.json").read_text())["steps"] == 3
    config = json.loads((out / "config.json").read_text())
    assert (config["init"], config["network"]["channels"]) == (str(init.resolve()), TINY["network"]["channels"])


def test_what_cannot_be_done_is_said_in_one_line(
    scan: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = str(tmp_path / "out.nii.gz"), tmp_path / "other.nii.gz"
    other.write_bytes(scan.read_bytes())
    refused = [
        (["synthesize-t1", str(scan), "-o", out], "no model with a head for reconstruction ships"),
        (["correct-bias", str(scan), "-o", out, "--model", str(models["reconstruction"])], "no head for bias-field"),
        (["correct-bias", str(scan), "-o", out, "--model", "siam16"], "synthseg finetune --task bias-field"),
        (["correct-bias", str(scan), "-o", str(scan), "--model", "siam16"], "is one of the inputs"),
        (["synthesize-t1", str(scan), "-o", out, "--model", "siam16", "--spacing", "0"], "--spacing 0"),
        (["correct-bias", str(scan), str(other), "-o", out, "--model", "siam16"], "expected a folder"),
        (["correct-bias", str(scan), str(other), "-o", str(tmp_path), "--field", out], "leave out --field"),
        (
            [
                "correct-bias",
                str(scan),
                "-o",
                out,
                "--field",
                str(tmp_path / "f.txt"),
                "--model",
                str(models["bias-field"]),
            ],
            "f.txt: not an image name",
        ),
        (["correct-bias", str(scan), "-o", out, "--field", out, "--model", "siam16"], "also the file of the corrected"),
        (["synthesize-t1", str(tmp_path / "none.nii.gz"), "-o", out, "--model", "siam16"], "none.nii.gz"),
        (["finetune", "--task", "magic"], "there is no task 'magic'"),
        (["finetune"], "give a recipe, or a task"),
        (["finetune", "--task", "segmentation", "--images", str(tmp_path / "none")], "no such folder"),
        (["finetune", "--task", "segmentation", "--set", "stepz=3"], "did you mean 'steps'"),
    ]
    capsys.readouterr()
    for arguments, message in refused:
        assert run(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert message in said, (arguments, said)
        assert len(said.strip().splitlines()) == 1
    assert not Path(out).exists()


@pytest.mark.parametrize("task", TASKS)
def test_the_recipes_that_ship_take_over_the_network(task: str) -> None:
    config = load_recipe(None, task)
    assert (config.task, config.init, config.frozen) == (task, "siam16", True)
    assert (config.generator.voxel_size_mm, config.network.subpixel) == (1.0, 2)


def test_options_replace_what_the_recipe_says(scan: Path, tmp_path: Path) -> None:
    for name in ("a_image", "a_label"):
        (tmp_path / f"{name}.nii.gz").write_bytes(scan.read_bytes())
    config = load_recipe(None, "segmentation", ["steps=7"], None, False, 1, None, tmp_path, "head")
    assert (config.steps, config.frozen, config.few_shot, config.scheme, config.templates) == (7, False, 1, "head", ())
    assert [Path(one.labels).name for one in config.images] == ["a_label.nii.gz"]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({**TINY, "images": [{"image": "a_image.nii.gz", "labels": "a_label.nii.gz"}]}))
    beside = load_recipe(str(recipe), "bias-field")
    assert beside.images[0].image == str(tmp_path / "a_image.nii.gz")
    assert load_recipe(str(recipe), None, None, None, None, None, ["phantom"]).images == ()
    with pytest.raises(ConfigError, match="no task"):
        load_recipe(str(recipe), "magic")
