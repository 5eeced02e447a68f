"""What the scanner and the storage do to a synthetic image, at random."""

from __future__ import annotations

from pydantic import Field

from synthseg.config.base import LengthRange, Section, StrengthRange


class ArtefactConfig(Section):
    """What the scanner and the storage do to an image."""

    bias_std: StrengthRange = Field((0.0, 0.5), description="std of the log bias field on its coarse grid")
    bias_spacing_mm: LengthRange = Field((40.0, 120.0), description="spacing of the control points of the bias field")
    gamma_std: float = Field(0.3, ge=0, description="log gamma is N(0, this)")
    noise_std: StrengthRange = Field(
        (0.0, 0.05), description="standard deviation of each channel of the Rician noise, on the scale of the means"
    )
    noise_probability: float = Field(0.8, ge=0, le=1, description="chance that an image has noise")
    lowres_probability: float = Field(0.5, ge=0, le=1, description="chance that an image is acquired on a coarser grid")
    lowres_isotropic_probability: float = Field(
        0.3, ge=0, le=1, description="of those: chance that all three axes are coarser, else one is"
    )
    lowres_spacing_mm: float = Field(8.0, gt=0, description="slice spacing is U[voxel size, this]")
    lowres_isotropic_mm: float = Field(4.0, gt=0, description="isotropic spacing is U[voxel size, this]")
    crop_probability: float = Field(0.25, ge=0, le=1, description="chance that the field of view loses a part")
    crop_fraction: float = Field(0.35, ge=0, lt=1, description="at most this part of an axis is lost on one side")
    strip_probability: float = Field(0.3, ge=0, le=1, description="chance of a skull-stripped image")
