"""What goes wrong while k-space is filled: movement within a scan, ghosts, truncation (Gibbs ringing), spikes.

All of it is one transform to k-space and one back, on the acquired grid. Movement follows Shaw et al. (MIDL 2019) and
TorchIO (Pérez-García et al. 2021): each block of lines is read from the head in another pose. A shift is a phase
ramp, so any number of blocks costs the same; a turn needs a turned copy, and two are made at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch

from synthseg.config.artefacts import KSpaceConfig
from synthseg.generator.artefacts.slices import move_planes, random_direction
from synthseg.generator.draw import Draw, Record


class MotionBlock(Record):
    """From line ``start`` (0 to 1 along the phase axis) the head is turned and shifted so."""

    start: float
    shift_mm: tuple[float, float, float]
    degrees: float


class MotionPlan(Record):
    """The first block starts at 0. Turns are about ``turn_axis``."""

    phase_axis: int
    turn_axis: int
    blocks: tuple[MotionBlock, ...]

    @property
    def still(self) -> bool:
        return not any(block.degrees or any(block.shift_mm) for block in self.blocks)


class GhostingPlan(Record):
    """Every ``every``-th line along ``axis`` loses ``strength`` of its signal: ghosts, 1/every of the axis apart."""

    axis: int
    every: int
    strength: float


class Spike(Record):
    """One corrupt point of k-space: a wave of ``amplitude`` over the image, in cycles per acquired voxel."""

    frequency: tuple[float, float, float]
    amplitude: float
    phase: float


class KSpacePlan(Record):
    """``kept``: part of k-space that is measured along each axis; the rest is zero."""

    motion: MotionPlan | None = None
    ghosting: GhostingPlan | None = None
    kept: tuple[float, float, float] = (1.0, 1.0, 1.0)
    spikes: tuple[Spike, ...] = ()

    @property
    def idle(self) -> bool:
        return self == KSpacePlan()


def sample_kspace(config: KSpaceConfig, motion: bool, draw: Draw) -> KSpacePlan | None:
    """Movement is decided by the caller, which knows whether slices or lines move."""
    ghosting, kept, spikes = None, [1.0] * 3, []
    if draw.chance(config.ghosting_probability):
        ghosting = GhostingPlan(
            axis=int(draw.uniform(0, 3)),
            every=2 + int(draw.uniform(0, config.ghosts_max - 1)),
            strength=draw.uniform(*config.ghosting_strength),
        )
    if draw.chance(config.gibbs_probability):
        part, axes = draw.uniform(*config.gibbs_kept), 1 + int(draw.uniform(0, 3))
        first = int(draw.uniform(0, 3))
        for axis in range(first, first + axes):
            kept[axis % 3] = part
    if draw.chance(config.spike_probability):
        for _ in range(1 + int(draw.uniform(0, config.spikes_max))):
            frequency = tuple(draw.uniform(-0.3, 0.3) for _ in range(3))
            spikes.append(
                Spike(
                    frequency=frequency,  # type: ignore[arg-type]
                    amplitude=draw.uniform(*config.spike_strength),
                    phase=draw.uniform(0.0, 2 * math.pi),
                )
            )
    plan = KSpacePlan(
        motion=_sample_motion(config, draw) if motion else None,
        ghosting=ghosting,
        kept=(kept[0], kept[1], kept[2]),
        spikes=tuple(spikes),
    )
    return None if plan.idle else plan


def _sample_motion(config: KSpaceConfig, draw: Draw) -> MotionPlan:
    """The middle of k-space, which holds the picture, is read in the pose of the labels."""
    phase_axis = int(draw.uniform(0, 3))
    turn_axis = int(draw.uniform(0, 3))
    turns = [0.0, *((-1) ** i * draw.uniform(*config.motion_deg) for i in range(2))]
    starts = sorted([0.0, *(draw.uniform(0.0, 1.0) for _ in range(1 + int(draw.uniform(0, config.motion_events))))])
    middle = sum(start <= 0.5 for start in starts) - 1
    blocks = []
    for number, start in enumerate(starts):
        shift = random_direction(draw, *config.motion_mm)
        turn = turns[int(draw.uniform(0, 3))]
        if number == middle:
            shift, turn = [0.0] * 3, 0.0
        blocks.append(MotionBlock(start=start, shift_mm=(shift[0], shift[1], shift[2]), degrees=turn))
    return MotionPlan(phase_axis=phase_axis, turn_axis=turn_axis, blocks=tuple(blocks))


def distort(single: torch.Tensor, plan: KSpacePlan, spacing_mm: Sequence[float]) -> torch.Tensor:
    """The magnitude image (C, D, H, W) that is made from the corrupt k-space of an image of the same shape."""
    out = single if single.dtype in {torch.float32, torch.float64} else single.float()
    filtered = _line_weights(out, plan)
    if (
        plan.motion is not None and not plan.motion.still
    ):  # lines k and -k see different poses: the image becomes complex
        spectrum = _weighted(_moving(out, plan.motion, spacing_mm), filtered, half=False)
        out = torch.fft.ifftn(spectrum, dim=(1, 2, 3)).abs()
    elif filtered:
        spectrum = _weighted(torch.fft.rfftn(out, dim=(1, 2, 3)), filtered, half=True)
        out = torch.fft.irfftn(spectrum, s=out.shape[1:], dim=(1, 2, 3)).abs_()
    spikes = [spike for spike in plan.spikes if spike.amplitude > 0]
    if spikes:
        wave = _wave(out.shape[1:], spikes[0], out)
        for spike in spikes[1:]:
            wave += _wave(out.shape[1:], spike, out)
        out = torch.hypot(out + wave.real, wave.imag)  # the magnitude, as always
    return out.to(single.dtype)


def _along(vector: torch.Tensor, axis: int) -> torch.Tensor:
    return vector.view([-1 if a == axis else 1 for a in range(3)])


def _frequencies(n: int, like: torch.Tensor) -> torch.Tensor:
    return torch.fft.fftfreq(n, device=like.device, dtype=like.dtype)


def _line_weights(single: torch.Tensor, plan: KSpacePlan) -> dict[int, torch.Tensor]:
    """Axis -> weight of each of its lines, in the order of the transform; symmetric about the middle."""
    weights: dict[int, torch.Tensor] = {}
    for axis, kept in enumerate(plan.kept):
        n = single.shape[axis + 1]
        if kept < 1 and n > 2:
            weights[axis] = (_frequencies(n, single).abs() <= kept / 2).to(single.dtype)
    ghosting = plan.ghosting
    if ghosting is not None and ghosting.strength > 0:
        n = single.shape[ghosting.axis + 1]
        line = (_frequencies(n, single) * n).round().abs()
        hit = (line % ghosting.every == 0) & (line > 0.01 * n)  # the few lines in the middle are left alone
        weights[ghosting.axis] = weights.get(ghosting.axis, 1.0) * (1 - ghosting.strength * hit.to(single.dtype))
    return weights


def _weighted(spectrum: torch.Tensor, weights: dict[int, torch.Tensor], half: bool) -> torch.Tensor:
    for axis, weight in weights.items():
        if half and axis == 2:
            weight = weight[: spectrum.shape[3]]
        spectrum *= _along(weight, axis)
    return spectrum


def _moving(single: torch.Tensor, plan: MotionPlan, spacing_mm: Sequence[float]) -> torch.Tensor:
    """k-space (C, D, H, W), complex, of a head that moves while the lines along the phase axis are read in turn."""
    p = plan.phase_axis
    n = single.shape[p + 1]
    starts = torch.tensor([block.start for block in plan.blocks], dtype=torch.float64)
    position = torch.fft.fftfreq(n, dtype=torch.float64) + 0.5  # on the CPU: not every device knows float64
    block_of = (torch.searchsorted(starts, position, right=True) - 1).clamp_min(0).tolist()
    turns = [plan.blocks[b].degrees for b in block_of]
    spectrum = torch.empty(single.shape, dtype=torch.promote_types(single.dtype, torch.complex64), device=single.device)
    for degrees in set(turns):  # lines of each pose; the other two transforms are the same for all lines
        part = torch.fft.fft(_turned(single, degrees, plan.turn_axis, spacing_mm), dim=p + 1)
        for turn, run in groupby(range(n), key=turns.__getitem__):
            lines = list(run)
            if turn == degrees:
                spectrum.narrow(p + 1, lines[0], len(lines)).copy_(part.narrow(p + 1, lines[0], len(lines)))
    spectrum = torch.fft.fftn(spectrum, dim=[axis + 1 for axis in range(3) if axis != p])
    shifts = torch.tensor([plan.blocks[b].shift_mm for b in block_of], dtype=single.dtype, device=single.device)
    for axis in range(3):
        turn = shifts[:, axis] * (-2 * math.pi / spacing_mm[axis])  # (n,) radians per cycle and voxel
        frequency = _frequencies(single.shape[axis + 1], single)
        angle = turn * frequency if axis == p else turn[:, None] * frequency
        if not angle.any():
            continue
        shape = [1, 1, 1]
        shape[p], shape[axis] = n, single.shape[axis + 1]
        if axis < p:
            angle = angle.T
        spectrum *= torch.polar(torch.ones_like(angle), angle).reshape(shape)
    return spectrum


def _turned(single: torch.Tensor, degrees: float, axis: int, spacing_mm: Sequence[float]) -> torch.Tensor:
    if degrees == 0:
        return single
    planes = single.movedim(axis + 1, 1).flatten(0, 1)[None]  # one pose for all planes across the axis
    pixel_mm = [mm for a, mm in enumerate(spacing_mm) if a != axis]
    turned = move_planes(planes, [degrees], [(0.0, 0.0)], pixel_mm)
    return turned[0].unflatten(0, (single.shape[0], single.shape[axis + 1])).movedim(1, axis + 1)


def _wave(shape: Sequence[int], spike: Spike, like: torch.Tensor) -> torch.Tensor:
    """A plane wave (D, H, W), complex."""
    waves = []
    for axis, (n, frequency) in enumerate(zip(shape, spike.frequency, strict=True)):
        angle = 2 * math.pi * frequency * torch.arange(n, dtype=like.dtype, device=like.device)
        angle = angle + (spike.phase if axis == 0 else 0.0)
        size = torch.full_like(angle, spike.amplitude if axis == 0 else 1.0)
        waves.append(_along(torch.polar(size, angle), axis))
    return waves[0] * waves[1] * waves[2]
