"""What heads say of a scan: geometry by networks whose answer is known, and a field that is taken out again."""

from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from synthseg.errors import CheckpointError, InputError
from synthseg.networks.backbone import depth_to_space, space_to_depth
from synthseg.networks.task_heads import CHANNELS
from synthseg.posteriors import scan_grid
from synthseg.representation import tasks
from synthseg.volume import Volume

REST = [(0.0, 0.0)] * (CHANNELS["bias-field"] - 2)  # all tissues alike


class Echo(torch.nn.Module):
    """Features that are the image; its head has ``rows``: for each value a weight of the image, and an offset."""

    def __init__(self, subpixel: int, rows: list[tuple[float, float]]) -> None:
        super().__init__()
        self.config = SimpleNamespace(subpixel=subpixel)
        self.channels = (subpixel**3,)
        self.rows = rows
        cells = subpixel**3
        self.heads = torch.nn.ModuleDict({"only": torch.nn.Conv3d(cells, len(rows) * cells, 1)})

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [space_to_depth(image, self.config.subpixel)]

    def head(self, name: str, features: torch.Tensor) -> torch.Tensor:
        image = depth_to_space(features, self.config.subpixel)
        return torch.cat([weight * image + offset for weight, offset in self.rows], 1)


class EchoModel:
    def __init__(self, task: str, rows: list[tuple[float, float]], subpixel: int = 1, mm: float = 2.0) -> None:
        self.network = Echo(subpixel, rows)
        self.voxel_size_mm = mm
        self.window = (16, 16, 16)
        self.multiple = 4
        self.heads: dict[str, dict[str, Any]] = {"only": {"task": task}}

    def head_for(self, task: str) -> str:
        if self.heads["only"]["task"] != task:
            raise CheckpointError(f"has no head for {task}")
        return "only"


def head_scan(orientation: str = "RAS", log_field: float = 0.0) -> Volume:
    """A ball with a bright rod to the right, front and top, in voxels of three sizes, times a field along y."""
    shape, spacing = (64, 50, 56), (2.0, 2.5, 2.25)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-60, -70, -50]
    x, y, z = np.meshgrid(
        *[(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)], indexing="ij"
    )
    data = np.where(x**2 + y**2 + z**2 < 50**2, 500.0, 0.0)
    data[(x - 20) ** 2 + (y - 15) ** 2 + (z - 10) ** 2 < 14**2] = 1000.0
    data = data * np.exp(log_field * y / 50)
    image = nib.Nifti1Image(data.astype(np.float32), affine)
    turn = ornt_transform(nib.io_orientation(affine), axcodes2ornt(tuple(orientation)))
    turned = image.as_reoriented(turn)
    assert np.allclose(turned.affine, affine @ inv_ornt_aff(turn, shape))
    return Volume(np.asarray(turned.dataobj), turned.affine, turned.header)


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SRA", "PIL"])
@pytest.mark.parametrize("subpixel", [1, 2])
def test_a_t1_lies_on_the_voxels_of_the_scan(orientation: str, subpixel: int) -> None:
    """A network that gives the image back gives the scan back, voxel for voxel, but for two interpolations."""
    scan = head_scan(orientation)
    data, grid = tasks.synthesize_t1(scan, EchoModel("reconstruction", [(1.0, 0.0)], subpixel))
    assert data.shape == scan.data.shape
    assert np.allclose(grid.affine, scan.affine)
    both = np.corrcoef(data.ravel(), scan.data.ravel())[0, 1]
    moved = [np.corrcoef(np.roll(data, 1, axis).ravel(), scan.data.ravel())[0, 1] for axis in range(3)]
    assert both > 0.98
    assert max(moved) < both - 0.01  # one voxel off would be seen
    assert (data.min(), data.max()) == (0.0, pytest.approx(1.0, abs=0.02))


def test_a_t1_can_have_a_voxel_size_of_its_own() -> None:
    scan = head_scan("LAS")
    data, grid = tasks.synthesize_t1(scan, EchoModel("reconstruction", [(1.0, 0.0)]), spacing_mm=3.0)
    assert grid.spacing_mm == pytest.approx((3.0, 3.0, 3.0))
    bright = np.argwhere(data > 0.9 * data.max()).mean(0)
    there = (grid.affine @ [*bright, 1])[:3]
    expected = (scan.affine @ [*np.argwhere(scan.data > 900).mean(0), 1])[:3]
    assert np.abs(there - expected).max() < 1.0


