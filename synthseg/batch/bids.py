"""BIDS: the anatomical scans of a dataset, and a derivative dataset of their segmentations.

Names, sidecars and ``dataset_description.json`` follow the Brain Imaging Data Structure 1.11, "Derivatives, Imaging
data types" (https://bids-specification.readthedocs.io/en/stable/derivatives/imaging.html).
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synthseg import __version__
from synthseg.batch.jobs import MESH_SUFFIX, Job, Wanted, overview_path
from synthseg.errors import InputError, OutputError
from synthseg.targets import Targets
from synthseg.volume import write_text_atomically

if TYPE_CHECKING:
    from synthseg.inference import Segmentation
    from synthseg.labels import LabelTable

BIDS_VERSION = "1.11.1"
SUFFIXES = ("T1w", "T2w", "FLAIR", "PDw", "ct")  # "ct" is not in the standard yet; many datasets have it
FOLDERS = ("anat", "ct")
DERIVATIVE = Path("derivatives", "synthseg")
IGNORED = (
    *("/volumes.tsv", "*.csv", "*.html", "*.png", "*.surf.gii", "*.stl"),
    *("*.txt", "*.lut", "*.ctbl", "*_ct.nii.gz", "*_ct.json"),
)
README = """# Segmentations by synthseg

Made with `synthseg segment --bids`. For each scan: `*_dseg.nii.gz` holds its labels, `*_dseg.tsv` what they are and how
large, `*_dseg.json` the model, warnings and quality. `space-orig` is the space of the scan itself, `desc` names the
scan among those of its session. Look at every scan whose `Quality` in `*_dseg.json` did not pass.
"""
_ENTITY = re.compile(r"([a-z]+)-([0-9A-Za-z+]+)")
_NOT_MAGNITUDE = {"phase", "real", "imag"}
# Order of the entities in a name, where it matters here: those not listed stand before "space".
_LAST = ("space", "split", "recording", "chunk", "atlas", "seg", "scale", "res", "den", "label", "desc")
# Tissues -> "common image-derived labels" of the standard.
_MAPPING = {
    **{"air": 0, "gm": 8, "wm": 2, "csf": 3, "ventricle": 3, "bone_cortical": 4, "bone_cancellous": 4, "brainstem": 10},
    **dict.fromkeys(("soft", "fat", "muscle", "skin", "mucosa", "eye", "nerve"), 5),
    **dict.fromkeys(("dura", "artery", "vein", "vessel"), 6),
    **dict.fromkeys(("lesion", "tumour", "oedema", "haemorrhage"), 7),
    **dict.fromkeys(("thalamus", "pallidum", "putamen", "caudate", "accumbens", "amygdala", "hippocampus"), 9),
    "cerebellar_gm": 11,
}


@dataclass(frozen=True)
class BidsScan:
    """A scan of a dataset: its file, its path inside the dataset, and the parts of its name."""

    path: Path
    relative: str
    entities: tuple[tuple[str, str], ...]
    suffix: str

    @property
    def folder(self) -> Path:
        """Its folder in a derivative."""
        parts = [f"{key}-{value}" for key, value in self.entities if key in ("sub", "ses")]
        return Path(*parts, "anat")


# --------------------------------------------------------------------------------------------------- reading


def find_bids_scans(dataset: Path, participants: Sequence[str] = ()) -> list[BidsScan]:
    """T1w, T2w, FLAIR, PDw and CT scans of a dataset, by participant and session.

    ``participants`` are labels with or without ``sub-``; all if empty. Phase, real and imaginary parts are left out.
    Raises InputError if the dataset has no such scan, or lacks a participant that was asked for.
    """
    try:
        subjects = {p.name[4:]: p for p in sorted(dataset.iterdir()) if p.name.startswith("sub-") and p.is_dir()}
    except OSError as error:
        raise InputError(f"{dataset}: the dataset cannot be listed ({error.strerror}); check the path") from error
    if not subjects:
        raise InputError(f"{dataset}: has no folder sub-<label>; expected the root of a BIDS dataset")
    wanted = [label.removeprefix("sub-") for label in participants]
    for label in wanted:
        if label not in subjects:
            near = difflib.get_close_matches(label, subjects, n=1) or list(subjects)[:1]
            raise InputError(f"{dataset}: has no participant '{label}'; it has for example '{near[0]}'")
    scans = []
    for label, folder in subjects.items():
        if not wanted or label in wanted:
            try:
                scans += list(_scans_of(dataset, folder))
            except OSError as error:
                place = error.filename or folder
                raise InputError(f"{place}: cannot be listed ({error.strerror}); check its permissions") from error
    if not scans:
        known = ", ".join(SUFFIXES)
        raise InputError(f"{dataset}: holds no scan to segment; expected sub-*/[ses-*/]anat/*_<{known}>.nii.gz")
    return scans


def _scans_of(dataset: Path, subject: Path) -> Iterator[BidsScan]:
    sessions = sorted(p for p in subject.iterdir() if p.name.startswith("ses-") and p.is_dir())
    for place in [subject, *sessions]:
        for folder in FOLDERS:
            if (place / folder).is_dir():
                for path in sorted((place / folder).iterdir()):
                    scan = parse_name(path, dataset)
                    if scan is not None and scan.entities[0] == ("sub", subject.name[4:]):
                        yield scan


def parse_name(path: Path, dataset: Path) -> BidsScan | None:
    """A file as a scan of the dataset, or None if its name is not that of one."""
    name = path.name.removesuffix(".gz")
    if not name.endswith(".nii"):
        return None
    *parts, suffix = name.removesuffix(".nii").split("_")
    matches = [_ENTITY.fullmatch(part) for part in parts]
    entities = tuple((match[1], match[2]) for match in matches if match)
    if suffix not in SUFFIXES or len(entities) != len(parts) or not entities or entities[0][0] != "sub":
        return None
    if dict(entities).get("part") in _NOT_MAGNITUDE:
        return None
    return BidsScan(path, path.relative_to(dataset).as_posix(), entities, suffix)


# -------------------------------------------------------------------------------------------------- planning


def plan_bids_jobs(scans: Sequence[BidsScan], root: Path, wanted: Wanted, overview: Path | None = None) -> list[Job]:
    """One job per scan; the files have the names of a BIDS derivative dataset at ``root``.

    ``space-orig`` says that nothing was registered, ``desc`` names the scan among those of one session (T1w, FLAIR,
    …), ``res`` the voxel size if another one was asked for, ``seg`` the label scheme if one was asked for.
    """
    jobs = []
    for scan in scans:
        images = {"dseg": derivative_path(scan, root, wanted, "dseg", ".nii.gz")}
        for kind in ("probseg", "mask", "resampled", "stripped"):
            if getattr(wanted, {"probseg": "posteriors"}.get(kind, kind)):
                images[kind] = derivative_path(scan, root, wanted, kind, ".nii.gz")
        suffix = MESH_SUFFIX[wanted.mesh_format]
        targets = Targets(
            labels=images["dseg"],
            posteriors=images.get("probseg"),
            resampled=images.get("resampled"),
            mask=images.get("mask"),
            stripped=images.get("stripped"),
            meshes=tuple((x, derivative_path(scan, root, wanted, "mesh", suffix, structure=x)) for x in wanted.meshes),
        )
        stem = "_".join([*(f"{key}-{value}" for key, value in scan.entities), scan.suffix])
        sidecars = BidsSidecars(scan, images, wanted)
        jobs.append(Job(scan.path, targets, scan.relative, overview_path(overview, stem, len(scans)), sidecars, False))
    return jobs


def derivative_path(
    scan: BidsScan, root: Path, wanted: Wanted, kind: str, extension: str, structure: str | None = None
) -> Path:
    """Where an output of one kind goes: dseg, probseg, mask, resampled, stripped or mesh."""
    added = {"space": "orig"}
    if wanted.scheme is not None and kind in ("dseg", "probseg"):
        added["seg"] = _label(Path(wanted.scheme).stem)
    if wanted.spacing_mm is not None and kind != "mesh":
        added["res"] = resolution_label(wanted.spacing_mm)
    if kind == "mask":
        added["label"] = "brain"
    if structure is not None:
        added["label"] = _label(structure)
    is_scan = kind in ("resampled", "stripped")
    added["desc"] = kind if is_scan else scan.suffix
    suffix = scan.suffix if is_scan else kind
    entities = {**dict(scan.entities), **added}
    last = sorted((key for key in entities if key in _LAST), key=_LAST.index)
    order = [*(key for key in entities if key not in _LAST), *last]
    return root / scan.folder / ("_".join([*(f"{key}-{entities[key]}" for key in order), suffix]) + extension)


def resolution_label(spacing_mm: float | Sequence[float]) -> str:
    """A voxel size as the label of ``res``: 1mm, 0p5mm, 1x1x2mm."""
    sizes = [spacing_mm] if isinstance(spacing_mm, (int, float)) else list(spacing_mm)
    sizes = sizes[:1] if len(set(sizes)) == 1 else sizes
    return "x".join(f"{size:g}" for size in sizes).replace(".", "p").replace("-", "m") + "mm"


def _label(text: str) -> str:
    return re.sub(r"[^0-9A-Za-z]+", "", text) or "structure"


# --------------------------------------------------------------------------------------------------- writing


def write_description(root: Path, dataset: Path) -> None:
    """Write ``dataset_description.json``, ``.bidsignore`` and ``README.md`` of the derivative dataset.

    An existing description is kept if it is that of a derivative of this program. Raises OutputError if it is of
    something else, since the files of two pipelines would be mixed.
    """
    path = root / "dataset_description.json"
    description = {
        "Name": "Segmentations by synthseg",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [
            {"Name": "synthseg", "Version": __version__, "Description": "Segmentation of head scans of any contrast"}
        ],
        "DatasetLinks": {"raw": _link(dataset, root)},
    }
    if path.exists():
        check_description(root)
    else:
        write_text_atomically(path, json.dumps(description, indent=2) + "\n")
    for name, text in ((".bidsignore", "\n".join(IGNORED) + "\n"), ("README.md", README)):
        if not (root / name).exists():
            write_text_atomically(root / name, text)


def check_description(root: Path) -> None:
    """Raise OutputError if the folder is the dataset of something else than this program."""
    path = root / "dataset_description.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        makers = [str(maker.get("Name")) for maker in found.get("GeneratedBy", [])]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise OutputError(f"{path}: cannot be read ({error}); repair it, or choose another folder with -o") from error
    if found and (found.get("DatasetType") != "derivative" or "synthseg" not in makers):
        what = f"by {', '.join(makers)}" if makers else "of raw data"
        raise OutputError(f"{path}: describes a dataset {what}; choose a folder of its own with -o")


def _link(dataset: Path, root: Path) -> str:
    """Where the raw dataset lies, seen from the derivative; a file URI if they are on different drives."""
    try:
        return Path(os.path.relpath(os.path.realpath(dataset), os.path.realpath(root))).as_posix()
    except ValueError:
        return dataset.resolve().as_uri()


@dataclass(frozen=True)
class BidsSidecars:
    """JSON beside each image of one scan, and the ``dseg.tsv`` that says what the labels are and how large.

    Attributes
    ----------
    images : the images of the scan by kind: dseg, probseg, mask, resampled, stripped.
    """

    scan: BidsScan
    images: Mapping[str, Path]
    wanted: Wanted

    def files(self) -> list[Path]:
        return [*(_beside(path, ".json") for path in self.images.values()), _beside(self.images["dseg"], ".tsv")]

    def write(self, segmentation: Segmentation, facts: Mapping[str, Any], leave: Collection[Path]) -> None:
        texts = {_beside(path, ".json"): self._json(kind, segmentation, facts) for kind, path in self.images.items()}
        texts[_beside(self.images["dseg"], ".tsv")] = lookup_table(segmentation)
        for path, text in texts.items():
            if path not in leave:
                write_text_atomically(path, text)

    def _json(self, kind: str, segmentation: Segmentation, facts: Mapping[str, Any]) -> str:
        source = f"bids:raw:{self.scan.relative}"
        record: dict[str, Any] = {
            "Description": _DESCRIPTIONS[kind],
            "Sources": [source],
            "SpatialReference": source,
        }
        if self.wanted.spacing_mm is not None:
            size = " x ".join(f"{size:g}" for size in np.atleast_1d(self.wanted.spacing_mm))
            record["Resolution"] = f"resampled along the axes of the scan to {size} mm"
        if kind == "dseg":
            record["Manual"] = False
            record |= _COLUMNS
            if self.wanted.spacing_mm is not None:  # volumes do not follow it
                for name in ("volume_ml", "soft_volume_ml"):
                    text = f"{_COLUMNS[name]['Description']}, on the grid of the scan"
                    record[name] = {**_COLUMNS[name], "Description": text}
            record["Segmentation"] = dict(facts)
            record["Warnings"] = list(segmentation.warnings)
            record["Quality"] = _quality(segmentation)
        elif kind == "probseg":
            record["Manual"] = False
            record["LabelMap"] = list(segmentation.table.names)
        elif kind == "mask":
            record["Type"] = "Brain"
        else:
            record["SkullStripped"] = kind == "stripped"
        return json.dumps(_finite(record), indent=2, ensure_ascii=False) + "\n"


_DESCRIPTIONS = {
    "dseg": "Discrete segmentation of the head; dseg.tsv says what the labels are",
    "probseg": "Probability of each label, one volume per label in the order of LabelMap",
    "mask": "Brain with ventricles",
    "resampled": "The scan, resampled",
    "stripped": "The scan without what lies outside the brain",
}
_COLUMNS = {
    "volume_ml": {"Description": "volume of the voxels of the label", "Units": "mL"},
    "soft_volume_ml": {"Description": "sum of the probabilities of the label, as a volume", "Units": "mL"},
    "predicted_dice": {"Description": "Dice coefficient that is to be expected, estimated without a reference"},
}


def lookup_table(segmentation: Segmentation) -> str:
    """The text of ``dseg.tsv``: labels with names, colours and standard labels, volumes in ml and predicted Dice."""
    table: LabelTable = segmentation.table
    predicted = segmentation.quality.structures if segmentation.quality is not None else {}
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(["index", "name", "color", "mapping", *_COLUMNS])
    for label in table.labels:
        numbers = (
            segmentation.hard_ml.get(label.name),
            segmentation.soft_ml.get(label.name),
            predicted.get(label.name),
        )
        color = "#{:02x}{:02x}{:02x}".format(*label.color)
        writer.writerow([label.id, label.name, color, _MAPPING.get(label.tissue, "n/a"), *map(_number, numbers)])
    return text.getvalue()


def _number(value: float | None) -> str:
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _quality(segmentation: Segmentation) -> dict[str, Any] | None:
    quality = segmentation.quality
    if quality is None:
        return None
    return {"PredictedDice": quality.scan, "Passed": quality.passed, "Flags": list(quality.flags)}


def _finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _beside(image: Path, extension: str) -> Path:
    return image.with_name(image.name.removesuffix(".nii.gz") + extension)
