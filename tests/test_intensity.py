"""Intensity normalisation and the recognition of CT."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synthseg.intensity import fill_as_air, finite, foreground, looks_like_hounsfield, normalise


def scan(air: float = 0.0, tissue: float = 100.0, bright: float = 200.0, noise: float = 3.0) -> torch.Tensor:
    """An air-filled box with a head of two tissues in it, (20, 24, 22)."""
    rng = np.random.default_rng(0)
    data = np.full((20, 24, 22), air)
    data[4:16, 4:20, 4:18] = tissue
    data[8:12, 8:14, 8:14] = bright
    return torch.from_numpy(data + noise * rng.standard_normal(data.shape)).float()


# ---------------------------------------------------------------- CT


@pytest.mark.parametrize("padding", [-1000.0, -1024.0, -2000.0, -3024.0])
def test_ct_is_recognised(padding: float) -> None:
    ct = scan(-1000, 30, 900)
    ct[:2] = padding  # what lies outside the scanner's circle
    assert looks_like_hounsfield(ct)


def test_ct_with_little_air_is_recognised() -> None:
    ct = scan(-1000, 30, 900)[2:18, 2:22, 2:20]
    assert 0.02 < (ct < -700).float().mean() < 0.6
    assert looks_like_hounsfield(ct)


@pytest.mark.parametrize(
    "image",
    [
        scan(),
        scan(0, 1000, 3000),
        scan(-1.2, 0.4, 2.5, 0.1),  # z-scores
        scan(-100, 30, 900),  # air clipped by a viewer
        scan(-1000, 30, 90),  # nothing as dense as bone
        scan(-4096, 0, 4095),  # phase
        scan(-30000, 100, 30000),
        torch.zeros(5, 6, 7),
        torch.full((5, 6, 7), -1000.0),
        torch.full((5, 6, 7), float("nan")),
    ],
    ids=["mr", "bright mr", "z-scores", "clipped", "no bone", "phase", "large", "zeros", "constant", "nan"],
)
def test_what_is_not_ct(image: torch.Tensor) -> None:
    assert not looks_like_hounsfield(image)


def test_a_few_low_voxels_do_not_make_a_ct() -> None:
    image = scan()
    image[0, 0, :20] = -1000  # interpolation ringing, or a burned-in marker
    assert not looks_like_hounsfield(image)


# ---------------------------------------------------------------- normalise


def test_range_and_order() -> None:
    out = normalise(scan())
    assert out.dtype == torch.float32
    assert out.min() == 0
    assert out.max() == 1
    assert out[0].mean() < 0.05  # air
    assert 0.3 < out[5, 5, 5] < 0.7
    assert out[9, 9, 9] > 0.9


@settings(max_examples=30, deadline=None)
@given(factor=st.floats(1e-3, 1e4), shift=st.floats(-3.0, 3.0))
def test_scale_and_offset_do_not_matter(factor: float, shift: float) -> None:
    image = scan()
    moved = (factor * (image.double() + shift * 100)).float()
    torch.testing.assert_close(normalise(moved), normalise(image), rtol=0, atol=2e-4)


def test_amount_of_air_does_not_matter_much() -> None:
    image = scan(bright=100.0)
    image[4:16, 4:12, 4:18] += 100  # half of the head is bright
    roomy = torch.zeros(30, 34, 32)  # three times the field of view
    roomy[5:25, 5:29, 5:27] = image
    roomy += 3 * torch.randn(roomy.shape, generator=torch.manual_seed(0)) * (roomy == 0)
    torch.testing.assert_close(normalise(roomy)[5:25, 5:29, 5:27], normalise(image), rtol=0, atol=0.05)


def test_stripped_scan() -> None:
    image = scan()
    head = image > 50
    out = normalise(torch.where(head, image, 0.0))
    assert (out[~head] == 0).all()
    assert 0.3 < out[5, 5, 5] < 0.7


def test_outliers_do_not_squeeze_the_rest() -> None:
    image = scan()
    clean = normalise(image)
    image[0, 0, 0] = 1e6
    torch.testing.assert_close(normalise(image).flatten()[1:], clean.flatten()[1:], rtol=0, atol=0.02)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_voxels_become_the_darkest(bad: float) -> None:
    image = scan()
    image[9, 9, 9] = bad
    image[0, :3] = bad
    out = normalise(image)
    assert torch.isfinite(out).all()
    assert out[9, 9, 9] == 0
    keep = torch.isfinite(image)
    torch.testing.assert_close(out[keep], normalise(scan())[keep], rtol=0, atol=0.05)


@pytest.mark.parametrize("value", [0.0, 7.5, -1000.0, 1e30, float("nan"), float("inf")])
def test_constants_become_zeros(value: float) -> None:
    out = normalise(torch.full((3, 4, 5), value))
    assert (out == 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.float64])
def test_any_type_is_taken_and_not_modified(dtype: torch.dtype) -> None:
    image = scan(10).round().to(dtype)
    before = image.clone()
    torch.testing.assert_close(normalise(image), normalise(image.float()))
    assert torch.equal(image, before)


def test_large_images_are_sampled_the_same_way() -> None:
    image = scan()
    large = image.repeat_interleave(3, 0).repeat_interleave(3, 1).repeat_interleave(3, 2)
    assert large.numel() > 200_000
    torch.testing.assert_close(normalise(large)[1::3, 1::3, 1::3], normalise(image), rtol=0, atol=0.02)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (2, 1, 1)])
def test_tiny_images(shape: tuple[int, ...]) -> None:
    out = normalise(torch.arange(float(np.prod(shape))).reshape(shape))
    assert torch.isfinite(out).all()


def plain_normalise(image: torch.Tensor) -> torch.Tensor:
    """The definition: every voxel looked at, torch's quantiles, nothing in place."""
    good = torch.isfinite(image)
    image = torch.where(good, image, image[good].min())
    values = image.flatten()
    if values.numel() > 200_000:
        fraction = (torch.arange(200_000, dtype=torch.float64) * 0.6180339887498949) % 1.0
        values = values[(fraction * image.numel()).long()]
    floor = torch.quantile(values, 0.01)
    values = values[values > floor + 0.1 * (values.mean() - floor)]
    ceiling = torch.quantile(values, 0.99)
    return ((image - floor) / (ceiling - floor)).clamp(0.0, 1.0)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(4, 5, 3), (31, 17, 23), (70, 61, 83)])
