"""Volumes: load, check, reorient, resample, save. The only module that touches image files.

Inside the package axes run right, anterior, superior (RAS+); a volume keeps the voxel order of its file until
`canonical` is called. Positions are in mm, affines map voxel indices to RAS+ mm.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from nibabel.spatialimages import SpatialHeader, SpatialImage

from synthseg.errors import InputError, OutputError

if TYPE_CHECKING:
    import torch

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh")
MAX_EXTENT_MM = 3000.0
_PLAUSIBLE_EXTENT_MM = (20.0, 3000.0)
_DAMAGE = (
    *(OSError, EOFError, ValueError, ArithmeticError, LookupError, MemoryError, zlib.error),
    *(nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError),
)
_NIFTI_UNITS = {1: ("metres", 1000.0), 3: ("microns", 0.001)}


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan or label map.

    Attributes
    ----------
    data : (D, H, W), in the voxel order of the file.
    affine : (4, 4), voxel indices to RAS+ mm.
    header : the header it was read with; a result saved "like" this volume keeps its fields.
    warnings : what the user should know about the file, one sentence each.
    """

    data: np.ndarray
    affine: np.ndarray
    header: SpatialHeader | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along the three array axes."""
        d, h, w = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(d), float(h), float(w)

    @property
    def extent_mm(self) -> tuple[float, float, float]:
        """Size of the field of view along the three array axes, outer voxel faces included."""
        d, h, w = (n * s for n, s in zip(self.data.shape, self.spacing_mm, strict=True))
        return d, h, w

    @property
    def axcodes(self) -> tuple[str, str, str]:
        """The direction in which each array axis runs, for example ('L', 'A', 'S')."""
        return nib.orientations.aff2axcodes(self.affine)

    @property
    def voxel_ml(self) -> float:
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000.0


# ------------------------------------------------------------------------------------------------ loading


def image_suffix(path: Path) -> str | None:
    """The image suffix that the file name ends with, as in the name; None if it is not an image name."""
    name = path.name
    for suffix in IMAGE_SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[-len(suffix) :]
    return None


def image_stem(path: Path) -> str:
    """The file name without folder and image suffix."""
    return path.name[: -len(image_suffix(path) or "")] if image_suffix(path) else path.stem


def check_readable(path: Path) -> None:
    """Raise InputError unless the path is a file that is there, not empty, and named like an image."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; expected an image file")
        if not path.exists():
            raise InputError(f"{path}: there is no such file; check the path")
        if not path.is_file():
            raise InputError(f"{path}: is not a regular file; expected an image file")
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if image_suffix(path) is None:
        raise InputError(f"{path}: not an image name; expected one that ends in {', '.join(IMAGE_SUFFIXES)}")
    if size == 0:
        raise InputError(f"{path}: the file is empty (0 bytes); copy or convert it again")


def load_volume(path: str | Path) -> Volume:
    """Read one 3-D scan as float32, with the header's scaling applied. Raises InputError on anything else."""
    path = Path(path)
    check_readable(path)
    image = _open_image(path)
    shape = _spatial_shape(path, image)
    _check_dtype(path, image)
    affine, notes = _checked_affine(path, image, shape)
    with _unreadable_as_input_error(path), np.errstate(all="ignore"):
        data = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
    _check_content(path, data)
    return Volume(data, affine, image.header.copy(), notes)


@contextlib.contextmanager
def _unreadable_as_input_error(path: Path) -> Iterator[None]:
    """Whatever the reading library raises on a damaged file is the file's fault: say so in one line."""
    logger = logging.getLogger("nibabel.global")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except PermissionError as error:
        raise InputError(f"{path}: may not be read (permission denied); check its permissions") from error
    except _DAMAGE as error:
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{path}: cannot be read as an image ({what}); expected a complete NIfTI or MGH file: "
            "copy or convert it again"
        ) from error
    finally:
        logger.setLevel(level)


def _open_image(path: Path) -> Any:
    with _unreadable_as_input_error(path):
        return nib.load(path, mmap=False)


def _spatial_shape(path: Path, image: Any) -> tuple[int, int, int]:
    shape = tuple(int(n) for n in image.shape)
    got = " x ".join(map(str, shape)) or "no dimensions"
    if len(shape) < 3:
        raise InputError(
            f"{path}: is {len(shape)}-D ({got}); expected a 3-D scan: convert the whole series to one file"
        )
    if any(n < 1 for n in shape):
        raise InputError(f"{path}: has an empty dimension ({got}); expected at least one voxel along each axis")
    if any(n > 1 for n in shape[3:]):
        raise InputError(
            f"{path}: holds {int(np.prod(shape[3:]))} volumes ({got}); expected one 3-D scan: "
            "extract a volume or average them first"
        )
    return shape[0], shape[1], shape[2]


