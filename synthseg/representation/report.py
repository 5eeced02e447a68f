"""Measure a feature network on synthetic images: several anatomies, each in several appearances.

The images are fixed by seed and templates, not by the network, so that the figures of two networks compare. They have
the contrasts and artefacts of the preset `brain-id`; heads are upright and centred and differ in shape, so that
features of different subjects are compared at the same place. The images of one anatomy are cut out apart from each
other: a network that knows voxels by their place in the image matches none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from synthseg import __version__, rng
from synthseg.config import GeneratorConfig, generator_config
from synthseg.errors import ConfigError
from synthseg.generator.views import render_views, sample_views
from synthseg.labels import LabelTable, load_scheme
from synthseg.networks.feature_file import FeatureModel
from synthseg.representation import measures
from synthseg.representation.extraction import cell_of, extract_image
from synthseg.representation.pca import fit_pca, sample
from synthseg.representation.picture import Row
from synthseg.representation.windows import Windows
from synthseg.templates import Template
from synthseg.volume import Volume

SEVERITIES = (0.0, 1 / 3, 2 / 3, 1.0)
SCHEME = "siam16"
PER_LABEL = 60  # voxels of each label of each image, for the geometry of the classes and to train the probe
TEST_VOXELS = 20_000  # of each image, to test the probe
APART_MM, APART_SHARE = 16.0, 0.25  # between the images of one anatomy, at most, and that part of the field of view
MATCHED = 1000  # voxels of each pair of images
WITHIN_MM = 2.0
SHOWN = 2  # anatomies in the picture
DISTANCES_MM = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)
UNKNOWN = 255  # a voxel whose template cannot tell the classes of SCHEME apart there


@dataclass
class Measured:
    """Figures of one network, ready for JSON, and rows of a picture."""

    figures: dict[str, Any]
    rows: list[Row] = field(default_factory=list)


@dataclass
class _Subject:
    """Features of all views of one anatomy."""

    values: torch.Tensor  # float16 (V, C, d, h, w)
    labels: torch.Tensor  # (d, h, w), indices into SCHEME or UNKNOWN
    head: torch.Tensor  # bool (d, h, w)
    images: torch.Tensor  # (V, D, H, W), of the same part of the head, on the grid of the network
    affine: np.ndarray  # of the features; that of the images is the voxel size alone
    voxel_size_mm: float
    number: int = 0
    template: str = ""


def measure(
    model: FeatureModel,
    templates: Sequence[Template],
    n: int = 6,
    device: torch.device | str = "cpu",
    *,
    levels: Sequence[int] = (-1,),
    seed: int = 0,
    on_step: Callable[[str], None] = lambda message: None,
) -> Measured:
    """Render ``n`` anatomies of the templates in turn, and measure the features of their views.

    The linear probe is fitted on the first half of the templates and tested on the others; with one template, on the
    first half of the anatomies. Memory holds the features of two anatomies. Raises ConfigError on fewer than two.
    """
    if n < 2:
        raise ConfigError(f"subjects are compared with each other: at least 2 anatomies are needed, got {n}")
    config = report_config(model)
    table = load_scheme(SCHEME)
    used = list(templates)[:n]
    results: dict[str, list[Any]] = {"intra": [], "inter": [], "mild": [], "matching": [], "distances": [], "near": []}
    sampled, probe = _Voxels(), _Probe()
    shown: list[_Subject] = []
    before: _Subject | None = None
    for number in range(n):
        template = used[number % len(used)]
        on_step(f"anatomy {number + 1} of {n}: {template.name}")
        subject = _subject(model, template, config, table, seed, number, device, levels)
        _compare_views(subject, results, seed)
        _sample(subject, sampled, probe, _is_test(number, n, len(used)), seed)
        if before is not None:
            both = subject.head & before.head
            for one, other in zip(before.values, subject.values, strict=True):
                results["inter"].append(measures.robustness(torch.stack([one, other]), both))
        shown += [subject] if number < SHOWN else []
        before = subject
    on_step("geometry of the classes, linear probe")
    facts: dict[str, Any] = {
        "synthseg": __version__,
        "model": model.name,
        "sha256": model.sha256,
        "levels": list(levels),
        "channels": int(shown[0].values.shape[1]),
        "spacing_mm": _spacing_mm(shown[0].affine),
        "templates": [template.name for template in used],
        "anatomies": n,
        "severities": [round(severity, 3) for severity in SEVERITIES],
        "apart_mm": _margin(config, cell_of(model.network, max(levels))) * config.voxel_size_mm,
        "seed": seed,
    }
    figures = facts | _summary(results, facts["spacing_mm"]) | _classes(sampled, table) | {"probe": probe.dice(table)}
    return Measured(figures, _picture_rows(shown))


def report_config(model: FeatureModel) -> GeneratorConfig:
    """The images of the report, on the grid that a network was trained on."""
    sides = [-(-side // model.multiple) * model.multiple for side in model.window]
    settings = [
        f"voxel_size_mm={model.voxel_size_mm}",
        f"shape=[{sides[0]}, {sides[1]}, {sides[2]}]",
        f"views.severities=[{', '.join(map(str, SEVERITIES))}]",
        *(f"deform.{name}=0" for name in ("rotation_deg", "scaling", "shear", "translation_mm", "flip_probability")),
        "artefacts.strip_probability=0",  # all views show the same parts of the head
        "artefacts.modes.exvivo_probability=0",
        "artefacts.modes.photo_probability=0",
    ]
    return generator_config(None, settings, preset="brain-id")


def _margin(config: GeneratorConfig, cell: int) -> int:
    """How many voxels the images of one anatomy lie apart at most, a multiple of ``cell``."""
    return cell * int(min(APART_MM / config.voxel_size_mm, APART_SHARE * min(config.shape)) / cell)


def labels_of_blocks(labels: torch.Tensor, cell: int) -> torch.Tensor:
    """The most frequent label of each block of ``cell`` voxels a side, of labels (D, H, W); of equals the lowest."""
    if cell == 1:
        return labels
    d, h, w = (n // cell for n in labels.shape)
    blocks = labels[: d * cell, : h * cell, : w * cell].reshape(d, cell, h, cell, w, cell)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(d, h, w, cell**3).mode(-1).values


def _subject(
    model: FeatureModel,
    template: Template,
    config: GeneratorConfig,
    table: LabelTable,
    seed: int,
    number: int,
    device: torch.device | str,
    levels: Sequence[int],
) -> _Subject:
    cell = cell_of(model.network, max(levels))
    margin = _margin(config, cell)
    chance = rng.generator(seed, number, "windows")
    windows = Windows.draw(len(SEVERITIES), config.shape, margin, chance, step=cell)
    wide = config.model_copy(update={"shape": windows.grid})
    views = render_views(template, sample_views(wide, template.name, template.table, seed, number))
    values, affine = [], np.eye(4)
    for view, image in enumerate(views.images[:, 0]):
        found = extract_image(windows.cut(image, view), model, device, levels)
        values.append(windows.shared(found.values, view, cell))
        affine = found.affine  # of every window, from its own first voxel
    labels, *others = [labels_of_blocks(windows.shared_of_grid(of_view), cell) for of_view in views.labels]
    head = (labels > 0) & torch.stack([of_view > 0 for of_view in others]).all(0)
    if not bool(head.any()):
        raise ConfigError(f"{template.name}: the network's field of view holds none of its labels")
    groups = torch.from_numpy(template.table.groups(table))
    known = torch.where(groups.sum(1) == 1, groups.long().argmax(1), UNKNOWN)
    return _Subject(
        values=torch.stack(values),
        labels=known[labels.long()],
        head=head,
        images=windows.shared_of_grid(views.images[:, 0]),
        affine=affine,
        voxel_size_mm=model.voxel_size_mm,
        number=number,
        template=template.name,
    )


def _compare_views(subject: _Subject, results: dict[str, list[Any]], seed: int) -> None:
    """Views of one anatomy with each other, and each with the mildest."""
    values, head = subject.values, subject.head
    spacing_mm = _spacing_mm(subject.affine)
    n_views = len(values)
    results["intra"].append(measures.robustness(values, head))
    results["mild"].append([measures.robustness(values, head, pairs=[(0, view)]) for view in range(1, n_views)])
    accuracy = []
    for view in range(1, n_views):
        generator = rng.generator(seed, subject.number, f"matching/{view}")
        there = measures.matching_distances(values[0], values[view], head, spacing_mm, MATCHED, generator)
        accuracy.append(float((there <= measures.matching_radius_mm(spacing_mm, WITHIN_MM) + 1e-4).float().mean()))
        results["distances"].append([float((there <= limit + 1e-4).float().mean()) for limit in DISTANCES_MM])
    results["matching"].append(accuracy)
    known = head & (subject.labels != UNKNOWN)
    results["near"].append(float(np.mean([measures.neighbour_tolerance(v, known, subject.labels) for v in values])))


# --------------------------------------------------------------------------------------- voxels of all anatomies


@dataclass
class _Voxels:
    """Features (N, C) and labels (N,) collected image by image."""

    features: list[torch.Tensor] = field(default_factory=list)
    labels: list[torch.Tensor] = field(default_factory=list)

    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        self.features.append(features.float())
        self.labels.append(labels)

    def joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat(self.features), torch.cat(self.labels)


@dataclass
class _Probe:
    """Training voxels, balanced, and test voxels, as they come."""

    train: _Voxels = field(default_factory=_Voxels)
    test: _Voxels = field(default_factory=_Voxels)

    def dice(self, table: LabelTable) -> dict[str, float]:
        scores = measures.linear_probe(*self.train.joined(), *self.test.joined())
        return {table.names[index]: score for index, score in scores.items()}


def _is_test(number: int, n: int, n_templates: int) -> bool:
    """Whether an anatomy is one to test the probe on."""
    return number % n_templates >= n_templates / 2 if n_templates > 1 else number >= n / 2


def _sample(subject: _Subject, sampled: _Voxels, probe: _Probe, is_test: bool, seed: int) -> None:
    where = (subject.head & (subject.labels != UNKNOWN) & (subject.labels > 0)).flatten().nonzero()[:, 0]
    if len(where) == 0:
        return
    labels = subject.labels.flatten()[where]
    for view, values in enumerate(subject.values):
        flat = values.flatten(1)
        generator = rng.generator(seed, subject.number, f"voxels/{view}")
        few = measures.balanced_voxels(labels, PER_LABEL, generator)
        sampled.add(flat[:, where[few]].T, labels[few])
        if not is_test:
            probe.train.add(flat[:, where[few]].T, labels[few])
        else:
            some = torch.randperm(len(where), generator=generator)[:TEST_VOXELS]
            probe.test.add(flat[:, where[some]].T, labels[some])


# ------------------------------------------------------------------------------------------------------- summary


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def _summary(results: dict[str, list[Any]], spacing_mm: float) -> dict[str, Any]:
    intra, inter = _mean(results["intra"]), _mean(results["inter"])
    return {
        "intra_subject": intra,
        "inter_subject": inter,
        "separation": {
            "l1_ratio": inter["l1"] / intra["l1"] if intra["l1"] > 0 else math.inf,
            "ssim_difference": intra["ssim"] - inter["ssim"],
            "ms_ssim_difference": intra["ms_ssim"] - inter["ms_ssim"],
        },
        "by_severity": [_mean([of_one[view] for of_one in results["mild"]]) for view in range(len(SEVERITIES) - 1)],
        "matching": {
            "within_mm": measures.matching_radius_mm(spacing_mm, WITHIN_MM),
            "accuracy": float(np.mean(results["matching"])),
            "by_severity": [float(value) for value in np.mean(results["matching"], axis=0)],
            "distances_mm": list(DISTANCES_MM),
            "share_within": [float(value) for value in np.mean(results["distances"], axis=0)],
        },
        "neighbour_tolerance": float(np.nanmean(results["near"])),
    }


def _classes(sampled: _Voxels, table: LabelTable) -> dict[str, Any]:
    """The geometry of balanced voxels of all images, on the unit sphere."""
    if not sampled.features:
        raise ConfigError(f"the templates cannot tell apart the classes of {SCHEME}; give one of finer labels")
    features, labels = sampled.joined()
    unit = measures.on_sphere(features)
    present, means = measures.class_means(unit, labels)
    return {
        "neural_collapse": measures.neural_collapse(unit, labels),
        "uniformity": measures.uniformity(unit),
        "tolerance": measures.tolerance(unit, labels),
        "spectrum": [float(share) for share in measures.spectrum(unit)],
        "spectrum_means": [float(share) for share in measures.spectrum(means)],
        "classes": [table.names[index] for index in present.tolist()],
        "class_cosines": [[float(value) for value in row] for row in measures.class_cosines(means)],
    }


def _picture_rows(subjects: Sequence[_Subject]) -> list[Row]:
    """Every view of some anatomies in grey and in colours that they share."""
    samples = [sample(values, subject.head) for subject in subjects for values in subject.values]
    basis = fit_pca(samples, min(3, samples[0].shape[1]))
    return [
        Row(
            f"{subject.template}, anatomy {subject.number + 1}, severity {severity:.2f}",
            Volume(image.numpy(), np.diag([*[subject.voxel_size_mm] * 3, 1.0])),
            basis.colors(values),
            subject.affine,
            subject.head.numpy(),
        )
        for subject in subjects
        for severity, image, values in zip(SEVERITIES, subject.images, subject.values, strict=True)
    ]


def _spacing_mm(affine: np.ndarray) -> float:
    return float(np.linalg.norm(affine[:3, 0]))
