"""The command `synthseg features`: files, pictures, shared components, messages and exit codes."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from synthseg.cli import run
from synthseg.inputs import find_scans
from synthseg.networks.feature_file import load_features
from synthseg.representation.extraction import extract
from synthseg.volume import load_volume
from tests.representation.models import ball, oblique, write_model

SHAPE, SPACING_MM = (38, 34, 45), (4.0, 5.0, 3.0)
CHANNELS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def write_scan(path: Path, radius_mm: float = 60.0) -> Path:
    volume = ball(oblique(SHAPE, SPACING_MM, np.array([3.0, -20, 9])), SHAPE, np.array([3.0, -25, 12]), radius_mm)
    data = volume.data + np.random.default_rng(0).normal(0, 1, SHAPE).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data.astype(np.float32), volume.affine), path)
    return path


def features(model: Path, *arguments: object) -> int:
    return run(["features", *map(str, arguments), "--model", str(model), "--device", "cpu"])


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


# --------------------------------------------------------------------------------------------------- files


def test_each_format_holds_the_same(model: Path, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "a.nii.gz")
    expected = extract(load_volume(scan), load_features(model), levels=(-1, -2))
    for suffix in ("nii.gz", "npz", "safetensors"):
        assert features(model, scan, "-o", tmp_path / f"out.{suffix}", "--levels", "-1,-2") == 0
    image = nib.load(tmp_path / "out.nii.gz")
    assert image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.moveaxis(np.asarray(image.dataobj), -1, 0), expected.values.float().numpy())
    np.testing.assert_allclose(image.affine, expected.affine, atol=1e-4)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
    record = json.loads(image.header.extensions[0].get_content())
    with np.load(tmp_path / "out.npz", allow_pickle=False) as stored:
        assert stored["features"].dtype == np.float16
        np.testing.assert_array_equal(stored["features"], expected.values.numpy())
        np.testing.assert_array_equal(stored["affine"], expected.affine)
        assert json.loads(str(stored["record"])) == record
    with safe_open(tmp_path / "out.safetensors", framework="np") as opened:
        np.testing.assert_array_equal(opened.get_tensor("features"), expected.values.numpy())
        assert json.loads(opened.metadata()["record"]) == record
    assert record["model"] == "tiny"
    assert (record["levels"], record["channels"], record["pca"]) == ([-1, -2], [6, 5], None)


def test_components_and_colours_are_shared(model: Path, tmp_path: Path) -> None:
    scans = [write_scan(tmp_path / "in" / f"{name}.nii.gz", radius) for name, radius in (("a", 60.0), ("b", 50.0))]
    picture = tmp_path / "colours.png"
    assert features(model, tmp_path / "in", "-o", tmp_path / "out", "--pca", 2, "--picture", picture) == 0
    assert names(tmp_path / "out") == ["a_features.nii.gz", "b_features.nii.gz"]
    bases = []
    for scan in scans:
        image = nib.load(tmp_path / "out" / f"{scan.name.removesuffix('.nii.gz')}_features.nii.gz")
        basis = json.loads(image.header.extensions[0].get_content())["pca"]
        bases.append(basis)
        whole = extract(load_volume(scan), load_features(model)).values.float().flatten(1).numpy()
        expected = np.array(basis["components"]) @ (whole - np.array(basis["mean"])[:, None])
        written = np.moveaxis(np.asarray(image.dataobj), -1, 0).reshape(2, -1)
        np.testing.assert_allclose(written, expected, atol=2e-3 * np.abs(expected).max())
    assert bases[0] == bases[1]
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    colourful = np.ptp(pixels, axis=2) > 40
    assert colourful[:, : pixels.shape[1] // 2].mean() < 0.01  # grey on the left
    assert colourful[:, pixels.shape[1] // 2 :].mean() > 0.1  # colour on the right


def test_a_name_in_capitals_is_the_name_of_the_file(model: Path, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "a.nii.gz")
    for name in ("A.NPZ", "A.NII.GZ", "A.SafeTensors"):
        assert features(model, scan, "-o", tmp_path / name) == 0
    assert names(tmp_path) == ["A.NII.GZ", "A.NPZ", "A.SafeTensors", "a.nii.gz"]
    assert np.load(tmp_path / "A.NPZ")["features"].shape[0] == CHANNELS


def test_what_is_doubtful_about_a_scan_is_said(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = write_scan(tmp_path / "a.nii.gz")
    image = nib.load(scan)
    image.set_sform(image.affine, code=0)
    image.set_qform(image.affine, code=0)
    nib.save(image, scan)
    for more in (["-o", tmp_path / "out.npz"], ["--picture", tmp_path / "a.png"]):
        assert features(model, scan, *more) == 0
        assert f"warning: {scan}: the header states no orientation" in capsys.readouterr().err


def test_a_picture_alone(model: Path, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "a.nii.gz")
    assert features(model, scan, "--picture", tmp_path / "a.png") == 0
    assert names(tmp_path) == ["a.nii.gz", "a.png"]


def test_the_results_in_a_folder_are_no_scans(model: Path, tmp_path: Path) -> None:
    write_scan(tmp_path / "a.nii.gz")
    assert features(model, tmp_path, "-o", tmp_path) == 0
    assert [scan.path.name for scan in find_scans([tmp_path])] == ["a.nii.gz"]


# ------------------------------------------------------------------------------------------------ failures


def test_a_scan_that_fails_leaves_the_others_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scan(tmp_path / "in" / "b.nii.gz")
    (tmp_path / "in" / "a.nii.gz").write_bytes(b"not an image")
    for more in ([], ["--pca", "2", "--overwrite"]):
        assert features(model, tmp_path / "in", "-o", tmp_path / "out", *more) == 1
        assert "a.nii.gz" in error(capsys)
        assert names(tmp_path / "out") == ["b_features.nii.gz"]


def test_refused_before_anything_is_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan, other = write_scan(tmp_path / "a.nii.gz"), write_scan(tmp_path / "b.nii.gz")
    out = tmp_path / "out.npz"
    cases: list[tuple[list[object], str]] = [
        ([scan], "nothing would be written"),
        (["-o", out], "no scan was given"),
        ([scan, "-o", tmp_path / "out.txt"], "expected a name that ends in"),
        ([scan, other, "-o", out], "expected a folder"),
        ([scan, "-o", out, "--levels", "-1,-9"], "no level -9"),
        ([scan, "-o", out, "--levels", "fine"], "expected whole numbers"),
        ([scan, "-o", out, "--pca", CHANNELS + 1], "6 channels"),
        ([scan, "-o", out, "--picture", tmp_path / "a.jpg"], "end its name in .png"),
        ([scan, "-o", tmp_path / "new", "--format", "mat"], "expected nii.gz, npz or safetensors"),
        ([scan, "-o", out, "--format", "npz"], "is of files in a folder"),
        ([scan, "-o", tmp_path / "new", "--n", "3"], "--n is for --report"),
        ([scan, "-o", tmp_path / "new", "--seed", "0"], "--seed is for --report"),
        (["--report", tmp_path / "r.html", "--format", "npz"], "leave out --format"),
        ([scan, "-o", scan], "is one of the inputs"),
        ([scan, "-o", out, "--templates", "phantom"], "--report"),
        ([scan, "--report", tmp_path / "r.html"], "leave out scans"),
        (["--report", tmp_path / "r.pdf"], "ends in .html"),
        ([tmp_path / "none.nii.gz", "-o", out], "none.nii.gz"),
    ]
    for arguments, words in cases:
        assert features(model, *arguments) == 2, arguments
        assert words in error(capsys), arguments
    assert names(tmp_path) == ["a.nii.gz", "b.nii.gz"]


def test_files_that_exist_are_kept(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan, out = write_scan(tmp_path / "a.nii.gz"), tmp_path / "out.npz"
    out.write_text("mine")
    assert features(model, scan, "-o", out) == 2
    assert "exists already" in error(capsys)
    assert out.read_text() == "mine"
    assert features(model, scan, "-o", out, "--overwrite") == 0
    assert np.load(out)["features"].shape[0] == CHANNELS
