"""What a run will be and cost, before its first step: grid, templates, memory, steps an hour, time to finish.

Speed and memory are measured on a few real steps of a copy of the trainer that is thrown away: the run's own weights,
optimiser, average, step and random state stay as they were, so that it equals a run without a forecast bit by bit.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning_fabric.wrappers import _FabricModule, _FabricOptimizer

from synthseg.config import FinetuneConfig, RunConfig, TrainConfig
from synthseg.errors import SynthSegError, TemplateError
from synthseg.labels import LabelTable, load_scheme
from synthseg.templates import Template, expand, load_template
from synthseg.training.guards import deterministic
from synthseg.training.optimiser import make_optimiser
from synthseg.training.validation import scan_table

if TYPE_CHECKING:
    from synthseg.training.run import Run

PATIENCE_S = 30.0  # no further step is begun after this
MOST_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Pace:
    """Measured on this machine.

    Attributes
    ----------
    render_s, network_s : median seconds to draw a batch, and for the forward and backward pass and the update.
    steps : how many steps were measured; a first one, which warms up, is left out if there are more.
    memory_bytes : the most that this process has held (resident), templates and libraries included.
    render_bytes : how much of it came with drawing the first batch: about what each worker adds.
    device_bytes : the most that was allocated on a CUDA device.
    scans_s : seconds to segment and score all real scans once, from the time of the first and their sizes.
    one_device : images are drawn on the GPU that trains.
    """

    render_s: float
    network_s: float
    steps: int
    memory_bytes: int | None
    render_bytes: int
    device_bytes: int | None
    scans_s: float = 0.0
    one_device: bool = False

    def step_s(self, workers: int) -> float:
        """Seconds a step; workers draw while the network computes, unless they take turns with it on one GPU."""
        if self.one_device:
            return self.network_s + self.render_s
        return max(self.network_s, self.render_s / workers) if workers else self.network_s + self.render_s

    def seconds_to_finish(self, config: RunConfig, steps_done: int, held_out: int) -> float:
        """Steps that are left, and validations: all real scans, and for each held-out image about its part of a step.

        An image is rendered once in each contrast, and takes a forward pass (a third of a step).
        """
        left = max(0, config.steps - steps_done)
        every = config.validate_every
        validations = -(-config.steps // every) - steps_done // every if left else 0  # each multiple, and the last step
        images = held_out
        if isinstance(config, (TrainConfig, FinetuneConfig)):
            images *= len(config.validation_contrasts)
        if isinstance(config, FinetuneConfig):
            images += len(config.validation_images)
        one = (self.render_s + self.network_s / 3) / config.batch_size
        return left * self.step_s(config.workers) + validations * (images * one + self.scans_s)


def peak_memory_bytes() -> int | None:
    """The most that this process has held (ru_maxrss); None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def check_templates(config: RunConfig) -> list[str]:
    """Load every template once and relate it to the classes; returns what a user should know.

    Raises TemplateError with all problems, each naming its template.
    """
    target = load_scheme(config.scheme)
    problems: list[str] = []
    held: set[int] = set()
    for part in ("templates", "validation_templates"):
        try:
            folders = expand(getattr(config, part))
        except SynthSegError as error:
            problems.append(f"{part}: {error}")
            continue
        for folder in folders:
            try:
                classes = _classes_in(load_template(folder), target)
                held |= classes if part == "templates" else set()
            except SynthSegError as error:
                problems.append(str(error))
    if len(problems) == 1:
        raise TemplateError(problems[0])
    if problems:
        raise TemplateError(f"{len(problems)} problems with the templates: " + "; ".join(problems))
    missing = [target.names[c] for c in range(1, len(target)) if c not in held]
    if not missing:
        return []
    return [f"no training template holds {', '.join(missing)}: such classes are not learned"]


def _classes_in(template: Template, target: LabelTable) -> set[int]:
    """Classes of the target that the map may hold: those that its labels stand for."""
    present = torch.unique(template.labels).long().numpy()
    return set(np.flatnonzero(template.table.groups(target)[present].any(0)).tolist())


def throwaway(trainer: Run[Any, Any], folder: Path) -> Run[Any, Any]:
    """A trainer with the same weights and state in memory of its own; templates, scans and devices are shared.

    Its optimiser begins anew: a step costs the same.
    """
    scans = getattr(trainer, "scans", None)
    shared = (*trainer.templates, *trainer.held_out, trainer.templates, trainer.held_out, scans, trainer.fabric)
    memo = {id(thing): thing for thing in (*shared, trainer.config, trainer.target)}
    plain = copy.deepcopy(trainer.plain, memo)
    optimiser = make_optimiser(plain, trainer.config.optimiser)
    network, stepper = trainer.fabric.setup(plain, optimiser)
    double = copy.copy(trainer)
    for name, value in vars(trainer).items():
        if isinstance(value, _FabricModule):
            own: Any = network
        elif isinstance(value, _FabricOptimizer):  # before the next: it is both
            own = stepper
        elif isinstance(value, torch.optim.Optimizer):
            own = optimiser
        else:
            own = copy.deepcopy(value, memo)
        setattr(double, name, own)
    double.folder = folder
    return double


