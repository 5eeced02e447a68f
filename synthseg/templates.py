"""Templates: folders of validated whole-head label maps.

A template is ``<name>/labels.nii.gz`` (integers, RAS+), ``labels.json`` (scheme, origin, derived labels) and
``SOURCE.md``. ``import_templates`` brings public label maps into this form.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from synthseg.errors import InputError, LabelError, TemplateError
from synthseg.labels import LabelTable, load_scheme
from synthseg.paths import data_dir
from synthseg.volume import IMAGE_SUFFIXES, Volume, canonical, image_stem, image_suffix, load_volume, save_label_map

DURA_ID, CSF_ID, BONE_IDS = 540, 24, (515, 516)
DURA_THICKNESS_MM = 1.2
SPECK = 0.002  # of the largest piece of a map; the largest speck of the public maps has 0.001
SPECKS = 0.1  # of the voxels of a label; of those of the public maps at most 0.01
# BrainWeb's grey and white matter -> their derived deep labels, and where deep is: left-right from the middle in brain
# widths; front-back from the back, and down from the top, in brain lengths. Measured on maps that draw the nuclei.
DEEP_OF = {2: 12, 3: 13}
DEEP_BOX = (0.34, (0.31, 0.79), (0.21, 0.61))
DEEP_STEM = (0.17, (0.30, 0.63), (0.36, 9.0))


@dataclass(frozen=True)
class Template:
    """A label map ready to be rendered.

    Attributes
    ----------
    labels : uint8 indices into ``table``, shape (D, H, W), RAS+, with a border of one background voxel.
    spacing_mm : voxel size.
    center : voxel coordinates (with the border) of the middle of the brain's bounding box.
    cache : what the generator derives from the labels, such as distances, kept so that it is computed once.
    folder : where it was loaded from.
    """

    name: str
    labels: torch.Tensor
    table: LabelTable
    spacing_mm: tuple[float, float, float]
    center: tuple[float, float, float]
    derived: dict[str, str]
    cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    folder: Path | None = field(default=None, compare=False)


def read_label_map(path: Path) -> Volume:
    """Integer label map in RAS+ order, data int32 (D, H, W). float32 storage of integers is fine.

    Raises TemplateError if the values are not integers, are negative, or all background.
    """
    try:
        volume = canonical(load_volume(path))
    except InputError as error:
        raise TemplateError(str(error)) from None
    data = volume.data
    if not np.isfinite(data).all():
        raise TemplateError(f"{path}: holds NaN or infinite values; a label map holds integers")
    rounded = np.rint(data)
    off = float(np.abs(data - rounded).max())
    if off > 1e-3:
        raise TemplateError(
            f"{path}: holds non-integer values (off by up to {off:.3g}); it may be an image, or have been "
            "resampled with interpolation: use nearest-neighbour"
        )
    if data.min() < 0:
        raise TemplateError(f"{path}: holds negative ids (down to {data.min():g}); ids begin at 0 (background)")
    return Volume(np.ascontiguousarray(rounded.astype(np.int32)), volume.affine, warnings=volume.warnings)


def label_map_files(folder: Path) -> list[Path]:
    """The label maps of a folder: the images in it, or ``*/labels.nii.gz`` of imported templates."""
    if not folder.is_dir():
        raise TemplateError(f"{folder}: no such folder; give a folder of NIfTI label maps")
    images = sorted(p for p in folder.iterdir() if image_suffix(p) and p.is_file() and not p.name.startswith("."))
    files = images or sorted(folder.glob("*/labels.nii.gz"))
    if not files:
        raise TemplateError(f"{folder}: holds no label maps ({', '.join(IMAGE_SUFFIXES)} or */labels.nii.gz)")
    return files


def _folder_scheme(file: Path) -> str | None:
    side = file.parent / "labels.json"
    if file.name == "labels.nii.gz" and side.is_file():
        scheme = read_record(file.parent)["scheme"]
        return str(file.parent / scheme) if scheme.endswith(".json") else scheme
    return None


def read_record(folder: Path) -> dict[str, Any]:
    """The ``labels.json`` of a template. Raises TemplateError if it does not name a scheme."""
    file = folder / "labels.json"
    try:
        record = json.loads(file.read_text())
        if not isinstance(record["scheme"], str):
            raise ValueError("'scheme' is not a name")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TemplateError(f"{file}: cannot be read ({error}); import the template anew") from None
    return dict(record)


def check_folder(folder: Path, scheme: str | None = None) -> tuple[list[str], list[str]]:
    """What is wrong with a folder of label maps: (problems, notes), each one line that names the file.

    Maps of one folder must share their voxel size, and an ``image.nii.gz`` beside a map its grid; imported templates
    (each in a folder of its own) may differ.
    """
    problems: list[str] = []
    notes: list[str] = []
    geometry: dict[Path, Volume] = {}
    for file in label_map_files(folder):
        try:
            volume = read_label_map(file)
        except TemplateError as error:
            problems.append(str(error))
            continue
        try:
            name = scheme or _folder_scheme(file)
        except TemplateError as error:
            problems.append(str(error))
            continue
        if name is None:
            problems.append(f"{file}: its scheme is not known; name it with --scheme head|brainweb|siam16|FILE.json")
            continue
        try:
            load_scheme(name).to_index(volume.data, str(file))
        except LabelError as error:
            problems.append(str(error))
        notes += [f"{file}: {warning}" for warning in volume.warnings]
        if file.name != "labels.nii.gz":
            geometry[file] = volume
        problems += _image_mismatch(file, volume)
        specks = np.count_nonzero(volume.data != remove_specks(volume.data))
        if specks:
            notes.append(f"{file}: {specks} voxels are specks apart from the rest; 'templates import' removes them")
    return problems + _odd_ones_out(geometry), notes


def _image_mismatch(file: Path, labels: Volume) -> list[str]:
    image = file.with_name("image.nii.gz")
    if not image.is_file():
        return []
    try:
        other = canonical(load_volume(image))
    except InputError as error:
        return [str(error)]
    if other.data.shape == labels.data.shape and np.allclose(other.affine, labels.affine, atol=1e-3):
        return []
    return [f"{image}: shape or affine differs from {file.name}; both must be on one grid"]


def _odd_ones_out(volumes: dict[Path, Volume]) -> list[str]:
    """Maps whose voxel size or shape is not that of most maps of the folder."""
    kinds = {file: (tuple(np.round(v.spacing_mm, 3).tolist()), v.data.shape) for file, v in volumes.items()}
    if not kinds:
        return []
    (spacing, shape), _ = Counter(kinds.values()).most_common(1)[0]
    return [
        f"{file}: {kind[1]} voxels of {kind[0]} mm, but most maps of the folder are {shape} of {spacing} mm; "
        "keep maps of different grids in different folders"
        for file, kind in kinds.items()
        if kind != (spacing, shape)
    ]


def remove_specks(data: np.ndarray) -> np.ndarray:
    """Remove the connected pieces that are smaller than ``SPECK`` of the largest.

    Where more than ``SPECKS`` of a label would go, the pieces that hold it are structures, and stay.
    """
    pieces, count = ndimage.label(data > 0)
    if count < 2:
        return data
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    speck = (sizes > 0) & (sizes < SPECK * sizes.max())
    inside = speck[pieces]
    labels, lost = np.unique(data[inside], return_counts=True)
    kept = [label for label, n in zip(labels, lost, strict=True) if n > SPECKS * np.count_nonzero(data == label)]
    speck[pieces[inside & np.isin(data, kept)]] = False
    return np.where(speck[pieces], 0, data)


def add_dura(data: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Derive dura as the CSF within ``DURA_THICKNESS_MM`` of bone: a thin layer under the inner table of the skull."""
    bone = np.isin(data, BONE_IDS)
    if not bone.any():
        return data
    distance = ndimage.distance_transform_edt(~bone, sampling=spacing_mm)
    return np.where((data == CSF_ID) & (distance <= DURA_THICKNESS_MM), DURA_ID, data)


