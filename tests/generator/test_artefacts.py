"""Scanner effects by hand: bias, gamma, slice profiles, Rician noise, field of view."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from synthseg.config import ArtefactConfig, parse
from synthseg.generator.artefacts import (
    ArtefactPlan,
    acquire,
    bias_field,
    corrupt,
    field_of_view,
    gamma,
    sample_artefacts,
)
from synthseg.generator.artefacts.storage import WrapPlan, along, covered, slice_matrices
from synthseg.generator.draw import Draw, Field3D
from synthseg.labels import load_scheme

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


# ---------------------------------------------------------------- bias and gamma


def test_bias_by_hand() -> None:
    field = torch.zeros(1, 2, 2, 2)
    field[0, 1] = math.log(4.0)  # log bias grows linearly from 0 to log 4 along the first axis
    out = bias_field(torch.full((1, 1, 5, 2, 3), 2.0), with_(log_bias=Field3D.of(field)))
    expected = 2 * 4.0 ** np.array([0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(out[0, 0, :, 1, 2], expected, rtol=1e-5)


def test_gamma_by_hand() -> None:
    image = torch.tensor([1.0, 2.0, 3.0, 5.0]).view(1, 1, 1, 2, 2)  # range 1 to 5
    out = gamma(image, with_(gamma=2.0)).flatten()
    np.testing.assert_allclose(out, [1.0, 1 + 4 / 16, 1 + 4 * 4 / 16, 5.0], rtol=1e-6)


def test_gamma_of_a_constant_image() -> None:
    image = torch.full((1, 1, 2, 3, 4), 0.7)
    torch.testing.assert_close(gamma(image, with_(gamma=0.5)), image)


def test_local_contrast_is_a_gamma_that_varies() -> None:
    image = torch.full((1, 1, 5, 2, 3), 0.5)
    image[..., 0], image[..., 2] = 0.0, 1.0
    field = torch.zeros(1, 2, 2, 2)
    field[0, 1] = math.log(3.0)  # from 2 to 6 along the first axis, on a gamma of 2
    out = gamma(image, with_(gamma=2.0, log_exponent=Field3D.of(field)))
    np.testing.assert_allclose(out[0, 0, :, 0, 1], 0.5 ** (2 * 3.0 ** np.array([0, 0.25, 0.5, 0.75, 1])), rtol=1e-5)
    assert (out[..., 0] == 0).all()
    assert (out[..., 2] == 1).all()


# ---------------------------------------------------------------- slices


def test_box_profile_by_hand() -> None:
    # Six voxels of 1 mm at -2.5 ... 2.5; slices 2 mm apart at -2, 0, 2.
    down, up = slice_matrices(6, 1.0, 2.0, 2.0)
    np.testing.assert_allclose(down, [[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 0.5, 0.5]])
    # 3 mm thick: the middle slice covers -1.5 to 1.5, all of two voxels and half of two more
    down, _ = slice_matrices(6, 1.0, 2.0, 3.0)
    np.testing.assert_allclose(down[1], np.array([0, 0.5, 1, 1, 0.5, 0]) / 3, atol=1e-7)
    np.testing.assert_allclose(down[0], np.array([1, 1, 0.5, 0, 0, 0]) / 2.5, atol=1e-7)
    # 1 mm thick with a gap of 1 mm: half of the two nearest voxels
    down, _ = slice_matrices(6, 1.0, 2.0, 1.0)
    np.testing.assert_allclose(down[1], [0, 0, 0.5, 0.5, 0, 0])
    # back: linear between slice centres, constant beyond the outermost
    expected: list[list[float]] = [
        [1, 0, 0],
        [0.75, 0.25, 0],
        [0.25, 0.75, 0],
        [0, 0.75, 0.25],
        [0, 0.25, 0.75],
        [0, 0, 1],
    ]
    np.testing.assert_allclose(up, expected, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60),
    voxel=st.floats(0.5, 3.0),
    factor=st.floats(1.0, 12.0),
    part=st.floats(0.0, 1.0),
)
def test_rows_sum_to_one_and_weights_are_not_negative(n: int, voxel: float, factor: float, part: float) -> None:
    down, up = slice_matrices(n, voxel, voxel * factor, voxel * factor * part)
    for matrix in (down, up):
        assert (matrix >= -1e-6).all()
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-5)
    torch.testing.assert_close(down.flip(0, 1), down, rtol=0, atol=1e-5)  # no side is preferred
    assert down.shape == (up.shape[1], up.shape[0])


def test_along_multiplies_one_axis() -> None:
    image, matrix = torch.randn(2, 3, 4, 5), torch.randn(6, 4)
    expected = np.einsum("cdhw,oh->cdow", image.numpy(), matrix.numpy())
    np.testing.assert_allclose(along(image, matrix, 2), expected, atol=1e-5)


@pytest.mark.parametrize("spacing", [(1.2, 1.0, 1.0), (1.0, 7.9, 1.0), (3.3, 3.3, 3.3), (40.0, 40.0, 40.0)])
def test_constant_image_stays_constant(spacing: tuple[float, float, float]) -> None:
    out = acquire(torch.full((1, 1, 9, 13, 11), 0.6), with_(spacing_mm=spacing, thickness_mm=spacing), 1.0)
    np.testing.assert_allclose(out, 0.6, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("part", [0.5, 1.0])
def test_mass_centre_does_not_move(axis: int, part: float) -> None:
    shape = [9, 9, 9]
    shape[axis] = 61
    for n, spacing in ((61, 1.4), (61, 2.0), (60, 2.0), (61, 3.0), (60, 3.7), (61, 4.1), (60, 5.0), (61, 6.0)):
        shape[axis] = n
        middle = [4.0, 4.0, 4.0]
        middle[axis] = 26.3
        grid = np.indices(shape)
        blob = np.exp(-(((grid[axis] - middle[axis]) / 4.5) ** 2) / 2)
        spacings, thickness = [1.0] * 3, [0.0] * 3
        spacings[axis], thickness[axis] = spacing, spacing * part
        image = torch.from_numpy(blob).float()[None, None]
        out = acquire(image, with_(spacing_mm=tuple(spacings), thickness_mm=tuple(thickness)), 1.0)[0, 0].numpy()
        assert ndimage.center_of_mass(out) == pytest.approx(middle, abs=0.1), (n, spacing)
        assert np.abs(out - blob).max() > 1e-4  # something happened


def test_slices_blur_their_axis_alone() -> None:
    image = torch.rand((1, 1, 8, 12, 10), generator=torch.manual_seed(0))
    out = acquire(image, with_(spacing_mm=(1.0, 4.0, 1.0), thickness_mm=(0.0, 4.0, 0.0)), 1.0)
    for d, w in ((0, 0), (3, 7)):
        line = torch.zeros_like(image)
        line[0, 0, d, :, w] = image[0, 0, d, :, w]
        alone = acquire(line, with_(spacing_mm=(1.0, 4.0, 1.0), thickness_mm=(0.0, 4.0, 0.0)), 1.0)
        torch.testing.assert_close(alone[0, 0, d, :, w], out[0, 0, d, :, w])
        np.testing.assert_allclose(alone.sum(), alone[0, 0, d, :, w].sum(), rtol=1e-5)


# ---------------------------------------------------------------- noise


def test_rician_noise_of_the_background() -> None:
    sigma = 0.05
    out = acquire(torch.zeros(1, 1, 30, 40, 35), with_(noise_std=sigma), 1.0).double().numpy()
    assert out.min() >= 0
    assert out.mean() == pytest.approx(sigma * math.sqrt(math.pi / 2), rel=0.02)
    assert out.std() == pytest.approx(sigma * math.sqrt(2 - math.pi / 2), rel=0.02)


def test_rician_noise_of_a_bright_signal() -> None:
    sigma = 0.03
    out = acquire(torch.full((1, 1, 30, 40, 35), 0.8), with_(noise_std=sigma), 1.0).double().numpy()
    assert out.mean() == pytest.approx(0.8 + sigma**2 / (2 * 0.8), abs=6e-4)
    assert out.std() == pytest.approx(sigma, rel=0.02)


def test_noise_is_added_to_the_slices_that_are_acquired() -> None:
    # 3 slices, 4 voxels apart: between two slices the noise is interpolated, so a slice has neighbours of its own.
    out = acquire(torch.full((1, 1, 12, 30, 31), 1.0), with_(noise_std=0.1, spacing_mm=(4.0, 1.0, 1.0)), 1.0)[0, 0] - 1
    neighbours = np.corrcoef(out[4].flatten(), out[5].flatten())[0, 1]  # -1.5 and -0.5 mm, the slices at -4, 0, 4
    across = np.corrcoef(out[:, 4].flatten(), out[:, 5].flatten())[0, 1]
    # weights (3/8, 5/8) and (1/8, 7/8): correlation of two such sums is 38 / sqrt(34 * 50)
    assert neighbours == pytest.approx(38 / math.sqrt(34 * 50), abs=0.03)
    assert abs(across) < 0.06


def test_noise_seed_decides() -> None:
    image = torch.zeros(2, 1, 5, 6, 7)
    same = acquire(image, with_(noise_std=0.1) * 2, 1.0)
    assert torch.equal(same[0], same[1])
    other = acquire(image[:1], with_(noise_std=0.1, noise_seed=6), 1.0)
    assert not torch.equal(same[:1], other)


def test_parallel_imaging_makes_noise_uneven() -> None:
    field = torch.zeros(1, 2, 2, 2)
    field[0, 1] = math.log(4.0)
    plans = with_(noise_std=0.02, log_gfactor=Field3D.of(field))
    out = acquire(torch.full((1, 1, 3, 80, 90), 1.0), plans, 1.0)[0, 0]
    assert [float(out[i].std()) for i in range(3)] == pytest.approx([0.02, 0.04, 0.08], rel=0.05)


def test_gaussian_noise_has_no_floor_of_its_own() -> None:
    plans = with_(noise_std=0.05, noise_kind="gaussian")
    bright = acquire(torch.full((1, 1, 30, 40, 35), 0.5), plans, 1.0)
    assert float(bright.mean()) == pytest.approx(0.5, abs=1e-3)
    assert float(bright.std()) == pytest.approx(0.05, rel=0.02)
    air = acquire(torch.zeros((1, 1, 30, 40, 35)), plans, 1.0)
    assert float((air == 0).float().mean()) == pytest.approx(0.5, abs=0.01)  # the window has no values below its floor


# ---------------------------------------------------------------- field of view


def test_crop_by_hand() -> None:
    mask = field_of_view(torch.zeros(1, 1, 10, 20, 8), with_(crop=((0.3, 1.0), (0.0, 0.75), (0.0, 1.0))))
    expected = np.zeros((10, 20, 8), bool)
    expected[3:, :15] = True
    np.testing.assert_array_equal(mask[0, 0], expected)


@pytest.mark.parametrize(
    ("crop", "window", "seen"),
    [
        ((0.7, 1.0), None, (14, 20)),
        ((0.99, 1.0), None, (18, 20)),
        ((0.0, 0.01), None, (0, 2)),
        ((0.6, 1.0), (0.1, 0.5), (8, 10)),  # what is kept and what is encoded lie apart
        ((0.0, 0.3), (0.5, 0.9), (10, 12)),
        ((0.2, 1.0), (0.1, 0.5), (4, 10)),
        ((0.6, 1.0), (0.3, 0.31), (6, 7)),
    ],
)
def test_a_scan_covers_a_part_of_every_axis(
    crop: tuple[float, float], window: tuple[float, float] | None, seen: tuple[int, int]
) -> None:
    """A tenth, or all that is encoded."""
    wrap = None if window is None else WrapPlan(axis=1, start=window[0], stop=window[1], strength=1.0)
    box = covered((7, 20, 1), with_(crop=((0.999, 1.0), crop, (0.0, 0.001)), wrap=wrap)[0])
    assert box == (slice(6, 7), slice(*seen), slice(0, 1))


def test_drawn_artefacts_keep_to_their_ranges() -> None:
    config = ArtefactConfig()
    plans = [
        sample_artefacts(config, 2.0, (60.0, 70.0, 80.0), Draw(torch.Generator().manual_seed(seed)))
        for seed in range(400)
    ]
    noise = np.array([p.noise_std for p in plans])
    assert noise.max() <= 0.05
    assert 0.1 < (noise == 0).mean() < 0.3  # noise_probability 0.8
    spacing = np.array([p.spacing_mm for p in plans])
    thickness = np.array([p.thickness_mm for p in plans])
    isotropic = (spacing > 2).all(1)
    slices = ((spacing > 2).sum(1) == 1).nonzero()[0]
    assert spacing.min() == 2.0
    assert spacing[isotropic].max() <= 4.0
    assert 4.0 < spacing[slices].max() <= 8.0
    assert set(spacing[slices].argmax(1)) == {0, 1, 2}
    part = thickness[slices].max(1) / spacing[slices].max(1)
    assert part.min() >= 0.5
    assert part.max() <= 1.0
    assert 0.05 < isotropic.mean() < 0.25  # 0.5 * 0.3
    kept = np.array([[stop - start for start, stop in p.crop] for p in plans])
    assert kept.min() >= 0.65 - 1e-9
    assert 0.15 < (kept.min(1) < 1).mean() < 0.35
    assert {(p.crop[a][0] > 0, p.crop[a][1] < 1) for p in plans for a in range(3)} == {
        (False, False),
        (True, False),
        (False, True),
    }
    logs = np.log([p.gamma for p in plans])
    assert abs(logs.mean()) < 0.05
    assert logs.std() == pytest.approx(0.3, rel=0.15)


# ---------------------------------------------------------------- everything together

ALL: dict[str, Any] = {
    "local_contrast_std": (0.1, 0.3),
    "noise_spread": (0.1, 0.4),
    "crop_probability": 0.0,
    "kspace": {f"{name}_probability": 1.0 for name in ("motion", "ghosting", "gibbs", "spike", "wrap")},
    "storage": {"interpolation_probability": 1.0, "gaussian_profile_probability": 0.5},
    "masking": {"background_probability": 1.0, "bad_strip_probability": 0.5, "deface_probability": 1.0},
}


def draws(record: dict[str, Any], n: int = 60, **more: Any) -> list[ArtefactPlan]:
    config = parse(ArtefactConfig, record, "test")
    return [
        sample_artefacts(config, 2.0, (60.0, 70.0, 80.0), Draw(torch.Generator().manual_seed(seed)), **more)
        for seed in range(n)
    ]


def test_new_artefacts_do_not_move_the_draws_of_the_old() -> None:
    old = ("log_bias", "gamma", "spacing_mm", "thickness_mm", "noise_std", "noise_seed", "crop")
    changed = {"kspace": ALL["kspace"], "masking": ALL["masking"], "noise_spread": (0.1, 0.4)}
    for before, after in zip(draws({}), draws(changed), strict=True):
        assert all(getattr(before, name) == getattr(after, name) for name in old)
        assert before == ArtefactPlan(**{name: getattr(before, name) for name in old})  # the rest is off by default


def test_everything_drawn_survives_json() -> None:
    plans = draws(ALL) + draws({"modes": {"photo_probability": 0.5, "exvivo_probability": 1.0}})
    for plan in plans:
        assert ArtefactPlan.model_validate_json(plan.model_dump_json()) == plan
    assert all((p.stored and p.kspace) or p.scene for p in plans)
    assert {p.slices is None for p in plans} == {True, False}
    assert {p.strip is None for p in plans} == {True, False}


def test_records_of_earlier_versions_are_read() -> None:
    record = IDLE.model_dump(
        include={"log_bias", "gamma", "spacing_mm", "thickness_mm", "noise_std", "noise_seed", "crop"}
    )
    assert ArtefactPlan.model_validate(record) == IDLE


@pytest.mark.parametrize("contrast", ["ct", "hounsfield"])
def test_a_ct_scanner_is_not_a_magnet(contrast: str) -> None:
    for plan in draws(ALL | {"ct_physics": True}, contrast=contrast):
        assert plan.log_bias is plan.log_exponent is plan.log_gfactor is plan.kspace is plan.slices is plan.wrap is None
        assert (plan.gamma, plan.noise_kind) == (1.0, "gaussian")
        assert plan.masked
    assert all(plan.kspace for plan in draws(ALL, contrast=contrast))  # only if asked for
    assert all(plan.kspace for plan in draws(ALL | {"ct_physics": True}, contrast="t1"))


def test_stripped_images_are_not_masked_again() -> None:
    modes = {"photo_probability": 0.5, "exvivo_probability": 1.0}
    for plan in draws(ALL | {"modes": modes}, stripped=True):
        assert not plan.masked
        assert plan.scene is None
        assert plan.kspace is not None


def test_severity_zero_is_mild() -> None:
    config = parse(ArtefactConfig, ALL | {"modes": {"exvivo_probability": 1.0}}, "test").at_severity(0.0)
    for seed in range(40):
        plan = sample_artefacts(config, 2.0, (60.0, 70.0, 80.0), Draw(torch.Generator().manual_seed(seed)))
        assert plan.kspace is plan.wrap is plan.slices is plan.stored is plan.scene is plan.log_exponent is None
        assert not plan.masked
        assert plan.noise_std <= 1e-4
        assert plan.spacing_mm == (2.0,) * 3
        assert abs(math.log(plan.gamma)) < 0.06
    assert parse(ArtefactConfig, ALL, "test").at_severity(1.0) == parse(ArtefactConfig, ALL, "test")


def test_corrupt_covers_and_hides_consistently() -> None:
    table = load_scheme("siam16")
    labels = torch.full((1, 30, 35, 40), table.index_of[16], dtype=torch.uint8)
    labels[:, 6:24, 6:28, 10:34] = table.index_of[1]
    image = torch.full((1, 1, 30, 35, 40), 0.5)
    before = image.clone(), labels.clone()
    for plan in draws(ALL | {"noise_probability": 0.0, "modes": {"photo_probability": 0.2}}, 12):
        out, shown, boxes = corrupt(image, labels, [table], [plan], 2.0)
        assert torch.isfinite(out).all()
        assert out.min() >= 0
        assert out.shape == image.shape
        seen = torch.zeros_like(labels, dtype=torch.bool)
        seen[0][boxes[0]] = True
        assert torch.equal(seen, field_of_view(image, [plan])[:, 0])
        assert (shown[~seen] == 0).all()
        assert ((shown == labels) | (shown == 0)).all()
    assert torch.equal(image, before[0])
    assert torch.equal(labels, before[1])
