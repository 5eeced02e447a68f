"""CT in Hounsfield units: partial volume before the window, the window of inference, streaks, headrest."""

from typing import Any

import numpy as np
import pytest
import torch

from synthseg import rng
from synthseg.config import ContrastConfig, parse
from synthseg.generator.contrast import ContrastPlan, paint, sample_contrast
from synthseg.generator.ct_scanner import (
    MU_WATER_PER_MM,
    BeamHardening,
    Headrest,
    add_headrest,
    beam_hardening,
    projector,
)
from synthseg.generator.draw import Draw, Field3D
from synthseg.generator.hounsfield import HU_PER_UNIT, OTHER_WINDOWS_HU, CTPlan, finish, tissue_hu
from synthseg.generator.reading import Reading
from synthseg.inference import conform
from synthseg.intensity import CT_WINDOW_HU, looks_like_hounsfield, normalise
from synthseg.labels import INTRACRANIAL_TISSUES, LabelTable
from synthseg.volume import Volume

EXTENT = (150.0, 180.0, 90.0)
SHAPE = (75, 90, 45)  # voxels of 2 mm


def drawn(head: LabelTable, seed: int, strip: bool = False, **changes: Any) -> ContrastPlan:
    record = {"random_weight": 0, "named_weights": {}, "hounsfield_weight": 1, **changes}
    draw = Draw(rng.generator(seed, 0, "contrast"))
    return sample_contrast(parse(ContrastConfig, record, "test"), head, EXTENT, draw, strip)


def values(head: LabelTable, plan: ContrastPlan) -> dict[str, float]:
    return {label.tissue: mean for label, mean in zip(head.labels, plan.mean, strict=True)}


def ct(**changes: Any) -> CTPlan:
    return CTPlan(window_hu=CT_WINDOW_HU, extent_mm=EXTENT).model_copy(update=changes)


def cylinder(radius_mm: float = 60.0) -> torch.Tensor:
    """A cylinder of water in air, its axis along the last axis."""
    x, y = (torch.arange(n) * 2.0 - (n - 1) for n in SHAPE[:2])
    inside = torch.hypot(x[:, None], y[None]) < radius_mm
    return torch.where(inside, 0.0, -1000.0)[:, :, None].expand(SHAPE).clone()


# ---------------------------------------------------------------- values and window


def test_the_table_knows_every_tissue(head: LabelTable) -> None:
    plain = tissue_hu()["plain"]
    assert {label.tissue for label in head.labels} <= set(plain)
    assert set(tissue_hu()["enhancement"]) <= set(plain)
    assert all(low <= high for low, high in plain.values())


def test_drawn_values_lie_in_their_ranges_and_in_the_known_order(head: LabelTable) -> None:
    for seed in range(20):
        plan = drawn(head, seed)
        assert plan.name == "hounsfield"
        found = values(head, plan)
        for tissue, value in found.items():
            low, high = tissue_hu()["plain"][tissue]
            assert low <= value <= high
        assert found["air"] == -1000
        assert found["ventricle"] < found["wm"] < found["gm"] < found["bone_cancellous"]
        spread = {label.tissue: s for label, s in zip(head.labels, plan.std, strict=True)}
        assert spread["air"] == 0
        assert max(spread[t] for t in INTRACRANIAL_TISSUES if t in spread) <= 4  # Hounsfield units


def test_only_tissues_of_similar_density_tie(head: LabelTable) -> None:
    equal = 0
    for seed in range(40):
        found = values(head, drawn(head, seed, touching_tie_probability=0.5))
        assert found["air"] == -1000
        assert min(found["bone_cortical"], found["bone_cancellous"]) >= 240
        assert max(abs(found[tissue]) for tissue in ("gm", "wm", "csf", "mucosa")) < 90
        equal += abs(found["gm"] - found["wm"]) < 3
    assert equal > 5


def test_iodine_lights_vessels(head: LabelTable) -> None:
    for seed in range(10):
        before = values(head, drawn(head, seed))
        after = values(head, drawn(head, seed, enhanced_probability=1.0))
        assert after["artery"] - before["artery"] >= 60
        assert after["vein"] - before["vein"] >= 60
        assert 0 < after["gm"] - before["gm"] <= 6
        assert after["csf"] == before["csf"]