def mark_deep(data: np.ndarray) -> np.ndarray:
    """Relabel BrainWeb's grey and white matter around the deep nuclei and the brain stem; RAS+."""
    found = ndimage.find_objects(np.isin(data, list(DEEP_OF)).astype(np.uint8))
    if not found:
        return data
    (x, y, z), n = found[0], data.shape
    width, length = x.stop - x.start, y.stop - y.start
    across = np.abs(np.arange(n[0]) + 0.5 - (x.start + x.stop) / 2)[:, None, None] / width
    ahead = (np.arange(n[1]) + 0.5 - y.start)[None, :, None] / length
    down = (z.stop - np.arange(n[2]) - 0.5)[None, None, :] / length
    deep = np.zeros(n, dtype=bool)
    for half, (back, front), (top, bottom) in (DEEP_BOX, DEEP_STEM):
        deep |= (across < half) & (ahead > back) & (ahead < front) & (down > top) & (down < bottom)
    out = data.copy()
    for label_id, deep_id in DEEP_OF.items():
        out[deep & (data == label_id)] = deep_id
    return out


def _crop_to_head(data: np.ndarray, affine: np.ndarray, margin: int = 2) -> tuple[np.ndarray, np.ndarray]:
    box = ndimage.find_objects((data > 0).astype(np.uint8))[0]
    start = [max(s.start - margin, 0) for s in box]
    stop = [min(s.stop + margin, n) for s, n in zip(box, data.shape, strict=True)]
    moved = affine.copy()
    moved[:3, 3] = affine[:3, :3] @ start + affine[:3, 3]
    return data[start[0] : stop[0], start[1] : stop[1], start[2] : stop[2]], moved


