"""Soft Dice and cross-entropy with marginal classes, without materialised one-hots; differences of images.

A template may know only a coarser set of labels. Each of its labels then stands for a group of classes, and the
probability of a group is the sum over its classes (Fidon et al., MICCAI 2021: label-set loss functions).
"""

from __future__ import annotations

import math

import torch

SUMS = 2048  # of each group on a GPU, then added up


def group_log_probabilities(logits: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Log-probability of each group of classes: logits (C, N), groups bool (G, C) -> (G, N)."""
    log_p = torch.log_softmax(logits.float(), dim=0)
    if groups.shape[0] == groups.shape[1] and bool((groups == torch.eye(len(groups), device=groups.device)).all()):
        return log_p
    members = [row.nonzero()[:, 0].to(log_p.device, non_blocking=True) for row in groups]
    rows = [torch.logsumexp(log_p[some], dim=0) for some in members]  # keeps a gradient where a probability is tiny
    return torch.stack(rows)


def _sum_by(index: torch.Tensor, values: torch.Tensor, count: int) -> torch.Tensor:
    """Sum of the values (N,) of each index (N,) below ``count``, (count,)."""
    if values.device.type == "cpu":
        return values.new_zeros(count).scatter_add(0, index, values)
    rows = math.gcd(len(values), SUMS)  # many sums side by side: the threads of a GPU would queue for a few
    sums = values.new_zeros(rows, count)
    return sums.scatter_add(1, index.view(rows, -1), values.view(rows, -1)).sum(0)


def dice_and_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, groups: torch.Tensor, smooth: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses of one image.

    Parameters
    ----------
    logits : (C, D, H, W), or any shape after the classes.
    target : group index of each voxel, integer, the shape of one class of ``logits``.
    groups : bool (G, C), the classes that each group stands for; best on the CPU, where reading it holds up nothing.

    Returns
    -------
    1 - mean soft Dice (Milletari et al., 3DV 2016) over the groups that share no class with another and are present
    (background left out), mean cross-entropy over all voxels, and the soft Dice of every group (NaN where not scored).
    A group that holds all classes of another ("any tissue of the brain") says too little: its voxels are left out of
    every Dice. One that overlaps another in part has no well-defined false positives. Both count in the cross-entropy
    alone.
    """
    device, n_groups = logits.device, len(groups)
    log_p = group_log_probabilities(logits.flatten(1), groups)
    index = target.flatten().long()
    picked = log_p.gather(0, index[None])[0]
    cross_entropy = -picked.mean()
    if device.type == "cpu":
        counts = torch.bincount(index, minlength=n_groups).to(log_p.dtype)
    else:  # bincount would wait for the GPU
        counts = _sum_by(index, torch.ones_like(picked), n_groups)
    overlap = _sum_by(index, picked.exp(), n_groups)
    shared = groups.float() @ groups.float().T
    vague = ((shared == groups.sum(1)) & ~torch.eye(n_groups, dtype=torch.bool, device=groups.device)).any(1)
    if bool(vague.any()):
        told = (~vague).to(device, non_blocking=True)[index].to(log_p.dtype)
        predicted = log_p.exp() @ told
    else:
        predicted = log_p.exp().sum(1)
    dice = (2 * overlap + smooth) / (predicted + counts + smooth)
    alone = ~vague & (shared[:, ~vague].count_nonzero(1) == 1)
    present = alone.to(device, non_blocking=True) & (counts > 0)
    scored = present.clone()
    scored[0] = False
    found = scored.sum()
    dice_loss = torch.where(found > 0, 1 - (dice * scored).sum() / found.clamp_min(1), 0.0)
    return dice_loss, cross_entropy, torch.where(present, dice.detach(), torch.nan)


def l1(result: torch.Tensor, target: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of (C, D, H, W) over the voxels of a mask (D, H, W); 0 if there are none."""
    return ((result - target).abs() * where).sum() / (where.sum() * len(result)).clamp_min(1)


def gradient_l1(result: torch.Tensor, target: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Sum over the axes of the mean absolute difference of the steps between neighbours; both inside the mask."""
    error = result - target
    total = error.new_zeros(())
    for axis in range(3):
        n = error.shape[axis + 1]
        pairs = where.narrow(axis, 0, n - 1) & where.narrow(axis, 1, n - 1)
        steps = error.narrow(axis + 1, 1, n - 1) - error.narrow(axis + 1, 0, n - 1)
        total = total + (steps.abs() * pairs).sum() / (pairs.sum() * len(error)).clamp_min(1)
    return total
