"""``synthseg priors``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synthseg.cli.base import DebugOption, app, prepare_torch, say

priors_app = typer.Typer(help="Measure the intensities of tissues in real scans.", no_args_is_help=True)
app.add_typer(priors_app, name="priors")


@priors_app.command("estimate")
def priors_estimate(
    images: Annotated[list[Path], typer.Option(metavar="FILE|DIR", help="Scans, or folders of them (repeat).")],
    labels: Annotated[
        list[Path], typer.Option(metavar="FILE|DIR", help="Their label maps, on the same grids (repeat).")
    ],
    scheme: Annotated[str, typer.Option(help="What the ids mean: head, brainweb, siam16 or a JSON file.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="YAML", help="File to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    debug: DebugOption = False,
) -> None:
    """Write the range of intensities of each tissue, for contrast.priors of a recipe."""
    from synthseg.errors import OutputError
    from synthseg.labels import load_scheme
    from synthseg.volume import check_writable, write_text_atomically

    table = load_scheme(scheme)
    if output.is_file() and not overwrite:
        raise OutputError(f"{output}: exists already; use --overwrite to replace it, or choose another name")
    check_writable(output)
    prepare_torch(None)
    from synthseg.generator import priors

    found = priors.estimate(images, labels, table, lambda image: say(str(image)))
    write_text_atomically(output, found.to_yaml())
    say(f"{output}: {len(found.tissues)} tissues of {len(found.images)} scans")
