"""What a segmentation leaves behind for judging it, and the judgement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch

from synthseg.labels import LabelTable
from synthseg.volume import Volume

Box = tuple[slice, slice, slice]


class Judged(Protocol):
    """What judging needs to know of a trained network: which one it is."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that is known after one scan went through the network; nothing in it is changed.

    Attributes
    ----------
    scan : the whole scan as it was read, in RAS+ order, raw intensities (NaN and infinity allowed).
    head : the part of ``scan``, in its voxels, that holds the head.
    box : the part of ``scan`` that was analysed: ``head``, or less of it if the user asked for that. The network's
        grid shares its centre and covers it, and is at most one voxel of the network larger along each axis.
    image : the network's input, in [0, 1], (D, H, W).
    probabilities : after clean-up, float16 (C, D, H, W).
    winner : index in ``table`` of the most probable class, uint8 (D, H, W).
    voxel_size_mm : true size of the network's voxels (D, H, W are counted in them).
    table : labels in the order of the classes.
    hard_ml, soft_ml : volume of each label by name, as reported to the user.
    removed_voxels : how many voxels of each class clean-up took away as stray pieces, on the network's grid, int (C,).
    mode : how the network was run; each has a calibration of its own.
    agreement : with mode ``robust``, Dice between each member's labels and those of the average, mean over members, by
        label name (NaN: absent from all); else None.
    rescaled : whether the network was told a voxel size that is not the true one (infants, small heads).
    """

    scan: Volume
    head: Box
    box: Box
    image: torch.Tensor
    probabilities: torch.Tensor
    winner: np.ndarray
    voxel_size_mm: float
    table: LabelTable
    hard_ml: Mapping[str, float]
    soft_ml: Mapping[str, float]
    removed_voxels: np.ndarray
    mode: Literal["default", "fast", "robust"] = "default"
    agreement: Mapping[str, float] | None = None
    rescaled: bool = False

    @property
    def cropped(self) -> bool:
        """Whether the user asked for a box smaller than the head, so that cut structures are no surprise."""
        return self.box != self.head


@dataclass(frozen=True)
class Quality:
    """How far to trust a segmentation, without a reference.

    Attributes
    ----------
    structures : predicted Dice of each label by name, the background left out; NaN where the structure was not found.
        Empty if the model has no calibration.
    scan : predicted mean Dice over the structures inside the skull; None if the model has no calibration.
    flags : what should be looked at, one plain sentence each.
    passed : False if there is any flag: the scan should be looked at. A score below the model's threshold is a flag.
    note : why there is no score; empty if there is one.
    measures : the figures behind the score, by structure name and under ``scan`` (see docs/quality.md).
    """

    structures: dict[str, float]
    scan: float | None
    flags: tuple[str, ...]
    passed: bool
    note: str = ""
    measures: dict[str, dict[str, float]] = field(default_factory=dict)
