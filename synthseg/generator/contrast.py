"""Intensities from labels: a lookup of mean and spread, averaged over the points of a voxel (partial volume).

Per-label Gaussians follow SynthSeg (Billot et al. 2023); averaging a finer sampling follows SIAM (2026).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml

from synthseg.config import ContrastConfig
from synthseg.errors import ConfigError
from synthseg.generator.deform import resize
from synthseg.generator.draw import Draw, Field3D, Record
from synthseg.labels import BRAIN_TISSUES, LabelTable

# tissue -> the tissue that it may share its mean with
LOOK_ALIKES = {
    "ventricle": "csf",
    "cerebellar_gm": "gm",
    "thalamus": "gm",
    "caudate": "gm",
    "putamen": "gm",
    "accumbens": "gm",
    "hippocampus": "gm",
    "amygdala": "gm",
    "pallidum": "wm",
    "brainstem": "wm",
    "lesion": "wm",
    "muscle": "soft",
    "skin": "soft",
    "mucosa": "soft",
    "nerve": "wm",
    "eye": "csf",
    "dura": "bone_cortical",
}


class ContrastPlan(Record):
    """Mean, spread and texture amplitude per template label (table order); labels not drawn are stripped."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    texture_std: tuple[float, ...]
    texture: Field3D
    noise_seed: int
    visible: tuple[bool, ...]


@lru_cache(maxsize=1)
def named_contrasts() -> dict[str, dict[str, tuple[float, float]]]:
    """Mean ranges per tissue of each named contrast, from contrasts.yaml."""
    table: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "contrasts.yaml").read_text())
    return {name: {t: (float(r[0]), float(r[1])) for t, r in tissues.items()} for name, tissues in table.items()}


def sample_contrast(
    config: ContrastConfig, table: LabelTable, extent_mm: tuple[float, ...], draw: Draw, strip: bool
) -> ContrastPlan:
    """Means are drawn per tissue, so that left and right, and parts of one tissue, agree."""
    name = draw.pick({"random": config.random_weight, **config.named_weights})
    tissues = sorted({label.tissue for label in table.labels} | {"gm", "wm", "csf", "soft", "bone_cortical"})
    means: dict[str, float] = {}
    if name == "random":
        for tissue in tissues:
            means[tissue] = draw.uniform(*config.mean)
        for tissue, like in LOOK_ALIKES.items():
            if draw.chance(config.tie_probability) and tissue in means:
                means[tissue] = means[like] + draw.normal(0.03)
        means["air"] = 0.0 if draw.chance(config.air_is_zero_probability) else draw.uniform(0.0, 0.15)
    else:
        ranges = named_contrasts().get(name)
        if ranges is None:
            known = ", ".join(["random", *named_contrasts()])
            raise ConfigError(f"contrast.named_weights: there is no contrast '{name}'; known: {known}")
        for tissue in tissues:
            means[tissue] = draw.uniform(*ranges.get(tissue, (0.0, 1.0)))
    spread = {t: draw.uniform(*config.std) for t in tissues}
    rough = {
        t: draw.uniform(*(config.soft_texture_std if t in {"soft", "bone_cancellous"} else config.texture_std))
        for t in tissues
    }
    if name == "ct":  # soft tissue differs by a few Hounsfield units only; keep noise and texture to that scale
        spread = {t: 0.25 * s for t, s in spread.items()}
        rough = {t: (s if t == "soft" else 0.15 * s) for t, s in rough.items()}
    spread["air"] = 0.0 if means["air"] == 0.0 else 0.3 * spread["air"]
    rough["air"] = 0.0
    keep_csf = draw.chance(0.6)
    stripped_tissues = (
        BRAIN_TISSUES
        | ({"csf"} if keep_csf else frozenset())
        | ({"vessel", "vein", "artery"} if draw.chance(0.3) else frozenset())
    )
    visible = tuple(not strip or label.tissue in stripped_tissues or label.id == 0 for label in table.labels)
    if strip:
        means["air"], spread["air"] = 0.0, 0.0
    order = [label.tissue for label in table.labels]
    return ContrastPlan(
        name=name,
        mean=tuple(means[t] for t in order),
        std=tuple(spread[t] for t in order),
        texture_std=tuple(rough[t] for t in order),
        texture=draw.field(1, extent_mm, draw.uniform(*config.texture_spacing_mm), 1.0),
        noise_seed=draw.seed(),
        visible=visible,
    )


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
