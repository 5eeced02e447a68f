"""From a painted head to a stored scan: every artefact of an image, in the order in which they happen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from synthseg.generator.artefacts import kspace, masking, modes, scanner, storage
from synthseg.generator.artefacts.plan import ArtefactPlan
from synthseg.generator.artefacts.slices import slice_by_slice
from synthseg.generator.artefacts.storage import along, slice_matrices
from synthseg.labels import LabelTable


def corrupt(
    image: torch.Tensor,
    labels: torch.Tensor,
    tables: Sequence[LabelTable],
    plans: Sequence[ArtefactPlan],
    voxel_size_mm: float,
) -> tuple[torch.Tensor, torch.Tensor, list[storage.Box]]:
    """Image (B, 1, D, H, W) and labels (B, D, H, W) after all artefacts, and the box that each scan covers.

    Labels are background where the scan does not show what was there.
    """
    if any(plan.scene is not None for plan in plans):
        image, labels = modes.scene(image, labels, tables, [plan.scene for plan in plans])
    image = scanner.bias_field(image, plans)
    image = scanner.gamma(image, plans)
    if any(plan.wrap is not None for plan in plans):
        image = storage.fold(image, plans)
    image = acquire(image, plans, voxel_size_mm)
    boxes = [storage.covered(image.shape[2:], plan) for plan in plans]
    if any(plan.masked for plan in plans):
        image, labels = masking.mask(image, labels, tables, plans, voxel_size_mm)
    kept = [storage.placed(single[box], box, single.shape) for single, box in zip(labels, boxes, strict=True)]
    return image, scanner.stacked(kept), boxes


def acquire(image: torch.Tensor, plans: Sequence[ArtefactPlan], voxel_size_mm: float) -> torch.Tensor:
    """The acquired grid and what happens on it: slices with a profile, poses, k-space, noise; then back to the voxels.

    Noise is added before interpolation, so it is as correlated as in a real scan that was stored finer.
    """
    out = []
    for single, plan in zip(image, plans, strict=True):
        coarse = single
        returns = []
        for axis in range(3):
            spacing = max(plan.spacing_mm[axis], voxel_size_mm)
            moved = plan.slices.across_mm if plan.slices is not None and plan.slices.axis == axis else ()
            if spacing > voxel_size_mm or any(moved):
                n = single.shape[axis + 1]
                down, up = slice_matrices(
                    n, voxel_size_mm, spacing, plan.thickness_mm[axis], plan.profile, plan.stored, moved
                )
                coarse = along(coarse, down.to(image), axis + 1)
                returns.append((axis + 1, up.to(image)))
        acquired_mm = [max(mm, voxel_size_mm) for mm in plan.spacing_mm]
        if plan.slices is not None:
            coarse = slice_by_slice(coarse, plan.slices, acquired_mm)
        if plan.kspace is not None:
            coarse = kspace.distort(coarse, plan.kspace, acquired_mm)
        coarse = scanner.noise(coarse, plan)
        for axis, up in returns:
            coarse = along(coarse, up, axis)
        if plan.stored is not None and returns and plan.stored.by in {"cubic", "zero_fill"}:
            coarse = coarse.abs() if plan.stored.by == "zero_fill" else coarse.clamp_min(0)
        out.append(coarse)
    return scanner.stacked(out)
