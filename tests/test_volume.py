"""Files, geometry and resampling, on volumes of unequal sides and anisotropic voxels."""

import gzip
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.processing import resample_from_to
from scipy.spatial.transform import Rotation

from synthseg import image_files
from synthseg.errors import InputError, OutputError
from synthseg.volume import (
    Volume,
    apply_separable,
    atomic_path,
    canonical,
    centred_matrix,
    check_writable,
    from_canonical,
    image_stem,
    image_suffix,
    load_volume,
    resampling_matrix,
    save_label_map,
    write_text_atomically,
)

SHAPE = (7, 8, 9)
SPACING_MM = (1.1, 2.3, 3.7)


def oblique_affine(seed: int, spacing_mm: tuple[float, float, float] = SPACING_MM) -> np.ndarray:
    """A random rotation (well under 45 degrees), axis order, flips and translation."""
    rng = np.random.default_rng(seed)
    rotation = Rotation.from_euler("xyz", rng.uniform(-20, 20, 3), degrees=True).as_matrix()
    signed_order = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
    affine = np.eye(4)
    affine[:3, :3] = rotation @ signed_order @ np.diag(spacing_mm)
    affine[:3, 3] = rng.uniform(-50, 50, 3)
    return affine


def some_data(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape).astype(np.int16)


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(data, np.diag([*SPACING_MM, 1.0]) if affine is None else affine), path)
    return path


# ------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz", "a.mgh", "A.NII.GZ"])
def test_every_format_loads_with_its_geometry(tmp_path: Path, name: str) -> None:
    affine = oblique_affine(1)
    image_class = nib.MGHImage if ".mg" in name else nib.Nifti1Image
    nib.save(image_class(some_data(), affine), tmp_path / name)
    volume = load_volume(tmp_path / name)
    assert volume.data.dtype == np.float32
    np.testing.assert_array_equal(volume.data, some_data())
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    np.testing.assert_allclose(volume.spacing_mm, SPACING_MM, rtol=1e-5)
    assert volume.axcodes == nib.aff2axcodes(affine)


def test_scaling_is_applied_and_byte_order_read(tmp_path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.uint8)
    image = nib.Nifti1Image(some_data(), np.eye(4), header)
    image.header.set_slope_inter(0.5, 3.0)
    nib.save(image, tmp_path / "a.nii")
    np.testing.assert_array_equal(load_volume(tmp_path / "a.nii").data, some_data() * 0.5 + 3.0)


@pytest.mark.parametrize("trailing", [(1,), (1, 1)])
def test_one_volume_in_four_or_five_dimensions_becomes_three(tmp_path: Path, trailing: tuple[int, ...]) -> None:
    volume = load_volume(save(tmp_path / "a.nii.gz", some_data().reshape(*SHAPE, *trailing)))
    assert volume.data.shape == SHAPE
    save_label_map(tmp_path / "b.nii.gz", volume.data.astype(int), volume, [255])
    assert nib.load(tmp_path / "b.nii.gz").shape == SHAPE


def bad_files() -> dict[str, Callable[[Path], object]]:
    """Each entry writes one file that cannot be segmented."""

    def truncated(path: Path) -> None:
        save(path, np.random.default_rng(0).normal(size=(20, 20, 20)))
        path.write_bytes(path.read_bytes()[:-9000])

    def with_affine(path: Path, affine: np.ndarray) -> None:
        image = nib.Nifti1Image(some_data(), np.eye(4))
        image.header.set_sform(np.eye(4), code=1)
        for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
            image.header[name] = affine[row]
        image = nib.Nifti1Image(some_data(), None, image.header)
        nib.save(image, path)

    rgb = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    rgb["R"] = some_data()
    return {
        "missing": lambda path: None,
        "folder": lambda path: path.mkdir(),
        "empty": lambda path: path.touch(),
        "truncated": truncated,
        "text": lambda path: path.write_text("scan of the head, 3 T\n" * 50),
        "2-D": lambda path: save(path, some_data((7, 8))),
        "many volumes": lambda path: save(path, some_data((*SHAPE, 3))),
        "vectors": lambda path: save(path, some_data((*SHAPE, 1, 3))),
        "RGB": lambda path: save(path, rgb),
        "complex": lambda path: save(path, some_data().astype(np.complex64)),
        "all zero": lambda path: save(path, np.zeros(SHAPE, np.float32)),
        "all NaN": lambda path: save(path, np.full(SHAPE, np.nan, np.float32)),
        "constant but NaN": lambda path: save(path, np.where(some_data() > 99, np.nan, 4.0)),
        "singular affine": lambda path: with_affine(path, np.diag([1.0, 0.0, 1.0, 1.0])),
        "dependent axes": lambda path: with_affine(path, np.ones((4, 4))),
        "NaN affine": lambda path: with_affine(path, np.diag([1.0, np.nan, 1.0, 1.0])),
        "zero-size": lambda path: save(path, np.zeros((7, 0, 9), np.float32)),
        "metres as mm": lambda path: save(path, some_data(), np.diag([1000.0, 1000.0, 1000.0, 1.0])),
    }


