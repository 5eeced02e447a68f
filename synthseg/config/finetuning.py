"""A recipe for fine-tuning: one layer for one task on the features of a trained network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from synthseg.config.base import Section
from synthseg.config.training import RunConfig

TaskName = Literal["segmentation", "reconstruction", "super-resolution", "bias-field"]
TASKS: tuple[TaskName, ...] = ("segmentation", "reconstruction", "super-resolution", "bias-field")


class ImageConfig(Section):
    """A real image to learn from, or to measure on."""

    image: str = Field(description="the scan, a NIfTI or MGH file")
    labels: str = Field("", description="its label map, on the voxel grid of the scan; segmentation needs one")
    t1: str = Field("", description="a T1 scan of the same head, aligned with the scan; reconstruction needs one")
    scheme: str = Field("", description="the label scheme of the map, by name or JSON file; empty: that of the recipe")
    read_as: dict[int, int] = Field({}, description="ids that the scheme does not have, and the id each is read as")


class FinetuneConfig(RunConfig):
    """A recipe for fine-tuning (Brain-ID's downstream tasks, ECCV 2024)."""

    name: str = Field("finetuned", description="name of the run; its folder is runs/<name>")
    task: TaskName = Field("segmentation", description="what the new layer is to say of each voxel")
    scheme: str = Field("siam16", description="classes, if the task is segmentation")
    templates: tuple[str, ...] = Field((), description="names that ship, or folders of imported templates")
    images: tuple[ImageConfig, ...] = Field((), description="real images to learn from, instead of or with templates")
    validation_images: tuple[ImageConfig, ...] = Field((), description="real images to measure on, never trained on")
    validation_contrasts: tuple[str, ...] = Field(
        ("t1", "t2", "flair", "random"), min_length=1, description="each held-out template is rendered once in each"
    )
    frozen: bool = Field(True, description="train the new layer alone; false: the whole network")
    new_head: bool = Field(False, description="start the layer anew where the weights of init have one for the task")
    few_shot: Annotated[int, Field(ge=0)] = Field(
        0, description="learn from this many images alone: samples 0, 1, ... of the generator, or the first of images"
    )
    augment: bool = Field(
        True,
        description="real images and those of few_shot have new artefacts each time, real ones also a new deformation",
    )
    steps: int = Field(1000, gt=0, description="optimiser steps")
    validate_every: int = Field(250, gt=0, description="steps between validations")
    gradient_weight: float = Field(
        1.0, ge=0, description="reconstruction, super-resolution: weight of the error of the gradients"
    )
    dice_weight: float = Field(1.0, ge=0, description="segmentation: weight of 1 - soft Dice")
    cross_entropy_weight: float = Field(1.0, ge=0, description="segmentation: weight of the cross-entropy")


def resolve_images(config: FinetuneConfig, folder: Path) -> FinetuneConfig:
    """Files that exist beside the recipe are taken from there; other names stay as they are."""

    def file(name: str) -> str:
        return str(folder / name) if name and (folder / name).is_file() else name

    def resolve(images: tuple[ImageConfig, ...]) -> tuple[ImageConfig, ...]:
        return tuple(
            one.model_copy(update={key: file(getattr(one, key)) for key in ("image", "labels", "t1", "scheme")})
            for one in images
        )

    return config.model_copy(
        update={"images": resolve(config.images), "validation_images": resolve(config.validation_images)}
    )
