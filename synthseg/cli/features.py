"""``synthseg features``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from synthseg.cli.base import (
    DEFAULT_MODEL,
    DebugOption,
    DeviceOption,
    ThreadsOption,
    app,
    prepare_torch,
    report,
    say,
    within_memory,
)

if TYPE_CHECKING:
    from synthseg.inputs import Scan

MOST_ROWS = 60  # scans on one picture


@app.command()
def features(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="IN...", readable=False, help="Scans (NIfTI, MGH), folders, or quoted patterns ('*/t1.nii.gz')."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="A .nii.gz, .npz or .safetensors file, or a folder."),
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME|FILE", help="A model or checkpoint.")] = DEFAULT_MODEL,
    levels: Annotated[
        str, typer.Option(metavar="N,...", help="Levels of the decoder: -1 is the finest, -2 the next coarser.")
    ] = "-1",
    pca: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="Write K principal components, shared by all scans.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw each scan beside its features in colour.")
    ] = None,
    file_format: Annotated[
        str | None,
        typer.Option("--format", metavar="nii.gz|npz|safetensors", help="Of files in a folder OUT. Default: nii.gz."),
    ] = None,
    report_to: Annotated[
        Path | None,
        typer.Option("--report", metavar="HTML|DIR", help="Measure the features on synthetic images; no scans."),
    ] = None,
    templates: Annotated[
        list[str] | None, typer.Option(metavar="NAME|DIR", help="Templates of the report (repeat). Default: phantom.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=2, help="Anatomies of the report. Default: 6.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the report's images. Default: 0.")] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Write the features of scans, draw them in colour, or measure what they are worth."""
    from synthseg.errors import ConfigError, InputError

    wanted = _parse_levels(levels)
    if report_to is not None:
        given = {"scans": inputs, "--output": output, "--pca": pca, "--picture": picture, "--format": file_format}
        ignored = [name for name, value in given.items() if value]
        if ignored:
            raise ConfigError(f"--report makes its own images; leave out {', '.join(ignored)}")
        _report(report_to, model, wanted, templates or ["phantom"], n or 6, seed or 0, device, threads, overwrite)
        return
    for name, value in {"--templates": templates or None, "--n": n, "--seed": seed}.items():
        if value is not None:
            raise ConfigError(f"{name} is for --report; features of scans need none")
    if not inputs:
        raise InputError("no scan was given; name files, folders or patterns")
    if output is None and picture is None:
        raise InputError("nothing would be written; name a file or folder with -o, or a picture with --picture")
    _extract(inputs, output, model, wanted, pca or 0, picture, file_format, device, threads, overwrite, debug)


