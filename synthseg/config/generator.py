"""What is random about a synthetic image, and how much."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from synthseg.config.base import (
    LengthRange,
    Range,
    Section,
    Strength,
    StrengthRange,
    Triple,
    parse,
    read_yaml,
    set_by_path,
)


class DeformConfig(Section):
    """Affine and diffeomorphic deformation. Ranges follow SynthSeg (Billot 2023), SIAM (2026)."""

    rotation_deg: float = Field(20.0, ge=0, le=180, description="rotation about each axis is U[-r, r] degrees")
    scaling: float = Field(0.15, ge=0, lt=1, description="scale of each axis is U[1-s, 1+s]")
    shear: float = Field(0.02, ge=0, lt=1, description="each shear coefficient is U[-s, s]")
    translation_mm: float = Field(15.0, ge=0, description="shift of the field of view against the brain centre")
    svf_std_mm: float = Field(4.0, ge=0, description="standard deviation of the velocity field is U[0, this]")
    svf_spacing_mm: LengthRange = Field((20.0, 60.0), description="spacing of the control points of the velocity field")
    flip_probability: float = Field(0.5, ge=0, le=1, description="left/right flip, with the labels swapped")


class ContrastConfig(Section):
    """Intensity of each label: a Gaussian whose mean and spread are drawn per image."""

    random_weight: float = Field(0.5, ge=0, description="weight of fully random means against the named contrasts")
    named_weights: dict[str, Strength] = Field(
        default_factory=lambda: {"t1": 0.2, "t2": 0.1, "flair": 0.08, "pd": 0.04, "ct": 0.08},
        description="weight of each contrast of generator/contrasts.yaml",
    )
    mean: Range = Field((0.0, 1.0), description="means of the fully random contrasts")
    std: StrengthRange = Field((0.0, 0.06), description="standard deviation inside a label")
    texture_std: StrengthRange = Field((0.0, 0.08), description="amplitude of a smooth texture inside a label")
    soft_texture_std: StrengthRange = Field(
        (0.0, 0.3), description="the same for soft tissue, where fat and muscle share a label"
    )
    texture_spacing_mm: LengthRange = Field((6.0, 30.0), description="spacing of the control points of the texture")
    tie_probability: float = Field(
        0.35, ge=0, le=1, description="chance that a tissue takes the mean of its look-alike"
    )
    air_is_zero_probability: float = Field(
        0.5,
        ge=0,
        le=1,
        description="chance that the air of a random contrast is exactly 0, else its mean is U[0, 0.15]",
    )

    @model_validator(mode="after")
    def _something_can_be_drawn(self) -> ContrastConfig:
        if self.random_weight + sum(self.named_weights.values()) <= 0:
            raise ValueError("random_weight and named_weights are all 0; give at least one contrast a weight")
        return self


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


class GeneratorConfig(Section):
    """One synthetic image: grid, deformation, contrast, artefacts."""

    voxel_size_mm: float = Field(2.0, gt=0, description="isotropic voxel size of image, labels and network")
    shape: Triple = Field((80, 96, 80), description="voxels of the rendered patch, RAS+")
    subsamples: Literal[1, 2, 4, 8] = Field(8, description="points per voxel that are averaged (partial volume)")
    deform: DeformConfig = DeformConfig()
    contrast: ContrastConfig = ContrastConfig()
    artefacts: ArtefactConfig = ArtefactConfig()


def generator_config(path: Path | None, overrides: Sequence[str] = ()) -> GeneratorConfig:
    """Generator settings from a YAML file of their own, from the ``generator`` section of a recipe, or the defaults."""
    record = read_yaml(path) if path else {}
    record = record.get("generator", record) or {}
    for assignment in overrides:
        set_by_path(record, assignment.removeprefix("generator."))
    return parse(GeneratorConfig, record, str(path or "--set"))
