"""One picture of a segmentation: slices of three planes with the labels laid over them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthseg.labels import LabelTable
from synthseg.reports import plain
from synthseg.reports.mosaic import PLANES, bounding_box, grey_window, slice_positions, take_slice
from synthseg.volume import Volume, atomic_path, canonical

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SLICES = 5
_OPACITY = 0.4


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
    low, high = grey_window(ras.data)
    labelled = indices > 0
    box = bounding_box(labelled, ras.spacing_mm)

    figure = Figure(figsize=(13, 8.2), dpi=110, facecolor="black")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, _SLICES, left=0.02, right=0.82, bottom=0.02, top=0.92, wspace=0.03, hspace=0.06)
    for row, (plane, axis, across, up, sides) in enumerate(PLANES):
        for column, position in enumerate(slice_positions(labelled, axis, box[axis], _SLICES)):
            axes = figure.add_subplot(grid[row, column])
            grey = take_slice(ras.data, axis, position, box)
            color = take_slice(indices, axis, position, box)
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
    title = plain(title).replace("$", r"\$")  # not mathematics
    figure.suptitle(f"{title}   (left of the picture is left of the head)".strip(), color="white", fontsize=11)
    return figure


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
