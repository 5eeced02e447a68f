"""Where one label meets another, computed once per template: which voxels change hands when a border moves.

A voxel near a border knows the label on the other side and its distance to the border, as the depth of a plane that
cuts a Gaussian ball in the same proportion: a continuous measure, so that a border moves by fractions of a voxel.
SIAM (2026) changes anatomy by binary morphology on labels of 0.25 mm; this is the same at the cost of a lookup.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from synthseg.labels import LabelTable, tissue_mask
from synthseg.templates import Template

NUCLEI = ("thalamus", "pallidum", "putamen", "caudate", "accumbens", "amygdala", "hippocampus")
VESSELS = ("vessel", "artery", "vein")
# effect -> (tissues that grow, tissues that yield)
EFFECTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cortex_outer": (("gm",), ("csf",)),
    "cortex_inner": (("gm",), ("wm", "lesion")),
    "cerebellum_outer": (("cerebellar_gm",), ("csf",)),
    "cerebellum_inner": (("cerebellar_gm",), ("wm",)),
    "diploe": (("bone_cancellous",), ("bone_cortical",)),
    "skin": (("skin",), ("soft", "fat", "muscle")),
    "dura": (("dura",), ("csf",)),
    "vessel": (VESSELS, ("csf", "gm", "wm", "cerebellar_gm", "brainstem", "soft", "fat", "muscle", "dura")),
}
NUCLEI_YIELD = ("wm", "brainstem", "lesion", "gm", "csf", "ventricle", *NUCLEI)
REACH_VOXELS, REACH_FINE_VOXELS = 2.5, 1.8  # of voxels down to 0.75 mm, and of finer ones
CELL_MM = 4.0


def members(table: LabelTable, tissues: Collection[str]) -> torch.Tensor:
    """Which labels of the table are of these tissues, bool (n_labels,); the background is of none."""
    found = torch.from_numpy(tissue_mask(table, tissues))
    found[0] = False
    return found


def movable_pairs(table: LabelTable) -> torch.Tensor:
    """Bool (n, n): whether a voxel of the first label may become the second."""
    tissue = [label.tissue for label in table.labels]
    pairs = torch.zeros((len(tissue), len(tissue)), dtype=torch.bool)
    for growing, yielding in [*EFFECTS.values(), (NUCLEI, NUCLEI_YIELD)]:
        a, b = members(table, growing), members(table, yielding)
        pairs |= a[:, None] & b[None] | b[:, None] & a[None]
    same = torch.tensor([[t == u for u in tissue] for t in tissue])
    return pairs & ~same


@dataclass
class Borders:
    """The voxels of a template that may change hands, N of them in the order of memory.

    Attributes
    ----------
    position : int32 (N,), index into the flattened labels.
    own, other : uint8 (N,), the voxel's label and the label across the nearest border.
    margin_mm : float32 (N,), distance to that border.
    cell : int32 (N,), index into the flattened lattice of ``cells`` points ``CELL_MM`` apart.
    volume : int64 (n_labels,), voxels of each label.
    """

    position: torch.Tensor
    own: torch.Tensor
    other: torch.Tensor
    margin_mm: torch.Tensor
    cell: torch.Tensor
    cells: tuple[int, int, int]
    volume: torch.Tensor
    _sorted: dict[tuple[tuple[int, ...], tuple[int, ...]], torch.Tensor] = field(default_factory=dict)

    def margins(self, own: tuple[int, ...], other: tuple[int, ...]) -> torch.Tensor:
        """Sorted margins of the voxels of labels ``own`` across the border of labels ``other``; () is any label."""
        key = (own, other)
        if key not in self._sorted:
            chosen = torch.ones(len(self.own), dtype=torch.bool)
            for labels, values in ((own, self.own), (other, self.other)):
                if labels:
                    chosen &= torch.isin(values, torch.tensor(labels, dtype=torch.uint8))
            self._sorted[key] = self.margin_mm[chosen].sort().values
        return self._sorted[key]

    def shift_for(self, own: tuple[int, ...], other: tuple[int, ...], voxels: float) -> float:
        """How far the border of ``other`` must move for this many voxels of ``own`` to become ``other``, in mm."""
        margins = self.margins(own, other)
        count = min(round(voxels), len(margins))
        if count < 1:
            return 0.0
        return float(margins[count - 1]) + 1e-6


def borders_of(template: Template) -> Borders:
    """The borders of a template, computed at the first call."""
    if "borders" not in template.cache:
        template.cache["borders"] = find_borders(template.labels, template.table, template.spacing_mm)
    found: Borders = template.cache["borders"]
    return found


def find_borders(labels: torch.Tensor, table: LabelTable, spacing_mm: tuple[float, float, float]) -> Borders:
    """Search the labels (D, H, W) within ``REACH_VOXELS`` of every voxel."""
    h = min(spacing_mm)
    size = labels.shape
    radius = REACH_VOXELS if h > 0.75 else REACH_FINE_VOXELS
    reach = max(int(radius), 2)
    padded = F.pad(labels, (reach,) * 6).contiguous()
    flat = padded.view(-1)
    strides = torch.tensor(padded.stride())
    may = movable_pairs(table)
    n = len(table)

    around = torch.tensor([(x, y, z) for x in range(-reach, reach + 1) for y in range(-reach, reach + 1)
                           for z in range(-reach, reach + 1) if 0 < x * x + y * y + z * z <= radius**2])  # fmt: skip
    distance = (around.double() * torch.tensor(spacing_mm, dtype=torch.float64)).norm(dim=1)
    order = distance.argsort(stable=True)
    around, distance = around[order], distance[order]
    steps = (around * strides).sum(1).tolist()

    index = _near_a_border(padded, may.any(1), reach)
    own = flat[index]
    # the nearest label that the voxel may become; voxels that have found theirs leave the search
    other = torch.full_like(own, n)
    todo = torch.arange(len(index))
    table_of_pairs = torch.cat([may, torch.zeros((n, 1), dtype=torch.bool)], 1).view(-1)
    for step in steps:
        near = flat[index[todo] + step]
        hit = table_of_pairs[own[todo].int() * (n + 1) + near.int()]
        other[todo[hit]] = near[hit]
        todo = todo[~hit]
    kept = other < n
    index, own, other = index[kept], own[kept], other[kept]

    weight_own = torch.ones(len(index))
    weight_other = torch.zeros(len(index))
    for step, d in zip(steps, (distance / h).tolist(), strict=True):
        near = flat[index + step]
        w = float(np.exp(-0.5 * d * d))
        weight_own.add_(near == own, alpha=w)
        weight_other.add_(near == other, alpha=w)
    share = (weight_other / (weight_own + weight_other)).double()
    jitter = torch.rand(len(index), generator=torch.Generator().manual_seed(0))  # equal neighbourhoods move one by one
    margin = (-torch.special.ndtri(share).clamp(-3.0, 3.0).float()).clamp_min(0.0) * h + 0.03 * h * jitter
    free = ~_ridge(padded, index, own, margin / h)
    index, own, other, margin = index[free], own[free], other[free], margin[free]

    place = torch.stack(torch.unravel_index(index, padded.shape), 0) - reach
    position = ((place[0] * size[1] + place[1]) * size[2] + place[2]).int()
    cells = tuple(int(np.ceil(s * mm / CELL_MM)) + 1 for s, mm in zip(size, spacing_mm, strict=True))
    cell = _cell_of(place, spacing_mm, cells)  # type: ignore[arg-type]
    volume = torch.bincount(labels.view(-1), minlength=n)
    return Borders(position, own, other, margin, cell, cells, volume)  # type: ignore[arg-type]


def _near_a_border(padded: torch.Tensor, movable: torch.Tensor, reach: int) -> torch.Tensor:
    """Indices of the voxels of movable labels with another label within ``reach`` voxels along the axes' box."""
    mine = movable[padded.int()]
    edge = torch.zeros(padded.shape, dtype=torch.bool)
    for axis in range(3):
        n = padded.shape[axis]
        differs = padded.narrow(axis, 1, n - 1) != padded.narrow(axis, 0, n - 1)
        edge.narrow(axis, 1, n - 1).logical_or_(differs)
        edge.narrow(axis, 0, n - 1).logical_or_(differs)
    near = edge
    for axis in range(3):
        wider = near.clone()
        n = padded.shape[axis]
        for d in range(1, reach):
            wider.narrow(axis, d, n - d).logical_or_(near.narrow(axis, 0, n - d))
            wider.narrow(axis, 0, n - d).logical_or_(near.narrow(axis, d, n - d))
        near = wider
    near &= mine
    for axis in range(3):  # the padding belongs to nobody
        near.narrow(axis, 0, reach).fill_(False)
        near.narrow(axis, padded.shape[axis] - reach, reach).fill_(False)
    return near.view(-1).nonzero()[:, 0]


