"""What scanner and storage do to an image. Every stage takes and returns (B, 1, D, H, W) and one plan per image.

Strength zero is the identity, the input is not modified, and a batch equals its images one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from synthseg.config import ArtefactConfig
from synthseg.generator.deform import resize
from synthseg.generator.draw import Draw, Field3D, Record


class ArtefactPlan(Record):
    log_bias: Field3D | None
    gamma: float
    spacing_mm: tuple[float, float, float]
    thickness_mm: tuple[float, float, float]
    noise_std: float
    noise_seed: int
    crop: tuple[tuple[float, float], ...]


def sample_artefacts(
    config: ArtefactConfig, voxel_size_mm: float, extent_mm: tuple[float, ...], draw: Draw
) -> ArtefactPlan:
    bias_std = draw.uniform(*config.bias_std)
    bias = draw.field(1, extent_mm, draw.uniform(*config.bias_spacing_mm), bias_std) if bias_std > 0 else None
    spacing = [voxel_size_mm] * 3
    thickness = [0.0] * 3
    if draw.chance(config.lowres_probability):
        if draw.chance(config.lowres_isotropic_probability):
            size = draw.uniform(voxel_size_mm, max(config.lowres_isotropic_mm, voxel_size_mm))
            spacing, thickness = [size] * 3, [size] * 3
        else:
            axis = int(draw.uniform(0, 3))
            spacing[axis] = draw.uniform(voxel_size_mm, max(config.lowres_spacing_mm, voxel_size_mm))
            thickness[axis] = spacing[axis] * draw.uniform(0.5, 1.0)
    crop = [(0.0, 1.0)] * 3
    if draw.chance(config.crop_probability):
        axis = int(draw.uniform(0, 3))
        lost = draw.uniform(0.0, config.crop_fraction)
        crop[axis] = (lost, 1.0) if draw.chance(0.5) else (0.0, 1.0 - lost)
    return ArtefactPlan(
        log_bias=bias,
        gamma=math.exp(draw.normal(config.gamma_std)),
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        thickness_mm=(thickness[0], thickness[1], thickness[2]),
        noise_std=draw.uniform(*config.noise_std) if draw.chance(config.noise_probability) else 0.0,
        noise_seed=draw.seed(),
        crop=tuple(crop),
    )


def _per_image(values: Sequence[float], image: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=image.dtype, device=image.device).view(-1, 1, 1, 1, 1)


def bias_field(image: torch.Tensor, plans: Sequence[ArtefactPlan]) -> torch.Tensor:
    """Multiply by a smooth positive field."""
    fields = []
    for plan in plans:
        if plan.log_bias is None:
            fields.append(torch.ones(image.shape[1:], dtype=image.dtype, device=image.device))
        else:
            field = resize(plan.log_bias.tensor(image.device)[None], image.shape[2:])[0]
            fields.append(field.exp().to(image.dtype))
    return image * torch.stack(fields)


def gamma(image: torch.Tensor, plans: Sequence[ArtefactPlan]) -> torch.Tensor:
    """``image ** gamma`` on the range of each image."""
    exponent = _per_image([plan.gamma for plan in plans], image)
    low, high = _range(image)
    span = (high - low).clamp_min(1e-6)
    curved = ((image - low) / span).clamp(0, 1).pow(exponent) * span + low
    return torch.where(exponent == 1, image, curved)


def _range(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flat = image.flatten(1)
    shape = (-1, 1, 1, 1, 1)
    return flat.amin(1).view(shape), flat.amax(1).view(shape)


def slice_matrices(
    n: int, voxel_mm: float, spacing_mm: float, thickness_mm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Acquisition along one axis: averaging by a box of ``thickness_mm`` (n_slices, n), linear return (n, n_slices)."""
    count = max(1, round(n * voxel_mm / spacing_mm))
    voxel = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    slices = (torch.arange(count, dtype=torch.float64) - (count - 1) / 2) * (spacing_mm / voxel_mm)
    half = max(thickness_mm / voxel_mm, 1.0) / 2
    distance = (voxel[None] - slices[:, None]).abs()
    down = (half + 0.5 - distance).clamp(0, 1)  # overlap of a voxel with the slab
    down = down / down.sum(1, keepdim=True).clamp_min(1e-9)
    up = (1 - (voxel[:, None] - slices[None]).abs() / (spacing_mm / voxel_mm)).clamp_min(0)
    up[: n // 2, 0] += 1 - up[: n // 2].sum(1)  # edge voxels outside the outermost slice centres take its value
    up[n // 2 :, -1] += 1 - up[n // 2 :].sum(1)
    return down.float(), up.float()


def acquire(image: torch.Tensor, plans: Sequence[ArtefactPlan], voxel_size_mm: float) -> torch.Tensor:
    """Coarser slices with a profile, Rician noise on the acquired grid, and linear interpolation back.

    Noise is complex Gaussian before the magnitude (Gudbjartsson and Patz, MRM 1995).
    """
    out = []
    for single, plan in zip(image, plans, strict=True):
        coarse = single
        returns = []
        for axis in range(3):
            n = single.shape[axis + 1]
            if plan.spacing_mm[axis] > voxel_size_mm:
                down, up = slice_matrices(n, voxel_size_mm, plan.spacing_mm[axis], plan.thickness_mm[axis])
                coarse = along(coarse, down.to(image), axis + 1)
                returns.append((axis + 1, up.to(image)))
        if plan.noise_std > 0:
            source = torch.Generator(device=image.device).manual_seed(plan.noise_seed)
            noise = torch.randn((2, *coarse.shape), generator=source, device=image.device, dtype=image.dtype)
            noise = noise * plan.noise_std
            coarse = torch.hypot(coarse + noise[0], noise[1])
        for axis, up in returns:
            coarse = along(coarse, up, axis)
        out.append(coarse)
    return torch.stack(out)


def along(image: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    """Apply a matrix (n_out, n_in) along one axis."""
    return torch.tensordot(image, matrix, dims=([axis], [1])).movedim(-1, axis).contiguous()


def field_of_view(image: torch.Tensor, plans: Sequence[ArtefactPlan]) -> torch.Tensor:
    """Mask (B, 1, D, H, W), bool, of what the scan covers."""
    mask = torch.ones(image.shape, dtype=torch.bool, device=image.device)
    for b, plan in enumerate(plans):
        for axis, (start, stop) in enumerate(plan.crop):
            n = image.shape[axis + 2]
            kept = torch.zeros(n, dtype=torch.bool, device=image.device)
            kept[round(start * n) : round(stop * n)] = True
            mask[b, 0] &= kept.view([-1 if a == axis else 1 for a in range(3)])
    return mask
