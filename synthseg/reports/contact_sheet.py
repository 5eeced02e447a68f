"""Contact sheets: many images with their label maps on one picture, to look at before anything is trained on them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from synthseg.labels import LabelTable
from synthseg.reports import plain
from synthseg.volume import atomic_path

PLANES = (2, 1, 0)  # the axes across axial, coronal and sagittal slices
PANEL_PX = 160  # longest side of a slice on the sheet
GAP_PX = 4
TITLE_PX = 16
SHEET_RATIO = 1.4  # width over height that is aimed at
DPI = 100


class ContactSheet:
    """One row per image: its middle slices in three planes, and the same slices of the label map beside them.

    Only the pixels of the slices are kept, so a sheet of many images stays small. Rows go on in further columns where
    that makes the sheet less tall.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[str, np.ndarray]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, image: np.ndarray, labels: np.ndarray, table: LabelTable, title: str = "") -> None:
        """Add an image (D, H, W) in [0, 1] and its labels (D, H, W), indices into the table; RAS+, isotropic voxels."""
        grey = np.repeat(np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)[..., None], 3, axis=-1)
        panels = [_panel(volume, axis) for volume in (grey, table.colors[labels]) for axis in PLANES]
        self._rows.append((title, _side_by_side(panels)))

    def pixels(self) -> tuple[np.ndarray, list[tuple[int, int, str]]]:
        """The sheet, uint8 (H, W, 3), and x, y (from the top left) and text of each title."""
        if not self._rows:
            raise ValueError("the contact sheet is empty; add an image first")
        height = max(row.shape[0] for _, row in self._rows) + TITLE_PX
        width = max(row.shape[1] for _, row in self._rows) + 3 * GAP_PX
        count = len(self._rows)
        columns = min(range(1, count + 1), key=lambda c: _oddness(c * width, math.ceil(count / c) * height))
        lines = math.ceil(count / columns)
        sheet = np.zeros((lines * height, columns * width, 3), np.uint8)
        titles = []
        for number, (title, row) in enumerate(self._rows):
            top, left = number % lines * height, number // lines * width
            sheet[top + TITLE_PX : top + TITLE_PX + row.shape[0], left : left + row.shape[1]] = row
            titles.append((left + 2, top + TITLE_PX // 2, title))
        return sheet, titles

    def write(self, path: str | Path) -> None:
        """Write the sheet as PNG, whole or not at all."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        sheet, titles = self.pixels()
        height, width = sheet.shape[:2]
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="black")
        FigureCanvasAgg(figure)
        figure.figimage(sheet)
        for x, y, title in titles:
            text = plain(title).replace("$", r"\$")  # not mathematics
            figure.text(x / width, 1 - y / height, text, color="white", fontsize=7.5, va="center")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", facecolor="black")


def _oddness(width: int, height: int) -> float:
    return abs(math.log(width / height / SHEET_RATIO))


def _panel(volume: np.ndarray, axis: int) -> np.ndarray:
    """The middle slice of (D, H, W, 3) across an axis: left of the head to the left, top or front up."""
    plane = np.take(volume, volume.shape[axis] // 2, axis=axis).swapaxes(0, 1)[::-1]
    longest = max(plane.shape[:2])
    size = [max(1, round(n * PANEL_PX / longest)) for n in plane.shape[:2]]
    rows, columns = ((np.arange(n) * old // n) for n, old in zip(size, plane.shape[:2], strict=True))
    return np.asarray(plane[rows][:, columns])


def _side_by_side(panels: list[np.ndarray]) -> np.ndarray:
    height = max(panel.shape[0] for panel in panels)
    parts = []
    for panel in panels:
        top = (height - panel.shape[0]) // 2
        parts.append(np.pad(panel, ((top, height - panel.shape[0] - top), (0, GAP_PX), (0, 0))))
    return np.concatenate(parts, axis=1)
