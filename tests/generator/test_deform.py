"""Deformation against affine arithmetic, a flow integrated by scipy, and landmarks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import solve_ivp
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from synthseg.config import DeformConfig, GeneratorConfig
from synthseg.generator.deform import (
    DeformPlan,
    coordinates,
    exponential,
    resize,
    sample_deform,
)
from synthseg.generator.draw import Draw, Field3D
from synthseg.generator.plan import sample_plan
from synthseg.labels import LabelTable

IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
SHAPE = (11, 14, 9)


def affine_plan(
    matrix: np.ndarray | tuple[tuple[float, ...], ...] = IDENTITY,
    shift_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
    flip: bool = False,
    velocity: Field3D | None = None,
) -> DeformPlan:
    rows = tuple(tuple(float(v) for v in row) for row in matrix)
    return DeformPlan(matrix=rows, shift_mm=shift_mm, velocity_mm=velocity, flip=flip)  # type: ignore[arg-type]


def draw(seed: int) -> Draw:
    return Draw(torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- affine


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [SHAPE, (40, 33, 27), (1, 5, 2)])
def test_affine_part_is_exact(shape: tuple[int, int, int], flip: bool) -> None:
    rng = np.random.default_rng(0)
    matrix = Rotation.from_euler("xyz", [20, -13, 31], degrees=True).as_matrix() @ np.diag([0.9, 1.1, 1.2])
    shift, spacing, center, voxel = (
        np.array([3.0, -7.0, 11.0]),
        rng.uniform(0.5, 3, 3),
        np.array([30.0, 41.5, 27.0]),
        1.7,
    )
    plan = affine_plan(matrix, tuple(shift), flip)  # type: ignore[arg-type]
    got = coordinates(plan, shape, voxel, tuple(center), tuple(spacing)).numpy()

    position = (np.indices(shape) - (np.array(shape) - 1).reshape(3, 1, 1, 1) / 2) * voxel
    world = np.einsum("ij,jdhw->idhw", matrix, position) + shift.reshape(3, 1, 1, 1)
    if flip:
        world[0] = -world[0]
    expected = world / spacing.reshape(3, 1, 1, 1) + center.reshape(3, 1, 1, 1)
    np.testing.assert_allclose(got, expected, atol=5e-4)


@pytest.mark.parametrize(
    ("matrix", "seen_mm", "read_mm"),
    [  # a voxel that lies seen_mm from the patch centre reads the template read_mm from its own
        (Rotation.from_euler("z", 90, degrees=True).as_matrix(), (4, 0, 0), (0, 4, 0)),
        (Rotation.from_euler("x", 90, degrees=True).as_matrix(), (0, 4, 0), (0, 0, 4)),
        (np.diag([1.0, 2.0, 1.0]), (0, 4, 0), (0, 8, 0)),  # scale 2 reads further out: the head looks smaller
        (np.array([[1, 0.5, 0], [0, 1, 0], [0, 0, 1]]), (0, 4, 0), (2, 4, 0)),
    ],
)
def test_landmarks(matrix: np.ndarray, seen_mm: tuple[int, ...], read_mm: tuple[int, ...]) -> None:
    shape, voxel, spacing, center = (13, 17, 15), 2.0, (1.5, 1.0, 2.0), (30.0, 40.0, 50.0)
    got = coordinates(affine_plan(matrix), shape, voxel, center, spacing)
    d, h, w = (int((n - 1) / 2 + mm / voxel) for n, mm in zip(shape, seen_mm, strict=True))
    expected = np.array(center) + np.array(read_mm) / np.array(spacing)
    assert got.numpy()[:, d, h, w] == pytest.approx(expected, abs=1e-4)


def test_drawn_affines_keep_to_their_ranges() -> None:
    angles, scales, shears, shifts, flips = [], [], [], [], []
    extent = (40.0, 50.0, 60.0)
    still = {"svf_std_mm": 0.0}
    for seed in range(200):
        turned = sample_deform(DeformConfig(rotation_deg=25, scaling=0, shear=0, **still), extent, draw(seed))
        rotation = np.array(turned.matrix)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) == pytest.approx(1)
        angles.append(np.abs(Rotation.from_matrix(rotation).as_euler("xyz", degrees=True)))
        scaled = np.array(sample_deform(DeformConfig(rotation_deg=0, shear=0, **still), extent, draw(seed)).matrix)
        np.testing.assert_allclose(scaled, np.diag(np.diag(scaled)), atol=1e-12)
        scales.append(np.diag(scaled))
        sheared = np.array(
            sample_deform(DeformConfig(rotation_deg=0, scaling=0, shear=0.3, **still), extent, draw(seed)).matrix
        )
        np.testing.assert_allclose(np.diag(sheared), 1)
        shears.append(sheared[np.triu_indices(3, 1)])
        shifts.append(turned.shift_mm)
        flips.append(turned.flip)
        assert turned.velocity_mm is None
    for values, low, high in ((angles, 0, 25), (scales, 0.85, 1.15), (shears, -0.3, 0.3), (shifts, -15, 15)):
        array = np.array(values)
        assert array.min() >= low - 1e-9
        assert array.max() <= high + 1e-9
        # the whole range is used, on every axis
        assert (array.max(0) > high - 0.1 * (high - low)).all()
        assert (array.min(0) < low + 0.1 * (high - low)).all()
    assert 0.35 < np.mean(flips) < 0.65


# ---------------------------------------------------------------- diffeomorphism


FLOW_SHAPE, FLOW_SPACING = (16, 18, 15), np.array([3.0, 2.5, 3.5])
FLOW_PEAK_MM = np.array([6.0, -5.0, 4.0])


def swirl(at: np.ndarray) -> np.ndarray:
    """A smooth velocity in mm at positions (3, N) in mm, zero on the border of the lattice; it bends paths."""
    u, v, w = at / ((np.array(FLOW_SHAPE) - 1) * FLOW_SPACING)[:, None]
    window = np.sin(np.pi * u) * np.sin(np.pi * v) * np.sin(np.pi * w)
    return FLOW_PEAK_MM[:, None] * window * np.stack([np.cos(3 * v), np.cos(2 * u), np.cos(3 * w + u)])


def lattice_mm() -> np.ndarray:
    return np.indices(FLOW_SHAPE).reshape(3, -1) * FLOW_SPACING[:, None]


def flow_of_swirl(sign: float) -> np.ndarray:
    velocity = torch.from_numpy(sign * swirl(lattice_mm())).float().reshape(1, 3, *FLOW_SHAPE)
    return exponential(velocity, tuple(FLOW_SPACING))[0].double().numpy()


def test_constant_velocity_is_a_translation() -> None:
    velocity = torch.tensor([2.0, -3.0, 5.0]).view(1, 3, 1, 1, 1).expand(1, 3, 4, 6, 5)
    torch.testing.assert_close(exponential(velocity, (7.0, 8.0, 9.0)), velocity)
    field = Field3D.of(velocity[0])
    moved = coordinates(affine_plan(velocity=field), SHAPE, 2.0, (0, 0, 0), (1.0, 0.5, 2.0))
    still = coordinates(affine_plan(), SHAPE, 2.0, (0, 0, 0), (1.0, 0.5, 2.0))
    shift = (moved - still).flatten(1)
    np.testing.assert_allclose(shift, np.repeat([[2.0], [-6.0], [2.5]], shift.shape[1], 1), atol=1e-4)


def test_scaling_and_squaring_follows_the_flow() -> None:
    start = lattice_mm()
    path = solve_ivp(lambda _, at: swirl(at.reshape(3, -1)).ravel(), (0, 1), start.ravel(), rtol=1e-6, atol=1e-6)
    expected = (path.y[:, -1].reshape(start.shape) - start).reshape(3, *FLOW_SHAPE)
    error = np.abs(flow_of_swirl(1) - expected)
    assert np.abs(expected).max() > 3  # a flow worth the name
    assert (
        np.abs(expected - swirl(start).reshape(expected.shape)).max() > 5 * error.max()
    )  # more than one straight step
    assert error.max() < 0.15
    assert error.mean() < 0.02


def test_inverse_flow_returns() -> None:
    forward, back = flow_of_swirl(1), flow_of_swirl(-1)
    there = np.indices(FLOW_SHAPE) + forward / FLOW_SPACING.reshape(3, 1, 1, 1)
    returned = forward + np.stack([map_coordinates(b, there, order=1, mode="nearest") for b in back])
    assert np.abs(returned).max() < 0.2
    assert np.abs(forward + back).max() > 0.5  # subtracting is not inverting


def test_default_deformations_do_not_fold(head: LabelTable) -> None:
    config = GeneratorConfig(voxel_size_mm=4.0, shape=(30, 38, 33))
    strongest = 0.0
    for index in range(30):
        plan = sample_plan(config, "any", head, 11, index).deform
        voxels = coordinates(plan, config.shape, 4.0, (50, 50, 50), (1.0, 1.0, 1.0)).double().numpy()
        if plan.flip:
            voxels[0] = -voxels[0]
        steps = [np.diff(voxels, axis=axis) for axis in (1, 2, 3)]
        trimmed = [steps[0][:, :, :-1, :-1], steps[1][:, :-1, :, :-1], steps[2][:, :-1, :-1, :]]
        jacobian = np.linalg.det(np.moveaxis(np.stack(trimmed), (0, 1), (-1, -2))) / 4.0**3
        assert jacobian.min() > 0, f"sample {index} folds"
        strongest = max(strongest, float(jacobian.std()))
    assert strongest > 0.1  # the deformations are real


def test_velocity_has_the_spacing_and_strength_asked_for() -> None:
    config = DeformConfig(svf_std_mm=3.0, svf_spacing_mm=(25.0, 25.0))
    stds = []
    for seed in range(60):
        field = sample_deform(config, (100.0, 60.0, 150.0), draw(seed)).velocity_mm
        assert field is not None
        assert field.shape == (3, 5, 4, 7)  # 100/25 + 1, ceil(60/25) + 1, 150/25 + 1
        stds.append(float(field.tensor().std()))
    assert max(stds) < 3.5
    assert 1.0 < np.mean(stds) < 2.0  # U[0, 3]


# ---------------------------------------------------------------- resizing


@pytest.mark.parametrize("shape", [(9, 4, 13), (1, 2, 3), (2, 1, 1), (3, 5, 7), (40, 33, 27)])
@pytest.mark.parametrize("size", [(3, 1, 5), (1, 1, 1), (2, 2, 2), (8, 21, 4)])
def test_resizing_is_trilinear_with_corners_in_place(
    size: tuple[int, int, int], shape: tuple[int, int, int], device: torch.device
) -> None:
    field = 50 * torch.randn((2, 3, *size), generator=torch.manual_seed(0)).to(device)
    before = field.clone()
    out = resize(field, shape)
    expected = F.interpolate(field.double(), size=shape, mode="trilinear", align_corners=True)
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, *shape), torch.float32, device.type)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)
    assert torch.equal(field, before)


def test_resizing_to_the_same_size_changes_nothing() -> None:
    field = torch.randn((1, 2, 3, 1, 5), generator=torch.manual_seed(0))
    assert torch.equal(resize(field, (3, 1, 5)), field)
