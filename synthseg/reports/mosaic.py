"""Pictures of a segmentation for the screen: slices of three planes in grey, and the outlines of the labels on them.

Left of every picture is left of the head. The outlines come as a second, transparent picture of the same size, so that
a page can lay them over the grey one and take them away.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from nibabel.orientations import io_orientation

from synthseg.labels import BRAIN_TISSUES, MAX_ID, LabelTable, tissue_mask
from synthseg.volume import Volume, canonical

if TYPE_CHECKING:
    from PIL.Image import Image

# Name of the plane, the axis across it, horizontal and vertical axis of the picture, letters on its sides.
PLANES = (("axial", 2, 0, 1, "LR"), ("coronal", 1, 0, 2, "LR"), ("sagittal", 0, 1, 2, "PA"))
MARGIN_MM = 6.0
SLICES = 5  # of the widest plane; of a narrower one as many as fit beside each other, up to MOST_SLICES
MOST_SLICES = 7
WIDTH_PX = 1400
HEIGHT_PX = 1400  # at most; a field of view that is long and thin makes a narrower picture
THUMBNAIL_PX = (420, 132)  # at most
GAP_PX = 4
CAPTION_PX = 19  # below each row of the mosaic: sides and indices, where no outline covers them
_GREY_QUALITY = 72
_THUMBNAIL_QUALITY = 70
_THUMBNAIL_OPACITY = 0.45
_SAMPLE_VOXELS = 2_000_000
# The line between two structures has the colour of the one that comes first here: the inner one.
_INNER_FIRST = (
    *("accumbens", "pallidum", "putamen", "caudate", "thalamus", "amygdala", "hippocampus"),
    *("lesion", "tumour", "haemorrhage", "oedema", "ventricle", "brainstem", "wm", "cerebellar_gm", "gm"),
    *("vessel", "artery", "vein", "nerve", "csf", "dura", "bone_cancellous", "bone_cortical"),
    *("eye", "mucosa", "muscle", "fat", "soft", "skin"),
)
_LINE_COLORS = {"wm": (255, 221, 60)}  # white on the white matter of a T1 would not be seen


@dataclass(frozen=True)
class Mosaic:
    """Encoded pictures (WebP) of one scan.

    Attributes
    ----------
    grey, outlines : the slices, and the outlines of the labels on a transparent ground; both of ``size``, in pixels.
    thumbnail : one slice of each plane, labels in colour, of ``thumbnail_size``.
    legend : name and colour of each label that the scan has.
    """

    grey: bytes
    outlines: bytes
    size: tuple[int, int]
    thumbnail: bytes
    thumbnail_size: tuple[int, int]
    legend: tuple[tuple[str, tuple[int, int, int]], ...]


@dataclass(frozen=True)
class _Cell:
    """One slice: where it lies in the picture, in pixels, and where it comes from."""

    plane: int
    position: int  # along the axis across the plane, RAS+ voxels
    left: int
    top: int
    width: int
    height: int


def draw_mosaic(volume: Volume, labels: np.ndarray, table: LabelTable, width_px: int = WIDTH_PX) -> Mosaic:
    """Draw five to seven slices of each plane, spread over the brain, and cut to what is labelled.

    Parameters
    ----------
    labels : ids (D, H, W) on the grid of ``volume``. Raises LabelError for one that ``table`` does not have.
    width_px : of the mosaic, at most; the thumbnail has a size of its own.
    """
    ras = canonical(volume)
    indices = _indices(canonical(Volume(labels, volume.affine)).data, table)
    box = bounding_box(indices > 0, ras.spacing_mm)
    brain = tissue_mask(table, BRAIN_TISSUES)[indices]
    seen = brain if brain.any() else indices > 0
    widths_mm = [(box[across][1] - box[across][0]) * ras.spacing_mm[across] for _, _, across, _, _ in PLANES]
    counts = [min(MOST_SLICES, int(SLICES * max(widths_mm) / width)) for width in widths_mm]
    positions = [slice_positions(seen, PLANES[i][1], box[PLANES[i][1]], counts[i]) for i in range(3)]
    window = grey_window(ras.data)
    drawing = _Drawing(ras, indices, table, box, window, io_orientation(volume.affine), volume.data.shape)
    cells, size = _layout(positions, box, ras.spacing_mm, (width_px, HEIGHT_PX), one_row=False)
    middle = [slice_positions(seen, axis, box[axis], 1) for _, axis, _, _, _ in PLANES]
    small_cells, small_size = _layout(middle, box, ras.spacing_mm, THUMBNAIL_PX, one_row=True)
    present = [int(index) for index in np.flatnonzero(np.bincount(indices.ravel(), minlength=len(table))) if index > 0]
    return Mosaic(
        grey=_encode(drawing.grey(cells, size), quality=_GREY_QUALITY, method=4),
        outlines=_encode(drawing.outlines(cells, size), lossless=True, quality=60, method=4),
        size=size,
        thumbnail=_encode(drawing.colored(small_cells, small_size), quality=_THUMBNAIL_QUALITY, method=4),
        thumbnail_size=small_size,
        legend=tuple((table.names[index], _line_color(table, index)) for index in present),
    )


# ---------------------------------------------------------------------------------------------- what is shown


def grey_window(data: np.ndarray) -> tuple[float, float]:
    """Darkest and brightest grey: percentiles of the finite voxels (a sample of them), CT limited to soft tissue."""
    step = max(1, round((data.size / _SAMPLE_VOXELS) ** (1 / 3)))
    sample = data[::step, ::step, ::step]
    finite = sample[np.isfinite(sample)]
    if finite.size == 0 or finite.min() == finite.max():  # what has contrast lies between: look at all
        finite = data[np.isfinite(data)]
    low, high = np.percentile(finite, [1, 99.8])
    if low < -500:
        low, high = -100.0, min(high, 200.0)
    if high <= low:
        low, high = float(finite.min()), float(finite.max())
    return float(low), float(high)


def bounding_box(mask: np.ndarray, spacing_mm: Sequence[float]) -> list[tuple[int, int]]:
    """First and one past the last index of the mask along each axis, with a margin; all if it is empty."""
    box = []
    for axis in range(3):
        filled = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        margin = int(np.ceil(MARGIN_MM / spacing_mm[axis]))
        if filled.size == 0:
            return [(0, n) for n in mask.shape]
        box.append((max(0, int(filled[0]) - margin), min(mask.shape[axis], int(filled[-1]) + 1 + margin)))
    return box


def slice_positions(mask: np.ndarray, axis: int, limits: tuple[int, int], count: int) -> np.ndarray:
    """Evenly spread positions within the range of a mask along an axis, its very ends left out; fewer if it is thin."""
    filled = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
    first, last = (filled[0], filled[-1]) if filled.size else (limits[0], limits[1] - 1)
    return np.unique(np.round(np.linspace(first, last, count + 2)[1:-1]).astype(int))


def take_slice(data: np.ndarray, axis: int, position: int, box: Sequence[tuple[int, int]]) -> np.ndarray:
    """One slice inside the box; of the two remaining axes the later one runs up, along the rows."""
    window: list[Any] = [slice(*limits) for limits in box]
    window[axis] = position
    return data[tuple(window)].T


def _indices(labels: np.ndarray, table: LabelTable) -> np.ndarray:
    """`LabelTable.to_index` by counting instead of sorting every voxel."""
    if not np.issubdtype(labels.dtype, np.integer):
        labels = labels.astype(np.int32)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > MAX_ID:
        return table.to_index(labels)  # raises
    counts = np.zeros(high + 1, dtype=np.int64)
    for plane in labels:
        counts += np.bincount(plane.ravel(), minlength=high + 1)
    present = np.flatnonzero(counts)
    lut = np.zeros(high + 1, dtype=np.uint8)
    lut[present] = table.to_index(present)
    return lut[labels]


def _line_color(table: LabelTable, index: int) -> tuple[int, int, int]:
    label = table.labels[index]
    return _LINE_COLORS.get(label.tissue, label.color)


# ---------------------------------------------------------------------------------------------- how it is drawn


def _layout(
    positions: Sequence[np.ndarray],
    box: Sequence[tuple[int, int]],
    spacing_mm: Sequence[float],
    most_px: tuple[int, int],
    one_row: bool,
) -> tuple[list[_Cell], tuple[int, int]]:
    """Place the slices at one scale, centred: a row for each plane, or all in one row."""
    sides_mm = [(box[axis][1] - box[axis][0]) * spacing_mm[axis] for axis in range(3)]
    placed = [(plane, int(position)) for plane, of_plane in enumerate(positions) for position in of_plane]
    caption = 0 if one_row else CAPTION_PX
    rows = [placed] if one_row else [[cell for cell in placed if cell[0] == plane] for plane in range(3)]

    def width_mm(row: list[tuple[int, int]]) -> float:
        return sum(sides_mm[PLANES[plane][2]] for plane, _ in row)

    def height_mm(row: list[tuple[int, int]]) -> float:
        return max(sides_mm[PLANES[plane][3]] for plane, _ in row)

    scale = min(
        *((most_px[0] - (len(row) - 1) * GAP_PX) / width_mm(row) for row in rows),
        (most_px[1] - (len(rows) - 1) * GAP_PX - len(rows) * caption) / sum(map(height_mm, rows)),
    )
    widths = [max(1, int(sides_mm[across] * scale)) for _, _, across, _, _ in PLANES]
    heights = [max(1, int(sides_mm[up] * scale)) for _, _, _, up, _ in PLANES]
    total = max(sum(widths[plane] + GAP_PX for plane, _ in row) for row in rows) - GAP_PX
    cells = []
    top = 0
    for row in rows:
        gap = (total - sum(widths[plane] for plane, _ in row)) / (len(row) + 1)  # between the slices and at both ends
        height = max(heights[plane] for plane, _ in row)
        left = gap
        for plane, position in row:
            cells.append(
                _Cell(plane, position, int(left), top + (height - heights[plane]) // 2, widths[plane], heights[plane])
            )
            left += widths[plane] + gap
        top += height + caption + GAP_PX
    return cells, (total, top - GAP_PX)


@dataclass(frozen=True)
class _Drawing:
    """What all pictures of a scan share. ``indices`` (D, H, W) are class indices on the grid of ``ras``."""

    ras: Volume
    indices: np.ndarray
    table: LabelTable
    box: list[tuple[int, int]]
    window: tuple[float, float]
    orientation: np.ndarray
    file_shape: tuple[int, ...]

    def grey(self, cells: Sequence[_Cell], size: tuple[int, int]) -> Image:
        """The slices in grey (L); below them letters for the sides and the index of each slice in its file."""
        from PIL import Image, ImageDraw, ImageFont

        canvas = Image.new("L", size, 0)
        for cell in cells:
            canvas.paste(self._grey_slice(cell), (cell.left, cell.top))
        pen = ImageDraw.Draw(canvas)
        large, small = ImageFont.load_default(17), ImageFont.load_default(13)
        begun: set[int] = set()
        for cell in cells:
            left, right, below = cell.left, cell.left + cell.width, cell.top + cell.height + CAPTION_PX - 4
            if cell.plane not in begun:
                begun.add(cell.plane)
                sides = PLANES[cell.plane][4]
                pen.text((left + 2, below), sides[0], fill=255, anchor="ls", font=large)
                pen.text((right - 2, below), sides[1], fill=255, anchor="rs", font=large)
            pen.text(((left + right) / 2, below), self._file_index(cell), fill=190, anchor="ms", font=small)
        return canvas

    def outlines(self, cells: Sequence[_Cell], size: tuple[int, int]) -> Image:
        """Lines of one pixel between the structures (RGBA), in the colour of the inner one."""
        from PIL import Image

        rank = np.array([_rank(label.tissue) for label in self.table.labels])
        rank[0] = len(_INNER_FIRST) + 1
        canvas = np.zeros((size[1], size[0], 4), dtype=np.uint8)
        colors = np.array([_line_color(self.table, index) for index in range(len(self.table))], dtype=np.uint8)
        for cell in cells:
            classes = self._class_slice(cell)
            line = _inner_edges(classes, rank)
            part = canvas[cell.top : cell.top + cell.height, cell.left : cell.left + cell.width]
            part[line, :3] = colors[classes[line]]
            part[line, 3] = 255
        return Image.fromarray(canvas)

    def colored(self, cells: Sequence[_Cell], size: tuple[int, int]) -> Image:
        """The slices with the labels in translucent colour (RGB)."""
        from PIL import Image

        canvas = np.zeros((size[1], size[0], 3), dtype=np.float32)
        for cell in cells:
            classes = self._class_slice(cell)
            grey = np.asarray(self._grey_slice(cell), dtype=np.float32)[..., None]
            opacity = np.where(classes == 0, 0, _THUMBNAIL_OPACITY)[..., None]
            color = self.table.colors[classes].astype(np.float32)
            part = canvas[cell.top : cell.top + cell.height, cell.left : cell.left + cell.width]
            part[:] = (1 - opacity) * grey + opacity * color
        return Image.fromarray(canvas.astype(np.uint8))

    def _grey_slice(self, cell: _Cell) -> Image:
        from PIL import Image

        low, high = self.window
        data = take_slice(self.ras.data, PLANES[cell.plane][1], cell.position, self.box)
        data = np.nan_to_num(data.astype(np.float32), nan=low, posinf=high, neginf=low)
        scaled = np.clip((data - low) / max(high - low, 1e-12), 0, 1) * 255
        picture = Image.fromarray(np.ascontiguousarray(scaled[::-1]).astype(np.uint8))
        return picture.resize((cell.width, cell.height), Image.Resampling.BICUBIC)

    def _class_slice(self, cell: _Cell) -> np.ndarray:
        """Class indices in the pixels of a cell: that with the largest share where voxels are blended linearly."""
        from PIL import Image

        classes = take_slice(self.indices, PLANES[cell.plane][1], cell.position, self.box)[::-1]
        size = (cell.width, cell.height)
        result = np.zeros((cell.height, cell.width), dtype=np.uint8)
        most = np.zeros(result.shape, dtype=np.float32)
        for index in np.unique(classes):
            share = Image.fromarray((classes == index).astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
            larger = np.asarray(share) > most
            most[larger] = np.asarray(share)[larger]
            result[larger] = index
        return result

    def _file_index(self, cell: _Cell) -> str:
        """The position of the slice as a viewer of the file counts it: "k 84" is index 84 of its third axis."""
        ras_axis = PLANES[cell.plane][1]
        file_axis = int(np.flatnonzero(self.orientation[:, 0] == ras_axis)[0])
        flipped = self.orientation[file_axis, 1] < 0
        index = self.file_shape[file_axis] - 1 - cell.position if flipped else cell.position
        return f"{'ijk'[file_axis]} {index}"


def _rank(tissue: str) -> int:
    return _INNER_FIRST.index(tissue) if tissue in _INNER_FIRST else len(_INNER_FIRST)


def _inner_edges(classes: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Pixels (H, W) beside another structure, each border on its inner side only: lines of one pixel."""
    edge = np.zeros(classes.shape, dtype=bool)
    whole, later, earlier = slice(None), slice(1, None), slice(None, -1)
    for one, other in (((later, whole), (earlier, whole)), ((whole, later), (whole, earlier))):
        a, b = classes[one], classes[other]
        differ = a != b
        a_inner = rank[a] < rank[b]
        edge[one] |= differ & a_inner
        edge[other] |= differ & ~a_inner
    return edge


def _encode(picture: Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", **options)
    return buffer.getvalue()
