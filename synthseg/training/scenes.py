"""Heads before the scanner: painted from a template, or a real image moved; and what the scanner makes of them.

What a task asks for lies between the two: the image before the slices became thick, the field that the coils added, or
the T1 image of the same anatomy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from synthseg import rng
from synthseg.config import GeneratorConfig
from synthseg.config.artefacts import MaskingConfig, ModesConfig
from synthseg.generator import artefacts, contrast
from synthseg.generator.artefacts import ArtefactPlan, sample_artefacts
from synthseg.generator.artefacts.storage import Box, placed
from synthseg.generator.deform import DeformPlan, coordinates, sample_deform
from synthseg.generator.draw import Draw, Record
from synthseg.generator.plan import Plan
from synthseg.generator.reading import read_labels, rename, subsample_offsets
from synthseg.generator.synthesis import read_anatomy
from synthseg.intensity import normalise
from synthseg.labels import LabelTable
from synthseg.templates import Template
from synthseg.training.canonical import canonical_image
from synthseg.training.examples import Example

STRAIGHT = DeformPlan(
    matrix=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)), shift_mm=(0.0, 0.0, 0.0), velocity_mm=None, flip=False
)


class ImagePlan(Record):
    """Everything random about one look at a real image."""

    image: str
    seed: int
    index: int
    voxel_size_mm: float
    shape: tuple[int, int, int]
    subsamples: int
    deform: DeformPlan
    artefacts: ArtefactPlan


@dataclass(frozen=True, eq=False)
class Scene:
    """A head before the scanner.

    Attributes
    ----------
    image : (1, D, H, W), float32, not below zero.
    labels : what is seen at each voxel, uint8 (D, H, W); above 0 inside the head.
    head : where the head is, whether it is seen or not, bool (D, H, W).
    table : what the labels mean; None where they only say what is head (1).
    artefacts : what happens to it in the scanner.
    stripped : only the brain is shown, with exact zeros around it.
    t1 : gives the T1 image of this anatomy, (1, D, H, W) in [0, 1]; None where it is not known.
    """

    image: torch.Tensor
    labels: torch.Tensor
    head: torch.Tensor
    table: LabelTable | None
    artefacts: ArtefactPlan
    voxel_size_mm: float
    stripped: bool = False
    t1: Callable[[], torch.Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Scan:
    """What the scanner makes of a scene.

    Attributes
    ----------
    image : (1, D, H, W) in [0, 1], as a network gets it.
    raw : the same before its intensities were normalised.
    labels : uint8 (D, H, W), 0 where the scan does not show what was there.
    box : the voxels that it covers.
    """

    image: torch.Tensor
    raw: torch.Tensor
    labels: torch.Tensor
    box: Box


def painted(template: Template, plan: Plan, device: torch.device | str = "cpu") -> Scene:
    """The head of a Plan, painted as `synthesis.render` paints it."""
    reading, labels = read_anatomy(template, plan, device)
    image = contrast.paint(reading, plan.contrast)[None]
    head = labels > 0
    stripped = not all(plan.contrast.visible)
    if stripped:
        shown = [index if visible else 0 for index, visible in enumerate(plan.contrast.visible)]
        labels = rename(labels, torch.tensor(shown, dtype=torch.uint8, device=device))
    return Scene(
        image.clamp_min(0),
        labels,
        head,
        template.table,
        plan.artefacts,
        plan.voxel_size_mm,
        stripped,
        lambda: canonical_image(template, plan, device),
    )


def moved(example: Example, plan: ImagePlan, device: torch.device | str = "cpu") -> Scene:
    """A real image in the pose of a plan, read once: the mean of the points of each voxel, linear between its own."""
    center = example.center
    step = torch.tensor(plan.deform.matrix) * plan.voxel_size_mm / torch.tensor(example.spacing_mm)[:, None]
    if plan.deform.flip:
        step[0] = -step[0]
    offsets = subsample_offsets(plan.subsamples) @ step.T
    at = coordinates(plan.deform, plan.shape, plan.voxel_size_mm, center, example.spacing_mm, device)
    labels = read_labels(example.labels.to(device), at)
    if plan.deform.flip and example.table is not None:
        labels = rename(labels, torch.from_numpy(example.table.flip).to(device=device, dtype=torch.uint8))
    t1 = example.t1
    return Scene(
        _read_linearly(example.image.to(device), at, offsets),
        labels,
        labels > 0,
        example.table,
        plan.artefacts,
        plan.voxel_size_mm,
        t1=None if t1 is None else lambda: _read_linearly(t1.to(device), at, offsets),
    )


def _read_linearly(image: torch.Tensor, at: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Mean (1, D, H, W) of an image (d, h, w) at ``at`` (3, D, H, W) plus each of the offsets (P, 3); 0 outside."""
    half = (torch.tensor(image.shape, dtype=torch.float32, device=at.device) - 1).clamp_min(1) / 2
    total = torch.zeros((1, *at.shape[1:]), device=at.device)
    for offset in offsets.to(at.device):
        where = ((at.movedim(0, -1) + offset) / half - 1).flip(-1)[None]
        total += F.grid_sample(image[None, None], where, mode="bilinear", padding_mode="zeros", align_corners=True)[0]
    return total / len(offsets)


