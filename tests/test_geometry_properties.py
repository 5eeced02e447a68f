"""Any geometry, shape, number type and damage, from a file to labels on the scan's grid, with a stand-in network.

The landmark test itself, its stand-in and its independent reading of the result are those of benchmarks/geometry.py.
"""

from __future__ import annotations

import gzip
import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from synthseg import conforming, posteriors
from synthseg.errors import CheckpointError, InputError
from synthseg.image_files import as_float32
from synthseg.inference import Options, Segmentation, segment
from synthseg.volume import Volume, load_volume, save_label_map

ROOT = Path(__file__).resolve().parents[1]
PLAIN = Options(mixed_precision=False, quality=False)
EVERY_EXAMPLE = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def _benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_geometry", ROOT / "benchmarks" / "geometry.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_geometry"] = module
    spec.loader.exec_module(module)
    return module


geometry = _benchmark()


def labelled(data: np.ndarray, affine: np.ndarray, warnings: tuple[str, ...] = ()) -> Segmentation:
    return segment(Volume(data, affine, warnings=warnings), geometry.MODEL, "cpu", PLAIN)


def balls(shape: tuple[int, int, int] = (46, 40, 50), spacing_mm: tuple[float, ...] = (2.0, 2.3, 1.9)) -> Any:
    """A scan of the six landmarks as (data, affine)."""
    affine = np.diag([*spacing_mm, 1.0])
    return 100 * geometry.picture(affine, shape, geometry.places(affine, shape)), affine


# -------------------------------------------------------------------------------------------- landmarks


@st.composite
def cases(draw: st.DrawFn) -> Any:
    """A header of any kind around a field of view of about 92 mm."""
    suffix = draw(st.sampled_from(geometry.FORMATS))
    nifti = suffix != ".mgz"
    header = draw(st.sampled_from(["sform", "qform", "both", "disagree"])) if nifti else "sform"
    angle, shear = st.floats(-44, 44), st.floats(-0.4, 0.4) if header == "sform" else st.just(0.0)
    step = st.floats(1.2, 4.6)
    offset = st.one_of(st.floats(-200, 200), st.sampled_from([-1e6, 3e5]))
    return geometry.Case(
        orientation=draw(st.integers(0, 47)),
        angles_deg=(draw(angle), draw(angle), draw(angle)),
        shear=(draw(shear), draw(shear), draw(shear)),
        spacing_mm=(draw(step), draw(step), draw(step)),
        offset_mm=(draw(offset), draw(offset), draw(offset)),
        header=header,
        unit=draw(st.sampled_from(list(geometry.MM_PER_UNIT))) if nifti else "mm",
        suffix=suffix,
        dtype=draw(st.sampled_from(geometry.TYPES if nifti else geometry.MGH_TYPES)),
        big_endian=draw(st.booleans()) if nifti else False,
        slope=draw(st.sampled_from([1.0, 1e-4, 300.0])) if nifti else 1.0,
        inter=draw(st.sampled_from([0.0, -1024.0])) if nifti else 0.0,
        other_mm=draw(st.floats(1.2, 3.0)),
    )


@settings(EVERY_EXAMPLE, max_examples=25)
@given(case=cases())
def test_landmarks_come_back_within_half_a_voxel(case: Any, tmp_path: Path) -> None:
    assert geometry.check(case, tmp_path).problems == ()


