"""What is random about the intensities of a synthetic image."""

from __future__ import annotations

from pydantic import Field, model_validator

from synthseg.config.base import LengthRange, Range, Section, Strength, StrengthRange


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
