"""Slices that move or differ, profiles, interpolation history, wrap-around: on images that are known."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, signal

from synthseg.config.artefacts import KSpaceConfig
from synthseg.generator.artefacts import ArtefactPlan, acquire, field_of_view, fold
from synthseg.generator.artefacts.slices import SlicesPlan, move_planes, sample_slice_motion, slice_by_slice
from synthseg.generator.artefacts.storage import Interpolation, StoredPlan, WrapPlan, interpolation, slice_matrices
from synthseg.generator.draw import Draw

IDLE = ArtefactPlan(
    log_bias=None,
    gamma=1.0,
    spacing_mm=(1.0,) * 3,
    thickness_mm=(0.0,) * 3,
    noise_std=0.0,
    noise_seed=5,
    crop=((0.0, 1.0),) * 3,
)


def with_(**changes: object) -> list[ArtefactPlan]:
    return [IDLE.model_copy(update=changes)]


# ---------------------------------------------------------------- profiles


def test_gaussian_profile_has_the_thickness_as_its_width() -> None:
    down, _ = slice_matrices(121, 0.5, 10.0, 6.0, "gaussian")  # six slices, 10 mm apart
    row = down[3].numpy()
    at = (np.arange(121) - 60) * 0.5
    middle = (row * at).sum()
    assert middle == pytest.approx(5.0, abs=0.01)
    wide = at[row > 0.499 * row.max()]
    assert wide[-1] - wide[0] == pytest.approx(6.0, abs=0.51)  # full width at half maximum
    assert math.sqrt((row * (at - middle) ** 2).sum()) == pytest.approx(6 / 2.3548, rel=0.03)
    np.testing.assert_allclose(down.sum(1), 1, atol=1e-6)


def test_slices_are_cut_where_the_head_has_moved_to() -> None:
    ramp = torch.arange(40.0).view(1, 1, 40, 1, 1).expand(1, 1, 40, 3, 4)
    move = SlicesPlan(axis=0, shift_mm=((0.0, 0.0),), degrees=(0.0,), across_mm=(0.0, 0.0, 2.0, -1.5, 0.0))
    plan = {"spacing_mm": (4.0, 1.0, 1.0), "thickness_mm": (4.0, 0.0, 0.0)}
    down, _ = slice_matrices(40, 1.0, 4.0, 4.0, moved_mm=move.across_mm)
    read = down @ ramp[0, 0, :, 0, 0]
    still = 1.5 + 4 * np.arange(10)
    np.testing.assert_allclose(read[:5], np.add(still[:5], [0, 0, 2, -1.5, 0]), atol=1e-5)
    out = acquire(ramp, with_(**plan, slices=move), 1.0)
    unmoved = acquire(ramp, with_(**plan), 1.0)
    assert float((out - unmoved).abs().max()) == pytest.approx(1.75, abs=0.3)  # between slices, linear


# ---------------------------------------------------------------- slice by slice


def test_planes_turn_and_shift_in_mm() -> None:
    plane = torch.zeros((1, 1, 41, 61))
    plane[0, 0, 20, 40] = 1.0  # 10 mm from the middle along the last axis, pixels 2 mm by 1 mm
    quarter = move_planes(plane, [90.0], [(0.0, 0.0)], (2.0, 1.0))[0, 0]
    at = ndimage.center_of_mass(quarter.numpy())
    assert abs(at[0] - 20) == pytest.approx(5, abs=0.01)  # the same 10 mm, now along the first axis
    assert at[1] == pytest.approx(30, abs=0.01)
    shifted = move_planes(plane, [0.0], [(6.0, -5.0)], (2.0, 1.0))[0, 0]
    assert ndimage.center_of_mass(shifted.numpy()) == pytest.approx((23, 35), abs=0.01)
    both = move_planes(plane, [90.0], [(6.0, -5.0)], (2.0, 1.0))[0, 0]  # first turned, then shifted
    assert ndimage.center_of_mass(both.numpy()) == pytest.approx((at[0] + 3, at[1] - 5), abs=0.01)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_slice_has_a_pose_and_a_light_of_its_own(axis: int) -> None:
    image = torch.zeros((1, 12, 13, 14))
    image[:, 5:8, 5:8, 5:8] = 0.5
    planes = image[0].movedim(axis, 0)
    plan = SlicesPlan(
        axis=axis,
        shift_mm=((0.0, 0.0),) * 6 + ((2.0, -1.0), (0.0, 0.0)),
        degrees=(0.0,),
        gain=(1.0,) * 5 + (2.0, 1.0),
        exponent=(1.0,) * 7 + (2.0,),
    )
    out = slice_by_slice(image, plan, (1.0, 1.0, 1.0))[0].movedim(axis, 0)
    np.testing.assert_allclose(out[5], 2 * planes[5], atol=1e-6)
    np.testing.assert_allclose(out[6], planes[6].roll((2, -1), (0, 1)), atol=1e-5)
    np.testing.assert_allclose(out[7], planes[7], atol=1e-6)  # the brightest value stays under gamma
    dim = slice_by_slice(image / 2 + image.roll(2, axis + 1), plan, (1.0,) * 3)[0].movedim(axis, 0)
    assert float(dim[8:].max()) == pytest.approx(0.75 * (0.5 / 0.75) ** 2, abs=1e-6)  # 0.75 is the brightest of all


def test_light_falls_off_linearly() -> None:
    plan = SlicesPlan(axis=1, shift_mm=((0.0, 0.0),), degrees=(0.0,), slope=((0.2, -0.4),))
    out = slice_by_slice(torch.ones((1, 5, 3, 9)), plan, (1.0,) * 3)[0, :, 1]
    down, right = np.linspace(-0.2, 0.2, 5), np.linspace(0.4, -0.4, 9)
    np.testing.assert_allclose(out, 1 + down[:, None] + right[None], atol=1e-6)


def test_movement_between_slices_is_sudden_and_has_no_mean() -> None:
    config = KSpaceConfig(motion_events=3)
    interleaved = 0
    for seed in range(40):
        plan = sample_slice_motion(config, 2, 30, Draw(torch.Generator().manual_seed(seed)))
        poses = np.column_stack([plan.shift_mm, plan.across_mm, plan.degrees])
        assert poses.shape == (30, 4)
        np.testing.assert_allclose(poses.mean(0), 0, atol=1e-9)
        kinds = np.unique(poses.round(9), axis=0)
        assert 1 <= len(kinds) <= 4
        changes = (np.abs(np.diff(poses, axis=0)).max(1) > 1e-9).sum()
        interleaved += changes > 3
        spread = np.linalg.norm(kinds[:, None, :3] - kinds[None, :, :3], axis=2)
        assert spread.max() <= 8 + 1e-6  # two movements of at most 4 mm
    assert 5 < interleaved < 35


# ---------------------------------------------------------------- interpolation history


@pytest.mark.parametrize("by", ["linear", "cubic", "nearest", "zero_fill"])
@pytest.mark.parametrize(("n", "many"), [(16, 32), (15, 40), (16, 27), (11, 11), (1, 3)])
def test_constants_survive_any_interpolation(by: Interpolation, n: int, many: int) -> None:
    matrix = interpolation(n, many, by)
    assert matrix.shape == (many, n)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-9)
    np.testing.assert_allclose(matrix.flip(0, 1), matrix, atol=1e-9) if by != "nearest" else None
    if n == many:
        np.testing.assert_allclose(matrix, np.eye(n), atol=1e-9)


@pytest.mark.parametrize("n", [15, 16])
def test_zero_filling_is_padding_in_k_space(n: int) -> None:
    line = np.random.default_rng(0).normal(size=n)
    matrix = interpolation(n, 3 * n, "zero_fill").numpy()
    expected = signal.resample(line, 3 * n)  # starts on the first sample; ours is centred, one sample earlier
    np.testing.assert_allclose((matrix @ line)[1:], expected[:-1], atol=1e-9)


def test_cubic_is_exact_for_lines_and_linear_has_no_overshoot() -> None:
    line = torch.arange(12, dtype=torch.float64)
    at = (np.arange(30) + 0.5) * 12 / 30 - 0.5
    inside = (at > 1) & (at < 10)
    np.testing.assert_allclose((interpolation(12, 30, "cubic") @ line)[inside], at[inside], atol=1e-9)
    edge = (torch.arange(12) > 5).double()
    overshoot = {by: float((interpolation(12, 60, by) @ edge).max()) for by in ("linear", "cubic", "zero_fill")}  # type: ignore[arg-type]
    assert overshoot["linear"] == 1
    assert 1.05 < overshoot["cubic"] < 1.08 < overshoot["zero_fill"]


def test_noise_is_as_smooth_as_the_interpolation_left_it() -> None:
    def correlation(**changes: object) -> float:
        plan = with_(noise_std=0.1, spacing_mm=(2.0, 1.0, 1.0), thickness_mm=(2.0, 0.0, 0.0), **changes)
        out = acquire(torch.full((1, 1, 120, 20, 21), 1.0), plan, 1.0)[0, 0, 20:-20]
        return float(np.corrcoef(out[1:].flatten(), out[:-1].flatten())[0, 1])

    nearest = correlation(stored=StoredPlan(by="nearest", factor=2.0))
    assert nearest == pytest.approx(0.5, abs=0.05)  # every sample twice
    sinc = correlation(stored=StoredPlan(by="zero_fill", factor=2.0))
    assert sinc == pytest.approx(2 / math.pi, abs=0.05)  # white noise up to half the frequencies: sinc(1/2)
    assert acquire(torch.zeros((1, 1, 9, 8, 7)), with_(stored=StoredPlan(by="cubic", factor=3.0)), 1.0).sum() == 0


def test_stored_scans_ring_but_are_never_negative() -> None:
    step = torch.zeros((1, 1, 60, 3, 4))
    step[:, :, 30:] = 1.0
    for by in ("cubic", "zero_fill"):
        stored = StoredPlan(by=by, factor=4.0)  # type: ignore[arg-type]
        out = acquire(step, with_(spacing_mm=(3.0, 1.0, 1.0), thickness_mm=(3.0, 0.0, 0.0), stored=stored), 1.0)
        assert out.min() >= 0
        assert float(out[0, 0, 30:50].max()) > 1.02
        assert float((out - step).abs()[0, 0, 5:20].max()) < 0.1


# ---------------------------------------------------------------- wrap-around


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_lies_outside_comes_in_from_the_other_side(axis: int) -> None:
    shape = [3, 4, 5]
    shape[axis] = 20
    line = torch.arange(1.0, 21.0)
    image = line.view([1, 1, *(-1 if a == axis else 1 for a in range(3))]).expand(1, 1, *shape).contiguous()
    plans = with_(wrap=WrapPlan(axis=axis, start=0.1, stop=0.8, strength=0.5))  # voxels 2 to 15 of 20: 14 of them
    out = fold(image, plans)[0, 0].movedim(axis, 0)[:, 1, 2]
    mask = field_of_view(image, plans)[0, 0].movedim(axis, 0)[:, 1, 2]
    assert mask.nonzero().flatten().tolist() == list(range(2, 16))
    expected = line.clone()
    expected[14:16] += 0.5 * line[0:2]
    expected[2:6] += 0.5 * line[16:20]
    np.testing.assert_allclose(out[2:16], expected[2:16], atol=1e-5)
    np.testing.assert_allclose(out[16:20], out[2:6], atol=1e-5)  # periodic: k-space sees no edge
    narrow = with_(wrap=WrapPlan(axis=axis, start=0.4, stop=0.65, strength=1.0))
    whole = fold(image, narrow)[0, 0].movedim(axis, 0)[8:13, 1, 2]
    assert float(whole.sum()) == pytest.approx(float(line.sum()))  # nothing is lost, however small the window
