"""The command `synthseg segment`: exit codes, messages, and which files are written."""

import csv
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
import torch

from synthseg.cli import run
from synthseg.errors import CheckpointError
from synthseg.labels import Label, LabelTable

TABLE = LabelTable(
    "two", (Label(0, "Background", tissue="air"), Label(3, "Dark", tissue="csf"), Label(7, "Bright", tissue="gm"))
)
SHAPE = (17, 18, 19)


class Levels(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([-100 * (image - level) ** 2 for level in (0.0, 0.5, 1.0)], 1)


@dataclass
class Fake:
    network: torch.nn.Module = field(default_factory=Levels)
    labels: LabelTable = TABLE
    voxel_size_mm: float = 2.0
    window: tuple[int, int, int] = (24, 24, 24)
    multiple: int = 8
    name: str = "fake"
    sha256: str = "0" * 64


@pytest.fixture(autouse=True)
def fake_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(name_or_path: str | Path, device: torch.device) -> Fake:
        if str(name_or_path) == "nothing":
            raise CheckpointError("nothing: there is no such model")
        return Fake()

    module = ModuleType("synthseg.networks.checkpoint")
    module.load_model = load_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "synthseg.networks.checkpoint", module)


def write_scan(path: Path, seed: int = 0) -> Path:
    data = np.random.default_rng(seed).normal(0, 1, SHAPE)
    data[3:14, 3:14, 3:14] += 50
    data[6:12, 6:12, 6:12] += 50
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data.astype(np.float32), np.diag([-1.5, 1.5, 2.0, 1.0])), path)
    return path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def segment(*arguments: object) -> int:
    return run(["segment", *map(str, arguments), "--device", "cpu"])


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


# ------------------------------------------------------------------------------------------------ success


def test_the_result_lies_beside_the_scan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = write_scan(tmp_path / "a.nii.gz")
    assert segment(scan) == 0
    assert files(tmp_path) == ["a.nii.gz", "a_seg.nii.gz"]
    result = nib.load(tmp_path / "a_seg.nii.gz")
    np.testing.assert_array_equal(result.affine, nib.load(scan).affine)
    labels = np.asarray(result.dataobj)
    assert labels.shape == SHAPE
    assert labels[1, 1, 1] == 0
    assert labels[4, 8, 8] == 3
    assert labels[9, 9, 9] == 7
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a_seg.nii.gz" in captured.err
    assert all(step in captured.err for step in ("read", "conform", "network", "clean-up", "resample", "write"))


@pytest.mark.parametrize("name", ["out.nii.gz", "out.nii", "out.mgz", "new/out.nii.gz"])
def test_one_output_file(tmp_path: Path, name: str) -> None:
    scan = write_scan(tmp_path / "a.nii.gz")
    assert segment(scan, "-o", tmp_path / name) == 0
    assert files(tmp_path) == sorted(["a.nii.gz", name])
    assert nib.load(tmp_path / name).shape == SHAPE