def import_template(
    file: Path, scheme: str, out: Path, source: str = "", name: str = "", more: Mapping[str, str] | None = None
) -> Path:
    """Bring one label map into the project's format; returns the new template's folder. Written whole or not at all.

    The template is called ``name``, or as its file is. ``more`` (licence, citation) goes into ``labels.json`` and
    ``SOURCE.md`` as well.
    """
    table = load_scheme(scheme)
    volume = read_label_map(file)
    table.to_index(volume.data, str(file))
    data = remove_specks(volume.data)
    removed = int(np.count_nonzero(volume.data != data))
    derived: dict[str, str] = {}
    if DURA_ID in table.index_of and not (data == DURA_ID).any():
        data = add_dura(data, np.array(volume.spacing_mm))
        if (data == DURA_ID).any():
            derived[str(DURA_ID)] = f"CSF within {DURA_THICKNESS_MM} mm of the skull (not drawn by hand)"
    if table.name == "brainweb":
        data = mark_deep(data)
        derived |= {str(i): "around the deep nuclei and the brain stem (a box, not drawn)" for i in DEEP_OF.values()}
    data, affine = _crop_to_head(data, volume.affine)
    name = name or _template_name(file)
    own_scheme = Path(scheme) if scheme.endswith(".json") else None
    target = out / name
    if target.exists():
        raise TemplateError(f"{target}: exists already; remove it or choose another output folder")
    out.mkdir(parents=True, exist_ok=True)
    present = np.unique(data)
    record: dict[str, Any] = {
        "name": name,
        "scheme": own_scheme.name if own_scheme else scheme,
        "derived": derived,
        **({"removed_voxels": removed} if removed else {}),
        "source": source or file.name,
        **(more or {}),
        "labels": {str(i): table[int(i)].name for i in present},
    }
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}-") as draft:
        folder = Path(draft) / name
        folder.mkdir()
        save_label_map(folder / "labels.nii.gz", data, Volume(data, affine), present)
        if own_scheme:
            (folder / own_scheme.name).write_text(own_scheme.read_text())
        (folder / "labels.json").write_text(json.dumps(record, indent=2) + "\n")
        lines = [f"# {name}", "", f"Imported from `{source or file.name}` with scheme `{scheme}`."]
        lines += [f"Derived, not drawn: {table[int(i)].name} = {how}." for i, how in derived.items()]
        lines += [f"Removed: {removed} voxels in specks apart from the rest."] if removed else []
        lines += ["", *(f"- {key}: {value}" for key, value in more.items())] if more else []
        (folder / "SOURCE.md").write_text("\n".join(lines) + "\n")
        os.replace(folder, target)
    return target


