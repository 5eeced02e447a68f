"""What varies inside a label: patches with a mean of their own, and texture of several scales.

Patches stand for the tissues that share a label (fat, muscle and glands in "other soft tissue") and for regional
differences inside one (Brain-ID and SynthSeg split labels by clustering the intensities of a scan; here smooth random
fields are cut at a level, which needs no scan). Texture sums octaves of value noise (Perlin, SIGGRAPH 1985).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from synthseg.config import ContrastConfig
from synthseg.generator.deform import resize
from synthseg.generator.draw import Draw, Field3D, Record
from synthseg.labels import INTRACRANIAL_TISSUES

REGIONS = 4  # two fields, each above or below its level


class Clusters(Record):
    """Space is split into four regions by two smooth fields; ``offset[region][label]`` is added to the label's mean."""

    fields: Field3D
    level: tuple[float, float]
    offset: tuple[tuple[float, ...], ...]


class Octaves(Record):
    """Scales of a texture, coarse to fine. The values on the lattices are drawn from the seed, on the CPU."""

    extent_mm: tuple[float, float, float]
    spacing_mm: tuple[float, ...]
    weight: tuple[float, ...]
    seed: int


def sample_clusters(
    config: ContrastConfig,
    tissues: Sequence[str],
    means: Mapping[str, float],
    parts: Mapping[str, tuple[float, ...]],
    unit: Callable[[str], float],
    extent_mm: tuple[float, ...],
    draw: Draw,
) -> Clusters:
    """Offsets per tissue, zero on average; ``tissues`` gives the tissue of each label.

    ``parts`` are the means of what a mixed tissue is made of: its patches lie anywhere between its own mean and one
    of these. ``unit`` is the size of one unit of intensity for each tissue.
    """
    fields = draw.field(2, extent_mm, draw.uniform(*config.cluster_spacing_mm), 1.0)
    level = (draw.normal(0.3), draw.normal(0.3))
    inside, outside = draw.uniform(*config.cluster_offset), draw.uniform(*config.soft_cluster_offset)
    offsets: dict[str, list[float]] = {"air": [0.0] * REGIONS}
    for tissue in sorted(set(tissues) - {"air"}):
        count = 1 + int(draw.uniform(0, config.max_clusters))
        std = unit(tissue) * (inside if tissue in INTRACRANIAL_TISSUES else outside)
        kinds = [draw.normal(std) for _ in range(count)]
        made_of = sorted(parts.get(tissue, ()), key=lambda _: draw.uniform(0.0, 1.0))  # in any order
        for number, part in enumerate(made_of[:count]):
            if std > 0:
                kinds[number] = draw.uniform(0.0, 1.0) * (part - means[tissue])
        found = [kinds[region * count // REGIONS] for region in range(REGIONS)]
        middle = sum(found) / REGIONS
        offsets[tissue] = [value - middle for value in found]
    rows = tuple(tuple(offsets[tissue][region] for tissue in tissues) for region in range(REGIONS))
    return Clusters(fields=fields, level=level, offset=rows)


def regions(plan: Clusters, shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """The region of every voxel, 0 to 3, uint8 (D, H, W)."""
    fields = resize(plan.fields.tensor(device)[None], shape)[0]
    first, second = fields[0] > plan.level[0], fields[1] > plan.level[1]
    return first.to(torch.uint8).mul_(2).add_(second)


def sample_octaves(config: ContrastConfig, extent_mm: tuple[float, ...], draw: Draw) -> Octaves:
    """Weights of unit square sum, each scale's share exponential: often one scale rules, sometimes several."""
    spacing = sorted(config.octave_spacing_mm, reverse=True)
    share = [-math.log(1.0 - draw.uniform(0.0, 1.0) * (1 - 1e-9)) + 1e-9 for _ in spacing]
    weight = tuple(math.sqrt(value / sum(share)) for value in share)
    d, h, w = extent_mm
    return Octaves(extent_mm=(d, h, w), spacing_mm=tuple(spacing), weight=weight, seed=draw.seed())


def octaves(plan: Octaves, shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """The sum of all scales, float32 (D, H, W). Each is added on its own lattice: only the sum is brought to full size.

    A lattice is never finer than the image, where the finest scale is then white noise.
    """
    source = torch.Generator().manual_seed(plan.seed)
    total = torch.zeros(())
    for spacing, weight in zip(plan.spacing_mm, plan.weight, strict=True):
        lattice = [
            max(1, min(n, math.ceil(extent / spacing) + 1)) for n, extent in zip(shape, plan.extent_mm, strict=True)
        ]
        noise = weight * torch.randn((1, 1, *lattice), generator=source)
        total = noise if total.ndim == 0 else noise + resize(total, lattice)
    return resize(total.to(device), shape)[0, 0]
