"""Grids of a scan, and probabilities on them: checked against nibabel's resampling and by hand."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.processing import resample_from_to
from scipy.spatial.transform import Rotation

from synthseg import posteriors
from synthseg.errors import InputError, LabelError
from synthseg.labels import Label, LabelTable
from synthseg.posteriors import Grid, Posteriors, scan_grid, spacing_grid
from synthseg.volume import Volume, canonical

FINE = LabelTable(
    "fine",
    (
        Label(0, "Air", tissue="air", to={"coarse": (0,)}),
        Label(2, "Left", partner=3, to={"coarse": (9,)}),
        Label(3, "Right", partner=2, to={"coarse": (9,)}),
        Label(300, "Rest", to={"coarse": (1,)}),
    ),
)
COARSE = LabelTable("coarse", (Label(0, "Air", tissue="air"), Label(9, "Both"), Label(1, "Rest")))
SHAPE, SPACING_MM = (11, 13, 9), (2.9, 2.1, 3.3)


def scan(seed: int = 0, shape: tuple[int, ...] = SHAPE, spacing_mm: tuple[float, ...] = SPACING_MM) -> Volume:
    """A scan with an oblique affine and axes in any order and direction."""
    rng = np.random.default_rng(seed)
    turned = Rotation.from_euler("xyz", rng.uniform(-30, 30, 3), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turned @ np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3) @ np.diag(spacing_mm)
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return Volume(np.zeros(shape, np.float32), affine)


def random_posteriors(volume: Volume, voxel_size_mm: float = 3.0, sharp: float = 3.0) -> Posteriors:
    ras = canonical(volume)
    sides = [int(np.ceil(extent / voxel_size_mm - 1e-3)) for extent in ras.extent_mm]
    logits = sharp * torch.randn(len(FINE), *sides, generator=torch.manual_seed(1))
    return Posteriors.covering(logits.softmax(0).half(), FINE, ras, voxel_size_mm)


def whole(posterior: Posteriors, grid: Grid) -> np.ndarray:
    """All slabs put together; they must follow one another without a gap."""
    parts = list(posterior.slabs(grid))
    assert [part.start for part, _ in parts] == [0, *(part.stop for part, _ in parts[:-1])]
    assert all(values.dtype == np.float32 for _, values in parts)
    return np.concatenate([values for _, values in parts], axis=1)


def by_nibabel(posterior: Posteriors, grid: Grid) -> np.ndarray:
    return np.stack(
        [
            resample_from_to(
                nib.Nifti1Image(one.float().numpy(), posterior.affine), (grid.shape, grid.affine), 1, mode="nearest"
            ).get_fdata()
            for one in posterior.values
        ]
    )


# -------------------------------------------------------------------------------------------------- grids


def test_a_scans_own_grid() -> None:
    volume = scan()
    grid = scan_grid(volume)
    assert grid.shape == SHAPE
    np.testing.assert_array_equal(grid.affine, volume.affine)
    assert grid.voxel_ml == pytest.approx(2.9 * 2.1 * 3.3 / 1000)
    assert grid.spacing_mm == pytest.approx(SPACING_MM)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing_mm", [1.0, (0.8, 3.5, 2.0), [100.0]])
def test_another_voxel_size_keeps_axes_centre_and_field_of_view(seed: int, spacing_mm: object) -> None:
    volume = scan(seed)
    grid = spacing_grid(volume, spacing_mm)  # type: ignore[arg-type]
    steps = np.broadcast_to(spacing_mm, 3)
    np.testing.assert_allclose(grid.spacing_mm, steps)
    cosines = grid.affine[:3, :3] / grid.spacing_mm
    np.testing.assert_allclose(cosines, volume.affine[:3, :3] / volume.spacing_mm, atol=1e-12)
    middles = [a[:3, :3] @ (np.array(n) - 1) / 2 + a[:3, 3] for n, a in ((grid.shape, grid.affine),)]
    np.testing.assert_allclose(middles[0], volume.affine[:3, :3] @ (np.array(SHAPE) - 1) / 2 + volume.affine[:3, 3])
    extent = np.array(grid.shape) * steps
    assert (extent >= np.array(volume.extent_mm) - 1e-2).all()
    assert (extent < np.array(volume.extent_mm) + steps).all()


@pytest.mark.parametrize("spacing_mm", [0.0, -1.0, float("nan"), (1.0, 2.0), (1.0, 0.0, 1.0)])
def test_impossible_voxel_sizes_are_refused(spacing_mm: object) -> None:
    with pytest.raises(InputError, match="voxel size"):
        spacing_grid(scan(), spacing_mm)  # type: ignore[arg-type]


def test_a_grid_along_other_axes_is_refused() -> None:
    posterior, grid = random_posteriors(scan()), scan_grid(scan())
    turned = grid.affine.copy()
    turned[:3, :3] = Rotation.from_euler("z", 5, degrees=True).as_matrix() @ turned[:3, :3]
    with pytest.raises(InputError, match="axes"):
        posterior.labels_on(Grid(grid.shape, turned))


# ---------------------------------------------------------------------------------------------- resampling


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing_mm", [SPACING_MM, 0.9, (0.7, 1.5, 2.9)])
def test_probabilities_agree_with_nibabel_on_finer_grids(seed: int, spacing_mm: object) -> None:
    volume = scan(seed)
    posterior = random_posteriors(volume, voxel_size_mm=3.4)  # coarser than all of these: linear interpolation
    grid = spacing_grid(volume, spacing_mm)  # type: ignore[arg-type]
    np.testing.assert_allclose(whole(posterior, grid), by_nibabel(posterior, grid), atol=2e-6)


def test_on_a_coarser_grid_probabilities_are_averaged() -> None:
    """Three voxels of 1 mm side by side to one of 3 mm: the mean under a triangle of half-width 3 mm, by hand."""
    values = torch.zeros(len(FINE), 3, 1, 1)
    values[1, 0], values[2, 1], values[3, 2] = 1, 1, 1
    posterior = Posteriors.covering(values.half(), FINE, Volume(np.zeros((3, 1, 1)), np.eye(4)), 1.0)
    volume = Volume(np.zeros((1, 1, 1), np.float32), np.diag([3.0, 1.0, 1.0, 1.0]) + np.eye(4, k=3)[:, :4] * 1.0)
    found = whole(posterior, scan_grid(volume))[:, 0, 0, 0]
    np.testing.assert_allclose(found, np.array([0, 2, 3, 2]) / 7, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_labels_are_those_of_the_largest_probability(seed: int) -> None:
    volume = scan(seed)
    posterior = random_posteriors(volume)
    for grid in (scan_grid(volume), spacing_grid(volume, 1.1), spacing_grid(volume, (5.0, 2.0, 4.0))):
        result = posterior.labels_on(grid)
        probabilities = whole(posterior, grid)
        ordered = np.sort(probabilities, axis=0)
        clear = ordered[-1] - ordered[-2] > 1e-4
        assert result.labels.shape == grid.shape
        assert result.labels.dtype == np.int16  # an id is above 255
        np.testing.assert_array_equal(result.labels[clear], FINE.ids[probabilities.argmax(0)][clear])
        np.testing.assert_array_equal(result.hard_voxels, [(result.labels == i).sum() for i in FINE.ids])
        np.testing.assert_allclose(result.soft_voxels, probabilities.sum((1, 2, 3), dtype=np.float64), rtol=1e-4)
        indices = posterior.indices_on(grid)
        assert indices.labels.dtype == np.uint8
        np.testing.assert_array_equal(FINE.ids[indices.labels], result.labels)


def test_leaving_out_classes_that_cannot_win_changes_nothing() -> None:
    """Half of the volume holds two classes only; there the others are not interpolated."""
    volume = scan(2, (24, 26, 22))
    posterior = random_posteriors(volume, voxel_size_mm=3.0, sharp=2.0)
    half = posterior.values.shape[1] // 2
    posterior.values[2:, :half] *= 0.01
    grid = spacing_grid(volume, 1.7)
    probabilities = by_nibabel(posterior, grid)
    ordered = np.sort(probabilities, axis=0)
    clear = ordered[-1] - ordered[-2] > 1e-4
    found = posterior.labels_on(grid).labels
    np.testing.assert_array_equal(found[clear], FINE.ids[probabilities.argmax(0)][clear])
    assert clear.mean() > 0.99


def test_the_order_of_the_axes_changes_nothing_to_the_bit() -> None:
    """A tie must fall to the same side in all 48 voxel orders."""
    base = Volume(np.zeros(SHAPE, np.float32), np.diag([2.9, 2.1, 3.3, 1.0]))
    sides = [int(np.ceil(extent / 2.0)) for extent in base.extent_mm]
    ties = torch.randint(0, 3, (len(FINE), *sides), generator=torch.manual_seed(0)).half() / 4
    posterior = Posteriors.covering(ties, FINE, base, 2.0)
    reference = posterior.labels_on(scan_grid(base)).labels
    image = nib.Nifti1Image(np.zeros(SHAPE, np.int16), base.affine)
    for order, flips in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        turned = image.as_reoriented(np.stack([order, flips], 1))
        labels = posterior.labels_on(scan_grid(Volume(np.asarray(turned.dataobj), turned.affine))).labels
        back = nib.as_closest_canonical(nib.Nifti1Image(np.ascontiguousarray(labels), turned.affine))
        np.testing.assert_array_equal(np.asarray(back.dataobj), reference)


def test_slabs_are_bounded_and_their_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = scan(5)
    posterior, grid = random_posteriors(volume), spacing_grid(scan(5), 1.3)
    expected = whole(posterior, grid)
    row = 4 * len(FINE) * grid.shape[1] * grid.shape[2]
    for rows in (1, 3, 7):
        monkeypatch.setattr(posteriors, "SLAB_BYTES", rows * row)
        parts = list(posterior.slabs(grid))
        assert max(values.shape[1] for _, values in parts) == rows
        assert all(values.shape[1] == part.stop - part.start for part, values in parts)
        np.testing.assert_allclose(np.concatenate([values for _, values in parts], 1), expected, atol=1e-6)


def test_beyond_the_analysed_box_is_background() -> None:
    volume = Volume(np.zeros((20, 8, 6), np.float32), np.diag([-2.0, 2.0, 2.0, 1.0]))
    ras = canonical(volume)
    middle = Volume(ras.data[5:14], ras.affine @ nib.affines.from_matvec(np.eye(3), [5, 0, 0]))
    values = torch.zeros(len(FINE), 9, 8, 6)
    values[3] = 1
    posterior = Posteriors.covering(values.half(), FINE, middle, 2.0)
    result = posterior.labels_on(scan_grid(volume))
    expected = np.zeros((20, 8, 6))
    expected[6:15] = 300  # 5 to 13 from the left, counted from the other end
    np.testing.assert_array_equal(result.labels, expected)
    assert result.hard_voxels.tolist() == [11 * 48, 0, 0, 9 * 48]
    assert result.soft_voxels.tolist() == [11 * 48, 0, 0, 9 * 48]
    probabilities = whole(posterior, scan_grid(volume))
    np.testing.assert_array_equal(probabilities[3], expected / 300)
    np.testing.assert_array_equal(probabilities[0], 1 - expected / 300)
    far = Grid((3, 4, 5), np.diag([2.0, 2.0, 2.0, 1.0]) + np.eye(4, k=3)[:, :4] * 1000)
    assert not posterior.labels_on(far).labels.any()
    assert (whole(posterior, far)[0] == 1).all()


# ------------------------------------------------------------------------------------------------- schemes


def test_classes_of_a_coarser_scheme_are_sums() -> None:
    posterior = random_posteriors(scan())
    merged = posterior.merged(COARSE)
    values = posterior.values.float()
    expected = torch.stack([values[0], values[1] + values[2], values[3]])
    torch.testing.assert_close(merged.values.float(), expected, atol=1e-3, rtol=1e-3)
    assert merged.table is COARSE
    assert merged.values.dtype == torch.float16
    assert posterior.merged(FINE) is posterior


def test_two_halves_win_over_a_larger_third() -> None:
    """Left and right have 0.3 each and the rest 0.4: as one label they are the most probable."""
    values = torch.tensor([0.0, 0.3, 0.3, 0.4]).reshape(4, 1, 1, 1).expand(4, 3, 3, 3).half()
    volume = Volume(np.zeros((3, 3, 3), np.float32), np.eye(4))
    posterior = Posteriors.covering(values, FINE, volume, 1.0)
    assert (posterior.labels_on(scan_grid(volume)).labels == 300).all()
    assert (posterior.merged(COARSE).labels_on(scan_grid(volume)).labels == 9).all()


def test_a_finer_scheme_is_refused() -> None:
    posterior = random_posteriors(scan()).merged(COARSE)
    with pytest.raises(LabelError, match="coarse"):
        posterior.merged(FINE)
