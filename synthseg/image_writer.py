"""How image files are written: gzip by the fastest library at hand, voxels in the order of the file, class by class.

NIfTI and MGH store the first array axis fastest. An array that is laid out otherwise is turned round plane by plane,
several times faster than NumPy does it in one go; the library's writer then has nothing left to gather.
"""

from __future__ import annotations

import gzip
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage

try:  # five to ten times faster than the standard library, at the same size
    from isal import igzip, isal_zlib

    _GzipFile: Any = igzip.IGzipFile
    _deflate: Any = isal_zlib
    _LEVEL = 2
except ImportError:  # no wheel for this machine
    _GzipFile, _deflate, _LEVEL = gzip.GzipFile, zlib, 1

_PLANES = 32  # of the last axis, turned round and written at once


@contextmanager
def open_image(path: str | Path) -> Iterator[Any]:
    """A file to write an image to, compressed if its name ends in .gz or .mgz.

    Neither time nor name go into the gzip header: the same voxels give the same bytes.
    """
    path = Path(path)
    with open(path, "wb") as raw:
        if path.name.lower().endswith((".gz", ".mgz")):
            with _GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=raw, mtime=0) as compressed:
                yield compressed
        else:
            yield raw


def fortran_order(data: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
    """The array (D, H, W) as a type, laid out with its first axis fastest; itself if it is so already."""
    if data.flags.f_contiguous:
        return data.astype(dtype, order="F", copy=False)
    turned = np.empty(data.shape[::-1], dtype=dtype)
    for h in range(data.shape[1]):  # a plane fits into the cache, a volume does not
        turned[:, h] = data[:, h].T
    return turned.T


def write_image(image: SpatialImage, path: str | Path) -> None:
    """Write a nibabel image in the format of its class."""
    with open_image(path) as file:
        image.to_file_map({"image": nib.FileHolder(fileobj=file)})


def write_classes(
    path: str | Path, header: nib.Nifti1Header, dtype: np.dtype | type, slabs: Iterable[tuple[slice, np.ndarray]]
) -> None:
    """Write a 4-D NIfTI (D, H, W, C) from slabs along its *first* axis, in bounded memory.

    The file wants one class after the other, each whole. So each class of each slab is compressed into a temporary
    file beside the target (without a name, gone with the process), and read back class by class. Held at once are one
    slab and one class.

    Parameters
    ----------
    header : with the shape (D, H, W, C) and the type ``dtype``.
    slabs : slices of the first axis and what fills them, (C, d, H, W); together they fill the axis.
    """
    n_first, n_second, n_third, n_classes = (int(n) for n in header.get_data_shape())
    with tempfile.TemporaryFile(dir=Path(path).parent) as spool:
        parts: list[list[tuple[slice, int]]] = [[] for _ in range(n_classes)]
        for where, slab in slabs:
            for index in range(n_classes):
                part = np.ascontiguousarray(slab[index], dtype=dtype)
                if part.any():  # most classes are absent from most slabs
                    packed = _deflate.compress(part, 1)
                    spool.write(packed)
                    parts[index].append((where, len(packed)))
                else:
                    parts[index].append((where, 0))
        _write_spooled(Path(path), header, np.dtype(dtype), spool, parts, (n_first, n_second, n_third))


def _write_spooled(
    path: Path,
    header: nib.Nifti1Header,
    dtype: np.dtype,
    spool: IO[bytes],
    parts: list[list[tuple[slice, int]]],
    shape: tuple[int, int, int],
) -> None:
    """Second half of `write_classes`; the spool holds the parts slab by slab, in each the classes in order."""
    sizes = np.array([[size for _, size in of_class] for of_class in parts], dtype=np.int64)  # (C, slabs)
    starts = (np.cumsum(sizes.T) - sizes.T.ravel()).reshape(sizes.T.shape).T
    with open_image(path) as file:
        header.write_to(file)
        file.write(b"\0" * (int(header.get_data_offset()) - file.tell()))
        for of_class, begins in zip(parts, starts, strict=True):
            volume = np.zeros(shape, dtype=dtype)
            for (where, size), begin in zip(of_class, begins, strict=True):
                if size:
                    spool.seek(int(begin))
                    flat = np.frombuffer(_deflate.decompress(spool.read(size)), dtype=dtype)
                    volume[where] = flat.reshape(-1, *shape[1:])
            for plane in range(0, shape[2], _PLANES):
                file.write(fortran_order(volume[:, :, plane : plane + _PLANES], dtype).tobytes(order="F"))
