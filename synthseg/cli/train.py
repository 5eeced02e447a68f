"""``synthseg train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synthseg.cli.base import DebugOption, DeviceOption, SetOption, ThreadsOption, app, prepare_torch, say


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe YAML, or the name of one that ships.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Run folder. Default: runs/<name>.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    settings: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Draw the first batch and stop.")] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Train a network on synthetic images of label templates."""
    from synthseg.config import TrainConfig, load_yaml, resolve_paths
    from synthseg.errors import CheckpointError, OutputError
    from synthseg.volume import check_writable

    config = resolve_paths(load_yaml(TrainConfig, recipe, settings or []), Path(recipe).parent)
    folder = output or Path("runs") / config.name
    if (folder / "state.safetensors").exists() and not resume and not dry_run:
        raise OutputError(f"{folder}: holds a run already; use --resume to go on, or another folder with -o")
    if resume and not (folder / "state.safetensors").is_file():
        raise CheckpointError(f"{folder}: holds no run to resume (state.safetensors); start it without --resume")
    check_writable(folder / "state.safetensors")
    prepare_torch(threads)
    from synthseg.devices import resolve_device
    from synthseg.training.loop import Trainer

    trainer = Trainer(config, folder, resolve_device(device), resume)
    say(trainer.describe())
    if dry_run:
        say(f"first batch: {trainer.draw_first_batch(folder / 'first_batch.png')}")
        return
    best = trainer.run()
    say(f"model: {best}; use it with: synthseg segment IN --model {best}")
