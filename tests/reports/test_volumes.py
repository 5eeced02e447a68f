"""The table of volumes and the overview picture."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from synthseg.inference import Segmentation
from synthseg.labels import load_scheme
from synthseg.quality import Quality
from synthseg.reports.overview import overview_figure, write_overview
from synthseg.reports.volumes import volume_row, write_volumes_csv
from synthseg.volume import Volume

TABLE = load_scheme("siam16")


def test_rows_by_hand(tmp_path: Path) -> None:
    hard_ml = dict.fromkeys(TABLE.names, 0.0) | {"Background": 999.0, "GM": 600.0, "WM": 400.5, "CSF": 200.25}
    hard_ml |= {"Ventricular-CSF": 30.0, "Skull": 700.0}
    soft_ml = {name: value + 1 for name, value in hard_ml.items()}
    segmentation = Segmentation(np.zeros((1, 1, 1)), np.eye(4), TABLE, hard_ml, soft_ml)
    rows = [volume_row("a, b.nii.gz", segmentation, TABLE), volume_row("c.nii", segmentation, TABLE)]
    write_volumes_csv(tmp_path / "volumes.csv", rows)
    with open(tmp_path / "volumes.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first)[:5] == ["scan", "intracranial_ml", "intracranial_soft_ml", "brain_ml", "brain_soft_ml"]
    assert list(first)[5:7] == ["GM_ml", "GM_soft_ml"]
    assert len(first) == 5 + 2 * 16
    assert (first["scan"], second["scan"]) == ("a, b.nii.gz", "c.nii")
    assert first["GM_ml"] == "600.000"
    assert first["brain_ml"] == "1000.500"
    assert first["intracranial_ml"] == "1230.750"
    assert float(first["brain_soft_ml"]) == pytest.approx(1000.5 + 10)  # ten structures of grey and white matter
    assert float(first["intracranial_soft_ml"]) == pytest.approx(1230.75 + 12)


def test_a_table_with_tabs_and_what_is_not_known(tmp_path: Path) -> None:
    volumes_ml = dict.fromkeys(TABLE.names, 1.0)
    judged = Segmentation(np.zeros((1, 1, 1)), np.eye(4), TABLE, volumes_ml, volumes_ml)
    rows = []
    for score, passed in ((0.8765, True), (None, False)):
        judged.quality = Quality({}, score, (), passed)
        rows.append(volume_row(f"{passed}", judged, TABLE))
    write_volumes_csv(tmp_path / "volumes.TSV", rows)
    lines = (tmp_path / "volumes.TSV").read_text().splitlines()
    assert lines[0].split("\t")[-2:] == ["predicted_dice", "passed"]
    assert lines[1].split("\t")[-2:] == ["0.876", "yes"]
    assert lines[2].split("\t")[-2:] == ["n/a", "no"]


def scan_with_marks() -> tuple[Volume, np.ndarray]:
    """A scan stored as left-posterior-superior; thalamus on the left, putamen on the right and in front."""
    data = np.random.default_rng(0).uniform(0, 100, (30, 24, 10)).astype(np.float32)
    labels = np.zeros(data.shape, np.uint8)
    labels[3:27, 3:21, 1:9] = 1
    labels[20:26, 8:16, 2:8] = 6  # high index of the first axis: left
    labels[4:10, 4:8, 2:8] = 8  # low index of the second axis: front
    return Volume(data, np.diag([-1.0, -1.5, 4.0, 1.0])), labels


def test_left_is_left_and_proportions_are_true() -> None:
    volume, labels = scan_with_marks()
    figure = overview_figure(volume, labels, TABLE, "scan")
    planes = [axes for axes in figure.axes if axes.images]
    assert len(planes) == 15
    axial = planes[2].images[1]
    assert axial.origin == "lower"
    rgba = axial.get_array()
    left, right = rgba[:, : rgba.shape[1] // 2], rgba[:, rgba.shape[1] // 2 :]

    def has(part: np.ndarray, label: int) -> bool:
        return bool((np.abs(part[..., :3] - TABLE.colors[label] / 255).max(-1) < 0.01).any())

    assert has(left, 6)
    assert not has(right, 6)
    assert has(right[rgba.shape[0] // 2 :], 8)
    assert not has(left, 8)
    assert not has(right[: rgba.shape[0] // 2], 8)
    for axes in planes:  # width and height of a pixel of each plane in mm
        x0, x1, y0, y1 = axes.images[0].get_extent()
        rows, columns = axes.images[0].get_array().shape
        spacing_mm = {0: (1.0, 1.5), 1: (1.0, 4.0), 2: (1.5, 4.0)}[planes.index(axes) // 5]
        assert ((x1 - x0) / columns, (y1 - y0) / rows) == pytest.approx(spacing_mm)
        assert axes.get_aspect() == 1
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == {"GM", "Thalamus", "Putamen"}


def test_the_picture_is_written(tmp_path: Path) -> None:
    volume, labels = scan_with_marks()
    write_overview(tmp_path / "a.png", volume, labels, TABLE, "scan")
    picture = imread(tmp_path / "a.png")
    assert picture.shape[0] > 500
    assert picture[..., :3].std() > 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_name_that_is_not_utf_8_is_written_with_signs_for_it() -> None:
    volume, labels = scan_with_marks()
    figure = overview_figure(volume, labels, TABLE, os.fsdecode(b"caf\xe9\t$1.nii.gz"))
    assert figure.get_suptitle().startswith("caf\N{REPLACEMENT CHARACTER} \\$1.nii.gz ")
    figure.canvas.draw()


@pytest.mark.parametrize("shape", [(1, 8, 9), (7, 8, 1)])
def test_an_empty_segmentation_of_few_slices_can_be_drawn(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    data = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    data[0, 0, 0] = np.nan
    write_overview(tmp_path / "a.png", Volume(data, np.eye(4)), np.zeros(shape, np.uint8), TABLE)
    assert (tmp_path / "a.png").stat().st_size > 1000
