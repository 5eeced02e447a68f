"""Real images to learn from: how they are found, read, moved and scanned."""

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from synthseg.config import GeneratorConfig, ImageConfig
from synthseg.config.artefacts import ArtefactConfig
from synthseg.config.finetuning import TaskName
from synthseg.errors import ConfigError, LabelError
from synthseg.training.examples import distinct_names, find_images, head_mask, load_example
from synthseg.training.scenes import STRAIGHT, ImagePlan, image_plan, moved, scan
from synthseg.training.tasks import without_artefacts

SHAPE, SPACING_MM = (30, 37, 33), (1.5, 1.25, 2.0)
BRIGHT = {0: 0.0, 2: 700.0, 41: 700.0, 3: 450.0, 42: 450.0, 24: 150.0, 511: 300.0}
QUIET = without_artefacts(ArtefactConfig(), "segmentation")
GRID = GeneratorConfig(shape=(31, 33, 35), voxel_size_mm=1.25, subsamples=1, artefacts=QUIET)


def head_ids() -> np.ndarray:
    """A head that differs left from right; FreeSurfer ids. The brain is off the middle of the volume."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
    radius = np.sqrt(x**2 + y**2 + (z - 0.1) ** 2)
    ids = np.zeros(SHAPE, dtype=np.int16)
    ids[radius < 0.85] = 511
    ids[radius < 0.7] = 24
    ids[(radius < 0.6) & (x < 0)] = 3
    ids[(radius < 0.6) & (x >= 0)] = 42
    ids[(radius < 0.4) & (x < 0)] = 2
    ids[(radius < 0.3) & (x >= 0)] = 41
    return ids


def write(path: Path, data: np.ndarray, shift_mm: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*SPACING_MM, 1.0])
    affine[0, 3] = shift_mm
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> ImageConfig:
    ids = head_ids()
    image = np.vectorize(BRIGHT.get)(ids).astype(np.float32)
    image = ndimage.gaussian_filter(image, 0.7)
    files = write(tmp_path / "a_image.nii.gz", image), write(tmp_path / "a_label.nii.gz", ids)
    return ImageConfig(image=str(files[0]), labels=str(files[1]), scheme="head")


def test_an_example_has_its_labels_and_the_middle_of_its_brain(pair: ImageConfig) -> None:
    example = load_example(pair, "siam16", "segmentation")
    assert example.image.shape == example.labels.shape
    assert example.spacing_mm == pytest.approx(SPACING_MM)
    assert (float(example.image.min()), float(example.image.max())) == (0.0, 1.0)
    assert example.table is not None
    found = example.table.ids[example.labels.numpy()]
    brain = np.argwhere((found > 0) & (found < 100) & (found != 24))
    assert example.center == pytest.approx(tuple((brain.min(0) + brain.max(0)) / 2))
    assert set(np.unique(found)) == set(BRIGHT)


def test_without_labels_the_head_is_what_is_not_air(pair: ImageConfig) -> None:
    example = load_example(ImageConfig(image=pair.image), "siam16", "bias-field")
    labelled = load_example(pair, "siam16", "segmentation")
    assert example.table is None
    both = (example.labels > 0) & (labelled.labels > 0)
    assert float(both.sum()) / float((labelled.labels > 0).sum()) > 0.9
    hollow = torch.zeros(12, 14, 13)
    hollow[3:9, 3:9, 3:9] = 1.0
    hollow[5:7, 5:7, 5:7] = 0.0
    hollow[0, 0, 0] = 1.0
    expected = torch.zeros(12, 14, 13, dtype=torch.uint8)
    expected[3:9, 3:9, 3:9] = 1
    assert torch.equal(head_mask(hollow), expected)


def test_where_it_is_an_image_stays_as_it_is(pair: ImageConfig) -> None:
    """Straight, the first of its voxels on one of the scan along each axis."""
    example = load_example(pair, "siam16", "segmentation")
    look = image_plan(GRID, example, seed=0, index=0, pose=False)
    seen = moved(example, look)
    at = [
        np.arange(n) * 1.25 / mm + np.rint(c - (n - 1) * 1.25 / (2 * mm))
        for n, mm, c in zip(GRID.shape, example.spacing_mm, example.center, strict=True)
    ]
    grid = np.stack(np.meshgrid(*at, indexing="ij"))
    expected = ndimage.map_coordinates(example.image.numpy(), grid, order=1, mode="grid-constant")
    inside = np.all([(g >= 0) & (g <= n - 1) for g, n in zip(grid, example.image.shape, strict=True)], axis=0)
    np.testing.assert_allclose(seen.image[0].numpy()[inside], expected[inside], atol=2e-4)
    nearest = ndimage.map_coordinates(example.labels.numpy(), grid, order=0, mode="grid-constant")
    assert (seen.labels.numpy() != nearest).mean() < 0.01  # but where a voxel lies just between two
    assert torch.equal(scan(seen).labels, seen.labels)
    assert (scan(seen).image - seen.image).abs().max() < 0.1


@pytest.mark.parametrize("odd", [0, 1])
def test_where_voxel_sizes_agree_an_image_is_seen_voxel_by_voxel(odd: int, pair: ImageConfig) -> None:
    """Whether the middle of the brain is a voxel or lies between two."""
    example = replace(load_example(pair, "siam16", "segmentation"), spacing_mm=(1.25, 1.25, 1.25))
    shape = (16 + odd, 18, 20 + odd)
    settings = GRID.model_copy(update={"shape": shape})
    for center in ((15.0, 19.5, 17.0), (15.5, 19.0, 16.5)):
        there = replace(example, center=center)
        seen = moved(there, image_plan(settings, there, 0, 0, pose=False))
        first = [round(c - (n - 1) / 2) for c, n in zip(center, shape, strict=True)]
        box = tuple(slice(start, start + n) for start, n in zip(first, shape, strict=True))
        assert torch.equal(seen.labels, example.labels[box])
        torch.testing.assert_close(seen.image[0], example.image[box], rtol=0, atol=1e-4)


@pytest.mark.parametrize("task", ["segmentation", "bias-field"])
def test_beyond_a_scan_that_is_cut_at_the_neck_there_is_nothing(task: TaskName, tmp_path: Path) -> None:
    """No label where there is no image: what a network learns of air it would learn of the head."""
    ids = head_ids()[:, :, 12:]
    image = np.vectorize(BRIGHT.get)(ids).astype(np.float32)
    files = write(tmp_path / "a_image.nii.gz", image), write(tmp_path / "a_label.nii.gz", ids)
    labels = str(files[1]) if task == "segmentation" else ""
    example = load_example(ImageConfig(image=str(files[0]), labels=labels), "head", task)
    settings = GRID.model_copy(update={"shape": (31, 33, 65)})
    look = image_plan(settings, example, 0, 0, pose=False)
    seen = moved(example, look)
    at = example.center[2] + (look.deform.shift_mm[2] + (np.arange(65) - 32) * 1.25) / SPACING_MM[2]
    below = at < 0.5  # nearer to the border than to the first slice
    assert 10 < below.sum() < 40
    assert (example.labels[:, :, 1] > 0).any()
    assert not seen.labels[:, :, below].any()
    assert not seen.head[:, :, below].any()
    assert seen.labels[:, :, ~below].any()


def test_a_mirrored_image_has_its_sides_exchanged(pair: ImageConfig) -> None:
    example = load_example(pair, "siam16", "segmentation")
    look = image_plan(GRID, example, 0, 0, pose=False)
    look = look.model_copy(update={"deform": STRAIGHT})
    mirrored = look.model_copy(update={"deform": STRAIGHT.model_copy(update={"flip": True})})
    straight, flipped = moved(example, look), moved(example, mirrored)
    torch.testing.assert_close(flipped.image, straight.image.flip(1), rtol=1e-4, atol=1e-4)
    assert example.table is not None
    swapped = torch.from_numpy(example.table.flip)[straight.labels.flip(0).long()].to(torch.uint8)
    assert (flipped.labels != swapped).float().mean() < 0.01
    left = int(example.table.index_of[2])
    assert int((flipped.labels == left).sum()) != int((straight.labels == left).sum())


def test_a_look_is_drawn_once_and_kept(pair: ImageConfig) -> None:
    example = load_example(pair, "siam16", "segmentation")
    settings = GRID.model_copy(update={"artefacts": ArtefactConfig()})
    look = image_plan(settings, example, 3, 7)
    again = ImagePlan.model_validate_json(look.model_dump_json())
    assert again == look != image_plan(settings, example, 3, 8)
    assert torch.equal(scan(moved(example, look)).image, scan(moved(example, again)).image)


def test_masks_need_labels(pair: ImageConfig) -> None:
    example = load_example(ImageConfig(image=pair.image), "siam16", "bias-field")
    masking = ArtefactConfig().masking.model_copy(update={"deface_probability": 1.0})
    settings = GRID.model_copy(update={"artefacts": QUIET.model_copy(update={"masking": masking})})
    assert not image_plan(settings, example, 0, 0).artefacts.masked
    labelled = load_example(pair, "siam16", "bias-field")
    assert image_plan(settings, labelled, 0, 0).artefacts.masked


def test_an_aligned_t1_is_read_by_its_position(pair: ImageConfig, tmp_path: Path) -> None:
    ids = head_ids()
    t1 = np.isin(ids, [2, 41]) * 900.0 + np.isin(ids, [3, 42]) * 500.0
    whole = write(tmp_path / "t1.nii.gz", t1.astype(np.float32))
    part = write(tmp_path / "part.nii.gz", t1[2:].astype(np.float32), shift_mm=2 * SPACING_MM[0])
    both = [load_example(pair.model_copy(update={"t1": str(file)}), "head", "reconstruction") for file in (whole, part)]
    assert both[0].t1 is not None
    assert both[1].t1 is not None
    torch.testing.assert_close(both[0].t1, both[1].t1)
    assert both[0].table is not None
    white = torch.from_numpy(np.isin(both[0].table.ids, [2, 41]))[both[0].labels.long()]
    assert float(both[0].t1[white].median()) == pytest.approx(0.7)


def test_what_does_not_belong_together_is_refused(pair: ImageConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no label map, which segmentation needs"):
        load_example(ImageConfig(image=pair.image), "siam16", "segmentation")
    with pytest.raises(ConfigError, match="no T1 scan, which reconstruction needs"):
        load_example(pair, "siam16", "reconstruction")
    other = write(tmp_path / "other.nii.gz", head_ids(), shift_mm=40.0)
    with pytest.raises(ConfigError, match="not on the voxel grid"):
        load_example(pair.model_copy(update={"labels": str(other)}), "siam16", "segmentation")
    with pytest.raises(LabelError, match="not in scheme"):
        load_example(pair.model_copy(update={"scheme": "siam16"}), "siam16", "segmentation")
    far = write(tmp_path / "far.nii.gz", head_ids(), shift_mm=4000.0)
    with pytest.raises(ConfigError, match="does not overlap"):
        load_example(pair.model_copy(update={"t1": str(far)}), "head", "reconstruction")
    with pytest.raises(ConfigError, match="missing"):
        load_example(ImageConfig(image=str(tmp_path / "missing.nii.gz")), "head", "bias-field")


@pytest.mark.parametrize(
    ("files", "pairs"),
    [
        (["b_image.nii.gz", "b_label.nii.gz", "a_image.nii", "a_label.nii"], ["a_label.nii", "b_label.nii.gz"]),
        (["a.nii.gz", "a_dseg.nii.gz"], ["a_dseg.nii.gz"]),
        (
            ["imagesTr/x_0000.nii.gz", "imagesTr/y_0000.nii.gz", "labelsTr/x.nii.gz", "labelsTr/y.nii.gz"],
            ["labelsTr/x.nii.gz", "labelsTr/y.nii.gz"],
        ),
        (  # of a test set that has the names of the training set, and of one without label maps
            ["imagesTr/x_0000.nii.gz", "imagesTs/x_0000.nii.gz", "labelsTr/x.nii.gz", "labelsTs/x.nii.gz"],
            ["labelsTr/x.nii.gz"],
        ),
        (["imagesTr/x_0000.nii.gz", "imagesTs/z_0000.nii.gz", "labelsTr/x.nii.gz"], ["labelsTr/x.nii.gz"]),
        (
            ["imagesA/x.nii.gz", "imagesB/x.nii.gz", "labelsA/x.nii.gz", "labelsB/x.nii.gz"],
            ["labelsA/x.nii.gz", "labelsB/x.nii.gz"],
        ),
        (["images/x.nii.gz", "labels/x_seg.nii.gz"], ["labels/x_seg.nii.gz"]),
        (["a_T1w.nii.gz", "a_T1w_seg.nii.gz"], ["a_T1w_seg.nii.gz"]),
        (["sub-1_T1w.nii.gz", "sub-1_dseg.nii.gz"], ["sub-1_dseg.nii.gz"]),
        (["a.nii.gz", "a_seg.nii.gz", "a_t1.nii.gz"], ["a_seg.nii.gz"]),  # the T1 of the same head
        (  # where partners have a folder, every image is one
            ["images/x.nii.gz", "images/x_T1w.nii.gz", "labels/x.nii.gz", "labels/x_T1w.nii.gz"],
            ["labels/x.nii.gz", "labels/x_T1w.nii.gz"],
        ),
        (["images/s_seg.nii.gz", "labels/s_seg.nii.gz"], ["labels/s_seg.nii.gz"]),
        (  # what other commands make of a scan
            ["a.nii.gz", "a_seg.nii.gz", "a_mask.nii.gz", "a_unbiased.nii.gz", "a_t1synth.nii.gz", "a_posteriors.nii"],
            ["a_seg.nii.gz"],
        ),
    ],
)
def test_images_of_a_folder_find_their_partners(files: list[str], pairs: list[str], tmp_path: Path) -> None:
    for name in files:
        write(tmp_path / name, np.zeros((2, 2, 2), dtype=np.int16))
    found = find_images(tmp_path, "segmentation")
    assert len(find_images(tmp_path, "bias-field")) == len(pairs)
    assert [str(Path(one.labels).relative_to(tmp_path)) for one in found] == pairs
    assert all("label" not in Path(one.image).stem for one in found)
    assert not any("Ts" in one.image for one in found)


def test_a_t1_is_found_beside_its_image(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "a_t1.nii.gz", "b_flair_image.nii.gz", "b_flair_T1w.nii.gz", "b_flair_label.nii.gz"):
        write(tmp_path / name, np.zeros((2, 2, 2), dtype=np.int16))
    found = find_images(tmp_path, "reconstruction")
    assert [(Path(one.image).name, Path(one.t1).name) for one in found] == [
        ("a.nii.gz", "a_t1.nii.gz"),
        ("b_flair_image.nii.gz", "b_flair_T1w.nii.gz"),
    ]
    for name in ("imagesTr/a_T1w.nii.gz", "imagesTr/a_T2w.nii.gz", "t1Tr/a_T1w.nii.gz", "t1Tr/a_T2w.nii.gz"):
        write(tmp_path / "apart" / name, np.zeros((2, 2, 2), dtype=np.int16))
    assert [Path(one.t1).name for one in find_images(tmp_path / "apart", "reconstruction")] == [
        "a_T1w.nii.gz",
        "a_T2w.nii.gz",
    ]


def test_images_of_one_file_name_are_told_apart() -> None:
    files = [Path("/data/sub-1/t1.nii.gz"), Path("/data/sub-2/t1.nii.gz"), Path("/data/other.mgz")]
    assert distinct_names(files) == ["sub-1/t1", "sub-2/t1", "other"]
    assert distinct_names(files[:1], ("t1", "t2")) == ["sub-1/t1"]
    deep = [Path(f"/{site}/sub-1/t1.nii.gz") for site in ("a", "b")]
    assert distinct_names(deep) == ["a/sub-1/t1", "b/sub-1/t1"]
    both = [Path("/data/x.nii.gz"), Path("/data/x.mgz"), Path("/other/x.mgz")]
    assert distinct_names(both) == ["x.nii.gz", "x.mgz", "x"]
    assert distinct_names([*both, Path("/more/x.mgz")]) == ["x.nii.gz", "x.mgz", "other/x", "more/x"]
    assert distinct_names([files[0], files[0]]) == ["data/sub-1/t1"] * 2


def test_a_missing_partner_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz", np.zeros((2, 2, 2), dtype=np.int16))
    assert len(find_images(tmp_path, "bias-field")) == 1
    with pytest.raises(ConfigError, match=r"a\.nii\.gz has no label map; expected a_label\.nii\.gz"):
        find_images(tmp_path, "segmentation")
    with pytest.raises(ConfigError, match="has no T1"):
        find_images(tmp_path, "reconstruction")
    with pytest.raises(ConfigError, match="no such folder"):
        find_images(tmp_path / "none", "segmentation")
    for name in ("imagesTr/x_0000.nii.gz", "labelsVal/x.nii.gz"):
        write(tmp_path / "pairs" / name, np.zeros((2, 2, 2), dtype=np.int16))
    with pytest.raises(ConfigError, match=r"x_0000\.nii\.gz has no label map; expected labelsTr/x\.nii\.gz"):
        find_images(tmp_path / "pairs", "segmentation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no images"):
        find_images(tmp_path / "empty", "segmentation")
