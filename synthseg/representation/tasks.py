"""What the heads of a feature network say of a scan: a T1 image, a sharper image, a bias field.

The scan goes through the network as in `extraction`; one layer on the features gives values on the network's grid, and
these, not intensities, are brought to the grid that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from synthseg.errors import CheckpointError, InputError
from synthseg.intensity import fill_as_air, finite, foreground, looks_like_hounsfield
from synthseg.networks.task_heads import CHANNELS, DARK, result_of
from synthseg.posteriors import Grid, scan_grid, spacing_grid
from synthseg.representation import extraction
from synthseg.volume import Volume, apply_separable, canonical, from_canonical, resampling_matrix

FIELD_LIMITS = (0.1, 10.0)  # what a coil does; beyond it, a division would invent rather than correct
NEGATIVE = 0.05  # of the contrast; with a background farther below zero, intensities are no product with a field


class Model(extraction.Model, Protocol):
    """What a task needs of a trained network: `synthseg.networks.feature_file.FeatureModel`."""

    @property
    def heads(self) -> dict[str, dict[str, Any]]: ...
    def head_for(self, task: str) -> str: ...


@dataclass(frozen=True, eq=False)
class Result:
    """What a task says of a scan on the network's grid.

    Attributes
    ----------
    values : float32 (C, D, H, W), axes in RAS+ order (`networks.task_heads.result_of`).
    image : float32 (1, D, H, W) in [0, 1]: what the network saw.
    affine : (4, 4), voxel indices to RAS+ mm of the scan.
    """

    values: torch.Tensor
    image: torch.Tensor
    affine: np.ndarray


@dataclass(frozen=True, eq=False)
class Corrected:
    """A scan without its bias field, float32 (D, H, W) in its own intensities and voxel order, and the field.

    The field is smooth and positive, and its geometric mean over what is not dark is 1: ``data * field`` is the scan.
    """

    data: np.ndarray
    field: np.ndarray


def run_task(volume: Volume, model: Model, task: str, device: torch.device | str = "cpu") -> Result:
    """What the head for a task says of one scan of any contrast, resolution, orientation and field of view.

    Raises CheckpointError if the model has no such head, or one of other channels; other errors as
    `extraction.extract`.
    """
    name = model.head_for(task)
    expected, found = CHANNELS.get(task), _channels(model, name)
    if expected is not None and found != expected:
        raise CheckpointError(f"its head {name} has {found} channels, expected {expected} for {task}; train it again")
    with torch.inference_mode():
        image, at = extraction.conformed(volume, model)
        features = extraction.extract_image(image, model, device, affine=at)
        values = model.network.head(name, features.values[None].float().to(device)).cpu()
        affine = _fine_affine(features.affine, int(model.network.config.subpixel))
        image = _placed(image, at, affine, values.shape[2:])
        result = result_of(task, values, image[None, None], model.voxel_size_mm)[0]
    return Result(result, image[None], affine)


def synthesize_t1(
    volume: Volume,
    model: Model,
    device: torch.device | str = "cpu",
    spacing_mm: float | Sequence[float] | None = None,
) -> tuple[np.ndarray, Grid]:
    """The T1-weighted image of the head in a scan of any contrast: float32 (D, H, W) in [0, 1], and where it lies.

    On the voxels of the scan, or along its axes with voxels of ``spacing_mm``. Where the head cannot be, it is 0.
    """
    result = run_task(volume, model, "reconstruction", device)
    grid = scan_grid(volume) if spacing_mm is None else spacing_grid(volume, spacing_mm)
    data, inside = on_grid(result.values[0].clamp(0, 1), result.affine, grid)
    return np.where(inside, data, np.float32(0)), grid


def super_resolve(volume: Volume, model: Model, device: torch.device | str = "cpu") -> Volume:
    """The scan with sharper slices, in [0, 1], on the network's isotropic grid around the head, RAS+."""
    result = run_task(volume, model, "super-resolution", device)
    return Volume(result.values[0].clamp(0, 1).numpy(), result.affine)


