"""The anatomy of a sample: layers thinner or thicker, structures smaller or larger than the template's.

Small changes move borders: voxels near a border change hands (``borders``). Large ones push their surroundings
(``morph``). Both happen in the template, before it is deformed and read.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from synthseg.config import AnatomyConfig
from synthseg.errors import ConfigError
from synthseg.generator.borders import (
    EFFECTS,
    NUCLEI,
    REACH_VOXELS,
    Borders,
    Cortex,
    borders_of,
    cell_positions,
    cortex_of,
    members,
    movable_pairs,
)
from synthseg.generator.draw import Draw, Field3D, Record
from synthseg.generator.morph import morph_of
from synthseg.labels import BRAIN_TISSUES, LabelTable
from synthseg.templates import Template

GAP = 1  # row of the subarachnoid gap among the directions of ``Morph``
PIECE = 0.1  # a piece of a nucleus that is smaller than this part of the largest is an island
BOX_MM = 256.0  # the variation over space is drawn on a cube of this side around the template's centre


class Shift(Record):
    """A shift of a border: its mean, and the weights of the two fields of variation, in mm."""

    mean_mm: float
    variation_mm: tuple[float, float]

    def over(self, fields: torch.Tensor) -> torch.Tensor:
        """The shift over space, from the two fields of variation (2, ...)."""
        return self.mean_mm + self.variation_mm[0] * fields[0] + self.variation_mm[1] * fields[1]


class AnatomyPlan(Record):
    """What happens to the anatomy. A structure or layer that is not named stays as it is.

    Attributes
    ----------
    shifts : effect of ``borders.EFFECTS`` -> how far the growing tissue advances.
    volume_ratio : label id of a deep nucleus -> its volume against the template's.
    recarve : thickness of a cortex carved anew from white matter; None: not carved.
    ventricle_ratio : volume of the ventricles against the template's.
    layers : shifts of subarachnoid gap, skull and scalp.
    atrophy : part of the cerebral cortex that becomes CSF.
    variation : two fields over ``BOX_MM``.
    """

    shifts: dict[str, Shift]
    volume_ratio: dict[int, float]
    recarve: Shift | None
    ventricle_ratio: float
    layers: tuple[Shift, Shift, Shift] | None
    atrophy: float
    variation: Field3D


def sample_anatomy(config: AnatomyConfig, table: LabelTable, draw: Draw) -> AnatomyPlan | None:
    """Draw the changes of one sample; None for none."""
    changed = draw.chance(config.probability)
    if not changed and config.atrophy == 0:
        return None

    def shift(largest: float) -> Shift:
        angle = draw.uniform(0, 2 * math.pi)
        spread = draw.uniform(0, config.variation) * largest
        mean = draw.uniform(-largest, largest)
        return Shift(mean_mm=mean, variation_mm=(spread * math.cos(angle), spread * math.sin(angle)))

    shifts: dict[str, Shift] = {}
    recarve = None
    if changed and draw.chance(config.cortex_probability):
        if draw.chance(config.recarve_probability):
            thickness = draw.uniform(*config.recarve_mm)
            carved = shift(config.cortex_outer_mm).model_copy(update={"mean_mm": thickness})
            recarve = None if config.atrophy > 0 else carved  # atrophy is a part of the template's cortex
        else:
            shifts["cortex_outer"] = shift(config.cortex_outer_mm)
            shifts["cortex_inner"] = shift(config.cortex_inner_mm)
        shifts["cerebellum_outer"] = shift(config.cerebellum_mm)
        shifts["cerebellum_inner"] = shift(config.cerebellum_mm)
    ratios: dict[int, float] = {}
    if changed and draw.chance(config.nuclei_probability):
        low, high = config.nuclei_ratio
        for label in table.labels:  # left and right of one size, but for a little
            if label.tissue in NUCLEI and label.id not in ratios:
                ratio = draw.log_uniform(low, high)
                for side in (label.id, label.partner):
                    if side is not None:
                        ratios[side] = min(max(ratio * math.exp(draw.normal(0.05)), low), high)
    ventricle = 1.0
    if changed and draw.chance(config.ventricle_probability):
        ventricle = draw.log_uniform(*config.ventricle_ratio)
    layers = None
    if changed and draw.chance(config.skull_probability):
        layers = (shift(config.subarachnoid_mm), shift(config.skull_mm), shift(config.scalp_mm))
        for name, largest in (
            ("diploe", config.diploe_mm),
            ("skin", config.skin_mm),
            ("dura", config.dura_mm),
            ("vessel", config.vessel_mm),
        ):
            shifts[name] = shift(largest)
    spacing = draw.uniform(*config.variation_spacing_mm)
    return AnatomyPlan(
        shifts=shifts,
        volume_ratio=ratios,
        recarve=recarve,
        ventricle_ratio=ventricle,
        layers=layers,
        atrophy=config.atrophy,
        variation=draw.field(2, (BOX_MM,) * 3, spacing, 1.0),
    )


def _variation_at(variation: Field3D, position_mm: torch.Tensor) -> torch.Tensor:
    """The two fields of variation at positions (3, D, H, W), mm from the template's centre -> (2, D, H, W)."""
    grid = (position_mm.movedim(0, -1) / (BOX_MM / 2)).flip(-1)[None]
    field = variation.tensor(position_mm.device)[None]
    return F.grid_sample(field, grid, mode="bilinear", padding_mode="border", align_corners=True)[0]


