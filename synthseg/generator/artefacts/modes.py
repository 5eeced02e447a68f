"""Scans of a brain without its head: ex vivo in a fluid, and photographs of slabs from a dissection.

Photographs follow Tregidgo et al. (MICCAI 2020) and Gazula et al. (eLife 2024): coronal slabs, cut by hand and
photographed on black, each in a light of its own, stacked with a small error of position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from synthseg.config.artefacts import ModesConfig
from synthseg.generator.artefacts.masking import brain, of_tissues
from synthseg.generator.artefacts.slices import SlicesPlan
from synthseg.generator.deform import resize
from synthseg.generator.draw import Draw, Field3D, Record
from synthseg.labels import LabelTable

SLAB_AXIS = 1  # coronal slabs, RAS+


class ScenePlan(Record):
    """Around the brain and in its ventricles there is ``fluid`` (a field of intensities) instead of a head."""

    mode: Literal["exvivo", "photo"]
    fluid: Field3D


def sample_scene(config: ModesConfig, extent_mm: tuple[float, ...], draw: Draw) -> ScenePlan | None:
    if draw.chance(config.photo_probability):
        return ScenePlan(mode="photo", fluid=Field3D(shape=(1, 2, 2, 2), values=(0.0,) * 8))
    if draw.chance(config.exvivo_probability):
        mean, std = draw.uniform(*config.exvivo_fluid_mean), draw.uniform(*config.exvivo_fluid_std)
        waves = draw.field(1, extent_mm, 60.0, std)
        return ScenePlan(
            mode="exvivo", fluid=Field3D(shape=waves.shape, values=tuple(max(0.0, mean + v) for v in waves.values))
        )
    return None


def sample_slabs(config: ModesConfig, count: int, draw: Draw) -> SlicesPlan:
    """Pose and light of ``count`` photographed slabs."""

    def pairs(std: float) -> tuple[tuple[float, float], ...]:
        return tuple((draw.normal(std), draw.normal(std)) for _ in range(count))

    return SlicesPlan(
        axis=SLAB_AXIS,
        shift_mm=pairs(config.photo_shift_mm),
        degrees=tuple(draw.normal(config.photo_rotation_deg) for _ in range(count)),
        gain=tuple(2.0 ** draw.normal(config.photo_gain_std) for _ in range(count)),
        slope=pairs(config.photo_slope_std),
        exponent=tuple(2.0 ** draw.normal(config.photo_gamma_std) for _ in range(count)),
    )


def scene(
    image: torch.Tensor, labels: torch.Tensor, tables: Sequence[LabelTable], plans: Sequence[ScenePlan | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (B, 1, D, H, W) and labels (B, D, H, W) of the brain alone. The ventricles keep their label."""
    if not any(plans):
        return image.clone(), labels
    image, labels = image.clone(), labels.clone()
    for b, (table, plan) in enumerate(zip(tables, plans, strict=True)):
        if plan is None:
            continue
        tissue = brain(labels[b], table)
        fluid = resize(plan.fluid.tensor(image.device)[None], labels.shape[1:])[0, 0].to(image.dtype)
        image[b, 0] = torch.where(tissue, image[b, 0], fluid)
        labels[b].masked_fill_(~(tissue | of_tissues(labels[b], table, {"ventricle"})), 0)
    return image, labels
