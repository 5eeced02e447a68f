"""The command `synthseg segment`: exit codes, messages, and which files are written."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from synthseg.cli import run
from tests.segmenting import SHAPE, Levels, fake_checkpoint_module, files, write_scan


@pytest.fixture(autouse=True)
def fake_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "synthseg.networks.checkpoint", fake_checkpoint_module())


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


def test_a_new_folder_with_a_dot_in_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_scan(tmp_path / "in" / "a.nii.gz"), write_scan(tmp_path / "in" / "b.nii.gz", 1)
    out = tmp_path / "seg_2024.01"
    assert segment(first, "-o", out) == 2  # for one scan it may be the name of a file
    assert "make the folder first if it is one" in errors(capsys)[0]
    assert not out.exists()
    assert segment(first, second, "-o", out) == 0
    assert files(out) == ["a_seg.nii.gz", "b_seg.nii.gz"]
    (tmp_path / "seg_2024.02").mkdir()
    assert segment(first, "-o", tmp_path / "seg_2024.02") == 0
    assert files(tmp_path / "seg_2024.02") == ["a_seg.nii.gz"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of files are bytes on Linux")
def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    scan = write_scan(tmp_path / os.fsdecode(b"caf\xe9.nii.gz"))
    wanted = ["--overview", tmp_path / "a.png", "--report", tmp_path / "r.html", "--volumes", tmp_path / "v.csv"]
    assert segment(scan, *wanted) == 0
    assert all(Path(str(path)).is_file() for path in wanted[1::2])


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
        ([scan, other, "-o", tmp_path / "x.nii.gz"], "folder"),
        ([scan, other, "-o", tmp_path / "file"], "folder"),
        ([scan, "--volumes", tmp_path / "file" / "v.csv"], "v.csv"),
        ([scan, "--volumes", tmp_path], str(tmp_path)),
        ([scan, "--overview", tmp_path / "p.jpg"], ".png"),
        ([scan, "--overview", tmp_path / "file" / "p.png"], "p.png"),
        ([scan, "--volumes", tmp_path / "a_seg.nii.gz"], ".csv"),
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


def test_help_needs_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys, synthseg.cli as cli; cli.run(['--help']); cli.run(['segment', '--help']); "
        "sys.exit(bool({'torch', 'monai', 'matplotlib', 'nibabel', 'scipy'} & set(sys.modules)))"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "segment" in done.stdout
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    assert cpu_s < 2  # about half a second; the libraries would take several


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


# --------------------------------------------------------------------------------- lists, patterns, more outputs


def test_a_list_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scan(tmp_path / "in" / "a.nii.gz")
    write_scan(tmp_path / "in" / "b.nii.gz", 1)
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("# scans\n\nin/a.nii.gz\n")
    assert segment("--from-list", "list.txt", "in/b.nii.gz", "-o", "out") == 0
    assert files(tmp_path / "out") == ["a_seg.nii.gz", "b_seg.nii.gz"]


def test_a_scan_that_is_named_twice_is_done_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = write_scan(tmp_path / "in" / "a.nii.gz")
    assert segment(scan, tmp_path / "in" / ".." / "in" / "a.nii.gz", "-o", tmp_path / "x.nii.gz") == 0
    assert segment(tmp_path / "in", scan, "-o", tmp_path / "out", "--mesh", "Bright,bright, BRIGHT") == 0
    assert files(tmp_path) == ["in/a.nii.gz", "out/a_Bright.surf.gii", "out/a_seg.nii.gz", "x.nii.gz"]


def test_a_quoted_pattern(tmp_path: Path) -> None:
    write_scan(tmp_path / "s1" / "a.nii.gz")
    write_scan(tmp_path / "s2" / "b.nii.gz", 1)
    assert segment(tmp_path / "*" / "*.nii.gz", "-o", tmp_path / "out") == 0
    assert files(tmp_path / "out") == ["a_seg.nii.gz", "b_seg.nii.gz"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "no scan was given"),
        (["a.nii.gz", "--fast", "--robust"], "exclude"),
        (["a.nii.gz", "--spacing", "thin"], "--spacing thin"),
        (["a.nii.gz", "--spacing", "1x1"], "--spacing 1x1"),
        (["a.nii.gz", "--spacing", "0"], "--spacing 0"),
        (["a.nii.gz", "--spacing", "nan"], "--spacing nan"),
        (["a.nii.gz", "--crop", "-5"], "--crop -5"),
        (["a.nii.gz", "--voxel-size", "0"], "voxel size"),
        (["a.nii.gz", "--mesh-format", "obj"], "gii or stl"),
        (["a.nii.gz", "--participant", "01"], "--bids"),
        (["a.nii.gz", "--bids", "."], "no other scans"),
        (["a.nii.gz", "--report", "report.pdf"], ".html"),
        (["a.nii.gz", "--volumes", "v.xlsx"], "v.xlsx: expected a name that ends in .tsv (a table with tabs), .csv or"),
        (["--bids", ".", "--volumes", "v.xlsx"], "v.xlsx: expected a name"),
        (["--from-list", "nowhere.txt"], "nowhere.txt"),
        (["--bids", "."], "sub-<label>"),
        (["no*.nii.gz"], "no scan matches"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(
    arguments: list[str],
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_scan(tmp_path / "a.nii.gz")
    monkeypatch.chdir(tmp_path)
    assert segment(*arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert word in line
    assert files(tmp_path) == ["a.nii.gz"]


# ------------------------------------------------------------------------------------------------------ resume


def rows(table: Path, delimiter: str = ",") -> dict[str, dict[str, str]]:
    with open(table, newline="") as file:
        return {Path(row["scan"]).name: row for row in csv.DictReader(file, delimiter=delimiter)}


def test_what_is_done_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, name in enumerate("abc"):
        write_scan(tmp_path / "in" / f"{name}.nii.gz", index)
    out, table = tmp_path / "out", tmp_path / "v.tsv"
    assert segment(tmp_path / "in" / "b.nii.gz", "-o", out, "--volumes", table) == 0
    (done,) = out.iterdir()
    before = done.stat().st_mtime_ns
    capsys.readouterr()

    assert segment(tmp_path / "in", "-o", out, "--volumes", table) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "skipped, done already" in line] == [
        line for line in lines if line.startswith("[2/3]")
    ]
    assert "2 done, 1 skipped" in lines[-1]
    assert done.stat().st_mtime_ns == before
    assert list(rows(table, "\t")) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    assert files(out) == ["a_seg.nii.gz", "b_seg.nii.gz", "c_seg.nii.gz"]

    assert segment(tmp_path / "in", "-o", out, "--volumes", table, "--overwrite") == 0
    assert "3 done" in capsys.readouterr().err
    assert done.stat().st_mtime_ns > before


def test_a_scan_without_a_row_in_the_table_is_not_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = write_scan(tmp_path / "a.nii.gz")
    assert segment(scan) == 0
    before = (tmp_path / "a_seg.nii.gz").stat().st_mtime_ns
    assert segment(scan, "--volumes", tmp_path / "v.csv") == 0
    assert list(rows(tmp_path / "v.csv")) == ["a.nii.gz"]
    assert (tmp_path / "a_seg.nii.gz").stat().st_mtime_ns == before  # the label map that is there is left alone
    assert files(tmp_path) == ["a.nii.gz", "a_seg.nii.gz", "v.csv"]
    capsys.readouterr()
    assert segment(scan, "--volumes", tmp_path / "v.csv") == 0
    assert "skipped" in capsys.readouterr().err


def test_outputs_of_another_result_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = write_scan(tmp_path / "a.nii.gz")
    assert segment(scan) == 0
    edited = nib.load(tmp_path / "a_seg.nii.gz")
    data = np.asarray(edited.dataobj).copy()
    data[3:6] = 7
    nib.save(nib.Nifti1Image(data, edited.affine, edited.header), tmp_path / "a_seg.nii.gz")
    before = (tmp_path / "a_seg.nii.gz").read_bytes()
    assert segment(scan, "--mask") == 2
    (line,) = errors(capsys)
    assert "differs from what this run makes" in line
    assert (tmp_path / "a_seg.nii.gz").read_bytes() == before
    assert files(tmp_path) == ["a.nii.gz", "a_seg.nii.gz"]


@pytest.mark.parametrize("harm", ["cut", "grid", "position", "floats"])
def test_what_is_not_a_whole_result_of_the_scan_is_never_replaced(
    harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan, result = write_scan(tmp_path / "a.nii.gz"), tmp_path / "a_seg.nii.gz"
    assert segment(scan) == 0
    image = nib.load(result)
    data = np.asarray(image.dataobj)
    if harm == "cut":
        result.write_bytes(result.read_bytes()[:-20])
    elif harm == "grid":
        nib.save(nib.Nifti1Image(data[1:], image.affine), result)
    elif harm == "position":
        nib.save(nib.Nifti1Image(data, image.affine + np.eye(4, k=3) * 5), result)
    else:
        nib.save(nib.Nifti1Image(data.astype(np.float32), image.affine), result)
    before = result.read_bytes()
    capsys.readouterr()
    assert segment(scan) == 2
    (line,) = errors(capsys)
    assert "--overwrite" in line
    assert str(result) in line
    assert result.read_bytes() == before
    assert segment(scan, "--overwrite") == 0
    np.testing.assert_array_equal(np.asarray(nib.load(result).dataobj), data)


def test_a_table_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = write_scan(tmp_path / "a.nii.gz")
    for text in ("name,age\nx,3\n", "scan,other_ml\nb.nii.gz,1.000\n"):
        (tmp_path / "v.csv").write_text(text)
        assert segment(scan, "--volumes", tmp_path / "v.csv") == 2
        (line,) = errors(capsys)
        assert "v.csv" in line
        assert "--overwrite" in line
        assert (tmp_path / "v.csv").read_text() == text
        assert files(tmp_path) == ["a.nii.gz", "v.csv"]


def test_outputs_beside_the_scans_are_not_segmented(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scan(tmp_path / "a.nii.gz")
    write_scan(tmp_path / "b_mask.nii.gz", 1)  # a scan of that name: there is no b.nii.gz that it could belong to
    assert segment(tmp_path, "--mask", "--posteriors") == 0
    made = files(tmp_path)
    scans = ("a", "b_mask")
    assert made == sorted(f"{scan}{end}.nii.gz" for scan in scans for end in ("", "_seg", "_mask", "_posteriors"))
    capsys.readouterr()
    assert segment(tmp_path, "--mask", "--posteriors") == 0
    assert "2 skipped" in capsys.readouterr().err
    assert files(tmp_path) == made


def test_a_report_of_done_skipped_and_failed_scans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, name in enumerate("ab"):
        write_scan(tmp_path / "in" / f"{name}<b>.nii.gz", index)
    (tmp_path / "in" / "c.nii.gz").write_text("not a scan")
    out, html = tmp_path / "out", tmp_path / "r.html"
    assert segment(tmp_path / "in" / "a<b>.nii.gz", "-o", out) == 0
    assert segment(tmp_path / "in", "-o", out, "--report", html) == 1
    text = html.read_text()
    assert "fake" in text
    assert "a&lt;b&gt;" in text
    assert "a<b>" not in text
    assert "cannot be read" in text
    assert segment(tmp_path / "in", "-o", out, "--report", html) == 1  # a report of ours is written anew
    html.write_text("<html>minutes of a meeting</html>")
    capsys.readouterr()
    assert segment(tmp_path / "in", "-o", out, "--report", html) == 2
    assert "not a report" in errors(capsys)[0]
    assert html.read_text() == "<html>minutes of a meeting</html>"


def test_an_error_of_a_scan_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scan(tmp_path / "a.nii.gz")
    large = np.random.default_rng(0).normal(size=(30, 30, 30))
    nib.save(nib.Nifti1Image(large.astype(np.float32), np.diag([90.0, 90.0, 90.0, 1.0])), tmp_path / "b.nii.gz")
    assert segment(tmp_path, "-o", tmp_path / "out") == 1
    (line,) = errors(capsys)
    assert line.startswith(f"error: {tmp_path / 'b.nii.gz'}: ")
    assert "too large" in line


def test_colour_tables_lie_in_each_folder_of_results(tmp_path: Path) -> None:
    write_scan(tmp_path / "x" / "a.nii.gz")
    write_scan(tmp_path / "y" / "b.nii.gz", 1)
    assert segment(tmp_path / "x") == 0
    assert segment(tmp_path / "*" / "*.nii.gz", "--color-tables") == 0  # x is done, and gets them all the same
    for folder, scan in (("x", "a"), ("y", "b")):
        tables = [name for name in files(tmp_path / folder) if name.startswith("two")]
        assert len(tables) == 4
        assert len(files(tmp_path / folder)) == 6
        assert (tmp_path / folder / f"{scan}_seg.nii.gz").is_file()


def test_another_grid_for_all_images(tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "a.nii.gz")
    wanted = ["--mask", "--posteriors", "--resampled", "--stripped", "--mesh", "Bright", "--mesh-format", "stl"]
    assert segment(scan, "-o", tmp_path / "out", "--spacing", "model", *wanted) == 0
    images = [nib.load(path) for path in sorted((tmp_path / "out").glob("*.nii.gz"))]
    assert len(images) == 5
    for image in images:
        np.testing.assert_allclose(image.header.get_zooms()[:3], 2.0, rtol=1e-5)
        assert image.shape[:3] == (13, 14, 19)  # 17 × 1.5, 18 × 1.5 and 19 × 2 mm
    assert files(tmp_path / "out")[0] == "a_Bright.stl"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--resampled"], "--spacing"),
        (["--mesh", "liver"], "'liver'"),
        (["--scheme", "nonsense"], "'nonsense'"),
        (["--scheme", "siam16"], "siam16"),
    ],
)
def test_what_the_model_cannot_give_is_found_before_any_work(
    arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = write_scan(tmp_path / "a.nii.gz")
    assert segment(scan, "-o", tmp_path / "out", *arguments) == 2
    (line,) = errors(capsys)
    assert word in line
    assert files(tmp_path) == ["a.nii.gz"]


def test_too_little_memory_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Levels, image: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(Levels, "forward", refused)
    scan = write_scan(tmp_path / "a.nii.gz")
    assert segment(scan) == 2
    (line,) = errors(capsys)
    assert str(scan) in line
    assert "too little memory" in line
    assert files(tmp_path) == ["a.nii.gz"]
