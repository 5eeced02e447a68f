"""`synthseg.segment`: one call from an image in memory, or its path, to its segmentation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import nibabel as nib
import numpy as np
import torch

from synthseg.devices import resolve_device
from synthseg.errors import ConfigError, InputError, LabelError, SynthSegError
from synthseg.image_files import check_image, read_voxels
from synthseg.inference import Mode, Options, Segmentation
from synthseg.inference import segment as segment_volume
from synthseg.memory import as_shortage
from synthseg.networks.checkpoint import Model, load_model, model_path
from synthseg.outputs import relabelled, target_table
from synthseg.volume import Volume, load_volume

if TYPE_CHECKING:
    import SimpleITK
    import torchio

Image: TypeAlias = (
    "str | os.PathLike[str] | Volume | nib.spatialimages.SpatialImage | tuple[Any, Any] "
    "| SimpleITK.Image | torchio.Image"
)
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def segment(
    image: Image,
    *,
    model: str | Path | Model = "siam16",
    device: str | torch.device = "auto",
    mode: Mode = "default",
    voxel_size_mm: float | None = None,
    crop_mm: float | Sequence[float] | None = None,
    scheme: str | None = None,
    threads: int | None = None,
    keep_posteriors: bool = False,
    quality: bool = True,
) -> Segmentation:
    """Segment one head or brain scan of any contrast, resolution, orientation and field of view.

    Parameters
    ----------
    image : path of a NIfTI or MGH file, `synthseg.Volume`, nibabel image, ``(array, affine)`` with the affine from
        voxel indices to RAS+ mm, SimpleITK image, or torchio image. It is not modified.
    model : name of a model that ships, path of a weights file, or what `synthseg.load_model` returned. A file is read
        once and kept as long as the calls name the same one.
    device : ``auto`` (CUDA, else MPS, else CPU), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
    mode : ``fast`` for less time, ``robust`` for the mean of several looks at the scan.
    voxel_size_mm : voxel size of the grid that the network takes for its own; 0.75 enlarges the head of an infant.
    crop_mm : analyse only a box of this size about the middle of the head: one side, or three (right, anterior,
        superior).
    scheme : name the labels by another, coarser scheme, such as ``siam16`` for a model of more structures.
    threads : CPU threads during this call; default: as PyTorch is set.
    keep_posteriors : keep the probabilities, as ``posteriors`` of the result.
    quality : judge the result without a reference.

    Raises
    ------
    synthseg.errors.SynthSegError
        Or rather one of its kinds: InputError for an image that cannot be used, CheckpointError for a model, LabelError
        for a scheme, DeviceError for a device, MemoryShortageError, ConfigError for any other argument.
    """
    options = Options(
        mode=mode,
        voxel_size_mm=None if voxel_size_mm is None else _voxel_size(voxel_size_mm),
        crop_mm=None if crop_mm is None else _box(crop_mm),
        quality=quality,
        keep_posteriors=keep_posteriors or scheme is not None,
    )
    if threads is not None and not (isinstance(threads, (int, np.integer)) and threads >= 1):
        raise ConfigError(f"threads={threads!r}; expected a whole number, 1 or more")
    if scheme is not None and not isinstance(scheme, (str, os.PathLike)):
        raise LabelError(f"scheme={scheme!r}; expected the name of a scheme, for example 'siam16'")
    torch_device = resolve_device(str(device))
    with _refused_memory_named(), _threads(threads):
        volume = as_volume(image)
        loaded = _loaded(model, torch_device) if isinstance(model, (str, Path)) else model
        if scheme is not None:
            target_table(loaded.labels, scheme)
        result = segment_volume(volume, loaded, torch_device, options)
        if scheme is not None:
            result = relabelled(result, scheme)
    if not keep_posteriors:
        result.posteriors = None
    return result


def _voxel_size(voxel_size_mm: float) -> float:
    try:
        return float(voxel_size_mm)
    except (TypeError, ValueError):
        raise ConfigError(f"voxel_size_mm={voxel_size_mm!r}; expected a number of mm, for example 0.75") from None


def _box(crop_mm: float | Sequence[float]) -> tuple[float, float, float]:
    try:
        sides = [float(side) for side in np.atleast_1d(np.asarray(crop_mm, dtype=np.float64))]
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 3):
        raise ConfigError(f"crop_mm is one side of the box in mm, or three; got {crop_mm!r}")
    return (sides[0], sides[0], sides[0]) if len(sides) == 1 else (sides[0], sides[1], sides[2])


@contextmanager
def _refused_memory_named() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError, OSError, SynthSegError) as error:
        shortage = as_shortage(error)
        if shortage is None:
            raise
        raise shortage from error


def _loaded(model: str | Path, device: torch.device) -> Model:
    path = model_path(model)
    state = path.stat()
    return _load(path.resolve(), state.st_mtime_ns, state.st_size, str(device))


@lru_cache(maxsize=2)
def _load(path: Path, changed_ns: int, size: int, device: str) -> Model:
    """A model, read again if its file has changed."""
    return load_model(path, device)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------- images


def as_volume(image: Image) -> Volume:
    """A checked volume of what `segment` takes. Raises InputError on what cannot be a scan."""
    if isinstance(image, (str, os.PathLike)):
        return load_volume(Path(image))
    if isinstance(image, Volume):
        checked = _checked(image.data, image.affine, "the volume")
        remarks = [*image.warnings, *(x for x in checked.warnings if x not in image.warnings)]
        return Volume(checked.data, checked.affine, image.header, tuple(remarks), image.rescaled or checked.rescaled)
    if isinstance(image, nib.spatialimages.SpatialImage):
        return _of_nibabel(image)
    kind = {base.__module__.partition(".")[0] for base in type(image).__mro__}
    if "SimpleITK" in kind:
        return _of_simpleitk(image)
    if "torchio" in kind:
        return _of_torchio(image)
    if isinstance(image, (tuple, list)) and len(image) == 2:
        return _checked(image[0], image[1], "the array")
    raise InputError(
        f"an image of type {type(image).__module__}.{type(image).__name__} cannot be segmented; expected a path, "
        "(array, affine), or an image of nibabel, SimpleITK or torchio"
    )


def _checked(data: Any, affine: Any, name: str, header: nib.Nifti1Header | None = None) -> Volume:
    if isinstance(data, torch.Tensor) and data.dtype == torch.bfloat16:  # which NumPy does not have
        data = data.float()
    try:
        values = data.detach().cpu().numpy() if isinstance(data, torch.Tensor) else np.asarray(data)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: holds no numbers on a grid ({error}); expected a 3-D array") from None
    try:
        matrix = np.asarray(affine, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: its affine is no matrix ({error}); expected 4 x 4, voxels to RAS+ mm") from None
    return Volume(*check_image(values, matrix, name, header))


def _of_nibabel(image: nib.spatialimages.SpatialImage) -> Volume:
    name = image.get_filename() or "the nibabel image"
    if image.affine is None:
        raise InputError(f"{name}: has no affine; expected one from voxels to RAS+ mm")
    header = image.header if isinstance(image.header, nib.Nifti1Header) else None
    return _checked(read_voxels(image, name), image.affine, name, None if header is None else header.copy())


def _of_simpleitk(image: Any) -> Volume:
    """ITK counts axes x, y, z and positions left, posterior, superior; its arrays are z, y, x."""
    import SimpleITK

    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(
            f"the SimpleITK image: has {image.GetDimension()} dimensions and "
            f"{image.GetNumberOfComponentsPerPixel()} components a voxel; expected a 3-D scan of one"
        )
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return _checked(SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), _LPS_TO_RAS @ affine, "the SimpleITK image")


def _of_torchio(image: Any) -> Volume:
    """TorchIO's tensors are (C, X, Y, Z), its affines go to RAS+ mm."""
    if len(image.data) != 1:
        raise InputError(f"the torchio image: has {len(image.data)} channels; expected a scan of one")
    return _checked(image.data[0], image.affine, "the torchio image")
