"""The family of contrastive losses: each a few lines, all with the arguments of `rows.Loss`.

Embeddings come from the projection heads (`projections`), positives and weights from the sampled voxels (`sampling`).
Similarities are s = z_i . z_j / temperature. Every formula is the mean over the anchors that have what it needs.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations, product

import torch
import torch.nn.functional as F

from synthseg.training.contrastive.rows import (
    Loss,
    PairTemperature,
    Rows,
    Temperature,
    by_rows,
    check,
    points_and_views,
)

UNKNOWN = 255  # label of what may be one of several classes
MIXED, HARDEST = 32, 64  # MoCHi: negatives mixed of each kind for each anchor, and the hardest that they are mixed of
SHARPNESS = 2.0  # PixPro: exponent of the similarity by which a voxel's features are averaged
OFF_DIAGONAL = 5e-3  # Barlow Twins: weight of correlations between dimensions

Values = tuple[torch.Tensor, torch.Tensor]


@by_rows()
def info_nce(rows: Rows) -> Values:
    """-log e^{s+} / (e^{s+} + sum e^{s-}), mean over the positives. With two views: SimCLR (Chen et al., ICML 2020)."""
    return _per_positive(rows, rows.log_negatives())


@by_rows()
def decoupled(rows: Rows) -> Values:
    """-log e^{s+} / sum e^{s-}: no positive in the denominator (DCL, Yeh et al., ECCV 2022)."""
    counted = rows.has_positives & rows.has_negatives
    return rows.log_negatives() - rows.mean_of_pairs(rows.positive_similarity), counted


@by_rows()
def sup_con(rows: Rows) -> Values:
    """-log e^{s+} / (sum of all positives and negatives), mean over the positives (Khosla et al., NeurIPS 2020).

    With labels as positives and two views of one label volume: anatomix (Dey et al., ICLR 2025), at temperature 0.33.
    """
    everything = rows.log_sum(rows.similarity, rows.negative | rows.positives)
    return everything - rows.mean_of_pairs(rows.positive_similarity), rows.has_positives


@by_rows()
def ucl(rows: Rows) -> Values:
    """-log e^{s+} / (e^{s+} + mean e^{s-}), mean over the positives; negatives are all other points.

    UCL of Jiang et al., arXiv 2311.05139: the hard-negative loss at beta 0.
    """
    return _per_positive(rows, _log_expectation(rows, 0.0))


@by_rows()
def hucl(rows: Rows) -> Values:
    """-log e^{s+} / (e^{s+} + E_q e^{s-}) with negatives drawn from q ~ e^{beta z.z-} (detached).

    Hard-negative sampling: Robinson et al., ICLR 2021; HUCL of Jiang et al., arXiv 2311.05139. Never below `ucl`. beta
    multiplies z.z-, which the temperature does not divide. So do Jiang et al., whose values (2 to 30) are for
    temperature 1; Robinson et al. apply theirs after the temperature, and beta here is theirs over the temperature.
    """
    return _per_positive(rows, _log_expectation(rows, rows.beta))


@by_rows()
def scl(rows: Rows) -> Values:
    """`ucl` with labels: positives are of the same label, negatives of others (SCL, arXiv 2311.05139)."""
    return _per_positive(rows, _log_expectation(rows, 0.0))


@by_rows()
def hscl(rows: Rows) -> Values:
    """`hucl` with labels: positives are of the same label, negatives of others (HSCL, arXiv 2311.05139)."""
    return _per_positive(rows, _log_expectation(rows, rows.beta))


@by_rows()
def mochi(rows: Rows) -> Values:
    """`info_nce` with more negatives, mixed of the hardest: MoCHi (Kalantidis et al., NeurIPS 2020).

    Of each anchor's hardest negatives, pairs are mixed with each other, and single ones with the anchor itself, which
    has the smaller share; mixtures have length 1 and no gradient. Which are mixed, and how, follows low-discrepancy
    sequences over their ranks instead of chance: the loss is a pure function of the embeddings.
    """
    hardest, at = (
        rows.similarity.detach().masked_fill(~rows.negative, -torch.inf).topk(min(HARDEST, len(rows.embeddings)), 1)
    )
    found = hardest.isfinite().sum(1)[:, None]  # hard negatives that there are, (R, 1)
    steps = torch.arange(1, MIXED + 1, device=at.device, dtype=rows.embeddings.dtype)
    u, v, share = ((steps * root).frac() for root in (5**0.5 / 2 + 0.5, 2**0.5, 3**0.5))
    first = (u * found).long().clamp_max(at.shape[1] - 1)
    second = (first + 1 + (v * (found - 1)).long()) % found.clamp_min(1)
    keys = F.normalize(rows.embeddings.detach(), dim=1)
    one, two = keys[at.gather(1, first)], keys[at.gather(1, second)]  # (R, MIXED, E)
    own = keys[rows.index][:, None]
    share = share[:, None]
    mixtures = torch.cat([share * one + (1 - share) * two, share / 2 * own + (1 - share / 2) * one], 1)
    scores = torch.einsum("re,rme->rm", rows.anchors, F.normalize(mixtures, dim=2)) / rows.temperature
    possible = torch.cat([(found > 1).expand(-1, MIXED), (found > 0).expand(-1, MIXED)], 1)
    mixed = torch.logsumexp(scores.masked_fill(~possible, -torch.inf), 1)
    alone = ~rows.has_negatives
    both = torch.logaddexp(rows.log_negatives().masked_fill(alone, 0), mixed.masked_fill(alone, 0))
    return _per_positive(rows, both.masked_fill(alone, -torch.inf))


@by_rows(grouped=True)
def multi_view_info_nce(rows: Rows) -> Values:
    """One term for each point: all its pairs of views over all pairs that its views are in.

    MV-InfoNCE (Koromilas et al., arXiv 2507.06979), for any number of views.
    """
    alike = rows.by_point(rows.positive_similarity, rows.pairs[0])
    everything = rows.by_point(rows.log_sum(rows.similarity, rows.negative | rows.positives))
    return everything - alike, ~alike.isneginf()


@by_rows(grouped=True)
def dhel(rows: Rows) -> Values:
    """-log sum_{v<w} e^{s_vw} + sum_v log sum e^{s-} for each point, with the negatives of each view v alone.

    DHEL for two views (Koromilas et al., ICML 2024), MV-DHEL for more (arXiv 2507.06979): alignment and uniformity are
    apart. Points count that have two views or more, each with a negative.
    """
    energy = rows.log_sum(rows.similarity, rows.negative & (rows.view[:, None] == rows.views))
    alone = energy.isneginf()
    energies = energy.new_zeros(rows.points).index_add(0, rows.point, energy.masked_fill(alone, 0))
    lacking = alone.new_zeros(rows.points).index_fill(0, rows.point[alone], True)
    alike = rows.by_point(rows.positive_similarity, rows.pairs[0]) - math.log(2)  # each pair was counted both ways
    return energies - alike, ~(lacking | alike.isneginf())


@by_rows(grouped=True)
def pix_pro(rows: Rows) -> Values:
    """-cos between a voxel's smoothed features in one view and its features in the others.

    After PixPro (Xie et al., CVPR 2021). Smoothed (pixel propagation): the sum of the features of the view, weighted by
    the square of their cosine with the voxel's own, where that is positive. The other view is a target without
    gradient. There are no negatives: smoothing and the stopped gradient are all that works against collapse. All voxels
    of a view count as one image: give each head a leading index of its own.

    Left out: the momentum network that makes the targets; the transform g of the features that are summed; positives
    within a distance (here the same point alone). The sum is over the sampled voxels of a view, not over all.
    """
    unit = F.normalize(rows.embeddings, dim=1)
    anchors = unit[rows.index]
    near = (anchors @ unit.T).clamp_min(0) ** SHARPNESS * (rows.view[:, None] == rows.views)
    smoothed = F.normalize(near @ unit, dim=1)
    row, column = rows.pairs
    return -rows.mean_of_pairs((smoothed[row] * unit.detach()[column]).sum(1)), rows.has_positives


def barlow_twins(
    embeddings: torch.Tensor,
    positives: torch.Tensor,
    weights: torch.Tensor,
    *,
    temperature: Temperature = 0.33,
    beta: float = 5.0,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Correlations between the dimensions of two views: 1 with the same, 0 with others (Zbontar et al., ICML 2021).

    MONAI's loss, mean over the pairs of views. Only points that have every view count. There are no negatives, and
    embeddings need no projection to a sphere: each dimension is standardised.
    """
    from monai.losses import BarlowTwinsLoss

    check(embeddings, positives, weights)
    loss = BarlowTwinsLoss(lambd=OFF_DIAGONAL)
    z = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    lead, n = z.shape[:-2], z.shape[-2]
    masks = positives.expand(*lead, n, n)
    found = []
    for at in product(*(range(k) for k in lead)):
        views = _aligned(masks[at].clone().fill_diagonal_(False))
        if views.shape[1] > 1:
            with torch.autocast(z.device.type, enabled=False):
                found += [loss(z[at][a], z[at][b]) for a, b in combinations(views, 2)]
    return torch.stack(found).mean() if found else z.sum() * 0.0


