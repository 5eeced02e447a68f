"""Ways to spoil a scan together with its true labels, so that segmentations of every quality come about.

Each takes a scan, labels on its grid and a random generator, and returns both anew. Shapes may change; labels stay
those of the voxels that are left. Arrays are in RAS+ order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage


@dataclass(frozen=True, eq=False)
class LabelledScan:
    """``data`` and ``labels`` (D, H, W), ``affine`` (4, 4), and which voxels are brain, bool (D, H, W)."""

    data: np.ndarray
    labels: np.ndarray
    brain: np.ndarray
    affine: np.ndarray

    def cut_to(self, box: tuple[slice, slice, slice]) -> LabelledScan:
        affine = self.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ [side.start or 0 for side in box]
        return LabelledScan(self.data[box], self.labels[box], self.brain[box], affine)


Degradation = Callable[[LabelledScan, np.random.Generator], LabelledScan]


def _top(scan: LabelledScan) -> float:
    """A bright intensity of the scan."""
    return float(np.quantile(scan.data[::2, ::2, ::2], 0.98))


def _spacing_mm(scan: LabelledScan) -> np.ndarray:
    return np.linalg.norm(scan.affine[:3, :3], axis=0)


def intact(scan: LabelledScan, rng: np.random.Generator) -> LabelledScan:
    """As it is."""
    return scan


def stripped(scan: LabelledScan, rng: np.random.Generator) -> LabelledScan:
    """The skull and all beyond the brain removed, with a rim of CSF; what lies there is no structure any more."""
    keep = ndimage.gaussian_filter(scan.brain.astype(np.float32), 3.0 / _spacing_mm(scan)) > rng.uniform(0.1, 0.4)
    return replace(scan, data=np.where(keep, scan.data, 0), labels=np.where(keep, scan.labels, 0))


def noise(scan: LabelledScan, rng: np.random.Generator) -> LabelledScan:
    """Rician noise of 8 to 40 % of a bright intensity."""
    sd = rng.uniform(0.08, 0.4) * _top(scan)
    real = scan.data + rng.normal(0, sd, scan.data.shape)
    return replace(scan, data=np.hypot(real, rng.normal(0, sd, scan.data.shape)).astype(np.float32))


def thick(scan: LabelledScan, rng: np.random.Generator) -> LabelledScan:
    """Slices of 5 to 13 mm along one axis; each keeps the labels of its middle."""
    axis = int(rng.integers(3))
    n = max(3, 2 * round((rng.uniform(5, 13) / _spacing_mm(scan)[axis] - 1) / 2) + 1)  # odd: the middle is a voxel
    count = scan.data.shape[axis] // n
    moved = np.moveaxis(scan.data, axis, 0)[: count * n]
    data = np.moveaxis(moved.reshape(count, n, *moved.shape[1:]).mean(1), 0, axis)
    middle: list[slice] = [slice(None)] * 3
    middle[axis] = slice(n // 2, count * n, n)
    box = (middle[0], middle[1], middle[2])
    affine = scan.affine.copy()
    affine[:3, 3] += affine[:3, axis] * (n // 2)
    affine[:3, axis] *= n
    return LabelledScan(np.ascontiguousarray(data), scan.labels[box], scan.brain[box], affine)


def cut(scan: LabelledScan, rng: np.random.Generator) -> LabelledScan:
    """10 to 60 mm of the brain outside the field of view, at one of its six sides."""
    axis, at_end = int(rng.integers(3)), bool(rng.integers(2))
    inside = np.flatnonzero(scan.brain.any(axis=tuple(a for a in range(3) if a != axis)))
    depth = round(rng.uniform(10, 60) / _spacing_mm(scan)[axis])
    kept = slice(0, int(inside[-1]) + 1 - depth) if at_end else slice(int(inside[0]) + depth, scan.data.shape[axis])
    sides = [slice(0, n) for n in scan.data.shape]
    sides[axis] = kept
    return scan.cut_to((sides[0], sides[1], sides[2]))


def blur(scan: LabelledScan, rng: np.random.Generator) -> LabelledScan:
    """Out of focus: a Gaussian of 1.5 to 4 mm."""
    return replace(scan, data=ndimage.gaussian_filter(scan.data, rng.uniform(1.5, 4) / _spacing_mm(scan)))


def bias(scan: LabelledScan, rng: np.random.Generator) -> LabelledScan:
    """A smooth field of coil sensitivity over a factor of 3 to 20."""
    coarse = ndimage.zoom(rng.normal(size=(4, 4, 4)), [n / 4 for n in scan.data.shape], order=1)
    coarse = (coarse - coarse.min()) / np.ptp(coarse)
    return replace(scan, data=(scan.data * np.exp(np.log(rng.uniform(3, 20)) * coarse)).astype(np.float32))


def saturated(scan: LabelledScan, rng: np.random.Generator) -> LabelledScan:
    """All above a quantile of the brain's intensities is clipped to it: tissues become one."""
    ceiling = np.quantile(scan.data[scan.brain], rng.uniform(0.1, 0.6))
    return replace(scan, data=np.minimum(scan.data, ceiling))


def ghosts(scan: LabelledScan, rng: np.random.Generator) -> LabelledScan:
    """Motion: copies of the head, shifted by a part of the field of view."""
    axis = int(rng.integers(3))
    shift = int(scan.data.shape[axis] * rng.uniform(0.15, 0.5))
    ghost = (np.roll(scan.data, shift, axis) + np.roll(scan.data, -shift, axis)) / 2
    return replace(scan, data=scan.data + rng.uniform(0.2, 0.8) * ghost)


def turned(scan: LabelledScan, rng: np.random.Generator) -> LabelledScan:
    """A header that is wrong about the axes: top and bottom exchanged, or anterior with superior."""
    affine = scan.affine.copy()
    if rng.integers(2):
        affine[2] *= -1
    else:
        affine[[1, 2]] = affine[[2, 1]]
    return replace(scan, affine=affine)


def rescaled(scan: LabelledScan, rng: np.random.Generator) -> LabelledScan:
    """A header that is wrong about the voxel size, by a third to two thirds."""
    affine = scan.affine.copy()
    affine[:3] *= rng.uniform(1.35, 1.7) if rng.integers(2) else rng.uniform(0.55, 0.72)
    return replace(scan, affine=affine)


DEGRADATIONS: dict[str, Degradation] = {
    function.__name__: function
    for function in (intact, stripped, noise, thick, cut, blur, bias, saturated, ghosts, turned, rescaled)
}
INTACT = ("intact", "stripped")
# What each of twenty renderings of a map goes through; every tenth begins anew with a mixture.
COURSE = (
    *("intact", "noise", "thick", "stripped", "turned", "cut", "intact", "blur", "saturated", "intact"),
    *("bias", "noise", "intact", "thick", "ghosts", "intact", "stripped", "rescaled", "intact", "blur"),
)
