"""From a head's values to results: each against a reference that is written down here."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from synthseg.networks.task_heads import (
    CHANNELS,
    DARK,
    low_pass,
    result_of,
    second_difference,
    sharpened,
    smooth_log_field,
)

SHAPE = (11, 14, 9)


def coordinates(axis: int) -> torch.Tensor:
    view = [1, 1, 1, 1, 1]
    view[axis + 2] = SHAPE[axis]
    return torch.arange(SHAPE[axis], dtype=torch.float32).view(view).expand(1, 1, *SHAPE)


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_the_second_difference_of_a_square_is_two(axis: int) -> None:
    found = second_difference(coordinates(axis - 2) ** 2, axis)
    inner = found.narrow(axis, 1, SHAPE[axis - 2] - 2)
    assert torch.equal(inner, torch.full_like(inner, 2.0))
    for other in {2, 3, 4} - {axis}:
        assert bool((second_difference(coordinates(axis - 2) ** 2, other) == 0).all())


def test_zero_values_leave_the_image() -> None:
    image = torch.rand(2, 1, *SHAPE)
    assert torch.equal(sharpened(torch.zeros(2, CHANNELS["super-resolution"], *SHAPE), image), image)
    assert bool((smooth_log_field(torch.zeros(2, CHANNELS["bias-field"], *SHAPE), image, 2.0) == 0).all())


def test_each_value_has_its_weight() -> None:
    image = torch.rand(1, 1, *SHAPE)
    values = torch.zeros(1, 5, *SHAPE)
    for channel, weight in enumerate((0.1, 0.5, -0.2, -0.3, 0.4)):
        values[:, channel] = weight
    expected = 1.5 * image + 0.1
    for axis, weight in zip((2, 3, 4), (-0.2, -0.3, 0.4), strict=True):
        expected = expected + weight * second_difference(image, axis)
    torch.testing.assert_close(sharpened(values, image), expected)


def test_blur_along_one_axis_is_undone() -> None:
    sharp = torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    smooth = sharp + 0.15 * second_difference(sharp, 3)
    values = torch.zeros(1, 5, *SHAPE)
    values[:, 3] = -0.15
    assert (sharpened(values, smooth) - sharp).abs().mean() < 0.5 * (smooth - sharp).abs().mean()


def test_the_low_pass_is_a_gaussian_mean_of_what_counts() -> None:
    source = torch.Generator().manual_seed(1)
    image = torch.rand(1, 40, 50, 45, generator=source)
    weight = (torch.rand(1, 40, 50, 45, generator=source) > 0.3).float()
    found = low_pass(image, weight, voxel_size_mm=2.0, sigma_mm=12.0)[0].numpy()
    blur = lambda x: ndimage.gaussian_filter(x, 12.0 / 2.0, mode="constant", truncate=6)  # noqa: E731
    expected = blur((image * weight)[0].numpy()) / blur(weight[0].numpy())
    assert np.abs(found - expected).max() < 0.02 * np.ptp(expected) + 2e-3
    constant = low_pass(torch.full_like(image, 3.0), weight, 2.0, 12.0)
    torch.testing.assert_close(constant, torch.full_like(constant, 3.0), rtol=1e-3, atol=1e-3)


def test_what_does_not_count_has_no_say() -> None:
    image, weight = torch.ones(1, *SHAPE), torch.ones(1, *SHAPE)
    image[:, :4], weight[:, :4] = 1e6, 0.0
    torch.testing.assert_close(
        low_pass(image, weight, 3.0, 6.0)[:, 5:], torch.ones(1, 6, *SHAPE[1:]), rtol=1e-3, atol=0
    )
    assert bool((low_pass(image, torch.zeros_like(weight), 3.0, 6.0) == 0).all())


def test_the_field_of_an_even_image_is_found() -> None:
    """A gain of 1 reads the log of the image itself: in one tissue that is the log of the field and a constant."""
    shape = (40, 48, 44)
    x, y, _ = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    log_field = torch.from_numpy(0.3 * np.sin(1.5 * x) + 0.2 * y).float()
    image = (0.4 * log_field.exp())[None, None]
    values = torch.zeros(1, CHANNELS["bias-field"], *shape)
    values[:, 1] = 1
    found = smooth_log_field(values, image, 3.0)[0, 0]
    centre = (slice(8, -8),) * 3
    error = (found - found[centre].mean()) - (log_field - log_field[centre].mean())
    assert error[centre].abs().max() < 0.03
    dark = smooth_log_field(values, torch.full_like(image, DARK / 2), 3.0)
    assert bool((dark == 0).all())


@pytest.mark.parametrize("contrast", [(0.3, 0.6), (0.7, 0.25)])
def test_a_tissue_has_the_level_of_this_image(contrast: tuple[float, float]) -> None:
    """Two tissues, whatever their contrast: with their places known the field is found, without them it is not."""
    shape = (40, 48, 44)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    log_field = torch.from_numpy(0.3 * np.sin(1.5 * x) + 0.2 * y).float()
    inner = torch.from_numpy((y > 0) & (z > 0))
    image = (torch.where(inner, contrast[0], contrast[1]) * log_field.exp())[None, None].clamp(0, 1)
    values = torch.zeros(1, CHANNELS["bias-field"], *shape)
    values[:, 1] = 1
    centre = (slice(8, -8),) * 3

    def error() -> float:
        found = smooth_log_field(values, image, 3.0)[0, 0]
        return float(((found - found[centre].mean()) - (log_field - log_field[centre].mean()))[centre].abs().mean())

    unaware = error()
    values[:, 2], values[:, 3] = 20.0 * inner, 20.0 * ~inner
    assert error() < 0.25 * unaware


def test_other_tasks_are_the_values_themselves() -> None:
    values, image = torch.rand(1, 3, *SHAPE), torch.rand(1, 1, *SHAPE)
    assert result_of("segmentation", values, image, 1.0) is values
    assert result_of("reconstruction", values, image, 1.0) is values
