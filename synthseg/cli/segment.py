"""``synthseg segment``."""

from __future__ import annotations

import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
from synthseg.errors import InputError, OutputError, SynthSegError

if TYPE_CHECKING:
    from synthseg.batch.jobs import Job, Wanted
    from synthseg.batch.run import Outcome

CROP_LIMITS_MM = (20.0, 1000.0)


@app.command()
def segment(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="IN...", readable=False, help="Scans (NIfTI, MGH), folders, or quoted patterns ('*/t1.nii.gz').",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="OUT",
            help="A file for one scan, or a folder. Default: <name>_seg.nii.gz beside each scan.",
        ),
    ] = None,
    from_list: Annotated[
        Path | None, typer.Option(metavar="TXT", help="Take the scans from a text file, one path a line (-: stdin).")
    ] = None,
    bids: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Segment a BIDS dataset. Default of OUT: DIR/derivatives/synthseg."),
    ] = None,
    participant: Annotated[
        list[str] | None, typer.Option(metavar="LABEL", help="Only this participant of the dataset (repeat).")
    ] = None,
    volumes: Annotated[
        Path | None, typer.Option(metavar="CSV|TSV", help="Write volumes in ml, one row per scan.")
    ] = None,
    report_file: Annotated[
        Path | None, typer.Option("--report", metavar="HTML", help="Write a report of all scans, with pictures.")
    ] = None,
    overview: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw slices; several scans: <stem>_<scan>.png.")
    ] = None,
    posteriors: Annotated[bool, typer.Option("--posteriors", help="Write the probabilities (4-D).")] = False,
    resampled: Annotated[bool, typer.Option("--resampled", help="Write the scan on the grid of the results.")] = False,
    mask: Annotated[bool, typer.Option("--mask", help="Write a mask of the brain.")] = False,
    stripped: Annotated[bool, typer.Option("--stripped", help="Write the scan without skull.")] = False,
    mesh: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Write surfaces of these labels, or of brain, skull, head.")
    ] = None,
    mesh_format: Annotated[str, typer.Option(metavar="gii|stl", help="File format of the surfaces.")] = "gii",
    color_tables: Annotated[
        bool, typer.Option("--color-tables", help="Write the labels' names and colours for four viewers.")
    ] = False,
    spacing: Annotated[
        str | None, typer.Option(metavar="MM|MMxMMxMM", help="Voxel size of the results; 'model': that of the model.")
    ] = None,
    scheme: Annotated[str | None, typer.Option(metavar="NAME|JSON", help="Write the ids of another scheme.")] = None,
    model: Annotated[str, typer.Option(metavar="NAME|FILE", help="A model or checkpoint.")] = DEFAULT_MODEL,
    fast: Annotated[
        bool, typer.Option("--fast", help="A third less memory, a fifth less time, less accurate.")
    ] = False,
    robust: Annotated[bool, typer.Option("--robust", help="Mean of several looks at the scan: slower.")] = False,
    voxel_size: Annotated[
        float | None, typer.Option(metavar="MM", help="Voxel size that the network works at (0.75: small heads).")
    ] = None,
    crop: Annotated[
        str | None, typer.Option(metavar="MM|MMxMMxMM", help="Segment only a box about the middle of the head.")
    ] = None,
    no_quality: Annotated[bool, typer.Option("--no-quality", help="Do not judge the results.")] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do again what is done; replace files.")] = False,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Segment scans: each gets a label map on its own grid. What is done already is skipped."""
    from synthseg.batch.jobs import SPACING_LIMITS_MM, Wanted, check_jobs, parse_sizes
    from synthseg.batch.volume_table import VolumeTable, check_name, columns_of

    if fast and robust:
        raise InputError("--fast and --robust exclude each other; choose one")
    if mesh_format not in ("gii", "stl"):
        raise InputError(f"--mesh-format {mesh_format}: expected gii or stl")
    if report_file is not None and report_file.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"{report_file}: expected a name that ends in .html")
    if volumes is not None:
        check_name(volumes)
    format_of_meshes: Literal["gii", "stl"] = "stl" if mesh_format == "stl" else "gii"
    spacing_mm: float | tuple[float, float, float] | None = None
    if spacing is not None and spacing != "model":
        spacing_mm = parse_sizes(spacing, "--spacing", SPACING_LIMITS_MM)
    preloaded = _load(model, device, threads) if spacing == "model" else None
    if preloaded is not None:
        spacing_mm = preloaded[0].voxel_size_mm
    crop_mm = None if crop is None else parse_sizes(crop, "--crop", CROP_LIMITS_MM)
    by_key: dict[str, str] = {}
    for name in (mesh or "").split(","):
        if name.strip():
            by_key.setdefault(name.strip().lower(), name.strip())
    meshes = tuple(by_key.values())
    wanted = Wanted(
        posteriors, resampled, mask, stripped, meshes, format_of_meshes, color_tables, spacing_mm, scheme
    )  # fmt: skip
    jobs = _plan(inputs or [], from_list, bids, participant or [], output, overview, wanted)
    check_jobs(jobs, [path for path in (volumes, report_file) if path is not None])

    from synthseg.batch.resume import check_existing
    from synthseg.batch.run import Settings, run_jobs
    from synthseg.inference import Options
    from synthseg.outputs import check_targets, target_table

    table = VolumeTable(volumes, [job.name for job in jobs], overwrite) if volumes is not None else None
    if not overwrite:
        check_existing(jobs, report_file)
    options = Options(
        mode="fast" if fast else "robust" if robust else "default",
        voxel_size_mm=voxel_size,
        crop_mm=crop_mm,
        quality=not no_quality,
        keep_posteriors=jobs[0].targets.need_posteriors(spacing_mm, scheme),
    )
    loaded, torch_device = preloaded or _load(model, device, threads)
    check_targets(jobs[0].targets, loaded.labels, spacing_mm=spacing_mm, scheme=scheme)
    final = loaded.labels if scheme is None else target_table(loaded.labels, scheme)
    if table is not None:
        table.check_columns(columns_of(final, options.quality))
    if bids is not None:
        from synthseg.batch.bids import write_description

        write_description(_derivative(bids, output), bids)
    facts = {
        "model": loaded.name,
        "sha256": loaded.sha256,
        "mode": options.mode,
        "voxel_size_mm": voxel_size,
        "crop_mm": crop_mm,
        "spacing_mm": spacing_mm,
        "scheme": final.name,
    }
    color_folder = _derivative(bids, output) if bids is not None else None
    settings = Settings(wanted, table, report_file is not None, overwrite, color_folder, facts)

    from rich.console import Console

    number = {id(job): f"[{index}/{len(jobs)}]" for index, job in enumerate(jobs, 1)}
    codes: dict[int, int] = {}
    outcomes: list[Outcome] = []
    start = time.perf_counter()
    try:
        with Console(stderr=True).status("starting") as status, within_memory(torch_device):

            def on_step(job: Job, step: str) -> None:
                status.update(f"{number[id(job)].replace('[', '(').replace(']', ')')} {step}")

            def on_done(outcome: Outcome) -> None:
                outcomes.append(outcome)
                codes[id(outcome.job)] = _finish(outcome, number[id(outcome.job)], debug)

            run_jobs(jobs, loaded, torch_device, options, settings, on_step, on_done)
    except BaseException as error:  # what is done is in the report all the same
        if not isinstance(error, Exception):
            facts["interrupted"] = f"{sum(outcome.status != 'failed' for outcome in outcomes)} of {len(jobs)} done"
            say(f"{facts['interrupted']}; the same command goes on")
        with suppress(SynthSegError):
            _write_report(report_file, jobs, outcomes, facts, str(torch_device), start)
        raise
    _write_report(report_file, jobs, outcomes, facts, str(torch_device), start)
    failed = [codes[id(job)] for job in jobs if codes[id(job)]]
    if len(jobs) > 1:
        count = Counter(outcome.status for outcome in outcomes)
        parts = ", ".join(f"{count[status]} {status}" for status in ("done", "skipped", "failed") if count[status])
        say(f"{len(jobs)} scans in {time.perf_counter() - start:.1f} s: {parts}")
    raise typer.Exit(0 if not failed else failed[0] if len(jobs) == 1 else 1)


