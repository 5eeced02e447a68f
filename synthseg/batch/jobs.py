"""What is read and what is written: one job per scan. Every path is checked before the first scan is read."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from synthseg.errors import InputError, OutputError
from synthseg.inputs import SEGMENTATION, Scan
from synthseg.targets import Targets
from synthseg.volume import IMAGE_SUFFIXES, check_readable, check_writable, image_stem, image_suffix

if TYPE_CHECKING:
    from synthseg.inference import Segmentation
MESH_SUFFIX = {"gii": ".surf.gii", "stl": ".stl"}
SPACING_LIMITS_MM = (0.1, 20.0)


@dataclass(frozen=True)
class Wanted:
    """What is to be written for each scan beside its label map. Sizes are in mm, along the axes of the scan's file."""

    posteriors: bool = False
    resampled: bool = False
    mask: bool = False
    stripped: bool = False
    meshes: tuple[str, ...] = ()
    mesh_format: Literal["gii", "stl"] = "gii"
    color_tables: bool = False
    spacing_mm: float | tuple[float, float, float] | None = None
    scheme: str | None = None


class Sidecars(Protocol):
    """Texts that a layout of folders wants beside the images."""

    def files(self) -> Sequence[Path]:
        """Where they are written."""

    def write(self, segmentation: Segmentation, facts: Mapping[str, Any], leave: Collection[Path]) -> None:
        """Write those that are not in ``leave``. ``facts`` say how the segmentation was made."""


@dataclass(frozen=True)
class Job:
    """One scan: where it is read, and which files are made of it.

    Attributes
    ----------
    name : what the scan is called in tables, reports and messages; the path as the user gave it.
    targets : the files of the outputs.
    overview : the picture, if one is wanted.
    sidecars : further files, if the layout has any.
    named : by the user; False if it was found in a folder, so that it may fail on its own.
    """

    source: Path
    targets: Targets
    name: str = ""
    overview: Path | None = None
    sidecars: Sidecars | None = None
    named: bool = True

    def files(self) -> list[Path]:
        """Every file that is written for this scan alone."""
        texts = self.sidecars.files() if self.sidecars is not None else ()
        return [*self.targets.paths(), *texts, *([self.overview] if self.overview is not None else [])]


def plan_jobs(
    scans: Sequence[Scan],
    output: Path | None = None,
    overview: Path | None = None,
    wanted: Wanted | None = None,
    one_file: bool = False,
) -> list[Job]:
    """Decide what is written where. Nothing is read or written.

    ``output`` is a file name if ``one_file``, or a folder; without it the results lie beside each scan. The label map
    of ``<name>.nii.gz`` is ``<name>_seg.nii.gz``, and the other outputs end in ``_posteriors``, ``_mask`` and so on.
    ``overview`` is the picture of one scan, or a stem for several.
    """
    if output is not None and not one_file and (image_suffix(output) or output.is_file()):
        raise OutputError(f"{output}: is a file name, but {len(scans)} scans are to be written; expected a folder")
    jobs = []
    for scan, own in zip(scans, _distinct_stems([scan.path for scan in scans]), strict=True):
        labels = _labels_path(scan.path, output, one_file)
        stem = image_stem(labels)
        stem = stem[: -len(SEGMENTATION)] if stem.endswith(SEGMENTATION) and len(stem) > len(SEGMENTATION) else stem
        targets = targets_beside(labels, stem, wanted or Wanted())
        picture = overview_path(overview, own, len(scans))
        jobs.append(Job(scan.path, targets, str(scan.path), picture, named=scan.named))
    return jobs


def targets_beside(labels: Path, stem: str, wanted: Wanted) -> Targets:
    """The files of one scan in the folder of its label map, named by a stem and what they hold."""

    def image(ending: str, asked: bool) -> Path | None:
        return labels.with_name(f"{stem}_{ending}.nii.gz") if asked else None

    suffix = MESH_SUFFIX[wanted.mesh_format]
    return Targets(
        labels=labels,
        posteriors=image("posteriors", wanted.posteriors),
        resampled=image("resampled", wanted.resampled),
        mask=image("mask", wanted.mask),
        stripped=image("stripped", wanted.stripped),
        meshes=tuple((name, labels.with_name(f"{stem}_{file_word(name)}{suffix}")) for name in wanted.meshes),
    )


def overview_path(overview: Path | None, stem: str, n_scans: int) -> Path | None:
    """The picture of one scan: the name itself, or with the scan's stem added if there are several."""
    if overview is None:
        return None
    if overview.suffix.lower() != ".png":
        raise OutputError(f"{overview}: expected a name that ends in .png")
    return overview if n_scans == 1 else overview.with_name(f"{overview.stem}_{stem}{overview.suffix}")


def _distinct_stems(paths: Sequence[Path]) -> list[str]:
    """The stem of each file; where one repeats, after the names of as many parent folders as tell them apart."""
    parents = [list(Path(os.path.abspath(path)).parent.parts[1:]) for path in paths]
    stems = [image_stem(path) for path in paths]
    while True:
        count = Counter(stems)
        repeated = [i for i, stem in enumerate(stems) if count[stem] > 1 and parents[i]]
        if not repeated:
            return stems
        for i in repeated:
            stems[i] = f"{parents[i].pop()}_{stems[i]}"


def file_word(name: str) -> str:
    """A structure's name as a part of a file name."""
    return re.sub(r"[^0-9A-Za-z+.-]+", "-", name).strip("-.") or "structure"


def parse_sizes(text: str, option: str, limits_mm: tuple[float, float]) -> tuple[float, float, float]:
    """Three sizes in mm from ``1``, ``0.5x0.5x2`` or ``0.5,0.5,2``. Raises InputError that names the option."""
    low, high = limits_mm
    try:
        sizes = [float(part) for part in re.split("[xX×,]", text)]
    except ValueError:
        sizes = []
    if len(sizes) == 1:
        sizes *= 3
    if len(sizes) != 3 or not all(low <= size <= high for size in sizes):
        raise InputError(
            f"{option} {text}: expected one size in mm or three as in 1x1x2, each from {low:g} to {high:g}"
        )
    return sizes[0], sizes[1], sizes[2]


def _labels_path(scan: Path, output: Path | None, one_file: bool) -> Path:
    name = f"{image_stem(scan)}{SEGMENTATION}.nii.gz"
    if output is None:
        return scan.parent / name
    if one_file and not output.is_dir():
        if image_suffix(output):
            return output
        if output.suffix:
            known = ", ".join(IMAGE_SUFFIXES)
            raise OutputError(
                f"{output}: expected an image name ({known}) or a folder; make the folder first if it is one"
            )
    return output / name


def check_jobs(jobs: Sequence[Job], shared: Sequence[Path] = ()) -> None:
    """Check every path before any work: sources readable, outputs distinct and writable, none of them a source.

    ``shared`` are files that are written for all scans together, such as the table of volumes. An unreadable file
    among several that a folder holds is left to fail on its own.
    """
    for job in jobs:
        if job.named or len(jobs) == 1:
            check_readable(job.source)
    sources = {os.path.realpath(job.source) for job in jobs}
    writers: dict[str, str] = {}
    outputs = [(path, job.name) for job in jobs for path in job.files()]
    outputs += [(path, "all scans together") for path in shared]
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
        check_writable(path)
