"""Projection heads: features of voxels to embeddings that are compared. They are dropped after pretraining."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from synthseg.config.pretraining import ContrastConfig
from synthseg.training.contrastive.rows import PairTemperature, Temperature

KEY_CHANNELS = 16  # of the vectors whose inner product gives a pair its temperature
TEMPERATURES = (0.1, 10.0)  # bounds of the temperature of a pair, in units of the configured one


def to_sphere(embeddings: torch.Tensor) -> torch.Tensor:
    """Embeddings (..., E) scaled to length 1."""
    return F.normalize(embeddings, dim=-1)


def to_ball(embeddings: torch.Tensor) -> torch.Tensor:
    """Embeddings (..., E) in the unit ball: shrunk to length 1 where they are longer (arXiv 2311.05139)."""
    return embeddings / torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True).clamp_min(1.0)


class Projection(nn.Module):
    """Features (..., N, C) of one level to embeddings (H, ..., N, E), one for each head, with its temperatures.

    A head is an MLP of three layers (as in anatomix, Dey et al., ICLR 2025). Layer normalisation between them keeps
    each voxel's embedding its own, whatever else is in the batch. Several heads see several kinds of likeness, each
    with temperatures of its own (AMCL, Wang et al., ECCV 2024).
    """

    def __init__(self, in_channels: int, config: ContrastConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = nn.ModuleList(_mlp(in_channels, config.hidden, config.dimensions) for _ in range(config.heads))
        adaptive = config.heads if config.adaptive_temperature else 0
        self.keys = nn.ModuleList(nn.Linear(config.dimensions, KEY_CHANNELS, bias=False) for _ in range(adaptive))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Embeddings on the unit sphere, in the unit ball, or as they are, by ``config.projection``; float32."""
        flat = features.flatten(0, -2)
        found = torch.stack([head(flat) for head in self.heads]).unflatten(1, features.shape[:-1]).float()
        if self.config.projection == "sphere":
            return to_sphere(found)
        return to_ball(found) if self.config.projection == "ball" else found

    def temperature(self, embeddings: torch.Tensor) -> Temperature:
        """What to pass to a loss with these embeddings (H, ..., N, E): a number, or one for each pair if adaptive."""
        center = self.config.temperature
        if not self.config.adaptive_temperature:
            return center
        keys = torch.stack([key(own) for key, own in zip(self.keys, embeddings, strict=True)])
        low, high = (factor * center for factor in TEMPERATURES)
        return PairTemperature(keys, center, low, high)


def _mlp(in_channels: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(in_channels, hidden, bias=False), nn.LayerNorm(hidden), nn.ReLU(inplace=True)),
        *(nn.Linear(hidden, hidden, bias=False), nn.LayerNorm(hidden), nn.ReLU(inplace=True)),
        nn.Linear(hidden, out),
    )
