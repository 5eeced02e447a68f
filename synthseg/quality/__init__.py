"""Judge a segmentation without a reference: a calibrated score for each structure and flags in plain words.

Reads: `evidence` (what is judged, and the judgement), `measures` (how sure the network is), `intensities` and
`anatomy` (what is known of scans and heads), `flags` (sentences), `calibration` (measures to Dice), `fitting`.
"""

from __future__ import annotations

from dataclasses import replace

from synthseg.quality.calibration import find_calibration
from synthseg.quality.evidence import Evidence, Judged, Quality
from synthseg.quality.flags import find_flags
from synthseg.quality.measures import measure

__all__ = ["Evidence", "Judged", "Quality", "assess"]


def assess(evidence: Evidence, model: Judged) -> Quality:
    """Predicted Dice of each structure and of the scan, if the model has a calibration for this mode, and flags."""
    measures = measure(evidence)
    flags = find_flags(evidence, measures)
    unscored = Quality({}, None, flags, not flags, measures=measures)
    calibration, why_not = find_calibration(model)
    if calibration is None:
        return replace(unscored, note=why_not)
    mode = calibration.modes.get(evidence.mode)
    if mode is None:
        known = ", ".join(sorted(calibration.modes))
        return replace(
            unscored, note=f"model '{model.name}' is calibrated for the mode {known} only, so there is no score"
        )
    structures = mode.structures_of(measures)
    scan = mode.scan_of(measures, structures)
    if scan < mode.threshold:
        flags = (
            *flags,
            f"the result is probably poor: predicted mean Dice {scan:.2f}, expected above {mode.threshold:.2f}",
        )
    return Quality(structures, scan, flags, not flags, measures=measures)
