"""What a run says while it goes on: a bar on the terminal, ``log.csv`` and TensorBoard curves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

from synthseg.config import RunConfig
from synthseg.training.state import RunState
from synthseg.volume import write_text_atomically

LOG_EVERY = 50


def columns(figure: str) -> tuple[ProgressColumn, ...]:
    """What the bar shows."""
    figures = f"loss {{task.fields[loss]:.3f}} {figure} {{task.fields[dice]:.3f}}"
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{figures}{{task.fields[best]}}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


def forget_after(log: Path, step: int) -> None:
    """Drop the lines of a log that come after a step: a resumed run writes them again."""
    if not log.is_file():
        return
    lines = log.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
    if len(kept) < len(lines):
        write_text_atomically(log, "".join(kept))


def _step_of(line: str) -> float:
    """The step that a line of the log tells of; nothing is kept of a line that is cut off."""
    word = line.removeprefix("# ").replace(",", " ").split(" ", 1)[0]
    return int(word) if word.isdigit() else math.inf


class Journal:
    """Writes while a run goes on. In a process that is not the first (``active`` False) it is silent.

    ``figure`` is what the second number of a step is called, the third column of the log; ``score`` what validation
    goes by.
    """

    def __init__(
        self, config: RunConfig, folder: Path, state: RunState, active: bool, figure: str = "dice", score: str = "dice"
    ) -> None:
        self.active = active
        self.figure = figure
        self.score = score
        if not active:
            return
        forget_after(folder / "log.csv", state.step)
        self._bar = Progress(*columns(figure), console=Console(stderr=True))
        self._curves = SummaryWriter(str(folder), purge_step=state.step + 1 if state.step else None)
        self._log = (folder / "log.csv").open("a")
        self._task = self._bar.add_task(
            config.name,
            total=config.steps,
            completed=state.step,
            loss=state.loss,
            dice=state.dice,
            best=self._best(state),
        )

    def __enter__(self) -> Journal:
        if self.active:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self._bar.stop()
            self._log.close()
            self._curves.close()

    def _best(self, state: RunState) -> str:
        """The best score so far; nothing before a validation has found one."""
        found = any(math.isfinite(validation["mean"]) for validation in state.validations)
        return f" best {self.score} {state.best:.3f}" if found else ""

    def step(self, state: RunState, last: bool, terms: Mapping[str, float] | None = None) -> None:
        """One more step is done; the figures of the state are running means, ``terms`` parts of this step's loss."""
        if not self.active:
            return
        best = self._best(state)
        self._bar.update(self._task, completed=state.step, loss=state.loss, dice=state.dice, best=best)
        if state.step % LOG_EVERY == 0 or last:
            self._curves.add_scalar("train/loss", state.loss, state.step)
            self._curves.add_scalar(f"train/{self.figure}", state.dice, state.step)
            self._log.write(f"{state.step},{state.seconds:.1f},{state.loss:.4f},{state.dice:.4f}\n")
            for name, value in (terms or {}).items():
                self._curves.add_scalar(f"train/{name}", value, state.step)
                self._log.write(f"# {state.step} term {name} {value:.4f}\n")
            self._log.flush()

    def validated(self, state: RunState) -> None:
        """A validation is done; its figures are the last ones of the state: those of its ``terms`` if it has some."""
        if not self.active or not state.validation:
            return
        for name, row in (state.validation.get("scans") or {}).items():
            mean = sum(row.values()) / len(row)
            self._curves.add_scalar(f"scan/{name}", mean, state.step)
            self._log.write(f"# {state.step} scan {name} {mean:.4f}\n")
        for name, value in (state.validation.get("terms") or {self.figure: state.validation["mean"]}).items():
            self._curves.add_scalar(f"validation/{name}", value, state.step)
            self._log.write(f"# {state.step} validation {name} {value:.4f}\n")
        self._log.flush()
