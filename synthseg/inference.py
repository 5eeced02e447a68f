"""Segment a volume: conform it to the network's grid, run the network, and bring the probabilities back.

Everything inside happens in RAS+ order on an isotropic grid of the network's voxel size. Probabilities, not
labels, are resampled to the scan's own grid, so that thin structures keep their shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from scipy import ndimage

from synthseg import prediction
from synthseg.conforming import Box, check_size, cleaning, conform, crop, head_box
from synthseg.errors import ConfigError, DeviceError
from synthseg.labels import BRAIN_TISSUES, PARENCHYMA_TISSUES, LabelTable, tissue_mask
from synthseg.modes import FAST_FACTOR, MEMBERS
from synthseg.posteriors import Grid, Posteriors, scan_grid
from synthseg.prediction import predict_with_agreement
from synthseg.quality import Evidence, Quality, assess
from synthseg.volume import Volume, canonical

MINOR_FRACTION = 0.2  # a further component is kept only if it has this fraction of the largest one's voxels
WHOLE_HEAD_MM = 100.0  # in a field of view thinner than this, one structure may show as several pieces
PLAUSIBLE_BRAIN_ML = (300.0, 2200.0)
VOXEL_SIZES_MM = (0.2, 5.0)

Mode = Literal["default", "fast", "robust"]


class Model(prediction.Model, Protocol):
    """What segmentation needs of a trained network: `synthseg.prediction.Model`, and which one it is."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True)
class Options:
    """How a scan is segmented. Raises ConfigError on values that cannot be.

    Attributes
    ----------
    mode : ``fast`` gives the network a coarser grid; ``robust`` takes the mean of several looks at the scan.
    voxel_size_mm : voxel size of the grid that the network takes for its own. Smaller than the model's, it enlarges
        the head that the network sees: 0.75 for 1 mm makes an infant's head as large as an adult's.
    crop_mm : size along right, anterior and superior of a box about the middle of the head; only it is analysed.
    mixed_precision : run the network in bfloat16 where the device has instructions for it.
    quality : judge the result without a reference.
    keep_posteriors : keep the probabilities (2 bytes for each class and voxel of the network).
    """

    mode: Mode = "default"
    voxel_size_mm: float | None = None
    crop_mm: tuple[float, float, float] | None = None
    mixed_precision: bool = True
    quality: bool = True
    keep_posteriors: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"there is no mode '{self.mode}'; choose one of {', '.join(get_args(Mode))}")
        low, high = VOXEL_SIZES_MM
        if self.voxel_size_mm is not None and not low <= self.voxel_size_mm <= high:
            raise ConfigError(
                f"a voxel size of {self.voxel_size_mm} mm cannot be given to the network; "
                f"expected {low:g} to {high:g} mm, for example 0.75 for the head of an infant"
            )
        if self.crop_mm is not None and not (
            len(self.crop_mm) == 3 and all(np.isfinite(side) and side > 0 for side in self.crop_mm)
        ):
            raise ConfigError(f"a box is three positive lengths in mm, got {self.crop_mm}; for example 180, 200, 160")


