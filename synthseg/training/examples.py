"""Real images to fine-tune on: a scan, its label map if the task needs one, and an aligned T1 if it needs that.

``find_images`` pairs the files of a folder; ``load_example`` reads what belongs together onto one grid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from synthseg.config import ImageConfig
from synthseg.config.finetuning import TaskName
from synthseg.conforming import crop, head_box
from synthseg.errors import ConfigError, InputError
from synthseg.inputs import SEGMENTATION, is_own_output
from synthseg.intensity import CT_WINDOW_HU, fill_as_air, finite, foreground, looks_like_hounsfield, normalise
from synthseg.labels import BRAIN_TISSUES, LabelTable, load_scheme, tissue_mask
from synthseg.templates import read_label_map
from synthseg.training.canonical import WHITE_MATTER
from synthseg.volume import Volume, canonical, image_stem, image_suffix, load_volume

HEAD_THRESHOLD = 0.15  # of the median intensity of the foreground; what is darker and not enclosed is air
LABEL_ENDINGS = ("_label", "_labels", "_seg", "_dseg", "_aseg", "_segmentation", "-labels", "-label", "-seg")
T1_ENDINGS = ("_t1", "_T1w", "-t1")


@dataclass(frozen=True, eq=False)
class Example:
    """A real image in RAS+ order, cropped to the head, in a border of one voxel of background.

    Attributes
    ----------
    image : float32 (d, h, w) in [0, 1].
    labels : uint8 (d, h, w): indices into ``table``; without a table 1 inside the head.
    center : voxel coordinates of the middle of the brain; of the head, without labels.
    t1 : an aligned T1 on the same voxels, float32 (d, h, w) in [0, 1], or None.
    contrast : "ct", or "random" where it is not known.
    """

    name: str
    image: torch.Tensor
    labels: torch.Tensor
    table: LabelTable | None
    spacing_mm: tuple[float, float, float]
    center: tuple[float, float, float]
    t1: torch.Tensor | None = None
    contrast: str = "random"


def load_example(one: ImageConfig, scheme: str, task: TaskName) -> Example:
    """Read an image and what the task needs of it. Raises ConfigError if something is missing or does not fit."""
    if task == "segmentation" and not one.labels:
        raise ConfigError(f"images: {one.image} has no label map, which segmentation needs; name it under 'labels'")
    if task == "reconstruction" and not one.t1:
        raise ConfigError(f"images: {one.image} has no T1 scan, which reconstruction needs; name an aligned one: 't1'")
    whole = canonical(_read(one.image))
    box = head_box(whole)
    ras = crop(whole, box)
    image, contrast = _intensities(ras)
    table, index = None, None
    if one.labels:
        table, whole_index = _labels_on(one, scheme, whole)
        index = torch.from_numpy(np.ascontiguousarray(whole_index[box]))
    labels = head_mask(image) if index is None else index
    if not bool((labels > 0).any()):
        raise ConfigError(f"images: {one.labels or one.image} shows no head; is it the right file?")
    brain = labels > 0
    if table is not None:
        chosen = torch.from_numpy(tissue_mask(table, BRAIN_TISSUES))[labels.int()]
        brain = chosen if bool(chosen.any()) else brain
    middle = ndimage.find_objects(brain.numpy().astype(np.uint8))[0]
    d, h, w = ((side.start + side.stop - 1) / 2 for side in middle)
    t1 = _aligned(canonical(_read(one.t1)), ras, one) if one.t1 else None
    if t1 is not None and table is not None:
        t1 = _at_level(t1, torch.from_numpy(tissue_mask(table, {"wm"}))[labels.int()])
    return Example(
        image_stem(Path(one.image)),
        _bordered(image),
        _bordered(labels),
        table,
        ras.spacing_mm,
        (d + 1, h + 1, w + 1),
        None if t1 is None else _bordered(t1),
        contrast,
    )


def _bordered(volume: torch.Tensor) -> torch.Tensor:
    """With a border of zeros, so that the nearest voxel of all that lies beyond the scan is background."""
    return F.pad(volume, (1, 1, 1, 1, 1, 1))


def load_examples(
    images: Sequence[ImageConfig], scheme: str, task: TaskName, taken: Collection[str] = ()
) -> list[Example]:
    """The real images of a recipe, in its order.

    No two have one name, and none a name that is ``taken``: where files have, their folder stands in front.
    """
    names = distinct_names([Path(one.image) for one in images], taken)
    return [replace(load_example(one, scheme, task), name=name) for one, name in zip(images, names, strict=True)]


def distinct_names(files: Sequence[Path], taken: Collection[str] = ()) -> list[str]:
    """A name for each file: its stem, or with as many folders in front, ``a/t1``, as tell it from all others.

    Files of one folder that differ in their ending alone keep it.
    """
    paths = [file.absolute() for file in files]  # not what a link points at, whose name may be a checksum
    alike = Counter((path.parent, image_stem(path)) for path in set(paths))
    parts = [
        (*path.parent.parts[1:], path.name if alike[path.parent, image_stem(path)] > 1 else image_stem(path))
        for path in paths
    ]
    most = max(map(len, parts), default=1)
    names = [part[-1] for part in parts]
    for depth in range(2, most + 1):
        count = Counter(names)
        names = [
            "/".join(part[-depth:]) if count[name] > 1 or name in taken else name
            for name, part in zip(names, parts, strict=True)
        ]
    return names


def head_mask(image: torch.Tensor) -> torch.Tensor:
    """Where the head is in an image (d, h, w): what is not air, its largest piece, without holes; uint8."""
    floor, median = foreground(image)
    components, count = ndimage.label((image > floor + HEAD_THRESHOLD * (median - floor)).numpy())
    if count == 0:
        return torch.zeros(image.shape, dtype=torch.uint8)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    return torch.from_numpy(ndimage.binary_fill_holes(components == sizes.argmax()).astype(np.uint8))


def _read(file: str) -> Volume:
    try:
        return load_volume(file)
    except InputError as error:
        raise ConfigError(f"images: {error}") from None


def _intensities(ras: Volume) -> tuple[torch.Tensor, str]:
    """Intensities in [0, 1], treated as in inference, and "ct" or "random"."""
    image = fill_as_air(finite(torch.from_numpy(np.ascontiguousarray(ras.data, dtype=np.float32))))
    if looks_like_hounsfield(image):
        return normalise(image.clamp(*CT_WINDOW_HU)), "ct"
    return normalise(image), "random"


def _labels_on(one: ImageConfig, scheme: str, whole: Volume) -> tuple[LabelTable, np.ndarray]:
    """Table and indices (D, H, W) of a label map on the grid of its scan."""
    labels = read_label_map(Path(one.labels))
    if whole.data.shape != labels.data.shape or not np.allclose(whole.affine, labels.affine, atol=0.1):
        shapes = " and ".join(" x ".join(map(str, volume.data.shape)) for volume in (whole, labels))
        raise ConfigError(
            f"images: {one.labels} is not on the voxel grid of {one.image} ({shapes} voxels, or other positions); "
            "resample the labels to the scan, nearest neighbour"
        )
    table = load_scheme(one.scheme or scheme)
    ids = labels.data
    if one.read_as:
        present, where = np.unique(ids, return_inverse=True)
        ids = np.array([one.read_as.get(int(label), int(label)) for label in present])[where].reshape(ids.shape)
    return table, table.to_index(ids, where=one.labels)


def _aligned(t1: Volume, ras: Volume, one: ImageConfig) -> torch.Tensor:
    """A T1 scan on the voxels of another scan of the same head, by their positions, linearly."""
    between = np.linalg.inv(t1.affine) @ ras.affine
    data = np.nan_to_num(t1.data, nan=0.0, posinf=0.0, neginf=0.0)
    found = ndimage.affine_transform(
        data, between[:3, :3], between[:3, 3], output_shape=ras.data.shape, order=1, mode="constant", cval=data.min()
    )
    image = normalise(torch.from_numpy(found.astype(np.float32)))
    if not bool((image > 0).any()):
        raise ConfigError(f"images: {one.t1} does not overlap {one.image}; register the two first")
    return image


def _at_level(t1: torch.Tensor, white_matter: torch.Tensor) -> torch.Tensor:
    """A T1 whose white matter, where it is known, is as bright as that of the canonical image of a template."""
    level = float(t1[white_matter].median()) if bool(white_matter.any()) else 0.0
    return (t1 * (WHITE_MATTER / level)).clamp(0, 1) if level > 0.05 else t1


# ------------------------------------------------------------------------------------------- images of a folder


def find_images(folder: Path, task: TaskName, scheme: str = "") -> tuple[ImageConfig, ...]:
    """The images of a folder, each with its label map or T1 if the task needs one, in the order of their names.

    Three arrangements are known: ``x_image.nii.gz`` beside ``x_label.nii.gz``, as ``synthseg generate`` writes them;
    ``x.nii.gz`` beside ``x_seg.nii.gz`` (or another of LABEL_ENDINGS; T1_ENDINGS for a T1); and two folders,
    ``imagesX`` and ``labelsX`` (``t1X``), with the same names, an nnU-Net ``_0000`` apart, where X is anything but Ts:
    the images of ``imagesTs`` are to be tested on. ``x_T1w.nii.gz`` is a scan of its own unless the task asks for a T1,
    or ``x.nii.gz`` is there; beside a folder of partners every image is. What other commands made of a scan
    (``x_mask.nii.gz``) is left out. Raises ConfigError where a partner is missing.
    """
    if not folder.is_dir():
        raise ConfigError(f"--images {folder}: no such folder; give a folder of images and label maps")
    partner = {"segmentation": "labels", "reconstruction": "t1"}.get(task, "")
    endings = {"labels": LABEL_ENDINGS, "t1": T1_ENDINGS}.get(partner, ())
    places = {sub.name.lower(): sub for sub in sorted(folder.iterdir()) if sub.is_dir()}
    inside = [sub for name, sub in places.items() if name.startswith("images") and name != "imagests"]
    files = [file for place in inside or [folder] for file in _images_in(place) if not _is_derived(file)]
    by_stem = {image_stem(file): file for file in files}
    others = {stem: file for stem, file in by_stem.items() if _is_partner(stem, by_stem, task)}
    kinds = ("labels", "t1")
    apart = [sub for sub in inside if any(sub.name.lower().replace("images", kind, 1) in places for kind in kinds)]
    scans = [file for file in files if file.parent in apart or image_stem(file) not in others]
    if not scans:
        raise ConfigError(f"--images {folder}: holds no images (NIfTI or MGH), in itself or in images*/ but imagesTs")
    found = []
    for scan in scans:
        stem = image_stem(scan).removesuffix("_image")
        match: Path | None = None
        if partner and inside:
            beside = partner + scan.parent.name[len("images") :]
            place = places.get(beside.lower())
            named = {image_stem(file): file for file in _images_in(place)} if place else {}
            short = stem[:-5] if stem[-5:-4] == "_" and stem[-4:].isdigit() else stem
            match = next((named[key] for key in (stem, short, *(short + e for e in endings)) if key in named), None)
        elif partner:
            stems = [stem, *(stem.removesuffix(ending) for ending in T1_ENDINGS if stem.endswith(ending))]
            match = next((others[s + ending] for s in stems for ending in endings if s + ending in others), None)
        if partner and match is None:
            what = "label map" if partner == "labels" else "T1"
            where = f"{beside}/{short}.nii.gz" if inside else f"{stem}{endings[0]}.nii.gz"
            raise ConfigError(f"--images {folder}: {scan.name} has no {what}; expected {where}, or name it in a recipe")
        extra = {partner: str(match)} if match is not None else {}
        found.append(ImageConfig(image=str(scan), scheme=scheme, **extra))
    return tuple(found)


def _is_partner(stem: str, stems: Collection[str], task: TaskName) -> bool:
    """Whether an image of this name is a label map, or the T1 scan that goes with another image."""
    if stem.endswith(LABEL_ENDINGS):
        return True
    own = next((stem.removesuffix(ending) for ending in T1_ENDINGS if stem.endswith(ending)), None)
    return own is not None and (task == "reconstruction" or own in stems or f"{own}_image" in stems)


def _is_derived(file: Path) -> bool:
    """Whether an image was made of the scan beside it; a segmentation is no such image, but its partner."""
    return is_own_output(file) and not image_stem(file).endswith(SEGMENTATION)


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.iterdir() if image_suffix(file) and file.is_file() and not file.name.startswith(".")
    )
