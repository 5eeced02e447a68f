"""Intensities of tissues measured in real scans with label maps: ranges that the generator can draw from.

Every scan is normalised as inference does, so that the ranges are on the scale of what a network sees. Location and
spread are the median and the scaled median absolute deviation, away from tissue borders where there is room.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import yaml
from pydantic import Field

from synthseg import intensity
from synthseg.config import Section, parse, read_yaml
from synthseg.config.base import Range, StrengthRange
from synthseg.errors import ConfigError, InputError, LabelError
from synthseg.labels import LabelTable
from synthseg.templates import label_map_files, read_label_map
from synthseg.volume import IMAGE_SUFFIXES, canonical, check_readable, image_stem, image_suffix, load_volume

FEWEST_VOXELS = 50
MAD_TO_STD = 1.4826  # of a normal distribution
WIDEN_MEAN = 0.03  # at least; else a quarter of the spread over the scans
OUTER_TISSUES = frozenset({"skin", "soft", "fat", "muscle"})  # where one is labelled, background is air
_MAP_ROLES = r"labels?|seg|dseg|aseg|aparc\+aseg|synthseg"
_MAP = re.compile(rf"(^|[_.-])({_MAP_ROLES})$", re.I)
_ROLE = re.compile(rf"[_.-](image|img|t1w?|t2w?|flair|pdw?|ct|{_MAP_ROLES})$", re.I)


class TissuePrior(Section):
    """Ranges of one tissue on the normalised scale."""

    mean: Range = Field(description="medians over the scans, widened")
    std: StrengthRange = Field(description="robust standard deviations over the scans, widened")
    images: int = Field(ge=1, description="scans that show it")
    voxels: int = Field(ge=1, description="voxels measured in all")


class Priors(Section):
    """What ``synthseg priors estimate`` writes."""

    scheme: str = Field(description="label scheme of the maps")
    images: tuple[str, ...] = Field(min_length=1, description="names of the scans")
    tissues: dict[str, TissuePrior] = Field(min_length=1, description="ranges per tissue")

    def to_yaml(self) -> str:
        head = (
            "# Intensity of tissues in real scans, normalised to [0, 1] as inference does.\n"
            "# Use it with contrast.priors and contrast.priors_weight.\n"
        )
        return head + yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


@dataclass(frozen=True)
class Measured:
    """One tissue in one scan."""

    median: float
    std: float
    voxels: int


def load_priors(path: str | Path) -> Priors:
    """Read a file of priors. Raises ConfigError naming what is wrong with it."""
    file = Path(path)
    try:
        stamp = file.stat().st_mtime_ns
    except OSError as error:
        raise ConfigError(
            f"contrast.priors: {file} cannot be read ({error.strerror}); make it with 'synthseg priors estimate'"
        ) from None
    return _load_priors(file, stamp)


@lru_cache(maxsize=8)
def _load_priors(file: Path, stamp: int) -> Priors:
    return parse(Priors, read_yaml(file), str(file))


def normalised(image: np.ndarray) -> np.ndarray:
    """The image in [0, 1] as inference prepares it, on its own grid; float32."""
    tensor = intensity.fill_as_air(intensity.finite(torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))))
    if intensity.looks_like_hounsfield(tensor):
        tensor = tensor.clamp(*intensity.CT_WINDOW_HU)
    return intensity.normalise(tensor).numpy()


def inner(tissue: np.ndarray) -> np.ndarray:
    """Voxels whose six neighbours are of their own tissue, bool; beyond the edge of the image counts as the same."""
    same = np.ones(tissue.shape, dtype=bool)
    for axis in range(3):
        lower = [slice(None)] * 3
        upper = [slice(None)] * 3
        lower[axis], upper[axis] = slice(None, -1), slice(1, None)
        equal = tissue[tuple(lower)] == tissue[tuple(upper)]
        same[tuple(lower)] &= equal
        same[tuple(upper)] &= equal
    return same


def tissues_of(table: LabelTable) -> list[str]:
    """The tissue of each label, in table order. The background is air, whatever its scheme says."""
    return ["air", *(label.tissue for label in table.labels[1:])]


def measure(image: np.ndarray, index: np.ndarray, table: LabelTable) -> dict[str, Measured]:
    """Median and spread of every tissue with enough voxels; ``index`` is a map of table indices on the image's grid.

    Voxels at a border mix two tissues, so they are left out wherever enough remain.
    """
    tissues = tissues_of(table)
    names = sorted(set(tissues))
    tissue = np.array([names.index(name) for name in tissues], dtype=np.uint8)[index]
    present = {names[i] for i in np.unique(tissue)}
    values, core = normalised(image), inner(tissue)
    found = {}
    for name in sorted(present):
        if name == "air" and not present & OUTER_TISSUES:
            continue  # the background of a map of the brain is the rest of the head
        here = tissue == names.index(name)
        inside = here & core
        chosen = values[inside if int(inside.sum()) >= FEWEST_VOXELS else here]
        if chosen.size < FEWEST_VOXELS:
            continue
        median = float(np.median(chosen))
        spread = MAD_TO_STD * float(np.median(np.abs(chosen - median)))
        found[name] = Measured(median, spread, int(chosen.size))
    return found


def widened(scans: Sequence[dict[str, Measured]], names: Sequence[str], scheme: str) -> Priors:
    """Ranges over the scans: lowest to highest, plus a quarter of that on both sides (at least ``WIDEN_MEAN``)."""
    tissues = {}
    for tissue in sorted(set().union(*scans)):
        found = [scan[tissue] for scan in scans if tissue in scan]
        medians, stds = [f.median for f in found], [f.std for f in found]
        more = max(WIDEN_MEAN, (max(medians) - min(medians)) / 4)
        tissues[tissue] = TissuePrior(
            mean=(round(max(0.0, min(medians) - more), 4), round(max(medians) + more, 4)),
            std=(round(0.75 * min(stds), 4), round(1.25 * max(stds), 4)),
            images=len(found),
            voxels=sum(f.voxels for f in found),
        )
    return Priors(scheme=scheme, images=tuple(names), tissues=tissues)


def estimate(
    images: Sequence[Path],
    labels: Sequence[Path],
    table: LabelTable,
    on_done: Callable[[Path], None] = lambda image: None,
) -> Priors:
    """Measure every pair. Raises InputError or LabelError, naming the file, on a pair that cannot be used.

    Scans and their maps may lie in one folder: files there that are named as maps, or given as maps, are no scans.
    """
    maps = _label_files(labels, images)
    pairs = pair_up(_image_files(images, maps), maps)
    scans = []
    for image_file, label_file in pairs:
        label_map = read_label_map(label_file)
        index = table.to_index(label_map.data, str(label_file))
        image = canonical(load_volume(image_file))
        if image.data.shape != label_map.data.shape or not np.allclose(image.affine, label_map.affine, atol=1e-2):
            raise InputError(
                f"{image_file}: its grid ({_by(image.data.shape)}) is not that of {label_file} "
                f"({_by(label_map.data.shape)}), or lies elsewhere; resample the labels to the image"
            )
        scans.append(measure(image.data, index, table))
        if not scans[-1]:
            raise LabelError(
                f"{label_file}: no tissue of scheme '{table.name}' has {FEWEST_VOXELS} voxels; give a segmented scan"
            )
        on_done(image_file)
    return widened(scans, [image.name for image, _ in pairs], table.name)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _key(file: Path) -> str:
    """What two files of one scan share in their names: ``sub1_T1w`` and ``sub1_seg`` have ``sub1``."""
    stem, shorter = image_stem(file), ""
    while stem != shorter:
        shorter, stem = stem, _ROLE.sub("", stem) or stem
    return stem


def _named_as_map(file: Path) -> bool:
    return _MAP.search(image_stem(file)) is not None


def _image_files(paths: Sequence[Path], maps: Sequence[Path]) -> list[Path]:
    given = {file.resolve() for file in maps}
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            check_readable(path)
            files.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if image_suffix(p) and p.is_file() and not p.name.startswith("."))
        scans = [file for file in inside if not _named_as_map(file) and file.resolve() not in given]
        if not scans:
            raise InputError(
                f"{path}: no scan in this folder{', only label maps' if inside else ''}; expected files that end in "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        files += scans
    return files


def _label_files(paths: Sequence[Path], images: Sequence[Path]) -> list[Path]:
    shared = {path.resolve() for path in images}
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = label_map_files(path)
            maps = [file for file in inside if _named_as_map(file)] if path.resolve() in shared else inside
            if not maps:
                raise InputError(f"{path}: holds scans and no label maps; beside scans, end their names in _seg")
            files += maps
        else:
            check_readable(path)
            files.append(path)
    return files


def pair_up(images: Sequence[Path], labels: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Each image with its label map: by what their names share, or the only image with the only map."""
    if len(images) == len(labels) == 1:
        return [(images[0], labels[0])]
    maps: dict[str, list[Path]] = {}
    for file in labels:
        maps.setdefault(_key(file), []).append(file)
    pairs = []
    for image in images:
        found = maps.get(_key(image), [])
        if len(found) != 1:
            raise InputError(
                f"{image}: {'no label map' if not found else f'{len(found)} label maps'} of its name; expected one "
                f"such as {_key(image)}_seg.nii.gz among --labels"
            )
        pairs.append((image, found[0]))
    return pairs
