"""Intensities from labels: a lookup of mean and spread, averaged over the points of a voxel (partial volume).

Per-label Gaussians follow SynthSeg (Billot et al. 2023); averaging a finer sampling follows SIAM (2026).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from pydantic import Field

from synthseg.config import ContrastConfig
from synthseg.generator import hounsfield, texture
from synthseg.generator.deform import resize
from synthseg.generator.draw import Draw, Field3D, Record
from synthseg.generator.hounsfield import CTPlan
from synthseg.generator.means import (
    LOOK_ALIKES,
    Means,
    check_named,
    inverted,
    measured_means,
    named_contrasts,
    named_means,
    priors_of,
    random_means,
    tie_touching,
)
from synthseg.generator.physics import sample_physics
from synthseg.generator.priors import tissues_of
from synthseg.generator.reading import Reading
from synthseg.generator.texture import Clusters, Octaves
from synthseg.labels import BRAIN_TISSUES, LabelTable

__all__ = ["LOOK_ALIKES", "ContrastPlan", "check_named", "named_contrasts", "paint", "sample_contrast"]


class ContrastPlan(Record):
    """Mean, spread and texture amplitude per template label (table order); labels not drawn are stripped.

    Intensities are in units of a bright tissue, or in Hounsfield units if there is a ``ct``.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    texture_std: tuple[float, ...]
    texture: Field3D
    noise_seed: int
    visible: tuple[bool, ...]
    settings: dict[str, float] = Field(default_factory=dict)
    clusters: Clusters | None = None
    octaves: Octaves | None = None
    ct: CTPlan | None = None


def sample_contrast(
    config: ContrastConfig, table: LabelTable, extent_mm: tuple[float, ...], draw: Draw, strip: bool
) -> ContrastPlan:
    """Means are drawn per tissue, so that left and right, and parts of one tissue, agree."""
    check_named(config)
    priors = priors_of(config)
    name = draw.pick(config.weights())
    order = tissues_of(table)
    tissues = sorted({*order, "gm", "wm", "csf", "soft", "bone_cortical"})
    if name == "random":
        found = random_means(config, tissues, draw)
    elif name == "physics":
        found = sample_physics(config, tissues, draw)
    elif name == "hounsfield":
        found = hounsfield.sample_hounsfield(config, tissues, draw)
    elif name == "priors" and priors is not None:
        found = measured_means(config, priors, tissues, draw)
    else:
        found = named_means(name, tissues, draw)
    means = found.mean
    in_hu = name == "hounsfield"
    spread = {t: draw.uniform(*config.std) for t in tissues}
    rough = {
        t: draw.uniform(*(config.soft_texture_std if t in {"soft", "bone_cancellous"} else config.texture_std))
        for t in tissues
    }
    if name == "ct":  # soft tissue differs by a few Hounsfield units only; keep noise and texture to that scale
        spread = {t: 0.25 * s for t, s in spread.items()}
        rough = {t: (s if t == "soft" else 0.15 * s) for t, s in rough.items()}
    if in_hu:
        spread = {t: hounsfield.SPREAD_HU * s for t, s in spread.items()}
        rough = {t: hounsfield.unit_hu(t) * s for t, s in rough.items()}
    spread |= found.std
    spread["air"] = 0.0 if means["air"] == 0.0 or in_hu else 0.3 * spread["air"]
    rough["air"] = 0.0
    keep_csf = draw.chance(0.6)
    stripped_tissues = (
        BRAIN_TISSUES
        | ({"csf"} if keep_csf else frozenset())
        | ({"vessel", "vein", "artery"} if draw.chance(0.3) else frozenset())
    )
    visible = tuple(not strip or label.tissue in stripped_tissues or label.id == 0 for label in table.labels)
    field = draw.field(1, extent_mm, draw.uniform(*config.texture_spacing_mm), 1.0)
    noise_seed = draw.seed()
    # What follows was added later: it is drawn after the rest, so that earlier draws stay what they were.
    means, parts = _ties_and_inversion(config, found, tissues, draw)
    unit = (
        hounsfield.unit_hu
        if in_hu
        else lambda t: hounsfield.unit_hu(t) / hounsfield.HU_PER_UNIT if name == "ct" else 1.0
    )
    clusters = (
        texture.sample_clusters(config, order, means, parts, unit, extent_mm, draw)
        if draw.chance(config.cluster_probability)
        else None
    )
    octaves = texture.sample_octaves(config, extent_mm, draw) if draw.chance(config.octave_probability) else None
    if strip:
        means["air"], spread["air"] = hounsfield.AIR_HU if in_hu else 0.0, 0.0
    ct = hounsfield.sample_ct(config, extent_mm, strip, draw) if in_hu else None
    if draw.chance(config.plain_probability):
        spread, rough = dict.fromkeys(spread, 0.0), dict.fromkeys(rough, 0.0)
    return ContrastPlan(
        name=found.name,
        mean=tuple(means[t] for t in order),
        std=tuple(spread[t] for t in order),
        texture_std=tuple(rough[t] for t in order),
        texture=field,
        noise_seed=noise_seed,
        visible=visible,
        settings=found.settings,
        clusters=clusters,
        octaves=octaves,
        ct=ct,
    )