def _plan(
    inputs: Sequence[Path],
    from_list: Path | None,
    bids: Path | None,
    participants: Sequence[str],
    output: Path | None,
    overview: Path | None,
    wanted: Wanted,
) -> list[Job]:
    """What is read and written, from the arguments that say so."""
    if participants and bids is None:
        raise InputError("--participant names a part of a BIDS dataset; give the dataset with --bids")
    if bids is not None:
        if inputs or from_list is not None:
            raise InputError("--bids takes the scans of a dataset; give no other scans with it")
        from synthseg.batch.bids import check_description, find_bids_scans, plan_bids_jobs

        labels = [label for given in participants for label in given.split(",") if label]
        root = _derivative(bids, output)
        scans = find_bids_scans(bids, labels)
        check_description(root)
        return plan_bids_jobs(scans, root, wanted, overview)

    from synthseg.batch.jobs import plan_jobs
    from synthseg.inputs import find_scans, read_list

    given: list[str | Path] = [*inputs, *(read_list(from_list) if from_list is not None else [])]
    if not given:
        raise InputError("no scan was given; name files, folders or patterns, or use --from-list or --bids")
    found = find_scans(given)
    one_file = len(found) == 1 and found[0].named
    return plan_jobs(found, output, overview, wanted, one_file)


