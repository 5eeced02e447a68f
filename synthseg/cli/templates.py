"""``synthseg templates``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synthseg.cli.base import DebugOption, app, say, shipped

templates_app = typer.Typer(help="List, check, import and fetch label templates.", no_args_is_help=True)
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
    """Bring label maps into the project's format: checked, RAS+, without specks, dura derived where missing."""
    from synthseg.templates import import_templates, removal_note
    from synthseg.volume import check_writable

    def tell(folder: Path) -> None:
        say(str(folder))
        if note := removal_note(folder):
            say(f"note: {note}")

    check_writable(output / "labels.nii.gz")
    import_templates(source, scheme, output, tell)


@templates_app.command("fetch")
def templates_fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="synthseg20 or brainweb20.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder of templates. Default: ./NAME.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Take files downloaded before; no network is used.")
    ] = None,
    mirror: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A folder of copies to try first (repeat).")
    ] = None,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Also import maps whose checksum is not known.")
    ] = False,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Download public label maps, check them and import them. Run it again to go on where it stopped."""
    from synthseg.errors import InputError
    from synthseg.importing.fetch import fetch, find_collection

    collection = find_collection(name)
    if folder is not None and mirror:
        raise InputError("--from takes files from a folder, --mirror from a server; give one of them")
    for url in mirror or []:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url}: not a web address (http:// or https://); for a folder use --from")
    out = output or Path(name)
    done = fetch(
        collection, out, folder=folder, mirrors=mirror or [], allow_unverified=allow_unverified, tell=say
    )  # fmt: skip
    if done.left_out:
        say(f"left out, because their checksum is not known: {', '.join(done.left_out)} (--allow-unverified)")
    if done.missing:
        say(f"not in {folder}: {', '.join(done.missing)}")
    typer.echo(f"{len(done.imported) + len(done.present)} of {len(collection.maps)} maps in {out}")
    say(f"cite: {collection.citation} Terms: {collection.license}, {collection.homepage}")
    raise typer.Exit(1 if done.missing else 0)
