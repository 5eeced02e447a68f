"""Images of one anatomy cut out apart from each other, so that the place in an image does not tell voxels apart.

A network knows the border of its image. Where all images of an anatomy lie on one another, it can match their voxels by
their distances to the borders alone, and every measure of matching is then blind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Windows:
    """Windows of one size, drawn at random in a grid that is larger by ``margin`` voxels along each axis.

    Attributes
    ----------
    size : of each window, voxels.
    margin : by how many voxels two windows lie apart at most.
    corners : where each window begins in the grid.
    """

    size: Size
    margin: int
    corners: tuple[Size, ...]

    @classmethod
    def draw(cls, count: int, size: Sequence[int], margin: int, generator: torch.Generator, step: int = 1) -> Windows:
        """``count`` windows whose corners are multiples of ``step``, of which ``margin`` is one."""
        if margin % step:
            raise ValueError(f"the margin must be a multiple of {step}, got {margin}")
        drawn = step * torch.randint(margin // step + 1, (count, 3), generator=generator)
        corners = [(x, y, z) for x, y, z in drawn.tolist()]
        return cls((size[0], size[1], size[2]), margin, tuple(corners))

    @property
    def grid(self) -> Size:
        """Size of the grid that holds all windows."""
        return (self.size[0] + self.margin, self.size[1] + self.margin, self.size[2] + self.margin)

    def cut(self, values: torch.Tensor, number: int) -> torch.Tensor:
        """What a window shows of values (..., D, H, W) over the grid."""
        return _box(values, self.corners[number], self.size)

    def shared(self, values: torch.Tensor, number: int, cell: int = 1) -> torch.Tensor:
        """Of values (..., d, h, w) over a window, of blocks of ``cell`` voxels a side, what all windows can show."""
        start = [(self.margin - corner) // cell for corner in self.corners[number]]
        return _box(values, start, [(n - self.margin) // cell for n in self.size])

    def shared_of_grid(self, values: torch.Tensor) -> torch.Tensor:
        """Of values (..., D, H, W) over the grid, what all windows can show."""
        return _box(values, [self.margin] * 3, [n - self.margin for n in self.size])


def _box(values: torch.Tensor, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    x, y, z = (slice(a, a + n) for a, n in zip(start, size, strict=True))
    return values[..., x, y, z]