def test_partial_volume_is_averaged_before_the_window() -> None:
    """A quarter of bone at 1000 in air at -1000 is -500: black. Averaged after the window it would be a quarter."""
    plan = ContrastPlan(
        name="hounsfield",
        mean=(-1000.0, 1000.0),
        std=(0.0, 0.0),
        texture_std=(0.0, 0.0),
        texture=Field3D(shape=(1, 2, 2, 2), values=(0.0,) * 8),
        noise_seed=0,
        visible=(True, True),
        ct=ct(),
    )
    air, bone = torch.zeros((3, 4, 5), dtype=torch.uint8), torch.ones((3, 4, 5), dtype=torch.uint8)
    assert (paint(Reading.of([bone, air, air, air]), plan) == 0).all()
    np.testing.assert_allclose(paint(Reading.of([bone, bone, air, air]), plan), 100 / 250)  # 0 HU
    assert (paint(Reading.of([bone, bone, bone, air]), plan) == 1).all()


def test_the_window_is_that_of_inference() -> None:
    hu = cylinder()
    hu[30:40, 40:50] = 1200.0
    hu += 10 * torch.randn(SHAPE, generator=torch.manual_seed(0))
    assert looks_like_hounsfield(hu)
    real = conform(Volume(hu.numpy(), np.diag([2.0, 2.0, 2.0, 1.0])), 2.0)
    torch.testing.assert_close(normalise(finish(hu, ct())), real, rtol=0, atol=1e-5)
    assert (float(finish(hu, ct()).min()), float(finish(hu, ct()).max())) == (0.0, 1.0)


def test_other_windows_keep_the_unit(head: LabelTable) -> None:
    hu = torch.tensor([[[-1000.0, 0.0, 40.0, 80.0, 500.0]]])
    for window in OTHER_WINDOWS_HU.values():
        out = finish(hu, CTPlan(window_hu=window, extent_mm=(1.0, 1.0, 5.0)))[0, 0]
        assert float(out[2] - out[1]) == pytest.approx(40 / HU_PER_UNIT)
        assert float(out.min()) >= 0
    seen = {drawn(head, seed, ct_other_window_probability=0.7).ct.window_hu for seed in range(60)}  # type: ignore[union-attr]
    assert seen == {CT_WINDOW_HU, *OTHER_WINDOWS_HU.values()}


def test_a_stripped_ct_has_air_without_streaks_or_headrest(head: LabelTable) -> None:
    both = {"ct_streak_strength": (0.1, 0.1), "ct_table_probability": 1.0}
    stripped, whole = drawn(head, 1, True, **both), drawn(head, 1, False, **both)
    assert stripped.mean[0] == -1000
    assert stripped.ct is not None
    assert stripped.ct.beam_hardening is stripped.ct.headrest is None
    assert whole.ct is not None
    assert whole.ct.beam_hardening is not None
    assert whole.ct.headrest is not None
    labels = [torch.full((4, 4, 4), head.index_of[511], dtype=torch.uint8)]
    assert (paint(Reading.of(labels), stripped) == 0).all()


# ---------------------------------------------------------------- beam hardening


def test_projection_and_back_projection_are_inverse() -> None:
    n, mm = 40, 4.0
    forward, back = projector((n, n), (mm, mm))
    x = (torch.arange(n) - (n - 1) / 2) * mm
    disc = (torch.hypot(x[:, None], x[None]) < 50).float()
    sinogram = forward @ disc.flatten()
    assert float(sinogram.max()) == pytest.approx(100, rel=0.06)  # the diameter in mm
    again = (back @ sinogram).view(n, n)
    middle = torch.hypot(x[:, None], x[None]) < 35
    assert float(again[middle].mean()) == pytest.approx(1, abs=0.05)
    assert float(again[torch.hypot(x[:, None], x[None]) > 65].abs().mean()) < 0.05


def two_rods() -> torch.Tensor:
    hu = cylinder(70.0)
    hu[17:27, 38:52] = 1500.0
    hu[48:58, 38:52] = 1500.0
    return hu


