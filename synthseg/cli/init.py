"""``synthseg init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synthseg.cli.base import DebugOption, app, say


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for templates and recipe.")],
    templates: Annotated[
        Path,
        typer.Option(
            "--templates", metavar="DIR",
            help="Label maps, imported templates, FreeSurfer subjects, CHARM output or a BIDS derivative.",
        ),
    ],
    scheme: Annotated[
        str | None, typer.Option(help="What the ids mean: head, brainweb, siam16 or a JSON file.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Names of the ids: a FreeSurfer or ITK-SNAP table or dseg.tsv.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Classes of the network: a scheme. Default: siam16, or your labels if no scheme."),
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="MODEL", help="Fine-tune a model that ships, or a file.")
    ] = None,
    voxel_size: Annotated[
        float | None, typer.Option("--voxel-size", min=0.1, metavar="MM", help="Voxel size of the network.")
    ] = None,
    desc: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of a BIDS derivative, the maps with desc-NAME; none: those without."),
    ] = None,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Look at label maps, import them, and write a commented recipe that fits them."""
    from synthseg.config import TrainConfig, parse
    from synthseg.errors import ConfigError
    from synthseg.importing.recipes import start_project
    from synthseg.templates import label_map_files, removal_note

    base: tuple[str, TrainConfig] | None = None
    if start and voxel_size:
        raise ConfigError(f"--from {start} brings its own voxel size; leave out --voxel-size")
    if start:
        from synthseg.networks.checkpoint import model_path, read_weights

        file = model_path(start)
        name = str(file.resolve()) if Path(start).is_file() else start
        trained = read_weights(file)[1]["config"]
        grid = {key: trained["generator"][key] for key in ("voxel_size_mm", "shape")}  # that of features has more
        base = (name, parse(TrainConfig, {"network": trained["network"], "generator": grid}, str(file)))
    recipe = start_project(folder, templates, scheme, labels, classes, base, voxel_size, desc, say)
    for part in (recipe.parent / "templates", recipe.parent / "held_out"):
        for file in label_map_files(part) if part.is_dir() else []:
            if note := removal_note(file.parent):
                say(f"note: {note}")
    say(f"recipe: {recipe}; look at the first images with: synthseg train {recipe} --dry-run")
