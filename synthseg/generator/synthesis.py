"""render(templates, plans) -> images and labels: pure, batched, the same for the same plans.

coordinates -> labels at the points of each voxel -> intensities -> artefacts, in the order in which they happen
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from synthseg.generator import anatomy, artefacts, contrast, deform
from synthseg.generator.plan import Plan
from synthseg.intensity import normalise
from synthseg.templates import Template


def read_anatomy(
    template: Template, plan: Plan, device: torch.device | str = "cpu"
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Labels at the points of each voxel, ``subsamples`` times uint8 (D, H, W), and at the voxel centres."""
    volume = template.labels
    displacements: list[Callable[[torch.Tensor], torch.Tensor] | None] = [None]
    if plan.anatomy is not None:
        volume = anatomy.change_labels(template, plan.anatomy)
        if anatomy.moves(plan.anatomy):
            displacements = [partial(anatomy.displacement, template, plan.anatomy)]
        if anatomy.moves_brain(plan.anatomy):
            displacements.append(partial(anatomy.displacement, template, plan.anatomy, brain=True))
    volume = volume.to(device)
    d = plan.deform
    step = torch.tensor(d.matrix) * plan.voxel_size_mm / torch.tensor(template.spacing_mm)[:, None]
    if d.flip:
        step[0] = -step[0]
    offsets = list(deform.subsample_offsets(plan.subsamples) @ step.T)
    if plan.subsamples > 1:
        offsets.append(torch.zeros(3))
    layers = []
    for displacement in displacements:
        coords = deform.coordinates(
            d, plan.shape, plan.voxel_size_mm, template.center, template.spacing_mm, device, displacement
        )
        layers.append([deform.read_labels(volume, coords, offset) for offset in offsets])
    samples = layers[0]
    if len(layers) == 2:
        samples = [anatomy.brain_in_skull(head, brain, template.table) for head, brain in zip(*layers, strict=True)]
    if d.flip:
        swap = torch.from_numpy(template.table.flip).to(device=device, dtype=torch.uint8)
        samples = [swap[s.int()] for s in samples]
    return (samples[:-1] if plan.subsamples > 1 else samples), samples[-1]


def render(
    templates: Sequence[Template], plans: Sequence[Plan], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 1, D, H, W), float32 in [0, 1], and labels (B, D, H, W), uint8 indices into each template's table.

    All plans must ask for one shape and voxel size. Labels are those at the voxel centres; what a stripped or
    cropped scan does not show is background.
    """
    images, targets = [], []
    for template, plan in zip(templates, plans, strict=True):
        samples, middle = read_anatomy(template, plan, device)
        images.append(contrast.paint(samples, plan.contrast)[None])
        hidden = ~torch.tensor(plan.contrast.visible, device=device)
        targets.append(middle.masked_fill(hidden[middle.int()], 0))
    image, labels = torch.stack(images), torch.stack(targets)
    image, labels, seen = artefacts.corrupt(
        image.clamp_min(0),
        labels,
        [template.table for template in templates],
        [plan.artefacts for plan in plans],
        plans[0].voxel_size_mm,
    )
    result = torch.zeros_like(image)
    for b, plan in enumerate(plans):
        if not all(plan.contrast.visible):  # stripping comes after the acquisition: exact zeros around the brain
            image[b, 0].masked_fill_(labels[b] == 0, 0.0)
        result[b][seen[b]] = normalise(image[b][seen[b]])  # what the scan does not cover has no say
    return result, labels