@dataclass
class Segmentation:
    """The result for one scan.

    Attributes
    ----------
    labels : ids (D, H, W) on the grid and in the voxel order of the scan.
    affine : (4, 4), voxel indices of ``labels`` to RAS+ mm: that of the scan.
    table : what the ids of ``labels`` mean.
    hard_ml, soft_ml : volume of each label by name, from counted voxels and from summed probabilities.
    quality : how far to trust the result; None if it was not asked for.
    posteriors : the probabilities, if they were to be kept.
    timings_s : seconds by step.
    warnings : what the user should look at, one sentence each; the flags of ``quality`` are among them.
    """

    labels: np.ndarray
    affine: np.ndarray
    table: LabelTable
    hard_ml: dict[str, float]
    soft_ml: dict[str, float]
    quality: Quality | None = None
    posteriors: Posteriors | None = None
    timings_s: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def segment(
    volume: Volume,
    model: Model,
    device: torch.device | str = "cpu",
    options: Options = Options(),
    *,
    on_step: Callable[[str], None] = lambda step: None,
) -> Segmentation:
    """Segment one scan of any contrast, resolution, orientation and field of view.

    ``on_step`` is called with the name of each step as it begins. Raises InputError if the field of view is too large
    for a head, and DeviceError if the device has too little memory.
    """
    device = torch.device(device)
    timings_s: dict[str, float] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        on_step(name)
        start = time.perf_counter()
        yield
        timings_s[name] = time.perf_counter() - start

    voxel_size_mm = options.voxel_size_mm or model.voxel_size_mm
    if options.mode == "fast":
        voxel_size_mm *= FAST_FACTOR
    members = MEMBERS[options.mode]
    with torch.inference_mode(), _out_of_memory_as_device_error(device):
        with step("conform"):
            whole = canonical(volume)
            head = head_box(whole)
            box = middle_box(whole, head, options.crop_mm)
            ras = crop(whole, box)
            check_size(ras, voxel_size_mm / max(member.zoom for member in members), len(model.labels))
            image = conform(ras, voxel_size_mm, cleaning(whole.data[head]))  # a crop may hold too little air
        with step("network"):
            probabilities, agreement = predict_with_agreement(image, model, device, members, options.mixed_precision)
        with step("clean-up"):
            whole_head = min((whole if box == head else ras).extent_mm) >= WHOLE_HEAD_MM
            winner, removed = clean_up(probabilities, model.labels, whole_head)
        with step("resample"):
            posteriors = Posteriors.covering(probabilities, model.labels, ras, voxel_size_mm, device)
            grid = scan_grid(volume)
            labels, hard_voxels, soft_voxels = posteriors.labels_on(grid)
            names = model.labels.names
            hard_ml = dict(zip(names, (hard_voxels * grid.voxel_ml).tolist(), strict=True))
            soft_ml = dict(zip(names, (soft_voxels * grid.voxel_ml).tolist(), strict=True))
        warnings = [*volume.warnings, *_implausible(hard_ml, model.labels, whole_head and box == head)]
        quality = None
        if options.quality:
            with step("quality"):
                evidence = Evidence(
                    scan=whole,
                    head=head,
                    box=box,
                    image=image,
                    probabilities=probabilities,
                    winner=winner.numpy(),
                    voxel_size_mm=voxel_size_mm,
                    table=model.labels,
                    hard_ml=hard_ml,
                    soft_ml=soft_ml,
                    removed_voxels=removed,
                    mode=options.mode,
                    agreement=None if agreement is None else dict(zip(names, agreement.tolist(), strict=True)),
                    rescaled=options.voxel_size_mm is not None,
                )
                quality = assess(evidence, model)
            warnings += [flag for flag in quality.flags if flag not in warnings]
    return Segmentation(
        labels=labels,
        affine=grid.affine,
        table=model.labels,
        hard_ml=hard_ml,
        soft_ml=soft_ml,
        quality=quality,
        posteriors=posteriors if options.keep_posteriors else None,
        timings_s=timings_s,
        warnings=warnings,
    )


def in_scheme(segmentation: Segmentation, target: LabelTable) -> Segmentation:
    """The same in a coarser scheme: probabilities are summed first, then the most probable label is taken.

    Needs the posteriors. Raises LabelError if the schemes do not relate, or the target is the finer one. The quality
    stays that of the model's own labels.
    """
    if segmentation.posteriors is None:
        raise ValueError("the scheme can only be changed of a segmentation that keeps its posteriors")
    posteriors = segmentation.posteriors.merged(target)
    d, h, w = segmentation.labels.shape
    grid = Grid((d, h, w), segmentation.affine)
    labels, hard, soft = posteriors.labels_on(grid)
    return replace(
        segmentation,
        labels=labels,
        table=target,
        hard_ml=dict(zip(target.names, (hard * grid.voxel_ml).tolist(), strict=True)),
        soft_ml=dict(zip(target.names, (soft * grid.voxel_ml).tolist(), strict=True)),
        posteriors=posteriors,
    )


def middle_box(ras: Volume, head: Box, size_mm: tuple[float, float, float] | None) -> Box:
    """The part of a box of ``ras`` that lies within ``size_mm`` about its middle; at least one voxel wide."""
    if size_mm is None:
        return head
    sides = []
    for side, n, spacing, size in zip(head, ras.data.shape, ras.spacing_mm, size_mm, strict=True):
        start, stop, _ = side.indices(n)
        kept = min(stop - start, max(1, round(size / spacing)))
        first = start + (stop - start - kept) // 2
        sides.append(slice(first, first + kept))
    return sides[0], sides[1], sides[2]


# ----------------------------------------------------------------------------------------------- clean-up


