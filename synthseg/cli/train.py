"""``synthseg train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from synthseg.cli.base import DebugOption, DeviceOption, SetOption, ThreadsOption, app, prepare_torch
from synthseg.cli.runs import (
    DevicesOption,
    DryRunOption,
    NodesOption,
    RecipeArgument,
    ResumeOption,
    RunFolderOption,
    StartOption,
    carry_out,
    check_run_folder,
    read_recipe,
)

if TYPE_CHECKING:
    from synthseg.config import TrainConfig


@app.command()
def train(
    recipe: RecipeArgument,
    output: RunFolderOption = None,
    resume: ResumeOption = False,
    settings: SetOption = None,
    start: StartOption = None,
    dry_run: DryRunOption = False,
    device: DeviceOption = "auto",
    devices: DevicesOption = 1,
    nodes: NodesOption = 1,
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:
    """Train a network on synthetic images of label templates."""
    config = load_recipe(recipe, settings or [], start, output, resume)
    folder = output or Path("runs") / config.name
    check_run_folder(folder, resume, dry_run)
    prepare_torch(threads)
    from synthseg.devices import resolve_device
    from synthseg.training.forecast import check_templates
    from synthseg.training.loop import Trainer, check

    check(config, devices * nodes)
    notes = check_templates(config)
    trainer = Trainer(config, folder, resolve_device(device), resume, devices, nodes)
    carry_out(trainer, notes, dry_run, "use it with: synthseg segment IN --model {}")


def load_recipe(
    recipe: str, settings: list[str], start: str | None = None, output: Path | None = None, resume: bool = False
) -> TrainConfig:
    """A training recipe with ``--set`` and ``--from`` applied."""
    from synthseg.config import TrainConfig

    return read_recipe(TrainConfig, recipe, settings, start, output, resume)
