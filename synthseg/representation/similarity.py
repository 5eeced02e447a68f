"""Structural similarity of volumes inside a mask, at one and at several scales.

SSIM: Wang et al., IEEE TIP 2004; MS-SSIM: Wang et al., Asilomar 2003. The windows are separable and applied as band
matrices, many times faster on a CPU than the dense 11 x 11 x 11 kernels of MONAI, which gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from synthseg.volume import apply_separable

WINDOW, SIGMA = 11, 1.5  # voxels
STABLE = (0.01**2, 0.03**2)  # for values in [0, 1]
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


class Similarity(NamedTuple):
    """Means over the pairs: absolute difference, SSIM and MS-SSIM."""

    l1: float
    ssim: float
    ms_ssim: float


def similarity(maps: torch.Tensor, mask: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> Similarity:
    """Compare maps (V, d, h, w) in [0, 1] pair by pair inside a mask, bool (d, h, w).

    The window is Gaussian, 11 voxels wide with a standard deviation of 1.5, and inside the volume; in a volume
    smaller than that it is as wide as the volume. MS-SSIM takes as many of its five scales as keep a whole window in
    the volume and a voxel in the mask, the weights of the scales then sum to one.
    """
    l1 = torch.stack([(maps[i] - maps[j]).abs()[mask].mean() for i, j in pairs]).mean()
    terms: list[tuple[torch.Tensor, torch.Tensor]] = []
    inside = mask
    for _ in SCALE_WEIGHTS:
        found = _ssim_and_contrast(maps, inside, pairs)
        terms.append(found)
        maps = F.avg_pool3d(maps[:, None], 2)[:, 0] if min(maps.shape[1:]) >= 2 * WINDOW else maps[:, :0]
        if maps.numel() == 0:
            break
        inside = F.avg_pool3d(inside[None, None].float(), 2)[0, 0] >= 0.5
        if not bool(_middle(inside).any()):
            break
    weights = torch.tensor(SCALE_WEIGHTS[: len(terms)], device=maps.device)
    weights = weights / weights.sum()
    by_scale = torch.stack([contrast for _, contrast in terms[:-1]] + [terms[-1][0]])  # (scales, pairs)
    ms_ssim = (by_scale.clamp(min=0) ** weights[:, None]).prod(0)
    return Similarity(float(l1), float(terms[0][0].mean()), float(ms_ssim.mean()))


def _ssim_and_contrast(
    maps: torch.Tensor, mask: torch.Tensor, pairs: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean SSIM, and mean of its contrast and structure term, for each pair, (pairs,)."""
    windows = [_window_matrix(n).to(maps.device) for n in maps.shape[1:]]
    seen = _middle(mask)
    if not bool(seen.any()):  # a mask at the very border
        seen = torch.ones_like(seen)
    mean = apply_separable(maps, windows)
    variance = apply_separable(maps * maps, windows) - mean * mean
    c1, c2 = STABLE
    values, contrasts = [], []
    for i, j in pairs:
        covariance = apply_separable((maps[i] * maps[j])[None], windows)[0] - mean[i] * mean[j]
        contrast = (2 * covariance + c2) / (variance[i] + variance[j] + c2)
        luminance = (2 * mean[i] * mean[j] + c1) / (mean[i] ** 2 + mean[j] ** 2 + c1)
        values.append((luminance * contrast)[seen].mean())
        contrasts.append(contrast[seen].mean())
    return torch.stack(values), torch.stack(contrasts)


def _middle(mask: torch.Tensor) -> torch.Tensor:
    """The voxels of a mask (d, h, w) that windows are centred on."""
    sides = []
    for n in mask.shape:
        margin = (_width(n) - 1) // 2
        sides.append(slice(margin, n - margin))
    return mask[tuple(sides)]


def _width(n: int) -> int:
    """Width of the window along a side of ``n`` voxels: odd."""
    return min(WINDOW, n if n % 2 else n - 1) if n > 1 else 1


def _window_matrix(n: int) -> torch.Tensor:
    """The Gaussian window at each place of a side of ``n`` voxels that holds it whole, float32 (n - width + 1, n)."""
    width = _width(n)
    position = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    weight = torch.exp(-0.5 * (position / SIGMA) ** 2)
    weight = (weight / weight.sum()).float()
    matrix = torch.zeros(n - width + 1, n)
    for row in range(len(matrix)):
        matrix[row, row : row + width] = weight
    return matrix