def test_shortcuts_do_not_change_a_bit(shape: tuple[int, int, int], bad: float) -> None:
    for seed, scale in enumerate((1.0, 700.0, 1e-4)):
        image = scale * torch.randn(shape, generator=torch.manual_seed(seed)).exp()
        image[:1, :2] = bad
        image[-1, -1, -1] = -bad
        before = image.clone()
        assert torch.equal(normalise(image), plain_normalise(image))
        assert torch.equal(normalise(image), plain_normalise(image))  # what is kept from call to call is right
        torch.testing.assert_close(image, before, rtol=0, atol=0, equal_nan=True)


def test_quantiles_are_those_of_torch() -> None:
    for n in (2, 3, 100, 101, 4567):
        image = torch.rand(n, generator=torch.manual_seed(n))
        floor = torch.quantile(image, 0.01)
        inside = image[image > floor + 0.1 * (image.mean() - floor)]
        assert foreground(image) == (float(floor), float(inside.median()))


def test_a_sum_beyond_the_largest_number_is_not_taken_for_infinity() -> None:
    image = torch.full((10, 10, 10), 3e38)
    image[0] = -3e38
    assert torch.isinf(image[1:].sum())
    assert torch.equal(finite(image), image)
    assert torch.equal(finite(image[1:]), image[1:])
    both = torch.zeros(4, 5, 6)
    both[0, 0, 0], both[1, 1, 1] = float("inf"), float("-inf")
    assert torch.isfinite(finite(both)).all()