def prepare(template: Template) -> None:
    """Compute now what the first changed anatomy of a template would, seconds for a map of 1 mm, and keep it."""
    borders_of(template)
    cortex_of(template)
    morph_of(template)
    _nucleus_boxes(template)


def displacement(template: Template, plan: AnatomyPlan, position_mm: torch.Tensor, brain: bool = False) -> torch.Tensor:
    """What to add to positions (3, D, H, W), mm from the template's centre, for ventricles and layers.

    The brain moves within the skull: ``brain`` is its own displacement, the other that of everything else.
    """
    morph = morph_of(template)
    shift = torch.zeros((4, 1, 1, 1), device=position_mm.device)
    shift[0] = morph.ventricle_shift_mm(plan.ventricle_ratio)
    if plan.layers is not None:
        fields = _variation_at(plan.variation, position_mm)
        shift = shift.expand(4, *position_mm.shape[1:]).clone()
        for row, layer in enumerate(plan.layers, start=1):
            if row != GAP or brain:
                shift[row] = layer.over(fields)
    return morph.offset(position_mm, shift)


class MovedBrain:
    """A brain that has moved within its skull, laid over the rest of the head.

    The brain covers brain and CSF and nothing else; where it has left, there is CSF. ``reaches`` (L,) marks the labels
    of the head that it may change.
    """

    def __init__(self, table: LabelTable) -> None:
        is_brain, is_fluid = members(table, BRAIN_TISSUES), members(table, ("csf",))
        self.reaches = (is_brain | is_fluid) if is_fluid.any() else torch.zeros_like(is_brain)
        n = len(table)
        head = torch.arange(n)[:, None].expand(n, n)
        if is_fluid.any():
            left = torch.where(is_brain[:, None], int(is_fluid.nonzero()[0]), head)
            head = torch.where(self.reaches[:, None] & is_brain[None], torch.arange(n)[None], left)
        self._result = head.to(torch.uint8).contiguous()

    def over(self, head: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
        """Labels from those read without and with the brain's displacement, both of one shape."""
        both = head.int().mul_(len(self._result)).add_(brain)
        return torch.index_select(self._result.to(head.device).view(-1), 0, both.view(-1)).view(head.shape)


def moves(plan: AnatomyPlan) -> bool:
    """Whether the plan has a displacement."""
    return plan.layers is not None or plan.ventricle_ratio != 1.0


def moves_brain(plan: AnatomyPlan) -> bool:
    """Whether the brain moves within the skull."""
    return plan.layers is not None and (plan.layers[0].mean_mm != 0 or plan.layers[0].variation_mm != (0.0, 0.0))


def _pair_shifts(template: Template, plan: AnatomyPlan, borders: Borders) -> torch.Tensor:
    """How far label b advances into label a, mm: mean and two weights of variation, (3, n, n), antisymmetric."""
    table = template.table
    n = len(table)
    out = torch.zeros((3, n, n))
    for effect, shift in plan.shifts.items():
        growing, yielding = EFFECTS[effect]
        advance = members(table, yielding)[:, None] & members(table, growing)[None]
        for row, value in enumerate((shift.mean_mm, *shift.variation_mm)):
            out[row][advance] += value
            out[row][advance.T] -= value
    size = torch.zeros(n)
    for label_id, ratio in plan.volume_ratio.items():
        index = table.index_of.get(label_id)
        if index is None:
            continue
        volume = float(borders.volume[index])
        size[index] = (
            borders.shift_for((), (index,), (ratio - 1) * volume)
            if ratio > 1
            else -borders.shift_for((index,), (), (1 - ratio) * volume)
        )
    out[0] += size[None] - size[:, None]
    if plan.atrophy > 0:
        check_atrophy(template, plan.atrophy)
        grey, fluid = members(table, ("gm",)), members(table, ("csf",))
        voxels = plan.atrophy * float(borders.volume[grey].sum())
        retreat = borders.shift_for(_indices(grey), _indices(fluid), voxels)
        lost = grey[:, None] & fluid[None]
        out[0][lost] += retreat
        out[0][lost.T] -= retreat
    return torch.where(movable_pairs(table)[None], out, 0.0)


def check_atrophy(template: Template, part: float) -> None:
    """Raises ConfigError if the template's cortex cannot lose this part to CSF: too little of it lies near CSF."""
    borders = borders_of(template)
    grey, fluid = members(template.table, ("gm",)), members(template.table, ("csf",))
    volume = int(borders.volume[grey].sum())
    near = len(borders.margins(_indices(grey), _indices(fluid))) if grey.any() and fluid.any() else 0
    if near < round(part * volume) or near == 0:
        most = f"at most {math.floor(1000 * near / volume) / 1000:g}" if near else "none"
        raise ConfigError(
            f"anatomy.atrophy is {part:g}, but of the cortex of template {template.name} {most} can become CSF: what "
            f"lies within reach of it; {'lower anatomy.atrophy' if near else 'set anatomy.atrophy to 0'}, or "
            "leave this template out"
        )


def _indices(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[:, 0].tolist())


def change_labels(template: Template, plan: AnatomyPlan) -> torch.Tensor:
    """The template's labels with borders moved, uint8 (D, H, W); the template itself is left as it is."""
    labels = template.labels.clone()
    if not plan.shifts and not plan.volume_ratio and plan.recarve is None and plan.atrophy == 0:
        return labels
    borders = borders_of(template)
    n = len(template.table)
    pairs = _pair_shifts(template, plan, borders).view(3, n * n)
    fields = _variation_at(plan.variation, cell_positions(template)).view(2, -1)
    flat = labels.view(-1)
    which = borders.own.int() * n + borders.other.int()
    advance = torch.index_select(pairs[0], 0, which)
    if pairs[1:].any():
        for row in (0, 1):
            local = torch.index_select(fields[row], 0, borders.cell)
            advance.addcmul_(torch.index_select(pairs[row + 1], 0, which), local)
    chosen = (advance > borders.margin_mm).nonzero()[:, 0]
    flat[borders.position[chosen].long()] = borders.other[chosen]
    if plan.volume_ratio:
        _drop_islands(labels, template)
    cortex = cortex_of(template) if plan.recarve is not None else None
    if plan.recarve is not None and cortex is not None:
        fluid = int(members(template.table, ("csf",)).nonzero()[0])
        _carve_cortex(cortex, plan.recarve, fields, fluid, flat)
    return labels


def _drop_islands(labels: torch.Tensor, template: Template) -> None:
    """Give the pieces that a shrinking nucleus left behind to what surrounds them, in place.

    A piece stays if it is at least ``PIECE`` of the largest. Its voxels hang together by faces: what touches by an edge
    or a corner alone comes apart wherever it is read between the voxels.
    """
    around = torch.tensor([[x, y, z] for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1) if x or y or z])
    for index, box in _nucleus_boxes(template).items():
        part = labels[box]
        pieces, count = ndimage.label((part == index).numpy())
        if count < 2:
            continue
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        small = sizes < PIECE * sizes.max()
        small[0] = False
        todo = torch.from_numpy(np.argwhere(small[pieces]))
        limit = torch.tensor(part.shape) - 1
        while len(todo):  # from the outside in
            at = torch.minimum((todo[:, None] + around).clamp_min(0), limit)
            near = part[at[..., 0], at[..., 1], at[..., 2]]
            votes = F.one_hot(near.long(), len(template.table)).sum(1)
            votes[:, index] = 0
            found = votes.amax(1) > 0
            if not found.any():
                break
            part[tuple(todo[found].T)] = votes[found].argmax(1).to(part.dtype)
            todo = todo[~found]


