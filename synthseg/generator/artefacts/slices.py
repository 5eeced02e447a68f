"""What differs from slice to slice: the head moves between two slices, and slabs are photographed one by one.

Poses are rigid in the plane of the slice (one bilinear resampling per slice); a shift across the plane displaces where
the slice is cut (see ``storage.slice_matrices``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from synthseg.config.artefacts import KSpaceConfig
from synthseg.generator.draw import Draw, Record


class SlicesPlan(Record):
    """One entry per slice along ``axis`` (the last one serves all beyond): pose in mm and degrees, and brightness.

    ``shift_mm`` is along the two other axes, ``across_mm`` along ``axis``. ``gain`` multiplies, ``slope`` is how much
    the light changes from the middle to the two edges of the plane, ``exponent`` is the slice's gamma.
    """

    axis: int
    shift_mm: tuple[tuple[float, float], ...]
    degrees: tuple[float, ...]
    across_mm: tuple[float, ...] = (0.0,)
    gain: tuple[float, ...] = (1.0,)
    slope: tuple[tuple[float, float], ...] = ((0.0, 0.0),)
    exponent: tuple[float, ...] = (1.0,)


def sample_slice_motion(config: KSpaceConfig, axis: int, count: int, draw: Draw) -> SlicesPlan:
    """Sudden movements during a multi-slice scan, in slice order or interleaved (odd slices after even ones).

    The labels keep the mean position of all slices.
    """
    poses = [[0.0] * 4]
    for _ in range(1 + int(draw.uniform(0, config.motion_events))):
        poses.append([*random_direction(draw, *config.motion_mm), _sign(draw) * draw.uniform(*config.motion_deg)])
    begins = [0.0, *sorted(draw.uniform(0.0, 1.0) for _ in poses[1:])]
    order = list(range(count))
    if draw.chance(0.5):
        order = order[::2] + order[1::2]
    pose_of = [poses[0]] * count
    for time, number in enumerate(order):
        pose_of[number] = poses[sum(time / count >= begin for begin in begins) - 1]
    mean = [sum(values) / count for values in zip(*pose_of, strict=True)]
    moved = [[value - middle for value, middle in zip(pose, mean, strict=True)] for pose in pose_of]
    return SlicesPlan(
        axis=axis,
        shift_mm=tuple((m[0], m[1]) for m in moved),
        across_mm=tuple(m[2] for m in moved),
        degrees=tuple(m[3] for m in moved),
    )


def random_direction(draw: Draw, low_mm: float, high_mm: float) -> list[float]:
    """A shift of a random length in a random direction."""
    vector = [draw.normal(1.0) for _ in range(3)]
    length = math.sqrt(sum(v * v for v in vector)) or 1.0
    size = draw.uniform(low_mm, high_mm)
    return [size * v / length for v in vector]


def _sign(draw: Draw) -> float:
    return 1.0 if draw.chance(0.5) else -1.0


def move_planes(
    planes: torch.Tensor, degrees: Sequence[float], shift_mm: Sequence[Sequence[float]], pixel_mm: Sequence[float]
) -> torch.Tensor:
    """Turn each plane of (N, C, H, W) about its middle, then shift it by (N, 2) mm along (H, W); zero comes in."""
    height, width = (n * mm / 2 for n, mm in zip(planes.shape[2:], pixel_mm, strict=True))
    rows = []
    for angle, (down, right) in zip(degrees, shift_mm, strict=True):
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        rows.append(
            [
                [c, s * height / width, (-c * right - s * down) / width],
                [-s * width / height, c, (s * right - c * down) / height],
            ]
        )
    theta = torch.tensor(rows, dtype=planes.dtype, device=planes.device)
    grid = F.affine_grid(theta, [len(rows), 1, *planes.shape[2:]], align_corners=False)
    return F.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def slice_by_slice(single: torch.Tensor, plan: SlicesPlan, spacing_mm: Sequence[float]) -> torch.Tensor:
    """Poses and brightness of the slices of one acquired image (C, D, H, W)."""
    planes = single.float().movedim(plan.axis + 1, 0)  # (N, C, H, W)
    count = len(planes)
    degrees, shift = _per_slice(plan.degrees, count), _per_slice(plan.shift_mm, count)
    if any(degrees) or any(map(any, shift)):
        pixel_mm = [mm for axis, mm in enumerate(spacing_mm) if axis != plan.axis]
        planes = move_planes(planes.contiguous(), degrees, shift, pixel_mm)

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=planes.dtype, device=planes.device).view(-1, 1, 1, 1)

    if set(plan.exponent) != {1.0}:
        top = planes.max().clamp_min(1e-6)
        planes = (planes / top).clamp(0, 1).pow(column(_per_slice(plan.exponent, count))) * top
    if set(plan.gain) != {1.0}:
        planes = planes * column(_per_slice(plan.gain, count))
    if any(map(any, plan.slope)):
        slope = _per_slice(plan.slope, count)
        down, right = (torch.linspace(-1, 1, n, device=planes.device) for n in planes.shape[2:])
        light = 1 + column([s[0] for s in slope]) * down[:, None] + column([s[1] for s in slope]) * right
        planes = planes * light.clamp_min_(0)
    return planes.movedim(0, plan.axis + 1).to(single.dtype).contiguous()


def _per_slice(values: Sequence, count: int) -> list:
    return [values[min(i, len(values) - 1)] for i in range(count)]
