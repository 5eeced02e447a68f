"""The canonical image of an anatomy: what a good T1 scan of it would show, whatever contrast an image of it has.

Brain-ID (Liu et al., ECCV 2024) learns features from which the subject's own T1 scan can be read. Where a template has
one (``t1.nii.gz`` beside its label map) and a plan leaves the shape of its anatomy alone, it is that scan, moved as the
labels are. Else it is painted: the signal of an MPRAGE sequence for each tissue, without noise or artefacts. Both are
scaled so that white matter is at `WHITE_MATTER`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from synthseg.config import ContrastConfig, generator_config
from synthseg.errors import InputError, TemplateError
from synthseg.generator import contrast, deform
from synthseg.generator.contrast import ContrastPlan
from synthseg.generator.draw import Draw, Field3D
from synthseg.generator.physics import sample_physics
from synthseg.generator.plan import Plan
from synthseg.generator.reading import subsample_offsets
from synthseg.generator.synthesis import read_anatomy
from synthseg.intensity import normalise
from synthseg.labels import LabelTable
from synthseg.templates import Template, read_label_map
from synthseg.volume import canonical, load_volume

WHITE_MATTER = 0.7
T1_FILE = "t1.nii.gz"


class _Typical(Draw):
    """Draws nothing: the middle of each range, the most frequent choice, no rare event."""

    def __init__(self) -> None:
        super().__init__(torch.Generator())

    def uniform(self, low: float, high: float) -> float:
        return (low + high) / 2

    def normal(self, std: float) -> float:
        return 0.0

    def chance(self, probability: float) -> bool:
        return probability > 0.5

    def pick(self, weights: dict[str, float]) -> str:
        return max(weights, key=lambda name: weights[name])


def canonical_image(template: Template, plan: Plan, device: torch.device | str = "cpu") -> torch.Tensor:
    """The T1 image (1, D, H, W) in [0, 1] of a plan's anatomy, on the plan's grid, float32.

    Raises TemplateError if the template's own T1 cannot be read.
    """
    return canonical_and_labels(template, plan, device)[0]


def canonical_and_labels(
    template: Template, plan: Plan, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, and the labels of all of the anatomy, shown or not, uint8 (D, H, W), indices into its table."""
    reading, labels = read_anatomy(template, plan, device)
    if plan.anatomy is None and plan.anomalies is None and has_t1(template):
        return _own_t1(template, plan, device), labels
    return contrast.paint(reading, typical_t1(template.table)).clamp_(0, 1)[None], labels


def typical_t1(table: LabelTable) -> ContrastPlan:
    """One intensity for each label of a table: MPRAGE at 3 T, in the middle of all ranges of the preset ``t1``."""
    settings = _preset()
    tissues = sorted({label.tissue for label in table.labels} | {"gm", "wm", "csf", "soft", "bone_cortical"})
    means = sample_physics(settings, tissues, _Typical()).mean
    scale = WHITE_MATTER / means["wm"]
    nothing = (0.0,) * len(table)
    return ContrastPlan(
        name="canonical_t1",
        mean=tuple(scale * means[label.tissue] for label in table.labels),
        std=nothing,
        texture_std=nothing,
        texture=Field3D.of(torch.zeros(1, 2, 2, 2)),
        noise_seed=0,
        visible=(True,) * len(table),
    )


@lru_cache(maxsize=1)
def _preset() -> ContrastConfig:
    return generator_config(None, preset="t1").contrast


# ------------------------------------------------------------------------------------------------ a template's own scan


def has_t1(template: Template) -> bool:
    """Whether a T1 scan lies beside the template's label map."""
    return template.folder is not None and (template.folder / T1_FILE).is_file()


def load_t1(template: Template) -> tuple[torch.Tensor, torch.Tensor]:
    """The template's T1 scan, float32 (d, h, w) in [0, 1], and the affine (4, 4) from template voxels to its voxels.

    It may have a grid of its own, in the space of the label map. Kept in the template's cache. Raises TemplateError if
    it cannot be read, or does not show the head of the label map.
    """
    if "t1" not in template.cache:
        assert template.folder is not None
        template.cache["t1"] = _read_t1(template, template.folder / T1_FILE)
    found: tuple[torch.Tensor, torch.Tensor] = template.cache["t1"]
    return found


def _read_t1(template: Template, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        scan = canonical(load_volume(file))
    except InputError as error:
        raise TemplateError(str(error)) from None
    labels = read_label_map(file.with_name("labels.nii.gz"))
    border = np.eye(4)
    border[:3, 3] = -1  # a template has one voxel of background around its label map
    to_scan = torch.from_numpy(np.linalg.inv(scan.affine) @ labels.affine @ border).float()
    wm = torch.tensor([label.tissue == "wm" for label in template.table.labels])[template.labels.long()]
    head = wm if bool(wm.any()) else template.labels > 0
    at = to_scan[:3, :3] @ head.nonzero().T.float() + to_scan[:3, 3:]
    image = torch.from_numpy(np.ascontiguousarray(scan.data, dtype=np.float32))
    if not _inside(at, image.shape) > 0.9:
        raise TemplateError(
            f"{file}: does not show the head of labels.nii.gz; both must be in one space (check their affines)"
        )
    image = normalise(image)
    if bool(wm.any()):
        level = _read(image, at[:, None, None]).median()
        if not bool(level > 0.05):
            raise TemplateError(f"{file}: is dark where labels.nii.gz has white matter; is it a T1 scan, and aligned?")
        image = (image * (WHITE_MATTER / level)).clamp_(0, 1)
    return image, to_scan


def _inside(at: torch.Tensor, shape: torch.Size) -> float:
    """Share of voxel positions (3, N) inside an image of this shape."""
    last = torch.tensor(shape)[:, None] - 1
    return float(((at >= -0.5) & (at <= last + 0.5)).all(0).float().mean())


def _own_t1(template: Template, plan: Plan, device: torch.device | str) -> torch.Tensor:
    """The T1 scan of the template, moved as its labels are; the mean of the points of each voxel, read linearly."""
    image, to_scan = load_t1(template)
    image, to_scan = image.to(device), to_scan.to(device)
    d = plan.deform
    step = torch.tensor(d.matrix) * plan.voxel_size_mm / torch.tensor(template.spacing_mm)[:, None]
    if d.flip:
        step[0] = -step[0]
    offsets = (subsample_offsets(plan.subsamples) @ step.T).to(device)
    at = deform.coordinates(d, plan.shape, plan.voxel_size_mm, template.center, template.spacing_mm, device)
    linear, shift = to_scan[:3, :3], to_scan[:3, 3]
    at = torch.einsum("ij,jdhw->idhw", linear, at) + shift[:, None, None, None]
    total = torch.zeros(plan.shape, device=device)
    for offset in offsets @ linear.T:
        total += _read(image, at + offset[:, None, None, None])
    return (total / len(offsets)).clamp_(0, 1)[None]


def _read(image: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Values (D, H, W) of an image (d, h, w) at voxel positions (3, D, H, W), linear between voxels; 0 outside."""
    half = (torch.tensor(image.shape, dtype=torch.float32, device=at.device) - 1).clamp_min(1) / 2
    grid = (at.movedim(0, -1) / half - 1).flip(-1)[None]
    return F.grid_sample(image[None, None], grid, mode="bilinear", padding_mode="zeros", align_corners=True)[0, 0]
