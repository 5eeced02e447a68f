"""Pictures of features: three planes of a scan in grey, and the same planes in the colours of the features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from synthseg.reports.mosaic import PLANES, bounding_box, grey_window, take_slice
from synthseg.volume import Volume, atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

CELL_PX = 230  # longest side of a slice
GAP_PX = 6
TITLE_PX = 20
BACKGROUND = 0.25  # brightness of the colours outside the head


@dataclass(frozen=True, eq=False)
class Row:
    """One scan of the picture.

    Attributes
    ----------
    grey : the scan, its axes in RAS+ order.
    colors : uint8 (d, h, w, 3), RAS+.
    affine : (4, 4), voxel indices of ``colors`` to RAS+ mm of the scan.
    head : bool (d, h, w): where the colours mean something.
    """

    title: str
    grey: Volume
    colors: np.ndarray
    affine: np.ndarray
    head: np.ndarray


def draw(rows: Iterable[Row]) -> Image:
    """One row for each scan: axial, coronal and sagittal slice in grey, then the same three in colour (RGB).

    The slices go through the middle of the head. Left of the picture is left of the head. Rows are taken one by one, so
    that a generator of them need hold but one scan.
    """
    from PIL import Image, ImageDraw, ImageFont

    drawn = [(row.title, _slices(row)) for row in rows]
    if not drawn:
        raise ValueError("the picture is empty; give at least one scan")
    widths = [max(cells[column].width for _, cells in drawn) for column in range(6)]
    heights = [max(cell.height for cell in cells) + TITLE_PX for _, cells in drawn]
    canvas = Image.new("RGB", (sum(widths) + 7 * GAP_PX, sum(heights) + (len(drawn) + 1) * GAP_PX))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    top = GAP_PX
    for (title, cells), height in zip(drawn, heights, strict=True):
        pen.text((GAP_PX, top + TITLE_PX - 5), title, fill=(255, 255, 255), anchor="ls", font=font)
        left = GAP_PX
        for cell, width in zip(cells, widths, strict=True):
            place = left + (width - cell.width) // 2, top + TITLE_PX + (height - TITLE_PX - cell.height) // 2
            canvas.paste(cell, place)
            left += width + GAP_PX
        top += height + GAP_PX
    return canvas


def write_picture(path: str | Path, rows: Iterable[Row]) -> None:
    """Write the picture as PNG, whole or not at all."""
    picture = draw(rows)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def _slices(row: Row) -> list[Image]:
    """Grey and coloured slices of three planes, of one size in each plane."""
    from PIL import Image

    head = row.head if row.head.any() else np.ones_like(row.head)
    spacing_mm = np.linalg.norm(row.affine[:3, :3], axis=0)
    box = bounding_box(head, spacing_mm.tolist())
    middle = [round(float(np.flatnonzero(head.any(axis=_others(axis))).mean())) for axis in range(3)]
    sides_mm = [(high - low) * step for (low, high), step in zip(box, spacing_mm, strict=True)]
    scale = CELL_PX / max(sides_mm)
    to_scan = np.linalg.inv(row.grey.affine) @ row.affine
    window = grey_window(row.grey.data)
    greys, colors = [], []
    for _, axis, across, up, _ in PLANES:
        size = max(1, round(sides_mm[across] * scale)), max(1, round(sides_mm[up] * scale))
        greys.append(_grey_slice(row.grey.data, window, to_scan, box, (axis, across, up), middle[axis], size))
        shade = np.where(take_slice(row.head, axis, middle[axis], box), 1.0, BACKGROUND)[..., None]
        plane = np.moveaxis(
            np.stack([take_slice(row.colors[..., c], axis, middle[axis], box) for c in range(3)]), 0, -1
        )
        pixels = np.ascontiguousarray((plane * shade)[::-1]).astype(np.uint8)
        colors.append(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    return [*greys, *colors]


def _others(axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(3) if a != axis)


def _grey_slice(
    data: np.ndarray,
    window: tuple[float, float],
    to_scan: np.ndarray,
    box: Sequence[tuple[int, int]],
    axes: tuple[int, int, int],
    position: int,
    size: tuple[int, int],
) -> Image:
    """The scan's own voxels in the pixels of a slice of the features' grid, by linear interpolation."""
    from PIL import Image
    from scipy import ndimage

    axis, across, up = axes
    width, height = size
    place = np.zeros((3, height, width))
    place[axis] = position
    low, high = box[across]
    place[across] = (low - 0.5 + (np.arange(width) + 0.5) * (high - low) / width)[None]
    low, high = box[up]
    place[up] = (low - 0.5 + (np.arange(height) + 0.5) * (high - low) / height)[::-1, None]
    there = np.tensordot(to_scan[:3, :3], place, 1) + to_scan[:3, 3, None, None]
    shown = ndimage.map_coordinates(data, there, order=1, cval=window[0])
    shown = np.nan_to_num(shown, nan=window[0], posinf=window[1], neginf=window[0])
    scaled = np.clip((shown - window[0]) / max(window[1] - window[0], 1e-12), 0, 1)
    return Image.fromarray((255 * scaled).astype(np.uint8)).convert("RGB")
