"""Displacement that enlarges ventricles and thickens the layers of the head, computed once per template.

A border that moves far must push its surroundings, not eat them: the caudate beside a ventricle of three times the
volume is still there. So the position that is read is shifted along the gradient of a distance map, on a lattice of
``LATTICE_MM``, before the labels are read; it composes with the other deformations into one field.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from synthseg.labels import BRAIN_TISSUES, INTRACRANIAL_TISSUES, tissue_mask
from synthseg.templates import Template

LATTICE_MM = 3.0
WORK_MM = 2.0
WALL_MM, PUSH_MM = 6.0, 12.0  # what lies so near a ventricle moves with its wall; beyond, the push fades over this
SKULL_HOLDS_MM = 8.0  # within this of the skull they give way less, at the skull not at all
WIDTH_MM = 10.0  # the width of a ventricle is that of its widest place within half of this
NARROWEST = 0.15  # a slit's wall moves by this part of the widest place's
PUSH_SMOOTH_MM = 2.0
THINNEST_MM, SKULL_MM, SCALP_MM = 2.5, 6.0, 10.0  # a shift of a layer fades in over its thickness, within these
LATE_MM = 2.0
BRAIN_MM = 30.0  # depth over which the shift of the gap around the brain fades out
REACH_MM = torch.linspace(-8.0, 20.0, 29)  # shifts of the ventricle's wall for which the volume is tabled


@dataclass
class Morph:
    """Directions of displacement in mm per mm of shift, on a lattice over the template.

    Attributes
    ----------
    directions : (1, 12, D, H, W) float32: ventricle, subarachnoid gap, skull, scalp, three components each; a
        positive shift enlarges the ventricle, the gap, the skull, the scalp. The gap's is for the brain alone.
    center_mm : the lattice's middle, against the template's centre.
    half_mm : half its extent.
    ventricle_volume : volume of the ventricles for each of ``REACH_MM``, against the template's; None if it has none.
    """

    directions: torch.Tensor
    center_mm: torch.Tensor
    half_mm: torch.Tensor
    ventricle_volume: torch.Tensor | None

    def ventricle_shift_mm(self, ratio: float) -> float:
        """Shift of the wall that makes the ventricles ``ratio`` times as large."""
        if self.ventricle_volume is None or ratio == 1.0:
            return 0.0
        return float(np.interp(ratio, self.ventricle_volume.numpy(), REACH_MM.numpy()))

    def offset(self, position_mm: torch.Tensor, shift_mm: torch.Tensor) -> torch.Tensor:
        """What to add to positions (3, D, H, W), mm from the template's centre, to read the changed anatomy.

        ``shift_mm`` is (4, D, H, W) or (4, 1, 1, 1): ventricle, gap, skull, scalp.
        """
        device = position_mm.device
        unit = (position_mm.movedim(0, -1) - self.center_mm.to(device)) / self.half_mm.to(device)
        read = F.grid_sample(
            self.directions.to(device), unit.flip(-1)[None], mode="bilinear", padding_mode="border", align_corners=True
        )[0]
        return (read.view(4, 3, *position_mm.shape[1:]) * shift_mm[:, None]).sum(0)


def morph_of(template: Template) -> Morph:
    """The displacement directions of a template, computed at the first call."""
    if "morph" not in template.cache:
        template.cache["morph"] = find_morph(template)
    found: Morph = template.cache["morph"]
    return found


def _signed_distance(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Millimetres to the border of a mask, negative inside."""
    half = min(spacing) / 2  # the border lies between two voxels
    outside = ndimage.distance_transform_edt(~mask, sampling=spacing) - half
    inside = ndimage.distance_transform_edt(mask, sampling=spacing) - half
    return np.where(mask, -inside, outside).astype(np.float32)


