"""``synthseg pretrain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synthseg.cli.base import DebugOption, DeviceOption, SetOption, ThreadsOption, app, prepare_torch
from synthseg.cli.runs import carry_out, check_run_folder, read_recipe


@app.command()
def pretrain(
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
    """Learn features that follow anatomy from several images of each, before a network learns to segment."""
    from synthseg.config import PretrainConfig

    config = read_recipe(PretrainConfig, recipe, settings or [], start)
    folder = output or Path("runs") / config.name
    check_run_folder(folder, resume, dry_run)
    prepare_torch(threads)
    from synthseg.devices import resolve_device
    from synthseg.training.forecast import check_templates
    from synthseg.training.pretraining import Pretrainer, check

    check(config, devices * nodes)
    notes = check_templates(config)
    trainer = Pretrainer(config, folder, resolve_device(device), resume, devices, nodes)
    carry_out(trainer, notes, dry_run, "train a segmentation on it with: synthseg train RECIPE --from {}")
