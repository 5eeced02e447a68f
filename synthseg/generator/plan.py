"""The Plan: everything random about one synthetic image, as one JSON-able record.

``sample_plan`` draws; ``synthesis.render`` only applies. Sample *i* is a pure function of (config, template table,
seed, *i*). Each stage has a random stream of its own, so a stage can be redrawn while the others stay.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict

from synthseg import rng
from synthseg.config import ArtefactConfig, ContrastConfig, DeformConfig, GeneratorConfig
from synthseg.errors import ConfigError
from synthseg.labels import BRAIN_TISSUES, LabelTable

# tissue -> the tissue that it may share its mean with
LOOK_ALIKES = {
    "ventricle": "csf",
    "cerebellar_gm": "gm",
    "thalamus": "gm",
    "caudate": "gm",
    "putamen": "gm",
    "accumbens": "gm",
    "hippocampus": "gm",
    "amygdala": "gm",
    "pallidum": "wm",
    "brainstem": "wm",
    "lesion": "wm",
    "muscle": "soft",
    "skin": "soft",
    "mucosa": "soft",
    "nerve": "wm",
    "eye": "csf",
    "dura": "bone_cortical",
}


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Field3D(Record):
    """A coarse random field: shape (C, D, H, W) and its values, flattened."""

    shape: tuple[int, int, int, int]
    values: tuple[float, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Field3D:
        return cls(shape=tuple(tensor.shape), values=tuple(tensor.flatten().tolist()))

    def tensor(self, device: torch.device | str = "cpu") -> torch.Tensor:
        return torch.tensor(self.values, dtype=torch.float32, device=device).reshape(self.shape)


class DeformPlan(Record):
    """Output position p (mm from the patch centre) reads the template at ``center + matrix @ exp(v)(p) + shift_mm``."""

    matrix: tuple[tuple[float, float, float], ...]
    shift_mm: tuple[float, float, float]
    velocity_mm: Field3D | None
    flip: bool


class ContrastPlan(Record):
    """Mean, spread and texture amplitude per template label (table order); labels not drawn are stripped."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    texture_std: tuple[float, ...]
    texture: Field3D
    noise_seed: int
    visible: tuple[bool, ...]


class ArtefactPlan(Record):
    log_bias: Field3D | None
    gamma: float
    spacing_mm: tuple[float, float, float]
    thickness_mm: tuple[float, float, float]
    noise_std: float
    noise_seed: int
    crop: tuple[tuple[float, float], ...]


class Plan(Record):
    template: str
    scheme: str
    seed: int
    index: int
    voxel_size_mm: float
    shape: tuple[int, int, int]
    subsamples: int
    deform: DeformPlan
    contrast: ContrastPlan
    artefacts: ArtefactPlan