def _extract(
    inputs: list[Path],
    output: Path | None,
    model: str,
    levels: tuple[int, ...],
    components: int,
    picture: Path | None,
    file_format: str | None,
    device: str,
    threads: int | None,
    overwrite: bool,
    debug: bool,
) -> None:
    from synthseg.errors import ConfigError, OutputError
    from synthseg.inputs import find_scans
    from synthseg.volume import check_readable

    if file_format not in (None, "nii.gz", "npz", "safetensors"):
        raise ConfigError(f"--format {file_format}: expected nii.gz, npz or safetensors")
    if picture is not None and picture.suffix.lower() != ".png":
        raise OutputError(f"{picture}: the picture is a PNG; end its name in .png")
    scans = find_scans([*inputs])
    if picture is not None and len(scans) > MOST_ROWS:
        raise ConfigError(f"--picture: {len(scans)} scans do not fit on one picture, at most {MOST_ROWS} do")
    prepare_torch(threads)
    from synthseg.representation.files import check_files, file_suffix, target_files

    if file_format and (output is None or (file_suffix(output) and not output.is_dir())):
        raise ConfigError(f"--format {file_format} is of files in a folder; name a folder with -o, or leave it out")
    suffix = f".{file_format or 'nii.gz'}"
    targets = [] if output is None else target_files(scans, output, suffix, _one_file(scans))
    sources = [scan.path for scan in scans]
    check_files([*targets, *([picture] if picture is not None else [])], sources, overwrite)
    for scan in scans:
        if scan.named or len(scans) == 1:
            check_readable(scan.path)
    from synthseg.devices import resolve_device
    from synthseg.networks.feature_file import load_features
    from synthseg.representation.batch import Task, run
    from synthseg.representation.extraction import check_levels

    torch_device = resolve_device(device)
    loaded = load_features(model, torch_device)
    channels = sum(loaded.network.channels[level] for level in check_levels(loaded.network, levels))
    if components > channels:
        raise ConfigError(f"--pca {components}: the features have {channels} channels; choose at most that many")
    codes: list[int] = []

    def on_done(task: Task, error: Exception | None, warnings: Sequence[str]) -> None:
        number = f"[{len(codes) + 1}/{len(scans)}]"
        if error is not None:
            codes.append(report(_named(error, task.source), debug, subject=f"{task.source}: "))
            return
        codes.append(0)
        for warning in warnings:
            say(f"warning: {task.source}: {warning}")
        say(f"{number} {task.source}" + (f" -> {task.target}" if task.target is not None else ""))

    paths: list[Path | None] = [*targets] if output is not None else [None] * len(sources)
    tasks = [Task(source, target) for source, target in zip(sources, paths, strict=True)]
    with within_memory(torch_device):
        run(tasks, loaded, torch_device, levels, components=components, picture=picture, on_done=on_done)
    failed = [code for code in codes if code]
    if picture is not None and len(failed) < len(scans):
        say(f"picture: {picture}")
    raise typer.Exit(0 if not failed else failed[0] if len(scans) == 1 else 1)


def _one_file(scans: list[Scan]) -> bool:
    return len(scans) == 1 and scans[0].named


def _named(error: Exception, source: Path) -> Exception:
    """The error with the name of the scan in front, if its text does not say it."""
    from synthseg.errors import SynthSegError

    if isinstance(error, SynthSegError) and str(source) not in str(error):
        return type(error)(f"{source}: {error}").with_traceback(error.__traceback__)
    return error


def _report(
    target: Path,
    model: str,
    levels: tuple[int, ...],
    templates: list[str],
    n: int,
    seed: int,
    device: str,
    threads: int | None,
    overwrite: bool,
) -> None:
    from synthseg.errors import OutputError
    from synthseg.templates import expand
    from synthseg.volume import check_writable

    is_page = target.suffix.lower() in (".html", ".htm")
    if target.suffix and not is_page and not target.is_dir():
        raise OutputError(f"{target}: expected a name that ends in .html, or a folder")
    page = target if is_page else target / "report.html"
    for path in (page, page.with_suffix(".json")):
        if path.is_file() and not overwrite:
            raise OutputError(f"{path}: exists already; use --overwrite to replace it, or choose another name")
        check_writable(path)
    folders = expand(templates)
    prepare_torch(threads)
    from synthseg.devices import resolve_device
    from synthseg.networks.feature_file import load_features
    from synthseg.representation.report import measure
    from synthseg.representation.report_page import write_report
    from synthseg.templates import load_template

    torch_device = resolve_device(device)
    loaded = load_features(model, torch_device)
    found = measure(
        loaded, [load_template(folder) for folder in folders], n, torch_device, levels=levels, seed=seed, on_step=say
    )
    write_report(page, found, pictures_beside=not is_page)
    say(f"report: {page}")


def _parse_levels(text: str) -> tuple[int, ...]:
    from synthseg.errors import ConfigError

    try:
        return tuple(int(part) for part in text.replace(" ", "").split(",") if part)
    except ValueError:
        raise ConfigError(f"--levels {text}: expected whole numbers, for example -1 or -1,-2") from None
