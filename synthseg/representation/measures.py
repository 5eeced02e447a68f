"""What voxel features are worth, as pure functions of tensors.

Robustness (Brain-ID: Liu et al., ECCV 2024), matching, the geometry of the class means (Papyan et al., PNAS 2020; for
hard negatives arXiv 2311.05139), uniformity (Wang & Isola, ICML 2020), tolerance (Wang & Liu, CVPR 2021) and a linear
probe. Nothing here knows of files, networks or scans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from synthseg.representation.similarity import Similarity, similarity

CHUNK_VALUES = 32_000_000  # of one matrix held at once
PROBE_PENALTY = 1e-3  # weight of the squared coefficients of the probe, beside the mean cross-entropy
PROBE_ITERATIONS = 200


def on_sphere(features: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Features of length one, float32; what is zero stays zero."""
    return F.normalize(features.float(), dim=dim, eps=1e-12)


# ----------------------------------------------------------------------------------------------- robustness


def robustness(
    features: torch.Tensor, mask: torch.Tensor | None = None, *, pairs: Sequence[tuple[int, int]] | None = None
) -> dict[str, float]:
    """Mean likeness of the feature maps of several images of one anatomy (Brain-ID, Liu et al., ECCV 2024).

    Each channel of each image is mapped to [0, 1] by its own smallest and largest value inside the mask, as in the
    authors' code; outside it is 0. Over all pairs of images and all channels: ``l1``, the mean absolute difference
    inside the mask; ``ssim`` and ``ms_ssim``, inside the mask as well. A channel that is constant compares as equal:
    features that hold nothing are perfectly robust, so read these beside those of other subjects, which is the same
    function on features of different anatomies: a good feature is alike within a subject and not between subjects.

    Parameters
    ----------
    features : (V, C, d, h, w), voxel by voxel the same place in all.
    mask : bool (d, h, w), where to compare; None: everywhere.
    pairs : which images are compared; None: each with each.
    """
    if features.ndim != 5 or features.shape[0] < 2:
        raise ValueError(
            f"robustness compares features (V, C, d, h, w) of 2 or more images, got {tuple(features.shape)}"
        )
    n_views, n_channels = features.shape[:2]
    inside = torch.ones(features.shape[2:], dtype=torch.bool, device=features.device) if mask is None else mask.bool()
    if inside.shape != features.shape[2:]:
        raise ValueError(f"the mask is {tuple(inside.shape)}, the features are {tuple(features.shape[2:])}")
    if not bool(inside.any()):
        raise ValueError("the mask is empty: no voxel to compare")
    chosen = [(i, j) for i in range(n_views) for j in range(i + 1, n_views)] if pairs is None else list(pairs)
    total = Similarity(0.0, 0.0, 0.0)
    for channel in range(n_channels):  # one at a time: their statistics are several times as large as they are
        found = similarity(_to_unit_range(features[:, channel].float(), inside), inside, chosen)
        total = Similarity(*(a + b for a, b in zip(total, found, strict=True)))
    l1, ssim, ms_ssim = (value / n_channels for value in total)
    return {"l1": l1, "ssim": ssim, "ms_ssim": ms_ssim}


