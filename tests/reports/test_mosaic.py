"""The pictures of the report: left is left, true proportions, slices that a viewer of the file would find."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from synthseg.errors import LabelError
from synthseg.labels import load_scheme
from synthseg.reports.mosaic import draw_mosaic, grey_window
from synthseg.volume import Volume

TABLE = load_scheme("siam16")


def head() -> tuple[Volume, np.ndarray]:
    """A block of brain: thalamus is its left half, putamen its right half in front, cortex the rest.

    Stored left-posterior-superior, in slices of 4 mm.
    """
    labels = np.zeros((60, 72, 20), np.uint8)
    labels[6:54, 6:66, 2:18] = 1
    labels[30:54, 6:66, 2:18] = 6  # high index of the first axis: left
    labels[6:30, 6:36, 2:18] = 8  # low index of the second axis: front
    data = labels.astype(np.float32) * 20 + 10
    return Volume(data, np.diag([-1.5, -1.5, 4.0, 1.0])), labels


def rgba(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGBA")).astype(int)


def near(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return (np.abs(picture[..., :3] - color).max(-1) < 12) & (picture[..., 3] > 0)


def slices_of(lines: np.ndarray) -> list[list[np.ndarray]]:
    """The slices of the three planes, cut out of the picture of outlines by the gaps between them."""

    def parts(filled: np.ndarray) -> list[slice]:
        where = np.flatnonzero(filled)
        return [slice(part[0], part[-1] + 1) for part in np.split(where, np.flatnonzero(np.diff(where) > 1) + 1)]

    shown = lines[..., 3] > 0
    planes = [lines[rows] for rows in parts(shown.any(1))]
    return [[plane[:, columns] for columns in parts((plane[..., 3] > 0).any(0))] for plane in planes]


def centre(where: np.ndarray) -> np.ndarray:
    """Mean row and column."""
    assert where.any()
    return np.argwhere(where).mean(0)


def test_left_is_left_front_is_up_or_right() -> None:
    volume, labels = head()
    mosaic = draw_mosaic(volume, labels, TABLE)
    lines = rgba(mosaic.outlines)
    assert rgba(mosaic.grey).shape == lines.shape == (mosaic.size[1], mosaic.size[0], 4)
    axial, coronal, sagittal = slices_of(lines)
    assert (len(axial), len(coronal), len(sagittal)) == (6, 6, 5)
    for picture in axial:
        thalamus, putamen = centre(near(picture, TABLE[6].color)), centre(near(picture, TABLE[8].color))
        assert thalamus[1] < picture.shape[1] / 2 < putamen[1]
        assert putamen[0] < picture.shape[0] / 2  # row 0 is the top, the front of the head
    for picture in coronal[3:]:  # from back to front
        assert centre(near(picture, TABLE[6].color))[1] < centre(near(picture, TABLE[8].color))[1]
    assert not near(coronal[0], TABLE[8].color).any()
    for picture in sagittal[:2]:  # from left to right
        assert not near(picture, TABLE[8].color).any()
    for picture in sagittal[3:]:
        assert centre(near(picture, TABLE[8].color))[1] > picture.shape[1] / 2  # the nose points to the right
    assert mosaic.legend == tuple((TABLE[i].name, TABLE[i].color) for i in (1, 6, 8))
    thumbnail = rgba(mosaic.thumbnail)
    assert thumbnail.shape[:2] == mosaic.thumbnail_size[::-1]


def test_the_grey_slices_lie_under_their_outlines() -> None:
    volume, labels = head()
    mosaic = draw_mosaic(volume, labels, TABLE)
    grey, lines = rgba(mosaic.grey)[..., 0], rgba(mosaic.outlines)
    inside = ndimage.binary_erosion(ndimage.binary_fill_holes(near(lines, TABLE[8].color)), iterations=6)
    assert inside.sum() > 1000
    assert np.percentile(grey[inside], 2) > 230  # the brightest voxels of the scan, but for the text on them
    assert grey[:3].mean() < 30


def test_proportions_are_true() -> None:
    """The outlines of the brain have the sides of its block, 72 × 90 × 64 mm, in each plane at one scale."""
    volume, labels = head()
    mosaic = draw_mosaic(volume, np.minimum(labels, 1), TABLE)
    axial, coronal, sagittal = (plane[0].shape[:2] for plane in slices_of(rgba(mosaic.outlines)))
    px_per_mm = axial[1] / 72
    assert axial[0] / px_per_mm == pytest.approx(90, abs=1.5)
    assert (coronal[1] / px_per_mm, coronal[0] / px_per_mm) == pytest.approx((72, 64), abs=1.5)
    assert (sagittal[1] / px_per_mm, sagittal[0] / px_per_mm) == pytest.approx((90, 64), abs=1.5)


def test_slices_are_named_by_their_index_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A marked voxel lies in the slice that is said, whatever the order of the file's axes."""
    drawn: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, text, **style: drawn.append(text))
    volume, labels = head()
    swapped = Volume(volume.data.transpose(2, 0, 1), volume.affine[:, [2, 0, 1, 3]])
    draw_mosaic(swapped, labels.transpose(2, 0, 1), TABLE)
    names = [name for name in drawn if name[0] in "ijk"]
    assert [name[0] for name in names] == ["i"] * 6 + ["k"] * 6 + ["j"] * 5
    # The brain fills 2..17 (up), 6..65 (to the back) and 6..53 (to the left), ends left out: 2 + 15 n / 7, and so on.
    assert names[:6] == [f"i {round(2 + 15 * n / 7)}" for n in range(1, 7)]
    assert names[6:12] == [f"k {71 - round(6 + 59 * n / 7)}" for n in range(1, 7)]  # drawn from back to front
    assert names[12:] == [f"j {59 - round(6 + 47 * n / 6)}" for n in range(1, 6)]  # drawn from left to right
    assert [name for name in drawn if name[0] in "LRPA"] == ["L", "R", "L", "R", "P", "A"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_an_id_that_the_table_does_not_have_is_an_error(dtype: type) -> None:
    volume, labels = head()
    labels = labels.astype(dtype)
    labels[0, 0, 0] = 99
    with pytest.raises(LabelError, match="99"):
        draw_mosaic(volume, labels, TABLE)


def test_ids_above_255_are_drawn() -> None:
    table = load_scheme("head")
    volume, labels = head()
    mosaic = draw_mosaic(volume, np.where(labels > 0, 515, 0).astype(np.int16), table)
    assert [name for name, _ in mosaic.legend] == [table[515].name]


@pytest.mark.parametrize("shape", [(1, 8, 9), (7, 1, 8), (7, 8, 1), (1, 1, 1), (2, 300, 3)])
def test_few_slices_and_no_labels_can_be_drawn(shape: tuple[int, int, int]) -> None:
    data = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    data[0, 0, 0] = np.nan
    if data.size == 1:
        data[:] = 5
    mosaic = draw_mosaic(Volume(data, np.eye(4)), np.zeros(shape, np.uint8), TABLE)
    assert rgba(mosaic.grey).shape[:2] == mosaic.size[::-1]
    assert max(mosaic.size) <= 1400
    assert not rgba(mosaic.outlines)[..., 3].any()
    assert mosaic.legend == ()


def test_a_smaller_picture_can_be_asked_for() -> None:
    volume, labels = head()
    small, large = draw_mosaic(volume, labels, TABLE, 500), draw_mosaic(volume, labels, TABLE)
    assert small.size[0] <= 500 < large.size[0] <= 1400
    assert small.thumbnail == large.thumbnail


def test_each_border_is_one_line_in_the_colour_of_the_inner_structure() -> None:
    volume, labels = head()
    lines = rgba(draw_mosaic(volume, labels, TABLE).outlines)
    shown = {tuple(color) for color in lines[lines[..., 3] > 0][:, :3].tolist()}
    assert shown == {TABLE[i].color for i in (1, 6, 8)}
    between = slices_of(lines)[0][0][-20, 5:-5]  # through thalamus and cortex
    assert np.flatnonzero(between[:, 3]).size == 1
    assert near(between[None], TABLE[6].color).sum() == 1


def test_grey_levels() -> None:
    rng = np.random.default_rng(0)
    ct = rng.uniform(-1000, 1500, (40, 41, 42)).astype(np.float32)
    assert grey_window(ct) == (-100, 200)
    mr = rng.uniform(0, 1000, (40, 41, 42)).astype(np.float32)
    mr[:5] = np.nan
    low, high = grey_window(mr)
    assert low == pytest.approx(10, abs=3)
    assert high == pytest.approx(998, abs=3)
    rare = np.zeros((200, 200, 200), np.float32)
    rare[101, 101, 101] = 7
    assert grey_window(rare) == (0, 7)
