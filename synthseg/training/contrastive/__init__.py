"""Contrastive learning on voxels: which are compared, how they are embedded, and the family of losses."""

from synthseg.training.contrastive.losses import LOSSES, UNKNOWN, simplex_frame
from synthseg.training.contrastive.projections import Projection, to_ball, to_sphere
from synthseg.training.contrastive.rows import Loss, PairTemperature, Temperature
from synthseg.training.contrastive.sampling import (
    Voxels,
    join,
    kind_of,
    known_classes,
    midplane,
    pair_masks,
    sample_voxels,
)

__all__ = [
    "LOSSES",
    "UNKNOWN",
    "Loss",
    "PairTemperature",
    "Projection",
    "Temperature",
    "Voxels",
    "join",
    "kind_of",
    "known_classes",
    "midplane",
    "pair_masks",
    "sample_voxels",
    "simplex_frame",
    "to_ball",
    "to_sphere",
]
