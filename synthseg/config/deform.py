"""What is random about the shape of a synthetic head."""

from __future__ import annotations

from pydantic import Field

from synthseg.config.base import LengthRange, Section


class DeformConfig(Section):
    """Affine and diffeomorphic deformation. Ranges follow SynthSeg (Billot 2023), SIAM (2026)."""

    rotation_deg: float = Field(20.0, ge=0, le=180, description="rotation about each axis is U[-r, r] degrees")
    scaling: float = Field(0.15, ge=0, lt=1, description="scale of each axis is U[1-s, 1+s]")
    shear: float = Field(0.02, ge=0, lt=1, description="each shear coefficient is U[-s, s]")
    translation_mm: float = Field(15.0, ge=0, description="shift of the field of view against the brain centre")
    svf_std_mm: float = Field(4.0, ge=0, description="standard deviation of the velocity field is U[0, this]")
    svf_spacing_mm: LengthRange = Field((20.0, 60.0), description="spacing of the control points of the velocity field")
    head_scale: LengthRange = Field(
        (1.0, 1.0), description="size of the head against the template's; a newborn's is 0.65 to 0.75 of an adult's"
    )
    plagiocephaly: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="shift of one side of the head to the back, U[-this, this] of its width",
    )
    flip_probability: float = Field(0.5, ge=0, le=1, description="left/right flip, with the labels swapped")
