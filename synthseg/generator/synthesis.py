"""render(templates, plans) -> images and labels: pure, batched, the same for the same plans.

coordinates -> labels at the points of each voxel -> intensities -> bias, gamma, acquisition, field of view
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from synthseg.generator import artefacts, contrast, deform
from synthseg.generator.plan import Plan
from synthseg.intensity import normalise
from synthseg.templates import Template


def render(
    templates: Sequence[Template], plans: Sequence[Plan], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 1, D, H, W), float32 in [0, 1], and labels (B, D, H, W), uint8 indices into each template's table.

    All plans must ask for one shape and voxel size. Labels are those at the voxel centres; what a stripped or
    cropped scan does not show is background.
    """
    images, targets = [], []
    for template, plan in zip(templates, plans, strict=True):
        volume = template.labels.to(device)
        d = plan.deform
        coords = deform.coordinates(d, plan.shape, plan.voxel_size_mm, template.center, template.spacing_mm, device)
        step = torch.tensor(d.matrix) * plan.voxel_size_mm / torch.tensor(template.spacing_mm)[:, None]
        if d.flip:
            step[0] = -step[0]
        offsets = deform.subsample_offsets(plan.subsamples) @ step.T
        samples = [deform.read_labels(volume, coords, offset) for offset in offsets]
        middle = samples[0] if plan.subsamples == 1 else deform.read_labels(volume, coords, torch.zeros(3))
        if d.flip:
            swap = torch.from_numpy(template.table.flip).to(device=device, dtype=torch.uint8)
            samples = [swap[s.int()] for s in samples]
            middle = swap[middle.int()]
        images.append(contrast.paint(samples, plan.contrast)[None])
        hidden = ~torch.tensor(plan.contrast.visible, device=device)
        targets.append(middle.masked_fill(hidden[middle.int()], 0))
    image, labels = torch.stack(images), torch.stack(targets)
    stages = [plan.artefacts for plan in plans]
    image = artefacts.bias_field(image.clamp_min(0), stages)
    image = artefacts.gamma(image, stages)
    image = artefacts.acquire(image, stages, plans[0].voxel_size_mm)
    seen = artefacts.field_of_view(image, stages)
    result = torch.zeros_like(image)
    for b, plan in enumerate(plans):
        if not all(plan.contrast.visible):  # stripping comes after the acquisition: exact zeros around the brain
            image[b, 0].masked_fill_(labels[b] == 0, 0.0)
        result[b][seen[b]] = normalise(image[b][seen[b]])  # what the scan does not cover has no say
    return result, labels.masked_fill(~seen[:, 0], 0)
