"""Geometry, clean-up and memory of segmentation, with stand-ins for the trained network."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from synthseg import conforming, inference, intensity, modes, posteriors, prediction
from synthseg.conforming import conform, grid_shape
from synthseg.errors import CheckpointError, ConfigError, InputError, LabelError
from synthseg.inference import Options, clean_up, in_scheme, segment, stray_components
from synthseg.labels import Label, LabelTable
from synthseg.metrics import dice
from synthseg.posteriors import scan_grid
from synthseg.prediction import Member, predict, predict_with_agreement
from synthseg.quality import Evidence, Quality
from synthseg.volume import Volume, canonical, load_volume

CPU = torch.device("cpu")
TWO = LabelTable("two", (Label(0, "Background", tissue="air"), Label(7, "Blob", tissue="gm")))


class Threshold(torch.nn.Module):
    """Foreground where the intensity is above one half; looks at one voxel at a time."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logit = 20 * (image - 0.5)
        return torch.cat([-logit, logit], 1)


class Random(torch.nn.Module):
    """Five classes from a fixed random convolution: any mistake of orientation changes its result."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.randn(5, 1, *[size] * 3, generator=torch.manual_seed(0)))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return 5 * torch.nn.functional.conv3d(image, self.kernel, padding="same")


FIVE = LabelTable("five", tuple(Label(i * 10, f"L{i}", tissue="air" if i == 0 else "gm") for i in range(5)))


@dataclass
class Fake:
    network: torch.nn.Module = field(default_factory=Threshold)
    labels: LabelTable = TWO
    voxel_size_mm: float = 2.0
    window: tuple[int, int, int] = (16, 24, 32)
    multiple: int = 8
    name: str = "fake"
    sha256: str = "0" * 64


def oblique_affine(rng: np.random.Generator, spacing_mm: tuple[float, ...], largest_deg: float = 25) -> np.ndarray:
    angles = rng.uniform(-largest_deg, largest_deg, 3)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine[:3, :3] = affine[:3, :3] @ np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3) @ np.diag(spacing_mm)
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    return affine


def voxel_centres_mm(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    return nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))


def blobs(shape: tuple[int, ...], affine: np.ndarray, centres_mm: np.ndarray, radius_mm: float) -> np.ndarray:
    """Balls with soft edges, 1 inside and 0 outside, drawn in mm."""
    positions = voxel_centres_mm(shape, affine)
    distances = np.stack([np.linalg.norm(positions - centre, axis=-1) for centre in centres_mm]).min(0)
    return np.clip(0.5 + (radius_mm - distances) / 3, 0, 1).astype(np.float32)


# ----------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("seed", range(8))
def test_landmarks_are_found_where_they_are(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(inference, "MINOR_FRACTION", 0.0)
    monkeypatch.setattr(inference, "WHOLE_HEAD_MM", 1e9)  # all blobs stay
    spacing_mm = [(1.0, 1.3, 1.6), (2.9, 1.1, 1.7), (2.0, 2.0, 2.0), (0.8, 1.0, 4.5)][seed % 4]
    shape = tuple(int(extent / s) for extent, s in zip((70, 64, 76), spacing_mm, strict=True))
    affine = oblique_affine(rng, spacing_mm)
    middle = nib.affines.apply_affine(affine, (np.array(shape) - 1) / 2)
    centres_mm = middle + np.array([[18.0, 3.0, -7.0], [-14.0, -16.0, 4.0], [-3.0, 14.0, 15.0]])
    volume = Volume(100 * blobs(shape, affine, centres_mm, 8.0), affine)

    labels = segment(volume, Fake(window=(40, 40, 40)), CPU).labels
    assert labels.shape == shape
    components, count = ndimage.label(labels == 7)
    assert count == 3
    found = np.array(ndimage.center_of_mass(labels == 7, components, [1, 2, 3]))
    found_mm = nib.affines.apply_affine(affine, found)
    for centre in centres_mm:
        assert np.linalg.norm(found_mm - centre, axis=1).min() < 0.15 * max(spacing_mm) + 0.15


@pytest.mark.parametrize(
    ("spacing_mm", "tolerance"),  # slices 10 mm apart hold the ball in two slices
    [((0.3, 0.3, 0.4), 0.05), ((10.0, 1.0, 1.2), 0.2), ((3.0, 3.0, 3.0), 0.08), ((1.0, 6.0, 1.0), 0.08)],
)
def test_volume_of_a_ball_at_any_resolution(spacing_mm: tuple[float, ...], tolerance: float) -> None:
    affine = oblique_affine(np.random.default_rng(1), spacing_mm)
    shape = tuple(int(44 / s) for s in spacing_mm)
    middle = nib.affines.apply_affine(affine, (np.array(shape) - 1) / 2)
    volume = Volume(blobs(shape, affine, middle[None], 14.0), affine)
    result = segment(volume, Fake(window=(24, 24, 24)), CPU)
    expected_ml = 4 / 3 * np.pi * 1.4**3
    assert result.hard_ml["Blob"] == pytest.approx(expected_ml, rel=tolerance)
    assert result.soft_ml["Blob"] == pytest.approx(expected_ml, rel=tolerance)
    assert result.hard_ml["Blob"] == pytest.approx((result.labels == 7).sum() * np.prod(spacing_mm) / 1000)
    assert sum(result.soft_ml.values()) == pytest.approx(np.prod(shape) * np.prod(spacing_mm) / 1000, rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 8, 9), (7, 1, 9), (7, 8, 1), (1, 1, 9), (2, 1, 1)])
@pytest.mark.parametrize("spacing_mm", [(0.4, 0.5, 0.6), (5.0, 3.0, 8.0)])
def test_dimensions_of_one_voxel(shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> None:
    data = np.zeros(shape, np.float32)
    data.flat[data.size // 2 :] = 50
    result = segment(Volume(data, np.diag([*spacing_mm, 1.0])), Fake(), CPU)
    assert result.labels.shape == shape
    assert set(np.unique(result.labels)) <= {0, 7}


def test_48_orientations_and_types_give_identical_results(tmp_path: Path) -> None:
    shape, affine = (7, 8, 9), np.diag([2.6, 2.3, 3.7, 1.0])
    data = 2 * np.random.default_rng(0).integers(0, 200, shape) + 3
    model = Fake(Random(), FIVE, window=(16, 16, 24))
    reference = segment(Volume(data.astype(np.float32), affine), model, CPU)
    assert len(np.unique(reference.labels)) >= 4
    base = nib.Nifti1Image(data.astype(np.int16), affine)
    for order, flips in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        turned = base.as_reoriented(np.stack([order, flips], 1))
        for dtype in (np.int16, np.float32, np.uint8):
            values = np.asarray(turned.dataobj)
            stored = (values - 3) // 2 if dtype == np.uint8 else values
            image = nib.Nifti1Image(stored.astype(dtype), turned.affine)
            if dtype == np.uint8:
                image.header.set_slope_inter(2, 3)
            nib.save(image, tmp_path / "scan.nii")
            volume = load_volume(tmp_path / "scan.nii")
            np.testing.assert_array_equal(volume.data, values)
            result = segment(volume, model, CPU)
            back = nib.as_closest_canonical(nib.Nifti1Image(result.labels.astype(np.uint8), turned.affine))
            np.testing.assert_array_equal(np.asarray(back.dataobj), reference.labels)
            assert result.soft_ml == pytest.approx(reference.soft_ml)


def test_data_is_not_modified_and_runs_are_repeatable() -> None:
    data = np.random.default_rng(0).normal(size=(9, 8, 7)).astype(np.float32)
    data[2, 3, 4] = np.nan
    volume, before = Volume(data, np.eye(4) * 2), data.copy()
    model = Fake(Random(), FIVE)
    first, second = segment(volume, model, CPU), segment(volume, model, CPU)
    np.testing.assert_array_equal(data, before)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert first.soft_ml == second.soft_ml


# --------------------------------------------------------------------------------------------- intensities


def test_nan_and_infinity_become_the_minimum() -> None:
    data = np.random.default_rng(0).uniform(10, 100, (9, 8, 7)).astype(np.float32)
    clean = data.copy()
    data[0, 0, 0], data[1, 2, 3], data[4, 5, 6] = np.nan, np.inf, -np.inf
    clean[0, 0, 0] = clean[1, 2, 3] = clean[4, 5, 6] = data[np.isfinite(data)].min()
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    torch.testing.assert_close(conform(Volume(data, affine), 2.0), conform(Volume(clean, affine), 2.0))


def test_ct_is_windowed_before_resampling() -> None:
    """Averaged with air and metal of thousands of HU, a voxel would lose its contrast."""
    data = np.full((20, 21, 22), -1000.0, np.float32)
    data[3:17, 3:17, 3:17] = -90  # fat
    data[4:16, 4:16, 4:16] = np.random.default_rng(0).normal(40, 20, (12, 12, 12))
    data[9:12, 10, 10] = 3000
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    windowed = conform(Volume(np.clip(data, -100, 150), affine), 3.0)
    torch.testing.assert_close(conform(Volume(data, affine), 3.0), windowed)


def test_intensities_are_normalised_after_resampling() -> None:
    """A fine pattern of 0 and 200 and a flat 100 are the same on a coarse grid: both are its brightest tissue."""
    data = np.zeros((48, 24, 24), np.float32)
    data[8:20, 4:20, 4:20] = 200 * (np.arange(12) % 2)[:, None, None]
    data[28:40, 4:20, 4:20] = 100
    image = conform(Volume(data, np.eye(4)), 4.0)
    assert float(image[3, 3, 3]) == pytest.approx(1.0, abs=0.05)
    assert float(image[8, 3, 3]) == pytest.approx(1.0, abs=0.05)


# ------------------------------------------------------------------------------------------ grid and tiles


def test_grid_covers_the_field_of_view() -> None:
    volume = Volume(np.zeros((181, 60, 1), np.float32), np.diag([1.0, 3.0, 0.5, 1.0]))
    assert grid_shape(volume, 2.0) == (91, 90, 1)  # 181, 180 and 0.5 mm
    assert conform(volume, 2.0).shape == (91, 90, 1)


def test_tiled_equals_whole_for_a_pointwise_network(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(50, 37, 41)
    whole = predict(image, Fake(window=(56, 40, 48)), CPU, mixed_precision=False)
    monkeypatch.setattr(prediction, "WHOLE_RUN_VOXELS", 0)
    tiled = predict(image, Fake(window=(16, 24, 16)), CPU, mixed_precision=False)
    assert whole.shape == tiled.shape == (2, 50, 37, 41)
    torch.testing.assert_close(whole, tiled, atol=2e-3, rtol=2e-3)  # kept as float16


def test_the_network_sees_sizes_it_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(prediction, "WHOLE_RUN_VOXELS", 17_000)

    class Recorder(Threshold):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(image.shape))
            return super().forward(image)

    predict(torch.rand(3, 25, 33), Fake(Recorder(), window=(16, 24, 32)), CPU)
    predict(torch.rand(17, 24, 32), Fake(Recorder(), window=(16, 24, 32)), CPU)
    predict(torch.rand(40, 24, 32), Fake(Recorder(), window=(16, 24, 32)), CPU)
    # 24 x 24 x 32 = 18,432 and 40 x 24 x 32 are above the limit: tiles. All tiles have the window's size.
    assert set(seen) == {(1, 1, 16, 24, 32)}
    seen.clear()
    predict(
        torch.rand(16, 25, 32), Fake(Recorder(), window=(16, 24, 32)), CPU
    )  # 16 x 32 x 32 = 16,384 voxels: in one go
    assert seen == [(1, 1, 16, 32, 32)]


def test_mirror_averaging_swaps_left_and_right_classes() -> None:
    table = LabelTable("sides", (Label(0, "Bg"), Label(1, "L", partner=2), Label(2, "R", partner=1)))

    class Sides(torch.nn.Module):
        """Class 1 in the first half of the first axis, class 2 in the second: right only on an unmirrored head."""

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            ramp = torch.linspace(-9, 9, image.shape[2])[None, None, :, None, None].expand_as(image)
            return torch.cat([torch.zeros_like(image), -ramp, ramp], 1)

    model = Fake(Sides(), table)
    image = torch.rand(16, 24, 32)
    torch.testing.assert_close(
        predict(image, model, CPU, members=(Member(), Member(mirrored=True))),
        predict(image, model, CPU),
        atol=1e-3,
        rtol=1e-3,
    )


def test_blocks_give_the_result_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = Volume(np.random.default_rng(0).normal(size=(31, 13, 11)).astype(np.float32), np.diag([0.7, 2, 3, 1]))
    model = Fake(Random(), FIVE)
    whole = segment(volume, model, CPU)
    monkeypatch.setattr(posteriors, "BLOCK", 5)
    blocks = segment(volume, model, CPU)
    np.testing.assert_array_equal(whole.labels, blocks.labels)
    assert whole.hard_ml == blocks.hard_ml
    assert whole.soft_ml == pytest.approx(blocks.soft_ml, rel=1e-5)


def test_softmax_in_slabs_is_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "SOFTMAX_VOXELS", 100)
    logits = torch.randn(5, 7, 8, 9) * 4
    torch.testing.assert_close(prediction._softmax(logits).float(), logits.softmax(0), atol=1e-3, rtol=1e-3)


def test_head_box_holds_the_head_and_leaves_out_the_air() -> None:
    data = np.random.default_rng(0).normal(0, 1.5, (120, 140, 100)).astype(np.float32)
    data[60:90, 20:110, 0:70] += 100.0  # reaches the lower border
    volume = Volume(data, np.diag([2.0, 1.0, 1.5, 1.0]))
    for side, (first, last), n, spacing in zip(
        conforming.head_box(volume), ((60, 90), (20, 110), (0, 70)), data.shape, volume.spacing_mm, strict=True
    ):
        least, most = (conforming.HEAD_MARGIN_MM - 4.0) / spacing, (conforming.HEAD_MARGIN_MM + 8.0) / spacing
        assert side.start == 0 if first == 0 else least <= first - side.start <= most
        assert least <= min(side.stop, n) - last <= most


def test_a_bright_object_beside_the_head_does_not_hide_it() -> None:
    data = np.random.default_rng(0).normal(0, 1.5, (100, 110, 90)).astype(np.float32)
    data[10:70, 20:90, 10:80] += 100.0
    data[80:95, 40:70, 40:60] += 2000.0
    box = conforming.head_box(Volume(data, np.diag([2.0, 2.0, 2.0, 1.0])))
    for side, (first, last) in zip(box, ((10, 95), (20, 90), (10, 80)), strict=True):
        assert side.start <= first
        assert side.stop >= last


def test_an_impossible_field_of_view_is_refused_before_memory_is_asked_for() -> None:
    data = np.random.default_rng(0).normal(100, 20, (256, 256, 20)).astype(np.float32)
    with pytest.raises(InputError, match=r"2560 x 2560 x 200 mm .*voxel size"):
        segment(Volume(data, np.diag([10.0, 10.0, 10.0, 1.0])), Fake(voxel_size_mm=2.0), CPU)


def test_more_air_around_the_head_changes_nothing() -> None:
    data = np.zeros((40, 44, 48), np.float32)
    data[8:32, 8:36, 8:40] = np.random.default_rng(0).uniform(50, 100, (24, 28, 32))
    near = segment(Volume(data, np.diag([2.0, 2.0, 2.0, 1.0])), Fake(), CPU)
    far = segment(Volume(np.pad(data, ((20, 30), (0, 50), (40, 0))), np.diag([2.0, 2.0, 2.0, 1.0])), Fake(), CPU)
    np.testing.assert_array_equal(far.labels[20:60, :44, 40:], near.labels)
    assert far.labels.shape == (90, 94, 88)
    assert far.labels.sum() == near.labels.sum()
    assert sum(far.hard_ml.values()) == pytest.approx(90 * 94 * 88 * 8 / 1000)


@pytest.mark.parametrize("shape", [(4, 3, 5), (70, 60, 50)])
def test_a_scan_is_cleaned_slab_by_slab_as_it_would_be_whole(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN, fill values and CT are told from the whole scan, not from a slab of it; against the functions for images."""
    rng = np.random.default_rng(3)
    ct = rng.normal(-1000, 10, shape).astype(np.float32)
    inside = tuple(slice(n // 4, -(n // 4) or None) for n in shape)
    ct[inside] = rng.normal(35, 12, ct[inside].shape)
    ct[shape[0] // 2, 1, 1] = 1200
    stripped = np.zeros(shape, np.float32)
    stripped[inside] = rng.normal(0, 1, stripped[inside].shape)
    broken = ct.copy()
    broken[0, 0, 0], broken[-1, 1, 2], broken[1, 1, 1] = np.nan, np.inf, -np.inf
    for data in (ct, stripped, broken, np.full(shape, np.nan, np.float32)):
        image = torch.from_numpy(data)
        expected = intensity.fill_as_air(intensity.finite(image))
        if intensity.looks_like_hounsfield(expected):
            expected = expected.clamp(*intensity.CT_WINDOW_HU)
        for slab_voxels in (1, 2 * shape[1] * shape[2], 10**9):
            monkeypatch.setattr(conforming, "SLAB_VOXELS", slab_voxels)
            found = conforming.resample(Volume(data, np.diag([2.0, 2.0, 2.0, 1.0])), 2.0)
            torch.testing.assert_close(found, expected)


def test_a_grid_with_too_many_classes_is_refused() -> None:
    many = LabelTable("many", tuple(Label(i, f"L{i}") for i in range(50)))
    data = np.random.default_rng(0).normal(100, 20, (320, 320, 4)).astype(np.float32)
    volume = Volume(data, np.diag([1.0, 1.0, 80.0, 1.0]))  # 32.8 million voxels of 1 mm
    conforming.check_size(volume, 1.0, 17)
    with pytest.raises(InputError, match=r"33 million .* 50 classes, at most 28 million"):
        segment(volume, Fake(labels=many, voxel_size_mm=1.0), CPU)


# -------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "slow"}, "default, fast, robust"),
        ({"voxel_size_mm": 0.0}, "0.2 to 5 mm"),
        ({"voxel_size_mm": float("nan")}, "0.2 to 5 mm"),
        ({"crop_mm": (100.0, 100.0)}, "three positive"),
        ({"crop_mm": (100.0, -1.0, 100.0)}, "three positive"),
        ({"crop_mm": (100.0, float("inf"), 100.0)}, "three positive"),
    ],
)
def test_options_that_cannot_be_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options(**wrong)


class Recorder(Threshold):
    """Keeps the images that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.seen.append(image[0, 0].clone())
        return super().forward(image)


def ball(spacing_mm: float = 2.0, radius_mm: float = 20.0, sides: tuple[int, ...] = (64, 48, 56)) -> Volume:
    affine = np.diag([-spacing_mm, spacing_mm, spacing_mm, 1.0])
    middle = nib.affines.apply_affine(affine, (np.array(sides) - 1) / 2)
    return Volume(100 * blobs(sides, affine, middle[None], radius_mm), affine)


BALL_ML = 4 / 3 * np.pi * 2.0**3


def test_a_smaller_voxel_size_enlarges_what_the_network_sees() -> None:
    seen = []
    for voxel_size_mm in (2.0, 1.5):
        network = Recorder()
        result = segment(ball(), Fake(network), CPU, Options(voxel_size_mm=voxel_size_mm, mixed_precision=False))
        assert result.labels.shape == (64, 48, 56)
        assert result.hard_ml["Blob"] == pytest.approx(BALL_ML, rel=0.03)
        assert result.soft_ml["Blob"] == pytest.approx(BALL_ML, rel=0.03)
        seen.append(float((network.seen[0] > 0.5).sum()))
    assert seen[1] / seen[0] == pytest.approx((2.0 / 1.5) ** 3, rel=0.03)


def test_fast_sees_a_coarser_grid() -> None:
    networks = Recorder(), Recorder()
    for network, mode in zip(networks, ("default", "fast"), strict=True):
        result = segment(ball(), Fake(network), CPU, Options(mode=mode, mixed_precision=False))  # type: ignore[arg-type]
        assert result.hard_ml["Blob"] == pytest.approx(BALL_ML, rel=0.03)
    ratio = float((networks[0].seen[0] > 0.5).sum() / (networks[1].seen[0] > 0.5).sum())
    assert ratio == pytest.approx(modes.FAST_FACTOR**3, rel=0.05)


def test_robust_runs_its_members_and_finds_the_same_ball() -> None:
    network = Recorder()
    result = segment(ball(), Fake(network), CPU, Options(mode="robust", mixed_precision=False))
    assert len(network.seen) == len(modes.MEMBERS["robust"]) > 2
    plain = segment(ball(), Fake(), CPU, Options(mixed_precision=False))
    assert dice(result.labels, plain.labels, [7])[0] > 0.98
    assert result.hard_ml["Blob"] == pytest.approx(BALL_ML, rel=0.03)


def test_only_the_box_in_the_middle_of_the_head_is_analysed() -> None:
    """Axes of the scan run left, anterior, superior; the box is given along right, anterior, superior."""
    network = Recorder()
    options = Options(crop_mm=(20.0, 44.0, 32.0), mixed_precision=False)
    result = segment(ball(), Fake(network, window=(8, 8, 8)), CPU, options)
    whole = segment(ball(), Fake(window=(8, 8, 8)), CPU, Options(mixed_precision=False))
    assert network.seen[0].shape == (16, 24, 16)  # 10, 22 and 16 voxels of 2 mm, to multiples of 8
    expected = np.zeros_like(whole.labels)
    inside = np.s_[27:37, 13:35, 20:36]
    expected[inside] = whole.labels[inside]
    np.testing.assert_array_equal(result.labels, expected)
    assert whole.labels.sum() > 1.2 * expected.sum() > 0
    assert sum(result.hard_ml.values()) == pytest.approx(64 * 48 * 56 * 8 / 1000)


def ct_head() -> np.ndarray:
    """Noisy air, skin of fat, a skull about 1000 HU and a brain of 20 to 50 HU, in 40 x 44 x 48 voxels."""
    rng = np.random.default_rng(0)
    distance = np.max(np.abs(np.indices((40, 44, 48)) - np.array([19.5, 21.5, 23.5])[:, None, None, None]), 0)
    hu = rng.normal(-1000, 10, distance.shape)
    hu[distance < 16] = -80
    hu[distance < 15] = rng.normal(1000, 50, (distance < 15).sum())
    hu[distance < 12] = rng.uniform(20, 50, (distance < 12).sum())
    return hu.astype(np.float32)


@pytest.mark.parametrize("side_mm", [60.0, 52.0])
def test_a_ct_is_windowed_when_the_box_that_is_analysed_holds_no_air(side_mm: float) -> None:
    hu, affine = ct_head(), np.diag([2.0, 2.0, 2.0, 1.0])
    assert (hu[6:-6, 8:-8, 10:-10] > -500).all()
    shown = []
    for data in (hu, hu.clip(*intensity.CT_WINDOW_HU)):
        network = Recorder()
        segment(Volume(data, affine), Fake(network), CPU, Options(crop_mm=(side_mm,) * 3, mixed_precision=False))
        shown.append(network.seen[0])
    torch.testing.assert_close(*shown, rtol=0, atol=0)


def test_fill_around_a_standardised_brain_is_air_in_a_box_that_holds_little_of_it() -> None:
    rng = np.random.default_rng(0)
    data = np.zeros((40, 44, 48), np.float32)
    data[6:34, 8:36, 10:38] = rng.normal(0, 1, (28, 28, 28))
    data[16:24, 18:26, 20:28] = 0  # a hole that is filled as well
    network = Recorder()
    options = Options(crop_mm=(40.0,) * 3, mixed_precision=False)
    segment(Volume(data, np.diag([2.0, 2.0, 2.0, 1.0])), Fake(network, window=(8, 8, 8)), CPU, options)
    middle = tuple(n // 2 for n in network.seen[0].shape)
    assert float(network.seen[0][middle]) == 0


def test_posteriors_are_kept_on_demand() -> None:
    volume = ball()
    assert segment(volume, Fake(), CPU).posteriors is None
    result = segment(volume, Fake(), CPU, Options(keep_posteriors=True))
    assert result.posteriors is not None
    np.testing.assert_array_equal(result.posteriors.labels_on(scan_grid(volume)).labels, result.labels)
    np.testing.assert_array_equal(result.affine, volume.affine)
    assert result.table is TWO


def test_labels_in_a_coarser_scheme() -> None:
    fine = LabelTable(
        "fine",
        (
            Label(0, "Bg", tissue="air", to={"coarse": (0,)}),
            *(Label(i, f"L{i}", to={"coarse": (5,)}) for i in (1, 2)),
            *(Label(i, f"L{i}", to={"coarse": (6,)}) for i in (3, 4)),
        ),
    )
    coarse = LabelTable("coarse", (Label(0, "Bg", tissue="air"), Label(6, "B"), Label(5, "A")))
    volume = Volume(np.random.default_rng(0).normal(size=(12, 13, 11)).astype(np.float32), np.diag([-2, 2, 2, 1.0]))
    result = segment(volume, Fake(Random(), fine), CPU, Options(keep_posteriors=True))
    changed = in_scheme(result, coarse)
    assert result.posteriors is not None
    values = result.posteriors.values.float()
    sums = torch.stack([values[0], values[3] + values[4], values[1] + values[2]])  # the network's grid is the scan's
    top = sums.sort(0).values
    clear = (top[-1] - top[-2] > 0.01).numpy()[::-1]
    np.testing.assert_array_equal(changed.labels[clear], np.array([0, 6, 5])[sums.argmax(0).numpy()[::-1]][clear])
    assert set(changed.hard_ml) == set(changed.soft_ml) == {"Bg", "A", "B"}
    assert changed.soft_ml["A"] == pytest.approx(result.soft_ml["L1"] + result.soft_ml["L2"], rel=1e-3)
    assert changed.table is coarse
    with pytest.raises(LabelError):
        in_scheme(changed, fine)
    with pytest.raises(ValueError, match="posteriors"):
        in_scheme(segment(volume, Fake(Random(), fine), CPU), coarse)


def test_quality_is_judged_on_demand_from_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    def judge(evidence: Evidence, model: object) -> Quality:
        shown.append(evidence)
        return Quality({"Blob": 0.9}, 0.9, ("look at it",), False)

    monkeypatch.setattr(inference, "assess", judge)
    assert segment(ball(), Fake(), CPU, Options(quality=False)).quality is None
    assert not shown
    options = Options(mode="robust", voxel_size_mm=1.8, crop_mm=(40.0, 80.0, 80.0), keep_posteriors=True)
    result = segment(ball(), Fake(), CPU, options)
    assert result.quality is not None
    assert result.quality.scan == 0.9
    assert "look at it" in result.warnings
    (evidence,) = shown
    assert result.posteriors is not None
    assert evidence.probabilities is result.posteriors.values
    np.testing.assert_array_equal(evidence.winner, evidence.probabilities.max(0).indices.numpy())
    assert evidence.winner.dtype == np.uint8
    assert evidence.image.shape == evidence.winner.shape
    assert (evidence.voxel_size_mm, evidence.mode, evidence.cropped, evidence.rescaled) == (1.8, "robust", True, True)
    assert evidence.agreement is not None
    assert 0.9 < evidence.agreement["Blob"] <= 1
    assert evidence.scan.data[evidence.box].shape[0] == 20
    assert evidence.removed_voxels.tolist() == [0, 0]
    plain = segment(ball(), Fake(), CPU)
    assert plain.quality is not None
    assert (shown[1].agreement, shown[1].cropped, shown[1].rescaled) == (None, False, False)


# ------------------------------------------------------------------------------------------------- members


SIDED = LabelTable("sided", (*FIVE.labels[:3], Label(30, "L", partner=40), Label(40, "R", partner=30)))


def test_a_mirrored_member_swaps_sides_twice() -> None:
    image = torch.rand(16, 24, 32)
    model = Fake(Random(), SIDED)
    found = predict(image, model, CPU, members=(Member(mirrored=True),), mixed_precision=False)
    expected = predict(image.flip(0), model, CPU, mixed_precision=False).flip(1)[[0, 1, 2, 4, 3]]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shift", [(1, 2, 3), (7, 0, 5)])
def test_a_shifted_member_gives_back_what_it_saw_where_it_was(shift: tuple[int, int, int]) -> None:
    """A network that works in blocks of two voxels sees other blocks."""

    class Blocks(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            mean = torch.nn.functional.avg_pool3d(image, 2)
            logit = 9 * (torch.nn.functional.interpolate(mean, scale_factor=2) - 0.5)
            return torch.cat([-logit, logit], 1)

    image = torch.rand(16, 16, 16)
    model = Fake(Blocks(), window=(8, 8, 8), multiple=2)
    found = predict(image, model, CPU, members=(Member(shift=shift),), mixed_precision=False)
    # By hand: zeros before, so that the blocks begin at -1 where the shift is odd
    odd = [n % 2 for n in shift]
    padded = torch.nn.functional.pad(image, [pad for n in reversed(odd) for pad in (n, n)])
    with torch.no_grad():
        expected = model.network(padded[None, None])[0].softmax(0)
    expected = expected[:, odd[0] : odd[0] + 16, odd[1] : odd[1] + 16, odd[2] : odd[2] + 16]
    torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=1e-3)


def test_a_zoomed_member_sees_more_voxels_and_answers_on_the_grid_of_the_image() -> None:
    volume = ball()
    image = conform(volume, 2.0)
    network = Recorder()
    found = predict(image, Fake(network), CPU, members=(Member(zoom=1.25),), mixed_precision=False)
    assert found.shape == (2, *image.shape)
    expected = predict(image, Fake(), CPU, mixed_precision=False)
    both = ((found[1] > 0.5) & (expected[1] > 0.5)).sum() * 2 / ((found[1] > 0.5).sum() + (expected[1] > 0.5).sum())
    assert both > 0.98
    assert network.seen[0].shape == (80, 64, 72)  # 80, 60 and 70 to multiples of 8


def test_an_inverted_member_turns_tissue_and_leaves_air() -> None:
    image = torch.tensor([0.0, 0.05, 0.2, 0.6, 1.0]).reshape(1, 1, 5)
    found = prediction.inverted(image).flatten()
    torch.testing.assert_close(found, torch.tensor([0.0, 0.05, 0.9, 0.5, 0.1]))


def test_the_mean_of_members_and_their_agreement_by_hand() -> None:
    class Scripted(torch.nn.Module):
        """Says class 1 in the first half at the first call, everywhere at the second; never class 2."""

        calls = 0

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            logits = torch.full((1, 3, *image.shape[2:]), -20.0)
            logits[:, 1] = 0.0
            if self.calls == 0:
                logits[:, 1, 8:], logits[:, 0, 8:] = -20.0, 1.0
            self.calls += 1
            return logits

    table = LabelTable("three", tuple(Label(i, f"L{i}") for i in range(3)))
    model = Fake(Scripted(), table, window=(16, 8, 8))
    found = predict_with_agreement(torch.rand(16, 8, 8), model, CPU, (Member(), Member()), False)
    np.testing.assert_allclose(found.probabilities[1, :8], 1.0, atol=1e-3)
    np.testing.assert_allclose(found.probabilities[1, 8:], 0.5, atol=1e-3)
    # The mean ties in the second half, and the first class is taken: 0. Class 1: the first member agrees wholly, the
    # second has 2 x 8 against 8 + 16; class 0: 1 for the first member, none for the second.
    assert found.agreement is not None
    np.testing.assert_allclose(found.agreement, [0.5, (1 + 2 / 3) / 2, np.nan])


def test_a_network_that_answers_with_nan_is_refused() -> None:
    class Broken(Threshold):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            logits = super().forward(image)
            logits[0, 1, 3, 4, 5] = torch.nan
            return logits

    with pytest.raises(CheckpointError, match="NaN"):
        segment(ball(), Fake(Broken()), CPU)


@pytest.mark.parametrize(("n", "window"), [(16, 16), (17, 16), (50, 16), (33, 32), (100, 24)])
def test_tiles_cover_an_axis_and_their_shares_sum_to_one(n: int, window: int) -> None:
    total = torch.zeros(n)
    for tile in prediction._tiles(n, window):
        assert 0 <= tile.span.start < tile.span.stop <= n
        assert tile.span.stop - tile.span.start == min(n, window)
        total[tile.span] += tile.share
    torch.testing.assert_close(total, torch.ones(n))


# ------------------------------------------------------------------------------------------------ clean-up


def test_stray_components_by_hand() -> None:
    mask = np.zeros((7, 8, 9), bool)
    mask[0:2, 0:5, 0] = True  # ten voxels
    mask[2, 5, 1] = True  # touches it at a corner only: the same component
    mask[5, 0:3, 5] = True  # three voxels
    mask[6, 6, 0:2] = True  # two voxels: below a fifth of eleven
    mask = np.pad(mask, 1)
    one, two, three = (stray_components(mask, count) for count in (1, 2, 3))
    assert one.sum() == 5
    assert two.sum() == three.sum() == 2
    assert two[7, 7, 1]
    assert stray_components(mask, None).sum() == 2
    assert not stray_components(np.zeros((3, 4, 5), bool), 1).any()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_component_at_the_border_is_not_stray(axis: int) -> None:
    """What joins it to the others may lie outside the field of view, as in a scan of the lower head."""
    mask = np.zeros((12, 12, 12), bool)
    mask[3:9, 3:9, 3:9] = True
    np.moveaxis(mask, axis, 0)[0, 5, 5] = np.moveaxis(mask, axis, 0)[-1, 6, 6] = True
    np.moveaxis(mask, axis, 0)[1, 1, 1] = True  # inside: stray
    stray = stray_components(mask, 1)
    assert stray.sum() == 1
    assert np.moveaxis(stray, axis, 0)[1, 1, 1]


def certain(labels: np.ndarray, n_classes: int, sure: float = 0.9) -> torch.Tensor:
    rest = (1 - sure) / (n_classes - 1)
    one_hot = np.moveaxis(np.eye(n_classes)[labels], -1, 0)
    return torch.from_numpy(rest + (sure - rest) * one_hot).float()


PARTS = LabelTable(
    "parts",
    (
        Label(0, "Background", tissue="air"),
        Label(1, "Cortex", tissue="gm"),
        Label(2, "Nuclei", tissue="thalamus", components=2),
        Label(3, "Skin", tissue="skin"),
    ),
)


def test_clean_up_removes_strays_and_renormalises() -> None:
    labels = np.zeros((12, 9, 10), int)
    labels[0:6, 0:6, 0:6] = 1
    labels[1, 1, 1:4], labels[3, 3, 1:4], labels[1:3, 5, 5] = 2, 2, 2  # three nuclei: 3, 3 and 2 voxels
    labels[9:11, 6, 8] = 1  # brain away from the brain
    labels[11, 0:2, 0] = 3  # no rule for the skin
    probabilities = certain(labels, 4)
    clean_up(probabilities, PARTS)
    winner = probabilities.argmax(0).numpy()
    assert (winner[1:3, 5, 5] != 2).all()
    assert (winner[9:11, 6, 8] == 0).all()
    assert (winner[11, 0:2, 0] == 3).all()
    assert (winner == 2).sum() == 6
    # background and skin had 0.1 / 3 each, of which they now hold halves
    np.testing.assert_allclose(probabilities[:, 9, 6, 8], [0.5, 0, 0, 0.5], atol=1e-6)
    np.testing.assert_allclose(probabilities.sum(0), 1.0, atol=1e-5)


def test_a_whole_head_has_one_brain() -> None:
    labels = np.zeros((30, 9, 8), int)
    labels[1:10, 1:8, 1:7], labels[12:20, 1:8, 1:7] = 1, 1
    probabilities = certain(labels, 4)
    clean_up(probabilities, PARTS)
    winner = probabilities.argmax(0).numpy()
    assert (winner[1:10, 1:8, 1:7] == 1).all()
    assert (winner[10:] == 0).all()


def test_clean_up_falls_back_to_background_where_nothing_else_was_likely() -> None:
    labels = np.zeros((8, 9, 10), int)
    labels[0:4], labels[6, 7, 8] = 1, 1
    probabilities = certain(labels, 4, sure=1.0)
    clean_up(probabilities, PARTS)
    np.testing.assert_array_equal(probabilities[:, 6, 7, 8], [1, 0, 0, 0])


@pytest.mark.parametrize(("height_mm", "pieces"), [(130.0, 1), (90.0, 2)])
def test_a_thin_box_of_a_whole_head_is_cleaned_as_a_thin_field_of_view(height_mm: float, pieces: int) -> None:
    data = np.zeros((60, 62, 70), np.float32)
    data[6:30, 10:50, 20:50] = data[36:54, 12:48, 22:48] = 100
    data[30:36, 30, 3:67] = 30  # between them, above and below
    options = Options(crop_mm=(130.0, 130.0, height_mm), mixed_precision=False)
    labels = segment(Volume(data, np.diag([2.0, 2.0, 2.0, 1.0])), Fake(), CPU, options).labels
    assert ndimage.label(labels == 7)[1] == pieces


def test_in_a_thin_field_of_view_large_pieces_stay() -> None:
    labels = np.zeros((30, 9, 4), int)
    labels[1:10, 1:8, 1:3], labels[12:20, 1:8, 1:3], labels[25, 1, 1] = 1, 1, 1
    probabilities = certain(labels, 4)
    clean_up(probabilities, PARTS, whole_head=False)
    winner = probabilities.argmax(0).numpy()
    assert (winner[12:20, 1:8, 1:3] == 1).all()
    assert winner[25, 1, 1] == 0


# ------------------------------------------------------------------------------------------------- remarks


def test_timings_and_remarks() -> None:
    steps: list[str] = []
    data = np.zeros((60, 55, 52), np.float32)
    data[20:30, 20:30, 20:30] = 9  # 8 ml of "brain"
    volume = Volume(data, np.diag([2.0, 2.0, 2.0, 1.0]), warnings=("a remark on the file",))
    result = segment(volume, Fake(window=(64, 64, 64)), CPU, on_step=steps.append)
    assert steps == list(result.timings_s) == ["conform", "network", "clean-up", "resample", "quality"]
    assert result.warnings[0] == "a remark on the file"
    assert "8 ml" in result.warnings[1]
    cropped = segment(volume, Fake(window=(64, 64, 64)), CPU, Options(crop_mm=(30.0,) * 3))
    assert cropped.warnings == ["a remark on the file"]
    assert canonical(volume).axcodes == ("R", "A", "S")
