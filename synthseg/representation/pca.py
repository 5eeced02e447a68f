"""Principal components of voxel features: one basis for all scans, so that values and colours compare between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from synthseg.errors import ConfigError
from synthseg.intensity import spread_index

SAMPLE_VOXELS = 50_000  # of each scan, evenly spread over its head
COLOR_PERCENTILES = (2.0, 98.0)  # of each component over all scans: darkest and brightest
SLAB_VOXELS = 500_000  # projected at once


@dataclass(frozen=True, eq=False)
class Pca:
    """An orthonormal basis of the directions in which features vary most.

    Attributes
    ----------
    mean : float32 (C,), what is subtracted first.
    components : float32 (k, C), orthonormal rows, the largest variance first. The largest entry of each is positive.
    explained : float32 (k,), share of the variance.
    low, high : float32 (k,), COLOR_PERCENTILES of the sampled voxels of all scans.
    """

    mean: torch.Tensor
    components: torch.Tensor
    explained: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def first(self, k: int) -> Pca:
        """The first ``k`` of the components."""
        return Pca(self.mean, self.components[:k], self.explained[:k], self.low[:k], self.high[:k])

    def to_dict(self) -> dict[str, Any]:
        """Mean, components and explained variance as lists: what `project` does to further features."""
        names = ("mean", "components", "explained")
        return {name: getattr(self, name).tolist() for name in names}

    def project(self, values: torch.Tensor) -> torch.Tensor:
        """Features (C, d, h, w) as components, float16 (k, d, h, w), on the CPU."""
        if values.shape[0] != len(self.mean):
            raise ValueError(f"the basis is of {len(self.mean)} channels, the features have {values.shape[0]}")
        flat = values.flatten(1)
        result = torch.empty((len(self.components), flat.shape[1]), dtype=torch.float16)
        for start in range(0, flat.shape[1], SLAB_VOXELS):
            part = flat[:, start : start + SLAB_VOXELS].float() - self.mean[:, None]
            result[:, start : start + SLAB_VOXELS] = (self.components @ part).half()
        return result.unflatten(1, values.shape[1:])

    def colors(self, values: torch.Tensor) -> np.ndarray:
        """The first three components of features (C, d, h, w) as red, green and blue, uint8 (d, h, w, 3).

        A basis of fewer components leaves the further colours dark.
        """
        basis = self.first(3)
        low, high = basis.low[:, None, None, None], basis.high[:, None, None, None]
        shown = ((basis.project(values).float() - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        result = np.zeros((*values.shape[1:], 3), dtype=np.uint8)
        result[..., : len(shown)] = (255 * shown).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
        return result


def sample(values: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Features float32 (n, C) of at most SAMPLE_VOXELS voxels of the head, evenly spread; of all if it is empty."""
    where = head.flatten().nonzero()[:, 0] if bool(head.any()) else torch.arange(head.numel())
    where = where[spread_index(len(where), SAMPLE_VOXELS)]
    return values.flatten(1).index_select(1, where).T.float()


def fit_pca(samples: Sequence[torch.Tensor], k: int) -> Pca:
    """The basis of samples (n, C), one of each scan; each scan counts the same.

    Raises ConfigError if there are fewer channels than components asked for.
    """
    if not samples:
        raise ValueError("no features to take components of")
    n_channels = samples[0].shape[1]
    if not 1 <= k <= n_channels:
        raise ConfigError(f"{k} principal components were asked for, and the features have {n_channels} channels")
    mean = torch.stack([one.double().mean(0) for one in samples]).mean(0)
    covariance = torch.zeros(n_channels, n_channels, dtype=torch.float64)
    for one in samples:
        centred = one.double() - mean
        covariance += centred.T @ centred / (len(one) * len(samples))
    variances, axes = torch.linalg.eigh(covariance)
    variances, axes = variances.flip(0).clamp(min=0), axes.flip(1).T
    largest = axes.gather(1, axes.abs().max(1, keepdim=True).indices)
    components = (axes * torch.where(largest < 0, -1.0, 1.0))[:k]
    projected = torch.cat([(one.double() - mean) @ components.T for one in samples]).numpy()
    low, high = (torch.from_numpy(np.percentile(projected, q, axis=0)).float() for q in COLOR_PERCENTILES)
    explained = variances[:k] / variances.sum().clamp(min=1e-30)
    return Pca(mean.float(), components.float(), explained.float(), low, high)
