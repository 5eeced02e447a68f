"""Small sets of embeddings with masks of every kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Example:
    """Embeddings (N, E), float64, with positives, weights of negatives and labels."""

    embeddings: torch.Tensor
    positives: torch.Tensor
    weights: torch.Tensor
    labels: torch.Tensor

    def permuted(self, order: torch.Tensor) -> Example:
        masks = (mask[order][:, order] for mask in (self.positives, self.weights))
        return Example(self.embeddings[order], *masks, self.labels[order])


def make(kind: str, views: int = 3, points: int = 5, dimensions: int = 6, seed: int = 0) -> Example:
    """A set of one of the kinds.

    ``points``: views of points, bool weights. ``weighted``: the same, some weights 0 and some not 1, one point without
    its last view, one anchor without negatives. ``labels``: positives by label; one label has a single member.
    """
    source = torch.Generator().manual_seed(seed)
    n = views * points - (kind == "weighted")
    z = torch.randn((n, dimensions), generator=source, dtype=torch.float64)
    z = z / z.norm(dim=1, keepdim=True)
    point = torch.arange(n) % points
    labels = torch.where(point == points - 1, 2, point % 2)
    if kind == "labels":
        labels[0] = 3
        same = labels[:, None] == labels
        return Example(z, same & ~torch.eye(n, dtype=torch.bool), ~same, labels)
    same = point[:, None] == point
    positives = same & ~torch.eye(n, dtype=torch.bool)
    if kind == "points":
        return Example(z, positives, ~same, labels)
    weights = 2 * torch.rand((n, n), generator=source, dtype=torch.float64)
    weights = weights.masked_fill(
        torch.rand((n, n), generator=source) < 0.2, 0.0
    )  # not 0 at positives: they are ignored
    weights[3] = 0
    return Example(z, positives, weights, labels)


KINDS = ("points", "weighted", "labels")
