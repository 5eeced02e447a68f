"""What a CT scanner adds to the head: beam hardening and a headrest. In Hounsfield units, (D, H, W), axes RAS+."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from synthseg.generator.deform import resize
from synthseg.generator.draw import Record
from synthseg.volume import apply_separable, centred_matrix

MU_WATER_PER_MM = 0.0195  # at the effective energy of 120 kV, about 70 keV (Hubbell and Seltzer, NIST 2004)
BONE_HU = 250.0
COARSE_MM = 4.0
MOST_CELLS = 48  # of a coarse axial slice, per side
ANGLES = 48
AIR_HU = -900.0  # darker is air alone, without partial volume of skin
HEAD_HU = -500.0


class BeamHardening(Record):
    """Loss of line integral per squared path through bone and, by ``soft_share``, soft tissue."""

    strength: float
    soft_share: float


class Headrest(Record):
    """A curved shell behind the head, the same in every axial plane."""

    gap_mm: float
    radius_mm: float
    thickness_mm: float
    half_width_mm: float
    shift_mm: float
    hu: float


@lru_cache(maxsize=4)
def projector(shape: tuple[int, int], spacing_mm: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Parallel projection of a slice, (angles * bins, cells), and filtered back-projection, (cells, angles * bins).

    Each cell goes to the two nearest detector bins by linear weights; the way back is the ramp filter of Ramachandran
    and Lakshminarayanan (PNAS 68:2236, 1971) and the transpose.
    """
    bin_mm = max(spacing_mm)
    axes = [(torch.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing_mm, strict=True)]
    x, y = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
    bins = 2 * math.ceil(math.hypot(float(x.max()), float(y.max())) / bin_mm) + 4
    angle = torch.arange(ANGLES) * (math.pi / ANGLES)
    at = (x[None] * angle.cos()[:, None] + y[None] * angle.sin()[:, None]) / bin_mm + (bins - 1) / 2
    low = at.floor()
    weights = torch.zeros((ANGLES, bins, x.numel()))
    weights.scatter_add_(1, low.long()[:, None], (1 - (at - low))[:, None])
    weights.scatter_add_(1, low.long()[:, None] + 1, (at - low)[:, None])
    offset = torch.arange(bins)[:, None] - torch.arange(bins)[None]
    ramp = torch.where(offset % 2 == 1, -1 / (math.pi * offset.clamp_min(1).maximum(-offset) * bin_mm) ** 2, 0.0)
    ramp = torch.where(offset == 0, 1 / (4 * bin_mm**2), ramp) * bin_mm
    back = torch.einsum("abc,be->cae", weights, ramp) * (math.pi / ANGLES)
    forward = weights * (spacing_mm[0] * spacing_mm[1] / bin_mm)
    return forward.reshape(ANGLES * bins, -1), back.reshape(x.numel(), -1)


def beam_hardening(hu: torch.Tensor, plan: BeamHardening, extent_mm: Sequence[float]) -> torch.Tensor:
    """The error of a reconstruction that corrects for water alone, to be added to the image.

    A polychromatic beam loses its soft part in bone, so a ray through bone of attenuation b reads too low by about
    s * b^2 (Joseph and Spital, J Comput Assist Tomogr 2:100, 1978). Reconstructed, that is dark bands between dense
    bones (the petrous pyramids, the teeth) and cupping. Computed on a coarse grid of axial slices: the error is smooth.
    """
    cells = [max(2, min(MOST_CELLS, n, math.ceil(e / COARSE_MM))) for n, e in zip(hu.shape, extent_mm, strict=True)]
    shrink = [centred_matrix(n, c, e / n, e / c).to(hu) for n, c, e in zip(hu.shape, cells, extent_mm, strict=True)]
    dense = (hu - BONE_HU).clamp_min_(0).add_(hu.clamp(-1000, 100).add_(1000), alpha=plan.soft_share)
    coarse = apply_separable(dense[None], shrink)[0] * (MU_WATER_PER_MM / 1000)
    d, h, w = cells
    forward, back = (m.to(hu) for m in projector((d, h), (extent_mm[0] / d, extent_mm[1] / h)))
    path = forward @ coarse.reshape(d * h, w)
    error = back @ (-plan.strength * path**2)
    return resize((error * (1000 / MU_WATER_PER_MM)).reshape(1, 1, d, h, w), hu.shape)[0, 0]


def add_headrest(hu: torch.Tensor, plan: Headrest, extent_mm: Sequence[float]) -> torch.Tensor:
    """Put the shell into the air behind the head; the head, and air inside and in front of it, stay as they are.

    An arc about an axis that runs from foot to head, open to the front; its lowest point is ``gap_mm`` behind the
    rearmost voxel of the head.
    """
    head = hu > HEAD_HU
    rows = torch.nonzero(head.any(dim=2).any(dim=0)).flatten()
    if len(rows) == 0:
        return hu
    columns = torch.nonzero(head.any(dim=2).any(dim=1)).flatten()
    step = [e / n for e, n in zip(extent_mm, hu.shape, strict=True)]
    x = (torch.arange(hu.shape[0], device=hu.device) - columns.float().mean()) * step[0] - plan.shift_mm
    y = torch.arange(hu.shape[1], device=hu.device) * step[1]
    lowest = float(rows[0]) * step[1] - plan.gap_mm - plan.thickness_mm / 2
    distance = torch.hypot(x[:, None], y[None] - (lowest + plan.radius_mm)) - plan.radius_mm
    blur = (step[0] + step[1]) / 2
    cover = ((plan.thickness_mm / 2 - distance.abs()) / blur + 0.5).clamp(0, 1)
    cover = cover * (x.abs() <= plan.half_width_mm)[:, None] * (y < lowest + plan.radius_mm)[None]
    near = int(torch.nonzero(cover.any(dim=0)).flatten()[-1]) + 1 if bool(cover.any()) else 0
    behind = head[:, :near].int().cumsum(dim=1, dtype=torch.int32) == 0  # no head from here to the rear edge
    out = hu.clone()
    part = out[:, :near]
    shell = part + cover[:, :near, None] * (plan.hu - part)
    out[:, :near] = torch.where(behind & (part < AIR_HU), shell, part)
    return out
