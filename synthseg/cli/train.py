"""``synthseg train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from synthseg.cli.base import DebugOption, DeviceOption, SetOption, ThreadsOption, app, prepare_torch
from synthseg.cli.runs import carry_out, check_run_folder, read_recipe

if TYPE_CHECKING:
    from synthseg.config import TrainConfig


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe YAML, or the name of one that ships.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Run folder. Default: runs/<name>.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    settings: SetOption = None,
    start: Annotated[
        str | None,
        typer.Option("--from", "--init", metavar="MODEL", help="Start from a model that ships, or a file."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, draw the first batch and stop.")] = False,
    device: DeviceOption = "auto",
    devices: Annotated[int, typer.Option(min=1, help="Devices on each computer (processes on a CPU).")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Computers, under SLURM or torchrun.")] = 1,
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Train a network on synthetic images of label templates."""
    config = load_recipe(recipe, settings or [], start)
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


def load_recipe(recipe: str, settings: list[str], start: str | None = None) -> TrainConfig:
    """A training recipe with ``--set`` and ``--from`` applied."""
    from synthseg.config import TrainConfig

    return read_recipe(TrainConfig, recipe, settings, start)
