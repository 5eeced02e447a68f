"""The contact sheet: which pixels of an image end up where."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from synthseg.labels import LabelTable
from synthseg.reports.contact_sheet import GAP_PX, PANEL_PX, TITLE_PX, ContactSheet

SHAPE = (6, 10, 8)


def marked() -> tuple[np.ndarray, np.ndarray]:
    """A dark image, bright at the head's left, front and top; a label at its right."""
    image = np.zeros(SHAPE, np.float32)
    image[0, 5, 4], image[3, 9, 4], image[3, 5, 7] = 1.0, 1.0, 1.0
    labels = np.zeros(SHAPE, np.uint8)
    labels[5, 5, 4] = 3
    return image, labels


def panels(sheet: np.ndarray) -> list[np.ndarray]:
    """The six panels of a sheet with one row, of 6 x 10, 6 x 8 and 10 x 8 voxels, the longest side PANEL_PX."""
    sizes = [(PANEL_PX, PANEL_PX * 6 // 10), (PANEL_PX, PANEL_PX * 6 // 8), (PANEL_PX * 8 // 10, PANEL_PX)]
    found, left = [], 0
    for height, width in sizes * 2:
        top = TITLE_PX + (PANEL_PX - height) // 2
        found.append(sheet[top : top + height, left : left + width])
        left += width + GAP_PX
    return found


def test_planes_and_directions(head: LabelTable) -> None:
    sheet = ContactSheet()
    sheet.add(*marked(), head, "one")
    pixels, titles = sheet.pixels()
    assert [text for _, _, text in titles] == ["one"]
    axial, coronal, sagittal, *colored = panels(pixels)
    for name, panel, places in (
        ("axial", axial, [(0.45, 0.05), (0.05, 0.6)]),  # left at the left, front at the top
        ("coronal", coronal, [(0.45, 0.05), (0.05, 0.6)]),  # left at the left, top at the top
        ("sagittal", sagittal, [(0.45, 0.97), (0.05, 0.55)]),  # front at the right, top at the top
    ):
        height, width = panel.shape[:2]
        for down, right in places:
            assert panel[int(down * height), int(right * width), 0] == 255, (name, down, right)
        assert 0.02 < (panel[..., 0] == 255).mean() < 0.1
    right_of_head = colored[0][int(0.45 * PANEL_PX), -2]
    np.testing.assert_array_equal(right_of_head, head.colors[3])
    assert (colored[2] == head.colors[0]).all()  # the label is not in the middle sagittal slice


def test_many_rows_go_on_in_further_columns(head: LabelTable) -> None:
    shapes = {}
    for count in (1, 2, 20):
        sheet = ContactSheet()
        for number in range(count):
            image, labels = marked()
            sheet.add(image * (number + 1) / count, labels, head, f"{number}")
        pixels, titles = sheet.pixels()
        assert len(sheet) == len(titles) == count
        assert len({(x, y) for x, y, _ in titles}) == count
        shapes[count] = pixels.shape
    assert shapes[2][0] == 2 * shapes[1][0]
    assert 0.6 < shapes[20][1] / shapes[20][0] < 3


def test_what_is_written_are_the_pixels_and_the_titles(head: LabelTable, tmp_path: Path) -> None:
    sheet = ContactSheet()
    with pytest.raises(ValueError, match="empty"):
        sheet.write(tmp_path / "grid.png")
    assert not list(tmp_path.iterdir())
    sheet.add(*marked(), head, os.fsdecode(b"caf\xe9 costs $5 and $6"))
    sheet.write(tmp_path / "grid.png")
    pixels, _ = sheet.pixels()
    written = np.round(255 * imread(tmp_path / "grid.png")[..., :3]).astype(int)
    assert written.shape == pixels.shape
    np.testing.assert_array_equal(written[TITLE_PX + 2 :], pixels[TITLE_PX + 2 :])
    assert written[:TITLE_PX].max() > 100
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_segmenting_does_not_load_it() -> None:
    code = "import sys, synthseg.batch.run, synthseg.reports; print('synthseg.reports.contact_sheet' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert done.stdout.strip() == "False"
