"""What an earlier run left of a scan's outputs: nothing, all of it, a part, or files that are not its results."""

from __future__ import annotations

import gzip
import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from synthseg.batch.jobs import Job, Wanted
from synthseg.errors import OutputError, SynthSegError
from synthseg.labels import LabelTable
from synthseg.outputs import WITHOUT_SURFACE, facts_of
from synthseg.surfaces import structure_ids
from synthseg.volume import image_suffix, load_volume

if TYPE_CHECKING:
    from synthseg.inference import Segmentation

CHUNK = 1 << 20
REPORT_MARK = b"<title>Segmentation report"
# What makes another result of the same scan, and what messages call it.
MAKING = {
    "sha256": "weights",
    "mode": "mode",
    "voxel_size_mm": "--voxel-size",
    "crop_mm": "--crop",
    "scheme": "scheme",
}
ROUNDED_ML = 0.00051  # what three decimals leave out
MAX_DIFFERENT = 0.005  # of the labelled voxels: what another processor's rounding may change


@dataclass(frozen=True)
class Existing:
    """The files of a job that are there. Each of them is whole and fits the scan."""

    kept: tuple[Path, ...]
    missing: tuple[Path, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing is left to do."""
        return not self.missing


def existing(job: Job, wanted: Wanted, table: LabelTable, facts: Mapping[str, Any] | None = None) -> Existing:
    """Look at the files of a job. Raises OutputError on one that is damaged or does not belong to the scan.

    Also if the header of the label map says that it was made otherwise than ``facts`` say of this run.

    ``table`` says what the ids of the label map are: a surface is not missing if its structure is not in the map, or
    if the header of the map says that there was none to make.

    An image is whole if its file holds as many voxels as its header says (of a compressed file every byte is read,
    and its checksum compared); other files if they end as their format does. The label map must lie on the grid of
    the scan, or on that of ``wanted.spacing_mm``.
    """
    files = job.files()
    there = [path for path in files if os.path.lexists(path)]
    for path in there:
        problem = "" if job.targets.labels in there else "there is no label map with it"
        problem = problem or damage(path)
        if not problem and path == job.targets.labels:
            problem = _misfit(path, job.source, wanted)
            if not problem:
                check_made_alike(path, facts or {})
        if problem:
            raise OutputError(
                f"{path}: exists already, and is not a whole result of {job.source} ({problem}); "
                "use --overwrite to replace it, or choose another name"
            )
    missing = [path for path in files if path not in there]
    if missing and job.targets.labels in there:
        present = set(np.unique(np.asarray(nib.load(job.targets.labels).dataobj)).tolist())
        noted = facts_of(job.targets.labels).get(WITHOUT_SURFACE, [])
        none = [
            path
            for name, path in job.targets.meshes
            if name.lower() in noted or present.isdisjoint(structure_ids(name, table))
        ]
        missing = [path for path in missing if path not in none]
    return Existing(tuple(there), tuple(missing))


def check_made_alike(labels: Path, facts: Mapping[str, Any]) -> None:
    """Raise OutputError if a label map says that it was made with another model or with other options."""
    then = facts_of(labels)
    other = [
        f"{name} {_plain(then[key], key)}, now {_plain(facts[key], key)}"
        for key, name in MAKING.items()
        if key in then and key in facts and then[key] != _as_json(facts[key])
    ]
    if other:
        raise OutputError(
            f"{labels}: exists already, and was made otherwise ({'; '.join(other)}); "
            "use --overwrite to replace it, or another folder for each way to segment"
        )


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _plain(value: Any, key: str) -> str:
    return str(value)[:8] if key == "sha256" else "none" if value is None else str(value)[:40]


def check_existing(jobs: Sequence[Job], report: Path | None = None) -> None:
    """Raise OutputError if something else than a label map or a report is where one is to be written.

    A quick look before any work; `existing` looks closer when it is a scan's turn.
    """
    for job in jobs:
        labels = job.targets.labels
        if os.path.lexists(labels):
            try:
                nib.load(labels)
            except Exception as error:  # nibabel raises many kinds
                raise OutputError(
                    f"{labels}: exists already, and is not a label map; use --overwrite to replace it, "
                    "or choose another name"
                ) from error
    if report is not None and report.is_file():
        with open(report, "rb") as file:
            if REPORT_MARK not in file.read(CHUNK):
                raise OutputError(
                    f"{report}: exists already, and is not a report of segmentations; use --overwrite to replace it, "
                    "or choose another name"
                )


def check_same(new: Path, old: Path) -> None:
    """Raise OutputError unless two label maps agree, so that no outputs of different runs are mixed."""
    first, second = (np.asarray(nib.load(path).dataobj) for path in (new, old))
    if first.shape == second.shape:
        either = (first > 0) | (second > 0)
        different = int((first != second).sum())
        if different <= MAX_DIFFERENT * max(1, int(either.sum())):
            return
    raise OutputError(
        f"{old}: exists already, and differs from what this run makes (other options or another model, or it was "
        "edited), so that the missing outputs would not belong to it; use --overwrite, or another folder"
    )


def is_row_of(row: Mapping[str, str | float], labels: np.ndarray, table: LabelTable, voxel_ml: float) -> bool:
    """Whether a row of a table of volumes is that of a label map, by the volumes counted in it."""
    from synthseg.reports.volumes import counted_ml

    try:
        return all(
            abs(float(row[name]) - volume_ml) <= ROUNDED_ML
            for name, volume_ml in counted_ml(labels, table, voxel_ml).items()
        )
    except (KeyError, ValueError):  # a column that is not there, or not a number
        return False


def with_labels(segmentation: Segmentation, path: Path, voxel_ml: float) -> Segmentation:
    """The segmentation with the label map of a file, of which `check_same` has found that it may stay."""
    from synthseg.reports.volumes import counted_ml

    labels, table = np.asarray(nib.load(path).dataobj), segmentation.table
    counted = counted_ml(labels, table, voxel_ml)
    hard_ml = {name: counted.get(f"{name}_ml", ml) for name, ml in segmentation.hard_ml.items()}
    return replace(segmentation, labels=labels, hard_ml=hard_ml)


def without(job: Job, kept: Sequence[Path], scratch: Path) -> Job:
    """The job without the files that are there already; a label map that is there is written to ``scratch`` instead."""
    targets = job.targets

    def wanted(path: Path | None) -> Path | None:
        return None if path is None or path in kept else path

    return replace(
        job,
        targets=replace(
            targets,
            labels=scratch if targets.labels in kept else targets.labels,
            posteriors=wanted(targets.posteriors),
            resampled=wanted(targets.resampled),
            mask=wanted(targets.mask),
            stripped=wanted(targets.stripped),
            meshes=tuple((name, path) for name, path in targets.meshes if path not in kept),
        ),
        overview=wanted(job.overview),
    )


def damage(path: Path) -> str:
    """What is wrong with a file that a run wrote, in a few words; empty if it is whole."""
    try:
        if not path.is_file():
            return "not a regular file"
        size = path.stat().st_size
        if size == 0:
            return "empty"
        if image_suffix(path) is not None:
            return _image_damage(path)
        return _other_damage(path, size)
    except OSError as error:
        return error.strerror or str(error)


def _image_damage(path: Path) -> str:
    try:
        image = nib.load(path)
    except Exception as error:  # nibabel raises many kinds on damaged files
        return f"not an image: {' '.join(str(error).split())[:100]}"
    proxy = image.dataobj
    expected = int(proxy.offset) + int(np.prod(image.shape)) * proxy.dtype.itemsize
    try:
        if path.name.lower().endswith((".gz", ".mgz")):
            with gzip.open(path) as stream:
                length = _length(stream)
        else:
            length = path.stat().st_size
    except (OSError, EOFError, zlib.error):
        return "its compressed data are damaged"
    return "" if length >= expected else f"{length} of {expected} bytes"


def _length(stream: gzip.GzipFile) -> int:
    length = 0
    while chunk := stream.read(CHUNK):
        length += len(chunk)
    return length


def _other_damage(path: Path, size: int) -> str:
    suffix = path.suffix.lower()
    with open(path, "rb") as file:
        if suffix == ".stl":
            head = file.read(84)
            faces = struct.unpack("<I", head[80:84])[0] if len(head) == 84 else -1
            return "" if size == 84 + 50 * faces else "cut short"
        if suffix == ".json":
            try:
                json.load(file)
            except ValueError:
                return "not JSON"
            return ""
        file.seek(max(0, size - 64))
        end = file.read().rstrip()
    endings = {".png": b"IEND\xaeB`\x82", ".gii": b"</GIFTI>"}
    return "" if end.endswith(endings.get(suffix, b"")) else "cut short"


def _misfit(labels: Path, source: Path, wanted: Wanted) -> str:
    """Why a label map cannot be that of the scan; empty if it can, or if the scan cannot be read."""
    image = nib.load(labels)
    if image.get_data_dtype().kind not in "iu":
        return "its voxels are not whole numbers"
    if wanted.spacing_mm is not None:
        from synthseg.posteriors import spacing_grid

        try:
            grid = spacing_grid(load_volume(source), wanted.spacing_mm)
        except SynthSegError:
            return ""
        shape, affine = grid.shape, grid.affine
    else:
        try:
            scan = nib.load(source)
        except Exception:  # the scan is at fault: reading it will say so
            return ""
        shape, affine = scan.shape[:3], scan.affine
    if tuple(image.shape) != tuple(shape):
        return f"it has {' x '.join(map(str, image.shape))} voxels, not {' x '.join(map(str, shape))}"
    if not np.allclose(image.affine, affine, rtol=1e-3, atol=1e-3):
        return "it lies elsewhere in space"
    return ""
