"""``synthseg segment``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from synthseg.cli.base import DEFAULT_MODEL, DebugOption, DeviceOption, ThreadsOption, app, prepare_torch, report, say

if TYPE_CHECKING:
    from synthseg.batch import Job, Outcome


@app.command()
def segment(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="IN...", help="Scans (NIfTI, MGH) or folders of them.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="OUT",
            help="A file for one scan, or a folder. Default: <name>_seg.nii.gz beside each scan.",
        ),
    ] = None,
    volumes: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Write volumes in ml, one row per scan.")
    ] = None,
    overview: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw slices; several scans: <stem>_<scan>.png.")
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME|FILE", help="A model or checkpoint.")] = DEFAULT_MODEL,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Segment scans: each gets a label map on its own grid."""
    from synthseg.batch import check_jobs, plan_jobs, run_jobs

    jobs = plan_jobs(inputs, output, overview)
    check_jobs(jobs, volumes, overwrite)

    prepare_torch(threads)
    from rich.console import Console

    from synthseg.devices import resolve_device
    from synthseg.networks.checkpoint import load_model

    torch_device = resolve_device(device)
    loaded = load_model(model, torch_device)
    number = {job: f"[{index}/{len(jobs)}]" for index, job in enumerate(jobs, 1)}
    codes: list[int] = []
    with Console(stderr=True).status("starting") as status:

        def on_step(job: Job, step: str) -> None:
            status.update(f"{number[job].replace('[', '(').replace(']', ')')} {step}")

        def on_done(outcome: Outcome) -> None:
            codes.append(_finish(outcome, number[outcome.job], debug))

        run_jobs(jobs, loaded, torch_device, volumes, on_step, on_done)
    failed = [code for code in codes if code]
    if failed and len(jobs) > 1:
        say(f"{len(failed)} of {len(jobs)} scans failed")
    raise typer.Exit(0 if not failed else failed[0] if len(jobs) == 1 else 1)


def _finish(outcome: Outcome, number: str, debug: bool) -> int:
    """Say how a scan went, and return its exit code."""
    source = outcome.job.source
    if outcome.segmentation is None:
        return report(outcome.error or RuntimeError("no result"), debug, subject=f"{source}: ")
    for warning in outcome.segmentation.warnings:
        say(f"warning: {source}: {warning}")
    timings_s = outcome.segmentation.timings_s
    steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in timings_s.items())
    say(f"{number} {source} -> {outcome.job.target}: {sum(timings_s.values()):.1f} s ({steps})")
    return 0