def _direction(distance: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Smooth unit vectors away from a surface, (3, D, H, W)."""
    smooth = ndimage.gaussian_filter(distance, [2.0 / s for s in spacing])
    return np.stack(np.gradient(smooth, *spacing)).astype(np.float32)


def _within(inner: np.ndarray, outer: np.ndarray, thick_mm: float) -> np.ndarray:
    """0 at the inner side of a layer, 1 from its outer side on, from signed distances to both.

    It spans the layer's own thickness and begins late, since it will be smoothed and what lies further in must stay.
    """
    thickness = np.clip(inner - outer, THINNEST_MM, thick_mm)
    part: np.ndarray = np.clip((inner - LATE_MM) / (thickness - LATE_MM), 0, 1)
    return part


def _width(distance: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """How wide the ventricle is at the nearest place of its wall, smooth, 1 where it is widest.

    A wide ventricle becomes wider by more than a slit does: its walls would meet the hippocampus from two sides.
    """
    window = [max(1, round(WIDTH_MM / s)) | 1 for s in spacing]
    widest = ndimage.maximum_filter(-distance, size=window)
    nearest = ndimage.distance_transform_edt(distance >= 0, return_distances=False, return_indices=True)
    width = ndimage.gaussian_filter(widest[tuple(nearest)], [3.0 / s for s in spacing])
    part: np.ndarray = np.clip(width / np.percentile(widest[distance < 0], 95), NARROWEST, 1.0).astype(np.float32)
    return part


def find_morph(template: Template) -> Morph:
    """Distance maps on a grid of about ``WORK_MM``, and the directions that follow from them."""
    steps = [max(1, round(WORK_MM / s)) for s in template.spacing_mm]
    coarse = template.labels.numpy()[tuple(slice(None, None, step) for step in steps)]
    spacing = tuple(step * s for step, s in zip(steps, template.spacing_mm, strict=True))
    pad = 6
    coarse = np.pad(coarse, pad)

    def mask(*names: str) -> np.ndarray:
        return tissue_mask(template.table, names)[coarse]

    ventricle = mask("ventricle")
    zero = np.zeros((3, *coarse.shape), np.float32)
    push = zero
    if ventricle.any():
        d = _signed_distance(ventricle, spacing)
        fading = np.exp(-((np.clip(d - WALL_MM, 0, None) / PUSH_MM) ** 2))
        push = -fading * _width(d, spacing) * _direction(d, spacing)
    gap = skull = scalp = zero
    bone = mask("bone_cortical", "bone_cancellous")
    inside = ndimage.binary_fill_holes(mask(*INTRACRANIAL_TISSUES, "dura", "vessel", "artery", "vein"))
    opened = ndimage.binary_opening(inside, iterations=2)  # without the vessels of the face and neck
    inside = ndimage.binary_dilation(opened, iterations=3, mask=inside)  # but with all of the dura
    if bone.any() and inside.any():
        d_in = _signed_distance(inside, spacing)
        push = push * np.clip(-d_in / SKULL_HOLDS_MM, 0, 1)
        outward = _direction(d_in, spacing)
        hull = ndimage.binary_closing(np.pad(mask(*BRAIN_TISSUES), 8), iterations=5)[8:-8, 8:-8, 8:-8]
        gap = np.exp(-np.abs(_signed_distance(hull, spacing)) / BRAIN_MM) * outward
        d_bone = _signed_distance(inside | bone, spacing)
        d_skin = _signed_distance(ndimage.binary_fill_holes(coarse > 0), spacing)
        skull = -_within(d_in, d_bone, SKULL_MM) * outward
        scalp = -_within(d_bone, d_skin, SCALP_MM) * outward
    push = ndimage.gaussian_filter(push, [0, *(PUSH_SMOOTH_MM / s for s in spacing)])
    layers = ndimage.gaussian_filter(np.concatenate([gap, skull, scalp]), [0, *(1.0 / s for s in spacing)])
    fields = np.concatenate([push, layers]).astype(np.float32)

    extent = [(n - 1) * s for n, s in zip(coarse.shape, spacing, strict=True)]
    lattice = [int(np.ceil(e / LATTICE_MM)) + 1 for e in extent]
    directions = F.interpolate(torch.from_numpy(fields)[None], size=lattice, mode="trilinear", align_corners=True)
    start = [-pad * s - c * mm for s, c, mm in zip(spacing, template.center, template.spacing_mm, strict=True)]
    half = torch.tensor(extent, dtype=torch.float32) / 2
    found = Morph(directions, torch.tensor(start, dtype=torch.float32) + half, half, None)
    if ventricle.any():
        found.ventricle_volume = _ventricle_volumes(template, found)
    return found


def _ventricle_volumes(template: Template, morph: Morph) -> torch.Tensor | None:
    """Volume for each shift of the wall, measured by reading the template, and made to rise with the shift.

    None if the ventricles are so small that no point reads them.
    """
    mask = torch.from_numpy(tissue_mask(template.table, ("ventricle",)))[template.labels.int()]
    spacing = torch.tensor(template.spacing_mm)
    margin = torch.ceil(12.0 / spacing).int()
    where = mask.nonzero()
    low = (where.amin(0) - margin).clamp_min(0)
    high = torch.minimum(where.amax(0) + margin + 1, torch.tensor(mask.shape))
    step = torch.clamp((1.0 / spacing).round().int(), min=1)
    axes = [torch.arange(int(a), int(b), int(s), dtype=torch.float32) for a, b, s in zip(low, high, step, strict=True)]
    voxel = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    position = (voxel - torch.tensor(template.center).view(3, 1, 1, 1)) * spacing.view(3, 1, 1, 1)
    once = morph.offset(position, torch.tensor([1.0, 0, 0, 0]).view(4, 1, 1, 1)) / spacing.view(3, 1, 1, 1)
    limit = torch.tensor(mask.shape).view(3, 1, 1, 1) - 1
    counts = []
    for shift in REACH_MM.tolist():
        at = torch.minimum((voxel + shift * once).round().clamp_min(0), limit).long()
        counts.append(float(mask[at[0], at[1], at[2]].sum()))
    unchanged = float(np.interp(0.0, REACH_MM.numpy(), np.array(counts)))
    if unchanged == 0:
        return None
    volumes = torch.tensor(counts) / unchanged
    return torch.cummax(volumes, 0).values + 1e-6 * torch.arange(len(counts))