def _to_unit_range(maps: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Maps (V, d, h, w), each by its own range inside the mask to [0, 1]; 0 outside, and where a map is constant."""
    values = maps[:, inside]
    low, high = values.amin(1), values.amax(1)
    scale = torch.where(high > low, 1 / (high - low).clamp(min=1e-30), torch.zeros_like(low))
    return ((maps - low[:, None, None, None]) * scale[:, None, None, None]).clamp(0, 1) * inside


# ------------------------------------------------------------------------------------------------- matching


def matching_distances(
    a: torch.Tensor,
    b: torch.Tensor,
    mask: torch.Tensor,
    spacing_mm: float | Sequence[float],
    n: int = 2000,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """How far from where it should be the most similar feature of ``b`` lies, mm, float32 (n,).

    ``n`` voxels of the mask are drawn (all, if it has no more); each looks for the feature of ``b`` inside the mask of
    the largest cosine with its own in ``a``.

    Parameters
    ----------
    a, b : (C, d, h, w), voxel by voxel the same place.
    mask : bool (d, h, w): where to look from and where to look.
    spacing_mm : voxel size, one or three.
    generator : a CPU generator that the voxels are drawn by; None: evenly spread.
    """
    spacing = torch.tensor([spacing_mm] * 3 if isinstance(spacing_mm, (int, float)) else list(spacing_mm))
    if a.shape != b.shape or mask.shape != a.shape[1:]:
        shapes = tuple(a.shape), tuple(b.shape), tuple(mask.shape)
        raise ValueError(f"features (C, d, h, w) and a mask (d, h, w) of one grid are compared, got {shapes}")
    places = mask.nonzero()
    if len(places) == 0:
        raise ValueError("the mask is empty: no voxel to match")
    if len(places) <= n:
        asked = torch.arange(len(places))
    elif generator is not None:
        asked = torch.randperm(len(places), generator=generator)[:n]
    else:
        asked = torch.linspace(0, len(places) - 1, n, dtype=torch.float64).round().long()
    asked = asked.to(places.device)
    targets = on_sphere(b[:, mask], 0)  # (C, M)
    queries = on_sphere(a[:, mask].index_select(1, asked), 0).T
    rows = max(1, CHUNK_VALUES // len(places))
    nearest = torch.cat([(part @ targets).max(1).indices for part in queries.split(rows)])
    offset = (places[nearest] - places[asked]).float() * spacing.float().to(places.device)
    return offset.norm(dim=1)


def matching_accuracy(
    a: torch.Tensor,
    b: torch.Tensor,
    mask: torch.Tensor,
    spacing_mm: float | Sequence[float],
    within_mm: float = 2.0,
    n: int = 2000,
    generator: torch.Generator | None = None,
) -> float:
    """Share of voxels whose most similar feature in another image of the same anatomy lies within ``within_mm``.

    On a grid coarser than that, within one voxel (along its longest edge): `matching_radius_mm`. Parameters as in
    `matching_distances`.
    """
    distances = matching_distances(a, b, mask, spacing_mm, n, generator)
    return float((distances <= matching_radius_mm(spacing_mm, within_mm) + 1e-4).float().mean())


def matching_radius_mm(spacing_mm: float | Sequence[float], within_mm: float = 2.0) -> float:
    """What counts as a match: ``within_mm``, or the longest edge of a voxel if that is longer."""
    longest = spacing_mm if isinstance(spacing_mm, (int, float)) else max(spacing_mm)
    return max(within_mm, float(longest))


# ----------------------------------------------------------------------------------------- geometry of classes


def effective_rank(features: torch.Tensor) -> float:
    """Effective number of dimensions that features (N, E) fill: Roy & Vetterli (EUSIPCO 2007), of their covariance.

    The exponential of the entropy of its normalised eigenvalues: E where all dimensions vary alike, 1 on a line, and 0
    where nothing varies.
    """
    centred = features.double() - features.double().mean(0)
    spectrum = torch.linalg.svdvals(centred.T @ centred if len(centred) > centred.shape[1] else centred @ centred.T)
    if float(spectrum.sum()) <= 1e-12 * max(1.0, float(features.double().square().sum())):
        return 0.0
    share = spectrum / spectrum.sum()
    share = share[share > 1e-12]
    return math.exp(float(-(share * share.log()).sum()))


def spectrum(features: torch.Tensor) -> torch.Tensor:
    """Share of the variance of features (N, E) along each principal axis, largest first, float64 (E,)."""
    centred = features.double() - features.double().mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred).flip(0).clamp(min=0)
    return values / values.sum().clamp(min=1e-30)


def class_means(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels that there are, ascending int64 (C,), and the mean of the features (N, E) of each, float64 (C, E)."""
    if len(features) == 0 or features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"expected features (N, E) and labels (N,), got {tuple(features.shape)}, {tuple(labels.shape)}"
        )
    present, index, count = labels.long().unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(present), features.shape[1], dtype=torch.float64, device=features.device)
    return present, sums.index_add_(0, index, features.double()) / count[:, None]


def class_cosines(means: torch.Tensor) -> torch.Tensor:
    """Cosine between each two class means, (C, C)."""
    unit = F.normalize(means, dim=1)
    return unit @ unit.T


