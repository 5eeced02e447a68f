"""Voxels that were set to zero after the scan: skull stripping that went wrong, defacing, background removal.

Masks are made as such tools make them: smooth surfaces, millimetres beside the true one. A mask of the labels is
blurred with a Gaussian on a coarse grid; for a flat border the blurred mask is the normal distribution of the
distance to it, so its quantile function gives the distance in mm, to which a smooth random field is added.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal

import torch

from synthseg.config.artefacts import MaskingConfig
from synthseg.generator.artefacts.storage import along
from synthseg.generator.deform import resize
from synthseg.generator.draw import Draw, Field3D, Record
from synthseg.labels import INTRACRANIAL_TISSUES, PARENCHYMA_TISSUES, LabelTable, tissue_mask

GRID_MM = 3.0  # of the distances
BLUR_MM = 4.0
THIN_MM = 2.0
SPINAL_CORD = "Spinal-Cord"


class StripPlan(Record):
    """Skull stripping whose mask ends ``offset_mm`` (a field) outside the brain (negative: inside).

    Where ``leftovers`` (a standard normal field) exceeds ``threshold``, up to ``reach_mm`` outside the brain is kept.
    """

    offset_mm: Field3D
    leftovers: Field3D | None
    threshold: float
    reach_mm: float


class DefacePlan(Record):
    """The face is cut off by a plane, or by a box open to the front and below; the brain and its surroundings stay.

    plane: beyond ``margin_mm`` outside the brain along ``normal``.
    box: in front of ``depth_mm`` behind the brain's front end, below ``drop`` brain lengths under its top.
    """

    by: Literal["plane", "box"]
    normal: tuple[float, float, float]
    margin_mm: float
    depth_mm: float
    drop: float
    keep_mm: float
    noise: float
    noise_seed: int


class MaskingPlan(Record):
    """``background_mm``: voxels further than this outside the head are zero; negative cuts into the skin."""

    strip: StripPlan | None = None
    deface: DefacePlan | None = None
    background_mm: float | None = None

    @property
    def masked(self) -> bool:
        return self.strip is not None or self.deface is not None or self.background_mm is not None


def sample_masking(config: MaskingConfig, extent_mm: tuple[float, ...], draw: Draw) -> MaskingPlan:
    strip = None
    if draw.chance(config.bad_strip_probability):
        ragged = draw.field(
            1, extent_mm, draw.uniform(*config.bad_strip_spacing_mm), draw.uniform(*config.bad_strip_ragged_mm)
        )
        offset = draw.uniform(*config.bad_strip_offset_mm)
        strip = StripPlan(
            offset_mm=Field3D(shape=ragged.shape, values=tuple(offset + value for value in ragged.values)),
            leftovers=(
                draw.field(1, extent_mm, draw.uniform(15.0, 40.0), 1.0)
                if draw.chance(config.leftover_probability)
                else None
            ),
            threshold=draw.uniform(0.3, 1.5),
            reach_mm=draw.uniform(*config.leftover_reach_mm),
        )
    deface = None
    if strip is None and draw.chance(config.deface_probability):
        angle = math.radians(draw.uniform(10.0, 45.0))
        deface = DefacePlan(
            by="box" if draw.chance(config.deface_box_probability) else "plane",
            normal=(draw.uniform(-0.1, 0.1), math.cos(angle), -math.sin(angle)),
            margin_mm=draw.uniform(*config.deface_margin_mm),
            depth_mm=draw.uniform(0.0, 40.0),
            drop=draw.uniform(0.4, 0.65),
            keep_mm=draw.uniform(*config.deface_margin_mm),
            noise=draw.uniform(0.0, 1.0) if draw.chance(config.deface_noise_probability) else 0.0,
            noise_seed=draw.seed(),
        )
    background = draw.uniform(*config.background_mm) if draw.chance(config.background_probability) else None
    return MaskingPlan(strip=strip, deface=deface, background_mm=background)


def of_tissues(labels: torch.Tensor, table: LabelTable, tissues: Collection[str]) -> torch.Tensor:
    """Mask of some tissues, bool, the shape of the labels."""
    lut = torch.from_numpy(tissue_mask(table, tissues)).to(labels.device)
    return torch.index_select(lut, 0, labels.int().flatten()).view(labels.shape)


def brain(labels: torch.Tensor, table: LabelTable) -> torch.Tensor:
    """Mask of the brain's tissue, bool, the shape of the labels: what tools call brain, so no spinal cord."""
    tissue = of_tissues(labels, table, PARENCHYMA_TISSUES)
    for index, name in enumerate(table.names):
        if name == SPINAL_CORD:
            tissue &= labels != index
    return tissue


def _thinned(labels: torch.Tensor, voxel_mm: float) -> torch.Tensor:
    """Every so many-th label, about THIN_MM apart: enough for a mask that is blurred anyway."""
    step = _thinning(voxel_mm)
    return labels[::step, ::step, ::step]


def _thinning(voxel_mm: float) -> int:
    return max(1, round(THIN_MM / voxel_mm))


