"""Means of tissues: fully random, in the ranges of a named contrast, or as measured in real scans; and their ties."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from synthseg.config import ContrastConfig
from synthseg.errors import ConfigError
from synthseg.generator.draw import Draw
from synthseg.generator.priors import Priors, load_priors

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
# Pairs of tissues with a common border, which vanishes if the first takes the mean of the second.
TOUCHING = (
    ("gm", "csf"),
    ("gm", "wm"),
    ("cerebellar_gm", "csf"),
    ("cerebellar_gm", "wm"),
    ("brainstem", "csf"),
    ("hippocampus", "ventricle"),
    ("hippocampus", "wm"),
    ("amygdala", "wm"),
    ("thalamus", "wm"),
    ("thalamus", "ventricle"),
    ("caudate", "wm"),
    ("caudate", "ventricle"),
    ("putamen", "wm"),
    ("putamen", "pallidum"),
    ("accumbens", "wm"),
    ("lesion", "gm"),
    ("dura", "csf"),
    ("dura", "gm"),
    ("dura", "bone_cortical"),
    ("csf", "bone_cortical"),
    ("vessel", "csf"),
    ("vessel", "gm"),
    ("artery", "csf"),
    ("vein", "csf"),
    ("vein", "dura"),
    ("bone_cancellous", "bone_cortical"),
    ("bone_cancellous", "soft"),
    ("bone_cortical", "air"),
    ("bone_cortical", "soft"),
    ("muscle", "skin"),
    ("skin", "fat"),
    ("soft", "skin"),
    ("mucosa", "air"),
    ("mucosa", "bone_cortical"),
    ("eye", "soft"),
    ("nerve", "soft"),
)


@dataclass
class Means:
    """What a kind of contrast says of the tissues of one image.

    Attributes
    ----------
    mean : per tissue, in units of a bright tissue, or in Hounsfield units.
    std : measured spreads, where they are known; other tissues take the configured one.
    parts : for a tissue that is a mixture, the means of what it is made of.
    settings : field strength, times and angles, for the record.
    """

    name: str
    mean: dict[str, float]
    std: dict[str, float] = field(default_factory=dict)
    parts: dict[str, tuple[float, ...]] = field(default_factory=dict)
    settings: dict[str, float] = field(default_factory=dict)


@lru_cache(maxsize=1)
def named_contrasts() -> dict[str, dict[str, tuple[float, float]]]:
    """Mean ranges per tissue of each named contrast, from contrasts.yaml."""
    table: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "contrasts.yaml").read_text())
    return {name: {t: (float(r[0]), float(r[1])) for t, r in tissues.items()} for name, tissues in table.items()}


def check_named(config: ContrastConfig) -> None:
    """Raises ConfigError if a contrast that is given a weight by name is not in contrasts.yaml."""
    known = ["random", *named_contrasts()]
    unknown = sorted(set(config.named_weights) - set(known))
    if unknown:
        raise ConfigError(f"contrast.named_weights: there is no contrast {unknown}; known: {', '.join(known)}")


def random_means(config: ContrastConfig, tissues: Sequence[str], draw: Draw) -> Means:
    """Any mean for any tissue; a tissue may look like its look-alike, and air is dark."""
    means = {tissue: draw.uniform(*config.mean) for tissue in tissues}
    for tissue, like in LOOK_ALIKES.items():
        if draw.chance(config.tie_probability) and tissue in means:
            means[tissue] = means[like] + draw.normal(0.03)
    means["air"] = 0.0 if draw.chance(config.air_is_zero_probability) else draw.uniform(0.0, 0.15)
    return Means("random", means)


def named_means(name: str, tissues: Sequence[str], draw: Draw) -> Means:
    """Means in the ranges of contrasts.yaml."""
    ranges = named_contrasts()[name]
    means = {tissue: draw.uniform(*ranges.get(tissue, (0.0, 1.0))) for tissue in tissues}
    fat, muscle = (sum(ranges[tissue]) / 2 for tissue in ("fat", "muscle"))
    return Means(name, means, parts={"soft": (fat, muscle), "skin": (fat,)})


def priors_of(config: ContrastConfig) -> Priors | None:
    """The measured priors that the settings ask for. Raises ConfigError if the file cannot be used."""
    return load_priors(config.priors) if config.priors is not None and config.priors_weight > 0 else None


def measured_means(config: ContrastConfig, priors: Priors, tissues: Sequence[str], draw: Draw) -> Means:
    """Means and spreads in the ranges measured in real scans; a tissue that none of them shows is fully random."""
    means = {"air": draw.uniform(0.0, 0.03)}
    spread = {}
    for tissue in tissues:
        if tissue in priors.tissues:
            means[tissue] = draw.uniform(*priors.tissues[tissue].mean)
            spread[tissue] = draw.uniform(*priors.tissues[tissue].std)
        elif tissue != "air":
            means[tissue] = draw.uniform(*config.mean)
    return Means("priors", means, std=spread)


def tie_touching(
    probability: float,
    means: dict[str, float],
    tissues: Collection[str],
    draw: Draw,
    std: float = 0.02,
    reach: float = math.inf,
) -> None:
    """Each touching pair ties with this probability: one of its tissues takes the mean of the other, almost.

    In random order, so that chains and triples arise; a tissue is moved at most once, air never, and by at most
    ``reach``: no scanner shows fluid as bright as bone in a CT.
    """
    moved: set[str] = set()
    for _, first, second in sorted((draw.uniform(0.0, 1.0), *pair) for pair in TOUCHING):
        swap = draw.chance(0.5) and second != "air"
        tissue, like = (second, first) if swap else (first, second)
        change = draw.normal(std)
        chosen = draw.chance(probability) and {tissue, like} <= set(tissues) and tissue not in moved
        if chosen and abs(means[tissue] - means[like]) <= reach:
            means[tissue] = means[like] + change
            moved.add(tissue)


def inverted(means: dict[str, float], parts: dict[str, tuple[float, ...]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Bright and dark exchanged on the range of the means: what was the brightest tissue is as dark as air was."""
    low, high = min(means.values()), max(means.values())
    turned = {tissue: low + high - value for tissue, value in means.items()}
    return turned, {tissue: tuple(low + high - value for value in found) for tissue, found in parts.items()}
