"""Probabilities of a segmented scan, and their way to any grid along the axes of the scan.

Probabilities, not labels, are resampled, so that thin structures keep their shape. They live on the network's grid,
which is cropped to the head; beyond it is background. A grid shares the directions of its axes with the scan, in any
order and either way; its voxel size and field of view are free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from synthseg.errors import InputError
from synthseg.labels import LabelTable
from synthseg.volume import Volume, apply_along, resampling_matrix

SLAB_BYTES = 256 * 2**20  # of probabilities held at once while they are resampled
BLOCK = 64  # voxels a side that labels are found in at once
_AXES_TOLERANCE = 1e-3  # of a voxel step along a wrong axis, against the step along the right one
_ROUNDED_TO = 6  # decimals of a position in voxels: what rounding of affines leaves is cut off
_EDGE = 1e-4  # of a voxel of the network: a voxel centre on the very border of the field of view is inside


@dataclass(frozen=True, eq=False)
class Grid:
    """Voxels in space: their number along each array axis, and the affine (4, 4) from voxel indices to RAS+ mm."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        d, h, w = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(d), float(h), float(w)

    @property
    def voxel_ml(self) -> float:
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000.0


def scan_grid(volume: Volume) -> Grid:
    """The grid of a scan, in its own voxel order."""
    d, h, w = volume.data.shape
    return Grid((d, h, w), np.array(volume.affine, dtype=np.float64))


def spacing_grid(volume: Volume, spacing_mm: float | Sequence[float]) -> Grid:
    """A grid with the axes, voxel order, centre and field of view of a scan, and another voxel size.

    ``spacing_mm`` is one number, or one for each array axis of the scan. The field of view is covered: it grows by
    less than a voxel where the voxel size does not divide it. Raises InputError on an impossible voxel size.
    """
    given = np.atleast_1d(np.asarray(spacing_mm, dtype=np.float64))
    if given.size not in (1, 3) or not np.isfinite(given).all() or (given <= 0).any():
        raise InputError(f"a voxel size is one positive number in mm, or three; got {spacing_mm}")
    spacing = np.broadcast_to(given, 3)
    d, h, w = (
        max(1, int(np.ceil(extent / step - 1e-3))) for extent, step in zip(volume.extent_mm, spacing, strict=True)
    )
    return centred_grid(volume, (d, h, w), spacing)


def centred_grid(volume: Volume, shape: tuple[int, int, int], spacing_mm: Sequence[float] | np.ndarray) -> Grid:
    """A grid along the axes of a volume, whose centre is that of the volume."""
    affine = np.array(volume.affine, dtype=np.float64)
    centre_mm = affine[:3, :3] @ (np.array(volume.data.shape) - 1) / 2 + affine[:3, 3]
    affine[:3, :3] *= np.asarray(spacing_mm) / np.linalg.norm(affine[:3, :3], axis=0)
    affine[:3, 3] = centre_mm - affine[:3, :3] @ (np.array(shape) - 1) / 2
    return Grid(shape, affine)


class LabelsOnGrid(NamedTuple):
    """Labels of a grid.

    Attributes
    ----------
    labels : ids (D, H, W) in the voxel order of the grid; uint8, or int16 if an id is above 255.
    hard_voxels : number of voxels of each class, int64 (C,).
    soft_voxels : sum over voxels of each class's probability, float64 (C,).
    """

    labels: np.ndarray
    hard_voxels: np.ndarray
    soft_voxels: np.ndarray


class _Axis(NamedTuple):
    """How one axis of a grid lies on one axis of the probabilities."""

    grid_axis: int
    flipped: bool
    start: int  # first and one past the last voxel of the grid that is not mere background, along the probabilities
    stop: int
    matrix: torch.Tensor  # float32 (stop - start, n_in)


class _Part(NamedTuple):
    """Some consecutive voxels of an axis, and what they need of the probabilities."""

    out: slice
    source: slice
    matrix: torch.Tensor | None  # None: they are the same voxels