def clean_up(
    probabilities: torch.Tensor, table: LabelTable, whole_head: bool = True
) -> tuple[torch.Tensor, np.ndarray]:
    """Remove stray pieces, in place: probabilities (C, D, H, W) of a removed piece go to the other classes.

    Returns the most probable class afterwards, uint8 (D, H, W), and how many voxels each class lost, int64 (C,).

    The brain as a whole keeps its largest component, and so does each structure by its number of components
    (a further one only if it is not much smaller). In a thin field of view any number of large pieces may
    stay.
    """
    winner = prediction.winners(probabilities)
    brain = tissue_mask(table, BRAIN_TISSUES)
    removed = _remove(probabilities, winner, brain, count=1 if whole_head else None)
    for index, label in enumerate(table.labels):
        if index > 0 and label.components > 0:
            only = np.arange(len(table)) == index
            removed += _remove(probabilities, winner, only, count=label.components if whole_head else None)
    return winner, removed


def _remove(probabilities: torch.Tensor, winner: torch.Tensor, classes: np.ndarray, count: int | None) -> np.ndarray:
    """Keep the ``count`` largest components of the union of some classes; zero these classes in the others.

    ``winner``, the most probable class (D, H, W), is brought up to date as well. Returns the voxels that each class
    lost, int64 (C,).
    """
    lost = np.zeros(len(classes), dtype=np.int64)
    index = np.flatnonzero(classes)
    mask = winner.numpy() == index[0] if len(index) == 1 else np.take(classes, winner.numpy())
    box = _box_of(mask)
    if box is None:
        return lost
    winner, probabilities = winner[box], probabilities[(slice(None), *box)]  # views
    stray = stray_components(mask[box], count)
    if not stray.any():
        return lost
    lost += np.bincount(winner.numpy()[stray], minlength=len(classes))
    where = torch.from_numpy(stray)
    column = probabilities[:, where].float()
    column[torch.from_numpy(classes)] = 0
    total = column.sum(0)
    column = torch.where(total > 1e-6, column / total.clamp(min=1e-6), 0.0)
    column[0] += (total <= 1e-6).float()  # nothing else was likely there: background
    probabilities[:, where] = column.to(probabilities.dtype)
    winner[where] = column.argmax(0).to(winner.dtype)
    return lost


def _box_of(mask: np.ndarray) -> Box | None:
    """The part of an array (D, H, W) that a mask fills, and one voxel around it; None if it is empty."""
    sides = []
    for axis in range(3):
        along = mask.any(axis=tuple(a for a in range(3) if a != axis))
        used = np.flatnonzero(along)
        if used.size == 0:
            return None
        sides.append(slice(max(0, int(used[0]) - 1), int(used[-1]) + 2))
    return sides[0], sides[1], sides[2]


def stray_components(mask: np.ndarray, count: int | None) -> np.ndarray:
    """Voxels of a mask (D, H, W) outside its ``count`` largest 26-connected components (None: any).

    All but the largest must also have MINOR_FRACTION of its voxels to be kept. A component that touches the border of
    the array is always kept: what joins it to the others may lie outside the field of view.
    """
    components, n_components = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    if n_components <= 1:
        return np.zeros_like(mask)
    sizes = np.bincount(components.ravel())[1:]
    ranked = np.argsort(-sizes, kind="stable")[:count]
    kept = np.zeros(n_components + 1, dtype=bool)
    kept[1 + ranked[sizes[ranked] >= MINOR_FRACTION * sizes.max()]] = True
    for axis in range(3):
        kept[np.take(components, 0, axis)] = True
        kept[np.take(components, -1, axis)] = True
    kept[0] = True
    return ~kept[components]


def _implausible(hard_ml: dict[str, float], table: LabelTable, whole_head: bool) -> list[str]:
    """A remark if a whole head holds far too little or too much brain."""
    members = np.flatnonzero(tissue_mask(table, PARENCHYMA_TISSUES))
    brain_ml = sum(hard_ml[table.names[index]] for index in members)
    low, high = PLAUSIBLE_BRAIN_ML
    if brain_ml == 0:
        return ["no brain was found; check the orientation and the content of the scan"]
    if whole_head and not low <= brain_ml <= high:
        return [f"the brain measures {brain_ml:.0f} ml (plausible: {low:.0f} to {high:.0f}); look at the result"]
    return []


@contextmanager
def _out_of_memory_as_device_error(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"device '{device}' has too little memory for this scan; use --device cpu") from error
