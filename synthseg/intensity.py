"""Intensity normalisation, the same for synthetic images in training and for real scans in inference."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

CT_WINDOW_HU = (-100.0, 150.0)


def looks_like_hounsfield(image: torch.Tensor) -> bool:
    """Whether intensities are Hounsfield units.

    Decided by the scan, not by the value that fills the corners (-1000, -2000, -3024, -8192, ...): there is air far
    below zero; of the rest, the median is soft tissue or bone and a part lies in the range of brain and water; and the
    air is noisy or there is fat. An MR image with a negative fill value has one value there, and nothing up to zero.
    """
    low = float(image.min())
    return low <= -200.0 and is_hounsfield(_spread_sample(image.flatten()), low, float(image.max()))


def is_hounsfield(sample: torch.Tensor, low: float, high: float) -> bool:
    """`looks_like_hounsfield` of an image with these extremes, from a sample of its voxels, `spread_index`."""
    if low > -200.0:
        return False
    air = (sample < -500.0).float().mean()
    head = sample[sample > -500.0]
    if air < 0.01 or head.numel() < 100 or high <= 100.0:
        return False
    brain = ((head > 0) & (head < 100)).float().mean()
    fat = ((head > -300) & (head < -20)).float().mean()
    noisy_air = len(torch.unique(sample[(sample > -1100.0) & (sample < -900.0)])) > 5
    return bool(-200 < head.median() < 400 and brain > 0.05 and (fat > 0.005 or noisy_air))


def fill_as_air(image: torch.Tensor) -> torch.Tensor:
    """A value that fills most corners and a fifth of the image, but is not its minimum, is air: make it the minimum.

    Standardised skull-stripped scans hold zero around a brain of positive and negative values.
    """
    corners = image[:: max(1, image.shape[0] - 1), :: max(1, image.shape[1] - 1), :: max(1, image.shape[2] - 1)]
    lowest = float(image.min())
    value = filled_with(corners, lowest, lambda value: float((image == value).float().mean()))
    if value is None:
        return image
    air = air_beside(value, _spread_sample(image.flatten()), lowest)
    return torch.where(image == value, torch.as_tensor(air, dtype=image.dtype, device=image.device), image)


def filled_with(corners: torch.Tensor, lowest: float, share: Callable[[float], float]) -> float | None:
    """The value that `fill_as_air` takes as air; None if there is none beside the lowest.

    ``share`` says which part of the image, 0 to 1, has a value.
    """
    value = float(corners.flatten().median())
    if value == lowest or (corners == value).float().mean() < 0.6 or share(value) < 0.2:
        return None
    return value


def air_beside(filling: float, sample: torch.Tensor, lowest: float) -> float:
    """What voxels that hold ``filling`` are given as air: the lowest value of the image, from a sample of its voxels.

    A few voxels that lie further below all others than these span (an overflow, a spline's overshoot) do not count.
    """
    head = sample[sample != filling]
    if head.numel() == 0:
        return lowest
    floor, ceiling = float(_quantile(head, 0.001)), float(_quantile(head, 0.99))
    return lowest if floor - lowest <= ceiling - floor else min(floor, filling)


def finite(image: torch.Tensor) -> torch.Tensor:
    """The image with NaN and infinity as its smallest finite value (0 if it has none); the input is not modified."""
    if bool(torch.isfinite(image.sum())):  # much faster than to look at every voxel; a large image may overflow
        return image
    good = torch.isfinite(image)
    if bool(good.all()):
        return image
    floor = image[good].min() if bool(good.any()) else torch.zeros((), dtype=image.dtype, device=image.device)
    return torch.where(good, image, floor)


def _floor_and_foreground(image: torch.Tensor, low: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``low`` percentile of an image, and a sample of the voxels that are not background."""
    sample = _spread_sample(image.flatten())
    floor = _quantile(sample, low)
    mean = sample.mean()
    if not bool(torch.isfinite(mean)):  # the sum was larger than the largest number
        mean = sample.double().mean().float()
    return floor, sample[sample > floor + 0.1 * (mean - floor)]


def foreground(image: torch.Tensor) -> tuple[float, float]:
    """The floor of an image and the median of the voxels that are not background."""
    floor, inside = _floor_and_foreground(image)
    return float(floor), float(inside.median() if inside.numel() else floor)


def normalise(image: torch.Tensor, low: float = 0.01, high: float = 0.99) -> torch.Tensor:
    """Map an image of any shape to [0, 1] robustly: percentiles of the voxels that are not background.

    The background (the most negative value, exact zeros in stripped scans, dark air otherwise) would pull the
    percentiles by how much air the field of view holds, so the upper percentile is taken over voxels above a small
    fraction of the mean. Non-finite voxels become the minimum. A constant image becomes zeros.
    """
    image = finite(image.float())
    floor, sample = _floor_and_foreground(image, low)
    if sample.numel() < 2:
        floor, ceiling = image.min(), image.max()
    else:
        ceiling = _quantile(sample, high)
    if ceiling <= floor:
        return torch.zeros_like(image)
    if not bool(torch.isfinite(ceiling - floor)):  # larger than the largest number
        return normalise(image * 2.0**-30, low, high)
    return (image - floor).div_(ceiling - floor).clamp_(0.0, 1.0)


def _quantile(sample: torch.Tensor, q: float) -> torch.Tensor:
    """``torch.quantile`` of finite values, to the bit. On a CPU NumPy sorts several times faster."""
    if sample.device.type != "cpu":
        return torch.quantile(sample, q)
    ordered = torch.from_numpy(np.sort(sample.numpy()))
    rank = torch.tensor(q, dtype=sample.dtype) * (len(ordered) - 1)
    below, above = int(rank.floor()), int(rank.ceil())
    return torch.lerp(ordered[below], ordered[above], rank - below)


def _spread_sample(values: torch.Tensor, most: int = 200_000) -> torch.Tensor:
    """At most ``most`` of the values, spread evenly by the golden ratio: a fixed stride could hit few planes only."""
    return (
        values if values.numel() <= most else values.index_select(0, spread_index(values.numel(), most, values.device))
    )


@lru_cache(maxsize=4)
def spread_index(n: int, most: int = 200_000, device: torch.device | str = "cpu") -> torch.Tensor:
    """Positions of at most ``most`` of ``n`` values, spread evenly, int64."""
    if n <= most:
        return torch.arange(n, device=device)
    fraction = (torch.arange(most, dtype=torch.float64, device="cpu") * 0.6180339887498949) % 1.0
    return (fraction * n).long().to(device)
