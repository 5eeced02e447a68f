"""The training loop: stream -> network -> losses -> optimiser, with an average of the weights, resume and validation.

A run folder holds ``train.json`` (manifest), ``state.safetensors`` (to resume) and the one before, ``early``, ``last``
and ``best.safetensors`` (models for inference), ``log.csv``, ``report.html`` and TensorBoard curves.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from rich.console import Console

from synthseg import __version__, rng
from synthseg.config import TrainConfig
from synthseg.errors import CheckpointError, ConfigError, TrainingError
from synthseg.generator.anomalies import with_anomalies
from synthseg.generator.contrast import named_contrasts
from synthseg.labels import LabelTable, load_scheme
from synthseg.networks.backbone import (
    SegmentationNetwork,
    grown_names,
    load_weights,
    space_to_depth,
    transfer,
    weights_of,
    with_classes,
)
from synthseg.networks.checkpoint import model_path, read_tensors, save_model
from synthseg.templates import expand, load_template
from synthseg.training.guards import deterministic, follow
from synthseg.training.journal import Journal
from synthseg.training.launch import gather, launch, make_fabric
from synthseg.training.losses import dice_and_cross_entropy
from synthseg.training.optimiser import learning_rate_factor, make_optimiser
from synthseg.training.state import RunState, StateFile, Tensors, check_same_run, history_of
from synthseg.training.stream import Batch, SyntheticStream, loader
from synthseg.training.validation import exact_index, load_scans, mean_dice, scan_table, validation_table
from synthseg.volume import write_text_atomically


def check(config: TrainConfig, world: int = 1) -> None:
    """Refuse a recipe that cannot run on ``world`` devices, before any template is loaded."""
    if config.batch_size % world:
        raise ConfigError(
            f"batch_size {config.batch_size} cannot be shared by {world} devices; "
            f"try {world * max(1, round(config.batch_size / world))}"
        )
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


class Trainer:
    """One run. ``Trainer(config, folder).run()`` trains to the recipe's last step and returns the best model's path.

    With ``devices`` on each of ``nodes`` computers, every process makes its share of each batch. The first one alone
    (``is_main``) keeps the average of the weights and the state, validates, writes and prints.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        device: torch.device | str = "cpu",
        resume: bool = False,
        devices: int = 1,
        nodes: int = 1,
    ) -> None:
        check(config, devices * nodes)
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
        self.scans = load_scans(config, self.target)
        self.state = RunState()
        self.file = StateFile(folder)
        saved = self._saved() if resume else None
        self.fabric = make_fabric(device, devices, nodes, config.precision)
        launch(self.fabric)
        self.is_main = self.fabric.is_global_zero
        torch.manual_seed(config.seed)
        self.plain = SegmentationNetwork(config.network, len(self.target))
        self.start = "random weights"
        if config.init and not resume:
            weights, record = read_tensors(model_path(config.init))
            self.state.earlier = [*record.get("earlier", []), history_of(record)]
            self._check_held_out()
            self._start_from(weights, record)
        self.optimiser = make_optimiser(self.plain, config.optimiser)
        self.network, self._step_optimiser = self.fabric.setup(self.plain, self.optimiser)
        self.ema: Tensors = {}
        if self.is_main:
            self.ema = {k: v.detach().clone() for k, v in weights_of(self.plain).items()}
        else:
            self.scans = []
        if saved is not None:
            self._resume(*saved)

    def _start_from(self, weights: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """Take over the weights that fit. Raises ConfigError if most of the network would start anew."""
        source = LabelTable.from_dict(record["labels"])
        if source.ids.tolist() != self.target.ids.tolist():  # the last layer means other classes, whatever its shape
            weights = with_classes(weights, source, self.target)
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
    def save_state(self) -> None:
        """Write what `resume` needs, atomically."""
        tensors = {f"network.{k}": v for k, v in weights_of(self.plain).items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{k}": torch.as_tensor(v) for k, v in values.items()}
        self.file.save(tensors, {"state": vars(self.state), "config": self.config.model_dump(mode="json")})

    def _saved(self) -> tuple[Tensors, dict[str, Any], str]:
        """The saved state, if this recipe may go on from it."""
        tensors, record, warning = self.file.load()
        check_same_run(self.config, record, self.file.newest)
        return tensors, record, warning

    def _resume(self, tensors: Tensors, record: dict[str, Any], warning: str) -> None:
        self.state = RunState.from_record(record["state"])
        steps = gather(self.fabric, self.state.step)
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"{self.folder}: the processes see states of steps {steps}; all nodes must see the same run folder"
            )
        if self.is_main:
            self.file.remove_drafts()
            if warning:
                Console(stderr=True).print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
        self.start = f"the run of {self.folder}"
        pick = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        try:
            load_weights(self.plain, pick("network."))
        except ValueError as error:
            raise CheckpointError(
                f"{self.file.newest}: does not fit the recipe's network ({error}); resume with the recipe of the run, "
                "or train in another folder"
            ) from None
        if self.is_main:
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
            "devices": self.fabric.world_size,
            "steps": self.state.step,
            "train_seconds": round(self.state.seconds, 1),
            "earlier": self.state.earlier,
            "validation": self.state.validation,
        }

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
        value, mean = self._over_all(loss.detach(), torch.stack(dices))
        if not np.isfinite(value):
            self._stop_at(batch, f"the loss is {value}", not bool(loss.detach().isfinite()))
        self.fabric.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.plain.parameters(), config.optimiser.gradient_clip)
        if not bool(torch.isfinite(norm)):
            self._stop_at(batch, "the gradient is not finite")
        self._step_optimiser.step()
        self._step_optimiser.zero_grad(set_to_none=True)
        decay = min(config.optimiser.ema_decay, (1 + self.state.step) / (10 + self.state.step))
        weights = weights_of(self.plain)
        for key, average in self.ema.items():
            if average.is_floating_point():
                average.lerp_(weights[key].detach(), 1 - decay)
            else:
                average.copy_(weights[key])
        self.state.step += 1
        return value, mean

    def _over_all(self, loss: torch.Tensor, dices: torch.Tensor) -> tuple[float, float]:
        """Loss and mean Dice of the samples of all devices."""
        found = dices.isfinite()
        sums: Any = torch.stack([loss, dices[found].sum(), found.sum()])
        if self.fabric.world_size > 1:
            sums = self.fabric.all_reduce(sums, reduce_op="mean")
        value, total, count = sums.tolist()
        return value, total / count if count else float("nan")

    def _stop_at(self, batch: Batch, what: str, mine: bool = True) -> NoReturn:
        """End the run before it is damaged; the weights stay those of the step before.

        The plans are those of all processes whose samples are to blame (``mine``). The first process tells of it, the
        others end in silence.
        """
        step = self.state.step
        plans = [plan for part in gather(self.fabric, batch.plans if mine else []) for plan in part]
        path = self.folder / "offending_plan.json"
        if self.is_main:
            write_text_atomically(path, "[" + ",\n".join(p.model_dump_json() for p in plans) + "]\n")
        self.fabric.barrier()
        if not self.is_main:
            raise SystemExit(2)
        raise TrainingError(f"{what} at step {step}; the plans that made it are in {path}")

    def _draw_cells(self) -> torch.Tensor | None:
        """Which voxels of the subpixel blocks this step scores, (K,), or None for all."""
        blocks, count = self.config.network.subpixel**3, self.config.scored_cells
        if count == 0 or count >= blocks:
            return None
        source = rng.generator(self.config.seed, self.state.step, "cells")
        return torch.randperm(blocks, generator=source)[:count].to(self.fabric.device)

    def validate(self) -> float:
        """Mean hard Dice of the averaged weights; kept in the manifest with that of each contrast, scan and class.

        Over the held-out templates, over the real scans, or the mean of both; NaN if there are none.
        """
        if not self.held_out and not self.scans:
            return float("nan")
        config, device = self.config, self.fabric.device
        live = {k: v.detach().clone() for k, v in weights_of(self.plain).items()}
        load_weights(self.plain, self.ema)
        self.network.eval()
        found: dict[str, Any] = {}
        if self.held_out:
            contrasts = config.validation_contrasts
            found["dice"] = validation_table(self.network, config, self.held_out, self.target, contrasts, device)
        if self.scans:
            found["scans"] = scan_table(self.network, config, self.scans, self.target, device)
        self.network.train()
        load_weights(self.plain, live)
        mean = float(np.mean([mean_dice(table) for table in found.values()]))
        self.state.validation = {"step": self.state.step, "mean": round(mean, 4), **found}
        self.state.validations.append(self.state.validation)
        return mean

    def run(self, until: int | None = None) -> Path:
        """Train to step ``until`` (default: the recipe's last)."""
        config, state = self.config, self.state
        last = min(until or config.steps, config.steps)
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text_atomically(self.folder / "config.json", config.model_dump_json(indent=2) + "\n")
        rank, world = self.fabric.global_rank, self.fabric.world_size
        stream = SyntheticStream(config, self.templates, self.target, state.step, rank, world)
        with deterministic(config.deterministic), Journal(config, self.folder, state, self.is_main) as journal:
            batches = loader(stream)
            self.network.train()
            saved = time.monotonic()
            while state.step < last:
                begun = time.monotonic()
                batch = next(batches)
                loss, dice = self.step(batch)
                if follow(state, config.divergence, loss, dice):
                    self._stop_at(
                        batch,
                        f"the loss has stayed above {config.divergence.factor:g} times its lowest value, "
                        f"{state.level:.3g}, for {state.above} steps (a lower learning rate, with init from "
                        "best.safetensors, may mend it)",
                    )
                state.seconds += time.monotonic() - begun
                journal.step(state, state.step == last)
                if self.is_main and (state.step % config.validate_every == 0 or state.step == last):
                    self._validate_and_keep(journal)
                due = state.step == last or (state.above == 0 and time.monotonic() - saved > config.checkpoint_every_s)
                if self.is_main and due:  # a state whose loss has run away is not worth the place of a good one
                    self.save()
                    saved = time.monotonic()
            self.fabric.barrier()
        return self.folder / "best.safetensors"

    def _validate_and_keep(self, journal: Journal) -> None:
        """Validate, and write the best weights if they are, those of the first validation, and the report."""
        score = self.validate()
        journal.validated(self.state)
        if not np.isfinite(score) or score >= self.state.best:
            self.state.best = score if np.isfinite(score) else self.state.best
            self.save_model("best")
        if self.state.step <= self.config.validate_every:
            self.save_model("early")
        if self.config.report:
            from synthseg.training.report import write_report

            write_report(self.folder, self.config, self.manifest(), self.state.validations)

    def save(self) -> None:
        """Write the state, the last weights and the manifest."""
        self.save_state()
        self.save_model("last")
        write_text_atomically(self.folder / "train.json", json.dumps(self.manifest(), indent=2) + "\n")