def neural_collapse(features: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """How near the class means are to an equiangular frame, and whether dimensions are lost (arXiv 2311.05139).

    For features (N, E) as they are (the paper's lie on the unit sphere, or in the ball; see `on_sphere`) and labels
    (N,) with C classes, with class means µ:

    - ``mean_norm``: ‖mean µ‖, 0 for a frame;
    - ``norm_deviation``: mean |‖µ‖ - 1|;
    - ``equiangular_mean``, ``equiangular_max``: of |cos(µi, µj) + 1/(C-1)| over all pairs, 0 for a frame;
    - ``effective_rank_means``: of the class means, C - 1 for a frame;
    - ``effective_rank``: of all features;
    - ``within_class_spread``: mean ‖z - µ‖ to the own class's mean.
    """
    present, means = class_means(features, labels)
    if len(present) < 2:
        raise ValueError(f"neural collapse compares classes, and the labels hold {len(present)}")
    own = torch.searchsorted(present, labels.long())
    upper = torch.triu_indices(len(present), len(present), 1)
    off = (class_cosines(means)[upper[0], upper[1]] + 1 / (len(present) - 1)).abs()
    return {
        "mean_norm": float(means.mean(0).norm()),
        "norm_deviation": float((means.norm(dim=1) - 1).abs().mean()),
        "equiangular_mean": float(off.mean()),
        "equiangular_max": float(off.max()),
        "effective_rank_means": effective_rank(means),
        "effective_rank": effective_rank(features),
        "within_class_spread": float((features.double() - means[own]).norm(dim=1).mean()),
    }


def uniformity(features: torch.Tensor, t: float = 2.0) -> float:
    """log mean exp(-t ‖x - y‖²) over all pairs of features (N, E) on the unit sphere (Wang & Isola, ICML 2020).

    0 where all are one point; lower is more uniform.
    """
    if len(features) < 2:
        raise ValueError(f"uniformity is one of pairs, got {len(features)} features")
    unit = on_sphere(features)
    rows = max(1, CHUNK_VALUES // len(unit))
    total = 0.0
    for start in range(0, len(unit), rows):
        part = unit[start : start + rows]
        kernel = (2 * t * (part @ unit.T - 1)).exp_()
        own = torch.arange(len(part), device=unit.device)
        kernel[own, own + start] = 0
        total += float(kernel.sum(dtype=torch.float64))
    return math.log(max(total, 1e-300) / (len(unit) * (len(unit) - 1)))


def tolerance(features: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean cosine of two features (N, E) of one label: tolerance to the semantically alike (Wang & Liu, CVPR 2021).

    Over all pairs of different voxels of one label; NaN where no label has two.
    """
    unit = on_sphere(features).double()
    present, index, count = labels.long().unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(present), unit.shape[1], dtype=torch.float64, device=unit.device).index_add_(0, index, unit)
    n_pairs = float((count * (count - 1)).sum())
    return float(sums.square().sum() - unit.square().sum()) / n_pairs if n_pairs else math.nan


def neighbour_tolerance(features: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor | None = None) -> float:
    """Mean cosine of the features (C, d, h, w) of voxels that share a face, both inside the mask (d, h, w).

    With ``labels`` (d, h, w) only those of one label: tolerance to anatomical neighbours. NaN where there are none.
    """
    unit = on_sphere(features, 0)
    total, count = 0.0, 0
    for axis in range(3):
        n = mask.shape[axis]
        low, high = (torch.arange(start, n - 1 + start, device=mask.device) for start in (0, 1))
        both = mask.index_select(axis, low) & mask.index_select(axis, high)
        if labels is not None:
            both &= labels.index_select(axis, low) == labels.index_select(axis, high)
        cosine = (unit.index_select(1 + axis, low) * unit.index_select(1 + axis, high)).sum(0)
        total += float(cosine[both].sum(dtype=torch.float64))
        count += int(both.sum())
    return total / count if count else math.nan


# --------------------------------------------------------------------------------------------- linear probe


def balanced_voxels(labels: torch.Tensor, per_label: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Positions in labels (N,) of at most ``per_label`` voxels of each label, ascending int64.

    Drawn by a CPU generator; without one, evenly spread.
    """
    chosen = []
    for label in labels.unique().tolist():
        where = (labels == label).nonzero()[:, 0]
        if len(where) > per_label and generator is not None:
            where = where[torch.randperm(len(where), generator=generator)[:per_label].to(where.device)]
        elif len(where) > per_label:
            where = where[torch.linspace(0, len(where) - 1, per_label, dtype=torch.float64).round().long()]
        chosen.append(where)
    return torch.cat(chosen).sort().values if chosen else torch.zeros(0, dtype=torch.int64)


def linear_probe(
    train_features: torch.Tensor, train_labels: torch.Tensor, test_features: torch.Tensor, test_labels: torch.Tensor
) -> dict[int, float]:
    """Dice of each label (Dice 1945) when one linear layer reads it from frozen features (N, E), labels (N,).

    Multinomial logistic regression with an L2 penalty, on channels standardised by the training voxels, fitted by
    L-BFGS from zero: convex, so that it has one answer and no learning rate. Train on balanced voxels
    (`balanced_voxels`), or rare labels are not worth their while; test on all. Labels of either side have an entry; 0
    where only one side or the prediction has it.
    """
    classes, target = train_labels.long().unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"a probe tells labels apart, and the training voxels hold {len(classes)}")
    mean, std = train_features.float().mean(0), train_features.float().std(0).clamp(min=1e-6)
    inputs = (train_features.float() - mean) / std
    # With autograd on: the caller may well be inside no_grad.
    with torch.inference_mode(False), torch.enable_grad():
        inputs, target = inputs.detach().clone(), target.clone()
        weight = torch.zeros(inputs.shape[1], len(classes), device=inputs.device, requires_grad=True)
        bias = torch.zeros(len(classes), device=inputs.device, requires_grad=True)
        optimiser = torch.optim.LBFGS([weight, bias], max_iter=PROBE_ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimiser.zero_grad()
            value = F.cross_entropy(inputs @ weight + bias, target) + PROBE_PENALTY * weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimiser.step(loss)  # type: ignore[arg-type]
        scaled = weight.detach() / std[:, None]
        offset = bias.detach() - mean @ scaled
    rows = max(1, CHUNK_VALUES // len(classes))
    guesses = torch.cat([(part.float() @ scaled + offset).max(1).indices for part in test_features.split(rows)])
    return _dice(classes[guesses], test_labels.long(), sorted({*classes.tolist(), *test_labels.unique().tolist()}))


def _dice(guess: torch.Tensor, truth: torch.Tensor, labels: Sequence[int]) -> dict[int, float]:
    scores = {}
    for label in labels:
        predicted, real = guess == label, truth == label
        total = int(predicted.sum()) + int(real.sum())
        scores[int(label)] = 2 * int((predicted & real).sum()) / total if total else math.nan
    return scores
