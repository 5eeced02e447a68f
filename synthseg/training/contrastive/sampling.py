"""Which voxels are compared, and which pairs of them are positives, negatives or neither.

The same anatomical points are taken from every view. Rare structures and borders are sampled more often than they
occur, and pairs that may be the same thing (neighbours, the other side of the head) are left out of the negatives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from synthseg.config.pretraining import SUPERVISED, SamplingConfig
from synthseg.generator.plan import Plan
from synthseg.training.contrastive.losses import UNKNOWN

Kind = Literal["points", "labels"]
SPARE = 1.5  # candidates drawn for each point, as some leave the field of view of a displaced view
SAME_MM = 1e-3  # points that are nearer are one
INVERSIONS = 4  # fixed-point iterations that find where a displaced view shows a point


@dataclass(frozen=True)
class Voxels:
    """The voxels of M anatomical points in each of V views.

    Attributes
    ----------
    index : (V, M), flat index into the level's grid (d * h * w) of that view.
    position_mm : (V, M, 3), place of the voxel's centre in the anatomy: in the first view's frame, from its centre.
    label : (V, M), label index of the anatomy there; `UNKNOWN` where it may be one of several classes.
    point : (V, M), number of the anatomical point: the same in all views.
    side : (V, M), -1 and 1 on the two sides of the midplane; 0 without one.
    anatomy : (V, M), number of the head that it belongs to.
    config : the sampling that chose them; holds what `pair_masks` leaves out.
    """

    index: torch.Tensor
    position_mm: torch.Tensor
    label: torch.Tensor
    point: torch.Tensor
    side: torch.Tensor
    anatomy: torch.Tensor
    config: SamplingConfig

    def __len__(self) -> int:
        """Embeddings in all: views times points."""
        return self.index.numel()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, to move or to gather them; ``Voxels(**tensors, config=...)`` is the inverse."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "config"}

    def gather(self, features: torch.Tensor) -> torch.Tensor:
        """Features (V, C, d, h, w) of the level at the voxels, (V * M, C), the first view's first."""
        picked = features.flatten(2).gather(2, self.index[:, None].expand(-1, features.shape[1], -1))
        return picked.transpose(1, 2).flatten(0, 1)


