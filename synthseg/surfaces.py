"""Surfaces of structures, from probabilities on the network's own grid: where a structure is likelier than not.

The surface runs through the voxels (marching cubes after Lewiner et al. 2003, at probability 0.5), is closed, also
where the structure leaves the field of view, and its triangles turn outward. Positions are RAS+ mm, those of the scan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from synthseg.errors import InputError, OutputError
from synthseg.labels import BRAIN_TISSUES, LabelTable, tissue_mask
from synthseg.posteriors import Posteriors
from synthseg.volume import atomic_path

MESH_SUFFIXES = (".surf.gii", ".gii", ".stl")
BONE_TISSUES = frozenset({"bone_cortical", "bone_cancellous"})
LEVEL = 0.5
SMALLEST_PIECE = 0.01  # of the largest piece of brain, skull or head; what is smaller would fall out of a print
_OFF_LEVEL = 1e-3  # no value is closer to the level than this, so that no triangle shrinks to a point
_STL_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])


@dataclass(frozen=True, eq=False)
class Surface:
    """Triangles in space.

    Attributes
    ----------
    vertices_mm : (V, 3), RAS+ mm, float32.
    triangles : (T, 3), indices of vertices, counter-clockwise seen from outside, int32.
    """

    vertices_mm: np.ndarray
    triangles: np.ndarray

    @property
    def volume_ml(self) -> float:
        """What the surface encloses; cavities are not counted."""
        a, b, c = (self.vertices_mm[self.triangles[:, corner]].astype(np.float64) for corner in range(3))
        return float(np.einsum("ij,ij->", a, np.cross(b, c))) / 6000.0


# --------------------------------------------------------------------------------------------- structures


def surface(posteriors: Posteriors, structure: str) -> Surface:
    """The surface of a structure.

    Parameters
    ----------
    structure : the name of a label, or ``brain`` (all of it with its ventricles), ``skull`` (bone with its cavities,
        inside and outside) or ``head`` (its outside only). Case does not matter.

    Raises OutputError if there is no such structure, InputError if no voxel of the scan is it likelier than not.
    """
    classes, prepare = _recipe(structure, posteriors.table)
    inside = np.zeros(posteriors.values.shape[1:], dtype=np.float32)
    for index in np.flatnonzero(classes):
        inside += posteriors.values[index].cpu().numpy()
    prepare(inside)
    return isosurface(inside, posteriors.affine, structure)


def check_structure(structure: str, table: LabelTable) -> None:
    """Raise OutputError unless a surface of the structure can be made from the labels of a scheme."""
    _recipe(structure, table)


def structure_ids(structure: str, table: LabelTable) -> list[int]:
    """The ids of a label, or of those that make up ``brain``, ``skull`` or ``head``."""
    classes, _ = _recipe(structure, table)
    return [int(label_id) for label_id in table.ids[classes]]


def _recipe(structure: str, table: LabelTable) -> tuple[np.ndarray, Callable[[np.ndarray], object]]:
    """The classes of a structure, bool (C,), and what is done to their probability, in place."""
    key = structure.lower()
    foreground = np.arange(len(table)) > 0
    groups: dict[str, tuple[np.ndarray, Callable[[np.ndarray], object]]] = {
        "brain": (foreground & tissue_mask(table, BRAIN_TISSUES), _solid),
        "skull": (foreground & tissue_mask(table, BONE_TISSUES), _without_specks),
        "head": (foreground, _solid),
    }
    if key in groups:
        classes, prepare = groups[key]
    else:
        classes, prepare = np.array([name.lower() == key for name in table.names]) & foreground, lambda inside: None
    if not classes.any():
        known = ", ".join([*(name for name, (some, _) in groups.items() if some.any()), *table.names[1:]])
        raise OutputError(f"there is no structure '{structure}' to make a surface of; choose from {known}")
    return classes, prepare


def _solid(inside: np.ndarray) -> None:
    """Fill cavities and drop specks, in place: an outer surface is what remains."""
    box = _without_specks(inside)
    if box is None:
        return
    within = inside[box]
    filled = ndimage.binary_fill_holes(within > LEVEL)
    within[filled & (within <= LEVEL)] = 1.0


def _without_specks(inside: np.ndarray) -> tuple[slice, ...] | None:
    """Lower pieces that are much smaller than the largest below the level, in place; the box of what is left."""
    found = ndimage.find_objects((inside > LEVEL).astype(np.uint8))
    if not found:
        return None
    within = inside[found[0]]
    pieces, n_pieces = ndimage.label(within > LEVEL)
    sizes = np.bincount(pieces.ravel(), minlength=n_pieces + 1)
    sizes[0] = 0
    small = sizes < SMALLEST_PIECE * sizes.max()
    small[0] = False
    within[small[pieces]] = 0.0
    return found[0]


# ---------------------------------------------------------------------------------------------- triangles


def isosurface(inside: np.ndarray, affine: np.ndarray, name: str = "the structure") -> Surface:
    """The closed surface at `LEVEL` of a probability (D, H, W), whose voxel indices ``affine`` maps to RAS+ mm.

    Beyond the array the probability is 0. Raises InputError if nothing exceeds the level.
    """
    from skimage.measure import marching_cubes

    box = ndimage.find_objects((inside > LEVEL).astype(np.uint8))
    if not box:
        raise InputError(f"no voxel of {name} is likelier than not, so that it has no surface; look at the labels")
    margin = [slice(max(0, side.start - 1), side.stop + 1) for side in box[0]]
    padded = np.pad(inside[tuple(margin)].astype(np.float32), 1)
    near = np.abs(padded - LEVEL) < _OFF_LEVEL
    padded[near] = np.where(padded[near] > LEVEL, LEVEL + _OFF_LEVEL, LEVEL - _OFF_LEVEL)
    vertices, triangles, _, _ = marching_cubes(padded, LEVEL)
    voxels = vertices.astype(np.float64) + np.array([side.start for side in margin]) - 1
    vertices_mm = (voxels @ affine[:3, :3].T + affine[:3, 3]).astype(np.float32)
    result = Surface(vertices_mm, triangles.astype(np.int32))
    return result if result.volume_ml > 0 else Surface(vertices_mm, np.ascontiguousarray(result.triangles[:, ::-1]))


# -------------------------------------------------------------------------------------------------- files


def write_surface(path: str | Path, surface: Surface, name: str = "") -> None:
    """Write a surface as GIFTI (``.gii``) or binary STL (``.stl``), in RAS+ mm. Written whole or not at all."""
    check_mesh_name(path)
    with atomic_path(path) as temporary:
        if str(path).lower().endswith(".gii"):
            nib.save(_gifti(surface, name), temporary)
        else:
            with open(temporary, "wb") as file:
                file.write(_stl(surface, name))


def check_mesh_name(path: str | Path) -> None:
    """Raise OutputError unless the name says which format a surface is to have."""
    if not str(path).lower().endswith(MESH_SUFFIXES):
        raise OutputError(f"{path}: not the name of a surface; end it in {' or '.join(MESH_SUFFIXES)}")


def _gifti(surface: Surface, name: str) -> nib.gifti.GiftiImage:
    """Coordinates in scanner space, as the NIfTI code of the scan's own affine says."""
    scanner = nib.nifti1.xform_codes.code["scanner"]
    points = nib.gifti.GiftiDataArray(
        surface.vertices_mm.astype(np.float32),
        intent="NIFTI_INTENT_POINTSET",
        datatype="NIFTI_TYPE_FLOAT32",
        coordsys=nib.gifti.GiftiCoordSystem(scanner, scanner),
        meta=nib.gifti.GiftiMetaData(Name=name, GeometricType="Anatomical"),
    )
    triangles = nib.gifti.GiftiDataArray(
        surface.triangles.astype(np.int32),
        intent="NIFTI_INTENT_TRIANGLE",
        datatype="NIFTI_TYPE_INT32",
        coordsys=None,
        meta=nib.gifti.GiftiMetaData(TopologicalType="Closed"),
    )
    return nib.gifti.GiftiImage(darrays=[points, triangles])


def _stl(surface: Surface, name: str) -> bytes:
    """Binary STL: a header of 80 bytes that must not begin with "solid", the number of triangles, the triangles.

    STL knows no coordinate system; 3D Slicer takes LPS unless it finds ``SPACE=RAS`` in the header.
    """
    corners = surface.vertices_mm[surface.triangles]
    records = np.zeros(len(corners), dtype=_STL_TRIANGLE)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    records["normal"] = normals / np.where(lengths > 0, lengths, 1)
    records["corners"] = corners
    header = f"binary STL, mm. SPACE=RAS {name}".encode("ascii", "replace")[:80].ljust(80)
    return header + np.uint32(len(records)).astype("<u4").tobytes() + records.tobytes()