def test_a_folder_in_and_a_folder_out(tmp_path: Path) -> None:
    for index, name in enumerate(["a.nii.gz", "b.nii", "old_seg.nii.gz", "._a.nii.gz"]):
        write_scan(tmp_path / "in" / name, index)
    (tmp_path / "in" / "notes.txt").write_text("x")
    out = tmp_path / "out"
    assert segment(tmp_path / "in", "-o", out, "--volumes", out / "v.csv", "--overview", out / "p.png") == 0
    assert files(out) == ["a_seg.nii.gz", "b_seg.nii.gz", "p_a.png", "p_b.png", "v.csv"]
    with open(out / "v.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["scan"]).name for row in rows] == ["a.nii.gz", "b.nii"]
    voxels = (np.asarray(nib.load(out / "a_seg.nii.gz").dataobj) == 7).sum()
    assert float(rows[0]["Bright_ml"]) == pytest.approx(voxels * 1.5 * 1.5 * 2 / 1000)


def test_overwrite_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = write_scan(tmp_path / "a.nii.gz")
    (tmp_path / "a_seg.nii.gz").write_text("old")
    assert segment(scan) == 2
    (line,) = errors(capsys)
    assert "a_seg.nii.gz" in line
    assert "--overwrite" in line
    assert (tmp_path / "a_seg.nii.gz").read_text() == "old"
    assert segment(scan, "--overwrite") == 0
    assert nib.load(tmp_path / "a_seg.nii.gz").shape == SHAPE


# -------------------------------------------------------------------------------------------------- inputs


def bad_files() -> dict[str, Callable[[Path], object]]:
    data = np.random.default_rng(0).normal(size=(20, 20, 20))

    def nifti(array: np.ndarray, affine: np.ndarray | None = None) -> Callable[[Path], object]:
        def write(path: Path) -> None:
            image = nib.Nifti1Image(array, np.eye(4))
            if affine is not None:
                image.set_qform(None, code=0)
                image.header["sform_code"] = 1
                image.header["srow_x"], image.header["srow_y"], image.header["srow_z"] = affine[:3]
                image = nib.Nifti1Image(array, None, image.header)
            nib.save(image, path)

        return write

    def truncated(path: Path) -> None:
        nifti(data)(path)
        path.write_bytes(path.read_bytes()[:-5000])

    return {
        "missing": lambda path: None,
        "empty": lambda path: path.touch(),
        "empty folder": lambda path: path.mkdir(),
        "truncated": truncated,
        "text": lambda path: path.write_text("not a scan\n" * 100),
        "2-D": nifti(data[0]),
        "many volumes": nifti(np.stack([data, data], -1)),
        "RGB": nifti(np.ones((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "complex": nifti(data.astype(np.complex64)),
        "constant": nifti(np.zeros((4, 5, 6), np.float32)),
        "NaN": nifti(np.full((4, 5, 6), np.nan, np.float32)),
        "singular affine": nifti(data, np.zeros((4, 4))),
        "NaN affine": nifti(data, np.full((4, 4), np.nan)),
        "zero-size": nifti(np.zeros((4, 0, 6), np.float32)),
    }


BAD = bad_files()


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_input_ends_with_code_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = tmp_path / "scan.nii.gz"
    BAD[kind](path)
    before = files(tmp_path)
    assert segment(path, "--volumes", tmp_path / "v.csv", "--overview", tmp_path / "p.png") == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith(f"error: {path}: ")
    assert "Traceback" not in line
    assert files(tmp_path) == before


def test_in_a_batch_the_others_finish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scan(tmp_path / "a.nii.gz")
    (tmp_path / "b.nii.gz").write_text("not a scan")
    write_scan(tmp_path / "c.nii.gz")
    assert segment(tmp_path, "-o", tmp_path / "out", "--volumes", tmp_path / "v.csv") == 1
    assert files(tmp_path / "out") == ["a_seg.nii.gz", "c_seg.nii.gz"]
    (line,) = errors(capsys)
    assert str(tmp_path / "b.nii.gz") in line
    with open(tmp_path / "v.csv", newline="") as file:
        assert [Path(row["scan"]).name for row in csv.DictReader(file)] == ["a.nii.gz", "c.nii.gz"]


# ------------------------------------------------------------------------------------- outputs and options


def test_what_cannot_be_written_is_found_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan, other = write_scan(tmp_path / "a.nii.gz"), write_scan(tmp_path / "sub" / "a.nii.gz")
    (tmp_path / "file").touch()
    before = files(tmp_path)
    cases: list[tuple[list[object], str]] = [
        ([scan, "-o", tmp_path / "file" / "x.nii.gz"], "file"),
        ([scan, "-o", tmp_path / "x.txt"], "x.txt"),
        ([scan, "-o", scan, "--overwrite"], "one of the inputs"),
        ([scan, other, "-o", tmp_path / "out"], "written twice"),
        ([scan, scan], "written twice"),
        ([scan, other, "-o", tmp_path / "x.nii.gz"], "folder"),
        ([scan, other, "-o", tmp_path / "file"], "folder"),
        ([scan, "--volumes", tmp_path / "file" / "v.csv"], "v.csv"),
        ([scan, "--volumes", tmp_path], str(tmp_path)),
        ([scan, "--overview", tmp_path / "p.jpg"], ".png"),
        ([scan, "--overview", tmp_path / "file" / "p.png"], "p.png"),
        ([scan, "--volumes", tmp_path / "a_seg.nii.gz"], "written twice"),
        ([scan, "--model", "nothing"], "nothing"),
        ([scan, tmp_path / "missing.nii.gz"], "missing.nii.gz"),
    ]
    for arguments, word in cases:
        assert segment(*arguments) == 2, arguments
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert word in line
        assert files(tmp_path) == before


@pytest.mark.parametrize(
    "arguments", [["segment"], ["segment", "a.nii", "--threads", "0"], ["segmnt"], ["segment", "a.nii", "--wrong"]]
)
def test_usage_errors_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = write_scan(tmp_path / "a.nii.gz")
    for device in ("cuda", "cuda:3", "gpu"):
        assert run(["segment", str(scan), "--device", device]) == 2
        assert f"'{device}'" in errors(capsys)[0]
    assert files(tmp_path) == ["a.nii.gz"]


def test_internal_errors_have_their_own_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Levels, image: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("two lines\nof trouble")

    monkeypatch.setattr(Levels, "forward", broken)
    scan = write_scan(tmp_path / "a.nii.gz")
    assert segment(scan) == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {scan}: internal error")
    assert "--debug" in line
    assert segment(scan, "--debug") == 3
    assert "Traceback" in capsys.readouterr().err
    assert files(tmp_path) == ["a.nii.gz"]


def test_version_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("synthseg ")
    assert run(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "models:" in out
    assert "templates:" in out


def test_help_needs_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys, synthseg.cli as cli; cli.run(['--help']); cli.run(['segment', '--help']); "
        "sys.exit(bool({'torch', 'monai', 'matplotlib', 'nibabel', 'scipy'} & set(sys.modules)))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "segment" in done.stdout
    assert time.perf_counter() - start < 5  # a fraction of a second on a machine that is not busy


def test_an_unreadable_file_in_a_folder_leaves_the_others_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scan(tmp_path / "in" / "a.nii.gz")
    (tmp_path / "in" / "b.nii.gz").write_bytes(b"")
    write_scan(tmp_path / "in" / "c$x_{$.nii.gz", 1)  # not mathematics for the title of the picture either
    overview = str(tmp_path / "o.png")
    assert run(["segment", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--overview", overview]) == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a_seg.nii.gz", "c$x_{$_seg.nii.gz"]
    assert (tmp_path / "o_c$x_{$.png").is_file()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "b.nii.gz" in errors[0]