def _aligned(positives: torch.Tensor) -> torch.Tensor:
    """Indices (V, M) of the views of every point that has all V; empty if there are no two views."""
    point, view = points_and_views(positives)
    if not bool(positives.any()):
        return point.new_zeros((0, 0))
    views = int(view.max()) + 1
    order = point.argsort(stable=True)
    complete = torch.bincount(point, minlength=len(point))[point[order]] == views
    return order[complete].unflatten(0, (-1, views)).T


def equiangular(
    embeddings: torch.Tensor,
    positives: torch.Tensor,
    weights: torch.Tensor,
    *,
    temperature: Temperature = 0.33,
    beta: float = 5.0,
    labels: torch.Tensor | None = None,
    classes: int | None = None,
) -> torch.Tensor:
    """Cross-entropy against fixed class vectors at equal angles (equiangular basis vectors, Shen et al., CVPR 2023).

    The vectors are those of `simplex_frame`, so that class means reach neural collapse's geometry by construction.
    Embeddings whose label is `UNKNOWN` are left out.

    Parameters
    ----------
    labels : required; integer, broadcast to (..., N), below ``classes``.
    classes : E + 1, the most that have equal angles in E dimensions, unless given.

    Raises ValueError without labels, if a label is no class, or if there are too many classes for the dimensions.
    """
    if labels is None:
        raise ValueError("the equiangular loss has a fixed vector for each class: pass labels=, integer (..., N)")
    check(embeddings, positives, weights)
    z = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    classes = z.shape[-1] + 1 if classes is None else classes
    labels = labels.expand(z.shape[:-1]).long()
    known = labels != UNKNOWN
    if bool((known & ((labels < 0) | (labels >= classes))).any()):
        raise ValueError(f"labels must lie in 0 ... {classes - 1} (or be {UNKNOWN}, unknown), got {int(labels.max())}")
    frame = simplex_frame(classes, z.shape[-1]).to(z)
    scale = temperature.center if isinstance(temperature, PairTemperature) else temperature
    if isinstance(scale, torch.Tensor):
        scale = scale.to(z)[..., None, None]
    with torch.autocast(z.device.type, enabled=False):
        logits = z @ frame.T / scale
        total = F.cross_entropy(logits[known], labels[known], reduction="sum")
    return total / known.sum().clamp_min(1)