BAD = bad_files()


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_in_one_line_that_names_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "scan.nii.gz"
    BAD[kind](path)
    with pytest.raises(InputError) as caught:
        load_volume(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def test_other_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scan.dcm"
    path.write_bytes(b"x")
    with pytest.raises(InputError, match=re.escape(".nii.gz")):
        load_volume(path)


def test_units_of_metres_are_converted(tmp_path: Path) -> None:
    image = nib.Nifti1Image(some_data((30, 31, 32)), np.diag([0.002, 0.002, 0.002, 1.0]))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "a.nii.gz")
    volume = load_volume(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(volume.spacing_mm, 2.0, rtol=1e-5)
    assert "metres" in volume.warnings[0]


def test_a_header_without_orientation_is_remarked_on(tmp_path: Path) -> None:
    image = nib.Nifti1Image(some_data((20, 21, 22)), None)
    image.header.set_zooms((2, 2, 2))
    nib.save(image, tmp_path / "a.nii.gz")
    assert any("orientation" in warning for warning in load_volume(tmp_path / "a.nii.gz").warnings)


def nifti(
    path: Path, qform: np.ndarray | None, sform: np.ndarray | None, codes: tuple[int, int] = (1, 1), unit: str = "mm"
) -> Path:
    header = nib.Nifti1Header()
    header.set_data_shape((30, 31, 32))
    header.set_data_dtype(np.int16)
    header.set_qform(qform, codes[0] if qform is not None else 0)
    header.set_sform(sform, codes[1] if sform is not None else 0)
    header.set_xyzt_units(unit)
    nib.save(nib.Nifti1Image(some_data((30, 31, 32)), None, header), path)
    return path


def test_two_orientations_in_one_header_are_remarked_on(tmp_path: Path) -> None:
    affine = oblique_affine(2, (5.0, 6.0, 7.0))
    mirrored = affine @ np.diag([-1.0, 1.0, 1.0, 1.0])
    volume = load_volume(nifti(tmp_path / "a.nii", mirrored, affine))
    np.testing.assert_allclose(volume.affine, affine, atol=1e-3)  # the sform is used, as nibabel and FSL do
    assert len(volume.warnings) == 1
    assert "two orientations" in volume.warnings[0]
    assert "".join(nib.aff2axcodes(mirrored)) in volume.warnings[0]


def test_a_shift_between_qform_and_sform_of_one_space_is_remarked_on(tmp_path: Path) -> None:
    affine = np.diag([5.0, 6.0, 7.0, 1.0])
    moved = affine.copy()
    moved[1, 3] = 30.0
    assert "30 mm apart" in load_volume(nifti(tmp_path / "a.nii", moved, affine)).warnings[0]
    assert load_volume(nifti(tmp_path / "b.nii", moved, affine, (1, 4))).warnings == ()  # moved to a template
    assert load_volume(nifti(tmp_path / "c.nii", affine, affine)).warnings == ()
    nearly = affine.copy()
    nearly[:3, 3] = 0.4
    assert load_volume(nifti(tmp_path / "d.nii", nearly, affine)).warnings == ()


def test_two_voxel_sizes_in_one_header_are_remarked_on(tmp_path: Path) -> None:
    affine = np.diag([5.0, 6.0, 7.0, 1.0])
    larger = np.diag([5.5, 6.6, 7.7, 1.0])
    volume = load_volume(nifti(tmp_path / "a.nii", affine, larger, (1, 4)))
    assert "two voxel sizes (5 x 6 x 7 and, by its sform, 5.5 x 6.6 x 7.7)" in volume.warnings[0]
    np.testing.assert_allclose(volume.spacing_mm, (5.5, 6.6, 7.7), rtol=1e-5)


def test_a_damaged_qform_beside_a_good_sform_is_remarked_on(tmp_path: Path) -> None:
    affine = np.diag([5.0, 6.0, 7.0, 1.0])
    content = bytearray(nifti(tmp_path / "a.nii", affine, affine).read_bytes())
    content[256:268] = np.array([3.0, 3.0, 3.0], "<f4").tobytes()  # no rotation has such a quaternion
    (tmp_path / "a.nii").write_bytes(content)
    volume = load_volume(tmp_path / "a.nii")
    assert volume.warnings == ("the qform of the header is damaged; the sform is used",)
    np.testing.assert_allclose(volume.affine, affine)
    save_label_map(tmp_path / "b.nii.gz", np.zeros((30, 31, 32), int), volume, [1])
    np.testing.assert_allclose(nib.load(tmp_path / "b.nii.gz").affine, affine)


def test_a_qform_that_is_no_number_is_remarked_on(tmp_path: Path) -> None:
    affine = np.diag([5.0, 6.0, 7.0, 1.0])
    content = bytearray(nifti(tmp_path / "a.nii", affine, affine).read_bytes())
    content[256:268] = np.full(3, np.nan, "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    volume = load_volume(tmp_path / "a.nii")
    assert volume.warnings == ("the qform of the header is damaged; the sform is used",)
    save_label_map(tmp_path / "b.nii.gz", np.zeros((60, 62, 64), int), volume, [1], affine=np.diag([2.5, 3, 3.5, 1]))
    np.testing.assert_allclose(nib.load(tmp_path / "b.nii.gz").header.get_qform(), np.diag([2.5, 3, 3.5, 1]))


def test_what_the_library_mends_in_a_header_is_not_printed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    path = nifti(tmp_path / "a.nii", np.eye(4) * 5, np.eye(4) * 5)
    content = bytearray(path.read_bytes())
    content[80:84] = np.array([-5.0], "<f4").tobytes()  # a voxel size below zero
    path.write_bytes(content)
    load_volume(path)
    assert caplog.records == []
    assert capsys.readouterr().err == ""
    nib.load(path)
    assert len(caplog.records) == 1  # elsewhere the library may speak


@pytest.mark.parametrize(("unit", "word"), [("meter", "metres"), ("micron", "microns")])
def test_a_unit_that_the_header_names_but_does_not_use_is_remarked_on(tmp_path: Path, unit: str, word: str) -> None:
    affine = np.diag([5.0, 6.0, 7.0, 1.0])
    volume = load_volume(nifti(tmp_path / "a.nii", affine, affine, unit=unit))
    np.testing.assert_allclose(volume.affine, affine)
    assert volume.warnings == (
        f"the header gives positions in {word}, but they are those of a head in mm; taken as mm",
    )


def test_units_of_microns_are_converted(tmp_path: Path) -> None:
    affine = np.diag([5000.0, 6000.0, 7000.0, 1.0])
    affine[:3, 3] = -90_000, 20_000, 10
    volume = load_volume(nifti(tmp_path / "a.nii", affine, affine, unit="micron"))
    np.testing.assert_allclose(volume.affine[:3], affine[:3] / 1000, rtol=1e-5)
    assert volume.warnings == ("the header gives positions in microns; converted to mm",)


@pytest.mark.parametrize("suffix", [".mgh", ".mgz"])
def test_an_mgh_file_without_orientation_is_remarked_on(tmp_path: Path, suffix: str) -> None:
    image = nib.MGHImage(some_data((30, 31, 32)), np.diag([5.0, 6.0, 7.0, 1.0]))
    nib.save(image, tmp_path / f"good{suffix}")
    assert load_volume(tmp_path / f"good{suffix}").warnings == ()
    content = bytearray((tmp_path / f"good{suffix}").read_bytes())
    content = bytearray(gzip.decompress(content)) if suffix == ".mgz" else content
    content[28:30] = b"\0\0"
    (tmp_path / f"bad{suffix}").write_bytes(gzip.compress(content) if suffix == ".mgz" else content)
    assert any("orientation" in warning for warning in load_volume(tmp_path / f"bad{suffix}").warnings)


# --------------------------------------------------------------------------------------- sizes and damage


def test_a_header_that_promises_more_than_the_file_can_hold_is_refused_at_once(tmp_path: Path) -> None:
    """20 GB by its header: nothing of it may be asked for."""
    for name in ("a.nii", "a.nii.gz"):
        content = nifti(tmp_path / "b.nii", np.eye(4) * 5, np.eye(4) * 5).read_bytes()
        header = content[:42] + np.array([1200, 1200, 1400], "<i2").tobytes() + content[48:]
        header = header[:280] + np.diag([0.1, 0.1, 0.1, 1]).astype("<f4")[:3].tobytes() + header[328:]
        (tmp_path / name).write_bytes(gzip.compress(header) if name.endswith("gz") else header)
        with pytest.raises(InputError, match=f"{name}: .*promises 4032000352 bytes for 1200 x 1200 x 1400 voxels"):
            load_volume(tmp_path / name)


def test_more_voxels_than_fit_into_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_VOXELS", 30 * 31 * 32 - 1)
    with pytest.raises(InputError, match=r"30 x 31 x 32 voxels; expected at most .* crop it"):
        load_volume(nifti(tmp_path / "a.nii", np.eye(4) * 5, np.eye(4) * 5))


def test_the_checksum_of_a_compressed_file_is_read(tmp_path: Path) -> None:
    """Behind the last voxel lie the checksum and the length: with either damaged, the voxels cannot be trusted."""
    path = nifti(tmp_path / "a.nii.gz", np.eye(4) * 5, np.eye(4) * 5)
    good = path.read_bytes()
    for position in (-8, -4):
        content = bytearray(good)
        content[position] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.nii\.gz: cannot be read"):
            load_volume(path)
    path.write_bytes(good)
    load_volume(path)


def test_files_in_several_parts_and_with_padding_are_read(tmp_path: Path) -> None:
    """Gzip allows both: parallel compressors write parts, tapes pad with zeros."""
    path = nifti(tmp_path / "a.nii", np.eye(4) * 5, np.eye(4) * 5)
    content = path.read_bytes()
    parts = gzip.compress(content[:9000]) + gzip.compress(content[9000:]) + bytes(512)
    (tmp_path / "b.nii.gz").write_bytes(parts)
    np.testing.assert_array_equal(load_volume(tmp_path / "b.nii.gz").data, load_volume(path).data)


def test_reading_needs_no_isal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nifti(tmp_path / "a.nii.gz", np.eye(4) * 5, np.eye(4) * 5)
    fast = load_volume(path)
    monkeypatch.setattr(image_files, "_open_gzip", gzip.open)
    np.testing.assert_array_equal(load_volume(path).data, fast.data)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match="cannot be read"):
        load_volume(path)


def test_the_header_of_a_pair_of_files_is_refused(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(some_data((30, 31, 32)), np.eye(4) * 5), tmp_path / "a.img")
    (tmp_path / "b.nii").write_bytes((tmp_path / "a.hdr").read_bytes() + (tmp_path / "a.img").read_bytes())
    with pytest.raises(InputError, match=r"b\.nii: "):
        load_volume(tmp_path / "b.nii")


def test_a_flip_of_a_single_voxel_is_no_flip() -> None:
    """A side of one voxel that runs backwards gives a negative stride, which torch does not take."""
    volume = Volume(some_data((1, 8, 9)), np.diag([-5.0, 2.0, 3.0, 1.0]))
    ras = canonical(volume)
    torch.from_numpy(np.ascontiguousarray(ras.data))
    np.testing.assert_allclose(ras.affine, np.diag([5.0, 2.0, 3.0, 1.0]))


def test_names() -> None:
    assert image_suffix(Path("x/sub-01.T1.NII.GZ")) == ".NII.GZ"
    assert image_stem(Path("x/sub-01.T1.nii.gz")) == "sub-01.T1"
    assert image_suffix(Path("x/.nii.gz")) is None
    assert image_suffix(Path("x/results")) is None


# -------------------------------------------------------------------------------------------- orientation


def test_canonical_agrees_with_nibabel_and_undoes_exactly() -> None:
    for seed in range(40):
        affine = oblique_affine(seed)
        volume = Volume(some_data(), affine)
        ras = canonical(volume)
        expected = nib.as_closest_canonical(nib.Nifti1Image(some_data(), affine))
        assert ras.axcodes == ("R", "A", "S")
        np.testing.assert_array_equal(ras.data, np.asarray(expected.dataobj))
        np.testing.assert_allclose(ras.affine, expected.affine)
        np.testing.assert_array_equal(from_canonical(ras.data, volume), volume.data)


def test_canonical_covers_all_48_orientations() -> None:
    seen = set()
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        affine = np.eye(4)
        affine[:3, :3] = np.eye(3)[list(order)] @ np.diag(signs)
        volume = Volume(some_data(), affine)
        seen.add(volume.axcodes)
        np.testing.assert_array_equal(from_canonical(canonical(volume).data, volume), volume.data)
    assert len(seen) == 48


# --------------------------------------------------------------------------------------------- resampling


def test_matrix_towards_a_coarser_grid_by_hand() -> None:
    # Output centres at 0.5 and 2.5; triangle of half-width 2: weights 0.75, 0.75, 0.25 over their sum of 1.75.
    expected = np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7
    np.testing.assert_allclose(resampling_matrix(4, 2, 1.0, 2.0, 0.5), expected, rtol=1e-6)
    np.testing.assert_allclose(centred_matrix(4, 2, 1.0, 2.0), expected, rtol=1e-6)


def test_matrix_towards_a_finer_grid_by_hand() -> None:
    # Output centres at -0.25, 0.25, 0.75, 1.25 input voxels; the outer two are clamped to the edge.
    expected = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    np.testing.assert_allclose(centred_matrix(2, 4, 2.0, 1.0), expected, rtol=1e-6)


@pytest.mark.parametrize(("n_in", "n_out", "spacing_in", "spacing_out"), [(1, 5, 5.0, 1.0), (9, 1, 1.0, 9.0)])
def test_rows_sum_to_one_for_single_voxels(n_in: int, n_out: int, spacing_in: float, spacing_out: float) -> None:
    matrix = centred_matrix(n_in, n_out, spacing_in, spacing_out)
    assert matrix.shape == (n_out, n_in)
    np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=1e-6)


