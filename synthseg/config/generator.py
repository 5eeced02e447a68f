"""What is random about a synthetic image, and how much."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from synthseg.config.anatomy import AnatomyConfig
from synthseg.config.anomalies import AnomalyConfig
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
from synthseg.config.views import ViewsConfig
from synthseg.errors import ConfigError
from synthseg.paths import data_dir


class GeneratorConfig(Section):
    """One synthetic image: grid, deformation, contrast, artefacts."""

    voxel_size_mm: float = Field(2.0, gt=0, description="isotropic voxel size of image, labels and network")
    shape: Triple = Field((80, 96, 80), description="voxels of the rendered patch, RAS+")
    subsamples: Literal[1, 2, 4, 8] = Field(8, description="points per voxel that are averaged (partial volume)")
    anatomy: AnatomyConfig = AnatomyConfig()
    anomalies: AnomalyConfig = AnomalyConfig()
    deform: DeformConfig = DeformConfig()
    contrast: ContrastConfig = ContrastConfig()
    artefacts: ArtefactConfig = ArtefactConfig()
    views: ViewsConfig = ViewsConfig()


def shipped_presets() -> dict[str, Path]:
    """Name and file of each preset that ships in ``pipelines/presets``; none without that folder."""
    try:
        folder = data_dir("pipelines") / "presets"
    except FileNotFoundError:
        return {}
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def preset_file(name: str) -> Path:
    """The file of a preset. Raises ConfigError that names the presets there are, the nearest first."""
    presets = shipped_presets()
    if name in presets:
        return presets[name]
    near = difflib.get_close_matches(name, presets, n=len(presets), cutoff=0.4)
    known = [*near, *(other for other in presets if other not in near)]
    raise ConfigError(f"there is no preset '{name}'; presets that ship: {', '.join(known) or 'none'}")


def generator_config(path: Path | None, overrides: Sequence[str] = (), preset: str | None = None) -> GeneratorConfig:
    """Generator settings from a preset, a YAML file, the ``generator`` section of a recipe, or the defaults.

    ``path`` may also be the bare name of a recipe or preset that ships.
    """
    if path is not None and preset is not None:
        raise ConfigError(f"preset '{preset}' and file {path}: give one of them; copy the preset's file to change it")
    if path is not None and path.suffix == "" and not path.is_file() and str(path) in shipped_presets():
        preset = str(path)
    file = path if preset is None else preset_file(preset)
    record = read_yaml(file) if file else {}
    record = record.get("generator", record) or {}
    for assignment in overrides:
        set_by_path(record, assignment.removeprefix("generator."))
    return parse(GeneratorConfig, record, str(file or "--set"))
