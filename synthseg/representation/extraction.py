"""Features of a scan: conformed as for segmentation, through the body of a network, on the features' own grid.

A voxel of a level is the block of image voxels that grows out of it in the decoder: ``subpixel`` of them along each
axis at the finest level, twice as many at each level inwards. Its centre is that of the block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from synthseg.conforming import check_size, conform, crop, head_box
from synthseg.devices import has_native_bf16
from synthseg.errors import CheckpointError, ConfigError, DeviceError, InputError
from synthseg.intensity import foreground
from synthseg.posteriors import centred_grid
from synthseg.volume import Volume, canonical

WHOLE_RUN_VOXELS = 16_000_000  # of the image; a larger field of view runs in tiles, so that memory stays bounded
MAX_VALUES = 1_400_000_000  # channels times voxels of the features: 2.8 GB
OVERLAP = 0.25  # of a tile with the next
HEAD_FRACTION = 0.15  # of the median intensity of the foreground; what is brighter is head
RESIZE_VALUES = 64_000_000  # in float32 at once


class Model(Protocol):
    """What extraction needs of a trained network: what `synthseg.networks.feature_file.load_features` returns.

    ``network`` maps intensities (B, 1, D, H, W) to a list of features (B, C_l, d_l, h_l, w_l), coarsest first.
    """

    @property
    def network(self) -> Any: ...
    @property
    def voxel_size_mm(self) -> float: ...
    @property
    def window(self) -> tuple[int, int, int]: ...
    @property
    def multiple(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Features:
    """Features of one scan.

    Attributes
    ----------
    values : float16 (C, d, h, w) on the CPU, axes in RAS+ order. Channels of several levels stand one after the
        other, in the order asked for; coarser ones are interpolated to the grid of the finest of them.
    affine : (4, 4), voxel indices of ``values`` to RAS+ mm of the scan.
    head : bool (d, h, w): where the head is, holes filled.
    image : float32 (d, h, w) in [0, 1]: what the network saw, averaged over each voxel of the features.
    levels, channels : the levels of the decoder (-1 is the finest), and how many channels each has.
    """

    values: torch.Tensor
    affine: np.ndarray
    head: torch.Tensor
    image: torch.Tensor
    levels: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        d, h, w = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(d), float(h), float(w)

    @property
    def volume(self) -> Volume:
        """The image on the grid of the features."""
        return Volume(self.image.numpy(), self.affine)


def check_levels(network: Any, levels: Sequence[int]) -> tuple[int, ...]:
    """The levels of a network's decoder that are meant. Raises ConfigError on one that it does not have."""
    count = len(network.channels)
    if not levels:
        raise ConfigError("levels: none was given; name at least one, -1 is the finest")
    wrong = [level for level in levels if not -count <= level <= -1]
    if wrong:
        raise ConfigError(f"levels: the network has no level {wrong[0]}; expected -1 (the finest) to -{count}")
    if len(set(levels)) != len(levels):
        raise ConfigError(f"levels: {', '.join(map(str, levels))} names one twice; name each once")
    return tuple(levels)


def extract(
    volume: Volume,
    model: Model,
    device: torch.device | str = "cpu",
    levels: Sequence[int] = (-1,),
    *,
    mixed_precision: bool = False,
) -> Features:
    """Features of one scan of any contrast, resolution, orientation and field of view.

    The network, on ``device``, sees the head in one go, or in overlapping tiles of its training window where the field
    of view is larger than WHOLE_RUN_VOXELS. With ``mixed_precision`` it runs in bfloat16 where the device has
    instructions for it, with the digits of bfloat16.

    Raises ConfigError on a level that the network does not have, InputError if the field of view is too large for a
    head, CheckpointError if the network gives no numbers, and DeviceError if the device has too little memory.
    """
    with torch.inference_mode():
        image, affine = conformed(volume, model, levels)
        return extract_image(image, model, device, levels, affine=affine, mixed_precision=mixed_precision)


def conformed(volume: Volume, model: Model, levels: Sequence[int] = (-1,)) -> tuple[torch.Tensor, np.ndarray]:
    """What the network is shown of a scan: the head, float32 (D, H, W) in [0, 1], axes in RAS+ order, and its affine.

    Raises ConfigError and InputError as `extract`.
    """
    wanted = check_levels(model.network, levels)
    whole = canonical(volume)
    ras = crop(whole, head_box(whole))
    check_size(ras, model.voxel_size_mm, 1)
    channels = sum(model.network.channels[level] for level in wanted)
    _check_values(ras, model.voxel_size_mm * cell_of(model.network, max(wanted)), channels)
    image = conform(ras, model.voxel_size_mm)
    d, h, w = image.shape
    return image, centred_grid(ras, (d, h, w), [model.voxel_size_mm] * 3).affine


