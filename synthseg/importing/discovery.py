"""What a folder of other people's label maps holds: its layout, its voxels, and what its ids mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from synthseg.errors import LabelError, TemplateError
from synthseg.importing.label_tables import charm_entries, freesurfer_entries, read_entries, table_from
from synthseg.labels import LabelTable, available_schemes, load_scheme
from synthseg.templates import label_map_files, read_label_map
from synthseg.volume import image_stem, image_suffix


@dataclass(frozen=True)
class Found:
    """Label maps in a folder: ``maps`` is the name of each template and its file, ``lut`` a label table beside them."""

    kind: str
    maps: dict[str, Path]
    lut: Path | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Survey:
    """What the maps hold, over all of them. ``extent_mm``: the largest head, left-right, back-front, down-up."""

    ids: dict[str, list[int]] = field(default_factory=dict)
    spacing_mm: dict[str, float] = field(default_factory=dict)
    extent_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def all_ids(self) -> list[int]:
        return sorted({i for ids in self.ids.values() for i in ids})


# -- what is there -----------------------------------------------------------------------------------------------------
def look(folder: Path, desc: str | None = None) -> Found:
    """Recognise imported templates, FreeSurfer subjects, CHARM output, a BIDS derivative or plain label maps.

    ``desc`` chooses a segmentation of a BIDS derivative: NAME of ``desc-NAME``, or ``none`` for the one without.
    """
    if desc is not None and folder.exists():
        found = _bids(folder, desc.removeprefix("desc-"))
        if found:
            return found
        raise TemplateError(f"{folder}: no BIDS derivative (sub-*/anat/*_dseg.nii.gz); leave out --desc {desc}")
    if folder.is_file():
        return Found("label map", {image_stem(folder): folder}, _table_beside(folder.parent))
    if not folder.is_dir():
        raise TemplateError(f"{folder}: no such folder; give a folder of label maps")
    for recognise in (_imported, _freesurfer, _charm, _bids):
        found = recognise(folder)
        if found:
            return found
    if not any(image_suffix(p) for p in folder.iterdir()):
        raise TemplateError(
            f"{folder}: holds no label maps; expected images (NIfTI, MGH), imported templates (*/labels.nii.gz), "
            "FreeSurfer subjects (*/mri/aseg.mgz), CHARM output (m2m_*/final_tissues.nii.gz) or a BIDS derivative "
            "(sub-*/anat/*_dseg.nii.gz)"
        )
    files = label_map_files(folder)
    maps = {image_stem(p): p for p in files}
    for file in files:
        if maps[image_stem(file)] != file:
            raise TemplateError(f"{folder}: holds more than one map named {image_stem(file)}; rename or remove one")
    return Found("label maps", maps, _table_beside(folder))


def _table_beside(folder: Path) -> Path | None:
    """A colour table or dseg.tsv in the folder of the maps; several are none."""
    tables = sorted(
        {*folder.glob("*LUT*.txt"), *folder.glob("*dseg.tsv"), *folder.glob("labels.txt"), *folder.glob("labels.tsv")}
    )
    return tables[0] if len(tables) == 1 else None


def _imported(folder: Path) -> Found | None:
    folders = (
        [folder] if (folder / "labels.nii.gz").is_file() else [p.parent for p in sorted(folder.glob("*/labels.nii.gz"))]
    )
    maps = {p.name: p / "labels.nii.gz" for p in folders if (p / "labels.json").is_file()}
    return Found("imported templates", maps) if maps else None


def _freesurfer(folder: Path) -> Found | None:
    subjects = [p for p in sorted(folder.iterdir()) if (p / "mri").is_dir() and not p.name.startswith("fsaverage")]
    for name in ("aseg.mgz", "aparc+aseg.mgz"):
        maps = {p.name: p / "mri" / name for p in subjects if (p / "mri" / name).is_file()}
        if maps:
            missing = [p.name for p in subjects if p.name not in maps]
            notes = (f"no mri/{name}, left out: {', '.join(missing)}",) if missing else ()
            return Found(f"FreeSurfer subjects ({name})", maps, notes=notes)
    return None


def _charm(folder: Path) -> Found | None:
    parts = ("final_tissues.nii.gz", "label_prep/tissue_labeling_upsampled.nii.gz")
    places = sorted(
        {*folder.glob("m2m_*"), *folder.glob("*/m2m_*"), *([folder] if folder.name.startswith("m2m_") else [])}
    )
    for part in parts:
        maps = {p.name.removeprefix("m2m_"): p / part for p in places if (p / part).is_file()}
        if maps:
            first = next(iter(maps.values()))
            lut = first.with_name(first.name.removesuffix(".nii.gz") + "_LUT.txt")
            missing = [p.name for p in places if p.name.removeprefix("m2m_") not in maps]
            notes = (f"no {part}, left out: {', '.join(missing)}",) if missing else ()
            return Found(f"CHARM output ({part})", maps, lut if lut.is_file() else None, notes)
    return None


def _bids(folder: Path, desc: str | None = None) -> Found | None:
    files = [
        p for place in ("", "ses-*/") for p in sorted(folder.glob(f"sub-*/{place}anat/*_dseg.nii*")) if image_suffix(p)
    ]
    if not files:
        return None
    kinds: dict[str, dict[str, Path]] = {}
    for file in files:  # what follows subject, session, acquisition and run names the segmentation
        kind = re.sub(r"^sub-[^_]+(_(ses|acq|run)-[^_]+)*_", "", image_stem(file))
        kinds.setdefault(kind, {})[image_stem(file).removesuffix(f"_{kind}")] = file
    kind = _one_kind(folder, sorted(kinds), desc)
    maps = kinds[kind]
    first = next(iter(maps.values()))
    tables = (
        *(first.with_name(image_stem(first) + ".tsv"), folder / f"{kind}.tsv"),
        *(folder / f"desc-{_desc(kind)}_dseg.tsv", folder / "dseg.tsv"),
    )
    missing = sorted({scan for of_kind in kinds.values() for scan in of_kind} - set(maps))
    return Found(
        "BIDS derivative",
        {image_stem(p).removesuffix("_dseg"): p for p in maps.values()},
        next((p for p in tables if p.is_file()), None),
        (f"no {kind}, left out: {', '.join(missing)}",) if missing else (),
    )


def _desc(kind: str) -> str:
    """NAME of ``desc-NAME``, or ``none``."""
    found = re.search(r"(?:^|_)desc-([^_]+)", kind)
    return found[1] if found else "none"


def _one_kind(folder: Path, kinds: Sequence[str], desc: str | None) -> str:
    """The kind of segmentation that ``desc`` chooses. Raises TemplateError, which says how to choose, if not one."""
    chosen = [kind for kind in kinds if desc is None or _desc(kind) == desc]
    if len(chosen) == 1:
        return chosen[0]
    names = sorted({_desc(kind) for kind in chosen or kinds}, key=lambda name: (name == "none", name))
    choose = f"choose with --desc {' or '.join(names)}"
    if not chosen:
        raise TemplateError(f"{folder}: no segmentation for --desc {desc} ({', '.join(kinds)}); {choose}")
    if len(names) == 1:
        choose = "link those of one kind into a folder of their own and give that"
    raise TemplateError(f"{folder}: a BIDS derivative with several segmentations ({', '.join(chosen)}); {choose}")


def survey(found: Found, on_map: Callable[[str], None] = lambda name: None) -> Survey:
    """Read every map once. Raises TemplateError with all problems, each naming its file."""
    seen, problems = Survey(), []
    extent = np.zeros(3)
    for name, file in found.maps.items():
        try:
            volume = read_label_map(file)
        except TemplateError as error:
            problems.append(str(error))
            continue
        seen.ids[name] = np.unique(volume.data).tolist()
        seen.spacing_mm[name] = float(np.prod(volume.spacing_mm) ** (1 / 3))
        filled = volume.data > 0
        for axis in range(3):
            line = np.flatnonzero(filled.any(tuple(a for a in range(3) if a != axis)))
            extent[axis] = max(extent[axis], (line[-1] - line[0] + 1) * volume.spacing_mm[axis])
        on_map(name)
    if problems:
        raise TemplateError(f"{len(problems)} of {len(found.maps)} maps cannot be used: " + "; ".join(problems))
    seen.extent_mm = (float(extent[0]), float(extent[1]), float(extent[2]))
    return seen


# -- what the ids mean -------------------------------------------------------------------------------------------------
def scheme_of(
    found: Found, seen: Survey, scheme: str | None, labels: Path | None, name: str
) -> tuple[str | LabelTable, str]:
    """A scheme (name or JSON file), or a table of the maps' own made here; and why, in words.

    Raises LabelError that shows how to write a table if nothing says what the ids mean.
    """
    ids = seen.all_ids
    if scheme:
        load_scheme(scheme).to_index(np.array(ids), f"the maps ({found.kind})")
        return scheme, "given with --scheme"
    if labels and labels.suffix == ".json":
        load_scheme(labels).to_index(np.array(ids), f"the maps ({found.kind})")
        return str(labels), f"given with --labels {labels.name}"
    table = labels or found.lut
    if table:
        return table_from(read_entries(table), ids, name, table.name), f"made from {table.name}"
    if found.kind.startswith("FreeSurfer"):
        return table_from(freesurfer_entries(), ids, name, "FreeSurfer's names"), "made from FreeSurfer's names"
    if found.kind.startswith("CHARM"):
        return table_from(charm_entries(), ids, name, "CHARM's tissues"), "made from CHARM's tissues"
    fitting = [s for s in available_schemes() if set(ids) <= set(load_scheme(s).index_of)]
    if "head" in fitting and set(fitting) <= {
        "head",
        "head45",
        "freesurfer",
    }:  # its ids are FreeSurfer's and CHARM's; small numbers would mean anything
        return "head", "every id is one of FreeSurfer's or CHARM's"
    raise LabelError(how_to_write(ids, fitting))


def how_to_write(ids: Sequence[int], fitting: Sequence[str]) -> str:
    shown = ", ".join(map(str, ids[:20])) + (", …" if len(ids) > 20 else "")
    fit = f"they fit the schemes {', '.join(fitting)}: name the right one with --scheme; or " if fitting else ""
    return (
        f"the maps hold the ids {shown}, and nothing says what they mean; {fit}write a text file with one line "
        "'id name' each, such as '2 Left-Putamen' (a table of FreeSurfer or ITK-SNAP or a dseg.tsv will do), and "
        "give it with --labels FILE"
    )
