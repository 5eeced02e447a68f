"""The training loop: stream -> network -> losses -> optimiser, with an average of the weights, resume and validation.

A run folder holds ``train.json`` (manifest), ``state.safetensors`` (to resume), ``last.safetensors`` and
``best.safetensors`` (models for inference), ``log.csv`` and TensorBoard curves.
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from synthseg import __version__, rng
from synthseg.config import TrainConfig
from synthseg.errors import CheckpointError, ConfigError, TrainingError
from synthseg.generator.anomalies import with_anomalies
from synthseg.generator.contrast import named_contrasts
from synthseg.labels import load_scheme
from synthseg.networks.backbone import (
    SegmentationNetwork,
    grown_names,
    load_weights,
    space_to_depth,
    transfer,
    weights_of,
)
from synthseg.networks.checkpoint import model_path, read_tensors, save_model, save_tensors
from synthseg.templates import expand, load_template
from synthseg.training.losses import dice_and_cross_entropy
from synthseg.training.optimiser import learning_rate_factor, make_optimiser
from synthseg.training.stream import Batch, SyntheticStream, loader
from synthseg.training.validation import exact_index, mean_dice, validation_table
from synthseg.volume import write_text_atomically


@dataclass
class RunState:
    """What a run carries from step to step besides the weights."""

    step: int = 0
    seconds: float = 0.0
    best: float = -1.0
    validation: dict[str, Any] = field(default_factory=dict)
    earlier: list[dict[str, Any]] = field(default_factory=list)


# What a resumed run may not change: its figures and its history would be false.
FIXED_BY_THE_START = ("scheme", "templates", "validation_templates", "seed", "batch_size", "init", "grow", "network")


def check(config: TrainConfig) -> None:
    """Refuse a recipe that cannot run, before any template is loaded."""
    multiple = config.network.multiple
    if any(n % multiple for n in config.generator.shape):
        fitting = [max(multiple, round(n / multiple) * multiple) for n in config.generator.shape]
        raise ConfigError(
            f"generator.shape {list(config.generator.shape)} must be divisible by {multiple} for "
            f"{len(config.network.channels)} levels with subpixel {config.network.subpixel}; try {fitting}"
        )
    SegmentationNetwork(config.network, len(load_scheme(config.scheme)))
    random = {c for c in config.validation_contrasts if c.startswith("random")}
    asked = {*config.generator.contrast.named_weights, *config.validation_contrasts} - random
    unknown = sorted(asked - set(named_contrasts()))
    if config.validation_templates and not config.validation_contrasts:
        raise ConfigError("validation_contrasts is empty, but validation_templates are given; name a contrast")
    if unknown:
        raise ConfigError(
            f"named_weights, validation_contrasts: there is no contrast {unknown}; "
            f"known: {', '.join(['random', *named_contrasts()])}"
        )


def _history(record: dict[str, Any]) -> dict[str, Any]:
    """What a model file says of the run that made it."""
    generator = record.get("config", {}).get("generator", {})
    return {
        "steps": record.get("steps", 0),
        "train_seconds": record.get("train_seconds", 0.0),
        "voxel_size_mm": generator.get("voxel_size_mm"),
        "templates": record.get("templates", []),
    }


class Trainer:
    """One run. ``Trainer(config, folder).run()`` trains to the recipe's last step and returns the best model's path."""

    def __init__(
        self, config: TrainConfig, folder: Path, device: torch.device | str = "cpu", resume: bool = False
    ) -> None:
        check(config)
        self.config = config
        self.folder = folder
        self.target = load_scheme(config.scheme)
        anomalies = config.generator.anomalies
        self.templates = [with_anomalies(load_template(path), anomalies) for path in expand(config.templates)]
        self.held_out = [load_template(path) for path in expand(config.validation_templates)]
        shared = {t.name for t in self.templates} & {t.name for t in self.held_out}
        if shared:
            raise ConfigError(
                f"validation_templates: {sorted(shared)} are also trained on; a held-out figure needs others"
            )
        for template in self.held_out:
            exact_index(template, self.target)
        precision: Any = "bf16-mixed" if config.precision == "bf16" else "32-true"
        where = torch.device(device)
        devices: Any = [where.index or 0] if where.type == "cuda" else 1
        self.fabric = Fabric(accelerator=where.type, devices=devices, precision=precision)
        torch.manual_seed(config.seed)
        self.plain = SegmentationNetwork(config.network, len(self.target))
        self.state = RunState()
        self.start = "random weights"
        if config.init and not resume:
            weights, record = read_tensors(model_path(config.init))
            self.state.earlier = [*record.get("earlier", []), _history(record)]
            self._check_held_out()
            self._start_from(weights, record)
        optimiser = make_optimiser(self.plain, config.optimiser)
        self.network, self.optimiser = self.fabric.setup(self.plain, optimiser)
        self.ema = {k: v.detach().clone() for k, v in weights_of(self.plain).items()}
        if resume:
            self._resume()

    def _start_from(self, weights: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """Take over the weights that fit. Raises ConfigError if most of the network would start anew."""
        ids = [label["id"] for label in record.get("labels", {}).get("labels", [])]
        if ids != self.target.ids.tolist():  # the last layer means other classes, whatever its shape
            weights = {name: tensor for name, tensor in weights.items() if "output_block" not in name}
        _, fresh = transfer(self.plain, grown_names(weights) if self.config.grow else weights)
        own = weights_of(self.plain)
        new = sum(own[name].numel() for name in fresh) / sum(tensor.numel() for tensor in own.values())
        if new > 0.5:
            raise ConfigError(
                f"init: of the weights of {self.config.init} only {1 - new:.0%} fit the recipe's network; use its "
                "architecture, channels and subpixel (and 'grow: true' for one finer level), or train without init"
            )
        self.start = f"{1 - new:.0%} of the weights from {self.config.init}"

    def _check_held_out(self) -> None:
        """A template that an earlier run has seen is not held out."""
        seen = {name for run in self.state.earlier for name in run["templates"]} & {t.name for t in self.held_out}
        if seen:
            raise ConfigError(
                f"validation_templates: {self.config.init} was trained on {sorted(seen)}; hold out others"
            )

    # -- state -----------------------------------------------------------------------------------------------------
    @property
    def _state_file(self) -> Path:
        return self.folder / "state.safetensors"

    def save_state(self) -> None:
        """Write what `resume` needs, atomically."""
        tensors = {f"network.{k}": v for k, v in weights_of(self.plain).items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{k}": torch.as_tensor(v) for k, v in values.items()}
        save_tensors(
            self._state_file, tensors, {"state": vars(self.state), "config": self.config.model_dump(mode="json")}
        )

    def _resume(self) -> None:
        tensors, record = read_tensors(self._state_file)
        then, now = record["config"], self.config.model_dump(mode="json")
        changed = [key for key in FIXED_BY_THE_START if then.get(key) != now[key]]
        if changed:
            raise ConfigError(
                f"{self._state_file}: the run was started with other {', '.join(changed)} "
                f"({changed[0]}: {then.get(changed[0])}, now {now[changed[0]]}); "
                "resume with the recipe of the run, or begin a new one with init"
            )
        self.state = RunState(**record["state"])
        self.start = f"the run of {self.folder}"
        pick = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        try:
            load_weights(self.plain, pick("network."))
        except ValueError as error:
            raise CheckpointError(
                f"{self._state_file}: does not fit the recipe's network ({error}); resume with the recipe of the run, "
                "or train in another folder"
            ) from None
        self.ema = {k: v.to(self.fabric.device) for k, v in pick("ema.").items()}
        saved = self.optimiser.state_dict()
        saved["state"] = {}
        for key, value in pick("optimiser.").items():
            index, _, name = key.partition(".")
            saved["state"].setdefault(int(index), {})[name] = value
        self.optimiser.load_state_dict(saved)

    def save_model(self, name: str) -> Path:
        """Write the averaged weights as a model for inference."""
        network = SegmentationNetwork(self.config.network, len(self.target))
        load_weights(network, self.ema)
        path = self.folder / f"{name}.safetensors"
        save_model(path, network, self.config, self.target, self.manifest())
        return path

    def manifest(self) -> dict[str, Any]:
        """What was done with what: versions, templates, steps, seconds, validation."""
        return {
            "synthseg": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "templates": [t.name for t in self.templates],
            "validation_templates": [t.name for t in self.held_out],
            "parameters": sum(p.numel() for p in self.plain.parameters()),
            "steps": self.state.step,
            "train_seconds": round(self.state.seconds, 1),
            "earlier": self.state.earlier,
            "validation": self.state.validation,
        }

    def describe(self) -> str:
        """What will be trained, in one line."""
        config = self.config
        shape = " x ".join(map(str, config.generator.shape))
        return (
            f"{config.name}: {len(self.target)} classes of {self.target.name}, {len(self.templates)} templates, "
            f"{shape} voxels of {config.generator.voxel_size_mm:g} mm, {self.manifest()['parameters'] / 1e6:.1f} M "
            f"parameters on {self.fabric.device}, from {self.start}, step {self.state.step} of {config.steps}, "
            f"in {self.folder}"
        )

    def draw_first_batch(self, path: Path) -> Path:
        """A picture of the next batch, to look at before training: image and classes in three planes."""
        import matplotlib.pyplot as plt

        batch = SyntheticStream(self.config, self.templates, self.target).batch(self.state.step)
        rows = len(batch.images)
        figure, axes = plt.subplots(rows, 6, figsize=(15, 2.7 * rows), squeeze=False)
        for row, (image, target) in enumerate(zip(batch.images[:, 0], batch.targets, strict=True)):
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

    # -- work ------------------------------------------------------------------------------------------------------
    def step(self, batch: Batch) -> tuple[float, float]:
        """One optimiser step; returns (loss, mean soft Dice of the classes present)."""
        config = self.config
        factor = learning_rate_factor(config.optimiser, self.state.step, config.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = group["base_lr"] * factor
        cells = self._draw_cells()
        logits = self.network(batch.images.to(self.fabric.device), cells=cells)
        targets = batch.targets.to(self.fabric.device)
        if cells is not None:
            targets = space_to_depth(targets[:, None], config.network.subpixel)[:, cells]
        loss, dices = torch.zeros((), device=self.fabric.device), []
        for single, target, groups in zip(logits, targets, batch.groups, strict=True):
            dice, entropy, scores = dice_and_cross_entropy(single, target, groups.to(self.fabric.device))
            loss = loss + (config.dice_weight * dice + config.cross_entropy_weight * entropy) / len(logits)
            dices.append(scores[1:].nanmean())
        value = float(loss.detach())
        if not np.isfinite(value):
            self._stop_at(batch, f"the loss is {value}")
        self.fabric.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.plain.parameters(), config.optimiser.gradient_clip)
        if not bool(torch.isfinite(norm)):
            self._stop_at(batch, "the gradient is not finite")
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        decay = min(config.optimiser.ema_decay, (1 + self.state.step) / (10 + self.state.step))
        for key, value_now in weights_of(self.plain).items():
            if value_now.is_floating_point():
                self.ema[key].lerp_(value_now.detach(), 1 - decay)
            else:
                self.ema[key].copy_(value_now)
        self.state.step += 1
        return value, float(torch.stack(dices).nanmean())

    def _stop_at(self, batch: Batch, what: str) -> NoReturn:
        """End the run before it is damaged; the weights stay those of the step before."""
        plan = self.folder / "offending_plan.json"
        write_text_atomically(plan, "[" + ",\n".join(p.model_dump_json() for p in batch.plans) + "]\n")
        raise TrainingError(f"{what} at step {self.state.step}; the plans that made it are in {plan}")

    def _draw_cells(self) -> torch.Tensor | None:
        """Which voxels of the subpixel blocks this step scores, (K,), or None for all."""
        blocks, count = self.config.network.subpixel**3, self.config.scored_cells
        if count == 0 or count >= blocks:
            return None
        source = rng.generator(self.config.seed, self.state.step, "cells")
        return torch.randperm(blocks, generator=source)[:count].to(self.fabric.device)

    def validate(self) -> float:
        """Mean hard Dice of the averaged weights on the held-out templates; kept in the manifest."""
        if not self.held_out:
            return float("nan")
        live = {k: v.detach().clone() for k, v in weights_of(self.plain).items()}
        load_weights(self.plain, self.ema)
        self.network.eval()
        table = validation_table(
            self.network, self.config, self.held_out, self.target, self.config.validation_contrasts, self.fabric.device
        )
        self.network.train()
        load_weights(self.plain, live)
        self.state.validation = {"step": self.state.step, "mean": round(mean_dice(table), 4), "dice": table}
        return mean_dice(table)

    def run(self, until: int | None = None) -> Path:
        """Train to step ``until`` (default: the recipe's last)."""
        config = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.folder / "config.json", config.model_dump_json(indent=2) + "\n")
        stream = SyntheticStream(config, self.templates, self.target, first=self.state.step)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f} dice {task.fields[dice]:.3f} val {task.fields[best]:.3f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        last = min(until or config.steps, config.steps)
        loss_mean, dice_mean, saved = 0.0, 0.0, time.monotonic()
        with (
            Progress(*columns, console=Console(stderr=True)) as progress,
            contextlib.closing(SummaryWriter(str(self.folder))) as writer,
            (self.folder / "log.csv").open("a") as history,
        ):
            bar = progress.add_task(config.name, total=config.steps, completed=self.state.step, loss=0, dice=0, best=0)
            batches = loader(stream)
            self.network.train()
            seen = 0
            while self.state.step < last:
                begun = time.monotonic()
                loss, dice = self.step(next(batches))
                seen += 1
                weight = max(0.02, 1 / seen)
                loss_mean += weight * (loss - loss_mean)
                dice_mean += weight * (dice - dice_mean) if np.isfinite(dice) else 0.0
                self.state.seconds += time.monotonic() - begun
                step = self.state.step
                progress.update(bar, completed=step, loss=loss_mean, dice=dice_mean, best=max(0.0, self.state.best))
                if step % 50 == 0:
                    writer.add_scalar("train/loss", loss_mean, step)
                    writer.add_scalar("train/dice", dice_mean, step)
                    history.write(f"{step},{self.state.seconds:.0f},{loss_mean:.4f},{dice_mean:.4f}\n")
                    history.flush()
                if step % config.validate_every == 0 or step == last:
                    score = self.validate()
                    if np.isfinite(score):
                        writer.add_scalar("validation/dice", score, step)
                        history.write(f"# {step} validation {score:.4f}\n")
                    if not np.isfinite(score) or score >= self.state.best:
                        self.state.best = score if np.isfinite(score) else self.state.best
                        self.save_model("best")
                if step == last or time.monotonic() - saved > config.checkpoint_every_s:
                    self.save_state()
                    self.save_model("last")
                    write_text_atomically(self.folder / "train.json", json.dumps(self.manifest(), indent=2) + "\n")
                    saved = time.monotonic()
        return self.folder / "best.safetensors"
