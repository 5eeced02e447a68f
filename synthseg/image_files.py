"""What is read of an image file, and what is checked of it: name, header, affine, voxels.

A file comes from outside: whatever is wrong with it ends in one InputError that says so, never in wrong voxels.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialHeader

from synthseg.errors import InputError

try:  # reads several times faster than the standard library
    from isal import igzip

    _open_gzip: Any = igzip.open
except ImportError:
    _open_gzip = gzip.open

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh")
MAX_EXTENT_MM = 3000.0
MAX_VOXELS = 2**31  # 8 GB as float32: more than a head at 0.2 mm
_PLAUSIBLE_EXTENT_MM = (20.0, 3000.0)
_PERPENDICULAR = 0.1  # two axes whose cosine is larger are called sheared
_SAME_SIZE = 0.05  # relative difference of voxel sizes up to which two parts of a header agree
_MOST_DEFLATED = 1100  # deflate shrinks data to a 1032nd at best
_COMFORTABLE = (1e-25, 1e25)  # magnitudes of float32 that leave room for sums and products
_LARGEST_OFFSET = 1e4  # in units of the contrast; beyond, float32 would round the contrast off
_MOST_SAMPLED = 200_000
_NIFTI_UNITS = {1: ("metres", 1000.0), 3: ("microns", 0.001)}

# nibabel logs what it mends in a header; while a thread reads here, what matters of that becomes a remark or an error.
_READING = threading.local()
logging.getLogger("nibabel.global").addFilter(lambda record: not getattr(_READING, "quiet", False))


class ImageContent(NamedTuple):
    """Voxels float32 (D, H, W), affine to RAS+ mm, header, and what the user should know, one sentence each.

    ``rescaled``: the values had to be changed (`as_float32`).
    """

    data: np.ndarray
    affine: np.ndarray
    header: SpatialHeader | None
    warnings: tuple[str, ...]
    rescaled: bool


# -------------------------------------------------------------------------------------------------- names


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
        if not os.access(path, os.R_OK):
            raise InputError(f"{path}: may not be read (permission denied); check its permissions")
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if image_suffix(path) is None:
        raise InputError(f"{path}: not an image name; expected one that ends in {', '.join(IMAGE_SUFFIXES)}")
    if size == 0:
        raise InputError(f"{path}: the file is empty (0 bytes); copy or convert it again")


# ------------------------------------------------------------------------------------------------- reading


def read_image(path: Path) -> ImageContent:
    """Read and check one 3-D scan. Raises InputError on anything else."""
    check_readable(path)
    with _unreadable_as_input_error(path):
        image: Any = nib.load(path, mmap=False)
    shape = _spatial_shape(path, image)
    _check_dtype(path, image)
    affine, notes = _checked_affine(path, image, shape)
    _check_size(path, image, shape)
    with _unreadable_as_input_error(path), np.errstate(all="ignore"):
        values = _voxels(path, image).reshape(shape)
    _check_content(path, values)
    data, remark = as_float32(values)
    return ImageContent(data, affine, image.header.copy(), (*notes, *remark), bool(remark))


def check_image(
    values: np.ndarray, affine: np.ndarray, name: str, header: nib.Nifti1Header | None = None
) -> ImageContent:
    """Check voxels and an affine to RAS+ mm that are in memory already, as `read_image` does those of a file.

    ``name`` stands in for the path in messages, ``header`` is the one that the image came with.
    """
    path = Path(name)
    if affine.shape != (4, 4):
        raise InputError(f"{name}: its affine is of shape {affine.shape}; expected a 4 x 4 matrix of voxels to RAS+ mm")
    stated = header
    if stated is None:
        stated = nib.Nifti1Header()
        stated["sform_code"] = 1
        stated["pixdim"][1:4] = np.linalg.norm(affine[:3, :3].astype(np.float64), axis=0)
    image = SimpleNamespace(shape=values.shape, affine=affine, header=stated, get_data_dtype=lambda: values.dtype)
    shape = _spatial_shape(path, image)
    _check_dtype(path, image)
    if values.dtype.kind not in "biuf":
        raise InputError(f"{name}: holds values of type {values.dtype}; expected numbers")
    checked, notes = _checked_affine(path, image, shape)
    if math.prod(shape) > MAX_VOXELS:
        raise InputError(f"{name}: has {_by(shape)} voxels; resample it to larger voxels, or crop it to the head")
    values = values.reshape(shape)
    _check_content(path, values)
    data, remark = as_float32(
        values if values.dtype.kind == "f" or values.dtype.itemsize < 4 else values.astype(np.float64)
    )
    return ImageContent(data, checked, header, (*notes, *remark), bool(remark))


@contextlib.contextmanager
def _unreadable_as_input_error(path: Path) -> Iterator[None]:
    """Whatever the reading library raises on a damaged file is the file's fault: say so in one line."""
    _READING.quiet = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except PermissionError as error:
        raise InputError(f"{path}: may not be read (permission denied); check its permissions") from error
    except Exception as error:  # nibabel, NumPy and three gzip readers have dozens of kinds
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{path}: cannot be read as an image ({what}); expected a complete NIfTI or MGH file: "
            "copy or convert it again"
        ) from error
    finally:
        _READING.quiet = False


