"""Segment many scans: every path is checked first, and a scan that fails leaves the others alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from synthseg.errors import InputError, OutputError
from synthseg.volume import (
    IMAGE_SUFFIXES,
    check_readable,
    check_writable,
    image_stem,
    image_suffix,
    load_volume,
    save_label_map,
)

if TYPE_CHECKING:
    import torch

    from synthseg.inference import Model, Segmentation


@dataclass(frozen=True)
class Job:
    """One scan: where it is read, and where its segmentation and picture go."""

    source: Path
    target: Path
    overview: Path | None = None
    named: bool = True  # by the user; False if it was found in a folder


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its segmentation, or the error that ended it."""

    job: Job
    segmentation: Segmentation | None = None
    error: Exception | None = None


def find_scans(inputs: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the sorted images in them (hidden files and ``*_seg`` left out)."""
    scans: list[Path] = []
    for path in inputs:
        if not path.is_dir():
            scans.append(path)
            continue
        try:
            inside = sorted(p for p in path.iterdir() if _is_scan(p))
        except OSError as error:
            raise InputError(f"{path}: cannot be listed ({error.strerror}); check its permissions") from error
        if not inside:
            raise InputError(f"{path}: no scan in this folder; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
        scans += inside
    return scans


def _is_scan(path: Path) -> bool:
    named = image_suffix(path) is not None and not image_stem(path).endswith("_seg")
    return named and not path.name.startswith(".") and path.is_file()


def plan_jobs(inputs: Sequence[Path], output: Path | None = None, overview: Path | None = None) -> list[Job]:
    """Decide what is written where. Nothing is read or written.

    ``output`` is a file for one input file, or a folder; without it the result lies beside its scan as
    ``<name>_seg.nii.gz``. ``overview`` is the picture of one scan, or a stem for several.
    """
    scans = find_scans(inputs)
    named = {path for path in inputs if not path.is_dir()}
    one_file = len(inputs) == 1 and not inputs[0].is_dir()
    if output is not None and not one_file and (image_suffix(output) or output.is_file()):
        raise OutputError(f"{output}: is a file name, but {len(scans)} scans are to be written; expected a folder")
    if overview is not None and overview.suffix.lower() != ".png":
        raise OutputError(f"{overview}: expected a name that ends in .png")
    jobs = []
    for scan in scans:
        picture = overview
        if overview is not None and len(scans) > 1:
            picture = overview.with_name(f"{overview.stem}_{image_stem(scan)}{overview.suffix}")
        jobs.append(Job(scan, _target(scan, output), picture, scan in named))
    return jobs


def _target(scan: Path, output: Path | None) -> Path:
    name = f"{image_stem(scan)}_seg.nii.gz"
    if output is None:
        return scan.parent / name
    if image_suffix(output) and not output.is_dir():
        return output
    if output.suffix and not output.is_dir():
        raise OutputError(f"{output}: expected an image name ({', '.join(IMAGE_SUFFIXES)}) or a folder")
    return output / name


def check_jobs(jobs: Sequence[Job], table: Path | None = None, overwrite: bool = False) -> None:
    """Check every path before any work: sources readable; outputs distinct, free and writable.

    An unreadable file among several that a folder holds is left to fail on its own.
    """
    for job in jobs:
        if job.named or len(jobs) == 1:
            check_readable(job.source)
    sources = {os.path.realpath(job.source): job.source for job in jobs}
    writers: dict[str, Path] = {}
    outputs = [(path, job.source) for job in jobs for path in (job.target, job.overview) if path is not None]
    if table is not None:
        outputs.append((table, Path("the table of volumes")))
    for path, writer in outputs:
        real = os.path.realpath(path)
        if real in sources:
            raise OutputError(f"{path}: is one of the inputs; choose another name for the output")
        if real in writers:
            raise OutputError(
                f"{path}: would be written twice, for {writers[real]} and for {writer}; "
                "rename one, or segment them into different folders"
            )
        writers[real] = writer
    for path, _ in outputs:
        if os.path.lexists(path) and not path.is_dir() and not overwrite:
            raise OutputError(f"{path}: exists already; use --overwrite to replace it, or choose another name")
        check_writable(path)


def run_jobs(
    jobs: Sequence[Job],
    model: Model,
    device: torch.device | str = "cpu",
    table: Path | None = None,
    on_step: Callable[[Job, str], None] = lambda job, step: None,
    on_done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Segment every scan. A scan that fails is reported in its outcome, and the others go on.

    The table of volumes is written anew after each scan, so that an interrupted batch keeps what is done.
    """
    from synthseg.reports import volume_row, write_volumes_csv

    outcomes: list[Outcome] = []
    rows: list[dict[str, str | float]] = []
    for job in jobs:
        try:
            segmentation = run_job(job, model, device, lambda step, job=job: on_step(job, step))  # type: ignore[misc]
            if table is not None:
                rows.append(volume_row(str(job.source), segmentation, model.labels))
                write_volumes_csv(table, rows)
            outcome = Outcome(job, segmentation)
        except Exception as error:  # whatever it was, the other scans go on; the caller decides what to say
            outcome = Outcome(job, error=error)
        outcomes.append(outcome)
        on_done(outcome)
    return outcomes


def run_job(
    job: Job,
    model: Model,
    device: torch.device | str = "cpu",
    on_step: Callable[[str], None] = lambda step: None,
) -> Segmentation:
    """Read, segment and write one scan; the timings gain the steps ``read`` and ``write``."""
    from synthseg.inference import segment
    from synthseg.reports import write_overview

    on_step("read")
    start = time.perf_counter()
    volume = load_volume(job.source)
    read_s = time.perf_counter() - start
    segmentation = segment(volume, model, device, on_step=on_step)
    on_step("write")
    start = time.perf_counter()
    save_label_map(job.target, segmentation.labels, volume, model.labels.ids)
    if job.overview is not None:
        write_overview(job.overview, volume, segmentation.labels, model.labels, title=job.source.name)
    write_s = time.perf_counter() - start
    segmentation.timings_s = {"read": read_s, **segmentation.timings_s, "write": write_s}
    return segmentation
