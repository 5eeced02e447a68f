"""Movement, ghosts, truncation and spikes: what each does to an image that is known."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from synthseg.config.artefacts import KSpaceConfig
from synthseg.generator.artefacts.kspace import (
    GhostingPlan,
    KSpacePlan,
    MotionBlock,
    MotionPlan,
    Spike,
    distort,
    sample_kspace,
)
from synthseg.generator.draw import Draw

SPACING_MM = (1.0, 2.0, 1.5)


def ball(shape: tuple[int, int, int] = (40, 36, 32), radius: float = 6.0) -> torch.Tensor:
    """A smooth ball beside the middle, (1, D, H, W)."""
    axes = [torch.arange(n) - (n - 1) / 2 for n in shape]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    away = ((x - 4) ** 2 + (y + 3) ** 2 + (z - 2) ** 2).sqrt()
    return torch.sigmoid((radius - away) / 1.2)[None]


def moved(
    *blocks: tuple[float, tuple[float, float, float], float], phase_axis: int = 1, turn_axis: int = 0
) -> KSpacePlan:
    made = tuple(MotionBlock(start=start, shift_mm=shift, degrees=degrees) for start, shift, degrees in blocks)
    return KSpacePlan(motion=MotionPlan(phase_axis=phase_axis, turn_axis=turn_axis, blocks=made))


# ---------------------------------------------------------------- movement


@pytest.mark.parametrize("phase_axis", [0, 1, 2])
def test_one_pose_for_all_lines_is_a_shift(phase_axis: int) -> None:
    image = ball()
    out = distort(image, moved((0.0, (3.0, -4.0, 4.5), 0.0), phase_axis=phase_axis), SPACING_MM)
    np.testing.assert_allclose(out, image.roll((3, -2, 3), (1, 2, 3)), atol=1e-5)  # mm over the spacing


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_pose_for_all_lines_is_a_turn(axis: int) -> None:
    image, spacing = ball(), (1.0, 1.0, 1.0)
    out = distort(image, moved((0.0, (0.0, 0.0, 0.0), 20.0), turn_axis=axis), spacing)[0].numpy()
    plane = tuple(a for a in range(3) if a != axis)
    expected = ndimage.rotate(image[0].numpy(), -20.0, axes=plane, reshape=False, order=1)
    mirrored = ndimage.rotate(image[0].numpy(), 20.0, axes=plane, reshape=False, order=1)
    error = min(np.abs(out - expected).max(), np.abs(out - mirrored).max())
    assert error < 0.02


def test_the_middle_of_k_space_decides_where_the_head_is() -> None:
    image = ball()
    early = distort(image, moved((0.0, (0.0, 0.0, 0.0), 0.0), (0.62, (0.0, 6.0, 0.0), 3.0)), SPACING_MM)
    whole = distort(image, moved((0.0, (0.0, 0.0, 0.0), 0.0), (0.3, (0.0, 6.0, 0.0), 3.0)), SPACING_MM)
    at = ndimage.center_of_mass(image[0].numpy())
    assert ndimage.center_of_mass(early[0].numpy() ** 2) == pytest.approx(
        ndimage.center_of_mass(image[0].numpy() ** 2), abs=0.1
    )
    assert ndimage.center_of_mass(whole[0].numpy() ** 2)[1] - at[1] == pytest.approx(3.0, abs=0.6)
    assert 1e-3 < float((early - image).abs().max()) < float((whole - image).abs().max())


def test_movement_blurs_along_the_phase_axis_and_keeps_the_energy() -> None:
    image = ball()
    out = distort(image, moved((0.0, (0.0, 5.0, 0.0), 0.0), (0.45, (0.0, 0.0, 0.0), 0.0)), SPACING_MM)
    assert float((out**2).sum()) == pytest.approx(float((image**2).sum()), rel=1e-4)  # Parseval: only phases changed
    outside = torch.ones(36, dtype=torch.bool)
    outside[3:30] = False
    profile = out[0].sum((0, 2))
    across = out[0].sum((1, 2))
    assert float(profile[outside].mean() / profile.max()) > 0.01
    assert float(across[:8].mean() / across.max()) < 0.001


# ---------------------------------------------------------------- ghosts


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("every", [2, 4])
def test_ghosts_lie_where_the_period_says(axis: int, every: int) -> None:
    shape = [24, 24, 24]
    shape[axis] = 160
    image = torch.zeros((1, *shape))
    at = [12, 12, 12]
    at[axis] = 40
    image[(0, *at)] = 1.0
    out = distort(image, KSpacePlan(ghosting=GhostingPlan(axis=axis, every=every, strength=0.5)), (1.0,) * 3)
    line = out[0].movedim(axis, 0)[:, 12, 12]
    ghosts = [(40 + k * 160 // every) % 160 for k in range(1, every)]
    assert line[ghosts].numpy() == pytest.approx(0.5 / every, abs=0.03)
    rest = torch.ones(160, dtype=torch.bool)
    rest[[40, *ghosts]] = False
    assert float(line[rest].abs().max()) < 0.03
    assert float(out.sum()) < 2.5 + 160 * 0.03  # and nowhere else


# ---------------------------------------------------------------- truncation


def test_gibbs_overshoots_an_edge_by_nine_percent() -> None:
    step = torch.zeros((1, 256, 4, 4))
    step[:, 64:192] = 1.0
    out = distort(step, KSpacePlan(kept=(0.25, 1.0, 1.0)), (1.0,) * 3)[0, :, 0, 0]
    assert float(out.max()) == pytest.approx(1.09, abs=0.01)
    over = (out[64:128] > 1).int()
    turns = over.diff().nonzero().flatten()
    assert float(turns.diff().float().median()) == pytest.approx(4.0, abs=0.5)  # half a period: one coarse voxel
    flat = distort(step, KSpacePlan(kept=(1.0, 0.5, 0.5)), (1.0,) * 3)
    np.testing.assert_allclose(flat, step, atol=1e-5)  # nothing changes along the other axes


def test_truncation_removes_the_fine_and_keeps_the_coarse() -> None:
    x = torch.arange(64) * (2 * math.pi / 64)
    coarse, fine = 2 + torch.cos(5 * x), torch.cos(20 * x)
    image = (coarse + fine).view(1, 1, 64, 1).expand(1, 6, 64, 5)
    out = distort(image, KSpacePlan(kept=(1.0, 0.5, 1.0)), (1.0,) * 3)
    np.testing.assert_allclose(out[0, 2, :, 3], coarse, atol=1e-5)


# ---------------------------------------------------------------- spikes


def test_a_spike_is_a_wave_before_the_magnitude() -> None:
    image = torch.full((1, 20, 21, 22), 0.5)
    spike = Spike(frequency=(0.1, -0.2, 0.05), amplitude=0.2, phase=0.7)
    out = distort(image, KSpacePlan(spikes=(spike, spike)), SPACING_MM)[0].numpy()
    x, y, z = np.indices((20, 21, 22))
    angle = 2 * np.pi * (0.1 * x - 0.2 * y + 0.05 * z) + 0.7
    np.testing.assert_allclose(out, np.abs(0.5 + 2 * 0.2 * np.exp(1j * angle)), atol=1e-5)
    air = distort(torch.zeros((1, 8, 9, 10)), KSpacePlan(spikes=(spike,)), SPACING_MM)
    np.testing.assert_allclose(air, 0.2, atol=1e-5)


# ---------------------------------------------------------------- draws


def test_draws_keep_to_their_ranges() -> None:
    config = KSpaceConfig(ghosting_probability=0.5, gibbs_probability=0.5, spike_probability=0.5)
    plans = [sample_kspace(config, True, Draw(torch.Generator().manual_seed(seed))) for seed in range(200)]
    turned: list[int] = []
    for plan in plans:
        assert plan is not None
        assert plan.motion is not None
        blocks = plan.motion.blocks
        assert blocks[0].start == 0
        assert 2 <= len(blocks) <= 5
        assert len({b.degrees for b in blocks} - {0.0}) <= 2
        starts = [b.start for b in blocks]
        assert starts == sorted(starts)
        middle = blocks[sum(s <= 0.5 for s in starts) - 1]
        assert (middle.shift_mm, middle.degrees) == ((0.0, 0.0, 0.0), 0.0)
        for block in blocks:
            if block is not middle:
                assert 1 - 1e-9 <= math.dist(block.shift_mm, (0, 0, 0)) <= 4 + 1e-9
                assert block.degrees == 0 or 1 <= abs(block.degrees) <= 4
        turned.append(sum(b.degrees != 0 for b in blocks))
        assert 0.45 <= min(plan.kept) <= 1
        assert len(plan.spikes) <= 3
    assert max(turned) > 1
    assert {p.kept == (1.0, 1.0, 1.0) for p in plans if p} == {True, False}
    assert {p.ghosting is None for p in plans if p} == {True, False}
    assert sample_kspace(KSpaceConfig(), False, Draw(torch.Generator())) is None
