"""What the scanner and the storage do to a synthetic image, at random."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from synthseg.config.base import LengthRange, Range, Section, StrengthRange

Part = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Lost = Annotated[float, Field(ge=0, lt=1)]


def _chance(default: float, of_what: str, mild: float | None = 0.0) -> Any:
    extra = {} if mild is None else {"json_schema_extra": {"mild": mild}}
    return Field(default, ge=0, le=1, description=f"chance {of_what}", **extra)  # type: ignore[call-overload]


class KSpaceConfig(Section):
    """What goes wrong while k-space is filled. Not in photographs; with `ct_physics` not in CT."""

    motion_probability: float = _chance(0.0, "that the head moves during the scan")
    motion_between_slices: float = _chance(
        0.3, "that a movement displaces slices against each other, else lines of k-space inside the scan", mild=None
    )
    motion_events: int = Field(4, ge=1, le=20, description="there are 1 to this many sudden movements")
    motion_mm: StrengthRange = Field((1.0, 4.0), description="length of the shift of each movement (TorchIO, SIAM)")
    motion_deg: StrengthRange = Field((1.0, 4.0), description="turn of each movement")
    ghosting_probability: float = _chance(0.0, "of ghosts along one axis")
    ghosts_max: int = Field(8, ge=2, le=20, description="ghosts lie 1/n of the axis apart, n is 2 to this")
    ghosting_strength: tuple[Fraction, Fraction] = Field(
        (0.2, 0.7), description="part of the signal that every n-th line loses; a ghost has 1/n of it"
    )
    gibbs_probability: float = _chance(0.0, "of truncated k-space (Gibbs ringing) along one to three axes")
    gibbs_kept: tuple[Part, Part] = Field((0.45, 0.9), description="part of k-space that is measured along these axes")
    spike_probability: float = _chance(0.0, "of corrupt points in k-space (stripes over the whole image)")
    spikes_max: int = Field(3, ge=1, le=20, description="there are 1 to this many spikes")
    spike_strength: StrengthRange = Field(
        (0.01, 0.1), description="amplitude of a spike's wave, on the scale of the means"
    )
    wrap_probability: float = _chance(0.0, "that the encoded field of view is too small along one axis: wrap-around")
    wrap_fraction: tuple[Lost, Lost] = Field(
        (0.05, 0.35), description="part of the axis that is not encoded and comes in from the other side"
    )
    wrap_strength: StrengthRange = Field(
        (0.3, 1.0), description="signal of what wraps around; coils receive less of what is far outside"
    )


class StorageConfig(Section):
    """Profile of the slices, and scans that were acquired coarse and stored fine."""

    slice_thickness: LengthRange = Field(
        (0.5, 1.0), description="thickness of a slice over its spacing: less than 1 leaves a gap, more overlaps"
    )
    gaussian_profile_probability: float = _chance(0.0, "that slices have a Gaussian profile, else a box", mild=None)
    interpolation_probability: float = _chance(0.0, "that a scan is stored on a finer grid than it was acquired on")
    interpolation_coarser: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1)]] = Field(
        (1.1, 2.0), description="such a scan, if not coarse already, is acquired at this times the voxel size"
    )
    interpolation_finer: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1)]] = Field(
        (1.3, 4.0), description="samples that are stored per sample that was acquired"
    )


class MaskingConfig(Section):
    """Voxels set to zero after the scan. Images that are stripped along the labels are left alone."""

    bad_strip_probability: float = _chance(0.0, "of skull stripping with an imperfect mask")
    bad_strip_offset_mm: Range = Field((-3.0, 6.0), description="mean distance of that mask outside the brain")
    bad_strip_ragged_mm: StrengthRange = Field((0.5, 3.0), description="standard deviation of that distance over space")
    bad_strip_spacing_mm: LengthRange = Field(
        (12.0, 40.0), description="spacing of the control points of that distance"
    )
    leftover_probability: float = _chance(0.4, "that an imperfect mask leaves pieces of dura, skull or eyes", mild=None)
    leftover_reach_mm: LengthRange = Field((4.0, 14.0), description="how far from the brain such pieces reach")
    deface_probability: float = _chance(0.0, "that the face is removed")
    deface_box_probability: float = _chance(0.5, "that a box is cut out, else all in front of a plane", mild=None)
    deface_noise_probability: float = _chance(0.2, "that the hole is filled with noise, else with zeros", mild=None)
    deface_margin_mm: StrengthRange = Field((3.0, 20.0), description="distance that such cuts keep from the brain")
    background_probability: float = _chance(0.0, "that the air around the head is set to zero")
    background_mm: Range = Field((-2.0, 8.0), description="how far outside the head; negative cuts into the skin")


class ModesConfig(Section):
    """Brains without a head. Images that are stripped along the labels are left alone."""

    exvivo_probability: float = _chance(0.0, "of an ex-vivo scan: the brain in a fluid, which fills the ventricles too")
    exvivo_fluid_mean: StrengthRange = Field((0.0, 1.0), description="intensity of the fluid")
    exvivo_fluid_std: StrengthRange = Field((0.0, 0.05), description="smooth change of that intensity over space")
    photo_probability: float = _chance(0.0, "of dissection photographs: coronal slabs on black")
    photo_spacing_mm: LengthRange = Field((4.0, 10.0), description="thickness of a slab: from photograph to photograph")
    photo_shift_mm: float = Field(1.0, ge=0, description="std of each slab's shift along each axis of its plane")
    photo_rotation_deg: float = Field(1.5, ge=0, description="std of each slab's turn in its plane")
    photo_gain_std: float = Field(0.2, ge=0, description="brightness of each slab is 2 to the power of N(0, this)")
    photo_gamma_std: float = Field(0.2, ge=0, description="gamma of each slab is 2 to the power of N(0, this)")
    photo_slope_std: float = Field(
        0.1, ge=0, description="light changes by N(0, this) of itself from the middle of a photograph to its edge"
    )


class ArtefactConfig(Section):
    """What the scanner and the storage do to an image. Mild values of bias, gamma and noise are Brain-ID's (2024)."""

    bias_std: StrengthRange = Field(
        (0.0, 0.5), description="std of the log bias field on its coarse grid", json_schema_extra={"mild": [0.0, 0.02]}
    )
    bias_spacing_mm: LengthRange = Field(
        (40.0, 120.0),
        description="spacing of the control points of the bias field, of local contrast and of the noise level",
        json_schema_extra={"mild": [80.0, 160.0]},
    )
    gamma_std: float = Field(0.3, ge=0, description="log gamma is N(0, this)", json_schema_extra={"mild": 0.01})
    local_contrast_std: StrengthRange = Field(
        (0.0, 0.0), description="std over space of log gamma", json_schema_extra={"mild": [0.0, 0.0]}
    )
    noise_std: StrengthRange = Field(
        (0.0, 0.05),
        description="standard deviation of each channel of the Rician noise, on the scale of the means",
        json_schema_extra={"mild": [0.0, 0.0001]},
    )
    noise_probability: float = Field(0.8, ge=0, le=1, description="chance that an image has noise")
    noise_spread: StrengthRange = Field(
        (0.0, 0.0),
        description="std over space of the log of the noise's standard deviation (parallel imaging)",
        json_schema_extra={"mild": [0.0, 0.0]},
    )
    ct_physics: bool = Field(
        False,
        description="CT contrasts (`ct`, Hounsfield) have no bias field, gamma or MR artefact; their noise is Gaussian",
    )
    lowres_probability: float = _chance(0.5, "that an image is acquired on a coarser grid")
    lowres_isotropic_probability: float = _chance(
        0.3, "that all three axes of such an image are coarser, else one is", mild=None
    )
    lowres_spacing_mm: float = Field(8.0, gt=0, description="slice spacing is U[voxel size, this]")
    lowres_isotropic_mm: float = Field(4.0, gt=0, description="isotropic spacing is U[voxel size, this]")
    crop_probability: float = _chance(0.25, "that the field of view loses a part")
    crop_fraction: float = Field(0.35, ge=0, lt=1, description="at most this part of an axis is lost on one side")
    strip_probability: float = _chance(0.3, "of a skull-stripped image")
    kspace: KSpaceConfig = KSpaceConfig()
    storage: StorageConfig = StorageConfig()
    masking: MaskingConfig = MaskingConfig()
    modes: ModesConfig = ModesConfig()