def test_a_dark_band_joins_two_dense_bones() -> None:
    hu = two_rods()
    error = beam_hardening(hu, BeamHardening(strength=0.05, soft_share=0.0), EXTENT)
    between = error[32:43, 42:48, 10:35]
    above, below = error[32:43, 66:72, 10:35], error[32:43, 18:24, 10:35]
    assert float(between.mean()) < -10  # Hounsfield units
    assert float(between.max()) < min(float(above.min()), float(below.min()))
    assert float(error[18:26, 40:50].mean()) < float(between.mean())  # and the bone itself reads too low
    # symmetric, the same in every slice, and in proportion to the strength
    torch.testing.assert_close(error, error.flip(0), rtol=0, atol=0.05)
    torch.testing.assert_close(error[..., 5], error[..., 40], rtol=0, atol=0.05)
    twice = beam_hardening(hu, BeamHardening(strength=0.1, soft_share=0.0), EXTENT)
    torch.testing.assert_close(twice, 2 * error, rtol=1e-4, atol=1e-3)


def test_water_alone_has_no_streaks_and_soft_tissue_cups() -> None:
    water = cylinder()
    none = beam_hardening(water, BeamHardening(strength=0.1, soft_share=0.0), EXTENT)
    assert float(none.abs().max()) == 0
    cupped = beam_hardening(water, BeamHardening(strength=0.1, soft_share=0.1), EXTENT)[..., 20]
    middle, rim = float(cupped[33:42, 40:50].mean()), float(cupped[33:42, 70:72].mean())
    assert middle < rim  # darkest in the middle
    # second order of a path through the middle: strength * (share * mu * diameter)^2 over the diameter
    expected = -0.1 * (0.1 * MU_WATER_PER_MM * 120) ** 2 / 120 / MU_WATER_PER_MM * 1000
    assert 0.5 * expected > middle > 4 * expected


# ---------------------------------------------------------------- headrest

REST = Headrest(gap_mm=2.0, radius_mm=90.0, thickness_mm=6.0, half_width_mm=60.0, shift_mm=0.0, hu=100.0)


def test_the_headrest_lies_in_the_air_behind_the_head() -> None:
    hu = cylinder()
    out = add_headrest(hu, REST, EXTENT)
    changed = out != hu
    assert changed.any()
    assert (hu[changed] == -1000).all()
    rear = (SHAPE[1] - 60) // 2  # the rearmost row of the cylinder, in the middle column
    rows = torch.nonzero(changed[SHAPE[0] // 2].any(dim=1)).flatten()
    assert rows.max() < rear
    assert (rear - float(rows.max())) * 2 <= REST.gap_mm + 4
    assert not changed[:, SHAPE[1] // 2 :].any()
    assert float(out[changed].max()) == pytest.approx(REST.hu)
    # curved: further forward at its ends
    ends = torch.nonzero(changed[12].any(dim=1)).flatten()
    assert ends.min() > rows.min()
    thickness = ((out[SHAPE[0] // 2, :rear, 0] + 1000) / (REST.hu + 1000)).sum() * 2
    assert float(thickness) == pytest.approx(REST.thickness_mm, abs=0.6)


def test_the_headrest_never_enters_the_head_or_its_cavities() -> None:
    hu = cylinder(75.0)
    hu[54:58, 15:22] = -1000.0  # a cavity where the shell would pass
    tight = REST.model_copy(update={"gap_mm": 0.0, "radius_mm": 46.0, "half_width_mm": 75.0, "thickness_mm": 12.0})
    out = add_headrest(hu, tight, EXTENT)
    changed = out != hu
    assert changed.any()
    assert torch.equal(out[hu > -1000], hu[hu > -1000])
    assert not changed[54:58, 15:22].any()


def test_an_empty_image_has_no_headrest() -> None:
    hu = torch.full(SHAPE, -1000.0)
    assert torch.equal(add_headrest(hu, REST, EXTENT), hu)


def test_finish_applies_streaks_and_headrest() -> None:
    hu = two_rods()
    plain = finish(hu, ct())
    streaked = finish(hu, ct(beam_hardening=BeamHardening(strength=0.05, soft_share=0.0)))
    resting = finish(hu, ct(headrest=REST))
    assert float((streaked - plain)[32:43, 42:48].mean()) < -10 / HU_PER_UNIT
    assert float((resting - plain).max()) == pytest.approx((REST.hu + 100) / HU_PER_UNIT)
