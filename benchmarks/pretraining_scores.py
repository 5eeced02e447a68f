"""What a network of the pretraining table is worth: its features and its segmentation, on images that it has not seen.

All images are drawn once, by plans of their own: the same for every network. Used by pretraining.py and its sweeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accuracy import ASEG, COLIN_TISSUES, CONTRASTS, real_scans

from synthseg import rng
from synthseg.config import GeneratorConfig, TrainConfig, ViewsConfig
from synthseg.conforming import conform, crop, head_box
from synthseg.generator.plan import sample_plan
from synthseg.generator.synthesis import render
from synthseg.generator.views import render_views, sample_views
from synthseg.labels import load_scheme
from synthseg.networks.checkpoint import load_model
from synthseg.networks.feature_file import FeatureModel
from synthseg.representation.measures import (
    balanced_voxels,
    linear_probe,
    matching_accuracy,
    matching_radius_mm,
    neighbour_tolerance,
    neural_collapse,
    on_sphere,
    robustness,
    tolerance,
    uniformity,
)
from synthseg.representation.windows import Windows
from synthseg.templates import expand, load_template
from synthseg.training.stream import group_table
from synthseg.training.validation import exact_index, mean_dice, validation_table, whole_head
from synthseg.volume import Volume, canonical, load_volume

SEED = 2026  # of all images that are measured
SEVERITIES = (0.0, 0.5, 1.0)  # of the views of one anatomy
MARGIN = 8  # voxels that the images of one anatomy are cut out apart from each other, at most
MATCHED_VOXELS = 1000
VOXELS_A_LABEL = 300  # of each image, for the geometry of the features and to fit the probe
PROBED_SHARE = 0.125  # of the voxels of each held-out image that the probe is tested on
PROBE_TEMPLATES = 2
Groups = dict[str, tuple[set[int], set[int]]]


@dataclass(frozen=True)
class Image:
    """An image (D, H, W) in [0, 1], the index into siam16 of each voxel."""

    image: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Anatomy:
    """Images (V, 1, D, H, W) of one anatomy, and the index into siam16 of each voxel that all of them show."""

    images: torch.Tensor
    labels: torch.Tensor
    windows: Windows


@dataclass(frozen=True)
class RealScan:
    """A conformed real scan (d, h, w), and the reference id of each of its voxels, with what the ids mean."""

    name: str
    image: torch.Tensor
    reference: torch.Tensor
    groups: Groups


class HeldOut:
    """Images of held-out maps, and of training templates for the probe to be fitted on; the labelled real scans.

    Parameters
    ----------
    templates, held_out : names or folders. data : the folder with ``scans/``, or None.
    """

    def __init__(
        self,
        templates: Sequence[str],
        held_out: Sequence[str],
        voxel_size_mm: float,
        shape: tuple[int, int, int],
        data: Path | None = None,
    ) -> None:
        self.target = load_scheme("siam16")
        self.config = GeneratorConfig(voxel_size_mm=voxel_size_mm, shape=shape, subsamples=4)
        self.maps = [load_template(folder) for folder in expand(held_out)]
        self._fitted_on = expand(templates)[:PROBE_TEMPLATES]
        self._index = [exact_index(template, self.target) for template in self.maps]
        self.data = data

    def views(self) -> Iterator[Anatomy]:
        """One anatomy of each held-out map, in images from mild to severe."""
        quiet = whole_head(self.config, "random")
        shape = self.config.shape
        views_config = ViewsConfig(severities=list(SEVERITIES))
        chance = rng.generator(SEED, 2, "windows")
        for number, (template, index) in enumerate(zip(self.maps, self._index, strict=True)):
            windows = Windows.draw(len(SEVERITIES), shape, MARGIN, chance)
            config = quiet.model_copy(update={"views": views_config, "shape": windows.grid})
            views = render_views(template, sample_views(config, template.name, template.table, SEED, number))
            seen = [windows.cut(image, number) for number, image in enumerate(views.images)]
            inner = windows.shared_of_grid(views.labels[0])
            yield Anatomy(torch.stack(seen), index[inner.int()].long(), windows)

    def images(self, fitting: bool) -> Iterator[Image]:
        """Each held-out map in five contrasts; or the templates that the probe is fitted on, also as brain alone."""
        templates = [load_template(folder) for folder in self._fitted_on] if fitting else self.maps
        for t, template in enumerate(templates):
            index, _ = group_table(template.table, self.target)
            for c, contrast in enumerate([*CONTRASTS, "stripped"] if fitting else CONTRASTS):
                config = stripped(self.config) if contrast == "stripped" else whole_head(self.config, contrast)
                plan = sample_plan(config, template.name, template.table, SEED, 1000 * (1 + fitting) + 10 * t + c)
                image, labels = render([template], [plan])
                yield Image(image[0, 0], index[labels[0].int()].long())

    def real(self) -> list[RealScan]:
        """Colin27 with its tissues and the OASIS scan with its FreeSurfer labels; empty without data."""
        if self.data is None:
            return []
        files = {
            "Colin27": ("colin27_t1", "colin27_tissues", COLIN_TISSUES),
            "OASIS": ("oasis_t1_stripped", "oasis_t1_stripped_aseg", ASEG),
        }
        scans = []
        for name, (scan, labels, groups) in files.items():
            ras = canonical(load_volume(self.data / "scans" / f"{scan}.nii.gz"))
            reference = canonical(load_volume(self.data / "scans" / f"{labels}.nii.gz"))
            box = head_box(ras)
            part = crop(ras, box)
            image = conform(part, self.config.voxel_size_mm)
            ids = at_centres(crop(reference, box), tuple(image.shape), self.config.voxel_size_mm)
            scans.append(RealScan(name, image, ids, groups))
        return scans


def stripped(config: GeneratorConfig) -> GeneratorConfig:
    """A T1 image of the brain alone, as the OASIS scan is."""
    quiet = whole_head(config, "t1")
    return quiet.model_copy(update={"artefacts": quiet.artefacts.model_copy(update={"strip_probability": 1.0})})


def at_centres(labels: Volume, shape: Sequence[int], voxel_size_mm: float) -> torch.Tensor:
    """Ids of a label map at the voxel centres of the conformed grid, which shares its centre; int64 (d, h, w)."""
    picked = []
    for n_in, n_out, spacing in zip(labels.data.shape, shape, labels.spacing_mm, strict=True):
        where = (n_in - 1) / 2 + (np.arange(n_out) - (n_out - 1) / 2) * voxel_size_mm / spacing
        picked.append(np.clip(np.rint(where), 0, n_in - 1).astype(int))
    return torch.from_numpy(np.rint(labels.data[np.ix_(*picked)]).astype(np.int64))


# ------------------------------------------------------------------------------------------------ features


@torch.no_grad()
def finest(model: FeatureModel, image: torch.Tensor) -> torch.Tensor:
    """Finest features (C, D, H, W) of an image (D, H, W) of any size, at the voxels of the image."""
    pad = [(-n) % model.multiple for n in image.shape]
    padded = F.pad(image, (0, pad[2], 0, pad[1], 0, pad[0]))
    features = model.network(padded[None, None])[-1][0].float()
    if features.shape[1:] != padded.shape:
        raise ValueError(f"the table compares networks of subpixel 1, got features {tuple(features.shape)}")
    return features[:, : image.shape[0], : image.shape[1], : image.shape[2]]


def score_features(model: FeatureModel, held_out: HeldOut) -> dict[str, Any]:
    """All measures of the features of a network: of views of the held-out maps, then the linear probe."""
    spacing_mm = held_out.config.voxel_size_mm
    chance = rng.generator(SEED, 0, "measured voxels")
    within, matches, near, found, labels, first, heads = [], [], [], [], [], [], []
    for seen in held_out.views():
        features = torch.stack(
            [seen.windows.shared(finest(model, image), v) for v, image in enumerate(seen.images[:, 0])]
        )
        head = seen.labels > 0
        within.append(robustness(features, head))
        matches += [
            matching_accuracy(features[a], features[b], head, spacing_mm, n=MATCHED_VOXELS, generator=chance)
            for a, b in combinations(range(len(features)), 2)
        ]
        near += [neighbour_tolerance(view, head, seen.labels) for view in features]
        inside = seen.labels[head]
        chosen = balanced_voxels(inside, VOXELS_A_LABEL, chance)
        found += [view[:, head][:, chosen].T for view in features]
        labels += [inside[chosen]] * len(features)
        first.append(features[0])
        heads.append(head)
    common = torch.stack(heads).all(0)
    between = robustness(torch.stack(first), common) if len(first) > 1 else None
    unit, of = on_sphere(torch.cat(found)), torch.cat(labels)
    return {
        "intra_subject": _mean(within),
        "inter_subject": between,
        "matching": float(np.mean(matches)),
        "matching_radius_mm": matching_radius_mm(spacing_mm),
        **neural_collapse(unit, of),
        "uniformity": uniformity(unit),
        "tolerance": tolerance(unit, of),
        "neighbour_tolerance": float(np.mean(near)),
        "probe": probe(model, held_out),
    }


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def probe(model: FeatureModel, held_out: HeldOut) -> dict[str, Any]:
    """Dice of a linear layer fitted on rendered training templates: per structure, on unseen maps and real scans."""
    chance = rng.generator(SEED, 1, "probe")
    fitted, labels = [], []
    for seen in held_out.images(fitting=True):
        flat = seen.labels.flatten()
        chosen = balanced_voxels(flat, VOXELS_A_LABEL, chance)
        fitted.append(finest(model, seen.image).flatten(1)[:, chosen].T)
        labels.append(flat[chosen])
    train, train_labels = torch.cat(fitted), torch.cat(labels)
    tested, truth = [], []
    for seen in held_out.images(fitting=False):
        drawn = torch.rand(seen.labels.numel(), generator=chance) < PROBED_SHARE
        tested.append(finest(model, seen.image).flatten(1)[:, drawn].T)
        truth.append(seen.labels.flatten()[drawn])
    names = dict(enumerate(held_out.target.names))
    scores = linear_probe(train, train_labels, torch.cat(tested), torch.cat(truth))
    result = {"unseen_maps": _named(scores, torch.cat(truth), names)}
    for scan in held_out.real():
        ids = held_out.target.ids[train_labels.numpy()]
        ours = _grouped(torch.from_numpy(ids), [own for own, _ in scan.groups.values()])
        theirs = _grouped(scan.reference.flatten(), [other for _, other in scan.groups.values()])
        scores = linear_probe(train, ours, finest(model, scan.image).flatten(1).T, theirs)
        result[scan.name] = _named(scores, theirs, dict(enumerate(["", *scan.groups])))
    return result


def _named(scores: dict[int, float], truth: torch.Tensor, names: dict[int, str]) -> dict[str, float]:
    """Dice of each structure that there is, background left out, and their mean."""
    present = [label for label in truth.unique().tolist() if label > 0]
    found = {names[label]: round(scores[label], 4) for label in present}
    return {**found, "mean": round(float(np.mean(list(found.values()))), 4)}


def _grouped(ids: torch.Tensor, groups: Sequence[set[int]]) -> torch.Tensor:
    """1, 2, ... for ids of the first, second, ... group, 0 for all others."""
    index = torch.zeros_like(ids, dtype=torch.int64)
    for number, members in enumerate(groups, 1):
        index[torch.isin(ids, torch.tensor(sorted(members)))] = number
    return index


# -------------------------------------------------------------------------------------------- segmentation


def score_segmentation(path: Path, held_out: HeldOut) -> dict[str, Any]:
    """Dice of a model on the held-out maps in five contrasts, on the network's own grid, and on the real scans."""
    model = load_model(str(path))
    config = TrainConfig(generator=held_out.config)
    maps = validation_table(model.network, config, held_out.maps, held_out.target, CONTRASTS)
    row: dict[str, Any] = {
        "unseen_maps": round(mean_dice(maps), 4),
        "by_contrast": {contrast: round(float(np.mean(list(scores.values()))), 4) for contrast, scores in maps.items()},
        "by_structure": maps,
    }
    if held_out.data is not None:
        real = real_scans(model, held_out.data / "scans")
        row |= {key: real[key] for key in ("colin27_tissues", "colin27_aal", "oasis_aseg")}
    return row