def signed_distance(thin: torch.Tensor, shape: Sequence[int], voxel_mm: float) -> torch.Tensor:
    """About the distance to the border of a thinned mask in mm, inside positive, on a lattice of about GRID_MM.

    The corner points of the lattice are those of the image (D, H, W). Good to about 12 mm; beyond it keeps its sign
    and grows slower.
    """
    blurred = thin.float()[None]
    for axis, n in enumerate(shape):
        points = max(2, min(n, round((n - 1) * voxel_mm / GRID_MM) + 1))
        at = torch.linspace(0, n - 1, points, dtype=torch.float64)[:, None]
        voxels = torch.arange(0, n, _thinning(voxel_mm), dtype=torch.float64)
        weight = torch.exp(-0.5 * ((voxels - at) * (voxel_mm / BLUR_MM)) ** 2)
        weight = torch.where(weight < 1e-9, 0.0, weight)  # numbers that small are slow to multiply
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-9)
        blurred = along(blurred, weight.to(blurred), axis + 1)
    low = 1e-6  # the quantile function of the normal distribution ends here, at 4.75 blurs
    return BLUR_MM * math.sqrt(2) * torch.erfinv(2 * blurred[0].clamp(low, 1 - low) - 1)


def _lattice_mm(shape: Sequence[int], points: Sequence[int], voxel_mm: float, device: torch.device) -> torch.Tensor:
    """Position of the lattice points in mm, (3, d, h, w)."""
    axes = [torch.linspace(0, (n - 1) * voxel_mm, p, device=device) for n, p in zip(shape, points, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _above_zero(level: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return resize(level[None, None], shape)[0, 0] > 0


def _at(field: Field3D, like: torch.Tensor) -> torch.Tensor:
    return resize(field.tensor(like.device)[None], like.shape)[0, 0]


def kept_by_stripping(labels: torch.Tensor, table: LabelTable, plan: StripPlan, voxel_mm: float) -> torch.Tensor:
    """What a skull-stripping tool leaves of a head, bool (D, H, W), RAS+: nothing below the brain."""
    thin = _thinned(labels, voxel_mm)
    inside = of_tissues(thin, table, INTRACRANIAL_TISSUES)
    rows = brain(thin, table).any(0).any(0).nonzero()
    if len(rows):
        inside[:, :, : int(rows[0])] = False
    distance = signed_distance(inside, labels.shape, voxel_mm)
    level = distance + _at(plan.offset_mm, distance)
    if plan.leftovers is not None:
        blob = BLUR_MM * (_at(plan.leftovers, distance) - plan.threshold)
        level = torch.maximum(level, torch.minimum(blob, distance + plan.reach_mm))
    return _above_zero(level, labels.shape)


def cut_by_defacing(labels: torch.Tensor, table: LabelTable, plan: DefacePlan, voxel_mm: float) -> torch.Tensor:
    """The face, bool (D, H, W), RAS+: nothing within ``keep_mm`` of the brain. Without a brain nothing is cut."""
    distance = signed_distance(brain(_thinned(labels, voxel_mm), table), labels.shape, voxel_mm)
    inside = distance > 0
    if not inside.any():
        return torch.zeros_like(labels, dtype=torch.bool)
    position = _lattice_mm(labels.shape, distance.shape, voxel_mm, labels.device)
    if plan.by == "plane":
        normal = torch.tensor(plan.normal, device=labels.device)
        height = torch.einsum("i,idhw->dhw", normal, position)
        level = height - height[inside].max() - plan.margin_mm
    else:
        _, y, z = position
        front, back, top = y[inside].max(), y[inside].min(), z[inside].max()
        floor = top - plan.drop * (front - back)
        level = torch.minimum(y - front + plan.depth_mm, floor - z)
    return _above_zero(torch.minimum(level, -distance - plan.keep_mm), labels.shape)


def mask(
    image: torch.Tensor,
    labels: torch.Tensor,
    tables: Sequence[LabelTable],
    plans: Sequence[MaskingPlan],
    voxel_mm: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (B, 1, D, H, W) and labels (B, D, H, W) without what was cut: both are zero there.

    A cut face may be filled with noise. Its labels are background too: nobody can see what was there.
    """
    if not any(plan.masked for plan in plans):
        return image.clone(), labels
    image, true, labels = image.clone(), labels, labels.clone()
    for b, (table, plan) in enumerate(zip(tables, plans, strict=True)):
        before = true[b]
        if plan.background_mm is not None:
            distance = signed_distance(_thinned(before, voxel_mm) > 0, before.shape, voxel_mm)
            away = ~_above_zero(distance + plan.background_mm, before.shape)
            image[b, 0].masked_fill_(away, 0)
            labels[b].masked_fill_(away, 0)
        if plan.strip is not None:
            away = ~kept_by_stripping(before, table, plan.strip, voxel_mm)
            image[b, 0].masked_fill_(away, 0)
            labels[b].masked_fill_(away, 0)
        if plan.deface is not None:
            face = cut_by_defacing(before, table, plan.deface, voxel_mm)
            image[b, 0][face] = _filling(image[b, 0], face, plan.deface)
            labels[b].masked_fill_(face, 0)
    return image, labels


def _filling(single: torch.Tensor, face: torch.Tensor, plan: DefacePlan) -> torch.Tensor:
    """Zeros, or uniform noise up to a part of the brightest tenth of the image, one value per voxel of the face."""
    count = int(face.sum())
    if plan.noise <= 0:
        return torch.zeros(count, dtype=single.dtype, device=single.device)
    source = torch.Generator(device=single.device).manual_seed(plan.noise_seed)
    drawn = torch.rand(count, generator=source, device=single.device, dtype=torch.float32)
    top = torch.quantile(single.flatten()[:: max(1, single.numel() // 100_000)].float(), 0.9)
    return (drawn * (plan.noise * top)).to(single.dtype)