def test_beyond_the_head_there_is_nothing() -> None:
    """The network sees a box around the head; a T1 is 0 outside it, where a field goes on."""
    scan = head_scan()
    wide = np.pad(scan.data, ((30, 0), (0, 0), (0, 30)))
    affine = scan.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ [30, 0, 0]
    data, _ = tasks.synthesize_t1(Volume(wide, affine), EchoModel("reconstruction", [(0.0, 1.0)]))
    assert not data[:10].any()
    assert data[60, 25, 28] == 1
    found = tasks.run_task(Volume(wide, affine), EchoModel("reconstruction", [(0.0, 1.0)]), "reconstruction")
    continued, inside = tasks.on_grid(found.values[0], found.affine, scan_grid(Volume(wide, affine)))
    assert continued.all()
    assert not inside[:10].any()


@pytest.mark.parametrize("orientation", ["RAS", "PIL"])
def test_a_field_is_taken_out_of_the_scan(orientation: str) -> None:
    """The log of the image, averaged over space, is the field where there is one tissue."""
    scan, even = head_scan(orientation, log_field=0.6), head_scan(orientation)
    found = tasks.correct_bias(scan, EchoModel("bias-field", [(0.0, 0.0), (0.0, 1.0), *REST], subpixel=2))
    assert found.data.shape == found.field.shape == scan.data.shape
    np.testing.assert_allclose(found.data * found.field, scan.data, rtol=1e-4)
    tissue = even.data == 500
    before, after = (values[tissue].std() / values[tissue].mean() for values in (scan.data, found.data))
    assert before > 0.15
    assert after < 0.6 * before
    assert found.data[tissue].mean() == pytest.approx(scan.data[tissue].mean(), rel=0.25)
    steps = [np.abs(np.diff(found.field, axis=axis)).max() for axis in range(3)]
    assert max(steps) < 0.1
    assert found.field.min() > 0


def test_no_field_leaves_a_scan_as_it_is() -> None:
    scan = head_scan()
    found = tasks.correct_bias(scan, EchoModel("bias-field", [(0.0, 0.0), (0.0, 0.0), *REST]))
    assert np.array_equal(found.data, scan.data)
    assert (found.field == 1).all()


def test_a_ct_has_no_bias_field() -> None:
    rng = np.random.default_rng(0)
    scan = head_scan()
    hounsfield = np.where(scan.data > 0, rng.normal(40, 60, scan.data.shape), rng.normal(-1000, 20, scan.data.shape))
    with pytest.raises(InputError, match="CT scan"):
        tasks.correct_bias(Volume(hounsfield, scan.affine), EchoModel("bias-field", [(0.0, 0.0), (0.0, 1.0), *REST]))


@pytest.mark.parametrize(("fill", "noise"), [(1024.0, 0.0), (-3024.0, 20.0)])
def test_a_ct_is_known_by_its_head_not_by_its_fill(fill: float, noise: float) -> None:
    """Corners beyond the scanner's circle hold a value of their own."""
    rng, scan = np.random.default_rng(0), head_scan()
    data = np.where(scan.data > 0, rng.normal(40, 60, scan.data.shape), rng.normal(-1000, noise + 9, scan.data.shape))
    x, y, _ = np.indices(data.shape)
    data[(x - 31.5) ** 2 / 31**2 + (y - 24.5) ** 2 / 24**2 > 1] = fill
    with pytest.raises(InputError, match="CT scan"):
        tasks.correct_bias(Volume(data, scan.affine), EchoModel("bias-field", [(0.0, 0.0), (0.0, 1.0), *REST]))


@pytest.mark.parametrize("stripped", [False, True])
def test_standardised_intensities_are_refused(stripped: bool) -> None:
    """A field multiplied what was measured; less a mean it is no product any more."""
    scan = head_scan(log_field=0.4)
    inside = scan.data > 0 if stripped else np.ones(scan.data.shape, dtype=bool)
    values = (scan.data - scan.data[inside].mean()) / scan.data[inside].std()
    standardised = Volume(np.where(inside, values, 0).astype(np.float32), scan.affine)
    with pytest.raises(InputError, match="their zero has been moved"):
        tasks.correct_bias(standardised, EchoModel("bias-field", [(0.0, 0.0), (0.0, 1.0), *REST]))


