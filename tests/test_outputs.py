"""The files of one scan, without a network: an oblique scan in LIA order, probabilities of nested boxes in it."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.processing import resample_from_to
from scipy.spatial.transform import Rotation

from synthseg import posteriors as posteriors_module
from synthseg.errors import InputError, LabelError, OutputError
from synthseg.inference import Segmentation
from synthseg.labels import LabelTable, load_scheme
from synthseg.outputs import (
    Targets,
    air_value,
    brain_mask,
    check_targets,
    facts_of,
    relabelled,
    target_table,
    write_outputs,
)
from synthseg.posteriors import Posteriors, scan_grid, spacing_grid
from synthseg.volume import Volume, canonical, load_volume, save_scan

SHAPE = (24, 20, 29)  # of the scan, in its own order
SPACING = (2.0, 1.5, 1.2)
SIAM = load_scheme("siam16")


def scan_affine() -> np.ndarray:
    """Voxels run left, inferior, anterior, seven degrees oblique."""
    matrix = np.eye(4)
    order = np.array([[-1, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=float)
    matrix[:3, :3] = Rotation.from_euler("xyz", [4, -5, 3], degrees=True).as_matrix() @ order * SPACING
    matrix[:3, 3] = (31, -18, 22)
    return matrix


@pytest.fixture
def scan(tmp_path: Path) -> Volume:
    """Read from a file with scaled integers, qform and sform codes of its own, and a description."""
    x, y, z = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    data = (3 * x + 5 * y + 7 * z + 20 * ((x + y + z) % 3)).astype(np.int16)
    image = nib.Nifti1Image(data, scan_affine())
    image.set_qform(scan_affine(), 1)
    image.set_sform(scan_affine(), 3)
    image.header["descrip"] = b"T2w"
    image.header.set_xyzt_units("mm", "sec")
    folder = tmp_path / "in"
    folder.mkdir()
    nib.save(image, folder / "scan.nii.gz")
    return load_volume(folder / "scan.nii.gz")


def segmented(
    volume: Volume, table: LabelTable = SIAM, labels: tuple[str, ...] = ("GM", "CSF", "Skull", "Head")
) -> Segmentation:
    """Nested boxes of labels from the inside out, with soft borders, on a grid of 1.1 mm in RAS+ order."""
    ras = canonical(volume)
    shape = tuple(int(np.ceil(extent / 1.1 - 1e-3)) for extent in ras.extent_mm)
    distance = np.stack(np.meshgrid(*[np.abs(np.linspace(-1, 1, n)) for n in shape], indexing="ij")).max(0)
    scores = np.full((len(table), *shape), -9.0)
    scores[0] = 12 * (distance - 0.85)
    for ring, name in enumerate(labels):
        scores[table.names.index(name)] = 12 * (0.12 - np.abs(distance - 0.2 * ring - 0.05))
    values = torch.from_numpy(scores).softmax(0).half()
    probabilities = Posteriors.covering(values, table, ras, 1.1)
    ids, hard, soft = probabilities.labels_on(scan_grid(volume))
    return Segmentation(
        labels=ids,
        affine=volume.affine,
        table=table,
        hard_ml=dict(zip(table.names, (hard * volume.voxel_ml).tolist(), strict=True)),
        soft_ml=dict(zip(table.names, (soft * volume.voxel_ml).tolist(), strict=True)),
        posteriors=probabilities,
    )


def everything(folder: Path) -> Targets:
    return Targets(
        labels=folder / "seg.nii.gz",
        posteriors=folder / "posteriors.nii.gz",
        resampled=folder / "resampled.nii.gz",
        mask=folder / "mask.nii.gz",
        stripped=folder / "stripped.nii.gz",
        meshes=(("skull", folder / "skull.surf.gii"), ("GM", folder / "gm.stl")),
    )


def files_of(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ----------------------------------------------------------------------------------------------------- images


def test_on_the_scans_own_grid_the_header_stays(tmp_path: Path, scan: Volume) -> None:
    targets = replace(everything(tmp_path / "out"), resampled=None)
    result = segmented(scan)
    write_outputs(targets, scan, result)
    assert files_of(tmp_path / "out") == sorted(p.name for p in targets.paths())
    before = nib.load(tmp_path / "in" / "scan.nii.gz").header
    for path in targets.images():
        after = nib.load(path).header
        for name in ("qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_y", "srow_z", "descrip"):
            np.testing.assert_array_equal(before[name], after[name], err_msg=f"{path.name} {name}")
        np.testing.assert_array_equal(before["pixdim"][:4], after["pixdim"][:4])
        assert after.get_xyzt_units()[0] == "mm"
        assert after.get_data_shape()[:3] == SHAPE
    np.testing.assert_array_equal(np.asarray(nib.load(targets.labels).dataobj), result.labels)
    assert nib.load(targets.labels).get_data_dtype() == np.uint8
    assert nib.load(targets.mask).get_data_dtype() == np.uint8
    assert nib.load(targets.stripped).get_data_dtype() == np.int16


def test_posteriors_are_the_probabilities_of_each_voxel(tmp_path: Path, scan: Volume) -> None:
    result = segmented(scan)
    targets = Targets(tmp_path / "seg.nii.gz", posteriors=tmp_path / "p.nii.gz")
    write_outputs(targets, scan, result)
    image = nib.load(targets.posteriors)
    stored = image.get_fdata()
    assert stored.shape == (*SHAPE, 17)
    assert image.get_data_dtype() == np.uint16
    assert result.posteriors is not None
    exact = np.concatenate([slab for _, slab in result.posteriors.slabs(scan_grid(scan))], axis=1)
    np.testing.assert_allclose(np.moveaxis(stored, -1, 0), exact, atol=0.51 / 65535)
    np.testing.assert_allclose(stored.sum(-1), 1, atol=1e-3)
    np.testing.assert_array_equal(SIAM.ids[stored.argmax(-1)], result.labels)
    described = json.loads(image.header.extensions[0].get_content())
    assert described["scheme"] == "siam16"
    assert [(c["index"], c["id"], c["name"]) for c in described["classes"]] == [
        (i, x.id, x.name) for i, x in enumerate(SIAM.labels)
    ]


def test_posteriors_do_not_depend_on_the_slabs(tmp_path: Path, scan: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    result = segmented(scan)
    for name, size in (("one", 2**28), ("many", 4 * 17 * SHAPE[1] * SHAPE[2] * 5)):
        monkeypatch.setattr(posteriors_module, "SLAB_BYTES", size)
        write_outputs(Targets(tmp_path / f"{name}.nii", posteriors=tmp_path / f"{name}_p.nii"), scan, result)
    one, many = (nib.load(tmp_path / f"{name}_p.nii") for name in ("one", "many"))
    np.testing.assert_allclose(one.get_fdata(), many.get_fdata(), atol=1.1 / 65535)  # sums in another order
    np.testing.assert_array_equal(one.affine, many.affine)


def test_another_library_sees_the_same_probabilities_in_the_same_place(tmp_path: Path, scan: Volume) -> None:
    sitk = pytest.importorskip("SimpleITK")
    targets = Targets(tmp_path / "seg.nii.gz", posteriors=tmp_path / "p.nii.gz", mask=tmp_path / "m.nii.gz")
    write_outputs(targets, scan, segmented(scan))
    image = sitk.ReadImage(str(targets.posteriors))
    assert image.GetDimension() == 4
    np.testing.assert_allclose(sitk.GetArrayFromImage(image).T, nib.load(targets.posteriors).get_fdata(), atol=1e-6)
    corner = np.array(image.TransformContinuousIndexToPhysicalPoint([3, 5, 7, 0]))[:3] * (-1, -1, 1)  # LPS to RAS
    np.testing.assert_allclose(corner, (scan.affine @ (3, 5, 7, 1))[:3], atol=1e-3)


def test_a_big_endian_scan_has_readable_outputs(tmp_path: Path, scan: Volume) -> None:
    swapped = nib.load(tmp_path / "in" / "scan.nii.gz")
    image = nib.Nifti1Image(np.asarray(swapped.dataobj), None, swapped.header.as_byteswapped(">"))
    nib.save(image, tmp_path / "in" / "big.nii")
    assert nib.load(tmp_path / "in" / "big.nii").header.endianness == ">"
    big = load_volume(tmp_path / "in" / "big.nii")
    both = {}
    for name, volume in (("little", scan), ("big", big)):
        targets = replace(everything(tmp_path / name), resampled=None)
        write_outputs(targets, volume, segmented(volume))
        both[name] = [nib.load(path).get_fdata() for path in targets.images()]
    for little, other in zip(both["little"], both["big"], strict=True):
        np.testing.assert_array_equal(little, other)


@pytest.mark.parametrize("spacing_mm", [1.7, (0.9, 1.1, 1.6)])
def test_all_images_lie_on_the_grid_of_another_voxel_size(
    tmp_path: Path, scan: Volume, spacing_mm: float | tuple[float, ...]
) -> None:
    targets = everything(tmp_path / "out")
    result = segmented(scan)
    write_outputs(targets, scan, result, spacing_mm=spacing_mm)
    grid = spacing_grid(scan, spacing_mm)
    for path in targets.images():
        image = nib.load(path)
        assert image.shape[:3] == grid.shape, path.name
        np.testing.assert_allclose(image.affine, grid.affine, atol=1e-4, err_msg=path.name)
        np.testing.assert_allclose(image.header.get_qform(), grid.affine, atol=1e-4)
        np.testing.assert_allclose(image.header.get_zooms()[:3], np.broadcast_to(spacing_mm, 3), atol=1e-5)
        assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 3)
    labels = np.asarray(nib.load(targets.labels).dataobj)
    posteriors = nib.load(targets.posteriors).get_fdata()
    np.testing.assert_array_equal(SIAM.ids[posteriors.argmax(-1)], labels)
    assert labels.any()
    np.testing.assert_array_equal(np.asarray(nib.load(targets.mask).dataobj), brain_mask(labels, SIAM))
    # a volume does not depend on the grid that it is summed on
    skull_ml = posteriors[..., SIAM.names.index("Skull")].sum() * np.prod(np.broadcast_to(spacing_mm, 3)) / 1000
    assert skull_ml == pytest.approx(result.soft_ml["Skull"], rel=0.02)


def test_the_resampled_scan_agrees_with_nibabel(tmp_path: Path, scan: Volume) -> None:
    targets = Targets(tmp_path / "seg.nii.gz", resampled=tmp_path / "r.nii.gz")
    write_outputs(targets, scan, segmented(scan), spacing_mm=1.0)  # finer on every axis: plain linear interpolation
    ours = nib.load(targets.resampled)
    theirs = resample_from_to(nib.Nifti1Image(scan.data, scan.affine), (ours.shape, ours.affine), order=1)
    inner = tuple(slice(2, -2) for _ in range(3))
    np.testing.assert_allclose(ours.get_fdata()[inner], theirs.get_fdata()[inner], atol=0.02)
    assert ours.get_data_dtype() == np.float32


def test_a_scan_without_orientation_keeps_none(tmp_path: Path, scan: Volume) -> None:
    image = nib.load(tmp_path / "in" / "scan.nii.gz")
    header = image.header.copy()
    header["qform_code"] = header["sform_code"] = 0
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, header), tmp_path / "in" / "bare.nii.gz")
    bare = load_volume(tmp_path / "in" / "bare.nii.gz")
    write_outputs(Targets(tmp_path / "seg.nii.gz"), bare, segmented(bare), spacing_mm=1.3)
    result = nib.load(tmp_path / "seg.nii.gz")
    assert (int(result.header["qform_code"]), int(result.header["sform_code"])) == (0, 0)
    np.testing.assert_allclose(result.affine, spacing_grid(bare, 1.3).affine, atol=1e-4)


def test_mgh_in_and_out(tmp_path: Path, scan: Volume) -> None:
    nib.save(nib.MGHImage(scan.data, scan.affine), tmp_path / "in" / "scan.mgz")
    volume = load_volume(tmp_path / "in" / "scan.mgz")
    targets = Targets(tmp_path / "seg.mgz", mask=tmp_path / "mask.nii.gz", stripped=tmp_path / "stripped.mgz")
    write_outputs(targets, volume, segmented(volume), spacing_mm=1.5)
    for path in targets.images():
        np.testing.assert_allclose(nib.load(path).affine, spacing_grid(volume, 1.5).affine, atol=1e-3)


# ------------------------------------------------------------------------------------------- mask and stripping


def test_the_mask_has_ventricles_and_no_holes_but_no_sulcal_fluid() -> None:
    labels = np.zeros((9, 10, 11), np.uint8)
    labels[1:8, 1:9, 1:10] = 3  # CSF
    labels[2:7, 2:8, 2:9] = 1  # GM
    labels[4, 4, 4] = 4  # ventricle
    labels[3, 6, 6] = 14  # a vessel inside
    expected = np.zeros_like(labels)
    expected[2:7, 2:8, 2:9] = 1
    result = brain_mask(labels, SIAM)
    np.testing.assert_array_equal(result, expected)
    assert result.dtype == np.uint8
    labels[2:4, 6, 6] = 3  # open to the outside: a sulcus
    expected[2:4, 6, 6] = 0
    np.testing.assert_array_equal(brain_mask(labels, SIAM), expected)
    assert not brain_mask(np.zeros_like(labels), SIAM).any()


def test_stripped_voxels_inside_are_those_of_the_scan(tmp_path: Path, scan: Volume) -> None:
    targets = Targets(tmp_path / "seg.nii.gz", mask=tmp_path / "m.nii.gz", stripped=tmp_path / "s.nii.gz")
    write_outputs(targets, scan, segmented(scan))
    mask = np.asarray(nib.load(targets.mask).dataobj) > 0
    stripped = np.asarray(nib.load(targets.stripped).dataobj)
    np.testing.assert_array_equal(stripped[mask], scan.data[mask])
    assert 0 < mask.sum() < mask.size
    assert (stripped[~mask] == 0).all()


def test_what_air_is() -> None:
    noise = np.random.default_rng(0).normal(size=(24, 24, 24)).astype(np.float32)
    inner = np.zeros(noise.shape, bool)
    inner[4:20, 4:20, 4:20] = True
    assert air_value(np.abs(noise) + 3) == 0  # MRI
    assert air_value(noise) == pytest.approx(noise.min())  # standardised
    assert air_value(np.where(inner, noise, 0)) == 0  # standardised and stripped: zeros around
    ct = np.where(inner, 40 + 10 * noise, -1000 + 5 * noise)
    ct[4:20, 4:20, 4:6] = 900 + noise[4:20, 4:20, 4:6]  # bone
    ct[4:20, 4:20, 6:8] = -90 + noise[4:20, 4:20, 6:8]  # fat
    assert air_value(ct) == -1000
    ct[0, 0, 0] = np.nan
    assert air_value(ct) == -1000


# --------------------------------------------------------------------------------------------------- schemes


def test_freesurfer_ids_of_a_model_that_tells_sides(tmp_path: Path, scan: Volume) -> None:
    head45 = load_scheme("head45")
    bare = LabelTable(head45.name, tuple(replace(label, to={}) for label in head45.labels))  # an older model
    result = segmented(scan, bare, ("Left-Cerebral-Cortex", "CSF", "Bone-Cortical", "Dura"))
    write_outputs(Targets(tmp_path / "seg.nii.gz"), scan, result, scheme="freesurfer")
    written = np.asarray(nib.load(tmp_path / "seg.nii.gz").dataobj)
    assert nib.load(tmp_path / "seg.nii.gz").get_data_dtype() == np.int16
    for here, there in ((0, 0), (3, 3), (24, 24), (515, 915), (540, 98)):
        np.testing.assert_array_equal(written == there, result.labels == here)
        assert (written == there).any()


def test_probabilities_are_summed_before_the_likeliest_label_is_taken(scan: Volume) -> None:
    head45 = load_scheme("head45")
    result = segmented(
        scan, head45, ("Left-Cerebral-Cortex", "Right-Cerebral-Cortex", "Bone-Cortical", "Bone-Cancellous")
    )
    merged = relabelled(result, "siam16")
    assert merged.table.names == SIAM.names
    assert merged.soft_ml["Skull"] == pytest.approx(
        result.soft_ml["Bone-Cortical"] + result.soft_ml["Bone-Cancellous"], rel=1e-3
    )
    # where two kinds of bone share a voxel with soft tissue, bone may win only together
    assert merged.hard_ml["Skull"] >= result.hard_ml["Bone-Cortical"] + result.hard_ml["Bone-Cancellous"]
    assert relabelled(merged, "siam16") is merged


def test_a_model_without_sides_cannot_be_written_with_sides(tmp_path: Path, scan: Volume) -> None:
    with pytest.raises(LabelError, match=r"'siam16' cannot be written as 'freesurfer'.*model with the labels.*head45"):
        write_outputs(Targets(tmp_path / "out" / "seg.nii.gz"), scan, segmented(scan), scheme="freesurfer")
    with pytest.raises(LabelError, match=r"cannot tell apart what is inside GM, WM"):
        target_table(SIAM, "head45")
    with pytest.raises(LabelError, match="did you mean 'freesurfer'"):
        target_table(SIAM, "freesurfr")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- refused before anything is written


@pytest.mark.parametrize(
    ("targets", "options", "error", "message"),
    [
        ({"mask": "mask.png"}, {}, OutputError, r"mask\.png: not an image name"),
        ({"posteriors": "p.mgz"}, {}, OutputError, r"p\.mgz.*NIfTI"),
        ({"resampled": "r.nii.gz"}, {}, OutputError, r"r\.nii\.gz.*--spacing"),
        ({"meshes": (("skull", "skull.ply"),)}, {}, OutputError, r"skull\.ply: not the name of a surface"),
        ({"meshes": (("skul", "skull.stl"),)}, {}, OutputError, "no structure 'skul'"),
        ({}, {"spacing_mm": -1.0}, InputError, "voxel size"),
        ({}, {"spacing_mm": (1.0, 2.0)}, InputError, "voxel size"),
        ({}, {"spacing_mm": 0.01}, InputError, "choose a larger --spacing"),
        ({}, {"scheme": "nothing"}, LabelError, "no label scheme"),
    ],
)
def test_what_cannot_be_done_is_refused_first(
    tmp_path: Path, scan: Volume, targets: dict, options: dict, error: type[Exception], message: str
) -> None:
    folder = tmp_path / "out"
    named = {
        key: tuple((s, folder / p) for s, p in value) if key == "meshes" else folder / value
        for key, value in targets.items()
    }
    with pytest.raises(error, match=message):
        write_outputs(Targets(folder / "seg.nii.gz", **named), scan, segmented(scan), **options)
    assert not folder.exists()


def test_a_scheme_without_tissues_has_no_mask(tmp_path: Path) -> None:
    blank = LabelTable("blank", tuple(replace(label, tissue="soft") for label in SIAM.labels))
    with pytest.raises(OutputError, match="no brain mask"):
        check_targets(Targets(tmp_path / "a.nii.gz", mask=tmp_path / "b.nii.gz"), blank)


def test_probabilities_must_have_been_kept(tmp_path: Path, scan: Volume) -> None:
    lean = replace(segmented(scan), posteriors=None)
    targets = Targets(tmp_path / "seg.nii.gz", mask=tmp_path / "mask.nii.gz")
    assert not targets.need_posteriors()
    write_outputs(targets, scan, lean)
    for wanted, spacing_mm in ((replace(targets, posteriors=tmp_path / "p.nii.gz"), None), (targets, 1.0)):
        assert wanted.need_posteriors(spacing_mm)
        with pytest.raises(ValueError, match="keep_posteriors"):
            write_outputs(wanted, scan, lean, spacing_mm=spacing_mm)


def test_a_structure_that_is_not_in_the_scan_is_said_and_an_old_file_removed(tmp_path: Path, scan: Volume) -> None:
    old, new = tmp_path / "amygdala.stl", tmp_path / "skull.stl"
    old.write_text("of another scan")
    result = segmented(scan)
    write_outputs(Targets(tmp_path / "seg.nii.gz", meshes=(("Amygdala", old), ("skull", new))), scan, result)
    assert not old.exists()
    assert new.exists()
    assert [w for w in result.warnings if "no Amygdala in the scan" in w]
    assert facts_of(tmp_path / "seg.nii.gz") == {"without_surface": ["amygdala"]}


def test_a_label_that_wins_without_one_half_has_voxels_and_no_surface(tmp_path: Path, scan: Volume) -> None:
    result = segmented(scan)
    assert result.posteriors is not None
    values = result.posteriors.values
    won = values.argmax(0) == SIAM.names.index("GM")
    for name, share in (("GM", 0.4), ("WM", 0.3), ("CSF", 0.3)):
        values[SIAM.names.index(name)][won] = share
    files = {name: tmp_path / f"{name}.stl" for name in ("GM", "brain")}
    write_outputs(Targets(tmp_path / "seg.nii.gz", meshes=tuple(files.items())), scan, result)
    assert (np.asarray(nib.load(tmp_path / "seg.nii.gz").dataobj) == 1).any()
    assert not files["GM"].exists()
    assert files["brain"].exists()
    assert result.warnings == ["no voxel of GM is likelier than not; it has no surface; GM.stl was not written"]
    assert facts_of(tmp_path / "seg.nii.gz") == {"without_surface": ["gm"]}


def test_a_surface_lies_where_the_labels_are(tmp_path: Path, scan: Volume) -> None:
    result = segmented(scan)
    write_outputs(Targets(tmp_path / "seg.nii.gz", meshes=(("GM", tmp_path / "gm.surf.gii"),)), scan, result)
    points = nib.load(tmp_path / "gm.surf.gii").agg_data("pointset")
    voxels = np.argwhere(result.labels == 1)
    corners = np.concatenate([voxels - 0.5, voxels + 0.5]) @ scan.affine[:3, :3].T + scan.affine[:3, 3]
    axes = scan.affine[:3, :3] / np.linalg.norm(scan.affine[:3, :3], axis=0)  # the box is along the scan's axes
    np.testing.assert_allclose((points @ axes).min(0), (corners @ axes).min(0), atol=max(SPACING) / 2)
    np.testing.assert_allclose((points @ axes).max(0), (corners @ axes).max(0), atol=max(SPACING) / 2)


@pytest.mark.parametrize(
    ("value", "name", "dtype"),
    [
        (7, "a.nii.gz", np.int16),
        (7.5, "a.nii.gz", np.float32),
        (40000, "a.nii.gz", np.float32),
        (np.nan, "a.nii.gz", np.float32),
        (-7, "a.mgz", np.int16),
    ],
)
def test_intensities_keep_the_type_of_the_file_only_if_they_fit(
    tmp_path: Path, scan: Volume, value: float, name: str, dtype: type
) -> None:
    data = scan.data.copy()
    data[3, 4, 5] = value
    save_scan(tmp_path / name, data, scan)
    image = nib.load(tmp_path / name)
    assert image.get_data_dtype().newbyteorder("=") == dtype
    np.testing.assert_array_equal(np.asarray(image.dataobj), data)
