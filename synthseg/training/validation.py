"""Dice of a network on rendered templates that it was not trained on, and on real scans with labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from synthseg.config import AnatomyConfig, AnomalyConfig, GeneratorConfig, TrainConfig
from synthseg.config.artefacts import MaskingConfig, ModesConfig
from synthseg.config.training import ScanConfig
from synthseg.conforming import check_size, conform, crop, head_box
from synthseg.errors import ConfigError
from synthseg.generator.plan import sample_plan
from synthseg.generator.synthesis import render
from synthseg.labels import LabelTable, load_scheme
from synthseg.posteriors import Posteriors, scan_grid
from synthseg.prediction import predict
from synthseg.templates import Template, read_label_map
from synthseg.training.stream import group_table
from synthseg.volume import Volume, canonical, image_stem, load_volume

CENTRED_MM = 5.0  # how far a head that is seen whole may lie from the middle of the image


def exact_index(template: Template, target: LabelTable) -> torch.Tensor:
    """The class of ``target`` for each label of a template. Raises ConfigError if it cannot tell classes apart."""
    index, groups = group_table(template.table, target)
    if not torch.equal(groups, torch.eye(len(target), dtype=torch.bool)):
        raise ConfigError(f"validation_templates: {template.name} cannot tell all classes of {target.name} apart")
    return index


def whole_head(config: GeneratorConfig, contrast: str) -> GeneratorConfig:
    """Settings for a held-out map as it is, seen whole, in one contrast; ``random1``, ``random2`` are random."""
    quiet = config.artefacts.model_copy(
        update={
            "strip_probability": 0.0,
            "crop_probability": 0.0,
            "kspace": config.artefacts.kspace.model_copy(update={"wrap_probability": 0.0}),
            "masking": MaskingConfig(),
            "modes": ModesConfig(),
        }
    )
    only = config.contrast.only("random" if contrast.startswith("random") else contrast)
    centred = config.deform.model_copy(update={"translation_mm": min(CENTRED_MM, config.deform.translation_mm)})
    return config.model_copy(
        update={
            "anatomy": AnatomyConfig(),
            "anomalies": AnomalyConfig(),
            "deform": centred,
            "contrast": only,
            "artefacts": quiet,
        }
    )


def validation_table(
    network: torch.nn.Module,
    config: TrainConfig,
    templates: Sequence[Template],
    target: LabelTable,
    contrasts: Sequence[str],
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, float]]:
    """Hard Dice per contrast and class on rendered templates: {contrast: {class: Dice}}, from fixed plans.

    Each template is rendered once per contrast, with its deformation fixed and the whole head visible. Templates that
    cannot tell classes apart are refused: Dice needs exact labels.
    """
    table: dict[str, dict[str, float]] = {}
    for number, contrast in enumerate(contrasts):
        generator = whole_head(config.generator, contrast)
        scores: list[np.ndarray] = []
        for template in templates:
            index = exact_index(template, target)
            plan = sample_plan(generator, template.name, template.table, 977, number * 1000 + len(scores))
            image, labels = render([template], [plan])
            with torch.no_grad():
                predicted = network(image.to(device)).argmax(1).cpu()
            truth = index[labels.int()].long().flatten()
            guess = predicted.flatten()
            n = len(target)
            both = torch.bincount(truth[truth == guess], minlength=n).double().numpy()
            size = (torch.bincount(truth, minlength=n) + torch.bincount(guess, minlength=n)).double().numpy()
            scores.append(
                np.where(torch.bincount(truth, minlength=n).numpy() > 0, 2 * both / np.maximum(size, 1), np.nan)
            )
        table[contrast] = {}
        for c in range(1, len(target)):
            found = [score[c] for score in scores if np.isfinite(score[c])]
            if found:
                table[contrast][target.names[c]] = round(float(np.mean(found)), 4)
    return table


def mean_dice(table: dict[str, dict[str, float]]) -> float:
    """Mean over contrasts and classes."""
    return float(np.mean([np.mean(list(row.values())) for row in table.values()]))


# ---------------------------------------------------------------------------------------------- real scans


@dataclass(frozen=True)
class LabelledScan:
    """A real scan as inference sees it, with what its label map says.

    Attributes
    ----------
    image : float32 (d, h, w) in [0, 1], on the network's grid.
    truth : group index of each voxel, uint8 (D, H, W), on the scan's grid inside the box of the head.
    outside : voxels of each group outside that box, int64 (G,); inference calls them background.
    groups : classes of the network that each group stands for, bool (G, C).
    classes : the name of each group that is scored, by its index.
    """

    name: str
    image: torch.Tensor
    truth: Volume
    outside: np.ndarray
    groups: np.ndarray
    classes: dict[int, str]


def load_scan(scan: ScanConfig, voxel_size_mm: float, target: LabelTable) -> LabelledScan:
    """Read and conform a scan and its labels. Raises ConfigError if they do not belong together or to the classes."""
    whole, labels = canonical(load_volume(scan.image)), read_label_map(Path(scan.labels))
    same_grid = whole.data.shape == labels.data.shape and np.allclose(whole.affine, labels.affine, atol=0.1)
    if not same_grid:
        shapes = " and ".join(" x ".join(map(str, volume.data.shape)) for volume in (whole, labels))
        raise ConfigError(
            f"validation_scans: {scan.labels} is not on the voxel grid of {scan.image} ({shapes} voxels, or other "
            "positions); resample the labels to the scan, nearest neighbour"
        )
    table = load_scheme(scan.scheme)
    ids = labels.data
    if scan.read_as:
        present, where = np.unique(ids, return_inverse=True)
        ids = np.array([scan.read_as.get(int(label), int(label)) for label in present])[where].reshape(ids.shape)
    lookup, relation = group_table(table, target)
    groups = relation.numpy()
    truth = lookup.numpy()[table.to_index(ids, where=scan.labels)]
    classes = {int(index): " + ".join(np.array(target.names)[groups[index]]) for index in told_apart(truth, groups)}
    if not classes:
        raise ConfigError(
            f"validation_scans: the labels of {scan.labels} tell no class of {target.name} from the others; "
            f"is '{scan.scheme}' its scheme?"
        )
    unknown = sorted(set(scan.classes) - set(classes.values()))
    if unknown:
        raise ConfigError(
            f"validation_scans: classes: the labels of {scan.labels} do not tell {unknown} apart; "
            f"they tell {', '.join(classes.values())}"
        )
    if scan.classes:
        classes = {index: name for index, name in classes.items() if name in scan.classes}
    box = head_box(whole)
    ras = crop(whole, box)
    check_size(ras, voxel_size_mm, len(target))
    inside = Volume(np.ascontiguousarray(truth[box]), ras.affine)
    outside = np.bincount(truth.ravel(), minlength=len(groups)) - np.bincount(
        inside.data.ravel(), minlength=len(groups)
    )
    name = scan.name or image_stem(Path(scan.image))
    return LabelledScan(name, conform(ras, voxel_size_mm), inside, outside, groups, classes)


def load_scans(config: TrainConfig, target: LabelTable) -> list[LabelledScan]:
    """The real scans of a recipe. Raises ConfigError if two have one name."""
    scans = [load_scan(scan, config.generator.voxel_size_mm, target) for scan in config.validation_scans]
    names = [scan.name for scan in scans]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"validation_scans: {twice} are names of several scans; give each its own 'name'")
    return scans


@dataclass(frozen=True)
class _Live:
    """A network in training, as ``predict`` wants it."""

    network: torch.nn.Module
    labels: LabelTable
    voxel_size_mm: float
    window: tuple[int, int, int]
    multiple: int


def scan_table(
    network: torch.nn.Module,
    config: TrainConfig,
    scans: Sequence[LabelledScan],
    target: LabelTable,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, float]]:
    """Hard Dice per real scan and class: {scan: {class: Dice}}.

    The scan is conformed, predicted and brought back to its own grid as in inference, without the clean-up of stray
    pieces. Where the labels cannot tell classes apart, the union of the classes is scored ("GM + Thalamus").
    """
    shape, multiple = config.generator.shape, config.network.multiple
    model = _Live(network, target, config.generator.voxel_size_mm, shape, multiple)
    table: dict[str, dict[str, float]] = {}
    for scan in scans:
        with torch.no_grad():
            probabilities = predict(scan.image, model, torch.device(device), mixed_precision=False)
            posteriors = Posteriors.covering(probabilities, target, scan.truth, model.voxel_size_mm, device)
            guess = posteriors.indices_on(scan_grid(scan.truth)).labels
        n_groups, n_classes = scan.groups.shape
        pairs = scan.truth.data.astype(np.int64) * n_classes + guess
        confusion = np.bincount(pairs.ravel(), minlength=n_groups * n_classes).reshape(n_groups, n_classes)
        confusion[:, 0] += scan.outside
        scores = dice_of_groups(confusion, scan.groups)
        table[scan.name] = {name: round(float(scores[index]), 4) for index, name in scan.classes.items()}
    return table


def told_apart(truth: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Which groups of classes (G, C) a label map of group indices shows and tells from the others, int64 (n,)."""
    counts = np.bincount(truth.ravel(), minlength=len(groups))
    return np.flatnonzero(np.isfinite(dice_of_groups(np.diag(counts) @ groups, groups)))


def dice_of_groups(confusion: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Dice of each group of classes, float64 (G,), from voxels of each group and predicted class (G, C).

    NaN for background, for groups that are absent, and for those that share a class with another one that is present.
    Voxels whose label holds all classes of another group ("any tissue of the brain") count for no group.
    """
    size = confusion.sum(1)
    present = size > 0
    shared = groups.astype(np.int64) @ groups.T.astype(np.int64)
    contains = (shared == groups.sum(1)) & ~np.eye(len(groups), dtype=bool)  # row contains column
    told = present & ~contains[:, present].any(1)
    alone = told & (np.count_nonzero(shared[:, told], axis=1) == 1) & ~groups[:, 0]
    predicted = groups @ confusion[told].sum(0)
    overlap = (confusion * groups).sum(1)
    return np.where(alone, 2 * overlap / np.maximum(size + predicted, 1), np.nan)