def extract_image(
    image: torch.Tensor,
    model: Model,
    device: torch.device | str = "cpu",
    levels: Sequence[int] = (-1,),
    *,
    affine: np.ndarray | None = None,
    mixed_precision: bool = False,
) -> Features:
    """Features of an image (D, H, W) in [0, 1] with the network's voxel size, such as one of the generator.

    ``affine`` (4, 4) says where the voxels of the image are; without it the first one is at 0 mm. Blocks that hold any
    voxel of the image are returned; where its sides are divisible by the network's ``multiple`` and not smaller than
    its window, they are exactly the image. Otherwise as `extract`.
    """
    device = torch.device(device)
    wanted = check_levels(model.network, levels)
    at = np.diag([*[model.voxel_size_mm] * 3, 1.0]) if affine is None else affine
    cell = cell_of(model.network, max(wanted))
    with torch.inference_mode():
        before, padded = _padded(image, model)
        try:
            maps = _run(padded, model, device, wanted, mixed_precision)
        except torch.OutOfMemoryError as error:
            raise DeviceError(f"device '{device}' has too little memory for this scan; use --device cpu") from error
        start, shape = _covering(image.shape, before, cell)
        values = _joined(maps, wanted, start, shape)
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(
                "the network gives no numbers for this scan (NaN, or beyond float16): its weights or the device are at "
                "fault; get the weights again, or try --device cpu"
            )
        small = _block_means(padded, start, shape, cell)
    return Features(
        values=values,
        affine=_block_affine(at, cell, [s * cell - b for s, b in zip(start, before, strict=True)]),
        head=head_mask(small),
        image=small,
        levels=wanted,
        channels=tuple(model.network.channels[level] for level in wanted),
    )


def head_mask(image: torch.Tensor) -> torch.Tensor:
    """The head in an image (D, H, W): the largest bright piece with its holes filled, bool (D, H, W).

    In a constant image it is everything.
    """
    floor, median = foreground(image)
    bright = (image > floor + HEAD_FRACTION * (median - floor)).cpu().numpy()
    components, count = ndimage.label(bright)
    if count == 0:
        return torch.ones(image.shape, dtype=torch.bool)
    sizes = np.bincount(components.ravel())
    head = components == 1 + int(sizes[1:].argmax())
    closed = ndimage.binary_closing(np.pad(head, 3), iterations=3)[3:-3, 3:-3, 3:-3] | head
    for axis in range(3):  # plane by plane: through the neck and the orbits the outside would reach in
        for plane, filled in zip(
            np.moveaxis(closed, axis, 0), map(ndimage.binary_fill_holes, np.moveaxis(closed, axis, 0)), strict=True
        ):
            plane |= filled
    return torch.from_numpy(closed)


# ------------------------------------------------------------------------------------------- geometry of blocks


def cell_of(network: Any, level: int) -> int:
    """Image voxels along the side of a voxel of a level."""
    return int(network.config.subpixel) * 2 ** (-1 - level)


def _block_affine(affine: np.ndarray, cell: int, first: Sequence[int]) -> np.ndarray:
    """Affine (4, 4) of blocks of ``cell`` voxels of a grid, the first of which begins at voxel ``first``."""
    result = np.array(affine, dtype=np.float64)
    result[:3, 3] += affine[:3, :3] @ (np.asarray(first) + (cell - 1) / 2)
    result[:3, :3] *= cell
    return result


