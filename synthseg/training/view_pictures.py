"""Pictures of views: the images, what the features say of them, and the canonical T1 image that they share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from synthseg.training.view_stream import ViewBatch
from synthseg.volume import atomic_path

DRAWN = 8  # images at most


def draw_views(
    path: Path, batch: ViewBatch, features: torch.Tensor | None = None, t1: torch.Tensor | None = None
) -> Path:
    """Draw the first images of a batch in three planes, a row each.

    With ``features`` (N, C, d, h, w) their first three principal components in colours, the same for all images, and
    with ``t1`` (N, 1, D, H, W) the T1 images that were read from them, beside the true one.
    """
    from matplotlib.figure import Figure

    rows = min(DRAWN, len(batch.images))
    images = batch.images[:rows, 0].float().cpu().numpy()
    columns: list[tuple[str, list[np.ndarray]]] = [("image", list(images))]
    if features is not None:
        columns.append(("features", list(colours(features[:rows], batch.labels[:rows] > 0))))
    if t1 is not None:
        columns.append(("T1 from the features", list(t1[:rows, 0].float().cpu().numpy())))
    if batch.canonical is not None:
        truth = batch.targets()[0][:rows, 0].cpu().numpy()
        columns.append(("T1", list(truth)))
    if len(columns) == 1:
        columns.append(("labels", list(batch.labels[:rows].cpu().numpy())))
    figure = Figure(figsize=(4.8 * len(columns), 1.7 * rows))
    axes = figure.subplots(rows, 3 * len(columns), squeeze=False)
    for row in range(rows):
        for column, (name, volumes) in enumerate(columns):
            for axis in range(3):
                ax, volume = axes[row, 3 * column + axis], volumes[row]
                plane = volume.take(volume.shape[axis] // 2, axis).swapaxes(0, 1)
                if name == "labels":
                    ax.imshow(plane, cmap="nipy_spectral", origin="lower", interpolation="nearest")
                else:
                    ax.imshow(plane, cmap="gray", vmin=0, vmax=1, origin="lower", interpolation="nearest")
                ax.axis("off")
            severity = batch.plans[row].severity
            title = f"severity {severity:g}" if column == 0 else name
            axes[row, 3 * column].set_title(title if column == 0 or row == 0 else "", fontsize=8, loc="left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90, bbox_inches="tight")
    return path


def colours(features: torch.Tensor, head: torch.Tensor) -> np.ndarray:
    """First three principal components of features (N, C, d, h, w) as red, green and blue, (N, d, h, w, 3) in [0, 1].

    The components are those of all voxels of ``head`` (N, D, H, W); each is stretched between its 2 % and 98 %
    quantiles, and its sign is that of its largest weight.
    """
    values = features.float().cpu()
    inside = F.interpolate(head[:, None].float().cpu(), size=values.shape[2:], mode="nearest")[:, 0] > 0
    rows = values.movedim(1, -1)[inside]
    if len(rows) < 2:
        return np.zeros((len(values), *values.shape[2:], 3), dtype=np.float32)
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / len(rows)
    axes = torch.linalg.eigh(covariance.double())[1].flip(1)[:, :3].to(rows)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    found = torch.zeros((*inside.shape, 3))
    scores = (rows - mean) @ axes
    for k in range(axes.shape[1]):
        low, high = np.quantile(scores[:, k].numpy(), [0.02, 0.98])
        found[..., k][inside] = ((scores[:, k] - low) / max(high - low, 1e-6)).clamp(0, 1)
    return found.numpy()
