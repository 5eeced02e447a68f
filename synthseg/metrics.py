"""Overlap between label maps, and which tissues make up the brain and the intracranial space."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


Groups = Mapping[str, tuple[Collection[int], Collection[int]]]


def dice(
    pred: np.ndarray | torch.Tensor, ref: np.ndarray | torch.Tensor, ids: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Dice coefficient of each id between two label maps of one shape, float64 (n_ids,).

    Twice the common voxels over the sum of both (Dice 1945). 0 where only one map has the id, NaN where
    neither has.
    """
    groups = {str(label_id): ([int(label_id)], [int(label_id)]) for label_id in ids}
    return np.array(list(dice_table(pred, ref, groups).values()))


def dice_table(pred: np.ndarray | torch.Tensor, ref: np.ndarray | torch.Tensor, groups: Groups) -> dict[str, float]:
    """Dice of named groups of ids: ``groups[name]`` is (ids in ``pred``, ids in ``ref``).

    The two maps may follow different label schemes, for example
    ``{"thalamus": ([6], [10, 49])}``. NaN where neither map has any of the ids.
    """
    pred_array, ref_array = _to_numpy(pred), _to_numpy(ref)
    if pred_array.shape != ref_array.shape:
        raise ValueError(f"cannot compare label maps of shapes {pred_array.shape} and {ref_array.shape}")
    scores = {}
    for name, (pred_ids, ref_ids) in groups.items():
        in_pred, in_ref = np.isin(pred_array, list(pred_ids)), np.isin(ref_array, list(ref_ids))
        total = int(in_pred.sum()) + int(in_ref.sum())
        scores[name] = 2.0 * int((in_pred & in_ref).sum()) / total if total else float("nan")
    return scores


def _to_numpy(label_map: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(label_map, np.ndarray):
        return label_map
    return label_map.detach().cpu().numpy()