def _is_compressed(path: Path) -> bool:
    return path.name.lower().endswith((".gz", ".mgz"))


def _voxels(path: Path, image: Any) -> np.ndarray:
    """The scaled voxels, in the smallest floating-point type that holds them.

    nibabel stops where the voxels end, before the checksum of a gzip file: one that was damaged on the way would
    give wrong voxels without a word. So a compressed file is read to its end.
    """
    if not _is_compressed(path):
        return _scaled(image.dataobj)
    with _open_gzip(path, "rb") as stream:
        values = _scaled(type(image).from_stream(stream).dataobj)
        _read_to_the_end(stream)
    return values


def _scaled(proxy: Any) -> np.ndarray:
    """Float32 where it holds what the file says, else the type that nibabel chooses."""
    slope, inter = abs(float(proxy.slope)), abs(float(proxy.inter))
    plain = _COMFORTABLE[0] < slope < _COMFORTABLE[1] and inter <= _LARGEST_OFFSET * slope
    if plain and (proxy.dtype.itemsize <= 2 or proxy.dtype == np.float32):
        return np.asarray(proxy, dtype=np.float32)
    values = np.asarray(proxy)
    return values if values.dtype.kind == "f" and values.dtype.itemsize >= 4 else values.astype(np.float64)


def _read_to_the_end(stream: IO[bytes]) -> None:
    while stream.read(2**20):
        pass


def read_voxels(image: Any, name: str) -> np.ndarray:
    """The scaled voxels of a nibabel image, which may still lie in a file. Raises InputError if that is damaged."""
    with _unreadable_as_input_error(Path(name)), np.errstate(all="ignore"):
        values = np.asarray(image.dataobj)
        file = getattr(image.dataobj, "file_like", None)
        if isinstance(file, (str, os.PathLike)) and _is_compressed(Path(file)):
            with _open_gzip(file, "rb") as stream:  # to its checksum, as in `_voxels`
                _read_to_the_end(stream)
    return values


