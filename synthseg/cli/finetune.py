"""``synthseg finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from synthseg.cli.base import DebugOption, DeviceOption, SetOption, ThreadsOption, app, prepare_torch
from synthseg.cli.runs import (
    DevicesOption,
    DryRunOption,
    NodesOption,
    ResumeOption,
    RunFolderOption,
    carry_out,
    check_run_folder,
    resumed_folder,
    take_over,
)

if TYPE_CHECKING:
    from synthseg.config import FinetuneConfig
    from synthseg.training.finetuning import Finetuner


@app.command()
def finetune(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="A recipe YAML, or the name of one. Default: that of --task."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="segmentation, reconstruction, super-resolution or bias-field."),
    ] = None,
    start: Annotated[
        str | None, typer.Option("--init", metavar="FILE|NAME", help="The network whose features are used.")
    ] = None,
    frozen: Annotated[
        bool | None, typer.Option("--frozen/--free", help="Train the new layer alone, or the whole network.")
    ] = None,
    few_shot: Annotated[
        int | None, typer.Option("--few-shot", metavar="N", min=1, help="Learn from N images alone.")
    ] = None,
    templates: Annotated[
        list[str] | None, typer.Option(metavar="NAME|DIR", help="Learn from images of these templates (repeat).")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Learn from real images, each with its label map or T1.")
    ] = None,
    scheme: Annotated[
        str | None, typer.Option(metavar="NAME|JSON", help="Classes, and ids of the label maps of --images.")
    ] = None,
    output: RunFolderOption = None,
    resume: ResumeOption = False,
    settings: SetOption = None,
    dry_run: DryRunOption = False,
    device: DeviceOption = "auto",
    devices: DevicesOption = 1,
    nodes: NodesOption = 1,
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:
    """Train one layer for a task on the features of a network, from synthetic or a few real images."""
    config = load_recipe(
        recipe, task, settings or [], start, frozen, few_shot, templates, images, scheme, output, resume
    )
    folder = output or Path("runs") / config.name
    check_run_folder(folder, resume, dry_run)
    prepare_torch(threads)
    from synthseg.devices import resolve_device
    from synthseg.training.finetuning import Finetuner, check
    from synthseg.training.forecast import check_templates

    check(config, devices * nodes)
    run = Finetuner(config, folder, resolve_device(device), resume, devices, nodes)
    notes = check_templates(config) if config.task == "segmentation" and not config.images else []
    carry_out(run, [*notes, *_notes(run)], dry_run, f"use it with: {_use(config.task, folder)}")
    if run.is_main and not dry_run:
        for line in _figures(run):
            typer.echo(line, err=True)


def load_recipe(
    recipe: str | None,
    task: str | None = None,
    settings: list[str] | None = None,
    start: str | None = None,
    frozen: bool | None = None,
    few_shot: int | None = None,
    templates: list[str] | None = None,
    images: Path | None = None,
    scheme: str | None = None,
    output: Path | None = None,
    resume: bool = False,
) -> FinetuneConfig:
    """A recipe with the options of the command line; grid and network are those of its ``init`` unless it names them.

    Real images or templates that are named replace those of the recipe.
    """
    from synthseg.config import FinetuneConfig, parse, read_yaml, resolve_images, resolve_paths, set_by_path
    from synthseg.config.finetuning import TASKS
    from synthseg.errors import ConfigError
    from synthseg.training.examples import find_images

    if task is not None and task not in TASKS:
        raise ConfigError(f"there is no task '{task}'; choose one of {', '.join(TASKS)}")
    if recipe is None and task is None:
        raise ConfigError(f"give a recipe, or a task with --task: {', '.join(TASKS)}")
    file = recipe or f"downstream_{str(task).replace('-', '_')}"
    record = read_yaml(file)
    options = {"task": task, "init": start, "frozen": frozen, "few_shot": few_shot, "scheme": scheme}
    record |= {key: value for key, value in options.items() if value is not None}
    for assignment in settings or []:
        set_by_path(record, assignment)
    if templates or images is not None:
        record["templates"] = list(templates or [])
        record["images"] = []
    if images is not None:
        found = find_images(images, record.get("task", "segmentation"))
        record["images"] = [one.model_dump(mode="json") for one in found]
    if record.get("init"):
        take_over(record, str(record["init"]), resumed_folder(FinetuneConfig, record, output, resume))
    folder = Path(file).parent
    beside = folder / str(record.get("scheme"))
    if beside.suffix == ".json" and beside.is_file():
        record["scheme"] = str(beside)
    return resolve_images(resolve_paths(parse(FinetuneConfig, record, file), folder), folder)


def _notes(run: Finetuner) -> list[str]:
    """What is particular to fine-tuning, to read before it begins."""
    config = run.config
    learned = sum(p.numel() for p in run.plain.parameters() if p.requires_grad)
    notes = [f"{config.task}, compared with the {run.task.baseline_name}; {learned} weights are trained"]
    if run.examples:
        notes.append(f"real images: {', '.join(example.name for example in run.examples)}")
    if config.few_shot:
        notes.append(f"few-shot: {config.few_shot} images, seen again and again")
    if not run.held_out and not run.held_out_examples:
        notes.append("nothing is held out (validation_templates, validation_images), so there will be no figures")
    return notes


def _figures(run: Finetuner) -> list[str]:
    """The last validation, a line for each contrast and real image."""
    task, lines = run.task, []
    for name, row in run.state.validation.get("figures", {}).items():
        own, without = row[task.figure], row[f"baseline_{task.figure}"]
        lines.append(f"{name}: {task.figure} {own:.4f}, {task.baseline_name} {without:.4f}")
    return lines


def _use(task: str, folder: Path) -> str:
    """How the model, ``{}``, is used."""
    beside = str(folder / "segmentation.safetensors").replace("{", "{{").replace("}", "}}")
    return {
        "segmentation": f"synthseg segment IN --model {beside}",
        "reconstruction": "synthseg synthesize-t1 IN -o OUT --model {}",
        "bias-field": "synthseg correct-bias IN -o OUT --model {}",
        "super-resolution": "synthseg.representation.tasks.super_resolve in Python",
    }[task]
