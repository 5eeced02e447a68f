"""The command `priors estimate`: what it writes, and what it refuses before it writes."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from synthseg.cli import run

SHAPE = (24, 22, 20)


def write(path: Path, data: np.ndarray, shift: float = 0.0) -> Path:
    affine = np.diag([-2.0, 2.0, 2.0, 1.0])
    affine[0, 3] = shift
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def head_map() -> np.ndarray:
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    data = np.zeros(SHAPE, np.int16)
    for limit, label in ((0.95, 511), (0.8, 24), (0.65, 3), (0.45, 2)):
        data[radius < limit] = label
    return data


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    source = np.random.default_rng(0)
    ids = head_map()
    for number in range(2):
        image = np.vectorize({0: 0, 511: 80, 24: 20, 3: 50 + 5 * number, 2: 90}.get)(ids) + source.normal(0, 2, SHAPE)
        write(tmp_path / "scans" / f"s{number}.nii.gz", image.astype(np.float32))
        write(tmp_path / "maps" / f"s{number}_seg.nii.gz", ids)
    return tmp_path / "scans", tmp_path / "maps"


def arguments(images: Path, labels: Path, out: Path, scheme: str = "head") -> list[str]:
    return [
        *("priors", "estimate", "--images", str(images), "--labels", str(labels)),
        *("--scheme", scheme, "-o", str(out)),
    ]


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, lines
    return lines[0]


def test_priors_are_written_and_used(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "priors.yaml"
    assert run(arguments(*folders, out)) == 0
    record = yaml.safe_load(out.read_text())
    assert record["images"] == ["s0.nii.gz", "s1.nii.gz"]
    assert set(record["tissues"]) == {"air", "skin", "csf", "gm", "wm"}
    low, high = record["tissues"]["gm"]["mean"]
    assert 0.4 < low < high < 0.8
    assert [p.name for p in out.parent.iterdir()] == ["priors.yaml"]  # no temporary file is left
    settings = [
        *("shape=[16, 16, 16]", "voxel_size_mm=8.0", "subsamples=1", f"contrast.priors={out}"),
        *("contrast.priors_weight=1", "contrast.random_weight=0", "contrast.named_weights={}"),
    ]
    flags = [word for setting in settings for word in ("--set", setting)]
    assert run(["generate", "-o", str(tmp_path / "samples"), *flags]) == 0
    assert '"name": "priors"' in (tmp_path / "samples" / "0000_plan.json").read_text()


def test_maps_beside_the_scans_are_not_measured_as_scans(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, maps = folders
    assert run(arguments(scans, maps, tmp_path / "apart.yaml")) == 0
    for file in sorted(maps.iterdir()):
        file.rename(scans / file.name)
    assert run(arguments(scans, scans, tmp_path / "together.yaml")) == 0
    assert (tmp_path / "together.yaml").read_text() == (tmp_path / "apart.yaml").read_text()
    for number in range(2):
        (scans / f"s{number}.nii.gz").rename(maps / f"s{number}.nii.gz")
    capsys.readouterr()
    assert run(arguments(scans, scans, tmp_path / "none.yaml")) == 2
    assert "only label maps" in one_error(capsys)
    assert run(arguments(maps, maps, tmp_path / "none.yaml")) == 2
    assert "no label maps" in one_error(capsys)
    assert not (tmp_path / "none.yaml").exists()


def test_an_existing_file_is_kept_unless_told(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "priors.yaml"
    out.write_text("mine")
    assert run(arguments(*folders, out)) == 2
    assert "--overwrite" in one_error(capsys)
    assert out.read_text() == "mine"
    assert run([*arguments(*folders, out), "--overwrite"]) == 0
    assert out.read_text() != "mine"


@pytest.mark.parametrize("kind", ["grid", "place", "ids", "empty", "unpaired", "missing", "scheme"])
def test_bad_input_is_one_line_and_nothing_is_written(
    kind: str, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, maps = folders
    last, scheme = maps / "s1_seg.nii.gz", "head"
    ids = head_map()
    if kind == "grid":
        write(last, ids[:-1])
    elif kind == "place":
        write(last, ids, shift=10.0)
    elif kind == "ids":
        write(last, np.where(ids == 24, 7777, ids).astype(np.int32))
    elif kind == "empty":
        write(last, np.zeros_like(ids))
    elif kind == "unpaired":
        last.rename(maps / "other.nii.gz")
    elif kind == "missing":
        scans = tmp_path / "nowhere"
    else:
        scheme = "haed"
    out = tmp_path / "priors.yaml"
    assert run(arguments(scans, maps, out, scheme)) == 2
    message = one_error(capsys)
    expected = {
        **{"grid": "s1.nii.gz", "place": "s1.nii.gz", "ids": "7777", "empty": "s1_seg", "unpaired": "s1_seg"},
        **{"missing": "nowhere", "scheme": "did you mean 'head'"},
    }
    assert expected[kind] in message
    assert not out.exists()
    assert not list(tmp_path.glob(".synthseg*"))


def test_a_place_that_cannot_be_written_is_found_before_the_work(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run(arguments(*folders, blocked / "priors.yaml")) == 2
    assert "not a folder" in one_error(capsys)


@pytest.mark.shared
def test_a_real_t1_has_the_order_of_a_t1(shared_dir: Path, tmp_path: Path) -> None:
    scheme = tmp_path / "mcx.json"
    tissues = ("air", "soft", "bone_cortical", "csf", "gm", "wm", "air")
    labels = ", ".join(f'{{"id": {i}, "name": "{t}{i}", "tissue": "{t}"}}' for i, t in enumerate(tissues))
    scheme.write_text(f'{{"name": "mcx", "labels": [{labels}]}}')
    scans, out = shared_dir / "scans", tmp_path / "priors.yaml"
    assert run(arguments(scans / "colin27_t1.nii.gz", scans / "colin27_tissues.nii.gz", out, str(scheme))) == 0
    middle = {t: sum(r["mean"]) / 2 for t, r in yaml.safe_load(out.read_text())["tissues"].items()}
    assert middle["wm"] > middle["gm"] > middle["csf"] > middle["bone_cortical"] > middle["air"]
