"""Files of features: 4-D NIfTI, NumPy or safetensors, each with the record of how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from synthseg.errors import OutputError
from synthseg.image_writer import write_classes
from synthseg.inputs import Scan
from synthseg.networks.checkpoint import save_tensors
from synthseg.volume import atomic_path, check_writable, image_stem

SUFFIXES = (".nii.gz", ".nii", ".npz", ".safetensors")
ENDING = "_features"


def file_suffix(path: Path) -> str | None:
    """The suffix of SUFFIXES that a name ends in, or None."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def target_files(scans: Sequence[Scan], output: Path, suffix: str, one_file: bool) -> list[Path]:
    """The file of each scan: ``output`` itself if there is one scan that was named, else one for each in that folder.

    Raises OutputError on a name that is neither.
    """
    if file_suffix(output) and not output.is_dir():
        if not one_file:
            raise OutputError(f"{output}: is a file name, but {len(scans)} scans are to be written; expected a folder")
        return [output]
    if output.suffix and not output.is_dir():
        raise OutputError(f"{output}: expected a name that ends in {', '.join(SUFFIXES)}, or a folder")
    return [output / f"{image_stem(scan.path)}{ENDING}{suffix}" for scan in scans]


def check_files(targets: Sequence[Path], sources: Sequence[Path], overwrite: bool) -> None:
    """Refuse, before anything is loaded, files that are inputs, would be written twice, exist or cannot be written."""
    inputs = {source.resolve() for source in sources}
    seen: set[Path] = set()
    for target in targets:
        real = target.resolve()
        if real in inputs:
            raise OutputError(f"{target}: is one of the inputs; choose another name for the output")
        if real in seen:
            raise OutputError(f"{target}: would be written twice; rename one of the scans, or use different folders")
        seen.add(real)
        if target.is_file() and not overwrite:
            raise OutputError(f"{target}: exists already; use --overwrite to replace it, or choose another name")
        check_writable(target)


def write_values(path: Path, values: torch.Tensor, affine: np.ndarray, record: Mapping[str, Any]) -> None:
    """Write features, float16 (C, d, h, w), in the format of the name, whole or not at all.

    ``.nii.gz`` and ``.nii``: shape (d, h, w, C). NIfTI knows no float16; the values are float32 with the digits of
    float16, the record is a header extension. ``.npz``: ``features`` (C, d, h, w) and ``affine``, and the record as
    JSON in ``record``. ``.safetensors``: the same two tensors, the record in its metadata.
    """
    suffix = file_suffix(path)
    if suffix is None:
        raise OutputError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
    if suffix in (".nii.gz", ".nii"):
        _write_nifti(path, values, affine, record)
    elif suffix == ".npz":
        with atomic_path(path) as temporary, open(temporary, "wb") as file:  # savez adds its own ending to a name
            np.savez_compressed(file, features=values.numpy(), affine=affine, record=np.array(json.dumps(dict(record))))
    else:
        save_tensors(path, {"features": values, "affine": torch.from_numpy(affine.copy())}, dict(record))


def _write_nifti(path: Path, values: torch.Tensor, affine: np.ndarray, record: Mapping[str, Any]) -> None:
    n_channels, *shape = values.shape
    header: Any = nib.Nifti1Header()
    header.set_data_shape((*shape, n_channels))
    header.set_data_dtype(np.float32)
    header.set_qform(affine, code="scanner")
    header.set_sform(affine, code="scanner")
    header.set_xyzt_units("mm")
    header.set_slope_inter(1, 0)
    header["pixdim"][4] = 1
    header["descrip"] = b"synthseg features"
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", json.dumps(dict(record)).encode()))
    header.set_data_offset(-(-(header.single_vox_offset + header.extensions.get_sizeondisk()) // 16) * 16)
    with atomic_path(path) as temporary:
        write_classes(temporary, header, np.float32, [(slice(0, shape[0]), values.numpy())])