FLOATS = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, -1000.0, 1e-45, -1e-40, 1e-38, 3.4e38, -3.4e38, float("nan"), float("inf"), float("-inf")]),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    values=st.lists(FLOATS, min_size=1, max_size=6),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    seed=st.integers(0, 99),
    noise=st.sampled_from([0.0, 1e-3, 1e30]),
)
def test_anything_finite_or_not_comes_out_between_zero_and_one(
    values: list[float], shape: tuple[int, int, int], seed: int, noise: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.tensor(values, dtype=torch.float32)[torch.randint(len(values), shape, generator=generator)]
    image = image + noise * torch.randn(shape, generator=generator)
    before = image.clone()
    out = normalise(fill_as_air(finite(image)))
    assert out.shape == shape
    assert bool(((out >= 0) & (out <= 1)).all())  # NaN is neither
    assert looks_like_hounsfield(finite(image)) in (True, False)
    torch.testing.assert_close(image, before, rtol=0, atol=0, equal_nan=True)


def test_two_of_the_largest_numbers_do_not_hide_the_scan() -> None:
    image = scan()
    image[0, 0, :2] = 3.4e38
    image[0, 1, :2] = -3.4e38
    torch.testing.assert_close(normalise(image)[1:], normalise(scan())[1:], rtol=0, atol=0.02)


# ---------------------------------------------------------------- fill values


@pytest.mark.parametrize("fill", [-8192.0, -32768.0])
def test_ct_with_an_odd_padding_is_recognised(fill: float) -> None:
    ct = scan(-1000, 30, 900)
    ct[:2] = fill
    assert looks_like_hounsfield(ct)


def test_mr_with_a_negative_fill_value_is_not_ct() -> None:
    image = scan(5, 300, 700).clamp_min(0)
    image[:3] = -1024.0
    assert not looks_like_hounsfield(image)


def test_the_fill_value_of_a_standardised_stripped_scan_becomes_its_minimum() -> None:
    image = torch.zeros(12, 13, 14)
    brain = torch.randn(6, 7, 8, generator=torch.Generator().manual_seed(0))
    image[3:9, 3:10, 3:11] = brain
    filled = fill_as_air(image)
    assert float(filled[0, 0, 0]) == float(brain.min())
    torch.testing.assert_close(filled[3:9, 3:10, 3:11], brain)
    assert float(image[0, 0, 0]) == 0.0  # the input is not modified


def test_a_few_voxels_far_below_a_stripped_scan_do_not_make_its_background_theirs() -> None:
    image = torch.zeros(24, 25, 26)
    image[6:18, 6:18, 6:18] = 300 + 100 * torch.rand(12, 12, 12, generator=torch.Generator().manual_seed(0))
    expected = normalise(fill_as_air(image))
    image[10, 10, 10] = -30_000.0
    assert float(fill_as_air(image)[0, 0, 0]) == 0.0
    found = normalise(fill_as_air(image))
    found[10, 10, 10] = expected[10, 10, 10]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


def test_a_scan_without_a_fill_value_is_left_alone() -> None:
    for image in (scan(), scan(-1000, 30, 900), scan(0, 0.4, 2.5, 0.0)):
        torch.testing.assert_close(fill_as_air(image), image)


def test_percentiles_do_not_alias_with_the_grid() -> None:
    """With a fixed stride, 224 x 224 x 200 voxels were sampled in two planes only."""
    image = torch.zeros(60, 224, 200)
    image[..., 0] = image[..., 100] = 50.0
    image[..., 10:90] = 100.0
    assert float(normalise(image)[..., 10:90].mean()) > 0.99
    assert 0.4 < float(normalise(image)[0, 0, 0]) < 0.6
