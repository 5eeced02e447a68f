"""Segment a volume: conform it to the network's grid, run the network, and bring the probabilities back.

Everything inside happens in RAS+ order on an isotropic grid of the network's voxel size. Probabilities, not
labels, are resampled to the scan's own grid, so that thin structures keep their shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from scipy import ndimage

from synthseg import intensity
from synthseg.devices import has_native_bf16
from synthseg.errors import DeviceError, InputError
from synthseg.labels import BRAIN_TISSUES, PARENCHYMA_TISSUES, LabelTable, tissue_mask
from synthseg.volume import Volume, apply_separable, canonical, centred_matrix, from_canonical

WHOLE_RUN_VOXELS = 12_000_000  # a larger grid runs in tiles, so that memory stays bounded
WINDOW_OVERLAP = 0.25
MAX_GRID_VOXELS = 80_000_000  # about 8 GB with 17 classes
SOFTMAX_VOXELS = 1_000_000  # converted at once
HEAD_GRID_MM = 4.0
HEAD_THRESHOLD = 0.15  # of the median intensity of the foreground; what is darker everywhere beyond a plane is air
HEAD_MARGIN_MM = 15.0
SLAB_BYTES = 256 * 2**20  # of probabilities held at once while they are resampled
MINOR_FRACTION = 0.2  # a further component is kept only if it has this fraction of the largest one's voxels
WHOLE_HEAD_MM = 100.0  # in a field of view thinner than this, one structure may show as several pieces
PLAUSIBLE_BRAIN_ML = (300.0, 2200.0)


class Model(Protocol):
    """What segmentation needs of a trained network.

    ``network`` maps normalised intensities, float (B, 1, D, H, W), to logits (B, C, D, H, W) for any size
    divisible by ``multiple``; ``window`` is the size in voxels that it was trained on.
    """

    @property
    def network(self) -> torch.nn.Module: ...
    @property
    def labels(self) -> LabelTable: ...
    @property
    def voxel_size_mm(self) -> float: ...
    @property
    def window(self) -> tuple[int, int, int]: ...
    @property
    def multiple(self) -> int: ...


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
            _check_size(ras, model.voxel_size_mm)
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


# ---------------------------------------------------------------------------------------- scan to network


Box = tuple[slice, slice, slice]


def head_box(ras: Volume) -> Box:
    """The part of the field of view that holds the head, with a margin; the rest is air. In voxels of ``ras``.

    Looked for on a coarse grid, where noise is averaged away. Saves most of the time and memory of a scan with much
    air around the head, and makes the result independent of how much air there is.
    """
    coarse = resample(ras, HEAD_GRID_MM)
    floor, median = intensity.foreground(coarse)
    seen = coarse > floor + HEAD_THRESHOLD * (median - floor)  # the median, so that a bright object decides nothing
    sides = []
    for axis in range(3):
        n, spacing = ras.data.shape[axis], ras.spacing_mm[axis]
        planes = torch.nonzero(
            seen.any(dim=(axis + 1) % 3, keepdim=True).any(dim=(axis + 2) % 3, keepdim=True).flatten()
        )
        if len(planes) == 0:
            return slice(None), slice(None), slice(None)
        first_mm = (float(planes[0]) - coarse.shape[axis] / 2) * HEAD_GRID_MM - HEAD_MARGIN_MM
        last_mm = (float(planes[-1]) + 1 - coarse.shape[axis] / 2) * HEAD_GRID_MM + HEAD_MARGIN_MM
        start = max(0, int(np.floor(first_mm / spacing + n / 2)))
        stop = min(n, int(np.ceil(last_mm / spacing + n / 2)))
        sides.append(slice(start, max(stop, start + 1)))
    return sides[0], sides[1], sides[2]


def crop(ras: Volume, box: Box) -> Volume:
    """A part of a volume, with the affine of its own first voxel."""
    affine = ras.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [side.start or 0 for side in box]
    return Volume(ras.data[box], affine)


def _check_size(ras: Volume, voxel_size_mm: float) -> None:
    """Refuse a field of view whose probabilities would not fit into memory: most often a wrong voxel size."""
    n = float(np.prod([float(side) for side in grid_shape(ras, voxel_size_mm)]))
    if n > MAX_GRID_VOXELS:
        extent = " x ".join(f"{side:.0f}" for side in ras.extent_mm)
        spacing = " x ".join(f"{side:.3g}" for side in ras.spacing_mm)
        raise InputError(
            f"the field of view is {extent} mm ({spacing} mm voxels), too large for a head; "
            "correct the voxel size in the header, or crop the scan to the head"
        )


def grid_shape(ras: Volume, voxel_size_mm: float) -> tuple[int, int, int]:
    """Size of the isotropic grid that covers the field of view, at least one voxel along each axis."""
    d, h, w = (max(1, int(np.ceil(extent / voxel_size_mm - 1e-3))) for extent in ras.extent_mm)
    return d, h, w


def conform(ras: Volume, voxel_size_mm: float) -> torch.Tensor:
    """The network's input: finite, windowed if CT, isotropic, anti-aliased, in [0, 1]; float32 (D, H, W).

    The grid shares its centre with the field of view of the scan.
    """
    return intensity.normalise(resample(ras, voxel_size_mm))


def resample(ras: Volume, voxel_size_mm: float) -> torch.Tensor:
    """Finite intensities, windowed if CT, on the isotropic grid; float32 (D, H, W)."""
    image = torch.from_numpy(np.ascontiguousarray(ras.data, dtype=np.float32))
    image = intensity.fill_as_air(intensity.finite(image))
    if intensity.looks_like_hounsfield(image):
        image = image.clamp(*intensity.CT_WINDOW_HU)
    matrices = [
        centred_matrix(n_in, n_out, spacing, voxel_size_mm)
        for n_in, n_out, spacing in zip(image.shape, grid_shape(ras, voxel_size_mm), ras.spacing_mm, strict=True)
    ]
    return apply_separable(image[None], matrices)[0]


# ------------------------------------------------------------------------------------------------ network


def predict(
    image: torch.Tensor,
    model: Model,
    device: torch.device,
    *,
    tta: bool = False,
    mixed_precision: bool = True,
) -> torch.Tensor:
    """Class probabilities, float16 (C, D, H, W) on the CPU, of a conformed image (D, H, W)."""
    use_bf16 = mixed_precision and has_native_bf16(device)

    def probabilities(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bf16):
            logits = model.network(batch)
        return _softmax(logits)

    padding = _padding(image.shape, model.window, model.multiple)
    padded = torch.nn.functional.pad(image, padding)[None, None].to(device)
    result = _run(padded, probabilities, model.window)
    if tta:
        partner = torch.as_tensor(model.labels.flip, device=device)
        mirrored = _run(padded.flip(2), probabilities, model.window)
        result = (result + mirrored.flip(2)[:, partner]) / 2
    left_d, left_h, left_w = padding[4], padding[2], padding[0]
    d, h, w = image.shape
    return result[0, :, left_d : left_d + d, left_h : left_h + h, left_w : left_w + w].cpu().contiguous()


def _padding(shape: torch.Size, window: tuple[int, int, int], multiple: int) -> list[int]:
    """Voxels to add before and after each axis, in the order of torch's ``pad`` (last axis first)."""
    padding: list[int] = []
    for n, least in zip(reversed(shape), reversed(window), strict=True):
        missing = -(-max(n, least) // multiple) * multiple - n
        padding += [missing // 2, missing - missing // 2]
    return padding


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities, float16, of logits (1, C, D, H, W), a slab at a time: they are the largest array of all."""
    result = torch.empty(logits.shape, dtype=torch.float16, device=logits.device)
    slab = max(1, SOFTMAX_VOXELS // (logits.shape[3] * logits.shape[4]))
    for start in range(0, logits.shape[2], slab):
        result[:, :, start : start + slab] = logits[:, :, start : start + slab].float().softmax(1)
    return result


def _run(
    image: torch.Tensor, predictor: Callable[[torch.Tensor], torch.Tensor], window: tuple[int, int, int]
) -> torch.Tensor:
    """Probabilities (1, C, D, H, W): in one go if memory allows, else in tiles of the training's window."""
    if image.numel() <= max(WHOLE_RUN_VOXELS, int(np.prod(window))):
        return predictor(image)
    from monai.inferers import sliding_window_inference

    return sliding_window_inference(
        image,
        window,
        sw_batch_size=1,
        predictor=lambda tile: predictor(tile).float(),
        overlap=WINDOW_OVERLAP,
        mode="gaussian",
    ).half()


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


# ---------------------------------------------------------------------------------------- network to scan


def to_scan_grid(
    probabilities: torch.Tensor, ras: Volume, voxel_size_mm: float, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class indices uint8 (D, H, W) on the grid of ``ras``; voxels and summed probability of each class (C,).

    Works in slabs along the first axis, so that memory stays bounded for scans of any resolution.
    """
    n_classes = probabilities.shape[0]
    shape = ras.data.shape
    first, second, third = (
        centred_matrix(n_in, n_out, voxel_size_mm, spacing).to(device)
        for n_in, n_out, spacing in zip(probabilities.shape[1:], shape, ras.spacing_mm, strict=True)
    )
    indices = np.empty(shape, dtype=np.uint8)
    counts = torch.zeros(n_classes, dtype=torch.int64)
    sums = torch.zeros(n_classes, dtype=torch.float64)
    thickness = max(1, int(SLAB_BYTES // (4 * n_classes * shape[1] * shape[2])))
    for start in range(0, shape[0], thickness):
        rows = first[start : start + thickness]
        used = torch.nonzero(rows.any(0))
        low, high = int(used.min()), int(used.max()) + 1
        slab = probabilities[:, low:high].to(device).float()
        slab = apply_separable(slab, [rows[:, low:high], second, third])
        winner = slab.max(0).indices.cpu()  # several times faster than argmax
        indices[start : start + thickness] = winner.numpy()
        counts += torch.bincount(winner.flatten(), minlength=n_classes)
        sums += slab.sum((2, 3)).cpu().double().sum(1)
    return indices, counts.numpy(), sums.numpy()


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
