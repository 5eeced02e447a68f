"""``synthseg train``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthseg.cli.base import DebugOption, DeviceOption, SetOption, ThreadsOption, app, prepare_torch

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
        typer.Option("--from", metavar="MODEL", help="Fine-tune a model that ships, or a file."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, draw the first batch and stop.")] = False,
    device: DeviceOption = "auto",
    devices: Annotated[int, typer.Option(min=1, help="Devices on each computer (processes on a CPU).")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Computers, under SLURM or torchrun.")] = 1,
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Train a network on synthetic images of label templates."""
    from synthseg.errors import CheckpointError, OutputError
    from synthseg.volume import check_writable

    config = load_recipe(recipe, settings or [], start)
    folder = output or Path("runs") / config.name
    states = [folder / "state.safetensors", folder / "state.previous.safetensors"]
    if any(state.exists() for state in states) and not resume and not dry_run:
        raise OutputError(f"{folder}: holds a run already; use --resume to go on, or another folder with -o")
    if resume and not any(state.is_file() for state in states):
        raise CheckpointError(f"{folder}: holds no run to resume (state.safetensors); start it without --resume")
    check_writable(states[0])
    prepare_torch(threads)
    from synthseg.devices import resolve_device
    from synthseg.training.forecast import check_templates, forecast
    from synthseg.training.loop import Trainer, check

    check(config, devices * nodes)
    notes = check_templates(config)
    trainer = Trainer(config, folder, resolve_device(device), resume, devices, nodes)
    tell = functools.partial(typer.echo, err=True) if trainer.is_main else lambda line: None
    for line in [*forecast(trainer), *(f"note: {note}" for note in notes)]:
        tell(line)
    if dry_run:
        if trainer.is_main:
            tell(f"first batch: {trainer.draw_first_batch(folder / 'first_batch.png')}")
        return
    best = trainer.run()
    tell(f"model: {best}; use it with: synthseg segment IN --model {best}")


def load_recipe(recipe: str, settings: list[str], start: str | None = None) -> TrainConfig:
    """A recipe with ``--set`` and ``--from`` applied; scheme and templates beside the recipe are taken from there."""
    from synthseg.config import TrainConfig, parse, read_yaml, resolve_paths, set_by_path

    record = read_yaml(recipe)
    for assignment in settings:
        set_by_path(record, assignment)
    if start:
        _take_over(record, start)
    beside = Path(recipe).parent / str(record.get("scheme"))
    if beside.suffix == ".json" and beside.is_file():
        record["scheme"] = str(beside)
    return resolve_paths(parse(TrainConfig, record, recipe), Path(recipe).parent)


def _take_over(record: dict[str, Any], model: str) -> None:
    """Start from a model's weights: network, voxel size and patch are its own where the recipe does not name them."""
    from synthseg.errors import ConfigError
    from synthseg.networks.checkpoint import model_path, read_tensors

    file = model_path(model)
    trained = read_tensors(file)[1].get("config", {})
    record["init"] = str(file.resolve()) if Path(model).is_file() else model
    for section, keys in (("network", list(trained.get("network", {}))), ("generator", ["voxel_size_mm", "shape"])):
        own = record[section] = dict(record.get(section) or {})
        for key in keys:
            own.setdefault(key, trained[section][key])
    other = {k: v for k, v in record["network"].items() if v != trained["network"].get(k, v)}
    if other and not record.get("grow"):
        its = ", ".join(f"{key} {trained['network'][key]}" for key in other)
        ours = ", ".join(f"{key} {value}" for key, value in other.items())
        raise ConfigError(
            f"--from {model}: its network has {its}, the recipe {ours}; leave out 'network' and the "
            "generator's voxel_size_mm and shape to take over the model's, or write a recipe with: synthseg init --from"
        )
