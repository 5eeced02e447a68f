"""How much of the intracranial space each structure takes up in adults, and what follows for a segmentation.

The shares are those of twelve heads of adults, young and old, with FreeSurfer's segmentation: the label maps that
SynthSeg was trained on (Billot et al., MedIA 2023). Age-free: the limits are far outside of what they span, so that
atrophy and large ventricles pass, and a structure that was mistaken for another does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from synthseg.labels import INTRACRANIAL_TISSUES, PARENCHYMA_TISSUES, LabelTable, tissue_mask

PLAUSIBLE_BRAIN_ML = (300.0, 2200.0)


@dataclass(frozen=True)
class Share:
    """Left and right together, as part of the intracranial volume: median of the heads, and limits beyond which a
    volume is implausible (half the smallest and twice the largest; for the large tissues 2/3 and 3/2)."""

    name: str
    tissues: frozenset[str]
    low: float
    typical: float
    high: float


def _share(name: str, tissues: set[str], smallest: float, median: float, largest: float, factor: float = 2.0) -> Share:
    return Share(name, frozenset(tissues), smallest / factor / 100, median / 100, largest * factor / 100)


_WHITE = {"wm", "brainstem", "lesion", "tumour", "oedema", "haemorrhage"}
SHARES = (  # smallest, median and largest of the twelve heads, in percent
    _share("cortical grey matter", {"gm"}, 22.6, 30.3, 36.0, factor=1.5),
    _share("white matter with the brain stem", _WHITE, 27.2, 33.7, 36.4, factor=1.5),
    _share("ventricles", {"ventricle"}, 0.74, 3.6, 6.5),
    _share("cerebellar grey matter", {"cerebellar_gm"}, 6.1, 6.7, 9.2),
    _share("thalamus", {"thalamus"}, 0.83, 0.89, 1.15),
    _share("pallidum", {"pallidum"}, 0.14, 0.19, 0.25),
    _share("putamen", {"putamen"}, 0.51, 0.70, 0.81),
    _share("caudate", {"caudate"}, 0.38, 0.49, 0.58),
    _share("accumbens", {"accumbens"}, 0.04, 0.065, 0.09),
    _share("hippocampus", {"hippocampus"}, 0.28, 0.42, 0.67),
    _share("amygdala", {"amygdala"}, 0.09, 0.19, 0.26),
)


def tissue_ml(table: LabelTable, volumes_ml: Mapping[str, float], tissues: frozenset[str]) -> float:
    """Summed volume of the labels of some tissues."""
    mask = tissue_mask(table, tissues)
    return float(sum(volumes_ml[name] for name, counted in zip(table.names, mask, strict=True) if counted))


def brain_ml(table: LabelTable, volumes_ml: Mapping[str, float]) -> float:
    """Brain without ventricles."""
    return tissue_ml(table, volumes_ml, PARENCHYMA_TISSUES)


def intracranial_ml(table: LabelTable, volumes_ml: Mapping[str, float]) -> float:
    """Brain, ventricles and CSF."""
    return tissue_ml(table, volumes_ml, INTRACRANIAL_TISSUES)


def shares_known(table: LabelTable) -> tuple[Share, ...]:
    """The shares that a table's labels can be held against: none if its grey matter holds the deep nuclei as well."""
    tissues = {label.tissue for label in table.labels}
    if not {"gm", "cerebellar_gm", "thalamus"} <= tissues or "csf" not in tissues:
        return ()
    return tuple(share for share in SHARES if share.tissues & tissues)


def share_of(table: LabelTable, tissue: str) -> Share | None:
    """The share that a label of this tissue belongs to, if its table can be held against it."""
    return next((share for share in shares_known(table) if tissue in share.tissues), None)


def fractions(table: LabelTable, volumes_ml: Mapping[str, float]) -> dict[str, float]:
    """Part of the intracranial volume by the name of the share; empty without intracranial volume."""
    whole = intracranial_ml(table, volumes_ml)
    if whole <= 0:
        return {}
    return {share.name: tissue_ml(table, volumes_ml, share.tissues) / whole for share in shares_known(table)}


def asymmetry(table: LabelTable, volumes_ml: Mapping[str, float]) -> dict[str, tuple[float, float, float]]:
    """For each label with a partner, by its name: own volume, the partner's, and difference over their mean.

    Each pair once. 0 where both are empty.
    """
    found: dict[str, tuple[float, float, float]] = {}
    for label in table.labels:
        if label.partner is None or label.partner < label.id:
            continue
        one, other = volumes_ml[label.name], volumes_ml[table[label.partner].name]
        mean = (one + other) / 2
        found[label.name] = (one, other, float(np.divide(one - other, mean)) if mean > 0 else 0.0)
    return found
