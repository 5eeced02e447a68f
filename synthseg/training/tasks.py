"""The four tasks that one layer on voxel features is trained for (Brain-ID: Liu et al., ECCV 2024).

A task says which image and which target a scene gives, what of the generator it needs, how wrong a result is, and what
one would do without a network: the most frequent class, the best linear map of the intensities, linear interpolation,
no field at all. Each is compared with that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from synthseg.config import FinetuneConfig, GeneratorConfig
from synthseg.config.artefacts import ArtefactConfig, KSpaceConfig, ModesConfig, StorageConfig
from synthseg.errors import ConfigError
from synthseg.generator.artefacts import ArtefactPlan
from synthseg.generator.artefacts.storage import placed
from synthseg.generator.deform import resize
from synthseg.labels import LabelTable
from synthseg.networks import task_heads
from synthseg.training.losses import dice_and_cross_entropy, gradient_l1, l1
from synthseg.training.scenes import Scene, scan
from synthseg.training.stream import group_table
from synthseg.training.validation import dice_of_groups, told_apart


@dataclass(frozen=True, eq=False)
class Pair:
    """An image and what is to be said of it.

    Attributes
    ----------
    image : (1, D, H, W) in [0, 1], as a network gets it.
    target : (1, D, H, W) float; for segmentation the group index of each voxel, uint8 (D, H, W).
    scored : which voxels count, bool (D, H, W).
    head : which of them lie in the head, bool (D, H, W): figures are of these.
    groups : the classes of each group, bool (G, C); segmentation only.
    """

    image: torch.Tensor
    target: torch.Tensor
    scored: torch.Tensor
    head: torch.Tensor
    groups: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Pair:
        groups = None if self.groups is None else self.groups.to(device)
        image, target, scored, head = (x.to(device) for x in (self.image, self.target, self.scored, self.head))
        return Pair(image, target, scored, head, groups)


class Task(ABC):
    """One task.

    Attributes
    ----------
    figure : its figure of merit; ``higher`` says whether more of it is better.
    baseline_name : what is done without a network.
    channels : values of the head for each voxel. at_rest : how many of them begin as zeros, which is the baseline.
    """

    name: ClassVar[str]
    figure: ClassVar[str]
    higher: ClassVar[bool] = False
    baseline_name: ClassVar[str]
    at_rest: ClassVar[int] = 0

    def __init__(self, config: FinetuneConfig, target: LabelTable) -> None:
        self.config = config
        self.target = target
        self.channels = task_heads.CHANNELS.get(self.name, len(target))

    def settings(self, generator: GeneratorConfig) -> GeneratorConfig:
        """What the generator must draw for this task. Raises ConfigError if the recipe rules it out."""
        return generator

    @abstractmethod
    def pair(self, scene: Scene) -> Pair:
        """Image and target of a scene; pure."""

    def result(self, values: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """The result (B, C, D, H, W) of the values (B, n, D, H, W) of the head and the images (B, 1, D, H, W)."""
        return task_heads.result_of(self.name, values, image, self.config.generator.voxel_size_mm)

    @abstractmethod
    def loss(self, result: torch.Tensor, pair: Pair) -> torch.Tensor:
        """How wrong the result (C, D, H, W) of one image is, a scalar."""

    @abstractmethod
    def figures(self, result: torch.Tensor, pair: Pair) -> dict[str, float]:
        """Figures of one image by name; ``figure`` is the first."""

    def measurable(self, pair: Pair) -> bool:
        """Whether an image shows anything that figures can be made of."""
        return bool(pair.head.any())

    @abstractmethod
    def baseline(self, pair: Pair) -> torch.Tensor:
        """What is said without a network, like a result (C, D, H, W)."""

    def score(self, figure: float, baseline: float) -> float:
        """Higher is better: the figure itself, or for an error the part of the baseline's that is gone."""
        return figure if self.higher else 1 - figure / max(baseline, 1e-9)


