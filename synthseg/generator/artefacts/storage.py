"""How a head is sampled: slices with a thickness and a profile, finer storage of coarse scans, the field of view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from synthseg.generator.draw import Record

LEAST_PART = 0.1  # of an axis is covered, however much is cropped
Profile = Literal["box", "gaussian"]
Box = tuple[slice, ...]
Interpolation = Literal["linear", "cubic", "nearest", "zero_fill"]


class StoredPlan(Record):
    """The scan is stored with ``factor`` times as many samples as were acquired, along the coarse axes."""

    by: Interpolation
    factor: float


class WrapPlan(Record):
    """Only start to stop (fractions of the axis) is encoded; what lies outside comes in from the other side."""

    axis: int
    start: float
    stop: float
    strength: float


class StoragePlan(Record):
    spacing_mm: tuple[float, float, float]
    thickness_mm: tuple[float, float, float]
    crop: tuple[tuple[float, float], ...]
    profile: Profile = "box"
    stored: StoredPlan | None = None
    wrap: WrapPlan | None = None


def slice_matrices(
    n: int,
    voxel_mm: float,
    spacing_mm: float,
    thickness_mm: float,
    profile: Profile = "box",
    stored: StoredPlan | None = None,
    moved_mm: Sequence[float] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Acquisition along one axis: averaging over ``thickness_mm`` (n_slices, n), and the way back (n, n_slices).

    The profile is a box of that width or a Gaussian of that full width at half maximum. Each slice is cut
    ``moved_mm`` from its place (the last number serves all beyond). The image may be stored finer before it is read
    linearly at the voxels.
    """
    count = slice_count(n, voxel_mm, spacing_mm)
    step = spacing_mm / voxel_mm
    voxel = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    slices = (torch.arange(count, dtype=torch.float64) - (count - 1) / 2) * step
    cut = slices
    if moved_mm:
        shift = [moved_mm[min(i, len(moved_mm) - 1)] / voxel_mm for i in range(count)]
        cut = slices + torch.tensor(shift, dtype=torch.float64)
    half = max(thickness_mm / voxel_mm, 1.0) / 2
    distance = (voxel[None] - cut[:, None]).abs()
    if profile == "gaussian":
        down = torch.exp(-math.log(2) * (distance / half) ** 2)
        down[distance > 3 * half] = 0
    else:
        down = (half + 0.5 - distance).clamp(0, 1)  # overlap of a voxel with the slab
    down = down / down.sum(1, keepdim=True).clamp_min(1e-9)
    if stored is None:
        return down.float(), _linear(voxel, slices, step).float()
    many = max(1, round(count * stored.factor))
    samples = (torch.arange(many, dtype=torch.float64) - (many - 1) / 2) * (step * count / many)
    up = _linear(voxel, samples, step * count / many) @ interpolation(count, many, stored.by)
    return down.float(), up.float()


def slice_count(n: int, voxel_mm: float, spacing_mm: float) -> int:
    return max(1, round(n * voxel_mm / spacing_mm))


def _linear(voxel: torch.Tensor, slices: torch.Tensor, step: float) -> torch.Tensor:
    """Linear reading (n, n_slices) of slices at voxels, both at their positions in voxels; the ends are continued."""
    n = len(voxel)
    up = (1 - (voxel[:, None] - slices[None]).abs() / step).clamp_min(0)
    up[: n // 2, 0] += 1 - up[: n // 2].sum(1)  # edge voxels outside the outermost slice centres take its value
    up[n // 2 :, -1] += 1 - up[n // 2 :].sum(1)
    return up


def interpolation(n: int, many: int, by: Interpolation) -> torch.Tensor:
    """Matrix (many, n), float64, from n samples to ``many`` over the same length.

    ``cubic`` is Keys' kernel (1981). ``zero_fill`` pads k-space with zeros, as scanners do: a periodic sinc.
    """
    at = (torch.arange(many, dtype=torch.float64)[:, None] + 0.5) * (n / many) - 0.5
    if by == "zero_fill":
        x = math.pi * (at - torch.arange(n, dtype=torch.float64))
        below = n * torch.sin(x / n)
        near = below.abs() < 1e-9
        wave = torch.sin(x) * (torch.cos(x / n) if n % 2 == 0 else 1.0)
        return torch.where(near, torch.ones_like(x), wave / below.masked_fill(near, 1.0))
    first = at.floor()
    part = at - first
    if by == "nearest":
        taps = {0: (part < 0.5).double(), 1: (part >= 0.5).double()}
    elif by == "linear":
        taps = {0: 1 - part, 1: part}
    else:
        inner = [((1.5 * t - 2.5) * t) * t + 1 for t in (part, 1 - part)]
        outer = [((-0.5 * t + 2.5) * t - 4) * t + 2 for t in (part + 1, 2 - part)]
        taps = {-1: outer[0], 0: inner[0], 1: inner[1], 2: outer[1]}
    out = torch.zeros((many, n), dtype=torch.float64)
    for offset, weight in taps.items():
        out.scatter_add_(1, (first + offset).long().clamp(0, n - 1), weight)
    return out


def along(image: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    """Apply a matrix (n_out, n_in) along one axis."""
    return torch.tensordot(image, matrix, dims=([axis], [1])).movedim(-1, axis).contiguous()


def _window(plan: WrapPlan, n: int) -> tuple[int, int]:
    start = min(round(plan.start * n), n - 1)
    return start, max(round(plan.stop * n), start + 1)


def fold(image: torch.Tensor, plans: Sequence[StoragePlan]) -> torch.Tensor:
    """Wrap-around: what lies outside the encoded window adds to the other side. The result is periodic."""
    out = image.clone()
    for single, plan in zip(out, plans, strict=True):
        wrap = plan.wrap
        if wrap is None:
            continue
        n = single.shape[wrap.axis + 1]
        start, stop = _window(wrap, n)
        voxel = torch.arange(n)
        alike = (voxel[:, None] - voxel) % (stop - start) == 0
        encoded = (voxel >= start) & (voxel < stop)
        matrix = torch.where(alike, torch.where(encoded, 1.0, wrap.strength), torch.tensor(0.0))
        single.copy_(along(single, matrix.to(image), wrap.axis + 1))
    return out


def field_of_view(image: torch.Tensor, plans: Sequence[StoragePlan]) -> torch.Tensor:
    """Mask (B, 1, D, H, W), bool, of what the scan covers."""
    mask = torch.zeros(image.shape, dtype=torch.bool, device=image.device)
    for single, plan in zip(mask, plans, strict=True):
        single[0][covered(image.shape[2:], plan)] = True
    return mask


def covered(shape: Sequence[int], plan: StoragePlan) -> Box:
    """The box of voxels that the scan covers: at least ``LEAST_PART`` of an axis, if so much of it is encoded."""
    box = []
    for axis, (n, (start, stop)) in enumerate(zip(shape, plan.crop, strict=True)):
        wraps = plan.wrap is not None and plan.wrap.axis == axis
        low, high = _window(plan.wrap, n) if plan.wrap is not None and wraps else (0, n)
        least = min(max(1, round(LEAST_PART * n)), high - low)
        first = min(max(round(start * n), low), high - least)
        box.append(slice(first, max(min(round(stop * n), high), first + least)))
    return tuple(box)


def placed(inside: torch.Tensor, box: Box, shape: Sequence[int]) -> torch.Tensor:
    """A volume of this shape with its box filled, and zero around it; not copied if the box is all of it."""
    if inside.shape == tuple(shape):
        return inside
    out = torch.zeros(tuple(shape), dtype=inside.dtype, device=inside.device)
    out[box] = inside
    return out