def test_the_landmark_test_notices_a_mirrored_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the program reads, of what the network sees, and of what is written."""
    case = geometry.Case(spacing_mm=(2.2, 2.0, 2.4))
    assert geometry.check(case, tmp_path).problems == ()

    def mirrored(path: Path) -> Volume:
        volume = load_volume(path)
        return Volume(volume.data[::-1].copy(), volume.affine, volume.header)

    with monkeypatch.context() as patch:
        patch.setattr(geometry, "load_volume", mirrored)
        assert geometry.check(case, tmp_path).problems

    right_way_round = geometry.MODEL.network

    class Mirrored(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return right_way_round(image.flip(2)).flip(2)

    with monkeypatch.context() as patch:
        patch.setattr(geometry, "MODEL", geometry.StandIn(Mirrored()))
        assert geometry.check(case, tmp_path).problems

    def shifted(path: Path, labels: np.ndarray, *rest: Any) -> None:
        save_label_map(path, np.roll(labels, 1, 1), *rest)

    with monkeypatch.context() as patch:
        patch.setattr(geometry, "save_label_map", shifted)
        assert geometry.check(case, tmp_path).problems


def test_all_48_orientations_are_drawn() -> None:
    drawn = [geometry.Case(orientation=index).affine for index in range(48)]
    assert len({nib.aff2axcodes(affine) for affine in drawn}) == 48
    assert sorted({round(float(np.linalg.det(affine[:3, :3]))) for affine in drawn}) == [-8, 8]


# --------------------------------------------------------------------------------------------------- shapes


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    """From 1 to 600 voxels a side, at most 90,000 in all."""
    sides = [draw(st.integers(1, 600))]
    sides.append(draw(st.integers(1, max(1, min(600, 90_000 // sides[0])))))
    sides.append(draw(st.integers(1, max(1, min(600, 90_000 // (sides[0] * sides[1]))))))
    order = draw(st.permutations(range(3)))
    return sides[order[0]], sides[order[1]], sides[order[2]]


@settings(EVERY_EXAMPLE, max_examples=40)
@given(
    shape=shapes(), size=st.floats(0.05, 12.0), ratios=st.tuples(st.floats(0.2, 1), st.floats(0.2, 1)), data=st.data()
)
def test_any_shape_gives_labels_of_that_shape_and_volumes_that_add_up(
    shape: tuple[int, int, int], size: float, ratios: tuple[float, float], data: Any
) -> None:
    spacing_mm = (size, size * ratios[0], size * ratios[1])
    extent = np.array(shape) * spacing_mm
    assume(extent.max() <= 2500 and np.prod(np.maximum(extent, 2) / 2) < 4e5)
    seed = data.draw(st.integers(0, 99))
    values = np.random.default_rng(seed).normal(100, 40, shape).astype(np.float32)
    affine = geometry.Case(orientation=seed % 48, angles_deg=(9.0, -7.0, 5.0), spacing_mm=spacing_mm).affine
    result = labelled(values, affine)
    assert result.labels.shape == shape
    assert set(np.unique(result.labels)) <= {0, *geometry.IDS.values()}
    total_ml = np.prod(shape) * np.prod(spacing_mm) / 1000
    for volumes in (result.hard_ml, result.soft_ml):
        assert all(np.isfinite(v) and v >= 0 for v in volumes.values())
        assert sum(volumes.values()) == pytest.approx(total_ml, rel=2e-3)


@pytest.mark.parametrize("orientation", range(48))
def test_every_thickness_of_a_slab_gives_the_same(orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last slab of one plane, in an order that runs backwards, is contiguous for NumPy and refused by torch."""
    affine = geometry.Case(orientation=orientation, spacing_mm=(3.1, 2.2, 2.7)).affine
    shape = geometry.Case(spacing_mm=(3.1, 2.2, 2.7)).shape
    data = 100 * geometry.picture(affine, shape, geometry.places(affine, shape))
    whole = labelled(data, affine)
    assert set(np.unique(whole.labels)) == {0, *geometry.IDS.values()}
    for planes in (1, max(shape) - 1, 7):
        monkeypatch.setattr(conforming, "SLAB_VOXELS", planes * data.size // min(shape))
        monkeypatch.setattr(posteriors, "SLAB_BYTES", planes * 4 * 7 * data.size // min(shape))
        thin = labelled(data, affine)
        np.testing.assert_array_equal(thin.labels, whole.labels)
        assert thin.soft_ml == pytest.approx(whole.soft_ml, rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_network_that_gives_no_numbers_is_an_error(value: float) -> None:
    class Overflowing(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            logits = geometry.MODEL.network(image)
            logits[:, :, 5, 5, 5] = value
            return logits

    data, affine = balls((23, 20, 25), (4.0, 4.6, 3.8))
    with pytest.raises(CheckpointError, match="no numbers"):
        segment(Volume(data, affine), geometry.StandIn(Overflowing()), "cpu", PLAIN)


# -------------------------------------------------------------------------------------- numbers in the file


@settings(EVERY_EXAMPLE, max_examples=60)
@given(
    dtype=st.sampled_from(["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]),
    order=st.sampled_from("<>"),
    slope=st.one_of(st.just(1.0), st.floats(1e-6, 1e6), st.floats(-1e6, -1e-6)),
    inter=st.floats(-1e5, 1e5),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
    seed=st.integers(0, 999),
)
def test_numbers_of_every_type_and_scaling_are_read_as_the_standard_says(
    dtype: str, order: str, slope: float, inter: float, suffix: str, seed: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    slope, inter = float(np.float32(slope)), float(np.float32(inter))  # as the header holds them
    if dtype[0] == "f":
        stored = rng.normal(0, 1000, (5, 6, 7)).astype(dtype)
    else:
        limits = np.iinfo(dtype)
        stored = rng.integers(max(limits.min, -30_000), min(limits.max, 30_000), (5, 6, 7)).astype(dtype)
    path = write_nifti(tmp_path / f"scan{suffix}", stored, order, slope, inter)
    expected = stored.astype(np.float64) * slope + inter
    read = load_volume(path)
    span = np.ptp(expected)
    if read.warnings and "0 to 1000" in read.warnings[-1]:
        position = (expected - expected.min()) / span
        fraction = (read.data - read.data.min()) / np.ptp(read.data)
        np.testing.assert_allclose(fraction, position, atol=1e-4)
    else:
        np.testing.assert_allclose(read.data, expected, atol=2e-4 * span + 1e-12, rtol=1e-6)


def write_nifti(path: Path, stored: np.ndarray, order: str = "<", slope: float = 1.0, inter: float = 0.0) -> Path:
    """A NIfTI file written field by field, as the standard lays it out."""
    codes = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768, "i8": 1024, "u8": 1280}
    dtype = stored.dtype.str[1:]
    header = bytearray(352)
    struct.pack_into(f"{order}i", header, 0, 348)
    struct.pack_into(f"{order}8h", header, 40, 3, *stored.shape, 1, 1, 1, 1)
    struct.pack_into(f"{order}2h", header, 70, codes[dtype], 8 * stored.dtype.itemsize)
    struct.pack_into(f"{order}4f", header, 76, 1, 10.0, 9.0, 8.0)
    struct.pack_into(f"{order}3f", header, 108, 352, slope, inter)
    header[123] = 2  # mm
    struct.pack_into(f"{order}2h", header, 252, 0, 1)
    struct.pack_into(f"{order}12f", header, 280, 10, 0, 0, -20, 0, 9, 0, -30, 0, 0, 8, -40)
    header[344:348] = b"n+1\0"
    content = bytes(header) + stored.astype(f"{order}{dtype}").tobytes(order="F")
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(("factor", "offset"), [(1e40, 0.0), (1e-40, 0.0), (1e300, 0.0), (1.0, 1e10), (1e-3, -1e6)])
def test_numbers_that_float32_cannot_hold_keep_their_contrast(factor: float, offset: float, tmp_path: Path) -> None:
    data, affine = balls()
    reference = labelled(data, affine)
    nib.save(nib.Nifti1Image(data.astype(np.float64) * factor + offset, affine), tmp_path / "scan.nii")
    volume = load_volume(tmp_path / "scan.nii")
    assert "0 to 1000" in volume.warnings[-1]
    result = labelled(volume.data, affine)
    assert set(np.unique(result.labels)) == {0, *geometry.IDS.values()}
    assert (result.labels != reference.labels).mean() < 1e-3


def test_ordinary_numbers_stay_as_they_are() -> None:
    data = np.random.default_rng(0).normal(100, 30, (9, 8, 7))
    for values in (data, data * 1e-12, data * 1e12, data + 3e5, (data * 1e5).astype(np.int64)):
        moved, remark = as_float32(values)
        assert remark == ()
        np.testing.assert_allclose(moved, values, rtol=1e-6)


# --------------------------------------------------------------------------------------- damage in the data


@settings(EVERY_EXAMPLE, max_examples=20)
@given(
    corner=st.tuples(st.integers(0, 40), st.integers(0, 35), st.integers(0, 45)),
    size=st.tuples(st.integers(1, 46), st.integers(1, 12), st.integers(1, 12)),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_a_patch_of_nan_or_infinity_counts_as_air(
    corner: tuple[int, int, int], size: tuple[int, int, int], bad: float
) -> None:
    data, affine = balls()
    patch = tuple(slice(start, start + n) for start, n in zip(corner, size, strict=True))
    broken, dark = data.copy(), data.copy()
    broken[patch] = bad
    dark[patch] = data.min()
    result, expected = labelled(broken, affine), labelled(dark, affine)
    np.testing.assert_array_equal(result.labels, expected.labels)
    assert result.soft_ml == pytest.approx(expected.soft_ml)


@settings(EVERY_EXAMPLE, max_examples=15)
@given(offset_mm=st.tuples(*[st.floats(-1e7, 1e7)] * 3))
def test_where_the_scanner_has_its_origin_does_not_matter(offset_mm: tuple[float, float, float]) -> None:
    data, affine = balls((23, 20, 25), (4.0, 4.6, 3.8))
    far = affine.copy()
    far[:3, 3] += offset_mm
    np.testing.assert_array_equal(labelled(data, far).labels, labelled(data, affine).labels)


BYTES = st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=4)
WORDS = st.sampled_from([b"\xff" * 4, bytes(4), b"\0\0\x80\x7f", b"\x7f\x80\0\0", b"\0\0\xc0\x7f", b"\x7f\xc0\0\0"])


@settings(EVERY_EXAMPLE, max_examples=200)
@given(
    suffix=st.sampled_from([".nii", ".mgh"]),
    single=BYTES,
    words=st.lists(st.tuples(st.integers(0, 86), WORDS), max_size=2),
)
def test_any_bytes_in_a_header_end_in_a_scan_or_in_a_clear_error(
    suffix: str, single: list[tuple[int, int]], words: list[tuple[int, bytes]], tmp_path: Path
) -> None:
    path = tmp_path / f"scan{suffix}"
    data = np.random.default_rng(0).integers(0, 900, (9, 8, 7)).astype("i2")
    if suffix == ".nii":
        write_nifti(path, data)
    else:
        nib.save(nib.MGHImage(data, np.diag([10.0, 9.0, 8.0, 1.0])), path)
    content = bytearray(path.read_bytes())
    for where, what in single:
        content[where % 92 if suffix == ".mgh" else where] = what
    for where, word in words:
        content[4 * where : 4 * where + 4] = word
    path.write_bytes(content)
    message = ""
    try:
        volume = load_volume(path)
    except InputError as error:
        message = str(error)
    if message:
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return
    assert volume.data.ndim == 3
    assert volume.data.dtype == np.float32
    assert np.isfinite(volume.affine).all()
    assert np.isfinite(volume.data).any()
    assert max(volume.extent_mm) <= 3001
    labels = np.arange(volume.data.size).reshape(volume.data.shape) % 5
    save_label_map(tmp_path / "labels.nii.gz", labels, volume, range(5))  # with what the header says
    written = nib.load(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)
    units = {1: 1000.0, 3: 0.001}.get(int(written.header["xyzt_units"]) & 7, 1.0)
    scale = units if any("converted" in warning for warning in volume.warnings) else 1.0
    np.testing.assert_allclose(
        written.affine[:3] * scale, volume.affine[:3], rtol=1e-4, atol=1e-4 * (1 + np.abs(volume.affine).max())
    )


@settings(EVERY_EXAMPLE, max_examples=120)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), suffix=st.sampled_from([".nii.gz", ".mgz"]))
def test_a_flipped_bit_in_a_compressed_file_never_gives_wrong_voxels(
    where: float, bit: int, suffix: str, tmp_path: Path
) -> None:
    data = np.random.default_rng(0).integers(0, 900, (9, 8, 7)).astype("i2")
    path = tmp_path / f"scan{suffix}"
    image_class = nib.MGHImage if suffix == ".mgz" else nib.Nifti1Image
    nib.save(image_class(data, np.diag([10.0, 9.0, 8.0, 1.0])), path)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        volume = load_volume(path)
    except InputError:
        return
    np.testing.assert_array_equal(volume.data, data)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mgh", ".mgz"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_ends_too_soon_is_refused(suffix: str, kept: float, tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 900, (19, 18, 17)).astype("i2")
    path = tmp_path / f"scan{suffix}"
    image_class = nib.MGHImage if suffix.startswith(".mg") else nib.Nifti1Image
    nib.save(image_class(data, np.diag([4.0, 5.0, 6.0, 1.0])), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * (2 * data.size if suffix == ".mgh" else len(content)))])
    with pytest.raises(InputError, match=f"scan{suffix}: "):
        load_volume(path)
