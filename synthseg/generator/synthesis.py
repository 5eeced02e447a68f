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
from synthseg.generator.reading import Reading, read_labels, read_points, rename, subsample_offsets
from synthseg.intensity import normalise
from synthseg.templates import Template


def read_anatomy(template: Template, plan: Plan, device: torch.device | str = "cpu") -> tuple[Reading, torch.Tensor]:
    """Labels to paint at the points of each voxel, and labels of the target at the voxel centres, uint8 (D, H, W)."""
    d, changed = plan.deform, plan.anatomy
    truth = anatomy.change_labels(template, changed) if changed is not None else template.labels
    painted = truth
    if plan.anomalies is not None:
        painted = anomalies.paint_anomalies(template, truth, plan.anomalies)
        truth = painted if plan.anomalies.label is not None else truth
    same = painted is truth
    truth = truth.to(device)
    painted = truth if same else painted.to(device)
    step = torch.tensor(d.matrix) * plan.voxel_size_mm / torch.tensor(template.spacing_mm)[:, None]
    if d.flip:
        step[0] = -step[0]
    offsets = subsample_offsets(plan.subsamples) @ step.T

    def coordinates(displacement: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
        return deform.coordinates(
            d, plan.shape, plan.voxel_size_mm, template.center, template.spacing_mm, device, displacement
        )

    moved = None
    if changed is not None and anatomy.moves(changed):
        moved = partial(anatomy.displacement, template, changed)
    layers = [coordinates(moved)]
    reading = read_points(painted, layers[0], offsets)
    moved_brain = None
    if changed is not None and anatomy.moves_brain(changed):
        moved_brain = anatomy.MovedBrain(template.table)
        layers.append(coordinates(partial(anatomy.displacement, template, changed, brain=True)))
        around = reading.holding(moved_brain.reaches)
        brain = read_points(painted, layers[1].flatten(1).index_select(1, around), offsets)
        reading = reading.over(brain, around, moved_brain.over)
    target = reading.middle
    if painted is not truth:  # they differ where an anomaly is painted
        target = target.clone()
        flat = target.view(-1)
        hidden = (flat >= anomalies.first_index(template.table)).nonzero()[:, 0]
        below = [read_labels(truth, coords.flatten(1).index_select(1, hidden)) for coords in layers]
        flat[hidden] = below[0] if moved_brain is None else moved_brain.over(below[0], below[1])
    if d.flip:
        swap = torch.from_numpy(template.table.flip).to(device=device, dtype=torch.uint8)
        reading = reading.renamed(swap)
        target = reading.middle if same else rename(target, swap)
    return reading, target


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
