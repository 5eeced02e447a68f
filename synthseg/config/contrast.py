"""What is random about the intensities of a synthetic image."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from synthseg.config.base import Length, LengthRange, Range, Section, Strength, StrengthRange

Sequence = Literal[
    "t1_spin_echo",
    "t2_spin_echo",
    "pd_spin_echo",
    "flair",
    "stir",
    "t1_inversion_recovery",
    "mprage",
    "t1_spoiled",
    "pd_spoiled",
    "t2star_spoiled",
]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _sequences() -> dict[Sequence, float]:
    return {
        "t1_spin_echo": 1.0,
        "t2_spin_echo": 1.0,
        "pd_spin_echo": 0.5,
        "flair": 1.0,
        "stir": 0.3,
        "t1_inversion_recovery": 0.3,
        "mprage": 1.5,
        "t1_spoiled": 0.7,
        "pd_spoiled": 0.3,
        "t2star_spoiled": 0.4,
    }


class ContrastConfig(Section):
    """Intensity of each label: a Gaussian whose mean and spread are drawn per image."""

    random_weight: float = Field(0.5, ge=0, description="weight of fully random means against the named contrasts")
    named_weights: dict[str, Strength] = Field(
        default_factory=lambda: {"t1": 0.2, "t2": 0.1, "flair": 0.08, "pd": 0.04, "ct": 0.08},
        description="weight of each contrast of generator/contrasts.yaml",
    )
    physics_weight: float = Field(
        0.0, ge=0, description="weight of MR contrasts computed from relaxation times and a sequence"
    )
    hounsfield_weight: float = Field(0.0, ge=0, description="weight of CT painted in Hounsfield units, then windowed")
    priors_weight: float = Field(0.0, ge=0, description="weight of means and spreads measured in real scans (priors)")
    priors: str | None = Field(None, description="file of `synthseg priors estimate`, used with priors_weight")
    mean: Range = Field((0.0, 1.0), description="means of the fully random contrasts")
    std: StrengthRange = Field(
        (0.0, 0.06), description="standard deviation inside a label", json_schema_extra={"mild": [0.0, 0.02]}
    )
    texture_std: StrengthRange = Field(
        (0.0, 0.08),
        description="amplitude of a smooth texture inside a label",
        json_schema_extra={"mild": [0.0, 0.02]},
    )
    soft_texture_std: StrengthRange = Field(
        (0.0, 0.3),
        description="the same for soft tissue, where fat and muscle share a label",
        json_schema_extra={"mild": [0.0, 0.1]},
    )
    plain_probability: float = Field(
        0.0,
        ge=0,
        le=1,
        description="chance that no label has noise or texture of its own: what noise there is, is the scanner's",
    )
    texture_spacing_mm: LengthRange = Field((6.0, 30.0), description="spacing of the control points of the texture")
    octave_probability: float = Field(
        0.0, ge=0, le=1, description="chance that the texture is a sum of several scales with random weights"
    )
    octave_spacing_mm: tuple[Length, ...] = Field(
        (2.0, 5.0, 15.0, 40.0), min_length=1, max_length=8, description="spacing of the control points of each scale"
    )
    cluster_probability: float = Field(
        0.0,
        ge=0,
        le=1,
        description="chance that labels consist of smooth patches, each with a mean of its own",
        json_schema_extra={"mild": 0.0},
    )
    max_clusters: int = Field(
        4, ge=1, le=4, description="patches per tissue are 1 to this many kinds, drawn per tissue"
    )
    cluster_offset: StrengthRange = Field(
        (0.0, 0.04),
        description="standard deviation of the means of the patches of brain and fluid",
        json_schema_extra={"mild": [0.0, 0.02]},
    )
    soft_cluster_offset: StrengthRange = Field(
        (0.0, 0.3),
        description="the same outside the brain (skull, skin, soft tissue, vessels)",
        json_schema_extra={"mild": [0.0, 0.1]},
    )
    cluster_spacing_mm: LengthRange = Field((8.0, 40.0), description="spacing of the fields that are cut into patches")
    tie_probability: float = Field(
        0.35,
        ge=0,
        le=1,
        description="chance that a tissue takes the mean of its look-alike",
        json_schema_extra={"mild": 0.0},
    )
    touching_tie_probability: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="chance, for each pair of tissues that touch, that one takes the mean of the other (any contrast)",
        json_schema_extra={"mild": 0.0},
    )
    air_is_zero_probability: float = Field(
        0.5,
        ge=0,
        le=1,
        description="chance that the air of a random contrast is exactly 0, else its mean is U[0, 0.15]",
    )
    bright_air_probability: float = Field(
        0.0,
        ge=0,
        le=1,
        description="chance that the mean of air in a random contrast is drawn like that of any tissue",
        json_schema_extra={"mild": 0.0},
    )
    invert_probability: float = Field(
        0.0,
        ge=0,
        le=1,
        description="chance that bright and dark are exchanged, air included (any contrast but CT)",
        json_schema_extra={"mild": 0.0},
    )
    physics_sequences: dict[Sequence, Strength] = Field(
        default_factory=_sequences,
        description="weight of each sequence of generator/relaxation.yaml among the MR contrasts that are computed",
    )
    fat_suppression_probability: float = Field(
        0.0, ge=0, le=1, description="chance that a computed MR contrast suppresses fat to 5 to 20 % of its signal"
    )
    flow_probability: float = Field(
        0.0,
        ge=0,
        le=1,
        description="chance, for arteries and veins, of flow void (spin echo) or inflow (gradient echo)",
    )
    enhanced_probability: float = Field(
        0.0, ge=0, le=1, description="chance of contrast agent in vessels, dura and mucosa (computed MR, Hounsfield CT)"
    )
    ct_other_window_probability: float = Field(
        0.0,
        ge=0,
        le=1,
        description="chance of the brain or bone window or of none, instead of -100 to 150 HU (Hounsfield CT)",
        json_schema_extra={"mild": 0.0},
    )
    ct_streak_strength: tuple[Fraction, Fraction] = Field(
        (0.0, 0.0),
        description="beam hardening of Hounsfield CT: loss per squared path through bone; scans show 0.02 to 0.15",
        json_schema_extra={"mild": [0.0, 0.0]},
    )
    ct_table_probability: float = Field(
        0.0,
        ge=0,
        le=1,
        description="chance of a curved headrest in the air behind the head (Hounsfield CT)",
        json_schema_extra={"mild": 0.0},
    )

    def weights(self) -> dict[str, float]:
        """The weight of every kind of contrast that can be drawn."""
        computed = {"physics": self.physics_weight, "hounsfield": self.hounsfield_weight, "priors": self.priors_weight}
        return {
            "random": self.random_weight,
            **self.named_weights,
            **{name: weight for name, weight in computed.items() if weight > 0},
        }

    def only(self, name: str) -> ContrastConfig:
        """These settings with one contrast: ``random``, ``physics``, ``hounsfield``, ``priors`` or a named one."""
        weights: dict[str, Any] = dict.fromkeys(
            ("random_weight", "physics_weight", "hounsfield_weight", "priors_weight"), 0.0
        )
        field = f"{name}_weight"
        named = {} if field in weights else {name: 1.0}
        if field in weights:
            weights[field] = 1.0
        return self.model_copy(update={**weights, "named_weights": named})

    @model_validator(mode="after")
    def _something_can_be_drawn(self) -> ContrastConfig:
        if sum(self.weights().values()) <= 0:
            raise ValueError("random_weight and named_weights are all 0; give at least one contrast a weight")
        if self.physics_weight > 0 and sum(self.physics_sequences.values()) <= 0:
            raise ValueError("physics_weight is above 0, but the weights of physics_sequences are all 0")
        if self.priors_weight > 0 and self.priors is None:
            raise ValueError("priors_weight is above 0, but priors names no file; make one: synthseg priors estimate")
        return self