def _nucleus_boxes(template: Template) -> dict[int, tuple[slice, slice, slice]]:
    """For each label of a deep nucleus, the box that holds it however it grows."""
    if "nuclei" not in template.cache:
        reach = [math.ceil(REACH_VOXELS) + 1] * 3
        is_nucleus = members(template.table, NUCLEI)
        named = torch.where(is_nucleus, torch.arange(len(is_nucleus)), 0)[template.labels.int()]
        template.cache["nuclei"] = {
            number: tuple(slice(max(s.start - r, 0), s.stop + r) for s, r in zip(box, reach, strict=True))
            for number, box in enumerate(ndimage.find_objects(named.numpy()), start=1)
            if box is not None
        }
    boxes: dict[int, tuple[slice, slice, slice]] = template.cache["nuclei"]
    return boxes


def _carve_cortex(cortex: Cortex, thickness: Shift, fields: torch.Tensor, fluid: int, flat: torch.Tensor) -> None:
    """Grey matter is what lies within the thickness from white matter and was grey, or nearly, before (SIAM, 2026)."""
    inside = cortex.depth_mm < thickness.over(fields)[cortex.cell]
    removed, added = cortex.was_grey & ~inside, ~cortex.was_grey & inside
    flat[cortex.position[removed].long()] = fluid
    flat[cortex.position[added].long()] = cortex.grey[added]