def test_same_grid_is_the_identity() -> None:
    torch.testing.assert_close(centred_matrix(7, 7, 0.9, 0.9), torch.eye(7))


def test_finer_grid_agrees_with_nibabel() -> None:
    data = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    spacing_out = (0.7, 0.9, 1.3)
    shape_out = tuple(int(n * s / t) for n, s, t in zip(SHAPE, SPACING_MM, spacing_out, strict=True))
    affine_in, affine_out = np.diag([*SPACING_MM, 1.0]), np.diag([*spacing_out, 1.0])
    for axis in range(3):  # the centres of both grids at the origin
        affine_in[axis, 3] = -(SHAPE[axis] - 1) / 2 * SPACING_MM[axis]
        affine_out[axis, 3] = -(shape_out[axis] - 1) / 2 * spacing_out[axis]
    expected = resample_from_to(
        nib.Nifti1Image(data, affine_in), (shape_out, affine_out), order=1, mode="nearest"
    ).get_fdata()
    matrices = [centred_matrix(*row) for row in zip(SHAPE, shape_out, SPACING_MM, spacing_out, strict=True)]
    result = apply_separable(torch.from_numpy(data)[None], matrices)[0]
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_apply_separable_keeps_axes_and_channels_apart() -> None:
    image = torch.rand(2, *SHAPE)
    matrices = [torch.rand(3, 7), torch.rand(10, 8), torch.rand(5, 9)]
    expected = torch.einsum("cdhw,id,jh,kw->cijk", image, *matrices)
    torch.testing.assert_close(apply_separable(image, matrices), expected)


