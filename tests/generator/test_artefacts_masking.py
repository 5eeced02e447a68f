"""Stripping, defacing, background removal, and brains without a head: on a head made of balls."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from synthseg.config.artefacts import MaskingConfig, ModesConfig
from synthseg.generator.artefacts import mask, scene
from synthseg.generator.artefacts.masking import (
    DefacePlan,
    MaskingPlan,
    StripPlan,
    brain,
    cut_by_defacing,
    kept_by_stripping,
    sample_masking,
    signed_distance,
)
from synthseg.generator.artefacts.modes import ScenePlan, sample_scene, sample_slabs
from synthseg.generator.draw import Draw, Field3D
from synthseg.labels import LabelTable

SHAPE = (70, 76, 72)
VOXEL_MM = 2.0
BRAIN_MM = 40.0


def radius(shape: tuple[int, int, int] = SHAPE, voxel_mm: float = VOXEL_MM) -> np.ndarray:
    """Distance from the middle in mm."""
    grid = [(np.arange(n) - (n - 1) / 2) * voxel_mm for n in shape]
    x, y, z = np.meshgrid(*grid, indexing="ij")
    return np.sqrt(x**2 + y**2 + z**2)


@pytest.fixture(scope="module")
def labels(head: LabelTable) -> torch.Tensor:
    """Ball in ball: ventricle 10 mm, white matter 30, cortex 38, CSF 40, skull 48, skin 54; a cord below."""
    r = radius()
    ids = np.zeros(SHAPE, dtype=np.uint16)
    for limit, number in ((54, 511), (48, 515), (BRAIN_MM, 24), (38, 3), (30, 2), (10, 4)):
        ids[r < limit] = number
    ids[33:37, 36:40, :16] = 512
    return torch.from_numpy(head.to_index(ids))


def even(value: float) -> Field3D:
    return Field3D(shape=(1, 2, 2, 2), values=(value,) * 8)


# ---------------------------------------------------------------- distances


@pytest.mark.parametrize(("shape", "voxel_mm"), [(SHAPE, 2.0), ((117, 121, 119), 1.2), ((40, 41, 43), 3.5)])
def test_distances_to_a_ball_in_mm(shape: tuple[int, int, int], voxel_mm: float) -> None:
    r = radius(shape, voxel_mm)
    step = max(1, round(2.0 / voxel_mm))
    thin = torch.from_numpy(r < BRAIN_MM)[::step, ::step, ::step]
    level = signed_distance(thin, shape, voxel_mm)
    full = torch.nn.functional.interpolate(level[None, None], size=shape, mode="trilinear", align_corners=True)[0, 0]
    near = np.abs(r - BRAIN_MM) < 8
    error = full.numpy()[near] - (BRAIN_MM - r)[near]
    assert np.abs(error).mean() < 0.7
    assert np.abs(error).max() < 2.5
    assert (full.numpy()[r < 20] > 10).all()
    assert (full.numpy()[r > 60] < -10).all()


# ---------------------------------------------------------------- stripping


@pytest.mark.parametrize("offset_mm", [-6.0, -2.0, 0.0, 3.0, 8.0])
def test_the_mask_ends_so_many_mm_outside_the_brain(labels: torch.Tensor, head: LabelTable, offset_mm: float) -> None:
    plan = StripPlan(offset_mm=even(offset_mm), leftovers=None, threshold=0.0, reach_mm=5.0)
    kept = kept_by_stripping(labels, head, plan, VOXEL_MM).numpy()
    volume = kept.sum() * VOXEL_MM**3
    reached = (volume / (4 / 3 * np.pi)) ** (1 / 3)
    assert reached == pytest.approx(BRAIN_MM + offset_mm, abs=1.0)
    assert ndimage.label(kept)[1] == 1
    assert not kept[:, :, :4].any()  # the cord is cut below the brain


def test_a_ragged_mask_is_here_too_wide_and_there_too_narrow(labels: torch.Tensor, head: LabelTable) -> None:
    values = torch.full((1, 2, 2, 2), -5.0)
    values[0, 1] = 7.0  # from -5 mm on the left to 7 mm on the right
    plan = StripPlan(offset_mm=Field3D.of(values), leftovers=None, threshold=0.0, reach_mm=5.0)
    kept = kept_by_stripping(labels, head, plan, VOXEL_MM).numpy()
    line = np.flatnonzero(kept[:, 38, 36])
    left, right = (34.5 - line[0]) * VOXEL_MM, (line[-1] - 34.5) * VOXEL_MM
    assert left < BRAIN_MM - 1
    assert right > BRAIN_MM + 2.5


def test_leftovers_are_pieces_of_what_lies_near(labels: torch.Tensor, head: LabelTable) -> None:
    blobs = Field3D.of(torch.randn((1, 6, 6, 6), generator=torch.manual_seed(1)))
    clean = StripPlan(offset_mm=even(0.0), leftovers=None, threshold=0.5, reach_mm=10.0)
    plan = clean.model_copy(update={"leftovers": blobs})
    without, with_pieces = (kept_by_stripping(labels, head, p, VOXEL_MM).numpy() for p in (clean, plan))
    assert (with_pieces | ~without).all()
    pieces = with_pieces & ~without
    assert 0.02 < pieces.sum() / without.sum() < 0.6
    assert radius()[pieces].max() < BRAIN_MM + 13
    skull = head.index_of[515]
    assert (labels.numpy()[pieces] == skull).mean() > 0.5


def test_a_badly_stripped_scan_shows_what_its_labels_say(labels: torch.Tensor, head: LabelTable) -> None:
    plan = StripPlan(offset_mm=even(4.0), leftovers=None, threshold=0.0, reach_mm=5.0)
    image = torch.rand((1, 1, *SHAPE), generator=torch.manual_seed(0)) + 0.1
    out, shown = mask(image, labels[None], [head], [MaskingPlan(strip=plan)], VOXEL_MM)
    kept = kept_by_stripping(labels, head, plan, VOXEL_MM)
    assert torch.equal(out[0, 0], image[0, 0] * kept)
    assert torch.equal(shown[0], labels * kept)
    assert head.index_of[515] in shown.unique()  # some skull is left, seen and labelled
    assert head.index_of[511] not in shown.unique()


# ---------------------------------------------------------------- defacing


def deface(**changes: object) -> DefacePlan:
    record = {"by": "plane", "normal": (0.0, 0.8, -0.6), "margin_mm": 5.0, "depth_mm": 15.0, "drop": 0.6}
    return DefacePlan.model_validate(record | {"keep_mm": 4.0, "noise": 0.0, "noise_seed": 1} | changes)


@pytest.mark.parametrize("by", ["plane", "box"])
def test_the_face_is_cut_and_the_brain_is_not(labels: torch.Tensor, head: LabelTable, by: str) -> None:
    face = cut_by_defacing(labels, head, deface(by=by), VOXEL_MM)
    assert face.any()
    tissue = brain(labels, head)
    assert not (face & tissue).any()
    away = ndimage.distance_transform_edt(~tissue.numpy()) * VOXEL_MM
    assert away[face.numpy()].min() > 2.0
    where = face.nonzero().float().mean(0)
    assert where[1] > SHAPE[1] / 2 + 10  # in front, RAS+
    assert where[2] < SHAPE[2] / 2 - 5  # and below
    assert abs(where[0] - (SHAPE[0] - 1) / 2) < 1


def test_a_plane_keeps_its_distance(labels: torch.Tensor, head: LabelTable) -> None:
    grid = np.moveaxis(np.indices(SHAPE), 0, -1) - (np.array(SHAPE) - 1) / 2
    height = (grid * VOXEL_MM) @ [0.0, 0.8, -0.6]
    face = cut_by_defacing(labels, head, deface(margin_mm=7.0), VOXEL_MM).numpy()
    assert height[face].min() == pytest.approx(38 + 7, abs=2.5)
    assert (face == (height > height[face].min() - 1e-6)).mean() > 0.995


def test_the_hole_is_zero_or_noise_and_its_labels_are_gone(labels: torch.Tensor, head: LabelTable) -> None:
    image = torch.full((1, 1, *SHAPE), 0.8)
    face = cut_by_defacing(labels, head, deface(), VOXEL_MM)
    for noise in (0.0, 0.5):
        out, shown = mask(image, labels[None], [head], [MaskingPlan(deface=deface(noise=noise))], VOXEL_MM)
        assert torch.equal(out[0, 0][~face], image[0, 0][~face])
        assert float(out[0, 0][face].max()) == pytest.approx(noise * 0.8, abs=0.001)
        assert float(out[0, 0][face].mean()) == pytest.approx(noise * 0.4, abs=0.01)
        assert not shown[0][face].any()
        assert torch.equal(shown[0][~face], labels[~face])


def test_without_a_brain_there_is_no_face(head: LabelTable) -> None:
    empty = torch.full((9, 8, 7), head.index_of[511], dtype=torch.uint8)
    assert not cut_by_defacing(empty, head, deface(keep_mm=0.0), VOXEL_MM).any()


# ---------------------------------------------------------------- background


@pytest.mark.parametrize("margin_mm", [-3.0, 0.0, 6.0])
def test_air_is_removed_from_a_margin_on(labels: torch.Tensor, head: LabelTable, margin_mm: float) -> None:
    ball = torch.where(torch.from_numpy(radius()) < 54, labels, 0)
    out, shown = mask(torch.ones((1, 1, *SHAPE)), ball[None], [head], [MaskingPlan(background_mm=margin_mm)], VOXEL_MM)
    reached = (float(out.sum()) * VOXEL_MM**3 / (4 / 3 * np.pi)) ** (1 / 3)
    assert reached == pytest.approx(54 + margin_mm, abs=1.0)
    assert set(out.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(shown, ball[None] * (out[:, 0] > 0))


# ---------------------------------------------------------------- without a head


def test_ex_vivo_the_fluid_is_everywhere_but_in_the_tissue(labels: torch.Tensor, head: LabelTable) -> None:
    image = torch.rand((2, 1, *SHAPE), generator=torch.manual_seed(0))
    plan = ScenePlan(mode="exvivo", fluid=even(0.9))
    out, shown = scene(image, labels.expand(2, *SHAPE), [head] * 2, [plan, None])
    tissue = brain(labels, head)
    np.testing.assert_allclose(out[0, 0][~tissue], 0.9, rtol=1e-6)
    assert torch.equal(out[0, 0][tissue], image[0, 0][tissue])
    ventricle = labels == head.index_of[4]
    assert (shown[0][ventricle] == head.index_of[4]).all()
    assert not shown[0][~tissue & ~ventricle].any()
    assert torch.equal(out[1], image[1])
    assert torch.equal(shown[1], labels)


# ---------------------------------------------------------------- draws


def test_drawn_masks_and_scenes_keep_to_their_ranges() -> None:
    extent = (100.0, 110.0, 120.0)
    config = MaskingConfig(bad_strip_probability=0.5, deface_probability=1.0, background_probability=0.5)
    plans = [sample_masking(config, extent, Draw(torch.Generator().manual_seed(seed))) for seed in range(200)]
    assert {p.strip is None for p in plans} == {p.background_mm is None for p in plans} == {True, False}
    for plan in plans:
        assert (plan.strip is None) != (plan.deface is None)  # a stripped head has no face to cut
        if plan.strip is not None:
            assert -3 - 15 < np.mean(plan.strip.offset_mm.values) < 6 + 15
            assert 4 <= plan.strip.reach_mm <= 14
        if plan.deface is not None:
            x, y, z = plan.deface.normal
            assert y > 0.7 > abs(z) - 0.01
            assert z < 0
            assert abs(x) <= 0.1
        if plan.background_mm is not None:
            assert -2 <= plan.background_mm <= 8
    modes = ModesConfig(exvivo_probability=0.5, photo_probability=0.3)
    scenes = [sample_scene(modes, extent, Draw(torch.Generator().manual_seed(seed))) for seed in range(200)]
    kinds = [plan.mode if plan else None for plan in scenes]
    assert 40 < kinds.count("photo") < 80
    assert 45 < kinds.count("exvivo") < 95
    assert all(min(plan.fluid.values) >= 0 for plan in scenes if plan)
    slabs = sample_slabs(modes, 25, Draw(torch.Generator().manual_seed(0)))
    assert slabs.axis == 1
    assert {len(v) for v in (slabs.shift_mm, slabs.degrees, slabs.gain, slabs.slope, slabs.exponent)} == {25}
    assert min(slabs.gain) > 0
    assert len(set(slabs.gain)) == 25
