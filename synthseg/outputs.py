"""The files of one segmented scan: labels, probabilities, resampled scan, brain mask, skull-stripped scan, surfaces.

All images lie on the scan's own grid, or all on one of another voxel size that shares its axes, centre and field of
view. What is asked for is checked before the first file is written; each file appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from synthseg import intensity
from synthseg.errors import InputError, LabelError, OutputError
from synthseg.image_files import IMAGE_SUFFIXES, image_suffix
from synthseg.inference import Segmentation, in_scheme
from synthseg.labels import BRAIN_TISSUES, LabelTable, available_schemes, load_scheme, tissue_mask
from synthseg.posteriors import Grid, Posteriors, scan_grid, spacing_grid
from synthseg.surfaces import Surface, check_mesh_name, check_structure, structure_ids, surface, write_surface
from synthseg.targets import Spacing, Targets
from synthseg.volume import Volume, apply_along, centred_matrix, save_class_images, save_label_map, save_scan

CT_AIR_HU = -1000.0
# Probabilities are stored as whole numbers of 2 bytes: wrong by at most 8e-6, where 1 byte is wrong by 2e-3 (which
# changes the likeliest label of six voxels in ten thousand) and float32 takes three times the space.
PROBABILITY_TYPE = np.uint16
FACTS = "synthseg segmentation"  # what the header of a label map calls them
WITHOUT_SURFACE = "without_surface"  # among them, if there are any: structures whose surfaces could not be made
MAX_OUTPUT_VOXELS = 2**30  # an image of 1024 voxels a side


def check_targets(
    targets: Targets, table: LabelTable, *, spacing_mm: Spacing | None = None, scheme: str | None = None
) -> None:
    """Raise OutputError, InputError or LabelError if these files cannot be made of a model's labels.

    Needs no scan: a batch can be checked before it begins.
    """
    for path in targets.images():
        if image_suffix(path) is None:
            raise OutputError(f"{path}: not an image name; end it in {', '.join(IMAGE_SUFFIXES)}")
    if targets.posteriors is not None and not str(targets.posteriors).lower().endswith((".nii", ".nii.gz")):
        raise OutputError(f"{targets.posteriors}: probabilities are written as NIfTI; end it in .nii.gz or .nii")
    if targets.resampled is not None and spacing_mm is None:
        raise OutputError(f"{targets.resampled}: the resampled scan needs a voxel size; give one with --spacing")
    if spacing_mm is not None:
        spacing_grid(Volume(np.zeros((1, 1, 1), np.uint8), np.eye(4)), spacing_mm)
    final = table if scheme is None else target_table(table, scheme)
    for structure, path in targets.meshes:
        check_mesh_name(path)
        check_structure(structure, final)
    if (targets.mask or targets.stripped) and not tissue_mask(final, BRAIN_TISSUES).any():
        raise OutputError(
            f"{targets.mask or targets.stripped}: no label of scheme '{final.name}' is a tissue of the brain, so that "
            "there is no brain mask; give the labels their 'tissue' in the scheme file"
        )


def write_outputs(
    targets: Targets,
    volume: Volume,
    segmentation: Segmentation,
    *,
    spacing_mm: Spacing | None = None,
    scheme: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write all files of one scan.

    A surface of a structure that no voxel is likelier than not is not written, and an older file of its name removed;
    the segmentation then gains a warning, and the header of the label map names it.

    Parameters
    ----------
    volume : the scan as it was read.
    segmentation : with its posteriors, if `Targets.need_posteriors`.
    spacing_mm : voxel size of all images, one number or one for each axis; None: the scan's own grid.
    scheme : label scheme of the outputs; None: that of the segmentation.
    facts : how the segmentation was made; the header of the label map keeps them (`facts_of`).
    """
    check_targets(targets, segmentation.table, spacing_mm=spacing_mm, scheme=scheme)
    if targets.need_posteriors(spacing_mm, scheme) and segmentation.posteriors is None:
        raise ValueError("these outputs are made from probabilities: segment with keep_posteriors=True")
    warnings = segmentation.warnings
    if scheme is not None:
        segmentation = relabelled(segmentation, scheme)
    grid = scan_grid(volume) if spacing_mm is None else spacing_grid(volume, spacing_mm)
    _check_size(grid)
    made = {structure: _surface_or_none(segmentation, structure) for structure, _ in targets.meshes}
    without = sorted(structure.lower() for structure, mesh in made.items() if mesh is None)
    facts = {**(facts or {}), **({WITHOUT_SURFACE: without} if without else {})}
    files = _Files(volume, segmentation, grid, on_scan=spacing_mm is None, facts=facts)
    writers: list[tuple[Path | None, Callable[[Path], None]]] = [
        (targets.labels, files.write_labels),
        (targets.posteriors, files.write_posteriors),
        (targets.resampled, files.write_resampled),
        (targets.mask, files.write_mask),
        (targets.stripped, files.write_stripped),
    ]
    for path, write in writers:
        if path is not None:
            write(path)
    for structure, path in targets.meshes:
        mesh = made[structure]
        if mesh is not None:
            write_surface(path, mesh, structure)
            continue
        path.unlink(missing_ok=True)
        if np.isin(files.labels, structure_ids(structure, segmentation.table)).any():
            reason = f"no voxel of {structure} is likelier than not; it has no surface"
        else:
            reason = f"there is no {structure} in the scan"
        warnings.append(f"{reason}; {path.name} was not written")


