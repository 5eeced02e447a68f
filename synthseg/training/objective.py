"""What is trained in pretraining: features with their heads, and projections of sampled voxels of their levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from synthseg.config import PretrainConfig
from synthseg.networks.features import FeatureNetwork
from synthseg.training.contrastive import Projection, Voxels

ANATOMY, SEGMENTATION = "anatomy", "segmentation"  # names of the heads that are kept


class Seen(NamedTuple):
    """What the network makes of a batch of N images.

    Attributes
    ----------
    t1 : (N, 1, D, H, W), or None. logits : (N, C, D, H, W) or (N, C, K, d, h, w), or None.
    embeddings : for each sampled level of each term (heads, R, E), of the voxels that were asked for.
    """

    t1: torch.Tensor | None
    logits: torch.Tensor | None
    embeddings: list[torch.Tensor]


class Objective(nn.Module):
    """All that is trained: features with their heads, and a projection for each level of each contrastive term."""

    def __init__(self, config: PretrainConfig, classes: int) -> None:
        super().__init__()
        heads = {ANATOMY: 1} if config.anatomy_weight > 0 else {}
        heads |= {SEGMENTATION: classes} if config.segmentation_weight > 0 else {}
        self.features = FeatureNetwork(config.network, heads)
        self.levels = [level for term in config.contrast for level in term.sampling.levels]
        self.projections = nn.ModuleList(
            Projection(self.features.channels[level], term)
            for term in config.contrast
            for level in term.sampling.levels
        )

    def forward(
        self,
        images: torch.Tensor,
        cells: torch.Tensor | None = None,
        places: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> Seen:
        """``places``: for each projection the image (R,) and the flat voxel of its level (R,) that are embedded."""
        found = self.features(images)
        heads = self.features.heads
        t1 = self.features.head(ANATOMY, found[-1]) if ANATOMY in heads else None
        logits = self.features.head(SEGMENTATION, found[-1], cells) if SEGMENTATION in heads else None
        embeddings = []
        for level, projection, (image, voxel) in zip(self.levels, self.projections, places, strict=True):
            columns = found[level].permute(0, 2, 3, 4, 1).flatten(1, 3)  # a view where channels come last
            embeddings.append(projection(columns[image, voxel]))
        if t1 is None and logits is None and -1 not in self.levels:  # devices expect a gradient of every weight
            embeddings[0] = embeddings[0] + 0.0 * found[-1].mean()
        return Seen(t1, logits, embeddings)


def places_of(sampled: Sequence[Voxels]) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and flat voxel of every voxel of the anatomies of a batch, int64 (R,): view by view for each anatomy."""
    images, first = [], 0
    for voxels in sampled:
        views = len(voxels.index)
        numbers = torch.arange(first, first + views, device=voxels.index.device)
        images.append(numbers[:, None].expand_as(voxels.index).flatten())
        first += views
    return torch.cat(images), torch.cat([voxels.index.flatten() for voxels in sampled])


def by_view(embeddings: torch.Tensor, sampled: Sequence[Voxels]) -> torch.Tensor:
    """Embeddings (heads, R, E), anatomy by anatomy, in the order of the voxels of all anatomies joined."""
    parts = embeddings.split([len(voxels) for voxels in sampled], 1)
    return torch.cat(
        [part.unflatten(1, voxels.index.shape) for part, voxels in zip(parts, sampled, strict=True)], 2
    ).flatten(1, 2)


@torch.no_grad()
def match(embeddings: torch.Tensor, sampled: Sequence[Voxels]) -> torch.Tensor:
    """Share of the points of an anatomy whose embedding in the last view lies nearest to their own of the first.

    Embeddings (heads, R, E), of which the first head counts, by cosine; mean over the anatomies, NaN without points.
    Points that were drawn twice count as one.
    """
    shares = []
    parts = embeddings[0].split([len(voxels) for voxels in sampled])
    for part, voxels in zip(parts, sampled, strict=True):
        if len(voxels):
            unit = nn.functional.normalize(part.unflatten(0, voxels.index.shape), dim=-1)
            nearest = (unit[0] @ unit[-1].T).argmax(1)
            shares.append((voxels.index[-1][nearest] == voxels.index[-1]).float().mean())
    return torch.stack(shares).mean() if shares else embeddings.new_full((), torch.nan)
