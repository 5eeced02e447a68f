"""Intensity normalisation, the same for synthetic images in training and for real scans in inference."""

from __future__ import annotations

import torch

CT_WINDOW_HU = (-100.0, 150.0)


def looks_like_hounsfield(image: torch.Tensor) -> bool:
    """Whether intensities are Hounsfield units: a good part of the scan is air near -1000 and nothing far below it.

    MR magnitude images have no large negative values; CT scanners store air at -1000 and padding down to -3024.
    """
    minimum = float(image.min())
    if not -4000.0 <= minimum <= -700.0:
        return False
    below = (image < -700.0).float().mean()
    return bool(below > 0.02) and float(image.max()) > 100.0


def normalise(image: torch.Tensor, low: float = 0.01, high: float = 0.99) -> torch.Tensor:
    """Map an image of any shape to [0, 1] robustly: percentiles of the voxels that are not background.

    The background (the most negative value, exact zeros in stripped scans, dark air otherwise) would pull the
    percentiles by how much air the field of view holds, so the upper percentile is taken over voxels above a small
    fraction of the mean. Non-finite voxels become the minimum. A constant image becomes zeros.
    """
    image = image.float()
    finite = torch.isfinite(image)
    if not bool(finite.all()):
        floor = image[finite].min() if bool(finite.any()) else torch.tensor(0.0)
        image = torch.where(finite, image, floor)
    sample = _spread_sample(image.flatten())
    floor = torch.quantile(sample, low)
    sample = sample[sample > floor + 0.1 * (sample.mean() - floor)]
    if sample.numel() < 2:
        lower, upper = image.min(), image.max()
        return torch.zeros_like(image) if upper <= lower else (image - lower) / (upper - lower)
    ceiling = torch.quantile(sample, high)
    if ceiling <= floor:
        return torch.zeros_like(image)
    return ((image - floor) / (ceiling - floor)).clamp(0.0, 1.0)


def _spread_sample(values: torch.Tensor, most: int = 200_000) -> torch.Tensor:
    """At most ``most`` of the values, spread evenly by the golden ratio: a fixed stride could hit few planes only."""
    n = values.numel()
    if n <= most:
        return values
    fraction = (torch.arange(most, dtype=torch.float64, device="cpu") * 0.6180339887498949) % 1.0
    return values[(fraction * n).long().to(values.device)]