def correct_bias(volume: Volume, model: Model, device: torch.device | str = "cpu") -> Corrected:
    """Divide a scan by the smooth field that its coils multiplied it with, found by the network.

    The field, not the scan, is resampled. Raises InputError on a CT scan, which has no such field, and on intensities
    whose zero has been moved (standardised, for example, or as the scan was read): they are no product of image and
    field any more.
    """
    if volume.rescaled:
        raise InputError(
            "its intensities are too large, too small or too far from zero for the program, so that no field can be "
            "divided out of them; give the scan with intensities of about 0 to 1000, its air at 0"
        )
    data = np.asarray(volume.data, dtype=np.float32)
    _check_product(data)
    result = run_task(volume, model, "bias-field", device)
    seen = result.image > DARK
    level = result.values[seen].mean() if bool(seen.any()) else torch.zeros(())
    log_field, _ = on_grid((result.values - level)[0], result.affine, scan_grid(volume))
    field = np.clip(np.exp(log_field), *FIELD_LIMITS).astype(np.float32)
    return Corrected(data / field, field)


def _check_product(data: np.ndarray) -> None:
    """Refuse intensities (D, H, W) that no field can have multiplied."""
    image = finite(torch.from_numpy(np.ascontiguousarray(data)))
    if looks_like_hounsfield(fill_as_air(image)):
        raise InputError("its intensities are Hounsfield units; a CT scan has no bias field to correct")
    floor, median = foreground(image)
    if floor < -NEGATIVE * (median - floor):
        raise InputError(
            f"its intensities begin at {floor:.4g}: their zero has been moved (by standardising, for example), and a "
            "bias field multiplies what was measured; give the scan as it was before, or add what makes its air 0"
        )


# ------------------------------------------------------------------------------------------------------ grids


def on_grid(values: torch.Tensor, affine: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Values (D, H, W), RAS+, at the voxels of a grid along the same axes, in any order and either way.

    Returns float32 in the order of the grid, and which of its voxels lie on the grid of the values, bool; outside, the
    values at the border continue. Linear, anti-aliased towards coarser voxels.
    """
    like = Volume(np.broadcast_to(np.float32(0), grid.shape), grid.affine)
    target = canonical(like)
    spacing_in = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / spacing_in  # not perpendicular in a scan of a tilted gantry
    first_mm = np.linalg.solve(directions, target.affine[:3, 3] - affine[:3, 3])
    matrices, inside = [], np.ones((1, 1, 1), dtype=bool)
    for axis, (n_in, n_out) in enumerate(zip(values.shape, target.data.shape, strict=True)):
        spacing_out = target.spacing_mm[axis]
        matrices.append(resampling_matrix(n_in, n_out, float(spacing_in[axis]), spacing_out, float(first_mm[axis])))
        at = (first_mm[axis] + spacing_out * np.arange(n_out)) / spacing_in[axis]
        along = (at > -0.5 - 1e-4) & (at < n_in - 0.5 + 1e-4)
        inside = inside & np.expand_dims(along, tuple(other for other in range(3) if other != axis))
    data = apply_separable(values[None].float(), matrices)[0].numpy()
    return tuple(np.ascontiguousarray(from_canonical(part, like)) for part in (data, inside))  # type: ignore[return-value]


def _fine_affine(affine: np.ndarray, cells: int) -> np.ndarray:
    """Affine of the voxels of which each voxel of the features holds ``cells`` along each axis."""
    fine = affine.copy()
    fine[:3, :3] /= cells
    fine[:3, 3] -= fine[:3, :3] @ np.full(3, (cells - 1) / 2)
    return fine


def _placed(image: torch.Tensor, own: np.ndarray, affine: np.ndarray, shape: torch.Size) -> torch.Tensor:
    """An image (D, H, W) with affine ``own`` on another grid of its voxels, 0 where it shows nothing."""
    before = -np.rint((np.linalg.inv(own) @ affine)[:3, 3]).astype(int)
    padding: list[int] = []
    for n, wanted, first in zip(image.shape, shape, before.tolist(), strict=True):
        padding = [first, wanted - first - n, *padding]
    return F.pad(image, padding)  # negative numbers cut off


def _channels(model: Model, head: str) -> int:
    weight = model.network.heads[head].weight
    return int(weight.shape[0]) // int(model.network.config.subpixel) ** 3
