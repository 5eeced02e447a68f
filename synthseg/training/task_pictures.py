"""Pictures of what a task is about: image, target, result and baseline, one row each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from synthseg.training.tasks import Pair, Task, centred
from synthseg.volume import atomic_path

Row = tuple[Pair, torch.Tensor | None, torch.Tensor]


def draw(path: Path, task: Task, rows: Mapping[str, Row]) -> None:
    """Write a PNG: for each named row an axial plane of image, target, result (if there is one) and baseline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = ["image", "target", "result", f"baseline: {task.baseline_name}"]
    figure = Figure(figsize=(12, 3.2 * len(rows)))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, (name, (pair, result, baseline)) in zip(axes, rows.items(), strict=True):
        plane = _fullest(pair.head)
        image = pair.image[0, :, :, plane].float().cpu().numpy()
        line[0].imshow(image.T, origin="lower", cmap="gray", vmin=0, vmax=1)
        line[0].set_ylabel(name)
        target = pair.target if pair.groups is not None else pair.target[0]
        for ax, content in zip(line[1:], (target, result, baseline), strict=True):
            if content is not None:
                values, style = _shown(content, pair, task)
                ax.imshow(values[:, :, plane].T, origin="lower", interpolation="nearest", **style)
        for ax in line:
            ax.set_xticks([])
            ax.set_yticks([])
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=9)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=80)


def _fullest(head: torch.Tensor) -> int:
    """The plane with the most head, a little above the middle where there is none."""
    counts = head.sum((0, 1))
    return int(counts.argmax()) if bool(counts.any()) else head.shape[2] // 2


def _shown(content: torch.Tensor, pair: Pair, task: Task) -> tuple[np.ndarray, dict[str, object]]:
    """Values (D, H, W) to draw, and how: classes, intensities, or a field about its mean."""
    if pair.groups is not None:
        top = pair.groups.shape[1] - 1
        logits = content.ndim == 4
        index = content.argmax(0) if logits else pair.groups.to(torch.uint8).argmax(1)[content.long()]
        return index.cpu().numpy(), {"cmap": "nipy_spectral", "vmin": 0, "vmax": top}
    single = content if content.ndim == 4 else content[None]
    if task.name == "bias-field":
        field = (centred(single, pair.head) * pair.head)[0].float().cpu().numpy()
        return field, {"cmap": "coolwarm", "vmin": -0.5, "vmax": 0.5}
    return single[0].float().cpu().numpy(), {"cmap": "gray", "vmin": 0, "vmax": 1}
