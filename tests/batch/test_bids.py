"""BIDS: which scans of a dataset are found, and a derivative that the validator of the standard accepts."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from synthseg.batch.bids import (
    check_description,
    derivative_path,
    find_bids_scans,
    parse_name,
    resolution_label,
    write_description,
)
from synthseg.batch.jobs import Wanted
from synthseg.cli import run
from synthseg.errors import InputError, OutputError
from tests.segmenting import fake_checkpoint_module, files, write_scan

VALIDATOR = shutil.which("bids-validator-deno") or shutil.which("bids-validator-deno", path=Path(sys.executable).parent)


@pytest.fixture(autouse=True)
def fake_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "synthseg.networks.checkpoint", fake_checkpoint_module())


def make_dataset(root: Path, names: tuple[str, ...]) -> Path:
    for index, name in enumerate(names):
        write_scan(root / f"{name}.nii.gz", index)
        (root / f"{name}.json").write_text("{}")
    (root / "dataset_description.json").write_text(
        json.dumps({"Name": "heads", "BIDSVersion": "1.11.1", "DatasetType": "raw", "License": "CC0"})
    )
    return root


def segment(dataset: Path, *arguments: object) -> int:
    return run(["segment", "--bids", str(dataset), *map(str, arguments), "--device", "cpu"])


# --------------------------------------------------------------------------------------------------- reading


def test_the_anatomical_scans_of_a_dataset(tmp_path: Path) -> None:
    scans = (
        *("sub-02/ses-b/anat/sub-02_ses-b_run-1_T2w", "sub-02/ses-a/anat/sub-02_ses-a_acq-hi_FLAIR"),
        *("sub-01/anat/sub-01_T1w", "sub-01/anat/sub-01_PDw", "sub-01/ct/sub-01_ct", "sub-03/anat/sub-03_part-mag_T1w"),
    )
    others = (
        *("sub-01/func/sub-01_task-rest_bold", "sub-01/anat/sub-01_T2star", "sub-03/anat/sub-03_part-phase_T1w"),
        *("sub-01/anat/sub-02_T1w", "sub-01/anat/T1w", "sub-01/anat/sub-01_defaced T1w", "sub-01/anat/01_T1w"),
        "derivatives/other/sub-01/anat/sub-01_T1w",
    )
    dataset = make_dataset(tmp_path, (*scans, *others))
    found = find_bids_scans(dataset)
    assert [scan.relative.removesuffix(".nii.gz") for scan in found] == [
        *("sub-01/anat/sub-01_PDw", "sub-01/anat/sub-01_T1w", "sub-01/ct/sub-01_ct"),
        *("sub-02/ses-a/anat/sub-02_ses-a_acq-hi_FLAIR", "sub-02/ses-b/anat/sub-02_ses-b_run-1_T2w"),
        "sub-03/anat/sub-03_part-mag_T1w",
    ]
    some = find_bids_scans(dataset, ["sub-03", "02"])
    assert {scan.entities[0] for scan in some} == {("sub", "02"), ("sub", "03")}
    assert found[2].folder == Path("sub-01/anat")
    assert found[3].folder == Path("sub-02/ses-a/anat")


def test_what_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sub-<label>"):
        find_bids_scans(tmp_path)
    with pytest.raises(InputError, match="cannot be listed"):
        find_bids_scans(tmp_path / "missing")
    (tmp_path / "sub-01" / "anat").mkdir(parents=True)
    with pytest.raises(InputError, match="no scan to segment"):
        find_bids_scans(tmp_path)
    with pytest.raises(InputError, match=r"no participant '10'.*'01'"):
        find_bids_scans(tmp_path, ["10"])


# ----------------------------------------------------------------------------------------------------- names


def test_names_follow_the_standard() -> None:
    scan = parse_name(Path("/d/sub-1/ses-2/anat/sub-1_ses-2_run-3_chunk-4_T1w.nii.gz"), Path("/d"))
    assert scan is not None
    root = Path("/out")
    head, tail = "/out/sub-1/ses-2/anat/sub-1_ses-2_run-3_space-orig_chunk-4", ".nii.gz"

    def path(kind: str, wanted: Wanted, structure: str | None = None) -> str:
        return str(derivative_path(scan, root, wanted, kind, tail, structure))

    assert path("dseg", Wanted()) == f"{head}_desc-T1w_dseg{tail}"
    finer = Wanted(spacing_mm=0.5, scheme="free_surfer")
    assert path("dseg", finer) == f"{head}_seg-freesurfer_res-0p5mm_desc-T1w_dseg{tail}"
    assert path("probseg", finer) == f"{head}_seg-freesurfer_res-0p5mm_desc-T1w_probseg{tail}"
    assert path("mask", finer) == f"{head}_res-0p5mm_label-brain_desc-T1w_mask{tail}"
    assert path("stripped", Wanted()) == f"{head}_desc-stripped_T1w{tail}"
    assert path("mesh", finer, "Left-Thalamus") == f"{head}_label-LeftThalamus_desc-T1w_mesh{tail}"


def test_a_voxel_size_as_a_label() -> None:
    assert resolution_label(1.0) == "1mm"
    assert resolution_label((0.5, 0.5, 0.5)) == "0p5mm"
    assert resolution_label((1.0, 1.0, 2.25)) == "1x1x2p25mm"


# ----------------------------------------------------------------------------------------------------- files


def test_a_derivative_beside_the_dataset(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", ("sub-01/anat/sub-01_T1w", "sub-01/anat/sub-01_FLAIR"))
    before = files(dataset)
    assert segment(dataset) == 0
    root = dataset / "derivatives" / "synthseg"
    stems = [f"sub-01/anat/sub-01_space-orig_desc-{suffix}_dseg" for suffix in ("FLAIR", "T1w")]
    made = [f"{stem}.{suffix}" for stem in stems for suffix in ("json", "nii.gz", "tsv")]
    assert files(root) == sorted([".bidsignore", "README.md", "dataset_description.json", *made])
    assert [name for name in files(dataset) if not name.startswith("derivatives")] == before

    image = nib.load(root / f"{stems[1]}.nii.gz")
    source = nib.load(dataset / "sub-01/anat/sub-01_T1w.nii.gz")
    np.testing.assert_array_equal(image.affine, source.affine)
    labels = np.asarray(image.dataobj)
    with open(root / f"{stems[1]}.tsv", newline="") as file:
        table = {row["name"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert [(row["index"], row["color"], row["mapping"]) for row in table.values()] == [
        *(("0", "#808080", "0"), ("3", "#0ac81e", "3"), ("7", "#fa0080", "8"))
    ]
    bright_ml = (labels == 7).sum() * 1.5 * 1.5 * 2 / 1000
    assert float(table["Bright"]["volume_ml"]) == pytest.approx(bright_ml, abs=5e-4)
    record = json.loads((root / f"{stems[1]}.json").read_text())
    assert record["Sources"] == ["bids:raw:sub-01/anat/sub-01_T1w.nii.gz"]
    assert record["Segmentation"]["sha256"] == "0" * 64
    description = json.loads((root / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert (root / description["DatasetLinks"]["raw"]).resolve() == dataset.resolve()


def test_the_sidecar_says_on_which_grid_volumes_are_counted(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", ("sub-01/anat/sub-01_T1w",))
    assert segment(dataset) == 0
    assert segment(dataset, "--spacing", "2") == 0
    folder = dataset / "derivatives" / "synthseg" / "sub-01" / "anat"
    texts, tables = {}, {}
    for res in ("", "_res-2mm"):
        stem = folder / f"sub-01_space-orig{res}_desc-T1w_dseg"
        texts[res] = json.loads(Path(f"{stem}.json").read_text())
        tables[res] = Path(f"{stem}.tsv").read_text()
    for column in ("volume_ml", "soft_volume_ml"):
        assert "grid" not in texts[""][column]["Description"]
        assert texts["_res-2mm"][column]["Description"].endswith(", on the grid of the scan")
        assert texts["_res-2mm"][column]["Units"] == "mL"
    assert tables["_res-2mm"] == tables[""]


def test_a_second_run_skips_and_a_damaged_sidecar_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(tmp_path, ("sub-01/anat/sub-01_T1w", "sub-02/anat/sub-02_T1w"))
    assert segment(dataset, "--participant", "sub-01") == 0
    root = dataset / "derivatives" / "synthseg"
    assert [name for name in files(root) if "sub-02" in name] == []
    capsys.readouterr()
    assert segment(dataset) == 0
    assert "1 done, 1 skipped" in capsys.readouterr().err
    sidecar = root / "sub-01" / "anat" / "sub-01_space-orig_desc-T1w_dseg.json"
    sidecar.unlink()
    labels = sidecar.with_suffix(".nii.gz")
    before = labels.stat().st_mtime_ns
    assert segment(dataset) == 0
    assert json.loads(sidecar.read_text())["Sources"]
    assert labels.stat().st_mtime_ns == before
    sidecar.write_text('{"cut": ')
    assert segment(dataset) == 1
    assert "not JSON" in capsys.readouterr().err
    assert segment(dataset, "--overwrite") == 0


def test_the_dataset_of_another_program_is_left_alone(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", ("sub-01/anat/sub-01_T1w",))
    other = tmp_path / "fmriprep"
    other.mkdir()
    text = json.dumps({"Name": "x", "DatasetType": "derivative", "GeneratedBy": [{"Name": "fMRIPrep"}]})
    (other / "dataset_description.json").write_text(text)
    with pytest.raises(OutputError, match="by fMRIPrep"):
        check_description(other)
    assert segment(dataset, "-o", other) == 2
    assert segment(dataset, "-o", dataset) == 2  # the raw data
    assert files(other) == ["dataset_description.json"]
    write_description(tmp_path / "mine", dataset)
    check_description(tmp_path / "mine")


@pytest.mark.skipif(VALIDATOR is None, reason="bids-validator-deno is not installed")
def test_the_validator_accepts_the_derivative(tmp_path: Path) -> None:
    dataset = make_dataset(
        tmp_path / "raw",
        (
            *("sub-01/anat/sub-01_T1w", "sub-01/anat/sub-01_FLAIR", "sub-01/ct/sub-01_ct"),
            *("sub-02/ses-a/anat/sub-02_ses-a_run-1_T2w", "sub-02/ses-a/anat/sub-02_ses-a_run-2_chunk-1_T2w"),
        ),
    )
    root = tmp_path / "out"
    wanted = ["--mask", "--posteriors", "--stripped", "--color-tables", "--mesh", "Bright"]
    extras = ["--volumes", root / "volumes.tsv", "--report", root / "report.html", "--overview", root / "look.png"]
    assert segment(dataset, "-o", root, *wanted, *extras) == 0
    assert segment(dataset, "-o", root, "--spacing", "1.5x1x1.5", "--mask", "--posteriors", "--resampled") == 0
    assert len([name for name in files(root) if name.endswith("dseg.nii.gz")]) == 10
    done = subprocess.run([str(VALIDATOR), "--json", str(root)], capture_output=True, text=True, check=False)
    issues = json.loads(done.stdout)["issues"]["issues"]
    errors = [(issue["code"], issue.get("location")) for issue in issues if issue.get("severity") == "error"]
    assert errors == []
    assert {issue["code"] for issue in issues} <= {"TOO_FEW_AUTHORS", "NIFTI_UNIT"}
    assert done.returncode == 0

    (root / "sub-01" / "anat" / "sub-01_desc-T1w_space-orig_dseg.nii.gz").write_bytes(b"x")  # that it sees anything
    again = subprocess.run([str(VALIDATOR), "--json", str(root)], capture_output=True, text=True, check=False)
    assert again.returncode != 0
