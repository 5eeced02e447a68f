"""Training for segmentation: synthetic images -> network -> Dice and cross-entropy, validated by Dice.

Beside what every run writes (`run.Run`), a run folder holds ``early``, ``last`` and ``best.safetensors`` (models for
inference) and ``report.html``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthseg.config import NetworkConfig, TrainConfig, parse
from synthseg.errors import ConfigError
from synthseg.generator.contrast import named_contrasts
from synthseg.labels import load_scheme
from synthseg.networks.backbone import (
    CLASS_LAYERS,
    SegmentationNetwork,
    grown_names,
    load_weights,
    space_to_depth,
    transfer,
    weights_of,
    widened,
    with_classes,
)
from synthseg.networks.checkpoint import save_model
from synthseg.networks.feature_file import as_segmentation_weights
from synthseg.training.losses import dice_and_cross_entropy
from synthseg.training.run import Run, check_grid, check_loss_weights
from synthseg.training.state import Tensors
from synthseg.training.stream import Batch, SyntheticStream, drawn_cells
from synthseg.training.validation import exact_index, load_scans, mean_dice, scan_table, validation_table


def check(config: TrainConfig, world: int = 1) -> None:
    """Refuse a recipe that cannot run on ``world`` devices, before any template is loaded."""
    check_grid(config, world)
    SegmentationNetwork(config.network, len(load_scheme(config.scheme)))
    if config.grow and config.network.architecture != "dynunet":
        raise ConfigError(
            f"grow: only a dynunet can have one finer level, or more channels, than the weights of init, got "
            f"network.architecture {config.network.architecture}; leave out 'grow'"
        )
    check_loss_weights(config)
    unknown = sorted(
        contrast
        for contrast in {*config.validation_contrasts} - set(named_contrasts())
        if not contrast.startswith("random")
    )
    if config.validation_templates and not config.validation_contrasts:
        raise ConfigError("validation_contrasts is empty, but validation_templates are given; name a contrast")
    if unknown:
        raise ConfigError(
            f"validation_contrasts: there is no contrast {unknown}; known: {', '.join(['random', *named_contrasts()])}"
        )


def check_wider(old: NetworkConfig, new: NetworkConfig) -> None:
    """Refuse to grow a network into one of as many levels that is not wider, or that differs in anything else."""
    told = f"init has channels {list(old.channels)} and subpixel {old.subpixel}, the recipe {list(new.channels)} and "
    told += f"{new.subpixel}"
    if len(old.channels) != len(new.channels) or any(o > n for o, n in zip(old.channels, new.channels, strict=True)):
        raise ConfigError(f"grow: {told}; give one finer level, or as many levels of as many channels or more")
    if old.channels == new.channels:
        raise ConfigError(f"grow: {told}, no finer level and no wider one; leave out 'grow'")
    same = {"architecture", "norm", "residual", "subpixel"}
    if old.model_dump(include=same) != new.model_dump(include=same) or new.residual:
        raise ConfigError(
            f"grow: only channels may change where a network becomes wider, and residual blocks cannot; {told}, "
            f"norm {old.norm} and {new.norm}, residual {old.residual} and {new.residual}"
        )


class Trainer(Run[TrainConfig, Batch]):
    """One run. ``Trainer(config, folder).run()`` trains to the recipe's last step and returns the best model's path."""

    plain: SegmentationNetwork

    def check(self, world: int) -> None:
        check(self.config, world)

    def prepare(self) -> None:
        for template in self.held_out:
            exact_index(template, self.target)
        self.scans = load_scans(self.config, self.target)

    def make_network(self) -> SegmentationNetwork:
        if not self.is_main:
            self.scans = []  # the first process alone validates
        return SegmentationNetwork(self.config.network, len(self.target))

    def stream(self, rank: int = 0, world: int = 1) -> SyntheticStream:
        config, device = self.config, self.fabric.device
        if device.type != "cuda" or config.render_on == "cpu":
            device = torch.device("cpu")
        return SyntheticStream(config, self.templates, self.target, self.state.step, rank, world, device)

    def start_from(self, weights: Tensors, record: dict[str, Any]) -> None:
        """Take over the weights that fit. Raises ConfigError if most of what knows no classes would start anew."""
        weights, source = as_segmentation_weights(weights, record)
        if source is not None:  # other classes need another last layer, whatever its shape
            weights = with_classes(weights, source, self.target)
        known = fitted = weights
        if self.config.grow:
            old = parse(NetworkConfig, record["config"]["network"], f"init: {self.config.init}")
            if len(old.channels) < len(self.config.network.channels):
                known = fitted = grown_names(weights)
            else:
                check_wider(old, self.config.network)
                fitted = widened(weights, self.plain)
        _, fresh = transfer(self.plain, fitted)
        body = {k: v.numel() for k, v in weights_of(self.plain).items() if not k.startswith(CLASS_LAYERS)}
        lost = sum(body.get(name, 0) for name in fresh) / sum(body.values())
        if lost > 0.5:
            raise ConfigError(
                f"init: of the weights of {self.config.init} only {1 - lost:.0%} fit the recipe's network; use its "
                "architecture, channels and subpixel ('grow: true' for one finer level or more channels), or no init"
            )
        self.say_start(self.share_of_new(fresh, known))

    def save_model(self, name: str) -> Path:
        """Write the averaged weights as a model for inference."""
        network = SegmentationNetwork(self.config.network, len(self.target))
        load_weights(network, self.ema)
        path = self.folder / f"{name}.safetensors"
        save_model(path, network, self.config, self.target, self.manifest())
        return path

    def write_report(self) -> None:
        from synthseg.training.report import write_report

        write_report(self.folder, self.config, self.manifest(), self.state.validations)

    def draw_first_batch(self, path: Path) -> Path:
        """A picture of the next batch, to look at before training: image and classes in three planes."""
        import matplotlib.pyplot as plt

        batch = self.stream().batch(self.state.step)
        rows = len(batch.images)
        figure, axes = plt.subplots(rows, 6, figsize=(15, 2.7 * rows), squeeze=False)
        for row, (image, target) in enumerate(zip(batch.images[:, 0].cpu(), batch.targets.cpu(), strict=True)):
            for axis in range(3):
                middle = image.shape[axis] // 2
                show = {"origin": "lower", "interpolation": "nearest"}
                axes[row, axis].imshow(image.select(axis, middle).T, cmap="gray", vmin=0, vmax=1, **show)
                axes[row, 3 + axis].imshow(target.select(axis, middle).T, cmap="nipy_spectral", **show)
        for ax in axes.flat:
            ax.axis("off")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=80, bbox_inches="tight")
        plt.close(figure)
        return path

    # -- work ---------------------------------------------------------------------------------------------------------
    def compute(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a batch, and the mean soft Dice of the classes present of each image (B,)."""
        config = self.config
        cells = self._draw_cells()
        device = self.fabric.device
        logits = self.network(batch.images.to(device, non_blocking=True), cells=cells)
        targets = batch.targets.to(device, non_blocking=True)
        if cells is not None:
            targets = space_to_depth(targets[:, None], config.network.subpixel)[:, cells]
        loss, dices = torch.zeros((), device=device), []
        for single, target, groups in zip(logits, targets, batch.groups, strict=True):
            dice, entropy, scores = dice_and_cross_entropy(single, target, groups)
            loss = loss + (config.dice_weight * dice + config.cross_entropy_weight * entropy) / len(logits)
            dices.append(scores[1:].nanmean())
        return loss, torch.stack(dices)

    def _draw_cells(self) -> torch.Tensor | None:
        """Which voxels of the subpixel blocks this step scores, (K,), or None for all."""
        config = self.config
        cells = drawn_cells(config.seed, self.state.step, config.network.subpixel, config.scored_cells)
        return None if cells is None else cells.to(self.fabric.device, non_blocking=True)

    def validate(self) -> float:
        """Mean hard Dice of the averaged weights; kept in the manifest with that of each contrast, scan and class.

        Over the held-out templates, over the real scans, or the mean of both; NaN if there are none.
        """
        if not self.held_out and not self.scans:
            return float("nan")
        config, device = self.config, self.fabric.device
        found: dict[str, Any] = {}
        with self.averaged():
            if self.held_out:
                contrasts = config.validation_contrasts
                found["dice"] = validation_table(self.network, config, self.held_out, self.target, contrasts, device)
            if self.scans:
                found["scans"] = scan_table(self.network, config, self.scans, self.target, device)
        mean = float(np.mean([mean_dice(table) for table in found.values()]))
        self.state.validation = {"step": self.state.step, "mean": round(mean, 4), **found}
        self.state.validations.append(self.state.validation)
        return mean
