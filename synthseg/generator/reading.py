"""Labels at the points of every voxel.

A voxel's intensity is the mean over several points inside it. Most voxels lie inside one label, where all points read
the same: these are read once. Every point is read only near the borders of labels, where the block of template voxels
that the points of a voxel can reach holds two labels. The result is the same as if all points of all voxels were read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

FEW = 2  # so many points of all voxels are read as fast as the borders are found
SLAB = 2**17  # voxels that are handled at once on a CPU, so that what is made of them stays in its cache
MARGIN = 1e-3  # template voxels; more than coordinates are rounded by
NEAR_BORDER = 255  # instead of a label; voxels of a label with this index are read at every point, wherever they are


@dataclass(frozen=True)
class Reading:
    """Labels at the points of every voxel, as indices into a table.

    Attributes
    ----------
    middle : labels at the voxel centres, uint8 (D, H, W).
    mixed : flat positions of the voxels whose points may differ from the middle, int64 (M,), ascending.
    points : labels at all points of these voxels, uint8 (P, M). In every other voxel each point reads the middle's.
    """

    middle: torch.Tensor
    mixed: torch.Tensor
    points: torch.Tensor

    @classmethod
    def of(cls, samples: Sequence[torch.Tensor], middle: torch.Tensor | None = None) -> Reading:
        """From the labels at each point, uint8 (D, H, W) each, and those at the centres (else at the first point)."""
        middle = samples[0] if middle is None else middle
        mixed, points = _differing([sample.flatten() for sample in samples], middle.flatten())
        return cls(middle, mixed, points)

    def holding(self, chosen: torch.Tensor) -> torch.Tensor:
        """Flat positions, ascending, of the voxels where a point reads one of the labels that ``chosen`` (L,) marks."""
        chosen = chosen.to(self.middle.device)
        found = rename(self.middle, chosen).view(-1)
        found[self.mixed] |= rename(self.points, chosen).any(0)
        return _positions(found)

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """Labels at all points of these voxels, (P, N); the positions ascend and hold all mixed ones."""
        found = self.middle.view(-1).index_select(0, positions).repeat(len(self.points), 1)
        _fill_columns(found, self._columns(positions), self.points)
        return found

    def _columns(self, positions: torch.Tensor) -> torch.Tensor:
        """Where the mixed voxels are among these positions, which ascend and hold them all."""
        mixed = torch.zeros(self.middle.numel(), dtype=torch.bool, device=positions.device)
        mixed[self.mixed] = True
        return _positions(mixed[positions])

    def over(
        self, other: Reading, positions: torch.Tensor, rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> Reading:
        """``rule(label, other's label)`` at every point of the voxels at ``positions``, ascending.

        The other reading is of these voxels alone: its middle is (N,).
        """
        middle = self.middle.clone()
        flat = middle.view(-1)
        flat.index_copy_(0, positions, rule(flat.index_select(0, positions), other.middle))
        either = torch.zeros(middle.numel(), dtype=torch.bool, device=middle.device)
        either[self.mixed] = True
        either[positions.index_select(0, other.mixed)] = True
        mixed = _positions(either)
        points = self.at(mixed)
        among = _positions(either[positions])  # of the voxels at positions, those that are mixed
        either.zero_()
        either[positions] = True
        columns = _positions(either[mixed])  # and where these are among the mixed ones
        _fill_columns(points, columns, rule(points.index_select(1, columns), other.at(among)))
        return Reading(middle, mixed, points)

    def renamed(self, names: torch.Tensor) -> Reading:
        """Label i becomes ``names[i]``."""
        return Reading(rename(self.middle, names), self.mixed, rename(self.points, names))

    def slabs(self) -> Iterator[tuple[slice, slice]]:
        """Parts of the voxels that are handled together, and the part of ``mixed`` that lies in each."""
        parts = list(slabs(self.middle))
        ends = torch.tensor([part.stop for part in parts], device=self.mixed.device)
        start = 0
        for part, end in zip(parts, torch.searchsorted(self.mixed, ends).tolist(), strict=True):
            yield part, slice(start, end)
            start = end


def _fill_columns(target: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> None:
    """``target[:, columns] = values``, row by row, which is faster on a CPU."""
    for row, new in zip(target, values, strict=True):
        row.index_copy_(0, columns, new)


def slabs(volume: torch.Tensor) -> Iterator[slice]:
    """Parts of a flattened volume to handle one after the other: small ones on a CPU, the whole on anything else.

    A volume without voxels has one part, without voxels.
    """
    n = volume.numel()
    step = SLAB if volume.device.type == "cpu" else max(n, 1)
    for start in range(0, max(n, 1), step):
        yield slice(start, min(start + step, n))


def rename(labels: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    """``names[labels]``, of the dtype of the names."""
    out = torch.empty(labels.shape, dtype=names.dtype, device=labels.device)
    flat, filled = labels.reshape(-1), out.view(-1)
    for part in slabs(out):
        torch.index_select(names, 0, flat[part].int(), out=filled[part])
    return out


def subsample_offsets(count: int) -> torch.Tensor:
    """Points inside a voxel, in output voxels from its centre, float32, shape (count, 3)."""
    quarter = 0.25
    corners = [(x, y, z) for x in (-quarter, quarter) for y in (-quarter, quarter) for z in (-quarter, quarter)]
    chosen = {
        1: [(0.0, 0.0, 0.0)],
        2: [corners[0], corners[7]],
        4: [corners[i] for i in (0, 3, 5, 6)],
        8: corners,
    }[count]
    return torch.tensor(chosen, dtype=torch.float32)


def read_labels(labels: torch.Tensor, coords: torch.Tensor, offset: Sequence[float] = (0.0, 0.0, 0.0)) -> torch.Tensor:
    """Nearest label at ``coords + offset`` (3, D, H, W), template voxels; uint8 (D, H, W); background outside."""
    out = torch.empty(coords.shape[1:], dtype=labels.dtype, device=coords.device)
    flat, filled, at = labels.view(-1), out.view(-1), coords.flatten(1)
    for part in slabs(out):
        torch.index_select(flat, 0, _flat_index(at[:, part], offset, labels.shape), out=filled[part])
    return out


def read_points(labels: torch.Tensor, coords: torch.Tensor, offsets: torch.Tensor) -> Reading:
    """Nearest labels at ``coords`` (3, D, H, W) or (3, N) plus each of the offsets (P, 3), all in template voxels."""
    points = offsets.tolist()
    if len(points) <= FEW:
        middle = read_labels(labels, coords)
        return Reading.of([read_labels(labels, coords, p) if any(p) else middle for p in points], middle)
    reach = offsets.abs().amax(0) + MARGIN
    lowest = (-reach).tolist()
    flat, pure = labels.view(-1), _pure_blocks(labels, [int(2 * r) + 2 for r in reach]).view(-1)
    at = coords.flatten(1)
    middle = torch.empty(coords.shape[1:], dtype=torch.uint8, device=coords.device)
    filled = middle.view(-1)
    where, found = [], []
    for part in slabs(middle):
        corner = _flat_index(at[:, part], lowest, labels.shape)
        torch.index_select(pure, 0, corner, out=filled[part])
        near = _positions(filled[part] == NEAR_BORDER)
        there = [axis.index_select(0, near) for axis in at[:, part]]
        centre = flat.index_select(0, _flat_index(there, (0.0, 0.0, 0.0), labels.shape))
        filled[part].index_copy_(0, near, centre)
        read = [flat.index_select(0, _flat_index(there, offset, labels.shape)) for offset in points]
        mixed, those = _differing(read, centre)
        where.append(near.index_select(0, mixed).add_(part.start))
        found.append(those)
    return Reading(middle, torch.cat(where), torch.cat(found, 1))


def _differing(samples: Sequence[torch.Tensor], middle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions at which any of the samples, (N,) each, differs from the middle (N,), and all samples there, (P, M)."""
    differs = samples[0] != middle
    for sample in samples[1:]:
        differs |= sample != middle
    mixed = _positions(differs)
    return mixed, torch.stack([sample.index_select(0, mixed) for sample in samples])


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask (N,) is true, int64, ascending. NumPy finds it several times faster than torch on a CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero()[:, 0]


def _flat_index(
    at: torch.Tensor | Sequence[torch.Tensor], offset: Sequence[float], shape: Sequence[int]
) -> torch.Tensor:
    """Flat index of the voxel nearest to ``at + offset``, three times (N,), int32; outside, of the nearest inside."""
    size = list(shape)
    index = at[0].add(offset[0] + 0.5).clamp_(0, size[0] - 1).to(torch.int32)
    for axis in (1, 2):
        nearest = at[axis].add(offset[axis] + 0.5).clamp_(0, size[axis] - 1).to(torch.int32)
        index = index.mul_(size[axis]).add_(nearest)
    return index


def _pure_blocks(labels: torch.Tensor, width: Sequence[int]) -> torch.Tensor:
    """The label of the block that starts at each voxel and is ``width`` voxels wide; ``NEAR_BORDER`` if it has two."""
    low, high = labels, labels
    for axis, wide in enumerate(width):
        n = labels.shape[axis]
        lowest, highest = low.clone(), high.clone()
        for step in range(1, min(wide, n)):
            here = lowest.narrow(axis, 0, n - step)
            torch.minimum(here, low.narrow(axis, step, n - step), out=here)
            here = highest.narrow(axis, 0, n - step)
            torch.maximum(here, high.narrow(axis, step, n - step), out=here)
        low, high = lowest, highest
    return (low != high).to(torch.uint8).mul_(NEAR_BORDER).maximum(low)
