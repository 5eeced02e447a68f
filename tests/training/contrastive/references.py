"""The losses as their papers write them: loops over anchors in float64, by autograd where a part is detached."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tests.training.contrastive.examples import Example

Reference = Callable[[Example, float, float], torch.Tensor]
ZERO = torch.zeros((), dtype=torch.float64)


def mean(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(values).mean() if values else ZERO


def pairs(example: Example, temperature: float) -> list[tuple[int, list[torch.Tensor], list[int], torch.Tensor]]:
    """Of every anchor: its index, the similarities of its positives, its negatives, and all its inner products."""
    z, out = example.embeddings, []
    for i in range(len(z)):
        products = torch.stack([z[i] @ z[j] for j in range(len(z))])
        positive = [j for j in range(len(z)) if example.positives[i, j] and j != i]
        negative = [j for j in range(len(z)) if j != i and not example.positives[i, j] and example.weights[i, j] > 0]
        out.append((i, [products[j] / temperature for j in positive], negative, products))
    return out


def weighted_exponentials(example: Example, i: int, negative: list[int], scores: torch.Tensor) -> torch.Tensor:
    return sum((float(example.weights[i, j]) * torch.exp(scores[j]) for j in negative), ZERO)


def info_nce(example: Example, temperature: float, beta: float) -> torch.Tensor:
    losses = []
    for i, positive, negative, products in pairs(example, temperature):
        others = weighted_exponentials(example, i, negative, products / temperature)
        if positive:
            losses.append(mean([-torch.log(torch.exp(s) / (torch.exp(s) + others)) for s in positive]))
    return mean(losses)


def decoupled(example: Example, temperature: float, beta: float) -> torch.Tensor:
    losses = []
    for i, positive, negative, products in pairs(example, temperature):
        others = weighted_exponentials(example, i, negative, products / temperature)
        if positive and negative:
            losses.append(mean([-torch.log(torch.exp(s) / others) for s in positive]))
    return mean(losses)


def sup_con(example: Example, temperature: float, beta: float) -> torch.Tensor:
    losses = []
    for i, positive, negative, products in pairs(example, temperature):
        others = weighted_exponentials(example, i, negative, products / temperature)
        total = sum((torch.exp(s) for s in positive), ZERO) + others
        if positive:
            losses.append(mean([-torch.log(torch.exp(s) / total) for s in positive]))
    return mean(losses)


def hard(example: Example, temperature: float, beta: float) -> torch.Tensor:
    """HUCL and HSCL: the expectation under weights tilted by e^{beta x}, which have no gradient."""
    losses = []
    for i, positive, negative, products in pairs(example, temperature):
        tilt = {j: float(example.weights[i, j]) * math.exp(beta * float(products[j].detach())) for j in negative}
        total = sum(tilt.values())
        expectation = sum((tilt[j] / total * torch.exp(products[j] / temperature) for j in negative), ZERO)
        if positive:
            losses.append(mean([-torch.log(torch.exp(s) / (torch.exp(s) + expectation)) for s in positive]))
    return mean(losses)


def plain(example: Example, temperature: float, beta: float) -> torch.Tensor:
    return hard(example, temperature, 0.0)


def cliques(example: Example) -> list[list[int]]:
    """The views of each point that has two or more, in order."""
    found = []
    for i in range(len(example.embeddings)):
        views = [j for j in range(len(example.embeddings)) if j == i or example.positives[i, j]]
        if len(views) > 1 and views[0] == i:
            found.append(views)
    return found


def multi_view_info_nce(example: Example, temperature: float, beta: float) -> torch.Tensor:
    anchors = pairs(example, temperature)
    losses = []
    for views in cliques(example):
        alike = sum((torch.exp(s) for i in views for s in anchors[i][1]), ZERO)
        others = sum(
            (weighted_exponentials(example, i, anchors[i][2], anchors[i][3] / temperature) for i in views), ZERO
        )
        losses.append(-torch.log(alike / (alike + others)))
    return mean(losses)


def dhel(example: Example, temperature: float, beta: float) -> torch.Tensor:
    """In each view, only the negatives that are the same view of another point."""
    anchors = pairs(example, temperature)
    place = {i: views.index(i) for views in cliques(example) for i in views}
    losses = []
    for views in cliques(example):
        energies = []
        for i in views:
            same = [j for j in anchors[i][2] if place.get(j, 0) == place[i]]
            energies.append(weighted_exponentials(example, i, same, anchors[i][3] / temperature))
        alike = sum(
            (torch.exp(anchors[i][3][j] / temperature) for a, i in enumerate(views) for j in views[a + 1 :]), ZERO
        )
        if all(float(e.detach()) > 0 for e in energies):
            losses.append(-torch.log(alike / math.prod(energies)))
    return mean(losses)


def pix_pro(example: Example, temperature: float, beta: float) -> torch.Tensor:
    z = example.embeddings / example.embeddings.norm(dim=1, keepdim=True)
    place = {i: views.index(i) for views in cliques(example) for i in views}
    losses = []
    for i in range(len(z)):
        own = [j for j in range(len(z)) if place.get(j, 0) == place.get(i, 0)]
        smooth = sum((torch.relu(z[i] @ z[j]) ** 2 * z[j] for j in own), 0 * z[0])
        targets = [z[j].detach() for j in range(len(z)) if example.positives[i, j] and j != i]
        if targets:
            losses.append(mean([-(smooth @ t) / smooth.norm() for t in targets]))
    return mean(losses)


def mochi(example: Example, temperature: float, beta: float, mixed: int = 32, hardest: int = 64) -> torch.Tensor:
    z, losses = example.embeddings, []
    unit = (z / z.norm(dim=1, keepdim=True)).detach()
    for i, positive, negative, products in pairs(example, temperature):
        ranked = sorted(negative, key=lambda j: -float(products[j].detach()))[:hardest]
        count = len(ranked)
        others = weighted_exponentials(example, i, negative, products / temperature)
        for step in range(1, mixed + 1):
            u, v, share = (step * x % 1 for x in ((1 + math.sqrt(5)) / 2, math.sqrt(2), math.sqrt(3)))
            if count > 0:
                first = int(u * count)
                blend = share / 2 * unit[i] + (1 - share / 2) * unit[ranked[first]]
                others = others + torch.exp(z[i] @ blend / blend.norm() / temperature)
            if count > 1:
                second = (first + 1 + int(v * (count - 1))) % count
                assert second != first
                blend = share * unit[ranked[first]] + (1 - share) * unit[ranked[second]]
                others = others + torch.exp(z[i] @ blend / blend.norm() / temperature)
        if positive:
            losses.append(mean([-torch.log(torch.exp(s) / (torch.exp(s) + others)) for s in positive]))
    return mean(losses)


def barlow_twins(example: Example, temperature: float, beta: float) -> torch.Tensor:
    """Correlation matrices by hand, over the points that have every view."""
    found = cliques(example)
    most = max(len(views) for views in found)
    whole = [views for views in found if len(views) == most]
    losses = []
    for a in range(most):
        for b in range(a + 1, most):
            one, two = (example.embeddings[[views[v] for views in whole]] for v in (a, b))
            one, two = ((x - x.mean(0)) / (x.std(0) + 1e-6) for x in (one, two))
            total = ZERO
            for i in range(one.shape[1]):
                for j in range(one.shape[1]):
                    c = (one[:, i] * two[:, j]).sum() / len(whole)
                    total = total + ((1 - c) ** 2 if i == j else 5e-3 * c**2)
            losses.append(total)
    return mean(losses)


def equiangular(example: Example, temperature: float, beta: float, classes: int = 7) -> torch.Tensor:
    """By the angles alone: any frame of unit vectors with cosine -1 / (classes - 1) is a rotation of ours."""
    from synthseg.training.contrastive import simplex_frame

    frame = simplex_frame(classes, example.embeddings.shape[1])
    losses = []
    for z, label in zip(example.embeddings, example.labels.tolist(), strict=True):
        scores = torch.stack([z @ vector / temperature for vector in frame])
        losses.append(-torch.log(torch.exp(scores[label]) / torch.exp(scores).sum()))
    return mean(losses)


REFERENCES: dict[str, Reference] = {
    "info_nce": info_nce,
    "decoupled": decoupled,
    "sup_con": sup_con,
    "ucl": plain,
    "scl": plain,
    "hucl": hard,
    "hscl": hard,
    "mochi": mochi,
    "multi_view_info_nce": multi_view_info_nce,
    "dhel": dhel,
    "pix_pro": pix_pro,
    "barlow_twins": barlow_twins,
    "equiangular": equiangular,
}
