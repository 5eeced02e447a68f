"""``synthseg correct-bias``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthseg.cli.base import DebugOption, DeviceOption, ThreadsOption, app
from synthseg.cli.image_tasks import plan_targets, run_images

if TYPE_CHECKING:
    from synthseg.networks.feature_file import FeatureModel
    from synthseg.volume import Volume

BIAS_MODEL = "bias-field"
ENDING = "_unbiased"


@app.command("correct-bias")
def correct_bias(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="IN...", readable=False, help="MR scans (NIfTI, MGH), folders, or quoted patterns."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="A file for one scan, or a folder.")],
    field: Annotated[
        Path | None, typer.Option(metavar="NIFTI", help="Write the field of the one scan as well: OUT times it is IN.")
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="A feature network with a head for the bias field.")
    ] = BIAS_MODEL,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Divide MR scans by their bias field; grid and intensities stay the scan's own."""
    from synthseg.errors import OutputError
    from synthseg.volume import IMAGE_SUFFIXES, image_suffix

    jobs = plan_targets(inputs, output, ENDING)
    if field is not None and len(jobs) > 1:
        raise OutputError(f"{field}: is one file, but there are {len(jobs)} scans; leave out --field")
    if field is not None and image_suffix(field) is None:
        raise OutputError(f"{field}: not an image name; end it in {', '.join(IMAGE_SUFFIXES)}")
    if field is not None and field.resolve() == jobs[0][1].resolve():
        raise OutputError(f"{field}: is also the file of the corrected scan; choose another name for one of them")

    def work(scan: Volume, loaded: FeatureModel, torch_device: Any, target: Path) -> None:
        from synthseg.representation import tasks
        from synthseg.volume import save_scan

        found = tasks.correct_bias(scan, loaded, torch_device)
        save_scan(target, found.data, scan)
        if field is not None:
            save_scan(field, found.field, scan)

    also = [] if field is None else [field]
    run_images(jobs, also, "bias-field", model, work, device, threads, overwrite, debug)