def _ridge(padded: torch.Tensor, index: torch.Tensor, own: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """The middle of thin sheets and tubes, which must not change hands: a sulcus stays open, a vessel whole.

    A voxel is on the ridge if, along an axis, the margin falls on both sides by half a voxel within two voxels, and
    no neighbour lies deeper (the tip of a bump has one, and may go).
    """
    deep = 9.0
    depth = torch.full((padded.numel(),), deep, dtype=torch.float32)
    depth[index] = margin
    flat = padded.view(-1)
    ridge = torch.zeros(len(index), dtype=torch.bool)
    deepest = margin.clone()
    for stride in padded.stride():
        values = []
        for step in (-stride, stride, 2 * stride):
            value = depth[index + step]
            value[flat[index + step] != own] = -0.5
            values.append(value)
        left, right, beyond = values
        ridge |= (margin - left > 0.4) & (right <= margin + 0.05) & (margin - torch.minimum(right, beyond) > 0.4)
        deepest = torch.maximum(deepest, torch.maximum(left, right))
    return ridge & (deepest <= margin + 0.6)


@dataclass(frozen=True)
class Cortex:
    """The voxels that a cortex carved anew may hold, N of them: all grey matter, and the CSF that may become it.

    Attributes
    ----------
    position, cell : int32 (N,), as in ``Borders``.
    was_grey : bool (N,), whether the template has grey matter there.
    grey : uint8 (N,), the label of the grey matter that the voxel is, or would be.
    depth_mm : float32 (N,), distance from white matter.
    """

    position: torch.Tensor
    cell: torch.Tensor
    was_grey: torch.Tensor
    grey: torch.Tensor
    depth_mm: torch.Tensor


def cortex_of(template: Template) -> Cortex | None:
    """The cortex of a template, found at the first call; None if its table cannot tell cortex from the deep nuclei."""
    if "cortex" not in template.cache:
        template.cache["cortex"] = _find_cortex(template)
    found: Cortex | None = template.cache["cortex"]
    return found


def _find_cortex(template: Template) -> Cortex | None:
    if not {"thalamus", "gm", "csf"} <= {label.tissue for label in template.table.labels}:
        return None
    borders = borders_of(template)
    is_grey, is_fluid = members(template.table, ("gm",)), members(template.table, ("csf",))
    white = members(template.table, ("wm", "lesion"))[template.labels.int()].numpy()
    distance = ndimage.distance_transform_edt(~white, sampling=template.spacing_mm).astype(np.float32)
    h = min(template.spacing_mm)
    flat = template.labels.view(-1)
    now = is_grey[flat.int()].nonzero()[:, 0].int()
    soon = is_fluid[borders.own.int()] & is_grey[borders.other.int()] & (borders.margin_mm < 0.6 * h)
    position = torch.cat([now, borders.position[soon]])
    place = torch.stack(torch.unravel_index(position.long(), template.labels.shape))
    return Cortex(
        position,
        _cell_of(place, template.spacing_mm, borders.cells),
        torch.arange(len(position)) < len(now),
        torch.cat([flat[now.long()], borders.other[soon]]),
        torch.from_numpy(distance).view(-1)[position.long()] - 0.5 * h,
    )


def _cell_of(place: torch.Tensor, spacing_mm: tuple[float, ...], cells: tuple[int, int, int]) -> torch.Tensor:
    """Index of the lattice point nearest to voxels (3, N), int32 (N,)."""
    at = [(p * (mm / CELL_MM)).round().long() for p, mm in zip(place, spacing_mm, strict=True)]
    return ((at[0] * cells[1] + at[1]) * cells[2] + at[2]).int()


def cell_positions(template: Template) -> torch.Tensor:
    """Positions of the lattice of the borders, mm from the template's centre, (3, D, H, W)."""
    axes = [
        torch.arange(n) * CELL_MM - c * mm
        for n, c, mm in zip(borders_of(template).cells, template.center, template.spacing_mm, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).float()
