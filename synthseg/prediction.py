"""From a scan to the network and back: crop to the head, conform to the network's grid, predict, resample.

Shared by inference and by the validation of a training on real scans, so that both see a scan in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from synthseg import intensity
from synthseg.devices import has_native_bf16
from synthseg.errors import InputError
from synthseg.labels import LabelTable
from synthseg.volume import Volume, apply_separable, centred_matrix

WHOLE_RUN_VOXELS = 12_000_000  # a larger grid runs in tiles, so that memory stays bounded
WINDOW_OVERLAP = 0.25
MAX_GRID_VOXELS = 80_000_000  # about 8 GB with 17 classes
SOFTMAX_VOXELS = 1_000_000  # converted at once
HEAD_GRID_MM = 4.0
HEAD_THRESHOLD = 0.15  # of the median intensity of the foreground; what is darker everywhere beyond a plane is air
HEAD_MARGIN_MM = 15.0
SLAB_BYTES = 256 * 2**20  # of probabilities held at once while they are resampled


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


def check_size(ras: Volume, voxel_size_mm: float) -> None:
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
