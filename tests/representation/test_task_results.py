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