class Draw:
    """Scalar draws from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def normal(self, std: float) -> float:
        return std * float(torch.randn((), generator=self.generator, dtype=torch.float64))

    def chance(self, probability: float) -> bool:
        return self.uniform(0.0, 1.0) < probability

    def seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self.generator))

    def pick(self, weights: dict[str, float]) -> str:
        at = self.uniform(0.0, sum(weights.values()))
        for name, weight in weights.items():
            at -= weight
            if at < 0:
                return name
        return list(weights)[-1]

    def field(self, channels: int, extent_mm: tuple[float, ...], spacing_mm: float, std: float) -> Field3D:
        """Normal values on a lattice whose points are about ``spacing_mm`` apart."""
        lattice = [max(2, math.ceil(extent / spacing_mm) + 1) for extent in extent_mm]
        return Field3D.of(std * torch.randn((channels, *lattice), generator=self.generator))


@lru_cache(maxsize=1)
def named_contrasts() -> dict[str, dict[str, tuple[float, float]]]:
    """Mean ranges per tissue of each named contrast, from contrasts.yaml."""
    table: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "contrasts.yaml").read_text())
    return {name: {t: (float(r[0]), float(r[1])) for t, r in tissues.items()} for name, tissues in table.items()}


def _rotation(degrees: tuple[float, ...]) -> torch.Tensor:
    out = torch.eye(3, dtype=torch.float64)
    for axis, angle in enumerate(degrees):
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        i, j = (k for k in range(3) if k != axis)
        turn = torch.eye(3, dtype=torch.float64)
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
        out = turn @ out
    return out


def sample_deform(config: DeformConfig, extent_mm: tuple[float, ...], draw: Draw) -> DeformPlan:
    angles = tuple(draw.uniform(-config.rotation_deg, config.rotation_deg) for _ in range(3))
    scales = torch.tensor([draw.uniform(1 - config.scaling, 1 + config.scaling) for _ in range(3)], dtype=torch.float64)
    shear = torch.eye(3, dtype=torch.float64)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        shear[i, j] = draw.uniform(-config.shear, config.shear)
    matrix = _rotation(angles) @ torch.diag(scales) @ shear
    shift = tuple(draw.uniform(-config.translation_mm, config.translation_mm) for _ in range(3))
    spacing = draw.uniform(*config.svf_spacing_mm)
    std = draw.uniform(0.0, config.svf_std_mm)
    velocity = draw.field(3, extent_mm, spacing, std) if std > 0 else None
    rows = tuple(tuple(row) for row in matrix.tolist())
    return DeformPlan(matrix=rows, shift_mm=shift, velocity_mm=velocity, flip=draw.chance(config.flip_probability))


def sample_contrast(
    config: ContrastConfig, table: LabelTable, extent_mm: tuple[float, ...], draw: Draw, strip: bool
) -> ContrastPlan:
    """Means are drawn per tissue, so that left and right, and parts of one tissue, agree."""
    name = draw.pick({"random": config.random_weight, **config.named_weights})
    tissues = sorted({label.tissue for label in table.labels} | {"gm", "wm", "csf", "soft", "bone_cortical"})
    means: dict[str, float] = {}
    if name == "random":
        for tissue in tissues:
            means[tissue] = draw.uniform(*config.mean)
        for tissue, like in LOOK_ALIKES.items():
            if draw.chance(config.tie_probability) and tissue in means:
                means[tissue] = means[like] + draw.normal(0.03)
        means["air"] = 0.0 if draw.chance(config.air_is_zero_probability) else draw.uniform(0.0, 0.15)
    else:
        ranges = named_contrasts().get(name)
        if ranges is None:
            known = ", ".join(["random", *named_contrasts()])
            raise ConfigError(f"contrast.named_weights: there is no contrast '{name}'; known: {known}")
        for tissue in tissues:
            means[tissue] = draw.uniform(*ranges.get(tissue, (0.0, 1.0)))
    spread = {t: draw.uniform(*config.std) for t in tissues}
    rough = {
        t: draw.uniform(*(config.soft_texture_std if t in {"soft", "bone_cancellous"} else config.texture_std))
        for t in tissues
    }
    if name == "ct":  # soft tissue differs by a few Hounsfield units only; keep noise and texture to that scale
        spread = {t: 0.25 * s for t, s in spread.items()}
        rough = {t: (s if t == "soft" else 0.15 * s) for t, s in rough.items()}
    spread["air"] = 0.0 if means["air"] == 0.0 else 0.3 * spread["air"]
    rough["air"] = 0.0
    keep_csf = draw.chance(0.6)
    stripped_tissues = (
        BRAIN_TISSUES
        | ({"csf"} if keep_csf else frozenset())
        | ({"vessel", "vein", "artery"} if draw.chance(0.3) else frozenset())
    )
    visible = tuple(not strip or label.tissue in stripped_tissues or label.id == 0 for label in table.labels)
    if strip:
        means["air"], spread["air"] = 0.0, 0.0
    order = [label.tissue for label in table.labels]
    return ContrastPlan(
        name=name,
        mean=tuple(means[t] for t in order),
        std=tuple(spread[t] for t in order),
        texture_std=tuple(rough[t] for t in order),
        texture=draw.field(1, extent_mm, draw.uniform(*config.texture_spacing_mm), 1.0),
        noise_seed=draw.seed(),
        visible=visible,
    )


def sample_artefacts(
    config: ArtefactConfig, voxel_size_mm: float, extent_mm: tuple[float, ...], draw: Draw
) -> ArtefactPlan:
    bias_std = draw.uniform(*config.bias_std)
    bias = draw.field(1, extent_mm, draw.uniform(*config.bias_spacing_mm), bias_std) if bias_std > 0 else None
    spacing = [voxel_size_mm] * 3
    thickness = [0.0] * 3
    if draw.chance(config.lowres_probability):
        if draw.chance(config.lowres_isotropic_probability):
            size = draw.uniform(voxel_size_mm, max(config.lowres_isotropic_mm, voxel_size_mm))
            spacing, thickness = [size] * 3, [size] * 3
        else:
            axis = int(draw.uniform(0, 3))
            spacing[axis] = draw.uniform(voxel_size_mm, max(config.lowres_spacing_mm, voxel_size_mm))
            thickness[axis] = spacing[axis] * draw.uniform(0.5, 1.0)
    crop = [(0.0, 1.0)] * 3
    if draw.chance(config.crop_probability):
        axis = int(draw.uniform(0, 3))
        lost = draw.uniform(0.0, config.crop_fraction)
        crop[axis] = (lost, 1.0) if draw.chance(0.5) else (0.0, 1.0 - lost)
    return ArtefactPlan(
        log_bias=bias,
        gamma=math.exp(draw.normal(config.gamma_std)),
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        thickness_mm=(thickness[0], thickness[1], thickness[2]),
        noise_std=draw.uniform(*config.noise_std) if draw.chance(config.noise_probability) else 0.0,
        noise_seed=draw.seed(),
        crop=tuple(crop),
    )


def sample_plan(config: GeneratorConfig, template: str, table: LabelTable, seed: int, index: int) -> Plan:
    """Draw everything that is random about sample ``index``."""
    extent = tuple(n * config.voxel_size_mm for n in config.shape)

    def draw(stage: str) -> Draw:
        return Draw(rng.generator(seed, index, stage))

    strip = draw("strip").chance(config.artefacts.strip_probability)
    return Plan(
        template=template,
        scheme=table.name,
        seed=seed,
        index=index,
        voxel_size_mm=config.voxel_size_mm,
        shape=config.shape,
        subsamples=config.subsamples,
        deform=sample_deform(config.deform, extent, draw("deform")),
        contrast=sample_contrast(config.contrast, table, extent, draw("contrast"), strip),
        artefacts=sample_artefacts(config.artefacts, config.voxel_size_mm, extent, draw("artefacts")),
    )
