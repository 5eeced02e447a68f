"""``synthseg synthesize-t1``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from synthseg.cli.base import DebugOption, DeviceOption, ThreadsOption, app
from synthseg.cli.image_tasks import plan_targets, run_images

if TYPE_CHECKING:
    from synthseg.networks.feature_file import FeatureModel
    from synthseg.volume import Volume

T1_MODEL: str | None = None  # the model that ships with a head for reconstruction
ENDING = "_t1synth"


@app.command("synthesize-t1")
def synthesize_t1(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="IN...", readable=False, help="Scans (NIfTI, MGH), folders, or quoted patterns."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="A file for one scan, or a folder.")],
    model: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="A feature network with a head for reconstruction.")
    ] = T1_MODEL,
    spacing: Annotated[
        str | None,
        typer.Option(metavar="MM|MMxMMxMM", help="Voxel size; 'model': that of the network. Default: the scan's own."),
    ] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Make a T1-weighted image from scans of any contrast, on their own grid."""
    from synthseg.batch.jobs import SPACING_LIMITS_MM, parse_sizes

    by_model = spacing == "model"
    sizes = None if spacing is None or by_model else parse_sizes(spacing, "--spacing", SPACING_LIMITS_MM)

    def work(scan: Volume, loaded: FeatureModel, torch_device: Any, target: Path) -> None:
        from synthseg.representation import tasks
        from synthseg.volume import save_scan

        wanted = (loaded.voxel_size_mm,) * 3 if by_model else sizes
        data, grid = tasks.synthesize_t1(scan, loaded, torch_device, wanted)
        save_scan(target, data, scan, None if wanted is None else grid.affine)

    jobs = plan_targets(inputs, output, ENDING)
    run_images(jobs, [], "reconstruction", model, work, device, threads, overwrite, debug)
