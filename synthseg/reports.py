"""What people look at after a run: a table of volumes, and pictures of the segmentation on the scan."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthseg.inference import Segmentation
from synthseg.labels import INTRACRANIAL_TISSUES, PARENCHYMA_TISSUES, LabelTable, tissue_mask
from synthseg.volume import Volume, atomic_path, canonical, write_text_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SLICES = 5
_MARGIN_MM = 6.0
_OPACITY = 0.4
# Name of the plane, the axis across it, horizontal and vertical axis of the picture, letters on its sides.
_PLANES = (("axial", 2, 0, 1, "LR"), ("coronal", 1, 0, 2, "LR"), ("sagittal", 0, 1, 2, "PA"))

# ------------------------------------------------------------------------------------------------ volumes


def volume_row(scan: str, segmentation: Segmentation, table: LabelTable) -> dict[str, str | float]:
    """One row of the table of volumes.

    ``intracranial`` is brain, ventricles and CSF; ``brain`` is grey and white matter with deep nuclei,
    cerebellum and brain stem, without ventricles. ``_ml`` counts voxels, ``_soft_ml`` sums probabilities.
    """
    row: dict[str, str | float] = {"scan": scan}
    for name, tissues in (("intracranial", INTRACRANIAL_TISSUES), ("brain", PARENCHYMA_TISSUES)):
        members = [table.names[index] for index in np.flatnonzero(tissue_mask(table, tissues))]
        row[f"{name}_ml"] = sum(segmentation.hard_ml[member] for member in members)
        row[f"{name}_soft_ml"] = sum(segmentation.soft_ml[member] for member in members)
    for name in table.names[1:]:
        row[f"{name}_ml"] = segmentation.hard_ml[name]
        row[f"{name}_soft_ml"] = segmentation.soft_ml[name]
    return row


def write_volumes_csv(path: str | Path, rows: Sequence[Mapping[str, str | float]]) -> None:
    """Write rows of one structure each as CSV, volumes with three decimals (0.001 ml = 1 mm³)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0].keys() if rows else ["scan"])
    for row in rows:
        writer.writerow([value if isinstance(value, str) else f"{value:.3f}" for value in row.values()])
    write_text_atomically(path, text.getvalue())


# ----------------------------------------------------------------------------------------------- pictures


def write_overview(path: str | Path, volume: Volume, labels: np.ndarray, table: LabelTable, title: str = "") -> None:
    """Write a PNG of three planes × five slices: the scan in grey, labels in colour. Left is left.

    ``labels`` are ids (D, H, W) on the grid of ``volume``. Slices are spread over the labelled part of the
    scan, and voxels are drawn in their true proportions.
    """
    figure = overview_figure(volume, labels, table, title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="black")


def overview_figure(volume: Volume, labels: np.ndarray, table: LabelTable, title: str = "") -> Figure:
    """The picture of `write_overview` as a matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ras = canonical(volume)
    indices = table.to_index(canonical(Volume(labels, volume.affine)).data, where=title or "label map")
    low, high = _window(ras.data)
    box = _bounding_box(indices > 0, ras.spacing_mm)

    figure = Figure(figsize=(13, 8.2), dpi=110, facecolor="black")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, _SLICES, left=0.02, right=0.82, bottom=0.02, top=0.92, wspace=0.03, hspace=0.06)
    for row, (plane, axis, across, up, sides) in enumerate(_PLANES):
        for column, position in enumerate(_slice_positions(indices, axis, box[axis])):
            axes = figure.add_subplot(grid[row, column])
            grey = _slice(ras.data, axis, position, box)
            color = _slice(indices, axis, position, box)
            extent_mm = (0, grey.shape[1] * ras.spacing_mm[across], 0, grey.shape[0] * ras.spacing_mm[up])
            axes.imshow(grey, cmap="gray", vmin=low, vmax=high, origin="lower", extent=extent_mm, aspect="equal")
            axes.imshow(_rgba(color, table), origin="lower", extent=extent_mm, aspect="equal", interpolation="nearest")
            axes.set_axis_off()
            if column == 0:
                _write_sides(axes, plane, sides)
    present = [index for index in np.unique(indices) if index > 0]
    handles = [Patch(facecolor=table.colors[i] / 255, label=table.names[i]) for i in present]
    if handles:
        size = min(9.0, 400 / len(handles))
        figure.legend(handles=handles, loc="center right", frameon=False, labelcolor="white", fontsize=size)
    title = title.replace("$", r"\$")  # not mathematics
    figure.suptitle(f"{title}   (left of the picture is left of the head)".strip(), color="white", fontsize=11)
    return figure


def _window(data: np.ndarray) -> tuple[float, float]:
    """Darkest and brightest grey: percentiles of the finite voxels, CT limited to soft tissue."""
    finite = data[np.isfinite(data)]
    low, high = np.percentile(finite[:: max(1, finite.size // 1_000_000)], [1, 99.5])
    if low < -500:
        low, high = -100.0, min(high, 200.0)
    if high <= low:
        low, high = float(finite.min()), float(finite.max())
    return float(low), float(high)


def _bounding_box(mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> list[tuple[int, int]]:
    """First and one past the last index of the mask along each axis, with a margin; all if it is empty."""
    box = []
    for axis in range(3):
        filled = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        margin = int(np.ceil(_MARGIN_MM / spacing_mm[axis]))
        if filled.size == 0:
            return [(0, n) for n in mask.shape]
        box.append((max(0, int(filled[0]) - margin), min(mask.shape[axis], int(filled[-1]) + 1 + margin)))
    return box


def _slice_positions(indices: np.ndarray, axis: int, limits: tuple[int, int]) -> np.ndarray:
    """Evenly spread positions within the labelled range of an axis, its very ends left out."""
    filled = np.flatnonzero((indices > 0).any(axis=tuple(a for a in range(3) if a != axis)))
    first, last = (filled[0], filled[-1]) if filled.size else (limits[0], limits[1] - 1)
    return np.round(np.linspace(first, last, _SLICES + 2)[1:-1]).astype(int)


def _slice(data: np.ndarray, axis: int, position: int, box: Sequence[tuple[int, int]]) -> np.ndarray:
    """One slice inside the box; of the two remaining axes the later one runs up, along the rows."""
    window: list[Any] = [slice(*limits) for limits in box]
    window[axis] = position
    return data[tuple(window)].T


def _rgba(indices: np.ndarray, table: LabelTable) -> np.ndarray:
    """Translucent colours with opaque outlines, float (H, W, 4); background is transparent."""
    outline = np.zeros(indices.shape, dtype=bool)
    outline[1:] |= indices[1:] != indices[:-1]
    outline[:, 1:] |= indices[:, 1:] != indices[:, :-1]
    rgba = np.zeros((*indices.shape, 4))
    rgba[..., :3] = table.colors[indices] / 255
    rgba[..., 3] = np.where(indices == 0, 0.0, np.where(outline, 0.75, _OPACITY))
    return rgba


def _write_sides(axes: Axes, plane: str, sides: str) -> None:
    style: dict[str, Any] = {"fontsize": 10, "bbox": {"facecolor": "black", "alpha": 0.5, "pad": 1.5, "lw": 0}}
    for letter, x, align in ((sides[0], 0.0, "left"), (sides[1], 1.0, "right")):
        axes.text(x, 0.5, letter, color="white", transform=axes.transAxes, ha=align, va="center", **style)
    axes.text(0.0, 1.0, plane, color="white", transform=axes.transAxes, ha="left", va="top", fontsize=9)
