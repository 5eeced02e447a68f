"""`synthseg.segment`: every kind of image gives what the file gives, and bad arguments end in errors that say so."""

import inspect
import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import synthseg
from synthseg import api
from synthseg.api import as_volume, segment
from synthseg.errors import CheckpointError, ConfigError, DeviceError, InputError, LabelError, SynthSegError
from synthseg.labels import load_scheme
from synthseg.networks.checkpoint import Model
from synthseg.volume import Volume, load_volume

SHAPE = (15, 12, 18)


class Bands(torch.nn.Module):
    """Classes by intensity."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.n_classes = n_classes

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        centres = torch.linspace(0, 1, self.n_classes).reshape(1, -1, 1, 1, 1)
        return -200 * (image - centres) ** 2


def stand_in(scheme: str = "siam16") -> Model:
    table = load_scheme(scheme)
    return Model(Bands(len(table)), table, 2.0, (16, 16, 16), 8, "bands", "0" * 64)  # type: ignore[arg-type]


@dataclass
class Scan:
    path: Path
    data: np.ndarray
    affine: np.ndarray
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0))


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    """An oblique scan whose axes run neither right, anterior nor superior, and its segmentation from the file."""
    affine = np.eye(4)
    turned = Rotation.from_euler("xyz", (12, -7, 20), degrees=True).as_matrix()
    affine[:3, :3] = turned @ np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]]) @ np.diag([1.8, 2.3, 2.0])
    affine[:3, 3] = 20, -35, 60
    data = np.random.default_rng(0).integers(0, 1000, SHAPE).astype(np.int16)
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    nib.save(nib.Nifti1Image(data, affine), path)
    labels = segment(path, model=stand_in(), device="cpu", quality=False).labels
    assert len(np.unique(labels)) > 8
    return Scan(path, data, nib.load(path).affine, labels)


def check(image: Any, scan: Scan, affine_tolerance_mm: float = 1e-4) -> None:
    result = segment(image, model=stand_in(), device="cpu", quality=False)
    np.testing.assert_allclose(result.affine, scan.affine, atol=affine_tolerance_mm)
    np.testing.assert_array_equal(result.labels, scan.labels)
    assert result.warnings == []


# ------------------------------------------------------------------------------------------------- images


def test_paths_volumes_nibabel_images_and_arrays(scan: Scan) -> None:
    check(str(scan.path), scan)
    check(load_volume(scan.path), scan)
    check(nib.load(scan.path), scan)
    check(nib.Nifti1Image(scan.data, scan.affine), scan)
    check(nib.MGHImage(scan.data, scan.affine), scan)
    check((scan.data, scan.affine), scan)
    check((scan.data.astype(np.float64), scan.affine.tolist()), scan)
    check((torch.from_numpy(scan.data), torch.from_numpy(scan.affine)), scan)
    check((np.asfortranarray(scan.data)[:, :, :, None], scan.affine), scan)


def test_simpleitk_images_lie_where_their_file_does(scan: Scan) -> None:
    """ITK turns the file's RAS+ positions to LPS+ itself when it reads."""
    sitk = pytest.importorskip("SimpleITK")
    check(sitk.ReadImage(str(scan.path)), scan, 1e-3)


def test_a_simpleitk_image_by_hand() -> None:
    """Left of the patient is +x in ITK: the affine to RAS+ begins with minus the spacing."""
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(np.arange(24, dtype=np.float32).reshape(2, 3, 4))  # z, y, x
    image.SetSpacing((1.0, 2.0, 3.0))
    image.SetOrigin((10.0, 20.0, 30.0))
    volume = as_volume(image)
    assert volume.data.shape == (4, 3, 2)
    assert volume.data[1, 2, 0] == 9
    np.testing.assert_allclose(volume.affine, [[-1, 0, 0, -10], [0, -2, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]])


def test_torchio_images(scan: Scan) -> None:
    torchio = pytest.importorskip("torchio")
    check(torchio.ScalarImage(scan.path), scan)
    check(torchio.ScalarImage(tensor=scan.data[None].astype(np.float32), affine=scan.affine), scan)
    with pytest.raises(InputError, match="2 channels"):
        segment(torchio.ScalarImage(tensor=torch.rand(2, 5, 6, 7)), model=stand_in())


def test_the_image_is_not_modified(scan: Scan) -> None:
    data, affine = scan.data.astype(np.float32), scan.affine.copy()
    data[0, 0, 0] = np.nan
    before = data.copy()
    segment((data, affine), model=stand_in(), device="cpu")
    np.testing.assert_array_equal(data, before)
    np.testing.assert_array_equal(affine, scan.affine)