def measure(trainer: Run[Any, Any], most_steps: int = MOST_STEPS, patience_s: float = PATIENCE_S) -> Pace:
    """Time a few real steps of a throwaway copy, and the segmentation of one real scan if some are validated on."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    device = trainer.fabric.device
    cuda = device.type == "cuda"
    render_s: list[float] = []
    network_s: list[float] = []
    before = peak_memory_bytes() or 0
    render_bytes = 0
    scans_s = 0.0
    begun = time.monotonic()
    try:
        with deterministic(trainer.config.deterministic), tempfile.TemporaryDirectory() as folder:
            double = throwaway(trainer, Path(folder))
            double.network.train()
            stream = double.stream()
            for _ in range(most_steps):
                start = time.monotonic()
                torch.set_num_threads(1 if trainer.config.workers else threads)  # as the workers do
                batch = stream.batch(double.state.step)
                torch.set_num_threads(threads)
                rendered = time.monotonic()
                if not render_s:
                    render_bytes = (peak_memory_bytes() or 0) - before
                double.step(batch)
                if cuda:
                    torch.cuda.synchronize(device)
                render_s.append(rendered - start)
                network_s.append(time.monotonic() - rendered)
                if time.monotonic() - begun > patience_s:
                    break
            scans_s = _scans_s(double)
            device_bytes = torch.cuda.max_memory_allocated(device) if cuda else None
            del double
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    kept = slice(1, None) if len(render_s) > 1 else slice(None)
    return Pace(
        statistics.median(render_s[kept]),
        statistics.median(network_s[kept]),
        len(render_s[kept]),
        peak_memory_bytes(),
        max(0, render_bytes),
        device_bytes,
        scans_s,
        stream.device.type == "cuda",
    )


def _scans_s(trainer: Run[Any, Any]) -> float:
    """Seconds to segment and score the real scans that a run validates on: measured on the first; time goes by size."""
    scans = getattr(trainer, "scans", [])
    if not scans:
        return 0.0
    trainer.network.eval()
    start = time.monotonic()
    scan_table(trainer.network, trainer.config, scans[:1], trainer.target, trainer.fabric.device)
    return (time.monotonic() - start) * sum(scan.image.numel() for scan in scans) / scans[0].image.numel()


def plan(trainer: Run[Any, Any], pace: Pace | None, why_not: str = "") -> list[str]:
    """The plan, a line for each thing; ``pace`` None if it was not measured, and why."""
    config, state = trainer.config, trainer.state
    voxel = config.generator.voxel_size_mm
    shape = config.generator.shape
    names = trainer.target.names[1:]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    sizes = sorted({f"{float(np.prod(t.spacing_mm)) ** (1 / 3):.2g}" for t in trainer.templates})
    parameters = sum(p.numel() for p in trainer.plain.parameters())
    held = ", ".join(t.name for t in trainer.held_out[:6]) + (" …" if len(trainer.held_out) > 6 else "")
    held = f" ({held})" if held else ""
    lines = [
        f"run         {config.name} in {trainer.folder}, from {trainer.start}, step {state.step} of {config.steps}",
        f"classes     {len(names)} of {trainer.target.name} and background: {shown}",
        f"voxel size  {voxel:g} mm" + (f" (templates {' and '.join(sizes)} mm)" if sizes else ""),
        f"patch       {_by(shape)} voxels, {_by(n * voxel for n in shape)} mm; {config.batch_size} a step",
        f"templates   {len(trainer.templates)} to train on, {len(trainer.held_out)} held out{held}",
        f"network     {config.network.architecture} {list(config.network.channels)}, {parameters / 1e6:.2f} M weights",
        f"computes    on {trainer.fabric.device} with {torch.get_num_threads()} threads, {config.precision}, "
        f"{config.workers} processes that draw images",
    ]
    if pace is None:
        return [*lines, f"speed       not measured ({why_not})"]
    lines.append(f"memory      {_memory(pace, config.workers)}")
    seconds = pace.step_s(config.workers)
    lines.append(
        f"speed       {3600 / seconds:.0f} steps an hour (measured, {pace.steps} steps): "
        f"{pace.render_s:.2f} s to draw, {pace.network_s:.2f} s to learn"
    )
    if state.step >= config.steps:
        return [*lines, "time        the run is at its last step"]
    left = pace.seconds_to_finish(config, state.step, len(trainer.held_out))
    return [*lines, f"time        about {_duration(left)} to step {config.steps}, validations included"]


def _memory(pace: Pace, workers: int) -> str:
    if pace.memory_bytes is None:
        text = "not measured: this system does not say"
    else:
        text = f"{pace.memory_bytes / 1e9:.1f} GB (measured: the most that this process held)"
        if workers and pace.render_bytes:
            text += f", and {pace.render_bytes / 1e9:.1f} GB or more for each of {workers} processes that draw"
    return text if pace.device_bytes is None else f"{pace.device_bytes / 1e9:.1f} GB on the device; {text}"


def _by(numbers: Iterable[float]) -> str:
    return " x ".join(f"{n:g}" for n in numbers)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def forecast(trainer: Run[Any, Any]) -> list[str]:
    """The plan with measured speed; where it cannot be measured, it says why and the run goes on."""
    if trainer.fabric.world_size > 1:
        return plan(trainer, None, f"{trainer.fabric.world_size} processes share each step")
    try:
        return plan(trainer, measure(trainer))
    except SynthSegError:
        return plan(trainer, None, "a step of the copy failed; the run will say why")