def _check_dtype(path: Path, image: Any) -> None:
    dtype = image.get_data_dtype()
    if dtype.fields is not None or dtype.kind == "V":
        raise InputError(f"{path}: holds RGB colours; expected one number per voxel: convert it to greyscale first")
    if dtype.kind == "c":
        raise InputError(f"{path}: holds complex numbers; expected real ones: save the magnitude image")


def _checked_affine(path: Path, image: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The voxel-to-RAS affine in mm, and remarks on it."""
    affine = np.array(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all():
        raise InputError(f"{path}: its affine is not finite; expected a voxel-to-mm matrix: repair the header")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if (spacing < 1e-9).any() or abs(np.linalg.det(affine[:3, :3] / np.maximum(spacing, 1e-9))) < 1e-3:
        raise InputError(
            f"{path}: its affine is singular (voxel size {_by(spacing)} mm); expected independent axes: "
            "repair the header, or convert the scan again"
        )
    notes = []
    low, high = _PLAUSIBLE_EXTENT_MM
    header = image.header
    is_nifti = isinstance(header, nib.Nifti1Header)
    unit, mm_per_unit = _NIFTI_UNITS.get(int(header["xyzt_units"]) & 7 if is_nifti else 0, ("mm", 1.0))
    longest = float((spacing * shape).max())
    if unit != "mm" and not low <= longest <= high:
        affine[:3] *= mm_per_unit
        longest *= mm_per_unit
        notes.append(f"the header gives positions in {unit}; converted to mm")
    if longest > MAX_EXTENT_MM:
        raise InputError(
            f"{path}: the field of view is {longest:.0f} mm long; expected at most {MAX_EXTENT_MM:.0f} mm: "
            "correct the voxel size in the header"
        )
    if longest < low:
        notes.append(f"the field of view is only {longest:.3g} mm long; check the voxel size in the header")
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(cosines.T @ cosines - np.eye(3)).max() > 0.1:
        notes.append("the axes are not perpendicular (a tilted gantry?); the shear is ignored")
    if is_nifti and header["qform_code"] == header["sform_code"] == 0:
        notes.append("the header states no orientation; left and right may be swapped")
    return affine, tuple(notes)


def _check_content(path: Path, data: np.ndarray) -> None:
    low, high = float(data.min()), float(data.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        finite = data[np.isfinite(data)]
        if finite.size == 0:
            raise InputError(f"{path}: holds no finite voxel (all NaN or infinite); expected a scan: export it again")
        low, high = float(finite.min()), float(finite.max())
    if low == high:
        raise InputError(f"{path}: every voxel is {low:g}; expected a scan with contrast: export it again")


def _by(numbers: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{x:.3g}" for x in numbers)


# -------------------------------------------------------------------------------------------- orientation


def canonical(volume: Volume) -> Volume:
    """The volume in the RAS+ order closest to its own, by permutation and flips only (a view)."""
    orientation = io_orientation(volume.affine)
    data = apply_orientation(volume.data, orientation)
    return Volume(data, volume.affine @ inv_ornt_aff(orientation, volume.data.shape))


def from_canonical(data: np.ndarray, like: Volume) -> np.ndarray:
    """Undo `canonical`: an array in the RAS+ order of ``like``, back in the voxel order of ``like``."""
    orientation = io_orientation(like.affine)
    flipped = [int(target) for target, direction in orientation if direction < 0]
    data = np.flip(data, tuple(flipped))
    return np.transpose(data, [int(target) for target in orientation[:, 0]])


# --------------------------------------------------------------------------------------------- resampling


def resampling_matrix(n_in: int, n_out: int, spacing_in: float, spacing_out: float, offset_mm: float) -> torch.Tensor:
    """Linear resampling of one axis as a matrix, float32 (n_out, n_in); every row sums to one.

    Output voxel j lies ``offset_mm + j * spacing_out`` after the centre of input voxel 0. Each output voxel
    is the mean of the input under a triangle whose half-width is one input voxel, or one output voxel where
    that is longer: plain linear interpolation towards finer grids, anti-aliased towards coarser ones. Beyond
    the first and last voxel centre the edge value continues.
    """
    import torch

    position = (offset_mm + spacing_out * torch.arange(n_out, dtype=torch.float64)) / spacing_in
    position = position.clamp(0, n_in - 1)
    half_width = max(1.0, spacing_out / spacing_in)
    distance = (position[:, None] - torch.arange(n_in, dtype=torch.float64)[None]).abs()
    weight = (1 - distance / half_width).clamp(min=0)
    return (weight / weight.sum(1, keepdim=True)).float()


def centred_matrix(n_in: int, n_out: int, spacing_in: float, spacing_out: float) -> torch.Tensor:
    """`resampling_matrix` between two grids of one axis whose centres agree, float32 (n_out, n_in)."""
    offset_mm = ((n_in - 1) * spacing_in - (n_out - 1) * spacing_out) / 2
    return resampling_matrix(n_in, n_out, spacing_in, spacing_out, offset_mm)


def apply_separable(image: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Apply one matrix per axis: (C, D, H, W) and (D', D), (H', H), (W', W) -> (C, D', H', W').

    The axis that shrinks most goes first, so that the cost stays low.
    """
    order = sorted(range(3), key=lambda axis: matrices[axis].shape[0] / matrices[axis].shape[1])
    for axis in order:
        matrix = matrices[axis]
        if axis == 2:
            image = image @ matrix.T
        elif axis == 1:
            image = matrix @ image
        else:
            channels, depth, height, width = image.shape
            image = (matrix @ image.reshape(channels, depth, height * width)).reshape(channels, -1, height, width)
    return image


# ------------------------------------------------------------------------------------------------- saving


def check_writable(path: str | Path) -> None:
    """Raise OutputError unless a file of that name can be made. Missing folders are made when it is written.

    A temporary file is made and removed: permission bits alone say nothing to root or on a read-only file
    system.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; expected the name of a file to write")
        folder = path.parent
        while not os.path.lexists(folder) and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise OutputError(f"{path}: cannot be written, because {folder} is not a folder; choose another place")
        probe = folder / f".synthseg-{uuid.uuid4().hex}"
        with open(probe, "xb"):
            pass
        probe.unlink()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside the target, renamed to it at the end; nothing stays behind on failure.

    The temporary name has the target's suffix, since writers choose the format by it.
    """
    target = Path(os.path.realpath(path))
    suffix = image_suffix(target) or target.suffix
    temporary = target.parent / f".synthseg-{uuid.uuid4().hex}{suffix}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{path}: cannot be written ({reason}); free space or choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write UTF-8 text so that the file is either the old or the complete new one."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")


def save_label_map(path: str | Path, labels: np.ndarray, like: Volume, ids: Sequence[int] | np.ndarray) -> None:
    """Write a label map (D, H, W) on the grid of ``like``, with the qform, sform and units of its header.

    The type is uint8 where the largest of ``ids`` allows, else int16. The file is written whole or not at
    all.
    """
    if labels.shape != like.data.shape:
        raise ValueError(f"the labels are {labels.shape}, the volume is {like.data.shape}")
    dtype = np.uint8 if max(int(i) for i in ids) <= 255 else np.int16
    freesurfer = _is_freesurfer_name(path)
    image = _label_image(labels.astype(dtype), like, freesurfer)
    with atomic_path(path) as temporary:
        nib.save(image, temporary)


def _is_freesurfer_name(path: str | Path) -> bool:
    """Whether an image of this name is MGH rather than NIfTI. Raises OutputError if it is no image name."""
    suffix = image_suffix(Path(path))
    if suffix is None:
        raise OutputError(f"{path}: not an image name; end it in {', '.join(IMAGE_SUFFIXES)}")
    return suffix.lower().startswith(".mg")


def save_image(path: str | Path, volume: Volume) -> None:
    """Write an image as float32 NIfTI or MGH. The file is written whole or not at all."""
    freesurfer = _is_freesurfer_name(path)
    kind = nib.MGHImage if freesurfer else nib.Nifti1Image
    image = kind(volume.data.astype(np.float32), volume.affine)
    if isinstance(image, nib.Nifti1Image):
        image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        nib.save(image, temporary)


def save_vectors(path: str | Path, vectors_mm: np.ndarray, affine: np.ndarray) -> None:
    """Write vectors (3, D, H, W), mm along R, A and S, as NIfTI of shape (D, H, W, 1, 3) with intent "vector"."""
    image = nib.Nifti1Image(np.moveaxis(vectors_mm, 0, -1)[..., None, :].astype(np.float32), affine)
    image.header.set_intent("vector")
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        nib.save(image, temporary)


def _label_image(labels: np.ndarray, like: Volume, freesurfer: bool) -> SpatialImage:
    if freesurfer:
        return nib.MGHImage(labels, like.affine)
    if not isinstance(like.header, nib.Nifti1Header):
        image = nib.Nifti1Image(labels, like.affine)
        image.set_qform(like.affine, code="scanner")
        image.set_sform(like.affine, code="scanner")
        image.header.set_xyzt_units("mm")
        return image
    header = like.header.copy()
    header.set_data_shape(labels.shape)
    header.set_data_dtype(labels.dtype)
    header.set_data_offset(0)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the display window of the scan would hide the labels
    header.extensions.clear()  # they tell of the scan's values (statistics, history), not of its geometry
    # Without an affine of its own the image takes qform, sform and codes from the header untouched.
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    return image_class(labels, None, header)
