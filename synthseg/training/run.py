"""What every run shares: devices, state, resume, averaged weights, journal, checkpoints, and a stop when it goes wrong.

A run folder holds ``config.json``, ``train.json`` (manifest), ``state.safetensors`` (to resume) and the one before,
``log.csv``, TensorBoard curves and the models of the run. What a step computes, what is validated and what a model
file holds is up to the kind of run: `loop.Trainer` (segmentation), `pretraining.Pretrainer`, and fine-tuning.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NoReturn, Protocol, TypeVar

import numpy as np
import torch
from rich.console import Console
from torch import nn

from synthseg import __version__
from synthseg.config import FinetuneConfig, RunConfig, TrainConfig
from synthseg.devices import device_name
from synthseg.errors import CheckpointError, ConfigError, TrainingError
from synthseg.generator.anomalies import with_anomalies
from synthseg.generator.contrast import check_named
from synthseg.generator.draw import Record
from synthseg.labels import load_scheme
from synthseg.networks.backbone import load_weights, weights_of
from synthseg.networks.checkpoint import model_path, read_weights
from synthseg.templates import expand, load_template
from synthseg.training.guards import deterministic, follow, undisturbed
from synthseg.training.journal import Journal
from synthseg.training.launch import gather, launch, make_fabric
from synthseg.training.optimiser import learning_rate_factor, make_optimiser
from synthseg.training.state import RunState, StateFile, Tensors, check_same_run, history_of
from synthseg.training.stream import Stream, loader
from synthseg.volume import write_text_atomically


class Planned(Protocol):
    """A batch. Whatever else it holds, it knows the plans that made it."""

    @property
    def plans(self) -> Sequence[Record]: ...


C = TypeVar("C", bound=RunConfig)
B = TypeVar("B", bound=Planned)


def check_loss_weights(config: TrainConfig | FinetuneConfig) -> None:
    """Refuse a segmentation that no loss has a weight in."""
    if config.dice_weight == config.cross_entropy_weight == 0:
        raise ConfigError("there is nothing to learn: give dice_weight or cross_entropy_weight a weight")


def check_grid(config: RunConfig, world: int = 1) -> None:
    """Refuse a batch that ``world`` devices cannot share, a patch that the network cannot halve, unknown contrasts."""
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
    if config.network.norm != "group" and all(n == multiple for n in config.generator.shape):
        raise ConfigError(
            f"generator.shape {list(config.generator.shape)} is a single voxel at the coarsest of "
            f"{len(config.network.channels)} levels, which norm '{config.network.norm}' cannot normalise; "
            f"give one side {2 * multiple} or more, or the network fewer levels"
        )
    check_named(config.generator.contrast)


class Run(ABC, Generic[C, B]):
    """One run. ``run()`` goes on to the recipe's last step and returns the path of the model to use.

    With ``devices`` on each of ``nodes`` computers, every process makes its share of each batch. The first one alone
    (``is_main``) keeps the average of the weights and the state, validates, writes and prints.

    A kind of run says what it checks (`check`), reads (`prepare`), trains (`make_network`), starts from
    (`start_from`), draws (`stream`), computes (`compute`), validates (`validate`) and writes (`save_model`).

    Attributes
    ----------
    plain : what is trained, with the names of its weights. network : the same, as devices share it; call this one.
    ema : the averaged weights of ``plain``, by name: what is validated and saved. Empty but in the first process.
    resuming : whether the run goes on from a saved state.
    saved_step : that of the state in the run folder; None if this run has none there.
    model_name : the file that `run` returns. last_name : that of the weights of the last saved state.
    figure : what the second number of a step is called.
    score : what validation goes by.
    """

    model_name: ClassVar[str] = "best"
    last_name: ClassVar[str] = "last"
    figure: ClassVar[str] = "dice"
    score: ClassVar[str] = "dice"
    fixed: ClassVar[tuple[str, ...]] = ()  # further keys of the recipe that a resumed run may not change

    def __init__(
        self,
        config: C,
        folder: Path,
        device: torch.device | str = "cpu",
        resume: bool = False,
        devices: int = 1,
        nodes: int = 1,
    ) -> None:
        self.config = config
        self.folder = folder
        self.check(devices * nodes)
        self.target = load_scheme(config.scheme)
        anomalies = config.generator.anomalies
        self.templates = [with_anomalies(load_template(path), anomalies) for path in expand(config.templates)]
        self.held_out = [load_template(path) for path in expand(config.validation_templates)]
        shared = {t.name for t in self.templates} & {t.name for t in self.held_out}
        if shared:
            raise ConfigError(
                f"validation_templates: {sorted(shared)} are also trained on; a held-out figure needs others"
            )
        self.resuming = resume
        self.prepare()
        self.state = RunState()
        self.saved_step: int | None = None
        self.file = StateFile(folder)
        saved = self._saved() if resume else None
        self.fabric = make_fabric(device, devices, nodes, config.precision)
        launch(self.fabric)
        self.is_main = self.fabric.is_global_zero
        torch.manual_seed(config.seed)
        self.plain = self.make_network()
        self.start = "random weights"
        if config.init and not resume:
            weights, record = read_weights(model_path(config.init))
            self.state.earlier = [*record.get("earlier", []), history_of(record)]
            self._check_held_out()
            self.start_from(weights, record)
        self.optimiser = make_optimiser(self.plain, config.optimiser)
        self.network, self._step_optimiser = self.fabric.setup(self.plain, self.optimiser)
        self.ema: Tensors = {}
        if self.is_main:
            self.ema = {k: v.detach().clone() for k, v in weights_of(self.plain).items()}
        if saved is not None:
            self._resume(*saved)

    # -- what a kind of run says -------------------------------------------------------------------------------------
    @abstractmethod
    def check(self, world: int) -> None:
        """Refuse a recipe that cannot run on ``world`` devices, before any template is loaded."""

    def prepare(self) -> None:
        """Read and check what else is needed, once the templates are loaded and before any device is asked for."""

    @abstractmethod
    def make_network(self) -> nn.Module:
        """What is trained; its forward method is the only part of it that devices may share."""

    @abstractmethod
    def start_from(self, weights: Tensors, record: dict[str, Any]) -> None:
        """Take over the weights of ``config.init`` that fit and say so in ``start``; ConfigError if few do."""

    @abstractmethod
    def stream(self, rank: int = 0, world: int = 1) -> Stream[B]:
        """Batches from the step of the state on: the share of the process of this ``rank`` of ``world``."""

    @abstractmethod
    def compute(self, batch: B) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a batch (a scalar with gradient), and its figures (n,); those that are finite are averaged."""

    @abstractmethod
    def validate(self) -> float:
        """A figure of the averaged weights, higher is better, kept in the state; NaN if nothing is validated."""

    @abstractmethod
    def save_model(self, name: str) -> Path:
        """Write the averaged weights as the model ``<name>.safetensors`` in the run folder."""

    @abstractmethod
    def draw_first_batch(self, path: Path) -> Path:
        """A picture of the next batch, to look at before training."""

    def write_report(self) -> None:
        """Write what a person looks at after a validation, if the recipe asks for a report."""

    # -- start -------------------------------------------------------------------------------------------------------
    def _check_held_out(self) -> None:
        """A template that an earlier run has seen is not held out."""
        seen = {name for run in self.state.earlier for name in run["templates"]} & {t.name for t in self.held_out}
        if seen:
            raise ConfigError(
                f"validation_templates: {self.config.init} was trained on {sorted(seen)}; hold out others"
            )

    def share_of_new(self, fresh: list[str], weights: Tensors, network: nn.Module | None = None) -> float:
        """The share of a network (default ``plain``) that does not come from ``weights``.

        That is the tensors of these names, which start anew, and what the others have more than those of ``weights``.
        """
        own = weights_of(network or self.plain)
        total = sum(tensor.numel() for tensor in own.values())
        return (total - sum(weights[name].numel() for name in own.keys() - fresh)) / total

    def say_start(self, new: float) -> None:
        """Say in ``start`` how much was taken over; 100 % is said of nothing less."""
        self.start = f"{math.floor(100 * (1 - new))}% of the weights from {self.config.init}"

    # -- state -------------------------------------------------------------------------------------------------------
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
        check_same_run(self.config, record, self.file.newest, self.fixed)
        return tensors, record, warning

    def _resume(self, tensors: Tensors, record: dict[str, Any], warning: str) -> None:
        self.state = RunState.from_record(record["state"])
        self.saved_step = self.state.step
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
            "device": device_name(self.fabric.device),
            "steps": self.state.step,
            "train_seconds": round(self.state.seconds, 1),
            "earlier": self.state.earlier,
            "validation": self.state.validation,
        }

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The network has its averaged weights and is in evaluation mode, inside."""
        live = {k: v.detach().clone() for k, v in weights_of(self.plain).items()}
        try:
            load_weights(self.plain, self.ema)
            self.network.eval()
            yield
        finally:
            with undisturbed():
                self.network.train()
                load_weights(self.plain, live)

    # -- work --------------------------------------------------------------------------------------------------------
    def step(self, batch: B) -> tuple[float, float]:
        """One optimiser step; returns the loss and the mean figure of the batch."""
        config = self.config
        factor = learning_rate_factor(config.optimiser, self.state.step, config.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = group["base_lr"] * factor
        loss, figures = self.compute(batch)
        self.fabric.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.plain.parameters(), config.optimiser.gradient_clip)
        value, mean = self._over_all(loss.detach(), figures)  # here a GPU is waited for
        if not np.isfinite(value):
            self._stop_at(batch, f"the loss is {value}", not bool(loss.detach().isfinite()))
        if not bool(torch.isfinite(norm)):
            self._stop_at(batch, "the gradient is not finite")
        self._step_optimiser.step()
        self._step_optimiser.zero_grad(set_to_none=True)
        decay = min(config.optimiser.ema_decay, (1 + self.state.step) / (10 + self.state.step))
        weights = {k: v.detach() for k, v in weights_of(self.plain).items()}
        floating = [k for k, average in self.ema.items() if average.is_floating_point()]
        if floating:  # the first process alone keeps the average
            torch._foreach_lerp_([self.ema[k] for k in floating], [weights[k] for k in floating], 1 - decay)
        for key in self.ema.keys() - floating:
            self.ema[key].copy_(weights[key])
        self.state.step += 1
        return value, mean

    def _over_all(self, loss: torch.Tensor, figures: torch.Tensor) -> tuple[float, float]:
        """Loss and mean figure of the samples of all devices."""
        found = figures.isfinite()
        sums: Any = torch.stack([loss, figures[found].sum(), found.sum()])
        if self.fabric.world_size > 1:
            sums = self.fabric.all_reduce(sums, reduce_op="mean")
        value, total, count = sums.tolist()
        return value, total / count if count else float("nan")

    def _stop_at(self, batch: B, what: str, mine: bool = True) -> NoReturn:
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

    def figure_name(self) -> str:
        """What the second number of a step is called in this run."""
        return self.figure

    def terms(self) -> Mapping[str, float]:
        """Parts of the loss of the last step, by name, for the curves; none if it has no parts."""
        return {}

    def run(self, until: int | None = None) -> Path:
        """Train to step ``until`` (default: the recipe's last). Interrupted between two steps, it saves its state."""
        config, state = self.config, self.state
        last = min(until or config.steps, config.steps)
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text_atomically(self.folder / "config.json", config.model_dump_json(indent=2) + "\n")
        stream = self.stream(self.fabric.global_rank, self.fabric.world_size)
        journal_of = Journal(config, self.folder, state, self.is_main, self.figure_name(), self.score)
        whole = True
        try:
            with deterministic(config.deterministic), journal_of as journal:
                batches = loader(stream)
                self.network.train()
                saved = time.monotonic()
                while state.step < last or state.to_validate:
                    if not state.to_validate:
                        begun = time.monotonic()
                        batch = next(batches)
                        with undisturbed():
                            whole = False
                            self._one_step(batch)
                            state.seconds += time.monotonic() - begun
                            journal.step(state, state.step == last, self.terms())
                            state.to_validate = state.step % config.validate_every == 0 or state.step == last
                            whole = True
                    if self.is_main and state.to_validate:
                        self._validate_and_keep(journal)
                    state.to_validate = False
                    late = time.monotonic() - saved > config.checkpoint_every_s
                    if self.is_main and (state.step == last or (late and self._worth_saving())):
                        self.save()
                        saved = time.monotonic()
                self.fabric.barrier()
        except (KeyboardInterrupt, SystemExit):
            if self.is_main:
                self._interrupted(whole)
            raise
        return self.folder / f"{self.model_name}.safetensors"

    def _one_step(self, batch: B) -> None:
        """A step, after which the run goes on only if its loss has not run away."""
        state, limits = self.state, self.config.divergence
        loss, figure = self.step(batch)
        if follow(state, limits, loss, figure):
            self._stop_at(
                batch,
                f"the loss has stayed above {limits.factor:g} times its lowest value, "
                f"{state.level:.3g}, for {state.above} steps (a lower learning rate, with init from "
                f"{self.model_name}.safetensors, may mend it)",
            )

    def _worth_saving(self) -> bool:
        """A state whose loss has run away is not worth the place of a good one."""
        return self.state.above == 0

    def _interrupted(self, whole: bool) -> None:
        """Save the state, unless the last step is not ``whole``, and say how to go on."""
        if whole and self._worth_saving() and self.state.step not in (0, self.saved_step):
            with undisturbed():
                self.save()
        if self.saved_step is None:
            told = f"stopped; no state is in {self.folder}: begin again"
        else:
            told = f"stopped; step {self.saved_step} is saved in {self.folder}: the same command with --resume goes on"
        Console(stderr=True).print(told, markup=False, highlight=False, soft_wrap=True)

    def _validate_and_keep(self, journal: Journal) -> None:
        """Validate, and write the best weights if they are, those of the first validation, and the report."""
        score = self.validate()
        with undisturbed():
            journal.validated(self.state)
            first = len(self.state.validations) == 1
            if not np.isfinite(score) or first or score >= self.state.best:
                self.state.best = score if np.isfinite(score) else self.state.best
                self.keep_best()
            if self.state.step <= self.config.validate_every:
                self.keep_early()
            if self.config.report:
                self.write_report()
            self.state.to_validate = False

    def keep_best(self) -> None:
        """The averaged weights have the best validation so far, or there is none."""
        self.save_model("best")

    def keep_early(self) -> None:
        """The first validation is done; what is written now shows how far the run has come since."""
        self.save_model("early")

    def save(self) -> None:
        """Write the state, the last weights and the manifest."""
        self.save_state()
        self.saved_step = self.state.step
        self.save_model(self.last_name)
        write_text_atomically(self.folder / "train.json", json.dumps(self.manifest(), indent=2) + "\n")
