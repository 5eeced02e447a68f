"""From the values of a head to the result of its task: used by training and by inference alike.

Brain-ID (Liu et al., ECCV 2024) gives tasks that do not depend on contrast one layer on the features, and those that do
(super-resolution, bias field) one layer on the features and the image. Here the layer of the latter says, for each
voxel, with which weights what can be seen of the image counts, so that a feature can decide what the image means.
"""

from __future__ import annotations

import math

import torch

from synthseg.volume import apply_separable

SMOOTHING_MM = 12.0  # standard deviation of the window in which a bias field is averaged
DARK = 0.05  # of the intensity range: what is darker says nothing of a field that multiplies it
TISSUES = 6  # that a bias field is told from
CHANNELS = {"reconstruction": 1, "super-resolution": 5, "bias-field": 2 + TISSUES}  # segmentation: one for each class


def result_of(task: str, values: torch.Tensor, image: torch.Tensor, voxel_size_mm: float) -> torch.Tensor:
    """The result of a task from the values (B, n, D, H, W) of its head and the image (B, 1, D, H, W) in [0, 1].

    segmentation: logits, the values themselves. reconstruction: the T1 image, (B, 1, D, H, W). super-resolution: the
    image, sharper. bias-field: the logarithm of the field, smooth, up to a constant.
    """
    if task == "super-resolution":
        return sharpened(values, image)
    if task == "bias-field":
        return smooth_log_field(values, image, voxel_size_mm)
    return values


def sharpened(values: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """The image plus an offset, a gain and its second differences along each axis, weighted by (B, 5, D, H, W).

    Zero weights leave the image as it is. To subtract second differences undoes blur along an axis, to first order.
    """
    offset, gain, *bends = values.split(1, 1)
    result = image + offset + gain * image
    for axis, weight in enumerate(bends, 2):
        result = result + weight * second_difference(image, axis)
    return result


def second_difference(image: torch.Tensor, axis: int) -> torch.Tensor:
    """``x[i - 1] - 2 x[i] + x[i + 1]`` along an axis of (B, C, D, H, W); the edge values continue."""
    n = image.shape[axis]
    index = torch.arange(n, device=image.device)
    before, after = (image.index_select(axis, (index + step).clamp(0, n - 1)) for step in (-1, 1))
    return before - 2 * image + after


def smooth_log_field(values: torch.Tensor, image: torch.Tensor, voxel_size_mm: float) -> torch.Tensor:
    """What the log of the image is above that of its tissue, averaged over space; (B, 1, D, H, W).

    Of the values (B, 2 + TISSUES, D, H, W) the first is an offset, the second the gain of that difference, and the
    others share each voxel out to tissues (softmax). A tissue's level is its mean log intensity in this very image, so
    that the contrast need not be known. The mean is one under a Gaussian window, over the voxels that are not dark;
    far from all of them it is 0, no bias. Both means count a voxel by the square of its intensity: noise that is added
    to an image changes its log by as much less as the voxel is brighter.
    """
    values, image = values.float(), image.float()
    log_image = (image.clamp_min(DARK) / DARK).log()
    weights = torch.where(image > DARK, image**2, 0.0)
    tissues = values[:, 2:].softmax(1)
    share = tissues * weights
    level = (share * log_image).sum((2, 3, 4), keepdim=True) / share.sum((2, 3, 4), keepdim=True).clamp_min(1e-6)
    raw = values[:, :1] + values[:, 1:2] * (log_image - (tissues * level).sum(1, keepdim=True))
    means = [low_pass(one, weight, voxel_size_mm, SMOOTHING_MM) for one, weight in zip(raw, weights, strict=True)]
    return torch.stack(means)


def low_pass(image: torch.Tensor, weight: torch.Tensor, voxel_size_mm: float, sigma_mm: float) -> torch.Tensor:
    """Mean of an image (C, D, H, W) under a Gaussian window, each voxel counted by ``weight`` (1, D, H, W).

    It is found on a lattice of half the window's standard deviation and read linearly, which is exact to about a
    hundredth. Where all weights are farther than about five standard deviations it is 0.
    """
    down, up = zip(*(_window(n, voxel_size_mm, sigma_mm, image.device) for n in image.shape[1:]), strict=True)
    total = apply_separable(weight, down)
    return apply_separable(apply_separable(image * weight, down) / (total + 1e-6), up)


def _window(n: int, voxel_size_mm: float, sigma_mm: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian means of an axis of n voxels on a lattice (m, n), and linear interpolation back to the voxels (n, m)."""
    length_mm = (n - 1) * voxel_size_mm
    m = max(2, math.ceil(2 * length_mm / sigma_mm) + 1)
    voxels = torch.arange(n, dtype=torch.float64) * voxel_size_mm
    points = torch.linspace(0, max(length_mm, voxel_size_mm), m, dtype=torch.float64)
    down = torch.exp(-0.5 * ((points[:, None] - voxels) / sigma_mm) ** 2)
    up = (1 - (voxels[:, None] - points).abs() / (points[1] - points[0])).clamp_min(0)
    return (down / down.sum(1, keepdim=True)).float().to(device), up.float().to(device)