@cache
def simplex_frame(classes: int, dimensions: int) -> torch.Tensor:
    """Unit vectors with cosine -1 / (classes - 1) between any two (a simplex), float64 (classes, dimensions).

    Raises ValueError if there are more than ``dimensions + 1`` classes, or fewer than two.
    """
    if not 2 <= classes <= dimensions + 1:
        raise ValueError(
            f"{dimensions} dimensions hold 2 to {dimensions + 1} vectors at equal angles, got {classes} classes; "
            "raise 'dimensions' of the contrast"
        )
    basis = torch.zeros(classes, dimensions, dtype=torch.float64)  # Helmert: orthonormal, and orthogonal to (1, ..., 1)
    for k in range(1, classes):
        basis[:k, k - 1] = 1 / math.sqrt(k * (k + 1))
        basis[k, k - 1] = -k / math.sqrt(k * (k + 1))
    return basis * math.sqrt(classes / (classes - 1))


def _per_positive(rows: Rows, log_others: torch.Tensor) -> Values:
    """-log e^{s+} / (e^{s+} + e^{log_others}), mean over the positives of each anchor."""
    values = F.softplus(log_others[rows.pairs[0]] - rows.positive_similarity)
    return rows.mean_of_pairs(values), rows.has_positives


def _log_expectation(rows: Rows, beta: float) -> torch.Tensor:
    """log of the expectation of e^{s-} over the negatives, drawn by their weights and e^{beta z.z-}, (R,)."""
    tilt = beta * rows.cosines.detach()
    total = rows.log_sum(tilt, rows.negative)
    alone = total.isneginf()
    found = rows.log_sum(rows.similarity + tilt, rows.negative)
    return (found - total.masked_fill(alone, 0)).masked_fill(alone, -torch.inf)


LOSSES: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (
        *(info_nce, decoupled, sup_con, ucl, scl, hucl, hscl, mochi, multi_view_info_nce, dhel, pix_pro),
        *(barlow_twins, equiangular),
    )
}
