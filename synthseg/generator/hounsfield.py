"""CT in Hounsfield units: values of tissues, what the scanner adds, and the window that the scan is seen through.

Partial volume is averaged in Hounsfield units, before the window: thin bone between air and fat fades as in a scan.
Values of tissues, with their sources, are in hounsfield.yaml.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

import torch
import yaml

from synthseg.config import ContrastConfig
from synthseg.generator.ct_scanner import BeamHardening, Headrest, add_headrest, beam_hardening
from synthseg.generator.draw import Draw, Record
from synthseg.generator.means import Means
from synthseg.intensity import CT_WINDOW_HU

AIR_HU = -1000.0
HU_PER_UNIT = CT_WINDOW_HU[1] - CT_WINDOW_HU[0]  # one unit of image intensity, whatever the window
OTHER_WINDOWS_HU = {"brain": (0.0, 80.0), "bone": (-400.0, 1400.0), "none": (-1024.0, 3071.0)}
# One unit of the configured texture and patches in Hounsfield units: soft tissue varies little, bone much.
UNIT_HU = {"soft": 100.0, "skin": 60.0, "bone_cortical": 1500.0, "bone_cancellous": 800.0}
OTHER_UNIT_HU = 40.0
TIE_REACH_HU = 40.0  # tissues that differ by more never look alike
SPREAD_HU = 60.0  # of the white noise inside a tissue


class CTPlan(Record):
    """How a CT is made from Hounsfield units: window, streaks, headrest. ``extent_mm`` is the size of the image."""

    window_hu: tuple[float, float]
    extent_mm: tuple[float, float, float]
    beam_hardening: BeamHardening | None = None
    headrest: Headrest | None = None


def unit_hu(tissue: str) -> float:
    """Hounsfield units of one unit of texture in a tissue."""
    return UNIT_HU.get(tissue, OTHER_UNIT_HU)


@lru_cache(maxsize=1)
def tissue_hu() -> dict[str, dict[str, tuple[float, float]]]:
    """hounsfield.yaml: ranges ``plain``, and ``enhancement`` on top."""
    record = yaml.safe_load((Path(__file__).parent / "hounsfield.yaml").read_text())
    return {kind: {t: (float(r[0]), float(r[1])) for t, r in tissues.items()} for kind, tissues in record.items()}


def sample_hounsfield(config: ContrastConfig, tissues: Collection[str], draw: Draw) -> Means:
    """Means in Hounsfield units. Half of a value's place in its range is shared by all tissues of the image.

    A tissue that the table does not know lies anywhere between water and muscle.
    """
    ranges, shared = tissue_hu(), draw.uniform(0.0, 1.0)

    def value(tissue: str) -> float:
        low, high = ranges["plain"].get(tissue, (0.0, 60.0))
        return low + (high - low) * (shared + draw.uniform(0.0, 1.0)) / 2

    means = {tissue: value(tissue) for tissue in sorted({*tissues, "fat", "muscle", "mucosa"})}
    if draw.chance(config.enhanced_probability):
        for tissue, limits in ranges["enhancement"].items():
            rise = draw.uniform(*limits)
            if tissue in means:
                means[tissue] += rise
    parts = {
        "soft": (means["fat"], means["muscle"], means["mucosa"]),
        "skin": (means["fat"],),
        "bone_cancellous": (means["fat"],),
    }
    return Means("hounsfield", means, parts=parts)


def sample_ct(config: ContrastConfig, extent_mm: tuple[float, ...], stripped: bool, draw: Draw) -> CTPlan:
    """Window, and unless the head is stripped, beam hardening and a headrest."""
    window = CT_WINDOW_HU
    other = draw.pick(dict.fromkeys(OTHER_WINDOWS_HU, 1.0))
    if draw.chance(config.ct_other_window_probability):
        window = OTHER_WINDOWS_HU[other]
    strength = draw.uniform(*config.ct_streak_strength)
    hardening = BeamHardening(strength=strength, soft_share=draw.uniform(0.0, 0.12))
    headrest = Headrest(
        gap_mm=draw.uniform(0.0, 12.0),
        radius_mm=draw.uniform(110.0, 260.0),
        thickness_mm=draw.uniform(3.0, 12.0),
        half_width_mm=draw.uniform(60.0, 140.0),
        shift_mm=draw.uniform(-15.0, 15.0),
        hu=draw.uniform(-200.0, 200.0),
    )
    rests = draw.chance(config.ct_table_probability)
    d, h, w = extent_mm
    return CTPlan(
        window_hu=window,
        extent_mm=(d, h, w),
        beam_hardening=hardening if strength > 0 and not stripped else None,
        headrest=headrest if rests and not stripped else None,
    )


def finish(hu: torch.Tensor, plan: CTPlan) -> torch.Tensor:
    """From Hounsfield units (D, H, W) to intensities: 0 at the lower end of the window, 1 each ``HU_PER_UNIT`` above.

    With the window of inference that is [0, 1]. Streaks belong to the reconstruction, so they come before the
    headrest, whose own are left out, and before the window.
    """
    if plan.beam_hardening is not None:
        hu = hu + beam_hardening(hu, plan.beam_hardening, plan.extent_mm)
    if plan.headrest is not None:
        hu = add_headrest(hu, plan.headrest, plan.extent_mm)
    low, high = plan.window_hu
    return (hu.clamp(low, high) - low) / HU_PER_UNIT
