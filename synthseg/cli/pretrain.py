"""``synthseg pretrain``."""

from __future__ import annotations

from pathlib import Path

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


@app.command()
def pretrain(
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
    """Learn features that follow anatomy from several images of each, before a network learns to segment."""
    from synthseg.config import PretrainConfig

    config = read_recipe(PretrainConfig, recipe, settings or [], start, output, resume)
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
