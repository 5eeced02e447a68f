"""``synthseg generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from synthseg.cli.base import DebugOption, DeviceOption, SetOption, ThreadsOption, app, prepare_torch, say


@app.command()
def generate(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the samples.")],
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Settings that ship; synthseg info lists them.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="YAML", help="Generator settings, or a recipe with them.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(metavar="NAME|DIR", help="Templates to draw from (repeat). Default: phantom.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="How many samples (default: 1).")] = None,
    seed: Annotated[int | None, typer.Option(help="Sample i depends on the seed and i alone (default: 0).")] = None,
    scheme: Annotated[str | None, typer.Option(help="Label ids to write (default: the template's own).")] = None,
    replay: Annotated[Path | None, typer.Option(metavar="PLAN", help="Render the Plans of a file again.")] = None,
    preview: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw all images and label maps on one picture.")
    ] = None,
    settings: SetOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Make synthetic images with their label maps and Plans."""
    from synthseg.config import generator_config
    from synthseg.errors import ConfigError
    from synthseg.labels import load_scheme

    drawn = {"--preset": preset, "--config": config, "--n": n, "--seed": seed, "--set": settings or None}
    ignored = [name for name, value in drawn.items() if value is not None]
    if replay is not None and ignored:
        raise ConfigError(f"--replay renders a Plan as it was drawn; leave out {', '.join(ignored)}")
    if preset is not None and config is not None:
        raise ConfigError("--preset and --config: give one of them; to change a preset, copy its file and use --config")
    wanted = generator_config(config, settings or [], preset)
    table = load_scheme(scheme) if scheme else None
    _check_outputs(output, preview, overwrite)
    prepare_torch(threads)

    from synthseg.devices import resolve_device
    from synthseg.generator import export
    from synthseg.reports.contact_sheet import ContactSheet
    from synthseg.templates import expand, load_template

    torch_device = resolve_device(device)
    plans = export.load_plans(replay) if replay else []
    count = len(plans) if replay else 1 if n is None else n
    export.check_free(output, range(count), overwrite, 1 if replay else len(wanted.views.severities))
    named = list(dict.fromkeys(plan.template for plan in plans)) or ["phantom"]
    templates = [load_template(path) for path in expand(template or named)]
    if table is not None:
        for found in templates:
            found.table.mapping(table)
    sheet = ContactSheet()

    def on_done(written: export.Written) -> None:
        say(str(written.files.image))
        if preview is not None:
            name = written.files.image.name.removesuffix("_image.nii.gz")
            details = f"{written.plan.template}, {written.plan.contrast.name}, severity {written.plan.severity:g}"
            sheet.add(written.image, written.labels, written.table, f"{name}: {details}")

    if replay is not None:
        named_alike = {found.name: found for found in templates}
        pairs = [(p, export.fitting_template(p, named_alike.get(p.template, templates[0]), replay)) for p in plans]
        for number, (plan, fitting) in enumerate(pairs):
            export.write_sample(output, number, fitting, [plan], table or fitting.table, torch_device, on_done)
    else:
        export.generate(wanted, templates, count, seed or 0, output, table, torch_device, on_done)
    if preview is not None:
        sheet.write(preview)
        say(str(preview))


def _check_outputs(folder: Path, preview: Path | None, overwrite: bool) -> None:
    """Refuse, before anything is loaded, what could not be written in the end."""
    from synthseg.errors import OutputError
    from synthseg.volume import check_writable

    check_writable(folder / "0000_image.nii.gz")
    if preview is None:
        return
    if preview.suffix.lower() != ".png":
        raise OutputError(f"{preview}: the preview is a PNG; end its name in .png")
    if preview.is_file() and not overwrite:
        raise OutputError(f"{preview}: exists already; use --overwrite, or choose another name")
    check_writable(preview)
