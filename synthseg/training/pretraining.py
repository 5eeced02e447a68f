"""Pretraining: voxel features that follow anatomy, not contrast, learned from several views of each anatomy.

The loss is a weighted sum of three kinds of terms: a canonical T1 image read from the features of every view (Brain-ID,
Liu et al., ECCV 2024), contrastive losses on sampled voxels (docs/contrastive.md), and segmentation. Projection heads
are dropped at the end; body and heads of one layer are kept in ``pretrained.safetensors``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from synthseg import rng
from synthseg.config import PretrainConfig
from synthseg.config.pretraining import SUPERVISED, ContrastConfig
from synthseg.errors import ConfigError
from synthseg.labels import LabelTable, load_scheme
from synthseg.networks.backbone import load_weights, same_classes, space_to_depth, transfer
from synthseg.networks.feature_file import as_feature_weights, save_features
from synthseg.networks.features import FeatureNetwork
from synthseg.training.contrastive import (
    LOSSES,
    UNKNOWN,
    Projection,
    Voxels,
    join,
    kind_of,
    known_classes,
    midplane,
    pair_masks,
    sample_voxels,
)
from synthseg.training.launch import gather
from synthseg.training.losses import dice_and_cross_entropy, gradient_l1, l1
from synthseg.training.objective import ANATOMY, SEGMENTATION, Objective, Seen, by_view, match, places_of
from synthseg.training.run import Run, check_grid
from synthseg.training.state import Tensors
from synthseg.training.stream import drawn_cells
from synthseg.training.view_stream import ViewBatch, ViewStream

VALIDATION_SEED = 977
PER_ANATOMY = frozenset({"pix_pro"})  # losses that compare the voxels of one anatomy with each other alone


def check(config: PretrainConfig, world: int = 1) -> None:
    """Refuse a recipe that cannot run on ``world`` devices, before any template is loaded."""
    check_grid(config, world)
    FeatureNetwork(config.network)
    views, levels = len(config.generator.views.severities), len(config.network.channels)
    if config.anatomy_weight == 0 and config.segmentation_weight == 0 and not config.contrast:
        raise ConfigError(
            "there is nothing to learn: give anatomy_weight, segmentation_weight or a term of contrast a weight"
        )
    for number, term in enumerate(config.contrast):
        if views < 2 and term.loss not in SUPERVISED:
            raise ConfigError(
                f"contrast[{number}]: {term.loss} compares views of one anatomy, and generator.views.severities has "
                f"{views}; give several, as [0, 0, 1, 1], or a loss with labels ({', '.join(sorted(SUPERVISED))})"
            )
        beyond = [level for level in term.sampling.levels if level < -levels]
        if beyond:
            raise ConfigError(
                f"contrast[{number}].sampling.levels: {beyond} is beyond the {levels} levels of the network; "
                f"-1 is the finest, {-levels} the coarsest"
            )
        structures = len(load_scheme(config.scheme)) - 1
        if term.loss == "equiangular" and structures < 2:
            raise ConfigError(
                f"contrast[{number}]: equiangular is for several structures, and {config.scheme} has {structures}; "
                "choose another loss, or a scheme with several"
            )
        if term.loss == "equiangular" and structures > term.dimensions + 1:
            raise ConfigError(
                f"contrast[{number}].dimensions: {term.dimensions} hold {term.dimensions + 1} class vectors at equal "
                f"angles, and {config.scheme} has {structures} structures; give {structures - 1} or more"
            )


class Pretrainer(Run[PretrainConfig, ViewBatch]):
    """One run. ``Pretrainer(config, folder).run()`` trains to the recipe's last step; returns the features' path."""

    model_name: ClassVar[str] = "pretrained"
    last_name: ClassVar[str] = "pretrained"
    score: ClassVar[str] = "-loss"
    fixed: ClassVar[tuple[str, ...]] = (
        *("contrast", "anatomy_weight", "gradient_weight", "segmentation_weight", "generator.views"),
    )
    plain: Objective

    def check(self, world: int) -> None:
        check(self.config, world)

    def prepare(self) -> None:
        self._terms: dict[str, torch.Tensor] = {}

    def figure_name(self) -> str:
        """Dice if there are classes, else the share of voxels found again in another view, else the error of the T1."""
        if self.config.segmentation_weight > 0:
            return "dice"
        return "match" if self.config.contrast and self._views > 1 else "error"

    @property
    def _views(self) -> int:
        return len(self.config.generator.views.severities)

    def make_network(self) -> Objective:
        return Objective(self.config, len(self.target))

    def start_from(self, weights: Tensors, record: dict[str, Any]) -> None:
        """Take over body and heads that fit. Raises ConfigError if most of the network would start anew."""
        given, heads = as_feature_weights(weights, record)
        labels = heads.get(SEGMENTATION, {}).get("labels")
        if labels is None or not same_classes(LabelTable.from_dict(labels), self.target):
            given = {name: tensor for name, tensor in given.items() if not name.startswith(f"heads.{SEGMENTATION}.")}
        _, fresh = transfer(self.plain.features, given)
        new = self.share_of_new(fresh, given, self.plain.features)
        if new > 0.5:
            raise ConfigError(
                f"init: of the weights of {self.config.init} only {1 - new:.0%} fit the recipe's network; use its "
                "architecture, channels and subpixel, or pretrain without init"
            )
        self.say_start(new)

    def stream(self, rank: int = 0, world: int = 1) -> ViewStream:
        return ViewStream(self.config, self.templates, self.target, self.state.step, rank, world)

    # -- work --------------------------------------------------------------------------------------------------------
    def compute(self, batch: ViewBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum of the terms of a batch, and the figure of each image or anatomy."""
        batch = batch.to(self.fabric.device)
        terms, figures = self._all_terms(batch, self._draw_cells())
        self._terms = {name: value.detach() for name, (value, _) in terms.items()}
        loss = torch.stack([weight * value for value, weight in terms.values()]).sum()
        return loss, figures

    def terms(self) -> Mapping[str, float]:
        return {name: float(value) for name, value in self._terms.items()}

    def _draw_cells(self) -> torch.Tensor | None:
        """Which voxels of the subpixel blocks this step segments, (K,), or None for all."""
        config = self.config
        cells = drawn_cells(config.seed, self.state.step, config.network.subpixel, config.scored_cells)
        return None if cells is None else cells.to(self.fabric.device)

    def _all_terms(
        self, batch: ViewBatch, cells: torch.Tensor | None
    ) -> tuple[dict[str, tuple[torch.Tensor, float]], torch.Tensor]:
        """Each term's value and weight by name, and the figures."""
        config = self.config
        numbers = torch.arange(len(batch.labels)).split(batch.views)
        classes = [known_classes(own)[batch.labels[n].int()] for own, n in zip(batch.groups, numbers, strict=True)]
        sampled = [
            self._sample(batch, classes, term, number, level)
            for number, term in enumerate(config.contrast)
            for level in term.sampling.levels
        ]
        places = [places_of(voxels) for voxels in sampled]
        seen: Seen = self.network(batch.images, cells, places)
        terms: dict[str, tuple[torch.Tensor, float]] = {}
        figures: list[torch.Tensor] = []
        if seen.t1 is not None:
            error, gradient = _t1_errors(seen.t1, batch)
            terms["t1"] = error, config.anatomy_weight
            terms["t1_gradient"] = gradient, config.anatomy_weight * config.gradient_weight
            figures = [error.detach()]
        start, matched = 0, []
        for number, term in enumerate(config.contrast):
            levels = range(start, start + len(term.sampling.levels))
            start = levels.stop
            values = [self._contrast(term, k, seen.embeddings[k], sampled[k]) for k in levels]
            matched += [match(seen.embeddings[k], sampled[k]) for k in levels]
            name = term.loss if all(term.loss != other.loss for other in config.contrast[:number]) else ""
            terms[name or f"{term.loss}_{number}"] = torch.stack(values).mean(), term.weight
        if matched and self._views > 1:
            figures = matched
        if seen.logits is not None:
            value, figures = self._segmentation(seen.logits, batch, cells)
            terms["segmentation"] = value, config.segmentation_weight
        return terms, torch.stack(figures) if figures else batch.images.new_full((1,), torch.nan)

    def _segmentation(
        self, logits: torch.Tensor, batch: ViewBatch, cells: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Mean of soft Dice loss and cross-entropy over the images, and the mean soft Dice of each."""
        targets = batch.labels
        if cells is not None:
            targets = space_to_depth(targets[:, None], self.config.network.subpixel)[:, cells]
        losses, dices = [], []
        for number, (single, target) in enumerate(zip(logits, targets, strict=True)):
            dice, entropy, scores = dice_and_cross_entropy(single, target, batch.groups[number // batch.views])
            losses.append(dice + entropy)
            dices.append(scores[1:].nanmean())
        return torch.stack(losses).mean(), dices

    def _sample(
        self, batch: ViewBatch, classes: list[torch.Tensor], term: ContrastConfig, number: int, level: int
    ) -> list[Voxels]:
        """The voxels of each anatomy that a term compares on a level; drawn for the sample, whatever the device.

        ``classes``: for each anatomy the class of each voxel of its views, uint8 (V, D, H, W).
        """
        config, found = self.config, []
        finest = [n // config.network.subpixel for n in config.generator.shape]
        grid = [n // 2 ** (-level - 1) for n in finest]
        for anatomy, labels in enumerate(classes):
            own = slice(anatomy * batch.views, (anatomy + 1) * batch.views)
            plan = batch.plans[own][0]
            found.append(
                sample_voxels(
                    labels,
                    grid,
                    term.sampling,
                    rng.generator(plan.seed, plan.index, f"voxels/{number}/{level}"),
                    None if batch.displacement_mm is None else batch.displacement_mm[own],
                    voxel_size_mm=config.generator.voxel_size_mm,
                    midplane=midplane(plan),
                )
            )
        return found

    def _contrast(
        self, term: ContrastConfig, number: int, embeddings: torch.Tensor, sampled: list[Voxels]
    ) -> torch.Tensor:
        """One term on one level, from embeddings (heads, R, E) of the voxels, over the anatomies of all devices."""
        projection = self.plain.projections[number]
        assert isinstance(projection, Projection)
        if term.loss in PER_ANATOMY:
            parts = embeddings.split([len(voxels) for voxels in sampled], 1)
            groups = [(part, voxels) for part, voxels in zip(parts, sampled, strict=True) if len(voxels)]
        else:
            groups = [self._of_all_devices(by_view(embeddings, sampled), join(sampled))]
        values = []
        for own, voxels in groups:
            positives, weights = pair_masks(voxels, kind_of(term.loss), self.target.flip)
            labels = voxels.label.flatten()
            loss: Any = LOSSES[term.loss]
            if term.loss == "equiangular":  # a vector for each structure; background is never compared
                loss = partial(loss, classes=len(self.target) - 1)
                labels = torch.where(labels == UNKNOWN, labels, labels - 1)
            temperature = projection.temperature(own)
            values.append(loss(own, positives, weights, temperature=temperature, beta=term.beta, labels=labels))
        return torch.stack(values).mean() if values else embeddings.sum() * 0.0

    def _of_all_devices(self, embeddings: torch.Tensor, voxels: Voxels) -> tuple[torch.Tensor, Voxels]:
        """Embeddings (heads, V * M, E) and voxels of all devices as one set; the gradient finds its way back.

        Every device computes the loss of the whole set. Averaging the gradients of all devices, as usual, then gives
        that of the whole: the backward pass of the gathering sums what each of them says of an embedding.
        """
        if self.fabric.world_size == 1 or not torch.is_grad_enabled():
            return embeddings, voxels
        cpu = [{k: v.cpu() for k, v in voxels.tensors().items()}]
        parts = [
            Voxels(**{k: v.to(embeddings.device) for k, v in part[0].items()}, config=voxels.config)
            for part in gather(self.fabric, cpu)
        ]
        most = max(part.index.shape[1] for part in parts)
        own = embeddings.unflatten(1, voxels.index.shape)  # (heads, V, M, E)
        padded = nn.functional.pad(own, (0, 0, 0, most - own.shape[2]))
        everything: Any = self.fabric.all_gather(padded, sync_grads=True)
        kept = [one[:, :, : part.index.shape[1]] for one, part in zip(everything, parts, strict=True)]
        return torch.cat(kept, 2).flatten(1, 2), join(parts)

    # -- validation and files ----------------------------------------------------------------------------------------
    def validate(self) -> float:
        """Minus the loss of the averaged weights on held-out templates, of which each is seen once, in all views."""
        if not self.held_out:
            return float("nan")
        stream = ViewStream(self.config, self.held_out, self.target)
        found: dict[str, list[float]] = {}
        with self.averaged(), torch.no_grad():
            for which in range(len(self.held_out)):
                batch = stream.anatomies([(which, which)], VALIDATION_SEED).to(self.fabric.device)
                terms, figures = self._all_terms(batch, None)
                row = {name: float(value) for name, (value, _) in terms.items()}
                row["loss"] = sum(row[name] * weight for name, (_, weight) in terms.items())
                if bool(figures.isfinite().any()):
                    row[self.figure_name()] = float(figures.nanmean())
                for name, value in row.items():
                    found.setdefault(name, []).append(value)
        table = {name: round(sum(values) / len(values), 4) for name, values in found.items()}
        self.state.validation = {"step": self.state.step, "mean": -table["loss"], "terms": table}
        self.state.validations.append(self.state.validation)
        return -table["loss"]

    def heads(self) -> dict[str, dict[str, Any]]:
        """What the heads that are kept say."""
        heads: dict[str, dict[str, Any]] = {}
        if ANATOMY in self.plain.features.heads:
            heads[ANATOMY] = {"task": "reconstruction"}
        if SEGMENTATION in self.plain.features.heads:
            heads[SEGMENTATION] = {"task": "segmentation", "labels": self.target.to_dict()}
        return heads

    def save_model(self, name: str) -> Path:
        """Write the averaged features and heads; the projections are left out."""
        network = FeatureNetwork(self.config.network, {ANATOMY: 1} if self.config.anatomy_weight > 0 else {})
        if self.config.segmentation_weight > 0:
            network.add_head(SEGMENTATION, len(self.target))
        own = {k.removeprefix("features."): v for k, v in self.ema.items() if k.startswith("features.")}
        load_weights(network, own)
        path = self.folder / f"{name}.safetensors"
        save_features(path, network, self.config, self.heads(), self.manifest())
        return path

    def keep_best(self) -> None:
        if self.held_out:
            self.save_model("best")

    def keep_early(self) -> None:
        """Nothing: what the features of the first validation are is of no use to anybody."""

    def write_report(self) -> None:
        from synthseg.training.view_pictures import draw_views

        stream = ViewStream(self.config, self.held_out or self.templates, self.target)
        batch = stream.anatomies([(0, 0)], VALIDATION_SEED).to(self.fabric.device)
        with self.averaged(), torch.no_grad():
            features = self.plain.features(batch.images)
            t1 = self.plain.features.head(ANATOMY, features[-1]) if ANATOMY in self.plain.features.heads else None
        draw_views(self.folder / "views.png", batch, features[-1], t1)

    def draw_first_batch(self, path: Path) -> Path:
        from synthseg.training.view_pictures import draw_views

        return draw_views(path, self.stream().batch(self.state.step))


# ---------------------------------------------------------------------------------------------- parts of a step


def _t1_errors(found: torch.Tensor, batch: ViewBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean absolute error of the T1 images (N, 1, D, H, W) of all views, and that of their gradients (Brain-ID)."""
    wanted, shown = batch.targets()
    both = [
        (l1(one, target, where[0]), gradient_l1(one, target, where[0]))
        for one, target, where in zip(found, wanted, shown, strict=True)
    ]
    errors, gradients = zip(*both, strict=True)
    return torch.stack(errors).mean(), torch.stack(gradients).mean()
