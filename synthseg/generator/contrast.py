"""Intensities from labels: a lookup of mean and spread, averaged over the points of a voxel (partial volume).

Per-label Gaussians follow SynthSeg (Billot et al. 2023); averaging a finer sampling follows SIAM (2026).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from synthseg.generator.deform import resize
from synthseg.generator.plan import ContrastPlan


def paint(samples: Sequence[torch.Tensor], plan: ContrastPlan) -> torch.Tensor:
    """Image (D, H, W) from the labels read at several points of each voxel, each (D, H, W) of table indices."""
    device = samples[0].device
    visible = torch.tensor(plan.visible, dtype=torch.float32, device=device)
    air = plan.mean[0]
    mean = torch.tensor(plan.mean, device=device) * visible + air * (1 - visible)
    std = torch.tensor(plan.std, device=device) * visible
    rough = torch.tensor(plan.texture_std, device=device) * visible
    weight = 1.0 / len(samples)
    total = torch.zeros((3, *samples[0].shape), device=device)
    for labels in samples:
        index = labels.int().flatten()
        for channel, table in enumerate((mean, std, rough)):
            total[channel].add_(torch.index_select(table, 0, index).view(labels.shape), alpha=weight)
    noise = torch.randn(
        samples[0].shape, generator=torch.Generator(device=device).manual_seed(plan.noise_seed), device=device
    )
    texture = resize(plan.texture.tensor(device)[None], samples[0].shape)[0, 0]
    return total[0].addcmul_(total[1], noise).addcmul_(total[2], texture)