def _ties_and_inversion(
    config: ContrastConfig, found: Means, tissues: Sequence[str], draw: Draw
) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
    """Means and parts after borders have vanished, air has become bright, and bright and dark have changed places."""
    means, parts = dict(found.mean), found.parts
    in_hu = found.name == "hounsfield"
    if in_hu:
        tie_touching(config.touching_tie_probability, means, tissues, draw, 1.0, hounsfield.TIE_REACH_HU)
    else:
        reach = hounsfield.TIE_REACH_HU / hounsfield.HU_PER_UNIT if found.name == "ct" else math.inf
        tie_touching(config.touching_tie_probability, means, tissues, draw, reach=reach)
    bright = draw.uniform(*config.mean)
    if draw.chance(config.bright_air_probability) and found.name == "random":
        means["air"] = bright
    if draw.chance(config.invert_probability) and found.name != "ct" and not in_hu:
        means, parts = inverted(means, parts)
    return means, parts


def paint(reading: Reading, plan: ContrastPlan) -> torch.Tensor:
    """Image (D, H, W) from the labels, indices of a table, that are read at the points of each voxel."""
    device, shape = reading.middle.device, reading.middle.shape
    visible = torch.tensor(plan.visible, dtype=torch.float32, device=device)
    air = plan.mean[0]
    mean = torch.tensor(plan.mean, device=device) * visible + air * (1 - visible)
    std = torch.tensor(plan.std, device=device) * visible
    rough = torch.tensor(plan.texture_std, device=device) * visible
    region = None
    if plan.clusters is not None:  # the row of a table with one row per region, as an offset into it
        mean = (mean + torch.tensor(plan.clusters.offset, device=device) * visible).flatten()
        std, rough = std.repeat(texture.REGIONS), rough.repeat(texture.REGIONS)
        n = len(plan.mean)
        small = torch.uint8 if texture.REGIONS * n <= 256 else torch.int32
        region = texture.regions(plan.clusters, shape, device).to(small).mul_(n).flatten()
    noise = torch.randn(shape, generator=torch.Generator(device=device).manual_seed(plan.noise_seed), device=device)
    if plan.octaves is not None:
        rise = texture.octaves(plan.octaves, shape, device)
    else:
        rise = resize(plan.texture.tensor(device)[None], shape)[0, 0]
    image = torch.empty(shape, device=device)
    flat, noise, rise = image.view(-1), noise.view(-1), rise.view(-1)
    for part, level, spread, roughness in _average(reading, region, (mean, std, rough)):
        torch.addcmul(level, spread, noise[part], out=flat[part]).addcmul_(roughness, rise[part])
    return image if plan.ct is None else hounsfield.finish(image, plan.ct)


def _average(
    reading: Reading, region: torch.Tensor | None, tables: Sequence[torch.Tensor]
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The mean over the points of ``table[region + label]`` for each of three tables, float32, slab by slab."""
    count = len(reading.points)
    pure = [_mean([table] * count) for table in tables]  # summed as in a mixed voxel: no rounding tells them apart
    labels = reading.middle.view(-1)
    for part, some in reading.slabs():
        middle, points, mixed = labels[part], reading.points[:, some], reading.mixed[some]
        if region is not None:
            middle, points = middle + region[part], points + region[mixed]
        index, indices = middle.int(), points.int()
        means = [torch.index_select(table, 0, index) for table in pure]
        for mean, table in zip(means, tables, strict=True):
            mean.index_copy_(0, mixed - part.start, _mean([torch.index_select(table, 0, row) for row in indices]))
        yield part, means[0], means[1], means[2]


def _mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(values[0])
    for value in values:
        total.add_(value, alpha=1.0 / len(values))
    return total
