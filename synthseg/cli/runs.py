"""What the commands that train have in common: a recipe read, a run folder checked, a plan told, a run carried out."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from synthseg.config import RunConfig
    from synthseg.training.run import Run

R = TypeVar("R", bound="RunConfig")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe YAML, or the name of one that ships.")]
RunFolderOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Run folder. Default: runs/<name>.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")]
StartOption = Annotated[
    str | None, typer.Option("--from", "--init", metavar="MODEL", help="Start from a model that ships, or a file.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan, draw the first batch and stop.")]
DevicesOption = Annotated[int, typer.Option("--devices", min=1, help="Devices on each computer (processes on a CPU).")]
NodesOption = Annotated[int, typer.Option("--nodes", min=1, help="Computers, under SLURM or torchrun.")]


def read_recipe(
    model: type[R],
    recipe: str,
    settings: list[str],
    start: str | None = None,
    output: Path | None = None,
    resume: bool = False,
) -> R:
    """A recipe with ``--set`` and ``--from`` applied; scheme and templates beside the recipe are taken from there."""
    from synthseg.config import parse, read_yaml, resolve_paths, set_by_path

    record = read_yaml(recipe)
    for assignment in settings:
        set_by_path(record, assignment)
    if start:
        take_over(record, start, resumed_folder(model, record, output, resume))
    beside = Path(recipe).parent / str(record.get("scheme"))
    if beside.suffix == ".json" and beside.is_file():
        record["scheme"] = str(beside)
    return resolve_paths(parse(model, record, recipe), Path(recipe).parent)


def resumed_folder(model: type[RunConfig], record: dict[str, Any], output: Path | None, resume: bool) -> Path | None:
    """The folder of the run that goes on, if one does."""
    return (output or Path("runs") / str(record.get("name", model().name))) if resume else None


def take_over(record: dict[str, Any], model: str, resumed: Path | None = None) -> None:
    """Start from a model's weights: network, voxel size and patch are its own where the recipe does not name them.

    The run that goes on in the folder ``resumed`` has its weights; if the file that they came from is gone, network,
    voxel size and patch are those of the run.
    """
    from synthseg.errors import ConfigError
    from synthseg.networks.checkpoint import model_path, read_weights

    trained = None if resumed is None else _begun_from(model, resumed)
    if trained is not None:
        record["init"] = trained["init"]
    else:
        file = model_path(model)
        trained = read_weights(file)[1]["config"]
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


def _begun_from(model: str, folder: Path) -> dict[str, Any] | None:
    """The recipe of the run in a folder, if it began from this file, and the file is gone."""
    config = folder / "config.json"
    if Path(model).exists() or not config.is_file():
        return None
    record: dict[str, Any] = json.loads(config.read_text())
    return record if record.get("init") == str(Path(model).resolve()) else None


def check_run_folder(folder: Path, resume: bool, dry_run: bool) -> None:
    """Refuse a folder that holds a run already, or none to resume, or that cannot be written."""
    from synthseg.errors import CheckpointError, OutputError
    from synthseg.volume import check_writable

    states = [folder / "state.safetensors", folder / "state.previous.safetensors"]
    if any(state.exists() for state in states) and not resume and not dry_run:
        raise OutputError(f"{folder}: holds a run already; use --resume to go on, or another folder with -o")
    if resume and not any(state.is_file() for state in states):
        raise CheckpointError(f"{folder}: holds no run to resume (state.safetensors); start it without --resume")
    check_writable(states[0])


def carry_out(trainer: Run[Any, Any], notes: list[str], dry_run: bool, use: str) -> None:
    """Tell the plan; then draw the first batch, or train. ``use`` says what to do with the model, ``{}``."""
    from synthseg.training.forecast import forecast

    tell = functools.partial(typer.echo, err=True) if trainer.is_main else lambda line: None
    for line in [*forecast(trainer), *(f"note: {note}" for note in notes)]:
        tell(line)
    if dry_run:
        if trainer.is_main:
            tell(f"first batch: {trainer.draw_first_batch(trainer.folder / 'first_batch.png')}")
        return
    model = trainer.run()
    tell(f"model: {model}; {use.format(model)}")
