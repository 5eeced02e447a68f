"""Volumes: load, reorient, resample, save. With image_files, the only module that touches image files.

Inside the package axes run right, anterior, superior (RAS+); a volume keeps the voxel order of its file until
`canonical` is called. Positions are in mm, affines map voxel indices to RAS+ mm.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from nibabel.spatialimages import SpatialHeader, SpatialImage

from synthseg.errors import OutputError
from synthseg.image_files import IMAGE_SUFFIXES, image_suffix, read_image, stated_qform
from synthseg.image_files import check_readable as check_readable
from synthseg.image_files import image_stem as image_stem
from synthseg.image_writer import fortran_order, write_classes, write_image

if TYPE_CHECKING:
    import torch

_SAME_PLACE_MM = 1e-3  # a qform is rounded off more than an sform


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan or label map.

    Attributes
    ----------
    data : (D, H, W), in the voxel order of the file.
    affine : (4, 4), voxel indices to RAS+ mm.
    header : the header it was read with; a result saved "like" this volume keeps its fields.
    warnings : what the user should know about the file, one sentence each.
    rescaled : the values of the file did not suit float32, and were brought to 0 to 1000.
    """

    data: np.ndarray
    affine: np.ndarray
    header: SpatialHeader | None = None
    warnings: tuple[str, ...] = field(default=())
    rescaled: bool = False

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


def load_volume(path: str | Path) -> Volume:
    """Read one 3-D scan as float32, with the header's scaling applied. Raises InputError on anything else."""
    return Volume(*read_image(Path(path)))


# -------------------------------------------------------------------------------------------- orientation


def canonical(volume: Volume) -> Volume:
    """The volume in the RAS+ order closest to its own, by permutation and flips only (a view)."""
    orientation = io_orientation(volume.affine)
    turned = orientation.copy()
    turned[np.array(volume.data.shape) == 1, 1] = 1  # to flip one voxel is but a negative stride, which torch refuses
    data = apply_orientation(volume.data, turned)
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
        image = apply_along(image, matrices[axis], axis)
    return image