def test_labels_go_back_into_the_image_of_another_library(scan: Scan) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.ReadImage(str(scan.path))
    labels = sitk.GetImageFromArray(np.ascontiguousarray(scan.labels.transpose(2, 1, 0)))
    labels.CopyInformation(image)
    ids = np.unique(scan.labels)
    label_id = int(ids[len(ids) // 2])
    index = tuple(int(i) for i in np.argwhere(scan.labels == label_id)[0])
    assert labels.GetPixel(index) == label_id
    lps_mm = np.array(labels.TransformIndexToPhysicalPoint(index))
    np.testing.assert_allclose(lps_mm * [-1, -1, 1], nib.affines.apply_affine(scan.affine, index), atol=1e-3)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.mgz"])
def test_a_nibabel_image_of_a_damaged_file_is_refused(scan: Scan, tmp_path: Path, name: str) -> None:
    """The checksum of a compressed file lies behind its last voxel, where nibabel does not read."""
    kind = nib.MGHImage if name.endswith("mgz") else nib.Nifti1Image
    nib.save(kind(scan.data, scan.affine), tmp_path / name)
    check(nib.load(tmp_path / name), scan)
    content = bytearray((tmp_path / name).read_bytes())
    content[-8] ^= 1
    (tmp_path / name).write_bytes(content[:-500] if name == "a.nii" else content)
    with pytest.raises(InputError, match=f"{name}: cannot be read"):
        segment(nib.load(tmp_path / name), model=stand_in(), device="cpu")


def test_a_bfloat16_tensor_is_an_image(scan: Scan) -> None:
    tensor = torch.from_numpy(scan.data).bfloat16()
    np.testing.assert_array_equal(as_volume((tensor, scan.affine)).data, tensor.float().numpy())


AFFINE = np.eye(4)
CONTENT = np.arange(60.0).reshape(3, 4, 5)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.nii.gz", "no such file"),
        (CONTENT, r"numpy.ndarray .* \(array, affine\)"),
        (None, "NoneType"),
        ((CONTENT, np.eye(3)), r"shape \(3, 3\); expected a 4 x 4"),
        ((CONTENT, np.full((4, 4), np.nan)), "not finite"),
        ((CONTENT, np.zeros((4, 4))), "singular"),
        ((CONTENT, "eye"), "no matrix"),
        ((CONTENT[0], AFFINE), "is 2-D"),
        ((np.stack([CONTENT, CONTENT], 3), AFFINE), "holds 2 volumes"),
        ((CONTENT * 0, AFFINE), "every voxel is 0"),
        ((CONTENT * np.nan, AFFINE), "no finite voxel"),
        ((CONTENT + 1j, AFFINE), "complex"),
        ((CONTENT.astype(str), AFFINE), "expected numbers"),
        (([[[1, 2], [3]]], AFFINE), "the array: .* expected a 3-D array"),
        ((torch.ones(3, 4, 5).to_sparse(), AFFINE), "the array: .* expected a 3-D array"),
        ((CONTENT[:0], AFFINE), "empty dimension"),
        ((CONTENT, AFFINE * 1000), "correct the voxel size"),
        (Volume(np.full((3, 4, 5), np.inf), AFFINE), "the volume: holds no finite voxel"),
    ],
)
def test_what_is_no_scan_is_refused(image: Any, message: str) -> None:
    with np.errstate(all="ignore"), pytest.raises(InputError, match=message):
        segment(image, model=stand_in(), device="cpu")


# ----------------------------------------------------------------------------------------------- arguments


