"""Intensities measured in scans with labels: the right values, on the scale of inference, without border voxels."""

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from synthseg import rng
from synthseg.config import ContrastConfig, parse
from synthseg.errors import ConfigError, InputError, LabelError, TemplateError
from synthseg.generator import priors
from synthseg.generator.contrast import sample_contrast
from synthseg.generator.draw import Draw
from synthseg.inference import conform
from synthseg.labels import LabelTable
from synthseg.volume import Volume

AFFINE = np.array([[-1.5, 0, 0, 40], [0, 0, 1.2, -30], [0, -2, 0, 50], [0, 0, 0, 1]], dtype=float)
VALUES = {0: 0.0, 511: 900.0, 24: 100.0, 3: 400.0, 42: 400.0, 2: 700.0, 41: 700.0}


def scene(gain: float = 1.0, noise: float = 8.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Nested balls, left and right: ids, and an image whose border voxels mix two tissues."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (44, 40, 42)], indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    ids = np.zeros(radius.shape, np.int16)
    for limit, label in ((0.95, 511), (0.85, 24), (0.7, 3), (0.5, 2)):
        ids[radius < limit] = label
    right = grid[0] < 0
    ids[right & (ids == 3)], ids[right & (ids == 2)] = 42, 41
    image = np.vectorize(VALUES.get)(ids).astype(np.float64)
    mixed = np.zeros_like(image)
    for axis in range(3):  # a blur of one voxel
        mixed += np.roll(image, 1, axis) + np.roll(image, -1, axis)
    image = (2 * image + mixed) / 8 + np.random.default_rng(seed).normal(0, noise, image.shape)
    return ids, gain * image


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    ids, image = scene()
    return save(tmp_path / "a.nii.gz", image.astype(np.float32)), save(tmp_path / "b.nii.gz", ids)


def test_medians_are_those_of_the_pure_tissue(head: LabelTable) -> None:
    ids, image = scene()
    found = priors.measure(image.astype(np.float32), head.to_index(ids), head)
    assert set(found) == {"air", "skin", "csf", "gm", "wm"}
    scaled = {t: m.median / found["wm"].median for t, m in found.items()}
    assert scaled["gm"] == pytest.approx(4 / 7, abs=0.02)
    assert scaled["csf"] == pytest.approx(1 / 7, abs=0.03)
    one_unit = found["wm"].median / 700
    assert found["wm"].std == pytest.approx(8 * one_unit, rel=0.15)


def test_the_scale_is_that_of_inference(head: LabelTable) -> None:
    ids, image = scene()
    seen = conform(Volume(image.astype(np.float32), np.eye(4)), 1.0).numpy()
    np.testing.assert_allclose(priors.normalised(image), seen, atol=1e-5)
    found = priors.measure(image, head.to_index(ids), head)
    assert found["wm"].median == pytest.approx(np.median(seen[np.isin(ids, (2, 41))]), abs=0.01)
    again = priors.measure(37.0 * image, head.to_index(ids), head)
    assert again["gm"].median == pytest.approx(found["gm"].median, abs=1e-4)


def test_a_ct_is_windowed(head: LabelTable) -> None:
    ids, _ = scene()
    hu = np.vectorize({0: -1000, 511: -90, 24: 8, 3: 37, 42: 37, 2: 28, 41: 28}.get)(ids).astype(np.float32)
    hu[ids == 511] += np.where(np.random.default_rng(1).random((ids == 511).sum()) < 0.5, 1200, 0)
    hu += np.random.default_rng(0).normal(0, 3, hu.shape)
    found = priors.measure(hu, head.to_index(ids), head)
    assert found["gm"].median == pytest.approx(137 / 250, abs=0.02)
    assert found["wm"].median == pytest.approx(128 / 250, abs=0.02)


def test_inner_voxels_have_neighbours_of_their_own_tissue() -> None:
    tissue = np.zeros((5, 6, 7), np.uint8)
    tissue[1:4, 1:5, 1:6] = 1
    core = priors.inner(tissue)
    assert core[2, 2, 2]
    assert core[2, 3, 4]
    assert not core[1, 2, 2]
    assert not core[2, 2, 1]
    assert core[0, 0, 0]
    assert int((core & (tissue == 1)).sum()) == 1 * 2 * 3


def test_thin_tissue_is_measured_with_its_border_and_tiny_tissue_not_at_all(head: LabelTable) -> None:
    ids, image = scene()
    thin = ids.copy()
    thin[20, :, :] = np.where(ids[20] > 0, 540, 0)  # one voxel of dura: nothing is left inside
    thin[22:25, 20:23, 20:23] = 10  # 27 voxels of thalamus
    found = priors.measure(image, head.to_index(thin), head)
    assert found["dura"].voxels == int((thin == 540).sum())
    assert "thalamus" not in found


def test_background_of_a_brain_map_is_not_air(head: LabelTable) -> None:
    ids, image = scene()
    brain = np.where(ids == 511, 0, ids)
    assert "air" not in priors.measure(image, head.to_index(brain), head)


def test_ranges_span_the_scans(tmp_path: Path, head: LabelTable) -> None:
    for number, gain in enumerate((1.0, 3.0, 0.2)):
        ids, image = scene(gain, noise=8 + 8 * number, seed=number)
        image[np.isin(ids, (3, 42))] += gain * 60 * number
        save(tmp_path / "scans" / f"sub{number}_T1w.nii.gz", image.astype(np.float32))
        save(tmp_path / "labels" / f"sub{number}_seg.nii.gz", ids)
    found = priors.estimate([tmp_path / "scans"], [tmp_path / "labels"], head)
    assert found.images == ("sub0_T1w.nii.gz", "sub1_T1w.nii.gz", "sub2_T1w.nii.gz")
    single = [
        priors.measure(
            np.asarray(nib.load(file).dataobj), head.to_index(np.asarray(nib.load(lab).dataobj).astype(int)), head
        )
        for file, lab in zip(
            sorted((tmp_path / "scans").iterdir()), sorted((tmp_path / "labels").iterdir()), strict=True
        )
    ]
    gm = [s["gm"].median for s in single]
    low, high = found.tissues["gm"].mean
    assert low < min(gm) < max(gm) < high
    assert high - low == pytest.approx(1.5 * (max(gm) - min(gm)), rel=0.05)
    low, high = found.tissues["wm"].std
    assert low < min(s["wm"].std for s in single) < max(s["wm"].std for s in single) < high
    assert found.tissues["gm"].images == 3


def test_draws_follow_the_file(pair: tuple[Path, Path], tmp_path: Path, head: LabelTable) -> None:
    found = priors.estimate([pair[0]], [pair[1]], head)
    file = tmp_path / "priors.yaml"
    file.write_text(found.to_yaml())
    assert priors.load_priors(file) == found
    record = {"random_weight": 0, "named_weights": {}, "priors_weight": 1, "priors": str(file)}
    skull = set()
    for seed in range(20):
        draw = Draw(rng.generator(seed, 0, "contrast"))
        plan = sample_contrast(parse(ContrastConfig, record, "test"), head, (40.0,) * 3, draw, False)
        assert plan.name == "priors"
        for label, mean, std in zip(head.labels, plan.mean, plan.std, strict=True):
            if label.tissue in found.tissues and label.tissue != "air":
                low, high = found.tissues[label.tissue].mean
                assert low <= mean <= high
                low, high = found.tissues[label.tissue].std
                assert low <= std <= high
            elif label.tissue == "bone_cortical":
                skull.add(round(mean, 6))
    assert len(skull) == 20  # not measured: fully random
    assert max(skull) - min(skull) > 0.5


def test_mixed_with_uniform_means(pair: tuple[Path, Path], tmp_path: Path, head: LabelTable) -> None:
    file = tmp_path / "priors.yaml"
    file.write_text(priors.estimate([pair[0]], [pair[1]], head).to_yaml())
    record = {"random_weight": 1, "named_weights": {}, "priors_weight": 1, "priors": str(file)}
    config = parse(ContrastConfig, record, "test")
    names = [
        sample_contrast(config, head, (9.0,) * 3, Draw(rng.generator(seed, 0, "contrast")), False).name
        for seed in range(200)
    ]
    assert set(names) == {"random", "priors"}
    assert names.count("priors") / 200 == pytest.approx(0.5, abs=0.1)


# ---------------------------------------------------------------- what cannot be used


def test_another_grid_is_refused(pair: tuple[Path, Path], tmp_path: Path, head: LabelTable) -> None:
    ids, _ = scene()
    cut = save(tmp_path / "cut.nii.gz", ids[:-1])
    with pytest.raises(InputError, match=r"a\.nii\.gz: its grid .*cut\.nii\.gz.*resample"):
        priors.estimate([pair[0]], [cut], head)
    moved = AFFINE.copy()
    moved[0, 3] += 3
    with pytest.raises(InputError, match="resample the labels"):
        priors.estimate([pair[0]], [save(tmp_path / "moved.nii.gz", ids, moved)], head)


def test_maps_that_are_no_use_are_refused(pair: tuple[Path, Path], tmp_path: Path, head: LabelTable) -> None:
    ids, image = scene()
    with pytest.raises(LabelError, match=r"ids \[9999\] are not in scheme 'head'"):
        priors.estimate([pair[0]], [save(tmp_path / "x.nii.gz", np.where(ids == 24, 9999, ids).astype(np.int32))], head)
    few = np.zeros_like(ids)
    few[20:22, 20:22, 20:22] = 2
    with pytest.raises(LabelError, match="no tissue of scheme 'head' has 50 voxels"):
        priors.estimate([pair[0]], [save(tmp_path / "y.nii.gz", few)], head)
    with pytest.raises(TemplateError, match="non-integer"):
        priors.estimate([pair[0]], [save(tmp_path / "z.nii.gz", image.astype(np.float32).clip(0) + 0.4)], head)


def test_scans_find_their_maps_by_name(tmp_path: Path) -> None:
    def files(*names: str) -> list[Path]:
        return [tmp_path / name for name in names]

    assert priors.pair_up(files("x.nii"), files("other.mgz")) == [(tmp_path / "x.nii", tmp_path / "other.mgz")]
    images = files("0000_image.nii.gz", "0001_image.nii.gz", "s_acq-1_T2w.nii")
    maps = files("s_acq-1_aseg.mgz", "0001_label.nii.gz", "0000_label.nii.gz")
    assert [label.name for _, label in priors.pair_up(images, maps)] == [
        *("0000_label.nii.gz", "0001_label.nii.gz", "s_acq-1_aseg.mgz")
    ]
    with pytest.raises(InputError, match=r"0001_image.*no label map of its name.*0001_seg"):
        priors.pair_up(images, maps[:1] + maps[2:])
    with pytest.raises(InputError, match="2 label maps of its name"):
        priors.pair_up(images[:2], [*maps, tmp_path / "0000_seg.nii.gz"])


def test_names_lose_the_roles_of_their_files_and_nothing_else(tmp_path: Path) -> None:
    def files(*names: str) -> list[Path]:
        return [tmp_path / f"{name}.nii.gz" for name in names]

    images = files("subject1", "subject2_T1w", "direct", "t1-select_ct")
    maps = files("direct_seg", "subject2_T1w_seg", "subject1-labels", "t1-select.aparc+aseg")
    found = [(image.name, label.name) for image, label in priors.pair_up(images, maps)]
    assert found == [(images[i].name, maps[j].name) for i, j in ((0, 2), (1, 1), (2, 0), (3, 3))]
    with pytest.raises(InputError, match=r"subject1.*no label map of its name.*subject1_seg"):
        priors.pair_up(images[:2], maps[:2])


def test_a_map_that_is_given_is_no_scan_of_its_folder(pair: tuple[Path, Path], head: LabelTable) -> None:
    assert pair[0].parent == pair[1].parent
    assert priors.estimate([pair[0].parent], [pair[1]], head).images == ("a.nii.gz",)


def test_a_background_that_is_not_called_air_is_measured_as_air(head: LabelTable) -> None:
    ids, image = scene()
    soft = replace(head, labels=(replace(head.labels[0], tissue="soft"), *head.labels[1:]))
    assert priors.measure(image, soft.to_index(ids), soft) == priors.measure(image, head.to_index(ids), head)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("tissues: [", "not valid YAML"),
        (
            "scheme: head\nimages: [a]\ntissues: {gm: {mean: [0.9, 0.1], std: [0, 1], images: 1, voxels: 9}}",
            "low, high",
        ),
        ("scheme: head\nimages: [a]\ntissue: {}", "did you mean 'tissues'"),
    ],
)
def test_bad_files_are_named(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        priors.load_priors(file)
    assert "p.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    import os

    text = "scheme: head\nimages: [a]\ntissues: {{gm: {{mean: [{0}, {0}], std: [0, 0], images: 1, voxels: 60}}}}\n"
    file = tmp_path / "p.yaml"
    for number, value in enumerate((0.25, 0.5)):
        file.write_text(text.format(value))
        os.utime(file, ns=(number * 10**9, number * 10**9))
        assert priors.load_priors(file).tissues["gm"].mean == (value, value)