def scan(scene: Scene, plan: ArtefactPlan | None = None) -> Scan:
    """The image of a scene, by its own artefacts or others; of a painted one the same as that of `synthesis.render`."""
    plan = scene.artefacts if plan is None else plan
    tables = [] if scene.table is None else [scene.table]
    if not tables and (plan.masked or plan.scene is not None):
        raise ValueError("masks follow labels, and this image has none")
    raw, labels, (box,) = artefacts.corrupt(scene.image[None], scene.labels[None], tables, [plan], scene.voxel_size_mm)
    single = raw[0, 0]
    if scene.stripped:  # stripping comes after the acquisition: exact zeros around the brain
        single = single.masked_fill(labels[0] == 0, 0.0)
    image = placed(normalise(single[box]), box, single.shape)
    return Scan(image[None], single[None], labels[0], box)


def image_plan(config: GeneratorConfig, example: Example, seed: int, index: int, pose: bool = True) -> ImagePlan:
    """Draw one look at a real image: artefacts and a pose, or, without ``pose``, the image where it is.

    Then the first point that is read is a voxel of the image, which is so seen voxel by voxel where voxel sizes agree.
    Masks and scenes that follow labels are left out where there are none.
    """
    extent = tuple(n * config.voxel_size_mm for n in config.shape)

    def draw(stage: str) -> Draw:
        return Draw(rng.generator(seed, index, stage))

    where = sample_deform(config.deform, extent, draw("deform")) if pose else _on_voxels(config, example)
    settings = config.artefacts
    if example.table is None:
        settings = settings.model_copy(update={"masking": MaskingConfig(), "modes": ModesConfig()})
    return ImagePlan(
        image=example.name,
        seed=seed,
        index=index,
        voxel_size_mm=config.voxel_size_mm,
        shape=config.shape,
        subsamples=config.subsamples,
        deform=where,
        artefacts=sample_artefacts(settings, config.voxel_size_mm, extent, draw("artefacts"), example.contrast),
    )


def _on_voxels(config: GeneratorConfig, example: Example) -> DeformPlan:
    """The image where it is, but for half a voxel at most, by which the first point that is read becomes a voxel."""
    shift_mm = []
    for n, center, spacing_mm in zip(config.shape, example.center, example.spacing_mm, strict=True):
        first = center - (n - 1) / 2 * config.voxel_size_mm / spacing_mm
        shift_mm.append((round(first) - first) * spacing_mm)
    return STRAIGHT.model_copy(update={"shift_mm": tuple(shift_mm)})