def removal_note(folder: Path) -> str:
    """What the import of a template removed, in words; empty if nothing."""
    removed = read_record(folder).get("removed_voxels", 0)
    return f"{folder}: {removed} voxels in specks apart from the rest were removed at import" if removed else ""


def _template_name(file: Path) -> str:
    name = image_stem(file)
    return file.parent.name if name == "labels" else name


def import_templates(
    source: Path, scheme: str, out: Path, on_done: Callable[[Path], None] = lambda folder: None
) -> list[Path]:
    """Import a label map or every one of a folder. All are checked before the first is written."""
    files = [source] if source.is_file() else label_map_files(source)
    twice = [name for name, count in Counter(_template_name(file) for file in files).items() if count > 1]
    if twice:
        raise TemplateError(f"{source}: holds more than one map named {twice[0]}; rename or remove one")
    for file in files:
        load_scheme(scheme).to_index(read_label_map(file).data, str(file))
        if (out / _template_name(file)).exists():
            raise TemplateError(f"{out / _template_name(file)}: exists already; remove it or choose another folder")
    folders = []
    for file in files:
        folders.append(import_template(file, scheme, out))
        on_done(folders[-1])
    return folders


def find_template(name: str | Path) -> Path:
    """The folder of a template: a path, or the name of one that ships."""
    for folder in (Path(name), data_dir("templates") / str(name)):
        if (folder / "labels.nii.gz").is_file():
            return folder
    raise TemplateError(
        f"{name}: not a template (a folder with labels.nii.gz and labels.json); "
        f"shipped: {', '.join(shipped_templates())}. Make one with 'synthseg templates import', or 'fetch'"
    )


def shipped_templates() -> list[str]:
    return sorted(p.parent.name for p in data_dir("templates").glob("*/labels.nii.gz"))


def expand(names: Iterable[str]) -> list[Path]:
    """Template folders of a list of names, template folders and folders of templates."""
    folders: list[Path] = []
    for name in names:
        path = Path(name)
        inside = sorted(p.parent for p in path.glob("*/labels.nii.gz")) if path.is_dir() else []
        folders += inside or [find_template(name)]
    return folders


def load_template(folder: str | Path) -> Template:
    """Load a template by folder or shipped name. Raises TemplateError or LabelError naming the file."""
    path = find_template(folder)
    record = read_record(path)
    scheme = record["scheme"]
    table = load_scheme(path / scheme if scheme.endswith(".json") else scheme)
    volume = read_label_map(path / "labels.nii.gz")
    index = np.pad(table.to_index(volume.data, str(path / "labels.nii.gz")), 1)
    brain_tissues = {"wm", "gm", "ventricle", "cerebellar_gm"}
    brain = np.isin(index, [i for i, x in enumerate(table.labels) if x.tissue in brain_tissues])
    box = ndimage.find_objects((brain if brain.any() else index > 0).astype(np.uint8))[0]
    center = tuple((side.start + side.stop - 1) / 2 for side in box)
    labels = torch.from_numpy(np.ascontiguousarray(index))
    derived = record.get("derived", {})
    return Template(path.name, labels, table, volume.spacing_mm, center, derived, folder=path)  # type: ignore[arg-type]
