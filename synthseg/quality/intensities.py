"""What the intensities of a scan say: noise, contrast between tissues, and CT that is not in Hounsfield units."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from synthseg.intensity import finite, looks_like_hounsfield
from synthseg.labels import tissue_mask
from synthseg.quality.evidence import Evidence

SAMPLE = 300_000  # voxels that distributions are taken from
GRID_VOXELS = 4_000_000  # a larger scan is thinned out to about this many
PEAK = 0.06  # half width of the soft-tissue peak of CT, over its distance from air: 60 of 1050 HU
PEAK_SHARE = 0.4  # of the head's voxels that CT has in that peak
BONE = 0.15  # brighter than the peak by this, over the same distance, is bone
BONE_SHARE = (0.03, 0.5)
TISSUES = (frozenset({"gm"}), frozenset({"wm"}), frozenset({"ventricle", "csf"}))
LEAST_VOXELS = 200


@dataclass(frozen=True)
class Intensities:
    """Attributes
    ----------
    autocorrelation : of neighbouring voxels of the scan, along its best axis; white noise has 0.
    contrast : largest distance between the medians of grey matter, white matter and fluid, in their pooled standard
        deviations (robust); NaN where fewer than two of them are there.
    ct_elsewhere : whether the histogram is that of CT, but not in Hounsfield units.
    """

    autocorrelation: float
    contrast: float
    ct_elsewhere: bool


def look_at(evidence: Evidence) -> Intensities:
    """Figures of one scan."""
    data = evidence.scan.data
    return Intensities(_autocorrelation(data[evidence.box]), _contrast(evidence), _is_ct_elsewhere(data[evidence.head]))


def _autocorrelation(data: np.ndarray) -> float:
    """The largest of the three correlations between neighbours along an axis. 1 for an image of one value."""
    best = -1.0
    for axis in range(3):
        n = data.shape[axis]
        if n < 8:
            continue
        moved = np.moveaxis(data, axis, 0)
        step = max(1, math.isqrt(data.size // SAMPLE))
        rows = moved[:, ::step, ::step].astype(np.float64)
        here, there = rows[:-1].ravel(), rows[1:].ravel()
        good = np.isfinite(here) & np.isfinite(there)
        here, there = here[good], there[good]
        if here.size < LEAST_VOXELS or np.ptp(here) == 0 or np.ptp(there) == 0:
            continue
        best = max(best, float(np.corrcoef(here, there)[0, 1]))
    return best if best > -1.0 else 1.0


def _contrast(evidence: Evidence) -> float:
    image = evidence.image.numpy()
    values = []
    for tissues in TISSUES:
        inside = image[tissue_mask(evidence.table, tissues)[evidence.winner]]
        if inside.size >= LEAST_VOXELS:
            low, middle, high = np.quantile(_spread(inside), (0.25, 0.5, 0.75))
            values.append((float(middle), float(high - low) / 1.349))
    distances = [
        abs(a - b) / max(math.sqrt((s * s + t * t) / 2), 1e-3)
        for number, (a, s) in enumerate(values)
        for b, t in values[:number]
    ]
    return max(distances, default=math.nan)


def _spread(values: np.ndarray) -> np.ndarray:
    """At most SAMPLE of the values (n,), spread evenly by the golden ratio: a stride could hit few planes only."""
    if values.size <= SAMPLE:
        return values
    return values[(np.arange(SAMPLE) * 0.6180339887498949 % 1.0 * values.size).astype(np.int64)]


def _is_ct_elsewhere(data: np.ndarray) -> bool:
    """Whether the histogram is that of CT in other units: air, one narrow peak of soft tissue, and a tail of bone.

    In Hounsfield units brain, muscle and water lie within 60 of 1050 units above air, and bone far above. No MR
    contrast puts all soft tissue into so narrow a peak.
    """
    step = max(1, math.ceil((data.size / GRID_VOXELS) ** (1 / 3)))
    image = finite(torch.from_numpy(np.ascontiguousarray(data[::step, ::step, ::step], dtype=np.float32)))
    sample = _spread(image.numpy().reshape(-1)).astype(np.float64)
    if sample.size < LEAST_VOXELS or looks_like_hounsfield(image):
        return False
    air, top = np.quantile(sample, (0.01, 0.995))
    if top <= air:
        return False
    head = sample[sample > air + 0.1 * (top - air)]
    if head.size < LEAST_VOXELS:
        return False
    counts, edges = np.histogram(head, bins=200, range=(float(head.min()), float(top)))
    smooth = np.convolve(counts, np.ones(3) / 3, mode="same")
    mode = float((edges[:-1] + edges[1:])[smooth.argmax()] / 2)
    distance = mode - air
    peak = float((np.abs(head - mode) < PEAK * distance).mean())
    bone = float((head > mode + BONE * distance).mean())
    return peak > PEAK_SHARE and BONE_SHARE[0] < bone < BONE_SHARE[1]