# ------------------------------------------------------------------------------------------------- saving


def test_header_fields_survive(tmp_path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    image = nib.Nifti1Image(some_data() * 2.0, oblique_affine(3), header)
    image.set_qform(oblique_affine(3), code=1)
    image.set_sform(oblique_affine(4), code=4)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"3T T1w"
    image.header["cal_max"] = 900
    image.header.set_slope_inter(2.0, 1.0)
    nib.save(image, tmp_path / "in.nii")
    volume = load_volume(tmp_path / "in.nii")
    labels = some_data() % 17
    save_label_map(tmp_path / "out.nii.gz", labels, volume, range(17))

    before, after = nib.load(tmp_path / "in.nii").header, nib.load(tmp_path / "out.nii.gz").header
    for name in (
        *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "pixdim"),
        *("srow_x", "srow_y", "srow_z", "xyzt_units", "descrip"),
    ):
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    result = nib.load(tmp_path / "out.nii.gz")
    assert result.get_data_dtype() == np.uint8
    assert float(after["cal_max"]) == 0
    assert result.dataobj.slope == 1
    assert result.dataobj.inter == 0
    np.testing.assert_array_equal(np.asarray(result.dataobj), labels)


@pytest.mark.parametrize(("unit", "mm"), [("mm", 1.0), ("meter", 1000.0)])
def test_on_another_grid_qform_and_sform_lead_where_they_led(tmp_path: Path, unit: str, mm: float) -> None:
    """To the scanner and to a template, for example: the middle of the image stays where either puts it."""
    scanner, template = oblique_affine(2, (5.0, 6.0, 7.0)), oblique_affine(3, (5.0, 6.0, 7.0))
    in_unit = np.diag([1 / mm, 1 / mm, 1 / mm, 1.0])
    volume = load_volume(nifti(tmp_path / "a.nii", in_unit @ scanner, in_unit @ template, (1, 4), unit))
    halved = np.diag([0.5, 0.5, 0.5, 1.0])  # voxels, with the same outer faces
    halved[:3, 3] = -0.25
    labels = np.zeros((60, 62, 64), int)
    save_label_map(tmp_path / "b.nii.gz", labels, volume, [1], affine=volume.affine @ halved)
    header = nib.load(tmp_path / "b.nii.gz").header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 4)
    np.testing.assert_allclose(header.get_zooms(), (2.5, 3.0, 3.5), rtol=1e-5)
    for found, expected in ((header.get_qform(), scanner), (header.get_sform(), template)):
        np.testing.assert_allclose(
            nib.affines.apply_affine(found, [29.5, 30.5, 31.5]),
            nib.affines.apply_affine(expected, [14.5, 15, 15.5]),
            atol=1e-3,
        )
        np.testing.assert_allclose(found[:3, :3], expected[:3, :3] / 2, atol=1e-4)