def as_float32(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Real values as float32 without loss of contrast, and a remark if they had to be changed for that.

    Values that float32 cannot hold, because they are huge, tiny, or lie close together far from zero, are brought
    to 0 to 1000. Single voxels beyond its range become infinite, which counts as damaged.
    """
    if values.dtype.itemsize < 4:
        return values.astype(np.float32), ()
    flat = values.reshape(-1)
    sample = flat[:: max(1, flat.size // _MOST_SAMPLED)].astype(np.float64)
    sample = sample[np.isfinite(sample)]
    if sample.size == 0:
        return values.astype(np.float32, copy=False), ()
    low, high = np.percentile(sample, [0.5, 99.5])
    if low == high:
        low, high = sample.min(), sample.max()
    largest, half = float(max(abs(low), abs(high))), float(high / 2 - low / 2)  # the range itself may overflow
    fits = largest < _COMFORTABLE[1] and half > _COMFORTABLE[0] and largest <= _LARGEST_OFFSET * half
    with np.errstate(all="ignore"):
        if fits or half == 0:
            return values.astype(np.float32, copy=False), ()
        moved = (values.astype(np.float64) / half - low / half) * 500.0
        remark = f"its values ({low:.8g} to {high:.8g}) are too large, too small or too far from zero for the program"
        return moved.astype(np.float32), (f"{remark}; they were brought to 0 to 1000",)


# -------------------------------------------------------------------------------------------------- checks


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
            f"{path}: holds {math.prod(shape[3:])} volumes ({got}); expected one 3-D scan: "
            "extract a volume or average them first"
        )
    return shape[0], shape[1], shape[2]


def _check_dtype(path: Path, image: Any) -> None:
    dtype = image.get_data_dtype()
    if dtype.fields is not None or dtype.kind == "V":
        raise InputError(f"{path}: holds RGB colours; expected one number per voxel: convert it to greyscale first")
    if dtype.kind == "c":
        raise InputError(f"{path}: holds complex numbers; expected real ones: save the magnitude image")


def _check_size(path: Path, image: Any, shape: tuple[int, int, int]) -> None:
    """Refuse what cannot be whole, or cannot fit, before memory is asked for."""
    got = " x ".join(map(str, shape))
    if math.prod(shape) > MAX_VOXELS:
        raise InputError(
            f"{path}: has {got} voxels; expected at most {MAX_VOXELS / 1e9:.1f} thousand million: "
            "resample it to larger voxels, or crop it to the head"
        )
    if isinstance(image.header, nib.Nifti1Header) and bytes(image.header["magic"])[:2] == b"ni":
        raise InputError(
            f"{path}: is the header of a pair of files (.hdr and .img); expected one file: convert it to .nii.gz"
        )
    promised = int(image.dataobj.offset) + math.prod(shape) * image.dataobj.dtype.itemsize
    stored = path.stat().st_size
    if stored * (_MOST_DEFLATED if _is_compressed(path) else 1) < promised:
        raise InputError(
            f"{path}: cannot be read as an image (its header promises {promised} bytes for {got} voxels, the file "
            f"has {stored}); expected a complete NIfTI or MGH file: copy or convert it again"
        )


def _check_content(path: Path, values: np.ndarray) -> None:
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        finite = values[np.isfinite(values)]
        if finite.size == 0:
            raise InputError(f"{path}: holds no finite voxel (all NaN or infinite); expected a scan: export it again")
        low, high = float(finite.min()), float(finite.max())
    if low == high:
        raise InputError(f"{path}: every voxel is {low:g}; expected a scan with contrast: export it again")


# ------------------------------------------------------------------------------------------------ geometry


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
    header = image.header
    notes = _disagreements(header, affine, shape) if isinstance(header, nib.Nifti1Header) else []
    affine, remarks = _in_mm(header, affine, shape)
    notes += remarks
    low, longest = _PLAUSIBLE_EXTENT_MM[0], _longest_mm(affine, shape)
    if longest > MAX_EXTENT_MM:
        raise InputError(
            f"{path}: the field of view is {longest:.0f} mm long; expected at most {MAX_EXTENT_MM:.0f} mm: "
            "correct the voxel size in the header"
        )
    if longest < low:
        notes.append(f"the field of view is only {longest:.3g} mm long; check the voxel size in the header")
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(cosines.T @ cosines - np.eye(3)).max() > _PERPENDICULAR:
        notes.append("the axes are not perpendicular (a tilted gantry?); the shear is ignored")
    if _states_no_orientation(path, header):
        notes.append("the header states no orientation; left and right may be swapped")
    return affine, tuple(notes)


def _longest_mm(affine: np.ndarray, shape: Sequence[int]) -> float:
    return float((np.linalg.norm(affine[:3, :3], axis=0) * shape).max())


def _in_mm(header: SpatialHeader, affine: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, list[str]]:
    """Metres and microns as mm, where that gives the size of a head; many headers name a unit that they do not use."""
    code = int(header["xyzt_units"]) & 7 if isinstance(header, nib.Nifti1Header) else 0
    if code not in _NIFTI_UNITS:
        return affine, []
    unit, mm_per_unit = _NIFTI_UNITS[code]
    low, high = _PLAUSIBLE_EXTENT_MM
    if low <= _longest_mm(affine, shape) <= high:
        return affine, [f"the header gives positions in {unit}, but they are those of a head in mm; taken as mm"]
    converted = affine.copy()
    converted[:3] *= mm_per_unit
    return converted, [f"the header gives positions in {unit}; converted to mm"]


def _disagreements(header: nib.Nifti1Header, affine: np.ndarray, shape: Sequence[int]) -> list[str]:
    """Remarks on parts of a NIfTI header that contradict the affine that is used: sform if set, else qform.

    An sform that moves the scan into another space, such as that of a template, is no contradiction.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    pixdim = np.abs(np.asarray(header["pixdim"][1:4], dtype=np.float64))
    sizes_agree = np.abs(pixdim / spacing - 1).max() <= _SAME_SIZE
    codes = int(header["qform_code"]), int(header["sform_code"])
    if min(codes) > 0:
        qform = stated_qform(header)
        if qform is None:
            return ["the qform of the header is damaged; the sform is used"]
        ours, theirs = nib.aff2axcodes(affine), nib.aff2axcodes(qform)
        if ours != theirs:
            words = f"qform {''.join(map(str, theirs))}, sform {''.join(map(str, ours))}"
            return [f"the header gives two orientations ({words}); the sform is used: check left and right"]
        corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij"), -1).reshape(-1, 3)
        apart = np.linalg.norm(nib.affines.apply_affine(affine - qform, corners), axis=1).max()
        if codes[0] == codes[1] and apart > spacing.max() and sizes_agree:
            return [f"qform and sform of the header lie up to {apart:.3g} mm apart; the sform is used"]
    if not sizes_agree and (pixdim > 0).all() and np.isfinite(pixdim).all():
        return [
            f"the header gives two voxel sizes ({_by(pixdim)} and, by its sform, {_by(spacing)}); the sform is used, "
            "for volumes too"
        ]
    return []


def stated_qform(header: nib.Nifti1Header) -> np.ndarray | None:
    """The qform, in the unit of the header; None if it is damaged."""
    try:
        qform = np.asarray(header.get_qform(), dtype=np.float64)
    except (ValueError, nib.spatialimages.HeaderDataError):
        return None
    return qform if np.isfinite(qform).all() else None


def _states_no_orientation(path: Path, header: SpatialHeader) -> bool:
    if isinstance(header, nib.Nifti1Header):
        return bool(header["qform_code"] == header["sform_code"] == 0)
    with _unreadable_as_input_error(path), (_open_gzip if _is_compressed(path) else open)(path, "rb") as stream:
        return int.from_bytes(stream.read(30)[28:30], "big") != 1  # the "good RAS" flag of MGH, which nibabel sets


def _by(numbers: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{x:.3g}" for x in numbers)