def _surface_or_none(segmentation: Segmentation, structure: str) -> Surface | None:
    assert segmentation.posteriors is not None  # checked before
    try:
        return surface(segmentation.posteriors, structure)
    except InputError:
        return None


def facts_of(labels: Path) -> dict[str, Any]:
    """How a label map was made, from its header; empty if it does not say."""
    for extension in getattr(nib.load(labels).header, "extensions", ()):
        with suppress(ValueError, TypeError, AttributeError):
            content = extension.get_content()
            facts = json.loads(content if isinstance(content, str) else bytes(content).rstrip(b"\0"))[FACTS]
            return dict(facts)
    return {}


def _check_size(grid: Grid) -> None:
    n = int(np.prod([int(side) for side in grid.shape], dtype=np.int64))
    if n > MAX_OUTPUT_VOXELS:
        by = " x ".join(str(side) for side in grid.shape)
        raise InputError(
            f"images of {by} voxels would be written, at most {MAX_OUTPUT_VOXELS / 1e9:.1f} thousand million are; "
            "choose a larger --spacing"
        )


# ------------------------------------------------------------------------------------------------ schemes


def target_table(table: LabelTable, scheme: str) -> LabelTable:
    """The scheme of that name, if every label of ``table`` is exactly one of its labels. Raises LabelError if not."""
    target = load_scheme(scheme)
    if target.name == table.name:
        return table
    table = _with_known_relations(table)
    vague = [x.name for x in table.labels if len(x.to.get(target.name, ())) > 1]
    related = all(target.name in label.to for label in table.labels)
    if related and not vague:
        table.mapping(target)  # raises if ids are wrong
        return target
    why = (
        f"it cannot tell apart what is inside {', '.join(vague[:5])}" if vague else "no relation between them is known"
    )
    able = [name for name in available_schemes() if _converts(name, target)]
    raise LabelError(
        f"labels of scheme '{table.name}' cannot be written as '{target.name}': {why}; use a model with the labels of "
        f"{' or '.join([target.name, *able])} (synthseg info lists the models), or leave out --scheme"
    )


def _with_known_relations(table: LabelTable) -> LabelTable:
    """The table with the relations of the scheme that ships under its name: a model may be older than a relation."""
    if table.name not in available_schemes():
        return table
    known = {(label.id, label.name): label.to for label in load_scheme(table.name).labels}
    if any((label.id, label.name) not in known for label in table.labels):
        return table
    labels = tuple(replace(x, to={**known[x.id, x.name], **x.to}) for x in table.labels)
    return LabelTable(table.name, labels, table.description)


def _converts(name: str, target: LabelTable) -> bool:
    table = load_scheme(name)
    return name != target.name and all(len(label.to.get(target.name, ())) == 1 for label in table.labels)


def relabelled(segmentation: Segmentation, scheme: str) -> Segmentation:
    """The segmentation in another scheme, labels and volumes alike (`synthseg.inference.in_scheme`).

    Needs the posteriors. Raises LabelError if not every label is exactly one label there.
    """
    target = target_table(segmentation.table, scheme)
    if target.name == segmentation.table.name:
        return segmentation
    if segmentation.posteriors is None:
        raise ValueError("labels of another scheme are made from probabilities: segment with keep_posteriors=True")
    posteriors = replace(segmentation.posteriors, table=_with_known_relations(segmentation.table))
    return in_scheme(replace(segmentation, posteriors=posteriors), target)


# ------------------------------------------------------------------------------------------------- images