class Segmentation(Task):
    name = "segmentation"
    figure = "dice"
    higher = True
    baseline_name = "most frequent class"

    def pair(self, scene: Scene) -> Pair:
        if scene.table is None:
            raise ConfigError("images: an image without a label map cannot be learned to be segmented")
        seen = scan(scene)
        index, groups = group_table(scene.table, self.target)
        target = index.to(seen.labels.device)[seen.labels.int()]
        everywhere = torch.ones_like(seen.labels, dtype=torch.bool)
        return Pair(seen.image, target, everywhere, seen.labels > 0, groups.to(target.device))

    def loss(self, result: torch.Tensor, pair: Pair) -> torch.Tensor:
        assert pair.groups is not None
        dice, entropy, _ = dice_and_cross_entropy(result, pair.target, pair.groups)
        return self.config.dice_weight * dice + self.config.cross_entropy_weight * entropy

    def figures(self, result: torch.Tensor, pair: Pair) -> dict[str, float]:
        return {"dice": float(np.mean(list(self.by_class(result, pair).values())))}

    def measurable(self, pair: Pair) -> bool:
        assert pair.groups is not None
        return len(told_apart(pair.target.cpu().numpy(), pair.groups.cpu().numpy())) > 0

    def by_class(self, result: torch.Tensor, pair: Pair) -> dict[str, float]:
        """Dice of each class, or group of classes, that the target shows and tells from the others."""
        assert pair.groups is not None
        groups = pair.groups.cpu().numpy()
        n_groups, n_classes = groups.shape
        guess = result.argmax(0).flatten().cpu()
        pairs = pair.target.flatten().cpu().long() * n_classes + guess
        confusion = torch.bincount(pairs, minlength=n_groups * n_classes).reshape(n_groups, n_classes).numpy()
        scores = dice_of_groups(confusion, groups)
        names = np.array(self.target.names)
        return {" + ".join(names[groups[g]]): float(scores[g]) for g in np.flatnonzero(np.isfinite(scores))}

    def baseline(self, pair: Pair) -> torch.Tensor:
        assert pair.groups is not None
        common = int(torch.bincount(pair.target.flatten().long(), minlength=len(pair.groups)).argmax())
        one = pair.groups[common].float()[:, None, None, None]
        return 10 * one.expand(-1, *pair.target.shape)


class _Regression(Task):
    """An image of one channel is to be found; its error is the mean absolute difference."""

    figure = "l1"
    gradients: ClassVar[bool] = True

    def loss(self, result: torch.Tensor, pair: Pair) -> torch.Tensor:
        error = l1(result, pair.target, pair.scored)
        if self.gradients and self.config.gradient_weight > 0:
            error = error + self.config.gradient_weight * gradient_l1(result, pair.target, pair.scored)
        return error

    def figures(self, result: torch.Tensor, pair: Pair) -> dict[str, float]:
        result = result.clamp(0, 1)
        squared = float(((result - pair.target) ** 2)[0][pair.head].mean())
        return {
            "l1": float(l1(result, pair.target, pair.head)),
            "psnr_db": float(-10 * np.log10(max(squared, 1e-12))),
        }


class Reconstruction(_Regression):
    """The T1 image of the anatomy from any contrast: L1 and L1 of the gradients, as in Brain-ID."""

    name = "reconstruction"
    baseline_name = "best linear map of the intensities"

    def pair(self, scene: Scene) -> Pair:
        if scene.t1 is None:
            raise ConfigError("images: an image without a T1 of the same head has no target for reconstruction")
        seen, target = scan(scene), scene.t1()
        head = seen.labels > 0
        covered = torch.zeros_like(head)
        covered[seen.box] = True
        scored = covered & (head | ~scene.head)  # what was stripped or defaced cannot be known
        return Pair(seen.image, target, scored, head & covered)

    def baseline(self, pair: Pair) -> torch.Tensor:
        """The linear map of the intensities in the head that is nearest to the target, which it is shown."""
        x, y = pair.image[0][pair.head].double(), pair.target[0][pair.head].double()
        spread = ((x - x.mean()) ** 2).sum()
        slope = ((x - x.mean()) * (y - y.mean())).sum() / spread.clamp_min(1e-12)
        return (slope * (pair.image - x.mean()) + y.mean()).float()


class SuperResolution(_Regression):
    """The image before the slices became thick, and before noise, from the image after.

    The image after has been read linearly between the slices: it is the baseline itself.
    """

    name = "super-resolution"
    baseline_name = "linear interpolation"
    at_rest = 5

    def settings(self, generator: GeneratorConfig) -> GeneratorConfig:
        artefacts = generator.artefacts
        if max(artefacts.lowres_spacing_mm, artefacts.lowres_isotropic_mm) <= generator.voxel_size_mm:
            raise ConfigError(
                f"artefacts.lowres_spacing_mm {artefacts.lowres_spacing_mm:g} is not above the voxel size, "
                f"{generator.voxel_size_mm:g} mm: no image would lose resolution; make it two to five times as large"
            )
        changes = {
            "lowres_probability": 1.0,
            "kspace": KSpaceConfig(),
            "modes": ModesConfig(),
            "storage": StorageConfig(slice_thickness=artefacts.storage.slice_thickness),
        }
        return generator.model_copy(update={"artefacts": artefacts.model_copy(update=changes)})

    def pair(self, scene: Scene) -> Pair:
        after, before = scan(scene), scan(scene, sharp(scene.artefacts, scene.voxel_size_mm))
        gain, offset = intensity_map(after.raw[0][after.box], after.image[0][after.box])
        target = (gain * before.raw[0][after.box] + offset).clamp(0, 1)
        covered = torch.zeros_like(after.labels, dtype=torch.bool)
        covered[after.box] = True
        if scene.stripped:
            covered &= after.labels > 0
        whole = placed(target, after.box, after.labels.shape)[None] * covered
        return Pair(after.image, whole, covered, covered & (after.labels > 0))

    def baseline(self, pair: Pair) -> torch.Tensor:
        return pair.image