def _derivative(bids: Path, output: Path | None) -> Path:
    from synthseg.batch.bids import DERIVATIVE

    return output if output is not None else bids / DERIVATIVE


def _load(model: str, device: str, threads: int | None) -> tuple[Any, Any]:
    """The network and the device that it is on."""
    from synthseg.memory import START_BYTES, require

    require(START_BYTES, "starting")
    prepare_torch(threads)
    from synthseg.devices import resolve_device
    from synthseg.networks.checkpoint import load_model

    torch_device = resolve_device(device)
    return load_model(model, torch_device), torch_device


def _write_report(
    path: Path | None,
    jobs: Sequence[Job],
    outcomes: Sequence[Outcome],
    facts: dict[str, Any],
    device: str,
    start: float,
) -> None:
    """Write the HTML report, if one is wanted, with what is known of how the run was made."""
    if path is None:
        return
    import platform

    import torch

    from synthseg import __version__
    from synthseg.reports.html_report import write_html_report

    manifest = {
        "command": shlex.join(["synthseg", *sys.argv[1:]]),
        "synthseg": __version__,
        **facts,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "elapsed_s": round(time.perf_counter() - start, 1),
    }
    rank = {id(job): index for index, job in enumerate(jobs)}
    ordered = sorted(outcomes, key=lambda outcome: rank[id(outcome.job)])
    write_html_report(path, [outcome.entry for outcome in ordered if outcome.entry is not None], manifest)


def _finish(outcome: Outcome, number: str, debug: bool) -> int:
    """Say how a scan went, and return its exit code."""
    source, target = outcome.job.name, outcome.job.targets.labels
    if outcome.status == "failed":
        error = outcome.error or RuntimeError("no result")
        names = [source, str(outcome.job.source), *map(str, outcome.job.files())]
        if isinstance(error, SynthSegError) and not any(name in str(error) for name in names):
            error = type(error)(f"{source}: {error}").with_traceback(error.__traceback__)
        return report(error, debug, subject=f"{source}: ")
    if outcome.status == "skipped":
        say(f"{number} {source} -> {target}: skipped, done already (--overwrite does it again)")
        return 0
    for warning in outcome.warnings:
        say(f"warning: {source}: {warning}")
    steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in outcome.timings_s.items())
    say(f"{number} {source} -> {target}: {sum(outcome.timings_s.values()):.1f} s ({steps})")
    return 0
