"""Affine and diffeomorphic deformation, composed into one field of template coordinates.

The velocity field is integrated by scaling and squaring on a coarse lattice (Arsigny et al., MICCAI 2006), the affine
map is applied on the same lattice, and the result is interpolated once to the output grid: a trilinear upsampling
reproduces the affine part exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from synthseg.config import DeformConfig
from synthseg.generator.draw import Draw, Field3D, Record
from synthseg.volume import apply_separable

LATTICE_MM, FINE_LATTICE_MM = 8.0, 4.0  # of the lattice that is deformed; the fine one where the anatomy moves too
SQUARINGS = 5


class DeformPlan(Record):
    """Output position p (mm from the patch centre) reads the template at ``center + matrix @ exp(v)(q) + shift_mm``.

    q is p, moved by the perturbation of a view if it has one.
    """

    matrix: tuple[tuple[float, float, float], ...]
    shift_mm: tuple[float, float, float]
    velocity_mm: Field3D | None
    flip: bool
    perturbation_mm: Field3D | None = None


def _rotation(degrees: tuple[float, ...]) -> torch.Tensor:
    out = torch.eye(3, dtype=torch.float64)
    for axis, angle in enumerate(degrees):
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        i, j = (k for k in range(3) if k != axis)
        turn = torch.eye(3, dtype=torch.float64)
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
        out = turn @ out
    return out


def sample_deform(config: DeformConfig, extent_mm: tuple[float, ...], draw: Draw) -> DeformPlan:
    angles = tuple(draw.uniform(-config.rotation_deg, config.rotation_deg) for _ in range(3))
    scales = torch.tensor([draw.uniform(1 - config.scaling, 1 + config.scaling) for _ in range(3)], dtype=torch.float64)
    shear = torch.eye(3, dtype=torch.float64)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        shear[i, j] = draw.uniform(-config.shear, config.shear)
    matrix = _rotation(angles) @ torch.diag(scales) @ shear
    shift = tuple(draw.uniform(-config.translation_mm, config.translation_mm) for _ in range(3))
    spacing = draw.uniform(*config.svf_spacing_mm)
    std = draw.uniform(0.0, config.svf_std_mm)
    velocity = draw.field(3, extent_mm, spacing, std) if std > 0 else None
    flip = draw.chance(config.flip_probability)
    matrix = matrix / draw.uniform(*config.head_scale)  # a large head reads the template in small steps
    skew = torch.eye(3, dtype=torch.float64)
    skew[1, 0] = draw.uniform(-config.plagiocephaly, config.plagiocephaly)
    rows = tuple(tuple(row) for row in (skew @ matrix).tolist())
    return DeformPlan(matrix=rows, shift_mm=shift, velocity_mm=velocity, flip=flip)


def resize(field: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Trilinear resize of (B, C, D, H, W) with corner points kept in place: one small matrix per axis.

    The same as ``F.interpolate``, which is several times slower on a CPU.
    """
    sizes = zip(field.shape[2:], shape, strict=True)
    matrices = [_linear(n, n_out).to(field.dtype).to(field.device) for n, n_out in sizes]
    return apply_separable(field.flatten(0, 1), matrices).unflatten(0, field.shape[:2])


def _linear(n: int, n_out: int) -> torch.Tensor:
    """Linear interpolation of one axis, first and last point kept in place, as a matrix, float64 (n_out, n)."""
    position = torch.arange(n_out, dtype=torch.float64) * ((n - 1) / max(n_out - 1, 1))
    distance = position[:, None] - torch.arange(n, dtype=torch.float64)
    return (1 - distance.abs()).clamp_min_(0)


def exponential(velocity: torch.Tensor, spacing: Sequence[float]) -> torch.Tensor:
    """Displacement of the flow of a stationary velocity field; both (B, 3, D, H, W) in mm, axis order (D, H, W)."""
    shape = velocity.shape[2:]
    axes = [torch.linspace(-1, 1, n, device=velocity.device, dtype=velocity.dtype) for n in shape]
    identity = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)[None]
    unit = torch.tensor(
        [2.0 / (spacing[a] * (shape[a] - 1)) for a in (2, 1, 0)], device=velocity.device, dtype=velocity.dtype
    )
    moved = velocity / 2**SQUARINGS
    for _ in range(SQUARINGS):
        grid = identity + moved.flip(1).permute(0, 2, 3, 4, 1) * unit
        moved = moved + F.grid_sample(moved, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return moved


def _lattice(shape: Sequence[int], voxel_size_mm: float, fine: bool) -> list[int]:
    """Points along each axis of the lattice that is deformed."""
    spacing = FINE_LATTICE_MM if fine else LATTICE_MM
    return [max(2, min(n, math.ceil((n - 1) * voxel_size_mm / spacing) + 1)) for n in shape]


def perturbation(
    plan: DeformPlan, shape: Sequence[int], voxel_size_mm: float, fine: bool, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The perturbation of a view as `coordinates` applies it, at every output voxel, mm, (3, D, H, W).

    ``fine``: the coordinates are found with a ``displacement``.
    """
    if plan.perturbation_mm is None:
        return torch.zeros((3, *shape), device=device)
    lattice = _lattice(shape, voxel_size_mm, fine)
    return resize(resize(plan.perturbation_mm.tensor(device)[None], lattice), shape)[0]


def coordinates(
    plan: DeformPlan,
    shape: Sequence[int],
    voxel_size_mm: float,
    center: Sequence[float],
    spacing_mm: Sequence[float],
    device: torch.device | str = "cpu",
    displacement: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Template voxel coordinates of every output voxel centre, float32, shape (3, D, H, W).

    ``displacement`` takes positions (3, D, H, W) in mm from the template's centre and gives what to add to them.
    """
    extent = [(n - 1) * voxel_size_mm for n in shape]
    lattice = _lattice(shape, voxel_size_mm, fine=displacement is not None)
    axes = [torch.linspace(-e / 2, e / 2, n, device=device) for n, e in zip(lattice, extent, strict=True)]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    if plan.perturbation_mm is not None:
        position = position + resize(plan.perturbation_mm.tensor(device)[None], lattice)[0]
    if plan.velocity_mm is not None:
        velocity = resize(plan.velocity_mm.tensor(device)[None], lattice)
        steps = [max(e, voxel_size_mm) / (n - 1) for n, e in zip(lattice, extent, strict=True)]
        flow = exponential(velocity, steps)
        if plan.perturbation_mm is not None:
            half = torch.tensor([max(e, voxel_size_mm) / 2 for e in extent], device=device)
            at = (position.movedim(0, -1) / half).flip(-1)[None]
            flow = F.grid_sample(flow, at, mode="bilinear", padding_mode="border", align_corners=True)
        position = position + flow[0]
    matrix = torch.tensor(plan.matrix, dtype=torch.float32, device=device)
    shift = torch.tensor(plan.shift_mm, dtype=torch.float32, device=device)
    scale = 1.0 / torch.tensor(spacing_mm, dtype=torch.float32, device=device)
    moved = torch.einsum("ij,jdhw->idhw", matrix, position) + shift[:, None, None, None]
    if plan.flip:
        moved = moved * torch.tensor([-1.0, 1.0, 1.0], device=device)[:, None, None, None]
    if displacement is not None:
        moved = moved + displacement(moved)
    voxels = (
        moved * scale[:, None, None, None]
        + torch.tensor(center, dtype=torch.float32, device=device)[:, None, None, None]
    )
    return resize(voxels[None], shape)[0]