def sample_voxels(
    labels: torch.Tensor,
    grid: Sequence[int],
    config: SamplingConfig,
    generator: torch.Generator,
    displacement_mm: torch.Tensor | None = None,
    *,
    voxel_size_mm: float,
    midplane: tuple[torch.Tensor, float] | None = None,
) -> Voxels:
    """Choose ``config.voxels`` anatomical points inside the head, and find their voxels in each view.

    Parameters
    ----------
    labels : (V, D, H, W), label indices of the views; 0 is background.
    grid : (d, h, w) of the level, each a divisor of the image's side.
    generator : on the CPU, whatever the device of the labels: the same points on every device.
    displacement_mm : (V, 3, D, H, W): the anatomy at p of view v is that at ``p + displacement_mm[v](p)`` of the first.
    voxel_size_mm : of the image.
    midplane : unit normal and offset (`midplane`), for the sides.

    A point counts if no view has it outside of the head (stripped, cropped). If there are fewer points than asked for,
    they repeat; if there is none, M is 0. Raises ValueError if the grid is not one of the image's levels.
    """
    views, shape = len(labels), labels.shape[1:]
    if any(m < 1 or n % m for n, m in zip(shape, grid, strict=True)):
        raise ValueError(f"the sides {tuple(grid)} of the level must divide those of the image, {tuple(shape)}")
    device = labels.device
    factors = [n // m for n, m in zip(shape, grid, strict=True)]
    middles = labels[(slice(None), *(slice(f // 2, None, f) for f in factors))]  # one label for each voxel of the level
    moved = displacement_mm is not None and bool((displacement_mm != 0).any())
    inside = middles[0] != 0 if moved else (middles != 0).all(0)
    wanted = math.ceil(config.voxels * SPARE) if moved else config.voxels
    chosen = _choose(middles[0].cpu(), inside.cpu(), wanted, config, generator).to(device)
    step = torch.tensor(factors, device=device) * voxel_size_mm
    center = (torch.tensor(list(grid), device=device) - 1) / 2
    position = (_unravel(chosen, grid) - center) * step  # (n, 3)
    index, position = chosen.expand(views, -1), position.expand(views, -1, -1)
    if displacement_mm is not None and moved:
        index, position, kept = _seen(position, displacement_mm, grid, step, voxel_size_mm)
        kept = (kept & (middles.flatten(1).gather(1, index) != 0)).all(0)
        places = kept.nonzero()[: config.voxels, 0]
        chosen, index, position = chosen[places], index[:, places], position[:, places]
    found = len(chosen)
    again = torch.arange(config.voxels if found else 0, device=device) % max(found, 1)
    index, position = index[:, again].contiguous(), position[:, again].contiguous()
    label = _majority(labels[0], chosen, factors)[again].expand(views, -1)
    side = torch.zeros_like(index)
    if midplane is not None:
        normal, offset = midplane
        side = torch.where(position @ normal.to(position) + offset < 0, -1, 1)
    point = torch.arange(len(again), device=device).expand(views, -1)
    return Voxels(index, position, label, point, side, torch.zeros_like(index), config)


def midplane(plan: Plan) -> tuple[torch.Tensor, float]:
    """Unit normal (3,) and offset in mm of the plane between the sides of a head, in the frame of ``position_mm``.

    A position is ``normal @ p + offset`` mm from it. It is the template's, moved by the affine part of the deformation.
    """
    row = torch.tensor(plan.deform.matrix[0])
    length = float(row.norm())
    return row / length, plan.deform.shift_mm[0] / length


def known_classes(groups: torch.Tensor) -> torch.Tensor:
    """Class that each group of classes is, uint8 (G,), from groups bool (G, C); `UNKNOWN` where it may be several.

    Labels of supervised contrast are then the same thing in every template: ``known_classes(groups)[labels.int()]``.
    Group 0, background and what a view does not show, is class 0 even where it may be several: none of it is compared.
    """
    known = torch.where(groups.sum(1) == 1, groups.to(torch.uint8).argmax(1), UNKNOWN).to(torch.uint8)
    known[0] = 0
    return known


def kind_of(loss: str) -> Kind:
    """What its positives are: voxels of the same label, or views of the same point."""
    return "labels" if loss in SUPERVISED else "points"


def join(parts: Sequence[Voxels]) -> Voxels:
    """Voxels of several heads (or from several devices) as one set, heads and points numbered anew.

    Each part's ``index`` is still that into its own features: gather those first, and put the embeddings in the order
    of the parts by ``torch.cat`` of (V, M, E) along M. Raises ValueError if the numbers of views differ.
    """
    if len({len(part.index) for part in parts}) != 1:
        raise ValueError(f"voxels with the same number of views can be joined, got {[len(p.index) for p in parts]}")
    moved, points, heads = [], 0, 0
    for part in parts:
        moved.append({**part.tensors(), "point": part.point + points, "anatomy": part.anatomy + heads})
        points += part.point.shape[1]
        heads += int(part.anatomy.max()) + 1 if len(part) else 0
    return Voxels(**{name: torch.cat([p[name] for p in moved], 1) for name in moved[0]}, config=parts[0].config)


def pair_masks(
    voxels: Voxels, kind: Kind, partners: Sequence[int] | np.ndarray | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positives and weights of the negatives, both bool (V * M, V * M), in the order of ``Voxels.gather``.

    points : the other views of a point are positives, other points are negatives, except those that may be the same
        thing: nearer than ``config.exclusion_mm``; of the same structure on the other side of the head
        (``config.exclude_mirrored``); of the same structure in another head.
        ``partners`` (C,): for each label that of the same structure on the other side, itself where there is none
        (`LabelTable.flip`). Labels with sides are then one structure as well.
    labels : voxels of the same label are positives, those of other labels negatives, however near. Those of an
        `UNKNOWN` label are neither.
    """
    config = voxels.config
    flat = {name: tensor.flatten(0, 1) for name, tensor in voxels.tensors().items()}
    label, point = flat["label"], flat["point"]
    alike = label[:, None] == label
    if kind == "labels":
        known = label != UNKNOWN
        both = known[:, None] & known
        positives = alike & both
        return positives.fill_diagonal_(False), ~alike & both
    same_point = point[:, None] == point
    same_head = flat["anatomy"][:, None] == flat["anatomy"]
    apart = _distances(flat["position_mm"]) >= max(config.exclusion_mm, SAME_MM)
    alike |= (label == UNKNOWN)[:, None] | (label == UNKNOWN)
    if config.exclude_mirrored:
        mirrored = alike & (flat["side"][:, None] * flat["side"] < 0)
        if partners is not None:
            other_side = torch.arange(UNKNOWN + 1, device=label.device)
            other_side[: len(partners)] = torch.as_tensor(partners, device=label.device)
            paired = (other_side[label.long()][:, None] == label) & ~alike
            mirrored, alike = mirrored | paired, alike | paired
        other = torch.where(same_head, apart & ~mirrored, ~alike)
    else:
        other = torch.where(same_head, apart, ~alike)
    return same_point.clone().fill_diagonal_(False), other & ~same_point


def _distances(position_mm: torch.Tensor) -> torch.Tensor:
    return torch.cdist(position_mm, position_mm, compute_mode="donot_use_mm_for_euclid_dist")


def _choose(
    labels: torch.Tensor, inside: torch.Tensor, wanted: int, config: SamplingConfig, generator: torch.Generator
) -> torch.Tensor:
    """Flat indices of at most ``wanted`` voxels of a level, in random order; those at borders first drawn."""
    flat = labels.flatten()
    left = inside.flatten().clone()
    border = (_borders(labels) & inside).flatten()
    first = _draw(flat, border, round(wanted * config.boundary_fraction), config.balance, generator)
    left[first] = False
    chosen = torch.cat([first, _draw(flat, left, wanted - len(first), config.balance, generator)])
    return chosen[torch.randperm(len(chosen), generator=generator)]


def _draw(
    labels: torch.Tensor, among: torch.Tensor, wanted: int, balance: float, generator: torch.Generator
) -> torch.Tensor:
    """At most ``wanted`` of these voxels, without replacement; the odds of a voxel are (size of its label)^-balance."""
    places = among.nonzero()[:, 0]
    own = labels[places].long()
    rate = torch.bincount(own, minlength=1).clamp_min(1).double() ** -balance
    # the first arrivals of a race whose times are exponential are such a sample
    times = -torch.rand(len(places), generator=generator, dtype=torch.float64).clamp_min(1e-300).log() / rate[own]
    return places[times.topk(min(wanted, len(places)), largest=False).indices]


def _borders(labels: torch.Tensor) -> torch.Tensor:
    """Voxels with another label beside them, bool, same shape (d, h, w)."""
    out = torch.zeros_like(labels, dtype=torch.bool)
    for axis in range(labels.dim()):
        n = labels.shape[axis]
        if n > 1:
            differs = labels.narrow(axis, 1, n - 1) != labels.narrow(axis, 0, n - 1)
            out.narrow(axis, 1, n - 1).logical_or_(differs)
            out.narrow(axis, 0, n - 1).logical_or_(differs)
    return out


def _majority(labels: torch.Tensor, chosen: torch.Tensor, factors: Sequence[int]) -> torch.Tensor:
    """Most frequent label of the head in the block of each voxel of the level, (n,), from labels (D, H, W)."""
    grid = [n // f for n, f in zip(labels.shape, factors, strict=True)]
    corner = _unravel(chosen, grid) * torch.tensor(factors, device=labels.device)
    offsets = torch.cartesian_prod(*(torch.arange(f, device=labels.device) for f in factors)).view(-1, 3)
    at = corner[:, None] + offsets
    block = labels[at[..., 0], at[..., 1], at[..., 2]].long()  # (n, f^3)
    counts = (block[:, :, None] == block[:, None]).sum(2) * (block != 0)
    return block.gather(1, counts.argmax(1, keepdim=True))[:, 0]


def _unravel(index: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Flat indices (n,) of a grid as coordinates (n, 3)."""
    return torch.stack(torch.unravel_index(index, tuple(grid)), 1)


def _at(field: torch.Tensor, position_mm: torch.Tensor, voxel_size_mm: float) -> torch.Tensor:
    """A field (V, 3, D, H, W) at positions (V, n, 3) in mm from the centre of the image, (V, n, 3)."""
    half = torch.tensor([max(n - 1, 1) / 2 * voxel_size_mm for n in field.shape[2:]], device=field.device)
    at = (position_mm / half).flip(-1)[:, :, None, None]
    return F.grid_sample(field, at, padding_mode="border", align_corners=True)[..., 0, 0].transpose(1, 2)


def _seen(
    anatomy_mm: torch.Tensor,
    displacement_mm: torch.Tensor,
    grid: Sequence[int],
    step: torch.Tensor,
    voxel_size_mm: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Voxels of the level in which each view shows these places (V, n, 3): index, place of their centres, inside.

    The place p of a view that shows a is where ``p + displacement(p) = a``.
    """
    field = displacement_mm.float()
    place = anatomy_mm
    for _ in range(INVERSIONS):
        place = anatomy_mm - _at(field, place, voxel_size_mm)
    sides = torch.tensor(list(grid), device=place.device)
    center = (sides - 1) / 2
    voxel = (place / step + center).round().long()
    inside = ((voxel >= 0) & (voxel < sides)).all(-1)
    voxel = voxel.clamp(min=torch.zeros_like(sides), max=sides - 1)
    middle = (voxel - center) * step
    index = (voxel[..., 0] * grid[1] + voxel[..., 1]) * grid[2] + voxel[..., 2]
    return index, middle + _at(field, middle, voxel_size_mm), inside