@dataclass(eq=False)
class _Files:
    """What several files of one scan share, made when the first of them is written."""

    volume: Volume
    segmentation: Segmentation
    grid: Grid
    on_scan: bool
    facts: Mapping[str, Any]

    @property
    def affine(self) -> np.ndarray | None:
        """As the writers take it: None keeps the header of the scan untouched."""
        return None if self.on_scan else self.grid.affine

    @property
    def posteriors(self) -> Posteriors:
        assert self.segmentation.posteriors is not None  # checked before
        return self.segmentation.posteriors

    @cached_property
    def labels(self) -> np.ndarray:
        return self.segmentation.labels if self.on_scan else self.posteriors.labels_on(self.grid).labels

    @cached_property
    def mask(self) -> np.ndarray:
        return brain_mask(self.labels, self.segmentation.table)

    @cached_property
    def image(self) -> np.ndarray:
        return self.volume.data if self.on_scan else resampled_scan(self.volume, self.grid)

    def write_labels(self, path: Path) -> None:
        comment = json.dumps({FACTS: dict(self.facts)}) if self.facts else ""
        save_label_map(path, self.labels, self.volume, self.segmentation.table.ids, self.affine, comment)

    def write_posteriors(self, path: Path) -> None:
        write_posteriors(path, self.posteriors, self.grid, self.volume, self.affine)

    def write_resampled(self, path: Path) -> None:
        save_scan(path, self.image, self.volume, self.affine)

    def write_mask(self, path: Path) -> None:
        save_label_map(path, self.mask, self.volume, [0, 1], self.affine)

    def write_stripped(self, path: Path) -> None:
        image = np.where(self.mask > 0, self.image, np.float32(air_value(self.volume.data)))
        save_scan(path, image, self.volume, self.affine)


def write_posteriors(
    path: Path, posteriors: Posteriors, grid: Grid, like: Volume, affine: np.ndarray | None = None
) -> None:
    """Write probabilities on a grid as 4-D NIfTI, whole numbers times 1/65535, in bounded memory.

    The classes are along the last axis, in the order of the scheme; their ids and names are in a comment in the
    header. ``affine`` is that of the grid if it is not the one of ``like``.
    """
    levels = int(np.iinfo(PROBABILITY_TYPE).max)

    def quantised() -> Iterator[tuple[slice, np.ndarray]]:
        for where, slab in posteriors.slabs(grid):
            np.multiply(slab, levels, out=slab)
            yield where, np.rint(slab, out=slab).clip(0, levels, out=slab).astype(PROBABILITY_TYPE)

    table = posteriors.table
    classes = [{"index": i, "id": label.id, "name": label.name} for i, label in enumerate(table.labels)]
    comment = json.dumps({"scheme": table.name, "classes": classes})
    shape = (*grid.shape, len(table))
    save_class_images(path, quantised(), shape, PROBABILITY_TYPE, 1 / levels, like, affine, comment)


def brain_mask(labels: np.ndarray, table: LabelTable) -> np.ndarray:
    """The brain with its ventricles and without sulcal fluid, enclosed holes filled; uint8 (D, H, W) of 0 and 1.

    ``labels`` are ids.
    """
    brain = np.isin(labels, table.ids[tissue_mask(table, BRAIN_TISSUES)])
    for box in ndimage.find_objects(brain.astype(np.uint8)):
        brain[box] = ndimage.binary_fill_holes(brain[box])
    return brain.astype(np.uint8)


def air_value(data: np.ndarray) -> float:
    """What stands for air in a scan (D, H, W).

    -1000 in CT. Otherwise 0, except in a scan with negative values whose corners are not filled with one value:
    there it is the smallest one.
    """
    image = intensity.finite(torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)))
    lowest = float(image.min())
    if intensity.looks_like_hounsfield(image):
        return CT_AIR_HU
    if lowest >= 0:
        return 0.0
    changed = torch.nonzero((intensity.fill_as_air(image) != image).flatten())
    return float(image.flatten()[changed[0, 0]]) if len(changed) else lowest


def resampled_scan(volume: Volume, grid: Grid) -> np.ndarray:
    """A scan on a grid of its own axes and centre, float32 (D, H, W), linear, anti-aliased towards larger voxels.

    NaN and infinity become the smallest finite value. Works in slabs along the first axis, so that little more than
    the result is held.
    """
    image = intensity.finite(torch.from_numpy(np.ascontiguousarray(volume.data, dtype=np.float32)))
    first, second, third = (
        centred_matrix(n_in, n_out, spacing_in, spacing_out)
        for n_in, n_out, spacing_in, spacing_out in zip(
            image.shape, grid.shape, volume.spacing_mm, grid.spacing_mm, strict=True
        )
    )
    result = np.empty(grid.shape, dtype=np.float32)
    planes = max(1, 2**26 // max(grid.shape[1] * grid.shape[2], image.shape[1] * image.shape[2]))
    for start in range(0, grid.shape[0], planes):
        rows = first[start : start + planes]
        used = torch.nonzero(rows.any(0)).flatten()
        low, high = int(used[0]), int(used[-1]) + 1
        slab = apply_along(image[None, low:high], rows[:, low:high], 0)
        slab = apply_along(apply_along(slab, second, 1), third, 2)
        result[start : start + planes] = slab[0].numpy()
    return result
