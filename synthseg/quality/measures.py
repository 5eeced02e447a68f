"""What the posterior says about each structure: how sure the network is, inside and at the border.

For every structure the expected Dice (twice the probability inside the structure over its size plus all probability),
confidence, entropy and margin of its inner voxels and of its border, how much of it is border, what clean-up took away,
how far its volume is from an adult's, and, in robust mode, how well the members agree. Roy et al. (NeuroImage 2019)
showed that such measures of one segmentation follow its Dice.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from synthseg.labels import BRAIN_TISSUES, LabelTable, tissue_mask
from synthseg.quality.anatomy import fractions, share_of
from synthseg.quality.evidence import Evidence

SLAB_VOXELS = 500_000  # turned into float32 at once
STRIDE = 2  # along the last axis: half of the voxels are enough for means over structures
Measures = dict[str, dict[str, float]]

STRUCTURE_MEASURES = (
    *("expected_dice", "inner_confidence", "border_confidence", "inner_entropy", "border_entropy"),
    *("inner_margin", "border_margin", "border_share", "removed_share", "volume_off", "soft_excess"),
)
SCAN = "scan"  # the key of the measures of the whole scan


def measure(evidence: Evidence) -> Measures:
    """Measures by structure name, NaN for a structure that is not there, and of the whole scan under ``scan``."""
    table = evidence.table
    border = _border(evidence.winner)
    sums = _sums(evidence.probabilities[..., ::STRIDE], evidence.winner[..., ::STRIDE], border[..., ::STRIDE])
    counts = sums["voxels"]
    seen = counts.sum(1)
    total = np.bincount(evidence.winner.reshape(-1), minlength=len(table))
    parts = fractions(table, evidence.hard_ml)
    found: Measures = {}
    for index, label in enumerate(table.labels):
        if index == 0:
            continue
        if seen[index] == 0:
            found[label.name] = dict.fromkeys(STRUCTURE_MEASURES, math.nan)
            continue
        inner, edge = counts[index]
        row = {
            "expected_dice": float(2 * sums["confidence"][index].sum() / (seen[index] + sums["mass"][index])),
            "border_share": float(edge / seen[index]),
            "removed_share": float(evidence.removed_voxels[index] / (total[index] + evidence.removed_voxels[index])),
            "volume_off": _off(table, label.tissue, parts),
            "soft_excess": float(np.clip(math.log((sums["mass"][index] + 1) / (seen[index] + 1)), -2, 2)),
        }
        for kind in ("confidence", "entropy", "margin"):
            inside, at_edge = sums[kind][index]
            row[f"border_{kind}"] = float(at_edge / edge) if edge else float(inside / inner)
            row[f"inner_{kind}"] = float(inside / inner) if inner else row[f"border_{kind}"]
        found[label.name] = row
    brain = tissue_mask(table, BRAIN_TISSUES)
    brain_voxels = float(total[brain].sum())
    removed = float(evidence.removed_voxels[brain].sum())
    found[SCAN] = {
        "brain_entropy": float(sums["entropy"][brain].sum() / max(seen[brain].sum(), 1)) if brain_voxels else 1.0,
        "thickness": math.log2(max(max(evidence.scan.spacing_mm) / evidence.voxel_size_mm, 1.0)),
        "brain_removed_share": removed / (removed + brain_voxels) if brain_voxels else 1.0,
    }
    if evidence.agreement is not None:
        for name, value in evidence.agreement.items():
            if name in found and name != SCAN:
                found[name]["agreement"] = float(value)
        values = [row["agreement"] for row in found.values() if math.isfinite(row.get("agreement", math.nan))]
        found[SCAN]["agreement"] = float(np.mean(values)) if values else 0.0
    return found


def _border(winner: np.ndarray) -> np.ndarray:
    """Voxels with a neighbour (of six) of another class, bool (D, H, W)."""
    border = np.zeros(winner.shape, dtype=bool)
    for axis in range(3):
        moved = np.moveaxis(winner, axis, 0)
        at = np.moveaxis(border, axis, 0)
        differs = moved[1:] != moved[:-1]
        at[1:] |= differs
        at[:-1] |= differs
    return border


def _sums(probabilities: torch.Tensor, winner: np.ndarray, border: np.ndarray) -> dict[str, np.ndarray]:
    """Over the voxels of each class, inner and border apart, float64 (C, 2): how many, and the sums of confidence,
    entropy (1: nothing known) and margin; ``mass`` (C,) is the probability of the class over the whole grid.

    Works in slabs, so that memory stays bounded. Where all but air is improbable nothing is added but mass.
    """
    n_classes = probabilities.shape[0]
    keys = ("voxels", "confidence", "entropy", "margin")
    sums = {key: np.zeros(2 * n_classes) for key in keys}
    mass = torch.zeros(n_classes, dtype=torch.float64)
    thickness = max(1, SLAB_VOXELS // max(1, winner[0].size))
    for start in range(0, winner.shape[0], thickness):
        part = slice(start, start + thickness)
        flat = probabilities[:, part].reshape(n_classes, -1)
        classes = torch.from_numpy(np.ascontiguousarray(winner[part])).flatten()
        at = torch.nonzero((classes > 0) | (flat[0] < 0.99)).flatten()  # the rest is air, and sure of it
        p = flat.index_select(1, at).float()
        mass += p.sum(1).double()
        classes = classes[at].long()
        group = (2 * classes + torch.from_numpy(border[part].reshape(-1))[at]).numpy()
        entropy = torch.special.entr(p).sum(0) / math.log(n_classes)
        rows = classes[None]
        confidence = p.gather(0, rows)[0]
        runner_up = p.scatter_(0, rows, -1.0).amax(0)
        values = {"voxels": None, "confidence": confidence, "entropy": entropy, "margin": confidence - runner_up}
        for key, value in values.items():
            weights = None if value is None else value.numpy()
            sums[key] += np.bincount(group, weights, minlength=2 * n_classes)
    result = {key: value.reshape(n_classes, 2) for key, value in sums.items()}
    return {**result, "mass": mass.numpy()}


def _off(table: LabelTable, tissue: str, parts: dict[str, float]) -> float:
    """How far a tissue's part of the intracranial volume is from an adult's: |ln ratio|, at most 2."""
    share = share_of(table, tissue)
    if share is None or share.name not in parts:
        return 0.0
    return min(2.0, abs(math.log(max(parts[share.name], 1e-6) / share.typical)))