def test_large_ids_are_written_as_int16(tmp_path: Path) -> None:
    volume = Volume(some_data(), oblique_affine(5))
    save_label_map(tmp_path / "a.nii.gz", some_data() * 2, volume, [0, 540])
    assert nib.load(tmp_path / "a.nii.gz").get_data_dtype() == np.int16


@pytest.mark.parametrize("name_in", ["a.nii.gz", "a.mgz"])
@pytest.mark.parametrize("name_out", ["b.nii", "b.nii.gz", "b.mgz", "b.NII.GZ"])
def test_labels_convert_between_formats(tmp_path: Path, name_in: str, name_out: str) -> None:
    affine = oblique_affine(6)
    image_class = nib.MGHImage if name_in.endswith("mgz") else nib.Nifti1Image
    nib.save(image_class(some_data(), affine), tmp_path / name_in)
    volume = load_volume(tmp_path / name_in)
    save_label_map(tmp_path / name_out, some_data() % 5, volume, range(5))
    result = nib.load(tmp_path / name_out)
    np.testing.assert_array_equal(np.asarray(result.dataobj), some_data() % 5)
    np.testing.assert_allclose(result.affine, affine, atol=1e-3)
    assert (tmp_path / name_out).read_bytes()[:2] == b"\x1f\x8b" or name_out == "b.nii"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name_in, name_out])


