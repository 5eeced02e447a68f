"""A recipe for pretraining: what the features of a network are to hold before it learns to segment."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from synthseg.config.base import Count, Section
from synthseg.config.generator import GeneratorConfig
from synthseg.config.training import RunConfig
from synthseg.config.views import ViewsConfig

LossName = Literal[
    "info_nce",
    "decoupled",
    "sup_con",
    "ucl",
    "scl",
    "hucl",
    "hscl",
    "barlow_twins",
    "pix_pro",
    "multi_view_info_nce",
    "dhel",
    "mochi",
    "equiangular",
]
SUPERVISED = frozenset({"sup_con", "scl", "hscl", "equiangular"})  # positives by label: one view is enough
SEVERITIES = [0.0, 0.0, 1.0, 1.0]  # of the views, where a recipe does not say: Brain-ID's two mild and two severe ones
Level = Annotated[int, Field(lt=0)]


class SamplingConfig(Section):
    """Which voxels are compared. The same anatomical points are taken from every view."""

    voxels: int = Field(512, gt=1, description="points of each anatomy and level; each is seen in every view")
    levels: tuple[Level, ...] = Field(
        (-1,), min_length=1, description="levels of the decoder: -1 the finest, -2 the next coarser, and so on"
    )
    boundary_fraction: float = Field(0.25, ge=0, le=1, description="share of the points at borders between labels")
    balance: float = Field(
        1.0, ge=0, le=1, description="0: labels as frequent as in the image, 1: every label the same number of points"
    )
    exclusion_mm: float = Field(4.0, ge=0, description="points nearer than this are no negatives of each other")
    exclude_mirrored: bool = Field(
        True, description="points of one structure on the two sides of the head are no negatives of each other"
    )


class ContrastConfig(Section):
    """One contrastive term: what is alike lies close together, what is not far apart."""

    loss: LossName = Field("hscl", description="its formula (docs/contrastive.md)")
    weight: float = Field(1.0, gt=0, description="of this term in the sum")
    temperature: float = Field(0.33, gt=0, description="similarities are divided by it")
    beta: float = Field(5.0, ge=0, description="hucl, hscl: how much harder negatives count; 0: all the same")
    projection: Literal["sphere", "ball", "none"] = Field(
        "sphere", description="embeddings of length 1, of length at most 1, or as they are"
    )
    heads: Count = Field(1, description="projection heads, whose losses are averaged")
    hidden: Count = Field(256, description="channels inside a projection head")
    dimensions: Count = Field(128, description="channels of the embeddings")
    adaptive_temperature: bool = Field(False, description="each head learns a temperature for each pair (AMCL)")
    sampling: SamplingConfig = SamplingConfig()


class PretrainConfig(RunConfig):
    """A recipe for pretraining: the sum of an anatomy term, contrastive terms and a segmentation term.

    Where it says nothing of views, each anatomy is seen in four: `generator.views.severities` is [0, 0, 1, 1].
    """

    name: str = Field("pretrained", description="name of the run; its folder is runs/<name>")
    scheme: str = Field("siam16", description="labels for segmentation and for supervised contrast")
    batch_size: int = Field(1, gt=0, description="anatomies a step, shared by all devices; each is seen in all views")
    anatomy_weight: float = Field(
        1.0, ge=0, description="weight of the error of a T1 image made from the features (Brain-ID)"
    )
    gradient_weight: float = Field(1.0, ge=0, description="weight of the gradients of that image in its error")
    segmentation_weight: float = Field(0.0, ge=0, description="weight of soft Dice and cross-entropy of all views")
    scored_cells: int = Field(
        0, ge=0, le=8, description="voxels of each subpixel block whose segmentation a step scores; 0: all"
    )
    contrast: tuple[ContrastConfig, ...] = Field((), description="contrastive terms on voxels")
    generator: GeneratorConfig = GeneratorConfig(views=ViewsConfig(severities=SEVERITIES))

    @field_validator("contrast", mode="before")
    @classmethod
    def _one_may_stand_alone(cls, value: object) -> object:
        """A single term need not be a list."""
        return [value] if isinstance(value, dict) else value

    @model_validator(mode="before")
    @classmethod
    def _several_views(cls, record: Any) -> Any:
        """A generator section without severities of views gets those that a recipe without the section has."""
        generator = record.get("generator") if isinstance(record, dict) else None
        if not isinstance(generator, dict):
            return record
        views = generator.get("views") or {}
        if isinstance(views, dict) and "severities" not in views:
            return {**record, "generator": {**generator, "views": {"severities": SEVERITIES, **views}}}
        return record
