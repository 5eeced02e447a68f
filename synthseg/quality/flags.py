"""What should be looked at, in plain words. Each check returns sentences, none where all is well."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from synthseg.labels import BRAIN_TISSUES, tissue_mask
from synthseg.quality.anatomy import (
    PLAUSIBLE_BRAIN_ML,
    asymmetry,
    brain_ml,
    fractions,
    intracranial_ml,
    shares_known,
    tissue_ml,
)
from synthseg.quality.evidence import Evidence
from synthseg.quality.intensities import Intensities, look_at
from synthseg.quality.measures import SCAN, Measures

WHOLE_HEAD_MM = 100.0  # a thinner field of view holds a slab of the head; volumes say nothing then
CAP_MM2_PER_MM = 440.0  # a convex brain (radius 70 mm) ends in a cap of this area for each mm of a slice: 2 pi r
CUT_PART = 1 / 3  # of the largest cross-section of grey matter that a cut shows at least
MANY_SIDES = 3
VENTRICLE_AT_BORDER_MM2 = 100.0
THICK_MM = 8.0  # the thickest slices of training
ASYMMETRY = {"ventricle": 1.5, "gm": 0.3, "wm": 0.3, "cerebellar_gm": 0.35}  # difference over mean of left and right
ASYMMETRY_OTHER = 0.6
ASYMMETRY_LEAST_ML = 0.3
REMOVED_SHARE = 0.1
LEAST_AUTOCORRELATION = 0.5
LEAST_CONTRAST = 0.4  # distance of the medians of two tissues, in standard deviations
LEAST_AGREEMENT = 0.7
UPSIDE_DOWN_MM = 5.0

# Along right, anterior and superior: the face at the low and at the high end.
FACES = (
    ("the left side of the brain", "the right side of the brain"),
    ("the back of the brain", "the front of the brain"),
    ("the skull base", "the vertex"),
)


def find_flags(evidence: Evidence, measures: Measures) -> tuple[str, ...]:
    """All flags, the gravest first. If no brain was found, that says enough about the anatomy."""
    intensities = look_at(evidence)
    found = [*_noise(intensities), *_brain(evidence)]
    if brain_ml(evidence.table, evidence.hard_ml) > 0:
        cut = [] if evidence.cropped else _cut(evidence)
        checks: list[Callable[[], list[str]]] = [lambda: _orientation(evidence), lambda: cut]
        whole = not (cut or evidence.cropped or min(evidence.scan.extent_mm) < WHOLE_HEAD_MM)
        if whole and not evidence.rescaled:
            checks.append(lambda: _volumes(evidence))
        if whole:
            checks.append(lambda: _sides(evidence))
        checks += [lambda: _removed(measures), lambda: _contrast(intensities), lambda: _agreement(measures)]
        for check in checks:
            found += check()
    return (*found, *_ct(intensities), *_thick(evidence))


# -------------------------------------------------------------------------------------------------- image


def _noise(intensities: Intensities) -> list[str]:
    if intensities.autocorrelation >= LEAST_AUTOCORRELATION:
        return []
    return [
        f"the scan is mostly noise: neighbouring voxels hardly resemble each other "
        f"(correlation {intensities.autocorrelation:.2f}, expected above {LEAST_AUTOCORRELATION})"
    ]


def _ct(intensities: Intensities) -> list[str]:
    if not intensities.ct_elsewhere:
        return []
    return [
        "this looks like CT outside the Hounsfield range, and was treated as MRI; rescale it to Hounsfield units "
        "(air at -1000, water at 0), often by subtracting 1024"
    ]


def _thick(evidence: Evidence) -> list[str]:
    thickest = max(evidence.scan.spacing_mm)
    if thickest <= THICK_MM:
        return []
    return [f"the slices are {thickest:.3g} mm thick; the model was trained with up to {THICK_MM:g} mm"]


def _contrast(intensities: Intensities) -> list[str]:
    if math.isnan(intensities.contrast) or intensities.contrast >= LEAST_CONTRAST:
        return []
    return [
        "the contrast is very low: grey matter, white matter and fluid differ by "
        f"{intensities.contrast:.2f} standard deviations (expected above {LEAST_CONTRAST})"
    ]


# ------------------------------------------------------------------------------------------------ anatomy


def _brain(evidence: Evidence) -> list[str]:
    ml = brain_ml(evidence.table, evidence.hard_ml)
    low, high = PLAUSIBLE_BRAIN_ML
    if ml == 0:
        return ["no brain was found; check the orientation and the content of the scan"]
    whole = min(evidence.scan.extent_mm) >= WHOLE_HEAD_MM and not evidence.cropped
    if whole and not low <= ml <= high:
        return [f"the brain measures {ml:.0f} ml (plausible: {low:.0f} to {high:.0f}); look at the result"]
    return []


def _cut(evidence: Evidence) -> list[str]:
    """Sides where the brain ends in a plane instead of a cap: cut by the field of view, or by an empty part of it.

    Only grey matter is looked at: white matter ends in the cut brain stem in every scan without a neck. Ventricles
    are cut where the brain is, at the end of the scan.
    """
    area_mm2 = evidence.voxel_size_mm**2
    grey = tissue_mask(evidence.table, {"gm", "cerebellar_gm"})[evidence.winner]
    fluid = tissue_mask(evidence.table, {"ventricle"})[evidence.winner]
    sides, ventricles = [], False
    for axis, names in enumerate(FACES):
        others = tuple(a for a in range(3) if a != axis)
        profile = grey.sum(axis=others) * area_mm2
        inside = np.flatnonzero(profile > 0)
        slice_mm = max(evidence.scan.spacing_mm[axis], evidence.voxel_size_mm)
        cap_mm2 = CAP_MM2_PER_MM * (slice_mm + 1.0 + 2 * evidence.voxel_size_mm)  # up to the third plane, see below
        least_mm2 = max(cap_mm2, CUT_PART * profile.max(initial=0.0))
        fluid_mm2 = fluid.sum(axis=others) * area_mm2
        ends = _scan_ends_here(evidence, axis)
        for end, name in enumerate(names):
            outermost = (inside[:3], inside[-3:])[end]  # a stray voxel or two may lie before the cut
            if outermost.size and profile[outermost].max() > least_mm2:
                sides.append(name)
                at_border = (fluid_mm2[:2], fluid_mm2[-2:])[end].max() > VENTRICLE_AT_BORDER_MM2
                ventricles |= ends[end] and bool(at_border)
    if len(sides) > MANY_SIDES:
        return [
            f"the brain ends at {len(sides)} sides as if it were cut ({', '.join(sides)}); "
            "the field of view is too small, or the result is wrong"
        ]
    found = [f"{name} is outside the field of view: the brain is cut there" for name in sides]
    if ventricles:
        found.append("ventricles touch the image border: they are cut, and so are their volumes")
    return found


def _scan_ends_here(evidence: Evidence, axis: int) -> tuple[bool, bool]:
    """Whether the analysed box ends where the scan ends, at its low and at its high end."""
    n = evidence.scan.data.shape[axis]
    start, stop, _ = evidence.box[axis].indices(n)
    return start == 0, stop == n


def _orientation(evidence: Evidence) -> list[str]:
    """The cerebellum lies below the cerebral cortex and behind its middle in every head."""
    centres = []
    for tissue, least_ml in (("gm", 100.0), ("cerebellar_gm", 10.0)):
        if tissue_ml(evidence.table, evidence.hard_ml, frozenset({tissue})) < least_ml:
            return []
        mask = tissue_mask(evidence.table, {tissue})[evidence.winner]
        centres.append([_centre(mask, axis) * evidence.voxel_size_mm for axis in (1, 2)])
    (cortex_y, cortex_z), (cerebellum_y, cerebellum_z) = centres
    if cerebellum_z < cortex_z - UPSIDE_DOWN_MM and cerebellum_y < cortex_y - UPSIDE_DOWN_MM:
        return []
    where = "above" if cerebellum_z >= cortex_z - UPSIDE_DOWN_MM else "in front of"
    return [
        f"the cerebellum was found {where} the middle of the brain; "
        "the orientation in the header may be wrong: check it in a viewer"
    ]


def _centre(mask: np.ndarray, axis: int) -> float:
    profile = mask.sum(axis=tuple(a for a in range(3) if a != axis))
    return float(np.average(np.arange(profile.size), weights=profile))


def _volumes(evidence: Evidence) -> list[str]:
    parts = fractions(evidence.table, evidence.hard_ml)
    whole = intracranial_ml(evidence.table, evidence.hard_ml)
    found = []
    for share in shares_known(evidence.table):
        part = parts.get(share.name, 0.0)
        if part == 0:
            found.append(f"nothing was found of this structure: {share.name}")
        elif not share.low <= part <= share.high:
            found.append(
                f"implausible volume: {share.name} {part * whole:.3g} ml, {_percent(part)} of the intracranial volume "
                f"(adults: {_percent(share.low)} to {_percent(share.high)} at the very most)"
            )
    return found


def _percent(part: float) -> str:
    return f"{100 * part:.2g} %"


def _sides(evidence: Evidence) -> list[str]:
    """Left and right of one structure that differ by more than disease explains easily."""
    found = []
    for name, (one_ml, other_ml, difference) in asymmetry(evidence.table, evidence.hard_ml).items():
        label = next(x for x in evidence.table.labels if x.name == name)
        if label.tissue not in BRAIN_TISSUES or max(one_ml, other_ml) < ASYMMETRY_LEAST_ML:
            continue
        if abs(difference) > ASYMMETRY.get(label.tissue, ASYMMETRY_OTHER) and label.partner is not None:
            partner = evidence.table[label.partner].name
            found.append(f"left and right differ much: {name} {one_ml:.3g} ml, {partner} {other_ml:.3g} ml")
    return found


# ---------------------------------------------------------------------------------------------- posterior


def _removed(measures: Measures) -> list[str]:
    share = measures[SCAN]["brain_removed_share"]
    if share <= REMOVED_SHARE:
        return []
    return [f"{share:.0%} of what first looked like brain lay apart from it and was removed"]


def _agreement(measures: Measures) -> list[str]:
    agreement = measures[SCAN].get("agreement")
    if agreement is None or agreement >= LEAST_AGREEMENT:
        return []
    return [
        f"the looks of the robust mode at this scan disagree: mean Dice between them {agreement:.2f} "
        f"(expected above {LEAST_AGREEMENT})"
    ]
