"""What coils and receiver do to intensities: bias field, gamma, local contrast, noise.

Noise is complex Gaussian before the magnitude (Gudbjartsson and Patz, MRM 1995); parallel imaging makes it stronger
where the coils see alike (the g-factor of Pruessmann et al., MRM 1999).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from synthseg.generator.deform import resize
from synthseg.generator.draw import Field3D, Record


class ScannerPlan(Record):
    """Fields are coarse lattices over the image. ``log_exponent`` adds to log gamma, ``log_gfactor`` to log noise."""

    log_bias: Field3D | None
    gamma: float
    noise_std: float
    noise_seed: int
    noise_kind: Literal["rician", "gaussian"] = "rician"
    log_exponent: Field3D | None = None
    log_gfactor: Field3D | None = None


def stacked(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images (...) as one batch (B, ...); a single one is not copied."""
    return images[0][None] if len(images) == 1 else torch.stack(tuple(images))


def smooth(field: Field3D, image: torch.Tensor) -> torch.Tensor:
    """A coarse field (C, d, h, w) at the voxels of an image (..., D, H, W), in its dtype, on its device."""
    return resize(field.tensor(image.device)[None], image.shape[-3:])[0].to(image.dtype)


def bias_field(image: torch.Tensor, plans: Sequence[ScannerPlan]) -> torch.Tensor:
    """Multiply by a smooth positive field."""
    out = []
    for single, plan in zip(image, plans, strict=True):
        if plan.log_bias is not None:
            field = resize(plan.log_bias.tensor(image.device)[None], image.shape[2:])[0]
            single = single * field.exp_().to(image.dtype)
        out.append(single)
    return stacked(out)


def gamma(image: torch.Tensor, plans: Sequence[ScannerPlan]) -> torch.Tensor:
    """``image ** gamma`` on the range of each image; with a local contrast, gamma varies smoothly over space."""
    out = []
    for single, plan in zip(image, plans, strict=True):
        if plan.log_exponent is not None:
            single = _curve(single, plan.gamma * smooth(plan.log_exponent, image).exp())
        elif plan.gamma != 1:
            single = _curve(single, torch.full((1, 1, 1, 1), plan.gamma, dtype=image.dtype, device=image.device))
        out.append(single)
    return stacked(out)


def _curve(single: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    low, high = torch.aminmax(single)
    span = (high - low).clamp_min(1e-6)
    curved = (single - low).div_(span).clamp_(0, 1).pow_(exponent).mul_(span).add_(low)
    straight = exponent == 1
    return torch.where(straight, single, curved) if bool(straight.any()) else curved


def noise(single: torch.Tensor, plan: ScannerPlan) -> torch.Tensor:
    """Noise on the acquired grid, (C, D, H, W): Rician, or Gaussian and not below zero (windowed CT, photographs)."""
    if plan.noise_std <= 0:
        return single
    source = torch.Generator(device=single.device).manual_seed(plan.noise_seed)
    channels = 2 if plan.noise_kind == "rician" else 1
    drawn = torch.randn((channels, *single.shape), generator=source, device=single.device, dtype=single.dtype)
    drawn *= plan.noise_std
    if plan.log_gfactor is not None:
        drawn *= smooth(plan.log_gfactor, single).exp()
    noisy = drawn[0].add_(single)
    return noisy.hypot_(drawn[1]) if plan.noise_kind == "rician" else noisy.clamp_min_(0)
