"""From the network's input to probabilities: in one go or in tiles, once or as the mean of several members.

A member is one way to look at the same image: mirrored, moved by some voxels, with inverted intensities, or at another
resolution. Each runs in turn, so that memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple, Protocol

import numpy as np
import torch

from synthseg.devices import has_native_bf16
from synthseg.errors import CheckpointError
from synthseg.labels import LabelTable
from synthseg.volume import apply_separable, centred_matrix

WHOLE_RUN_VALUES = 420_000_000  # voxels times classes; a larger grid runs in tiles, so that memory stays bounded
WHOLE_RUN_VOXELS = 16_000_000  # the same for the inner layers of the network, which do not grow with the classes
WINDOW_OVERLAP = 0.25
SOFTMAX_VOXELS = 1_000_000  # converted at once
SLAB_PLANES = 8  # of probabilities compared at once
INVERSION_FLOOR = 0.1  # of the intensity range: what is darker is taken as air


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


@dataclass(frozen=True)
class Member:
    """One way to look at an image.

    Attributes
    ----------
    mirrored : left and right are exchanged before the network, and back after it.
    shift : voxels that the image is moved by along each axis; the network's own grid of blocks then lies elsewhere.
    inverted : bright tissue is dark and dark tissue bright; air stays dark.
    zoom : the image is enlarged by this factor; 1.0 leaves the resolution as it is.
    """

    mirrored: bool = False
    shift: tuple[int, int, int] = (0, 0, 0)
    inverted: bool = False
    zoom: float = 1.0


class Prediction(NamedTuple):
    """Class probabilities, float16 (C, D, H, W) on the CPU, and how well the members agree.

    ``agreement`` is, for each class, the Dice between the labels of one member and those of the mean, averaged over
    the members, float64 (C,); NaN where no member found the class, None for a single member.
    """

    probabilities: torch.Tensor
    agreement: np.ndarray | None


def predict(
    image: torch.Tensor,
    model: Model,
    device: torch.device,
    *,
    members: Sequence[Member] = (Member(),),
    mixed_precision: bool = True,
) -> torch.Tensor:
    """Class probabilities, float16 (C, D, H, W) on the CPU, of a conformed image (D, H, W): the mean of the members."""
    return predict_with_agreement(image, model, device, members, mixed_precision).probabilities


def predict_with_agreement(
    image: torch.Tensor,
    model: Model,
    device: torch.device,
    members: Sequence[Member],
    mixed_precision: bool = True,
) -> Prediction:
    """As `predict`, with the agreement of the members. Two arrays of probabilities are held at the most."""
    if len(members) == 1:
        return Prediction(_predict_member(image, model, device, members[0], mixed_precision), None)
    mean = torch.zeros(0)
    guesses = []
    for number, member in enumerate(members, 1):
        values = _predict_member(image, model, device, member, mixed_precision)
        guesses.append(winners(values))
        if number == 1:
            mean = values
        else:
            for plane in range(values.shape[1]):  # a running mean, so that float16 keeps its digits
                mean[:, plane] = torch.lerp(mean[:, plane].float(), values[:, plane].float(), 1 / number).half()
        del values
    return Prediction(mean, _agreement(guesses, winners(mean), len(model.labels)))


def winners(probabilities: torch.Tensor) -> torch.Tensor:
    """Index of the most probable class, uint8 (D, H, W), of probabilities (C, D, H, W)."""
    winner = torch.empty(probabilities.shape[1:], dtype=torch.uint8)
    for start in range(0, winner.shape[0], SLAB_PLANES):
        planes = slice(start, start + SLAB_PLANES)
        winner[planes] = probabilities[:, planes].max(0).indices.to(torch.uint8)  # several times faster than argmax
    return winner


def _agreement(guesses: Sequence[torch.Tensor], reference: torch.Tensor, n_classes: int) -> np.ndarray:
    def voxels(of: torch.Tensor) -> torch.Tensor:
        return torch.bincount(of.flatten(), minlength=n_classes).double()

    scores = torch.zeros(n_classes, dtype=torch.float64)
    for guess in guesses:
        both = voxels(guess[guess == reference])
        total = voxels(guess) + voxels(reference)
        scores += torch.where(total > 0, 2 * both / total, torch.nan).nan_to_num(nan=1.0)
    found = torch.stack([voxels(guess) for guess in (*guesses, reference)]).sum(0) > 0
    return torch.where(found, scores / len(guesses), torch.nan).numpy()


def _predict_member(
    image: torch.Tensor, model: Model, device: torch.device, member: Member, mixed_precision: bool
) -> torch.Tensor:
    """Probabilities, float16 (C, D, H, W), of one member, on the grid of ``image``."""
    seen = image
    if member.inverted:
        seen = inverted(seen)
    if member.zoom != 1.0:
        sides = [max(1, round(n * member.zoom)) for n in image.shape]
        seen = _resized(seen[None], sides)[0]
    if member.mirrored:
        seen = seen.flip(0)
    values = _run(seen, model, device, member.shift, mixed_precision)
    if bool(torch.isnan(values[0]).any()):  # of one voxel all classes are, or none is
        raise CheckpointError(
            "the network gives no numbers for this scan (NaN): its weights or the device are at fault; "
            "get the weights again, or try --device cpu"
        )
    if member.mirrored:
        values = values.flip(1)[torch.as_tensor(model.labels.flip)]
    if member.zoom != 1.0:
        values = _resized_in_turn(values, list(image.shape))
    return values


def inverted(image: torch.Tensor) -> torch.Tensor:
    """Tissue with its intensities turned about, air as it is; in [0, 1].

    What is brighter than INVERSION_FLOOR is mapped onto the same range in reverse.
    """
    tissue = image > INVERSION_FLOOR
    return torch.where(tissue, 1.0 + INVERSION_FLOOR - image, image)


def _resized(values: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """Values (C, D, H, W) on a grid of other size over the same field of view."""
    matrices = [centred_matrix(n, m, 1.0, n / m) for n, m in zip(values.shape[1:], sides, strict=True)]
    return apply_separable(values, matrices)


def _resized_in_turn(values: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """`_resized` for float16, one class at a time."""
    result = torch.empty((values.shape[0], *sides), dtype=values.dtype)
    for index, one in enumerate(values):
        result[index] = _resized(one[None].float(), sides)[0]
    return result


# --------------------------------------------------------------------------------------- one pass, or in tiles


def _run(
    image: torch.Tensor, model: Model, device: torch.device, shift: tuple[int, int, int], mixed_precision: bool
) -> torch.Tensor:
    """Probabilities, float16 (C, D, H, W) on the CPU: in one go if memory allows, else in tiles of the window."""
    use_bf16 = mixed_precision and has_native_bf16(device)
    padding = _padding(image.shape, model.window, model.multiple, shift)
    padded = torch.nn.functional.pad(image, padding)
    before = (padding[4], padding[2], padding[0])
    n_classes = len(model.labels)

    def logits(tile: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bf16):
            return model.network(tile[None, None].to(device))[0]

    limit = min(WHOLE_RUN_VOXELS, WHOLE_RUN_VALUES // n_classes)
    if padded.numel() <= max(limit, int(np.prod(model.window))):
        inside = [slice(start, start + n) for start, n in zip(before, image.shape, strict=True)]
        return _softmax(logits(padded)[(slice(None), *inside)]).cpu()
    result = torch.zeros((n_classes, *image.shape), dtype=torch.float16)
    axes = [_tiles(n, window) for n, window in zip(padded.shape, model.window, strict=True)]
    for tile_d, tile_h, tile_w in product(*axes):
        tile = (tile_d, tile_h, tile_w)
        values = _softmax(logits(padded[tuple(t.span for t in tile)])).cpu()
        _add_tile(result, values, tile, before)
    return result


class _Tile(NamedTuple):
    """The voxels of one tile along an axis, and their share in the result, which all tiles share out to one."""

    span: slice
    share: torch.Tensor


def _tiles(n: int, window: int) -> list[_Tile]:
    """Tiles of ``window`` voxels that cover ``n`` with WINDOW_OVERLAP, Gaussian in their share as in MONAI."""
    if n <= window:
        return [_Tile(slice(0, n), torch.ones(n))]
    count = int(np.ceil((n - window) / max(1, int(window * (1 - WINDOW_OVERLAP))))) + 1
    starts = np.round(np.linspace(0, n - window, count)).astype(int)
    position = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    weight = torch.exp(-0.5 * (position / (0.125 * window)) ** 2).clamp(min=1e-3)
    total = torch.zeros(n, dtype=torch.float64)
    for start in starts:
        total[start : start + window] += weight
    return [_Tile(slice(s, s + window), (weight / total[s : s + window]).float()) for s in starts.tolist()]


def _add_tile(
    result: torch.Tensor, values: torch.Tensor, tile: tuple[_Tile, _Tile, _Tile], before: tuple[int, int, int]
) -> None:
    """Add the probabilities (C, d, h, w) of a tile, times their shares, to where they belong in the result."""
    targets, sources, shares = [], [], []
    for axis, (span, share) in enumerate(tile):
        first = max(span.start, before[axis])
        last = min(span.stop, before[axis] + result.shape[1 + axis])
        if first >= last:
            return
        targets.append(slice(first - before[axis], last - before[axis]))
        sources.append(slice(first - span.start, last - span.start))
        shares.append(share[sources[-1]])
    plane_share = shares[1][:, None] * shares[2][None]
    for offset, plane in enumerate(range(sources[0].start, sources[0].stop)):
        part = values[:, plane, sources[1], sources[2]].float() * (shares[0][offset] * plane_share)
        result[:, targets[0].start + offset, targets[1], targets[2]] += part.half()


def _padding(
    shape: Sequence[int], window: tuple[int, int, int], multiple: int, shift: tuple[int, int, int]
) -> list[int]:
    """Voxels to add before and after each axis, in the order of torch's ``pad`` (last axis first).

    ``shift`` more are added before than without it.
    """
    padding: list[int] = []
    for n, least, moved in zip(reversed(shape), reversed(window), reversed(shift), strict=True):
        missing = -(-max(n + moved, least) // multiple) * multiple - n
        before = min(missing, max(missing - moved, 0) // 2 + moved)
        padding += [before, missing - before]
    return padding


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities, float16, of logits (C, D, H, W), a slab at a time: they are the largest array of all."""
    result = torch.empty(logits.shape, dtype=torch.float16, device=logits.device)
    slab = max(1, SOFTMAX_VOXELS // (logits.shape[2] * logits.shape[3]))
    for start in range(0, logits.shape[1], slab):
        result[:, start : start + slab] = logits[:, start : start + slab].float().softmax(0)
    return result
