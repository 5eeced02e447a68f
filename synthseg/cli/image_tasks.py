"""What the commands that make an image of a scan share: which files, which model, one line for each scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from synthseg.cli.base import prepare_torch, report, say, within_memory

if TYPE_CHECKING:
    from synthseg.inputs import Scan
    from synthseg.networks.feature_file import FeatureModel
    from synthseg.volume import Volume

Work = Callable[["Volume", "FeatureModel", Any, Path], None]  # scan, model, device, the file to write


def plan_targets(inputs: Sequence[Path], output: Path, ending: str) -> list[tuple[Scan, Path]]:
    """Each scan and the image to write of it: ``output`` itself for one scan, else a file in that folder.

    Raises InputError if there is no scan, and OutputError on a name that is neither an image nor a folder.
    """
    from synthseg.errors import InputError, OutputError
    from synthseg.inputs import find_scans
    from synthseg.volume import IMAGE_SUFFIXES, image_stem, image_suffix

    if not inputs:
        raise InputError("no scan was given; name files, folders or patterns")
    scans = find_scans([*inputs])
    if image_suffix(output) and not output.is_dir():
        if len(scans) > 1:
            raise OutputError(f"{output}: is a file name, but {len(scans)} scans are to be written; expected a folder")
        return [(scans[0], output)]
    if output.suffix and not output.is_dir():
        raise OutputError(f"{output}: expected an image name ({', '.join(IMAGE_SUFFIXES)}) or a folder")
    return [(scan, output / f"{image_stem(scan.path)}{ending}.nii.gz") for scan in scans]


def run_images(
    jobs: Sequence[tuple[Scan, Path]],
    also: Sequence[Path],
    task: str,
    model: str | None,
    work: Work,
    device: str,
    threads: int | None,
    overwrite: bool,
    debug: bool,
) -> None:
    """Do the work of each scan; ``also`` are further files that it writes. Ends the command with its exit code."""
    from synthseg.errors import CheckpointError, SynthSegError
    from synthseg.representation.files import check_files
    from synthseg.volume import check_readable, load_volume

    if model is None:
        raise CheckpointError(
            f"no model with a head for {task} ships; name one with --model; to make it: synthseg finetune --task {task}"
        )
    check_files([*(target for _, target in jobs), *also], [scan.path for scan, _ in jobs], overwrite)
    for scan, _ in jobs:
        if scan.named or len(jobs) == 1:
            check_readable(scan.path)
    prepare_torch(threads)
    from synthseg.devices import resolve_device
    from synthseg.networks.feature_file import load_features

    torch_device = resolve_device(device)
    loaded = load_features(model, torch_device)
    loaded.head_for(task)
    codes = []
    for number, (scan, target) in enumerate(jobs, 1):
        source = scan.path
        try:
            with within_memory(torch_device):
                volume = load_volume(source)
                work(volume, loaded, torch_device, target)
        except Exception as error:
            if isinstance(error, SynthSegError) and str(source) not in str(error):
                error = type(error)(f"{source}: {error}").with_traceback(error.__traceback__)
            codes.append(report(error, debug, subject=f"{source}: "))
            continue
        codes.append(0)
        for warning in volume.warnings:
            say(f"warning: {source}: {warning}")
        say(f"[{number}/{len(jobs)}] {source} -> {target}")
    failed = [code for code in codes if code]
    raise typer.Exit(0 if not failed else failed[0] if len(jobs) == 1 else 1)
