"""Segment a volume: conform it to the network's grid, run the network, and bring the probabilities back.

Everything inside happens in RAS+ order on an isotropic grid of the network's voxel size. Probabilities, not
labels, are resampled to the scan's own grid, so that thin structures keep their shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import ndimage

from synthseg.errors import DeviceError
from synthseg.labels import BRAIN_TISSUES, PARENCHYMA_TISSUES, LabelTable, tissue_mask
from synthseg.prediction import Model, check_size, conform, crop, head_box, predict, to_scan_grid
from synthseg.volume import Volume, canonical, from_canonical

MINOR_FRACTION = 0.2  # a further component is kept only if it has this fraction of the largest one's voxels
WHOLE_HEAD_MM = 100.0  # in a field of view thinner than this, one structure may show as several pieces
PLAUSIBLE_BRAIN_ML = (300.0, 2200.0)


@dataclass
class Segmentation:
    """The result for one scan.

    Attributes
    ----------
    labels : ids (D, H, W) on the grid and in the voxel order of the scan.
    hard_ml, soft_ml : volume of each label by name, from counted voxels and from summed probabilities.
    timings_s : seconds by step.
    warnings : what the user should look at, one sentence each.
    """

    labels: np.ndarray
    hard_ml: dict[str, float]
    soft_ml: dict[str, float]
    timings_s: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def segment(
    volume: Volume,
    model: Model,
    device: torch.device | str = "cpu",
    *,
    tta: bool = False,
    mixed_precision: bool = True,
    on_step: Callable[[str], None] = lambda step: None,
) -> Segmentation:
    """Segment one scan of any contrast, resolution, orientation and field of view.

    Parameters
    ----------
    tta : average with the result of the mirrored scan (twice the time).
    mixed_precision : run the network in bfloat16 where the device has instructions for it.
    on_step : called with the name of each step as it begins.
    """
    device = torch.device(device)
    timings_s: dict[str, float] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        on_step(name)
        start = time.perf_counter()
        yield
        timings_s[name] = time.perf_counter() - start

    with torch.inference_mode(), _out_of_memory_as_device_error(device):
        with step("conform"):
            whole = canonical(volume)
            box = head_box(whole)
            ras = crop(whole, box)
            check_size(ras, model.voxel_size_mm)
            image = conform(ras, model.voxel_size_mm)
        with step("network"):
            probabilities = predict(image, model, device, tta=tta, mixed_precision=mixed_precision)
        with step("clean-up"):
            whole_head = min(whole.extent_mm) >= WHOLE_HEAD_MM
            clean_up(probabilities, model.labels, whole_head)
        with step("resample"):
            indices, hard_voxels, soft_voxels = to_scan_grid(probabilities, ras, model.voxel_size_mm, device)
            ids = model.labels.ids.astype(np.uint8 if model.labels.ids.max() <= 255 else np.int16)
            labels = np.zeros(whole.data.shape, ids.dtype)  # air beyond the box
            labels[box] = ids[indices]
            labels = from_canonical(labels, volume)
            outside = whole.data.size - ras.data.size
            hard_voxels[0] += outside
            soft_voxels[0] += outside
    hard_ml, soft_ml = hard_voxels * volume.voxel_ml, soft_voxels * volume.voxel_ml
    return Segmentation(
        labels=labels,
        hard_ml=dict(zip(model.labels.names, hard_ml.tolist(), strict=True)),
        soft_ml=dict(zip(model.labels.names, soft_ml.tolist(), strict=True)),
        timings_s=timings_s,
        warnings=[*volume.warnings, *_implausible(hard_ml, model.labels, whole_head)],
    )


# ----------------------------------------------------------------------------------------------- clean-up


def clean_up(probabilities: torch.Tensor, table: LabelTable, whole_head: bool = True) -> None:
    """Remove stray pieces, in place: probabilities (C, D, H, W) of a removed piece go to the other classes.

    The brain as a whole keeps its largest component, and so does each structure by its number of components
    (a further one only if it is not much smaller). In a thin field of view any number of large pieces may
    stay.
    """
    winner = probabilities.max(0).indices
    brain = tissue_mask(table, BRAIN_TISSUES)
    _remove(probabilities, winner, brain, count=1 if whole_head else None)
    for index, label in enumerate(table.labels):
        if index > 0 and label.components > 0:
            only = np.arange(len(table)) == index
            _remove(probabilities, winner, only, count=label.components if whole_head else None)


def _remove(probabilities: torch.Tensor, winner: torch.Tensor, classes: np.ndarray, count: int | None) -> None:
    """Keep the ``count`` largest components of the union of some classes; zero these classes in the others.

    ``winner``, the most probable class (D, H, W), is brought up to date as well.
    """
    stray = stray_components(classes[winner.numpy()], count)
    if not stray.any():
        return
    where = torch.from_numpy(stray)
    column = probabilities[:, where].float()
    column[torch.from_numpy(classes)] = 0
    total = column.sum(0)
    column = torch.where(total > 1e-6, column / total.clamp(min=1e-6), 0.0)
    column[0] += (total <= 1e-6).float()  # nothing else was likely there: background
    probabilities[:, where] = column.to(probabilities.dtype)
    winner[where] = column.argmax(0)


def stray_components(mask: np.ndarray, count: int | None) -> np.ndarray:
    """Voxels of a mask (D, H, W) outside its ``count`` largest 26-connected components (None: any).

    All but the largest must also have MINOR_FRACTION of its voxels to be kept. A component that touches the border of
    the array is always kept: what joins it to the others may lie outside the field of view.
    """
    stray = np.zeros_like(mask)
    box = ndimage.find_objects(mask.astype(np.uint8))
    if not box:
        return stray
    components, n_components = ndimage.label(mask[box[0]], structure=np.ones((3, 3, 3)))
    if n_components == 1:
        return stray
    sizes = np.bincount(components.ravel())[1:]
    ranked = np.argsort(-sizes, kind="stable")[:count]
    kept = np.zeros(n_components + 1, dtype=bool)
    kept[1 + ranked[sizes[ranked] >= MINOR_FRACTION * sizes.max()]] = True
    for axis, side in enumerate(box[0]):
        if side.start == 0:
            kept[np.take(components, 0, axis)] = True
        if side.stop == mask.shape[axis]:
            kept[np.take(components, -1, axis)] = True
    kept[0] = True
    stray[box[0]] = ~kept[components]
    return stray


def _implausible(hard_ml: np.ndarray, table: LabelTable, whole_head: bool) -> list[str]:
    """A remark if a whole head holds far too little or too much brain."""
    brain_ml = float(hard_ml[tissue_mask(table, PARENCHYMA_TISSUES)].sum())
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
