"""Files that nibabel and the standard library read back, from arrays of every layout."""

import gzip
import importlib
import itertools
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from synthseg import image_writer
from synthseg.errors import OutputError
from synthseg.image_writer import fortran_order, write_image
from synthseg.volume import Volume, save_class_images, save_image, save_vectors

SHAPE = (7, 11, 5)


def some_data() -> np.ndarray:
    return np.arange(np.prod(SHAPE), dtype=np.int32).reshape(SHAPE)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flipped", [(), (0,), (1, 2), (0, 1, 2)])
def test_any_layout_becomes_first_axis_fastest(order: tuple[int, int, int], flipped: tuple[int, ...]) -> None:
    source = np.flip(np.ascontiguousarray(some_data().transpose(order)).transpose(np.argsort(order)), flipped)
    result = fortran_order(source, np.uint16)
    np.testing.assert_array_equal(result, np.flip(some_data(), flipped))
    assert result.flags.f_contiguous
    assert result.dtype == np.uint16


def test_an_array_in_the_right_layout_is_not_copied() -> None:
    data = np.asfortranarray(some_data())
    assert fortran_order(data, np.int32) is data


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.mgz", "a.mgh", "a.NII.GZ"])
def test_the_same_voxels_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    volume = Volume(some_data().astype(np.float32), np.diag([1.0, 2.0, 3.0, 1.0]))
    for folder in ("one", "two"):
        save_image(tmp_path / folder / name, volume)
    first, second = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
    assert first == second
    np.testing.assert_array_equal(nib.load(tmp_path / "one" / name).get_fdata(), some_data())
    if name.lower().endswith(("gz", "mgz")):
        assert first[:2] == b"\x1f\x8b"
        assert first[3:8] == bytes(5)  # no name, no time


def test_without_isal_the_standard_library_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isal", None)
    try:
        plain = importlib.reload(image_writer)
        assert plain._GzipFile is gzip.GzipFile
        plain.write_image(nib.Nifti1Image(some_data(), np.eye(4)), tmp_path / "a.nii.gz")
        header = nib.Nifti1Header()
        header.set_data_shape((*SHAPE, 2))
        header.set_data_dtype(np.int32)
        header.set_data_offset(352)
        both = np.stack([some_data(), -some_data()])
        plain.write_classes(tmp_path / "b.nii.gz", header, np.int32, [(slice(0, 7), both)])
    finally:
        monkeypatch.undo()
        importlib.reload(image_writer)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj), some_data())
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "b.nii.gz").dataobj), np.moveaxis(both, 0, -1))


def test_gzip_of_the_standard_library_reads_what_is_written(tmp_path: Path) -> None:
    write_image(nib.Nifti1Image(np.asfortranarray(some_data()), np.eye(4)), tmp_path / "a.nii.gz")
    raw = gzip.decompress((tmp_path / "a.nii.gz").read_bytes())
    assert raw[352:] == some_data().tobytes(order="F")


def blobs(n_classes: int, side: int, thickness: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Slabs along the first axis; class c holds c + 1 in a ball that moves with c, the middle class nothing."""
    x, y, z = np.ogrid[:side, :side, :side]
    for start in range(0, side, thickness):
        rows = slice(start, min(start + thickness, side))
        slab = np.zeros((n_classes, rows.stop - rows.start, side, side), np.uint16)
        for c in range(n_classes):
            if c != n_classes // 2:
                inside = (x[rows] - c) ** 2 + (y - side / 2) ** 2 + (z - 2 * c) ** 2 < (side / 4) ** 2
                slab[c][inside] = c + 1
        yield rows, slab


@pytest.mark.parametrize("thickness", [1, 7, 40])
def test_classes_are_stored_one_after_the_other(tmp_path: Path, thickness: int) -> None:
    side, n_classes = 40, 5
    like = Volume(np.zeros((side, side, side), np.float32), np.diag([1.0, 2.0, 3.0, 1.0]))
    shape = (side, side, side, n_classes)
    save_class_images(tmp_path / "a.nii.gz", blobs(n_classes, side, thickness), shape, np.uint16, 0.25, like, None, "x")
    image = nib.load(tmp_path / "a.nii.gz")
    assert image.shape == shape
    np.testing.assert_array_equal(image.affine, like.affine)
    whole = np.concatenate([slab for _, slab in blobs(n_classes, side, side)], axis=1)
    np.testing.assert_array_equal(image.get_fdata(), np.moveaxis(whole, 0, -1) * 0.25)
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]


def test_memory_is_bounded_by_a_slab_and_a_class(tmp_path: Path) -> None:
    side, n_classes = 72, 40
    like = Volume(np.zeros((side, side, side), np.uint8), np.eye(4))
    one_class = 2 * side**3
    tracemalloc.start()
    slabs = blobs(n_classes, side, 2)
    save_class_images(tmp_path / "a.nii.gz", slabs, (side, side, side, n_classes), np.uint16, 1.0, like)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * one_class  # all classes would be 40


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[slice, np.ndarray]]:
        yield slice(0, 4), np.ones((2, 4, 8, 8), np.uint16)
        raise OSError(28, "No space left on device")

    like = Volume(np.zeros((8, 8, 8)), np.eye(4))
    with pytest.raises(OutputError, match=r"a\.nii.*No space left"):
        save_class_images(tmp_path / "a.nii", failing(), (8, 8, 8, 2), np.uint16, 1.0, like)
    assert list(tmp_path.iterdir()) == []


def test_vectors_are_five_dimensional(tmp_path: Path) -> None:
    vectors = np.stack([some_data(), 2 * some_data(), -some_data()]).astype(np.float32)
    save_vectors(tmp_path / "v.nii.gz", vectors, np.diag([1.0, 2.0, 3.0, 1.0]))
    image = nib.load(tmp_path / "v.nii.gz")
    assert image.shape == (*SHAPE, 1, 3)
    assert image.header.get_intent()[0] == "vector"
    np.testing.assert_array_equal(np.moveaxis(image.get_fdata()[..., 0, :], -1, 0), vectors)