def test_arguments_reach_the_segmentation(scan: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(volume: Volume, model: object, device: torch.device, options: Any) -> Any:
        asked.append((options, device, torch.get_num_threads()))
        raise InputError("enough")

    before = torch.get_num_threads()
    monkeypatch.setattr(api, "segment_volume", fake)
    with pytest.raises(InputError, match="enough"):
        segment(
            scan.path, model=stand_in(), device=torch.device("cpu"), mode="robust", voxel_size_mm="0.75",  # type: ignore[arg-type]
            crop_mm=150, threads=before + 1, keep_posteriors=True, quality=False,
        )  # fmt: skip
    ((options, device, threads),) = asked
    assert (options.mode, options.voxel_size_mm, options.crop_mm) == ("robust", 0.75, (150.0, 150.0, 150.0))
    assert (options.keep_posteriors, options.quality) == (True, False)
    assert (device.type, threads) == ("cpu", before + 1)
    assert torch.get_num_threads() == before  # also after an error


def test_a_scheme_renames_the_labels(scan: Scan) -> None:
    fine = stand_in("head45")
    result = segment(scan.path, model=fine, device="cpu", scheme="siam16")
    assert result.table.name == "siam16"
    assert set(result.hard_ml) == set(load_scheme("siam16").names)
    assert set(np.unique(result.labels)) <= set(range(17))
    assert result.posteriors is None
    kept = segment(scan.path, model=fine, device="cpu", scheme="siam16", keep_posteriors=True)
    assert kept.posteriors is not None
    assert kept.posteriors.table.name == "siam16"
    with pytest.raises(LabelError):
        segment(scan.path, model=stand_in(), device="cpu", scheme="head45")


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"mode": "slow"}, ConfigError, "slow"),
        ({"voxel_size_mm": -1}, ConfigError, "voxel size"),
        ({"voxel_size_mm": "small"}, ConfigError, "voxel_size_mm='small'"),
        ({"voxel_size_mm": (1, 1, 2)}, ConfigError, r"voxel_size_mm=\(1, 1, 2\)"),
        ({"crop_mm": (100, 100)}, ConfigError, "one side"),
        ({"crop_mm": "abc"}, ConfigError, "crop_mm .* got 'abc'"),
        ({"crop_mm": [100, [100, 90]]}, ConfigError, "crop_mm"),
        ({"threads": 0}, ConfigError, "threads"),
        ({"threads": "2"}, ConfigError, "threads='2'"),
        ({"scheme": "sima16"}, LabelError, "siam16"),
        ({"scheme": 5}, LabelError, "scheme=5"),
        ({"device": "gpu"}, DeviceError, "gpu"),
        ({"device": torch.device("cuda", 99)}, DeviceError, "cuda:99"),
        ({"model": "no_such_model"}, CheckpointError, "no_such_model"),
    ],
)
def test_wrong_arguments_are_refused(
    scan: Scan, wrong: dict[str, Any], kind: type[SynthSegError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        segment(scan.path, **{"model": stand_in(), "device": "cpu", **wrong})


def test_weights_are_read_once_and_again_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def load(path: Path, device: str) -> Model:
        read.append((path, device))
        return stand_in()

    monkeypatch.setattr(api, "load_model", load)
    weights = tmp_path / "m.safetensors"
    weights.write_bytes(b"one")
    image = (np.random.default_rng(0).normal(size=SHAPE), AFFINE)
    for _ in range(2):
        segment(image, model=weights, device="cpu", quality=False)
    assert read == [(weights.resolve(), "cpu")]
    weights.write_bytes(b"other")
    segment(image, model=weights, device="cpu", quality=False)
    assert len(read) == 2


# ------------------------------------------------------------------------------------------------- package


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, synthseg; synthseg.__version__; assert 'torch' not in sys.modules; synthseg.segment"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' in sys.modules"], check=True)


def test_the_public_names_are_there() -> None:
    assert synthseg.segment is segment
    assert synthseg.Volume is Volume
    for name in synthseg.__all__:
        assert getattr(synthseg, name) is not None
        assert name in dir(synthseg)
    stub = (Path(synthseg.__file__).parent / "__init__.pyi").read_text()
    typed = re.findall(r"^from (\S+) import \w+ as (\w+)$", stub, re.MULTILINE)
    assert {name: home for home, name in typed} == synthseg._HOME
    with pytest.raises(AttributeError, match="segmnt"):
        synthseg.segmnt  # noqa: B018


PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"


def test_the_examples_of_the_guide_run(scan: Scan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, in one session, with a stand-in for the network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t1.nii.gz").write_bytes(scan.path.read_bytes())
    monkeypatch.setattr(api, "_loaded", lambda model, device: stand_in())
    monkeypatch.setattr("synthseg.networks.checkpoint.load_model", lambda name: stand_in())
    session: dict[str, Any] = {}
    examples = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) >= 7
    for example in examples:
        needed = re.findall(r"^import (SimpleITK|torchio)", example, re.MULTILINE)  # not everyone has them
        if all(find_spec(name) for name in needed):
            exec(compile(example, str(PAGE), "exec"), session)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.nii.gz", "labels_2mm.nii.gz", "t1.nii.gz"]
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "labels.nii.gz").dataobj), scan.labels)
    hippocampus = session["result"].soft_ml["Hippocampus"]
    assert session["sum_ml"] == pytest.approx(hippocampus, rel=1e-4)


def test_the_guide_lists_every_argument() -> None:
    table = PAGE.read_text().split("## Arguments")[1].split("### Modes")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert listed == [name for name in inspect.signature(segment).parameters if name != "image"]