def _covering(
    shape: Sequence[int], before: Sequence[int], cell: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """First block, and number of blocks along each axis, of those that hold the image in the padded image."""
    first = [b // cell for b in before]
    count = [-(-(b + n) // cell) - f for b, n, f in zip(before, shape, first, strict=True)]
    return (first[0], first[1], first[2]), (count[0], count[1], count[2])


def _block_means(padded: torch.Tensor, start: Sequence[int], shape: Sequence[int], cell: int) -> torch.Tensor:
    """Mean of the padded image (D, H, W) over each block, float32 (d, h, w)."""
    part = padded[tuple(slice(s * cell, (s + n) * cell) for s, n in zip(start, shape, strict=True))]
    return part if cell == 1 else F.avg_pool3d(part[None, None], cell)[0, 0]


def _padded(image: torch.Tensor, model: Model) -> tuple[tuple[int, int, int], torch.Tensor]:
    """The image with zeros around it, at least as large as the window, and how many came before it on each axis."""
    padding: list[int] = []
    before: list[int] = []
    for n, least in zip(image.shape, model.window, strict=True):
        missing = -(-max(n, least) // model.multiple) * model.multiple - n
        before.append(missing // 2)
        padding = [missing // 2, missing - missing // 2, *padding]
    return (before[0], before[1], before[2]), F.pad(image, padding)


def _check_values(ras: Volume, spacing_mm: float, channels: int) -> None:
    voxels = math.prod(max(1, math.ceil(extent / spacing_mm)) for extent in ras.extent_mm)
    if voxels * channels > MAX_VALUES:
        extent = " x ".join(f"{side:.0f}" for side in ras.extent_mm)
        raise InputError(
            f"the field of view is {extent} mm: {voxels / 1e6:.0f} million voxels of {channels} features, at most "
            f"{MAX_VALUES / channels / 1e6:.0f} million fit into memory; choose coarser or fewer levels, correct the "
            "voxel size in the header, or crop the scan to the head"
        )


# ------------------------------------------------------------------------------------------ the network's pass


def _run(
    padded: torch.Tensor, model: Model, device: torch.device, levels: Sequence[int], mixed_precision: bool
) -> list[torch.Tensor]:
    """Features float16 (C_l, d_l, h_l, w_l) of each level on the CPU, of the whole padded image (D, H, W)."""
    use_bf16 = mixed_precision and has_native_bf16(device)

    def run(tile: torch.Tensor) -> list[torch.Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bf16):
            found = model.network(tile[None, None].to(device))
        return [found[level][0] for level in levels]

    if padded.numel() <= max(WHOLE_RUN_VOXELS, math.prod(model.window)):
        return [found.half().cpu() for found in run(padded)]
    cells = [cell_of(model.network, level) for level in levels]
    results = [
        torch.zeros((model.network.channels[level], *(n // cell for n in padded.shape)), dtype=torch.float16)
        for level, cell in zip(levels, cells, strict=True)
    ]
    sides = [-(-side // model.multiple) * model.multiple for side in model.window]
    starts = [_tile_starts(n, side, model.multiple) for n, side in zip(padded.shape, sides, strict=True)]
    shares = [
        [_tile_shares(n // cell, [s // cell for s in first], min(side, n) // cell) for cell in cells]
        for n, first, side in zip(padded.shape, starts, sides, strict=True)
    ]  # of each axis, level and tile
    for number in product(*(range(len(first)) for first in starts)):
        corner = [first[i] for first, i in zip(starts, number, strict=True)]
        tile = padded[tuple(slice(s, s + side) for s, side in zip(corner, sides, strict=True))]
        for index, (found, cell) in enumerate(zip(run(tile), cells, strict=True)):
            share = [shares[axis][index][number[axis]] for axis in range(3)]
            where = tuple(slice(s // cell, s // cell + len(w)) for s, w in zip(corner, share, strict=True))
            weight = share[0][:, None, None] * share[1][:, None] * share[2]
            for channel, values in enumerate(found.float().cpu()):
                results[index][channel][where] += (values * weight).half()
    return results


def _tile_starts(n: int, side: int, multiple: int) -> list[int]:
    """First voxels of tiles that cover ``n`` voxels with OVERLAP, each a multiple of ``multiple``."""
    if n <= side:
        return [0]
    count = math.ceil((n - side) / max(multiple, side * (1 - OVERLAP))) + 1
    return sorted({round(i * (n - side) / (count - 1) / multiple) * multiple for i in range(count)})


def _tile_shares(n: int, starts: Sequence[int], side: int) -> list[torch.Tensor]:
    """The share of each tile in the voxels that it covers, float32 (side,) each; all tiles share out to one.

    Linear ramps over the overlaps.
    """
    ramp = torch.minimum(torch.arange(1, side + 1), torch.arange(side, 0, -1)).double()
    total = torch.zeros(n, dtype=torch.float64)
    for start in starts:
        total[start : start + side] += ramp
    return [(ramp / total[start : start + side]).float() for start in starts]


def _joined(
    maps: Sequence[torch.Tensor], levels: Sequence[int], start: Sequence[int], shape: Sequence[int]
) -> torch.Tensor:
    """Features of all levels on the grid of the finest, cut to a box of it, float16 (C, d, h, w)."""
    finest = max(levels)
    box = tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))
    if len(maps) == 1:
        return maps[0][(slice(None), *box)].contiguous()
    result = torch.empty((sum(len(found) for found in maps), *shape), dtype=torch.float16)
    row = 0
    for found, level in zip(maps, levels, strict=True):
        factor = 2 ** (finest - level)
        at_once = max(1, RESIZE_VALUES // (math.prod(found.shape[1:]) * factor**3))
        for part in found.split(at_once):
            if factor > 1:  # a voxel's centre is that of the voxels that grow out of it
                part = F.interpolate(part[None].float(), scale_factor=factor, mode="trilinear")[0]
            result[row : row + len(part)] = part[(slice(None), *box)]
            row += len(part)
    return result
