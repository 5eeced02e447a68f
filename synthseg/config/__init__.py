"""Configuration: pydantic models, YAML in, YAML out."""

from synthseg.config.anatomy import AnatomyConfig
from synthseg.config.anomalies import AnomalyConfig
from synthseg.config.artefacts import ArtefactConfig
from synthseg.config.base import Section, load_yaml, parse, read_yaml, set_by_path, to_yaml
from synthseg.config.contrast import ContrastConfig
from synthseg.config.deform import DeformConfig
from synthseg.config.finetuning import FinetuneConfig, ImageConfig, resolve_images
from synthseg.config.generator import GeneratorConfig, generator_config, preset_file, shipped_presets
from synthseg.config.pretraining import PretrainConfig
from synthseg.config.training import NetworkConfig, OptimiserConfig, RunConfig, TrainConfig, resolve_paths
from synthseg.config.views import ViewsConfig

__all__ = [
    "AnatomyConfig",
    "AnomalyConfig",
    "ArtefactConfig",
    "ContrastConfig",
    "DeformConfig",
    "FinetuneConfig",
    "GeneratorConfig",
    "ImageConfig",
    "NetworkConfig",
    "OptimiserConfig",
    "PretrainConfig",
    "RunConfig",
    "Section",
    "TrainConfig",
    "ViewsConfig",
    "generator_config",
    "load_yaml",
    "parse",
    "preset_file",
    "read_yaml",
    "resolve_images",
    "resolve_paths",
    "set_by_path",
    "shipped_presets",
    "to_yaml",
]
