"""``synthseg templates``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synthseg.cli.base import DebugOption, app, say, shipped

templates_app = typer.Typer(help="List, check and import label templates.", no_args_is_help=True)
app.add_typer(templates_app, name="templates")


@templates_app.command("list")
def templates_list(debug: DebugOption = False) -> None:
    """The templates that ship, with their scheme."""
    from synthseg.templates import read_record

    for folder in shipped("templates", "*/"):
        if (folder / "labels.nii.gz").is_file():
            record = read_record(folder)
            typer.echo(f"{folder.name}\t{record['scheme']}\t{len(record['labels'])} labels\t{folder}")


@templates_app.command("check")
def templates_check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Label maps, or imported templates.")],
    scheme: Annotated[str | None, typer.Option(help="head, brainweb, siam16 or a JSON file.")] = None,
    debug: DebugOption = False,
) -> None:
    """Say what is wrong with a folder of label maps."""
    from synthseg.templates import check_folder, label_map_files

    problems, notes = check_folder(folder, scheme)
    for note in notes:
        say(f"note: {note}")
    for problem in problems:
        say(f"error: {problem}")
    typer.echo(f"{len(label_map_files(folder))} label maps, {len(problems)} problems")
    raise typer.Exit(2 if problems else 0)


@templates_app.command("import")
def templates_import(
    source: Annotated[Path, typer.Argument(metavar="FILE|DIR")],
    scheme: Annotated[str, typer.Option(help="What the ids mean: head, brainweb, siam16 or a JSON file.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of templates to add to.")],
    debug: DebugOption = False,
) -> None:
    """Bring label maps into the project's format: checked, RAS+, without islands, dura derived where missing."""
    from synthseg.templates import import_templates
    from synthseg.volume import check_writable

    check_writable(output / "labels.nii.gz")
    import_templates(source, scheme, output, lambda folder: say(str(folder)))
