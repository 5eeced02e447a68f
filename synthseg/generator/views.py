"""Views: several images of one anatomy, each with a contrast and artefacts of its own, from mild to severe.

Brain-ID (Liu et al., ECCV 2024) learns from two mild and two severe images of one deformed subject. A view is a Plan
whose anatomy and deformation are kept and whose appearance is drawn again; its geometry may differ from the first
view's by a displacement, which is known. Without one, a network can tell voxels by their place in the image alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from synthseg import rng
from synthseg.config import GeneratorConfig
from synthseg.generator import anatomy, deform
from synthseg.generator.draw import Draw, Field3D
from synthseg.generator.plan import Plan, sample_plan
from synthseg.generator.synthesis import render
from synthseg.labels import LabelTable
from synthseg.templates import Template


@dataclass(frozen=True)
class Views:
    """Images (V, 1, D, H, W) in [0, 1] of one anatomy, their labels (V, D, H, W), and where their voxels lie.

    Attributes
    ----------
    displacement_mm : (V, 3, D, H, W); the anatomy at position p of view v is that at ``p + displacement_mm[v](p)`` of a
        view without displacement, such as the first.
    """

    images: torch.Tensor
    labels: torch.Tensor
    displacement_mm: torch.Tensor
    plans: tuple[Plan, ...]


def sample_views(config: GeneratorConfig, template: str, table: LabelTable, seed: int, index: int) -> list[Plan]:
    """One Plan for each of ``config.views.severities``. The first has the geometry of ``sample_plan`` of this index."""
    shared = sample_plan(config, template, table, seed, index)
    plans = []
    for number, severity in enumerate(config.views.severities):
        own = sample_plan(config.at_severity(severity), template, table, seed, index, view=number)
        deform = shared.deform
        if number > 0 and config.views.displaced:
            deform = deform.model_copy(update={"perturbation_mm": _displacement(config, seed, index, number)})
        plans.append(own.model_copy(update={"anatomy": shared.anatomy, "deform": deform, "severity": severity}))
    return plans


def _displacement(config: GeneratorConfig, seed: int, index: int, view: int) -> Field3D:
    """A smooth field about a shift, in mm."""
    views, extent = config.views, tuple(n * config.voxel_size_mm for n in config.shape)
    field = torch.zeros(3, 2, 2, 2)
    if views.perturbation_mm > 0:
        draw = Draw(rng.generator(seed, index, f"perturbation/{view}"))
        spacing = draw.uniform(*views.perturbation_spacing_mm)
        field = draw.field(3, extent, spacing, views.perturbation_mm).tensor()
    draw = Draw(rng.generator(seed, index, f"shift/{view}"))
    shift = torch.tensor([draw.uniform(-views.shift_mm, views.shift_mm) for _ in range(3)])
    return Field3D.of(field + shift[:, None, None, None])


def render_views(template: Template, plans: Sequence[Plan], device: torch.device | str = "cpu") -> Views:
    """Render the views of one anatomy together."""
    images, labels = render([template] * len(plans), plans, device)
    moved = []
    for plan in plans:
        fine = plan.anatomy is not None and anatomy.moves(plan.anatomy)
        moved.append(deform.perturbation(plan.deform, plan.shape, plan.voxel_size_mm, fine, device))
    return Views(images, labels, torch.stack(moved), tuple(plans))
