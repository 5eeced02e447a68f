"""From a scan to the network's input: crop to the head, resample to the network's voxel size, normalise.

Shared by inference and by the validation of a training on real scans, so that both see a scan in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch

from synthseg import intensity
from synthseg.errors import InputError
from synthseg.volume import Volume, centred_matrix

MAX_GRID_VALUES = 1_400_000_000  # voxels times classes of one field of view: 2.8 GB of probabilities
MAX_GRID_VOXELS = 80_000_000
SLAB_VOXELS = 8_000_000  # of a scan read at once
HEAD_GRID_MM = 4.0
HEAD_THRESHOLD = 0.15  # of the median intensity of the foreground; what is darker everywhere beyond a plane is air
HEAD_MARGIN_MM = 15.0

Box = tuple[slice, slice, slice]
Cleaning: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def head_box(ras: Volume) -> Box:
    """The part of the field of view that holds the head, with a margin; the rest is air. In voxels of ``ras``.

    Looked for on a coarse grid, where noise is averaged away. Saves most of the time and memory of a scan with much
    air around the head, and makes the result independent of how much air there is.
    """
    coarse = resample(ras, HEAD_GRID_MM)
    floor, median = intensity.foreground(coarse)
    seen = coarse > floor + HEAD_THRESHOLD * (median - floor)  # the median, so that a bright object decides nothing
    sides = []
    for axis in range(3):
        n, spacing = ras.data.shape[axis], ras.spacing_mm[axis]
        planes = torch.nonzero(
            seen.any(dim=(axis + 1) % 3, keepdim=True).any(dim=(axis + 2) % 3, keepdim=True).flatten()
        )
        if len(planes) == 0:
            return slice(None), slice(None), slice(None)
        first_mm = (float(planes[0]) - coarse.shape[axis] / 2) * HEAD_GRID_MM - HEAD_MARGIN_MM
        last_mm = (float(planes[-1]) + 1 - coarse.shape[axis] / 2) * HEAD_GRID_MM + HEAD_MARGIN_MM
        start = max(0, int(np.floor(first_mm / spacing + n / 2)))
        stop = min(n, int(np.ceil(last_mm / spacing + n / 2)))
        sides.append(slice(start, max(stop, start + 1)))
    return sides[0], sides[1], sides[2]


def crop(ras: Volume, box: Box) -> Volume:
    """A part of a volume, with the affine of its own first voxel."""
    affine = ras.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [side.start or 0 for side in box]
    return Volume(ras.data[box], affine)


def check_size(ras: Volume, voxel_size_mm: float, n_classes: int) -> None:
    """Refuse a field of view whose probabilities would not fit into memory: most often a wrong voxel size."""
    voxels = float(np.prod([float(side) for side in grid_shape(ras, voxel_size_mm)]))
    most = min(MAX_GRID_VOXELS, MAX_GRID_VALUES / n_classes)
    if voxels > most:
        extent = " x ".join(f"{side:.0f}" for side in ras.extent_mm)
        spacing = " x ".join(f"{side:.3g}" for side in ras.spacing_mm)
        raise InputError(
            f"the field of view is {extent} mm ({spacing} mm voxels), too large for a head: "
            f"{voxels / 1e6:.0f} million voxels of {voxel_size_mm:g} mm in {n_classes} classes, at most "
            f"{most / 1e6:.0f} million fit into memory; "
            "correct the voxel size in the header, or crop the scan to the head"
        )


def grid_shape(ras: Volume, voxel_size_mm: float) -> tuple[int, int, int]:
    """Size of the isotropic grid that covers the field of view, at least one voxel along each axis."""
    d, h, w = (max(1, int(np.ceil(extent / voxel_size_mm - 1e-3))) for extent in ras.extent_mm)
    return d, h, w


def conform(ras: Volume, voxel_size_mm: float, cleaned: Cleaning | None = None) -> torch.Tensor:
    """The network's input: finite, windowed if CT, isotropic, anti-aliased, in [0, 1]; float32 (D, H, W).

    The grid shares its centre with the field of view of the scan. What is CT and what is fill is decided on ``ras``,
    which must hold the head and air around it; ``cleaned`` brings the decision where ``ras`` is but a part of the head.
    """
    return intensity.normalise(resample(ras, voxel_size_mm, cleaned))


def resample(ras: Volume, voxel_size_mm: float, cleaned: Cleaning | None = None) -> torch.Tensor:
    """Finite intensities, windowed if CT, on the isotropic grid; float32 (D, H, W). ``cleaned`` as in `conform`.

    The scan is read in slabs along its first axis: beside it, memory holds one slab and what has been resampled.
    """
    first, second, third = (
        centred_matrix(n_in, n_out, spacing, voxel_size_mm)
        for n_in, n_out, spacing in zip(ras.data.shape, grid_shape(ras, voxel_size_mm), ras.spacing_mm, strict=True)
    )
    cleaned = cleaned or cleaning(ras.data)
    planes = torch.empty((ras.data.shape[0], len(second), len(third)))
    for slab in _slabs(ras.data):
        planes[slab] = second @ (cleaned(_as_tensor(ras.data[slab])) @ third.T)
    return (first @ planes.flatten(1)).unflatten(1, planes.shape[1:])


def _slabs(data: np.ndarray) -> list[slice]:
    """Consecutive slices along the first axis, of about SLAB_VOXELS each."""
    n, plane = data.shape[0], data[0].size
    thickness = max(1, SLAB_VOXELS // plane)
    return [slice(start, min(n, start + thickness)) for start in range(0, n, thickness)]


def _as_tensor(data: np.ndarray) -> torch.Tensor:
    """A copy, because a side of one voxel that runs backwards is contiguous for NumPy, and refused by torch."""
    return torch.from_numpy(np.array(data, dtype=np.float32, order="C"))


def cleaning(data: np.ndarray) -> Cleaning:
    """What makes any part of an image (D, H, W) finite, its fill value air, and windows it if it is a CT.

    Decided on the whole image by the rules of `intensity.finite`, `fill_as_air` and `looks_like_hounsfield`, without
    a copy of it.
    """
    lowest, highest, all_finite = _finite_range(data)

    def finite(part: torch.Tensor) -> torch.Tensor:
        return part if all_finite else torch.where(torch.isfinite(part), part, lowest)

    def share(value: float) -> float:
        return sum(int((_as_tensor(data[slab]) == value).sum()) for slab in _slabs(data)) / data.size

    corners = data[tuple(slice(None, None, max(1, n - 1)) for n in data.shape)]
    filling = intensity.filled_with(finite(_as_tensor(corners)), lowest, share)

    index = np.unravel_index(intensity.spread_index(data.size).numpy(), data.shape)
    sample = finite(_as_tensor(data[index]))
    air = lowest if filling is None else intensity.air_beside(filling, sample, lowest)

    def filled(part: torch.Tensor) -> torch.Tensor:
        part = finite(part)
        return part if filling is None else torch.where(part == filling, air, part)

    if not intensity.is_hounsfield(filled(sample), lowest, highest):
        return filled
    return lambda part: filled(part).clamp(*intensity.CT_WINDOW_HU)


def _finite_range(data: np.ndarray) -> tuple[float, float, bool]:
    """Smallest and largest finite value, as float32 (0 if there is none), and whether all values are finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = np.float32(data.min()), np.float32(data.max())
    if np.isfinite(low) and np.isfinite(high):
        return float(low), float(high), True
    ranges = []
    for slab in _slabs(data):
        part = _as_tensor(data[slab])
        part = part[torch.isfinite(part)]
        if part.numel():
            ranges.append([float(value) for value in part.aminmax()])
    if not ranges:
        return 0.0, 0.0, False
    return min(low for low, _ in ranges), max(high for _, high in ranges), False