def apply_along(image: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    """Apply a matrix (n_out, n_in) to one spatial axis (0, 1 or 2) of an image (C, D, H, W)."""
    if axis == 2:
        return image @ matrix.T
    if axis == 1:
        return matrix @ image
    channels, depth, height, width = image.shape
    return (matrix @ image.reshape(channels, depth, height * width)).reshape(channels, -1, height, width)


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


def save_label_map(
    path: str | Path,
    labels: np.ndarray,
    like: Volume,
    ids: Sequence[int] | np.ndarray,
    affine: np.ndarray | None = None,
    comment: str = "",
) -> None:
    """Write a label map (D, H, W) on the grid of ``like``, with the qform, sform and units of its header.

    The type is uint8 where the largest of ``ids`` allows, else int16. The file is written whole or not at
    all. ``affine`` says where the labels lie if that is not the grid of ``like``. ``comment`` becomes a header
    extension of a NIfTI file; MGH has no place for it.
    """
    dtype = np.uint8 if max(int(i) for i in ids) <= 255 else np.int16
    _save_like(path, labels, np.dtype(dtype), like, affine, comment)


def save_scan(path: str | Path, data: np.ndarray, like: Volume, affine: np.ndarray | None = None) -> None:
    """Write intensities (D, H, W) on the grid of ``like`` (or at ``affine``), as `save_label_map` does labels.

    Whole numbers keep the integer type of the file that ``like`` was read from, if they fit; all else is float32.
    """
    _save_like(path, data, _lossless_dtype(data, like, _is_freesurfer_name(path)), like, affine)


def save_image(path: str | Path, volume: Volume) -> None:
    """Write an image as float32 NIfTI or MGH. The file is written whole or not at all."""
    data = fortran_order(volume.data, np.float32)
    kind = nib.MGHImage if _is_freesurfer_name(path) else nib.Nifti1Image
    image = kind(data, volume.affine)
    if isinstance(image, nib.Nifti1Image):
        image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        write_image(image, temporary)


def save_vectors(path: str | Path, vectors_mm: np.ndarray, affine: np.ndarray) -> None:
    """Write vectors (3, D, H, W), mm along R, A and S, as NIfTI of shape (D, H, W, 1, 3) with intent "vector"."""
    image = nib.Nifti1Image(np.moveaxis(vectors_mm, 0, -1)[..., None, :].astype(np.float32), affine)
    image.header.set_intent("vector")
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        write_image(image, temporary)


def save_class_images(
    path: str | Path,
    slabs: Iterable[tuple[slice, np.ndarray]],
    shape: tuple[int, int, int, int],
    dtype: type[np.unsignedinteger],
    slope: float,
    like: Volume,
    affine: np.ndarray | None = None,
    comment: str = "",
) -> None:
    """Write one image per class as NIfTI (D, H, W, C), from slabs (C, d, H, W) along the first axis.

    Memory is bounded by one slab and one class. Stored are whole numbers of ``dtype``; times ``slope`` they are the
    values. ``comment`` becomes a header extension. Grid and header as in `save_label_map`.
    """
    if _is_freesurfer_name(path):
        raise OutputError(f"{path}: images of several classes are written as NIfTI; end the name in .nii.gz or .nii")
    placeholder = np.broadcast_to(np.zeros((), dtype), shape[:3])
    if affine is None and shape[:3] != like.data.shape:
        raise ValueError(f"the images are {shape[:3]}, the volume is {like.data.shape}")
    header: Any = _image_like(placeholder, like, False, affine).header
    header = header.as_byteswapped(nib.volumeutils.native_code)
    header.set_data_shape(shape)
    header["pixdim"][4] = 1
    header["xyzt_units"] = int(header["xyzt_units"]) & 7  # the last axis is no time
    header.set_slope_inter(slope, 0)
    if comment:
        header.extensions.append(_comment(comment))
    header.set_data_offset(-(-(header.single_vox_offset + header.extensions.get_sizeondisk()) // 16) * 16)
    with atomic_path(path) as temporary:
        write_classes(temporary, header, dtype, slabs)


def _comment(text: str) -> Any:
    """A header extension that every NIfTI reader may skip."""
    return nib.nifti1.Nifti1Extension("comment", text.encode())


def _is_freesurfer_name(path: str | Path) -> bool:
    """Whether an image of this name is MGH rather than NIfTI. Raises OutputError if it is no image name."""
    suffix = image_suffix(Path(path))
    if suffix is None:
        raise OutputError(f"{path}: not an image name; end it in {', '.join(IMAGE_SUFFIXES)}")
    return suffix.lower().startswith(".mg")


def _lossless_dtype(data: np.ndarray, like: Volume, freesurfer: bool) -> np.dtype:
    """The type of the file that ``like`` was read from if it is an integer that holds the data, else float32."""
    dtype: np.dtype = np.dtype(np.float32) if like.header is None else like.header.get_data_dtype().newbyteorder("=")
    if dtype.kind not in "iu" or (freesurfer and dtype not in (np.uint8, np.int16, np.int32)):
        return np.dtype(np.float32)
    limits = np.iinfo(dtype.name)
    for plane in data:  # a plane at a time: no second volume in memory
        if not (np.isfinite(plane).all() and plane.min() >= limits.min and plane.max() <= limits.max):
            return np.dtype(np.float32)
        if (plane != np.rint(plane)).any():
            return np.dtype(np.float32)
    return dtype


def _save_like(
    path: str | Path, data: np.ndarray, dtype: np.dtype, like: Volume, affine: np.ndarray | None, comment: str = ""
) -> None:
    if affine is None and data.shape != like.data.shape:
        raise ValueError(f"the data are {data.shape}, the volume is {like.data.shape}")
    image = _image_like(fortran_order(data, dtype), like, _is_freesurfer_name(path), affine)
    if comment and isinstance(image, nib.Nifti1Image):
        image.header.extensions.append(_comment(comment))
    with atomic_path(path) as temporary:
        write_image(image, temporary)


def _image_like(data: np.ndarray, like: Volume, freesurfer: bool, affine: np.ndarray | None) -> SpatialImage:
    """An image of the data with the header of ``like``; at ``affine`` if that is given, else where ``like`` is."""
    at = like.affine if affine is None else affine
    if freesurfer:
        return nib.MGHImage(data, at)
    if not isinstance(like.header, nib.Nifti1Header):
        image = nib.Nifti1Image(data, at)
        image.set_qform(at, code="scanner")
        image.set_sform(at, code="scanner")
        image.header.set_xyzt_units("mm")
        return image
    header = like.header.copy()
    header.set_data_shape(data.shape)
    header.set_data_dtype(data.dtype)
    header.set_data_offset(0)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the display window of the scan would hide the labels
    header.extensions.clear()  # they tell of the scan's values (statistics, history), not of its geometry
    if affine is not None:
        _place(header, like.affine, affine)
    # Without an affine of its own the image takes qform, sform and codes from the header untouched.
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    return image_class(data, None, header)


def _place(header: nib.Nifti1Header, before: np.ndarray, affine: np.ndarray) -> None:
    """Give a header, whose grid lies at ``before``, another grid, in mm, by those of qform and sform that it states. If
    it states neither, the new grid is centred where the old one was, which is what such a header says."""
    codes = int(header["qform_code"]), int(header["sform_code"])
    qform = _moved_qform(header, before, affine) if codes[0] else affine
    header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    if codes[0]:
        header.set_qform(qform, codes[0])
    if codes[1]:
        header.set_sform(affine, codes[1])
    header["xyzt_units"] = int(header["xyzt_units"]) & ~7 | 2  # mm; the unit of time stays


def _moved_qform(header: nib.Nifti1Header, before: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The qform of the grid ``affine``, in mm: ``affine`` itself, unless the header's qform leads elsewhere than
    ``before``, for example to the scanner where the sform leads to a template. A damaged one is replaced."""
    qform = stated_qform(header)
    if qform is None:
        return affine
    stated = np.linalg.det(header.get_best_affine()[:3, :3])
    qform[:3] *= np.cbrt(abs(np.linalg.det(before[:3, :3]) / stated))  # to mm
    if np.allclose(qform, before, atol=_SAME_PLACE_MM):
        return affine
    return qform @ np.linalg.inv(before) @ affine
