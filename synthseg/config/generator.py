"""What is random about a synthetic image, and how much."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from synthseg.config.artefacts import ArtefactConfig
from synthseg.config.base import (
    Section,
    Triple,
    parse,
    read_yaml,
    set_by_path,
)
from synthseg.config.contrast import ContrastConfig
from synthseg.config.deform import DeformConfig


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
