"""render(templates, plans) -> images and labels: pure, batched, the same for the same plans.

coordinates -> labels at the points of each voxel -> intensities -> artefacts, in the order in which they happen
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from synthseg.generator import anatomy, anomalies, artefacts, contrast, deform
from synthseg.generator.artefacts.scanner import stacked
from synthseg.generator.artefacts.storage import placed
from synthseg.generator.plan import Plan
from synthseg.generator.reading import Reading, read_points, rename, subsample_offsets
from synthseg.intensity import normalise
from synthseg.templates import Template


def read_anatomy(template: Template, plan: Plan, device: torch.device | str = "cpu") -> tuple[Reading, torch.Tensor]:
    """Labels to paint at the points of each voxel, and labels of the target at the voxel centres, uint8 (D, H, W)."""
    truth = template.labels
    displacements: list[Callable[[torch.Tensor], torch.Tensor] | None] = [None]
    if plan.anatomy is not None:
        truth = anatomy.change_labels(template, plan.anatomy)
        if anatomy.moves(plan.anatomy):
            displacements = [partial(anatomy.displacement, template, plan.anatomy)]
        if anatomy.moves_brain(plan.anatomy):
            displacements.append(partial(anatomy.displacement, template, plan.anatomy, brain=True))
    painted = truth
    if plan.anomalies is not None:
        painted = anomalies.paint_anomalies(template, truth, plan.anomalies)
        truth = painted if plan.anomalies.label is not None else truth
    same = painted is truth
    painted = painted.to(device)
    truth = painted if same else truth.to(device)
    d = plan.deform
    step = torch.tensor(d.matrix) * plan.voxel_size_mm / torch.tensor(template.spacing_mm)[:, None]
    if d.flip:
        step[0] = -step[0]
    reads = [(painted, subsample_offsets(plan.subsamples) @ step.T)]
    if painted is not truth:
        reads.append((truth, torch.zeros((1, 3))))
    layers = []
    for displacement in displacements:
        coords = deform.coordinates(
            d, plan.shape, plan.voxel_size_mm, template.center, template.spacing_mm, device, displacement
        )
        layers.append([read_points(volume, coords, offsets) for volume, offsets in reads])
    readings = layers[0]
    if len(layers) == 2:
        in_skull = partial(anatomy.brain_in_skull, table=template.table)
        readings = [head.over(brain, in_skull) for head, brain in zip(*layers, strict=True)]
    if d.flip:
        swap = torch.from_numpy(template.table.flip).to(device=device, dtype=torch.uint8)
        readings = [reading.renamed(swap) for reading in readings]
    return readings[0], readings[-1].middle


def render(
    templates: Sequence[Template], plans: Sequence[Plan], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 1, D, H, W), float32 in [0, 1], and labels (B, D, H, W), uint8 indices into each template's table.

    All plans must ask for one shape and voxel size. Labels are those at the voxel centres; what a stripped or
    cropped scan does not show is background.
    """
    images, targets = [], []
    for template, plan in zip(templates, plans, strict=True):
        reading, target = read_anatomy(template, plan, device)
        images.append(contrast.paint(reading, plan.contrast)[None])
        if not all(plan.contrast.visible):
            shown = [index if visible else 0 for index, visible in enumerate(plan.contrast.visible)]
            target = rename(target, torch.tensor(shown, dtype=torch.uint8, device=device))
        targets.append(target)
    image, labels, boxes = artefacts.corrupt(
        stacked(images).clamp_min_(0),
        stacked(targets),
        [template.table for template in templates],
        [plan.artefacts for plan in plans],
        plans[0].voxel_size_mm,
    )
    scans = []
    for scan, target, plan, box in zip(image[:, 0], labels, plans, boxes, strict=True):
        if not all(plan.contrast.visible):  # stripping comes after the acquisition: exact zeros around the brain
            scan.masked_fill_(target == 0, 0.0)
        scans.append(placed(normalise(scan[box]), box, scan.shape)[None])  # what the scan does not cover has no say
    return stacked(scans), labels