@dataclass(eq=False)
class Posteriors:
    """Probabilities of each class on the network's grid.

    Attributes
    ----------
    values : float16 (C, D, H, W), axes in RAS+ order, cropped to the head; beyond it is background.
    table : the labels, in the order of the classes.
    affine : (4, 4), voxel indices of ``values`` to RAS+ mm.
    extent_mm : the analysed field of view along each axis, centred on ``values``, which covers it.
    device : where they are resampled.
    """

    values: torch.Tensor
    table: LabelTable
    affine: np.ndarray
    extent_mm: tuple[float, float, float]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def covering(
        cls,
        values: torch.Tensor,
        table: LabelTable,
        ras: Volume,
        voxel_size_mm: float,
        device: torch.device | str = "cpu",
    ) -> Posteriors:
        """Probabilities (C, D, H, W) of a field of view in RAS+ order, on the isotropic grid centred on it."""
        d, h, w = values.shape[1:]
        grid = centred_grid(ras, (d, h, w), [voxel_size_mm] * 3)
        return cls(values, table, grid.affine, ras.extent_mm, torch.device(device))

    @property
    def grid(self) -> Grid:
        """The network's own grid."""
        d, h, w = self.values.shape[1:]
        return Grid((d, h, w), self.affine)

    def labels_on(self, grid: Grid) -> LabelsOnGrid:
        """The most probable label of each voxel of a grid, with volumes in voxels of it."""
        ids = self.table.ids.astype(np.uint8 if self.table.ids.max() <= 255 else np.int16)
        return self._winners_on(grid, ids)

    def indices_on(self, grid: Grid) -> LabelsOnGrid:
        """As `labels_on`, with the index of each class in the table, uint8, in place of its id."""
        return self._winners_on(grid, np.arange(len(self.table), dtype=np.uint8))

    def slabs(self, grid: Grid) -> Iterator[tuple[slice, np.ndarray]]:
        """Probabilities, float32 (C, d, H, W), of consecutive slices along the first axis of a grid.

        Each comes with the slice of the first axis that it fills. Only one is held at a time.
        """
        axes = self._axes(grid)
        lead = next(a for a, axis in enumerate(axes) if axis.grid_axis == 0)
        n_first, n_second, n_third = grid.shape
        n_classes = len(self.table)
        thickness = max(1, int(SLAB_BYTES // (4 * n_classes * n_second * n_third)))
        whole = [_part(axis.matrix, 0, axis.matrix.shape[0]) for axis in axes]
        for start in range(0, n_first, thickness):
            stop = min(n_first, start + thickness)
            slab = np.zeros((n_classes, stop - start, n_second, n_third), dtype=np.float32)
            slab[0] = 1.0
            ascending = self._in_order_of_values(slab, axes)  # a view
            low, high = (n_first - stop, n_first - start) if axes[lead].flipped else (start, stop)
            first, last = max(low, axes[lead].start), min(high, axes[lead].stop)
            if first < last and all(axis.start < axis.stop for axis in axes):
                parts = list(whole)
                parts[lead] = _part(axes[lead].matrix, first - axes[lead].start, last - axes[lead].start)
                inside = [slice(axis.start, axis.stop) for axis in axes]
                inside[lead] = slice(first - low, last - low)
                ascending[(slice(None), *inside)] = self._interpolate(parts).cpu().numpy()
            yield slice(start, stop), slab

    def merged(self, target: LabelTable) -> Posteriors:
        """The same in a coarser scheme: probabilities of the classes that are one label there are summed.

        Raises LabelError if the scheme of these does not relate to it, or cannot tell its classes apart.
        """
        if target.name == self.table.name:
            self.table.groups(target)  # raises if the two are not the same
            return self
        index = torch.from_numpy(self.table.mapping(target))
        values = torch.empty((len(target), *self.values.shape[1:]), dtype=self.values.dtype)
        for plane in range(self.values.shape[1]):
            total = torch.zeros((len(target), *self.values.shape[2:]))
            total.index_add_(0, index, self.values[:, plane].float())
            values[:, plane] = total
        return replace(self, values=values, table=target)

    # ------------------------------------------------------------------------------------------ resampling

    def _axes(self, grid: Grid) -> list[_Axis]:
        """For each axis of ``values`` the axis of the grid along it. Raises InputError if they are not parallel."""
        relative = np.linalg.inv(self.affine) @ grid.affine
        step = np.abs(relative[:3, :3])
        chosen = step.argmax(0)  # axis of the values for each axis of the grid
        wrong = step.sum(0) - step.max(0)
        if sorted(chosen) != [0, 1, 2] or (wrong > _AXES_TOLERANCE * step.max(0)).any():
            raise InputError("the grid is not along the axes of the scan; make it with scan_grid or spacing_grid")
        spacing = np.linalg.norm(self.affine[:3, :3], axis=0)
        axes = []
        for a in range(3):
            g = int(np.flatnonzero(chosen == a)[0])
            n_in, n_out, stride = self.values.shape[1 + a], grid.shape[g], float(relative[a, g])
            first = float(relative[a, 3]) + (stride * (n_out - 1) if stride < 0 else 0.0)
            first, pace = round(first, _ROUNDED_TO), round(abs(stride), _ROUNDED_TO + 3)
            from_centre = np.abs(first + pace * np.arange(n_out) - (n_in - 1) / 2)
            inside = np.flatnonzero(from_centre <= self.extent_mm[a] / spacing[a] / 2 + _EDGE)
            start, stop = (int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, 0)
            matrix = resampling_matrix(n_in, stop - start, 1.0, pace, first + pace * start)
            axes.append(_Axis(g, stride < 0, start, stop, matrix))
        return axes

    def _interpolate(self, parts: Sequence[_Part], classes: torch.Tensor | None = None) -> torch.Tensor:
        """Probabilities float32 (C, d, h, w) of a part of a grid, in the axis order of ``values``."""
        box = self.values[(slice(None), *(part.source for part in parts))]
        if classes is not None:
            box = box[classes]
        box = box.to(self.device).float()
        steps = [(a, part.matrix.to(self.device)) for a, part in enumerate(parts) if part.matrix is not None]
        for a, matrix in sorted(steps, key=lambda step: step[1].shape[0] / step[1].shape[1]):  # what shrinks most first
            box = apply_along(box, matrix, a)
        return box

    @staticmethod
    def _in_order_of_values(data: np.ndarray, axes: Sequence[_Axis]) -> np.ndarray:
        """A view of an array on the grid, (D, H, W) or (C, D, H, W), whose last axes are those of ``values``."""
        lead = data.ndim - 3
        view = data.transpose(*range(lead), *(lead + axis.grid_axis for axis in axes))
        return np.flip(view, tuple(lead + a for a, axis in enumerate(axes) if axis.flipped))

    def _winners_on(self, grid: Grid, names: np.ndarray) -> LabelsOnGrid:
        """``names[index]`` of the most probable class of each voxel."""
        axes = self._axes(grid)
        n_classes = len(self.table)
        shape = [grid.shape[axis.grid_axis] for axis in axes]
        labels = np.full(shape, names[0], dtype=names.dtype)
        hard = np.zeros(n_classes, dtype=np.int64)
        inside = labels[tuple(slice(axis.start, axis.stop) for axis in axes)]  # a view
        blocks = ([_part(axis.matrix, n, n + BLOCK) for n in range(0, axis.stop - axis.start, BLOCK)] for axis in axes)
        for parts in product(*blocks):
            winner = self._block_winners(parts)
            hard += np.bincount(winner.ravel(), minlength=n_classes)
            inside[tuple(part.out for part in parts)] = names[winner]
        soft = self._summed(axes)
        outside = labels.size - inside.size
        hard[0] += outside
        soft[0] += outside
        return LabelsOnGrid(self._in_order_of_grid(labels, axes), hard, soft)

    @staticmethod
    def _in_order_of_grid(data: np.ndarray, axes: Sequence[_Axis]) -> np.ndarray:
        """Undo `_in_order_of_values` for an array (D, H, W)."""
        flipped = np.flip(data, tuple(a for a, axis in enumerate(axes) if axis.flipped))
        return flipped.transpose(np.argsort([axis.grid_axis for axis in axes]))

    def _block_winners(self, parts: Sequence[_Part]) -> np.ndarray:
        """Index of the most probable class, int64 (d, h, w). Classes that cannot win are not interpolated.

        An interpolated probability is at most the largest of those that it comes from, and the winner has at least
        one share in ``C``: a class that is nowhere near that in the block is left out.
        """
        box = self.values[(slice(None), *(part.source for part in parts))]
        largest = box.amax((1, 2, 3)).float()
        candidates = torch.nonzero(largest >= min(0.5 / len(self.table), float(largest.max()))).flatten()
        shape = [part.out.stop - part.out.start for part in parts]
        if len(candidates) == 1:
            return np.full(shape, int(candidates[0]), dtype=np.int64)
        winner = self._interpolate(parts, candidates).max(0).indices.cpu()  # several times faster than argmax
        return candidates[winner].numpy()

    def _summed(self, axes: Sequence[_Axis]) -> np.ndarray:
        """Sum over the voxels of a grid of each class's probability, float64 (C,), without resampling.

        Interpolation is linear: the sum is that of the probabilities, each times its weights in all voxels.
        """
        first, second, third = (axis.matrix.sum(0) for axis in axes)
        total = torch.zeros(len(self.table), dtype=torch.float64)
        for plane, weight in zip(range(self.values.shape[1]), first.tolist(), strict=True):
            if weight:
                total += weight * ((self.values[:, plane].float() @ third) @ second).double()
        return total.numpy()


def _part(matrix: torch.Tensor, start: int, stop: int) -> _Part:
    """The rows ``start`` to ``stop`` of a matrix, without the columns that they do not use."""
    stop = min(stop, matrix.shape[0])
    rows = matrix[start:stop]
    used = torch.nonzero(rows.any(0)).flatten()
    if len(used) == 0:
        return _Part(slice(start, stop), slice(0, 0), None)
    low, high = int(used[0]), int(used[-1]) + 1
    rows = rows[:, low:high].contiguous()
    same = rows.shape[0] == rows.shape[1] and torch.equal(rows, torch.eye(rows.shape[0]))
    return _Part(slice(start, stop), slice(low, high), None if same else rows)
