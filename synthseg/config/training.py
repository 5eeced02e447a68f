"""A training recipe: templates, network, optimiser, schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from synthseg.config.base import Count, Section
from synthseg.config.generator import GeneratorConfig


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
    schedule: Literal["cosine", "constant", "trapezoid"] = Field(
        "cosine",
        description="down to 1 % at the last step: cosine from the first on, trapezoid linear in the last 40 %",
    )


class DivergenceConfig(Section):
    """When a run counts as lost: the loss, a running mean over about 50 steps, stays far above its lowest value."""

    factor: float = Field(2.0, gt=1, description="how many times the lowest value is far above")
    steps: int = Field(200, ge=0, description="steps in a row above that stop the run; 0: never stop")
    after_steps: int = Field(500, ge=0, description="steps at the start that are not looked at")


class ScanConfig(Section):
    """A real scan with labels, to validate on. It is never trained on."""

    image: str = Field(description="the scan, a NIfTI or MGH file")
    labels: str = Field(description="its label map, on the voxel grid of the scan")
    scheme: str = Field("head", description="the label scheme of the map, by name or JSON file")
    read_as: dict[int, int] = Field({}, description="ids that the scheme does not have, and the id each is read as")
    classes: tuple[str, ...] = Field((), description="classes that are scored; none: all that the labels tell apart")
    name: str = Field("", description="the name in log and report; empty: that of the file")


class RunConfig(Section):
    """What the recipes of training, pretraining and fine-tuning share."""

    name: str = Field("model", description="name of the run; its folder is runs/<name>")
    scheme: str = Field("siam16", description="classes of the network")
    templates: tuple[str, ...] = Field(
        ("phantom",), min_length=1, description="names that ship, or folders of imported templates"
    )
    validation_templates: tuple[str, ...] = Field((), description="never trained on")
    seed: int = Field(0, description="of the first weights and of every sample")
    steps: int = Field(10_000, gt=0, description="optimiser steps")
    batch_size: int = Field(1, gt=0, description="images a step, shared by all devices")
    validate_every: int = Field(1000, gt=0, description="steps between validations")
    checkpoint_every_s: float = Field(180.0, gt=0, description="seconds between saved states")
    report: bool = Field(True, description="write report.html and its pictures at each validation")
    deterministic: bool = Field(False, description="only algorithms whose results do not vary; slower on CUDA")
    workers: int = Field(0, ge=0, description="generator processes; 0 renders in the training process")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16: bfloat16 autocast")
    init: str | None = Field(None, description="weights to start from; layers that do not fit start anew")
    generator: GeneratorConfig = GeneratorConfig()
    network: NetworkConfig = NetworkConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    divergence: DivergenceConfig = DivergenceConfig()


class TrainConfig(RunConfig):
    """A training recipe."""

    validation_contrasts: tuple[str, ...] = Field(
        ("t1", "t2", "flair", "ct", "random"), description="each held-out template is rendered once in each"
    )
    validation_scans: tuple[ScanConfig, ...] = Field((), description="real scans with labels to validate on as well")
    dice_weight: float = Field(1.0, ge=0, description="weight of 1 - soft Dice")
    cross_entropy_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    scored_cells: int = Field(
        0, ge=0, le=8, description="voxels of each subpixel block that a step scores, drawn anew each time; 0: all"
    )
    render_on: Literal["device", "cpu"] = Field(
        "device", description="device: images are rendered on the GPU that trains, if one does; cpu: on the processor"
    )
    grow: bool = Field(
        False, description="the network has one finer level than that of the weights in init, or more channels"
    )


R = TypeVar("R", bound=RunConfig)


def resolve_paths(config: R, folder: Path) -> R:
    """Template folders and scans that exist beside the recipe are taken from there; other names stay as they are."""

    def resolve(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(folder / name) if (folder / name).is_dir() else name for name in names)

    def file(name: str) -> str:
        return str(folder / name) if (folder / name).is_file() else name

    update: dict[str, Any] = {
        "templates": resolve(config.templates),
        "validation_templates": resolve(config.validation_templates),
    }
    if isinstance(config, TrainConfig):
        update["validation_scans"] = tuple(
            scan.model_copy(update={key: file(getattr(scan, key)) for key in ("image", "labels", "scheme")})
            for scan in config.validation_scans
        )
    return config.model_copy(update=update)