def test_nifti2_stays_nifti2(tmp_path: Path) -> None:
    nib.save(nib.Nifti2Image(some_data(), oblique_affine(7)), tmp_path / "a.nii")
    volume = load_volume(tmp_path / "a.nii")
    save_label_map(tmp_path / "b.nii.gz", some_data() % 5, volume, range(5))
    assert isinstance(nib.load(tmp_path / "b.nii.gz"), nib.Nifti2Image)


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "seg.nii.gz"
    target.write_text("old")

    def save_half(image: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("synthseg.volume.write_image", save_half)
    volume = Volume(some_data(), np.eye(4))
    with pytest.raises(OutputError, match="No space left"):
        save_label_map(target, some_data(), volume, [0])
    assert [p.name for p in tmp_path.iterdir()] == ["seg.nii.gz"]
    assert target.read_text() == "old"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_path(tmp_path / "a.csv") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_text_is_written_with_its_folders(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "new" / "a.csv", "1,2\n")
    assert (tmp_path / "new" / "a.csv").read_text() == "1,2\n"
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    write_text_atomically(tmp_path / "link.csv", "new")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text() == "new"


def test_check_writable_leaves_no_trace(tmp_path: Path) -> None:
    check_writable(tmp_path / "a.nii.gz")
    check_writable(tmp_path / "new" / "deeper" / "a.nii.gz")
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = [tmp_path / "file" / "a.nii.gz", tmp_path, tmp_path / ("x" * 300) / "a.nii", tmp_path / ("x" * 300)]
    if Path("/proc/self").is_dir():
        places.append(Path("/proc/self/a.nii.gz"))  # a place where even root cannot make a file
    for place in places:
        with pytest.raises(OutputError, match=re.escape(str(place)[:40])):
            check_writable(place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission"):
        check_writable(tmp_path / "a.nii.gz")
    tmp_path.chmod(0o700)