class BiasField(_Regression):
    """The logarithm of the field that multiplies the image. Its mean is not known and not asked for."""

    name = "bias-field"
    figure = "log_l1"
    baseline_name = "constant field"
    gradients = False
    at_rest = 2  # the others are tissues, which must begin unlike each other

    def settings(self, generator: GeneratorConfig) -> GeneratorConfig:
        artefacts = generator.artefacts
        if artefacts.bias_std[1] <= 0:
            raise ConfigError(
                "artefacts.bias_std is 0: there is no bias field to learn; give it a range, as [0.1, 0.5]"
            )
        changes = {"gamma_std": 0.0, "local_contrast_std": (0.0, 0.0), "modes": ModesConfig()}  # nothing but a product
        return generator.model_copy(update={"artefacts": artefacts.model_copy(update=changes)})

    def pair(self, scene: Scene) -> Pair:
        seen, field = scan(scene), scene.artefacts.log_bias
        head = seen.labels > 0
        target = torch.zeros_like(seen.image)
        if field is not None:
            target = resize(field.tensor(target.device)[None], target.shape[1:])[0]
        return Pair(seen.image, centred(target, head), head, head)

    def loss(self, result: torch.Tensor, pair: Pair) -> torch.Tensor:
        return l1(centred(result, pair.head), pair.target, pair.scored)

    def figures(self, result: torch.Tensor, pair: Pair) -> dict[str, float]:
        return {"log_l1": float(self.loss(result, pair))}

    def baseline(self, pair: Pair) -> torch.Tensor:
        return torch.zeros_like(pair.image)


TASKS: Mapping[str, type[Task]] = {
    task.name: task for task in (Segmentation, Reconstruction, SuperResolution, BiasField)
}


def make_task(config: FinetuneConfig, target: LabelTable) -> Task:
    """The task of a recipe."""
    return TASKS[config.task](config, target)


def without_artefacts(config: ArtefactConfig, task: str) -> ArtefactConfig:
    """Artefacts that leave an image as it is, but for what the task is about: its bias field or its resolution."""
    kept = {
        "bias-field": ("bias_std", "bias_spacing_mm"),
        "super-resolution": ("lowres_isotropic_probability", "lowres_spacing_mm", "lowres_isotropic_mm", "storage"),
    }.get(task, ())
    none = ArtefactConfig(
        bias_std=(0.0, 0.0),
        gamma_std=0.0,
        noise_std=(0.0, 0.0),
        noise_probability=0.0,
        lowres_probability=0.0,
        crop_probability=0.0,
        strip_probability=0.0,
    )
    return none.model_copy(update={name: getattr(config, name) for name in kept})


def sharp(plan: ArtefactPlan, voxel_size_mm: float) -> ArtefactPlan:
    """The same artefacts as if every voxel were measured, without noise."""
    return plan.model_copy(
        update={
            "spacing_mm": (voxel_size_mm,) * 3,
            "thickness_mm": (0.0,) * 3,
            "slices": None,
            "kspace": None,
            "stored": None,
            "noise_std": 0.0,
        }
    )


def intensity_map(raw: torch.Tensor, normalised: torch.Tensor) -> tuple[float, float]:
    """Gain and offset with which raw intensities were normalised, from voxels that were not clipped."""
    inside = (normalised > 0) & (normalised < 1)
    if int(inside.sum()) < 2:
        return 0.0, 0.0
    x, y = raw[inside].double(), normalised[inside].double()
    spread = ((x - x.mean()) ** 2).sum()
    gain = float(((x - x.mean()) * (y - y.mean())).sum() / spread.clamp_min(1e-12))
    return gain, float(y.mean() - gain * x.mean())


def centred(image: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """An image (1, D, H, W) less its mean over the voxels of a mask (D, H, W)."""
    return image - (image[0] * where).sum() / where.sum().clamp_min(1)
