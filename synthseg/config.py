"""Configuration: pydantic models, YAML in, YAML out. An unknown key is an error that names the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from synthseg.errors import ConfigError
from synthseg.paths import data_dir

Range = tuple[float, float]
Strength = Annotated[float, Field(ge=0)]
Length = Annotated[float, Field(gt=0)]
StrengthRange = tuple[Strength, Strength]
LengthRange = tuple[Length, Length]
Count = Annotated[int, Field(gt=0)]
Triple = tuple[Count, Count, Count]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _ranges_are_ordered(cls, value: Any) -> Any:
        if (
            isinstance(value, tuple)
            and len(value) == 2
            and all(isinstance(v, float) for v in value)
            and value[0] > value[1]
        ):
            raise ValueError(f"a range is (low, high), got {value}")
        return value


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


class NetworkConfig(Section):
    """A MONAI network between a space-to-depth stem and a subpixel head.

    With ``subpixel`` 2 the body works at twice the voxel size of input and output (Shi et al., CVPR 2016).
    """

    architecture: Literal["dynunet", "segresnet", "unet"] = Field(
        "dynunet", description="MONAI's DynUNet, SegResNet or UNet"
    )
    channels: tuple[Count, ...] = Field(
        (32, 64, 128, 192),
        min_length=1,
        description="channels of each level, finest first; their number is the number of levels",
    )
    residual: bool = Field(False, description="residual blocks (dynunet)")
    norm: Literal["instance", "group", "batch"] = Field(
        "instance", description="normalisation layers; group is not for dynunet"
    )
    subpixel: Literal[1, 2] = Field(2, description="block size of the stem and the head; 1: neither")

    @property
    def multiple(self) -> int:
        """Each side of the input must be divisible by this."""
        return int(self.subpixel * 2 ** (len(self.channels) - 1))


class OptimiserConfig(Section):
    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for kernels, AdamW for biases and norms; adamw: AdamW for all"
    )
    learning_rate: float = Field(3e-3, gt=0, description="of AdamW, at its highest")
    muon_learning_rate: float = Field(0.02, gt=0, description="of Muon, at its highest")
    weight_decay: float = Field(0.01, ge=0, description="decoupled; not for biases and norms")
    warmup_steps: int = Field(100, ge=0, description="the rate rises linearly over these")
    gradient_clip: float = Field(5.0, gt=0, description="largest norm of the gradient")
    ema_decay: float = Field(
        0.998, ge=0, lt=1, description="decay per step of the averaged weights, which are what is saved"
    )
    schedule: Literal["cosine", "constant"] = Field("cosine", description="cosine: down to 1 % at the last step")


class TrainConfig(Section):
    """A training recipe."""

    name: str = Field("model", description="name of the run; its folder is runs/<name>")
    scheme: str = Field("siam16", description="classes of the network")
    templates: tuple[str, ...] = Field(
        ("phantom",), min_length=1, description="names that ship, or folders of imported templates"
    )
    validation_templates: tuple[str, ...] = Field((), description="never trained on")
    seed: int = Field(0, description="of the first weights and of every sample")
    steps: int = Field(10_000, gt=0, description="optimiser steps")
    batch_size: int = Field(1, gt=0, description="images a step")
    validate_every: int = Field(1000, gt=0, description="steps between validations")
    validation_contrasts: tuple[str, ...] = Field(
        ("t1", "t2", "flair", "ct", "random"), description="each held-out template is rendered once in each"
    )
    checkpoint_every_s: float = Field(180.0, gt=0, description="seconds between saved states")
    workers: int = Field(0, ge=0, description="generator processes; 0 renders in the training process")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16: bfloat16 autocast")
    dice_weight: float = Field(1.0, ge=0, description="weight of 1 - soft Dice")
    cross_entropy_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    scored_cells: int = Field(
        0, ge=0, le=8, description="voxels of each subpixel block that a step scores, drawn anew each time; 0: all"
    )
    init: str | None = Field(None, description="weights to start from; layers that do not fit start anew")
    grow: bool = Field(False, description="the network has one finer level outside that of the weights in init")
    generator: GeneratorConfig = GeneratorConfig()
    network: NetworkConfig = NetworkConfig()
    optimiser: OptimiserConfig = OptimiserConfig()


S = TypeVar("S", bound=Section)


def _known_keys(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return list(model.model_fields)


def parse(model: type[S], record: Mapping[str, Any], where: str) -> S:
    """Validate a record. Raises ConfigError with every problem on one line, and the nearest key for an unknown one."""
    try:
        return model.model_validate(record)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(map(str, item["loc"]))
            if item["type"] == "extra_forbidden":
                known = _known_keys(model, item["loc"][:-1])
                near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.4)
                hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
                problems.append(f"unknown key '{key}', {hint}")
            else:
                problems.append(f"{key}: {item['msg']} (got {item['input']!r})")
        raise ConfigError(f"{where}: " + "; ".join(problems)) from None


def set_by_path(record: dict[str, Any], assignment: str) -> None:
    """Apply one ``key.sub=value`` of the command line to a record; the value is YAML."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {assignment}: expected key=value, for example --set generator.voxel_size_mm=2")
    node = record
    *parents, last = key.split(".")
    for part in parents:
        if node.get(part) is None:  # not there, or a section whose keys are all left out
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {assignment}: '{part}' is not a section")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment}: the value is not valid YAML ({' '.join(str(error).split())})") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file, or of one that ships in ``pipelines/`` if only its name is given."""
    file = Path(path)
    if not file.is_file() and file.suffix == "":
        shipped = data_dir("pipelines") / f"{path}.yaml"
        file = shipped if shipped.is_file() else file
    try:
        record = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}); give a YAML file or the name of a recipe that ships"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None
    if record is not None and not isinstance(record, dict):
        raise ConfigError(f"{file}: expected keys and values, got {type(record).__name__}")
    return record or {}


def load_yaml(model: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read a YAML file (or the name of one that ships) and apply ``key=value`` overrides."""
    record = read_yaml(path)
    for assignment in overrides:
        set_by_path(record, assignment)
    return parse(model, record, str(path))


def generator_config(path: Path | None, overrides: Sequence[str] = ()) -> GeneratorConfig:
    """Generator settings from a YAML file of their own, from the ``generator`` section of a recipe, or the defaults."""
    record = read_yaml(path) if path else {}
    record = record.get("generator", record) or {}
    for assignment in overrides:
        set_by_path(record, assignment.removeprefix("generator."))
    return parse(GeneratorConfig, record, str(path or "--set"))


def resolve_paths(config: TrainConfig, folder: Path) -> TrainConfig:
    """Template folders that exist beside the recipe are taken from there; other names stay as they are."""

    def resolve(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(folder / name) if (folder / name).is_dir() else name for name in names)

    return config.model_copy(
        update={
            "templates": resolve(config.templates),
            "validation_templates": resolve(config.validation_templates),
        }
    )


def to_yaml(config: Section) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