def test_a_little_below_zero_is_noise() -> None:
    scan = head_scan(log_field=0.4)
    noise = np.random.default_rng(0).normal(0, 4, scan.data.shape).astype(np.float32)
    model = EchoModel("bias-field", [(0.0, 0.0), (0.0, 1.0), *REST])
    clean = tasks.correct_bias(scan, model).field
    noisy = tasks.correct_bias(Volume(scan.data + noise, scan.affine), model).field
    assert np.abs(noisy - clean)[scan.data > 0].max() < 0.05


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "<u2", "<f8"])
def test_any_type_of_number_is_corrected_alike(dtype: str) -> None:
    scan = head_scan(log_field=0.4)
    model = EchoModel("bias-field", [(0.0, 0.0), (0.0, 1.0), *REST])
    whole = np.rint(scan.data / 8)
    expected = tasks.correct_bias(Volume(whole.astype(np.float32), scan.affine), model)
    found = tasks.correct_bias(Volume(whole.astype(dtype), scan.affine), model)
    assert np.array_equal(found.data, expected.data)
    assert found.data.dtype == np.float32


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 2), (20, 20, 1), (1, 20, 24)])
def test_scans_of_a_few_voxels_keep_their_grid(shape: tuple[int, int, int]) -> None:
    data = np.random.default_rng(0).uniform(1, 5, shape).astype(np.float32)
    scan = Volume(data, np.diag([-2.0, 2.0, -5.0, 1.0]))
    found = tasks.correct_bias(scan, EchoModel("bias-field", [(0.0, 0.0), (0.0, 1.0), *REST], subpixel=2))
    assert found.data.shape == shape
    assert np.isfinite(found.field).all()
    t1, _ = tasks.synthesize_t1(scan, EchoModel("reconstruction", [(1.0, 0.0)], subpixel=2))
    assert t1.shape == shape
    assert np.isfinite(tasks.super_resolve(scan, EchoModel("super-resolution", [(0.0, 0.1)] * 5)).data).all()


@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_a_t1_lies_on_an_oblique_or_sheared_scan(tilt: float) -> None:
    """Turned by 20 degrees, and with the slices of a tilted gantry, in a field of view much wider than the head."""
    scan = head_scan("PIL")
    wide = np.pad(scan.data, ((0, 0), (25, 0), (0, 20)))
    c, s = np.cos(np.radians(20)), np.sin(np.radians(20))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]]) @ np.array([[1, 0, 0], [0, 1, tilt], [0, 0, 1.0]])
    affine = scan.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ [0, 25, 0]
    affine[:3] = turn @ affine[:3]
    data, grid = tasks.synthesize_t1(Volume(wide, affine), EchoModel("reconstruction", [(1.0, 0.0)], 2))
    assert np.allclose(grid.affine, affine)
    both = np.corrcoef(data.ravel(), wide.ravel())[0, 1]
    moved = [
        np.corrcoef(np.roll(data, step, axis).ravel(), wide.ravel())[0, 1] for axis in range(3) for step in (1, -1)
    ]
    assert both > 0.98
    assert max(moved) < both - 0.01


def test_a_sharper_image_is_on_the_grid_of_the_network() -> None:
    scan = head_scan("PIL")
    found = tasks.super_resolve(scan, EchoModel("super-resolution", [(0.0, 0.0)] * 5, subpixel=2))
    assert found.spacing_mm == pytest.approx((2.0, 2.0, 2.0))
    assert found.axcodes == ("R", "A", "S")
    bright = np.argwhere(found.data > 0.95).mean(0)
    expected = (scan.affine @ [*np.argwhere(scan.data > 900).mean(0), 1])[:3]
    assert np.abs((found.affine @ [*bright, 1])[:3] - expected).max() < 0.5


def test_a_model_without_the_head_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no head for bias-field"):
        tasks.correct_bias(head_scan(), EchoModel("reconstruction", [(1.0, 0.0)]))
    with pytest.raises(CheckpointError, match="has 3 channels, expected 1"):
        tasks.synthesize_t1(head_scan(), EchoModel("reconstruction", [(1.0, 0.0)] * 3))
