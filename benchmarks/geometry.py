"""Landmarks through `segment`, from file to file, under random geometry: how far from their place do they come back?

    python benchmarks/geometry.py [--n 500] [--seed 0] [--out FILE.json]

Each case draws an affine (all 48 orientations in turn; oblique, sheared, anisotropic, mirrored, far from the origin),
the way a header states it (sform, qform, both, two that disagree; mm, metres, microns), a file format and a number
type, and writes a scan of six bright balls at known positions in mm. A stand-in for the network labels what is bright
by the direction in which it lies from the middle of what it is given, so that a mirrored or turned input is seen too.
The label map is written, read again with nibabel alone, and the centre of each label compared with the ball's place.
A case is wrong if a ball is lost, has another label, or lies more than half a voxel away along any axis of the grid; on
the scan's own grid, and on a second grid of another voxel size.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from synthseg.inference import Options, segment
from synthseg.labels import Label, LabelTable
from synthseg.posteriors import spacing_grid
from synthseg.volume import load_volume, save_label_map

DIRECTIONS = ("Left", "Right", "Posterior", "Anterior", "Inferior", "Superior")
IDS = {name: 3 * index + 3 for index, name in enumerate(DIRECTIONS)}
TABLE = LabelTable(
    "directions",
    (Label(0, "Background", tissue="air"), *(Label(IDS[name], name, tissue="soft") for name in DIRECTIONS)),
)
DISTANCE_MM = np.array([31.0, 28.0, 34.0, 30.0, 27.0, 32.0])  # of each ball from the middle
RADIUS_MM = 9.0
SIDE_MM = 92.0  # of the field of view
NETWORK_MM = 2.0
MM_PER_UNIT = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}
FORMATS = (".nii", ".nii.gz", ".mgz")
TYPES = ("u1", "i1", "u2", "i2", "i4", "u4", "i8", "u8", "f4", "f8")
MGH_TYPES = ("u1", "i2", "i4", "f4")


class Directions(torch.nn.Module):
    """Bright voxels get the label of the direction from the middle of the input, (B, 1, D, H, W) in RAS+ order."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in image.shape[2:]]
        x, y, z = torch.meshgrid(*axes, indexing="ij")
        direction = torch.stack([-x, x, -y, y, -z, z]).argmax(0)
        inside = torch.nn.functional.one_hot(direction, 6).movedim(-1, 0)[None].to(image)
        logit = 16 * (image - 0.5)
        return torch.cat([-logit, torch.where(inside > 0, logit, -30.0)], 1)


@dataclass(frozen=True)
class StandIn:
    """What `segment` needs of a model."""

    network: torch.nn.Module
    labels: LabelTable = TABLE
    voxel_size_mm: float = NETWORK_MM
    window: tuple[int, int, int] = (24, 24, 24)
    multiple: int = 4
    name: str = "directions"
    sha256: str = "none"


MODEL = StandIn(Directions())


@dataclass(frozen=True)
class Case:
    """One file and what is asked of it.

    Attributes
    ----------
    orientation : 0 to 47: the order and the signs of the axes.
    angles_deg : rotation about R, A and S, on top of it.
    shear : of the second axis along the first, the third along the first, and the third along the second.
    header : "sform", "qform", "both", or "disagree": a qform that says something else than the sform.
    slope, inter : scaling in the header (NIfTI); 1 and 0 for none.
    other_mm : voxel size of the second grid.
    """

    orientation: int = 0
    angles_deg: tuple[float, float, float] = (0.0, 0.0, 0.0)
    shear: tuple[float, float, float] = (0.0, 0.0, 0.0)
    spacing_mm: tuple[float, float, float] = (2.0, 2.0, 2.0)
    offset_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    header: str = "sform"
    unit: str = "mm"
    suffix: str = ".nii"
    dtype: str = "f4"
    big_endian: bool = False
    slope: float = 1.0
    inter: float = 0.0
    other_mm: float = 1.7

    @property
    def affine(self) -> np.ndarray:
        """Voxel indices to RAS+ mm, before it is rounded to what the header can hold."""
        order = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)][self.orientation % 6]
        signs = [1 - 2 * (self.orientation // 6 >> bit & 1) for bit in range(3)]
        upper = np.eye(3)
        upper[0, 1], upper[0, 2], upper[1, 2] = self.shear
        turn = Rotation.from_euler("xyz", self.angles_deg, degrees=True).as_matrix()
        axes = turn @ np.eye(3)[list(order)].T @ np.diag(signs) @ upper
        affine = np.eye(4)
        affine[:3, :3] = axes / np.linalg.norm(axes, axis=0) * np.array(self.spacing_mm)
        affine[:3, 3] = self.offset_mm
        return affine

    @property
    def shape(self) -> tuple[int, int, int]:
        d, h, w = (round(SIDE_MM / step) for step in self.spacing_mm)
        return d, h, w


@dataclass(frozen=True)
class Outcome:
    """What came back: the largest distance of a landmark, in mm and in voxels along an axis, and what was wrong."""

    worst_mm: float
    worst_voxels: float
    worst_voxels_other: float
    problems: tuple[str, ...]
    axcodes: str


# ------------------------------------------------------------------------------------------------- writing


def stored_affine(case: Case) -> np.ndarray:
    """The affine as the file holds it, in float32, back in mm."""
    if case.suffix == ".mgz":
        return np.asarray(nib.MGHImage(np.zeros(case.shape, np.float32), case.affine).affine, dtype=np.float64)
    unit = MM_PER_UNIT[case.unit]
    header = _header(case)
    affine = header.get_qform() if case.header == "qform" else header.get_sform()
    affine = np.array(affine, dtype=np.float64)
    affine[:3] *= unit
    return affine


def _header(case: Case) -> nib.Nifti1Header:
    header = nib.Nifti1Header(endianness=">" if case.big_endian else "<")
    header.set_data_dtype(np.dtype(case.dtype))
    header.set_data_shape(case.shape)
    header.set_xyzt_units(case.unit)
    affine = case.affine
    affine[:3] /= MM_PER_UNIT[case.unit]
    if case.header == "qform":
        header.set_qform(affine, 1, strip_shears=True)
        header.set_sform(None, 0)
    else:
        header.set_qform(affine, 0)  # sets the zooms
        if case.header == "both":
            header.set_qform(affine, 1)
        if case.header == "disagree":
            header.set_qform(np.diag([-1.0, 1.0, 1.0, 1.0]) @ affine, 1)
        header.set_sform(affine, 2)
    return header


def places(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Where the balls lie, mm (6, 3): from the middle of the grid along the axes of the nearest RAS+ order."""
    data = np.broadcast_to(np.float32(0), shape)
    ras = nib.as_closest_canonical(nib.Nifti1Image(data, affine)).affine[:3, :3]
    along = (ras / np.linalg.norm(ras, axis=0)).T  # the direction of R, A and S, one a row
    middle = affine[:3, :3] @ (np.array(shape) - 1) / 2 + affine[:3, 3]
    signs = np.array([-1, 1] * 3)
    return middle + (signs * DISTANCE_MM)[:, None] * along[[0, 0, 1, 1, 2, 2]]


def picture(affine: np.ndarray, shape: tuple[int, int, int], centres_mm: np.ndarray) -> np.ndarray:
    """Balls of intensity 1 in a field of 0, (D, H, W), averaged over each voxel."""
    fine = [max(1, int(np.ceil(step))) for step in np.linalg.norm(affine[:3, :3], axis=0)]
    inverse = np.linalg.inv(affine[:3, :3])
    reach = (RADIUS_MM + 2) * np.linalg.norm(inverse, axis=1) + 1
    data = np.zeros(shape, np.float32)
    for centre in centres_mm:
        middle = inverse @ (centre - affine[:3, 3])
        sides = [
            slice(max(0, int(m - r)), min(n, int(m + r) + 2)) for m, r, n in zip(middle, reach, shape, strict=True)
        ]
        index = np.stack(np.meshgrid(*[np.arange(side.start, side.stop) for side in sides], indexing="ij"), -1)
        for shift in np.ndindex(*fine):
            from_centre = (index + (np.array(shift) + 0.5) / fine - 0.5 - middle) @ affine[:3, :3].T
            inside = np.clip(0.5 + (RADIUS_MM - np.linalg.norm(from_centre, axis=-1)) / 2, 0, 1)
            data[tuple(sides)] += (inside / np.prod(fine)).astype(np.float32)
    return data


def write_scan(case: Case, folder: Path) -> Path:
    """The scan of a case, with its own header."""
    affine = stored_affine(case)
    balls = picture(affine, case.shape, places(affine, case.shape))
    path = folder / f"scan{case.suffix}"
    dtype = np.dtype(case.dtype)
    top = 1000.0 if dtype.kind == "f" else min(1000, np.iinfo(dtype).max)
    data = balls * top if dtype.kind == "f" else np.round(balls * top)
    if case.suffix == ".mgz":
        nib.save(nib.MGHImage(data.astype(dtype), case.affine), path)
        return path
    header = _header(case)
    header.set_slope_inter(case.slope, case.inter)
    # Written by hand, so that nibabel neither rescales the numbers nor touches the affines.
    body = header.binaryblock[:344] + b"n+1\0" + bytes(4)
    raw = np.frombuffer(body, dtype=np.uint8).copy()
    offset = np.array([352.0], dtype=">f4" if case.big_endian else "<f4").tobytes()
    raw[108:112] = np.frombuffer(offset, np.uint8)
    stored = np.dtype(f"{'>' if case.big_endian else '<'}{case.dtype}")
    content = raw.tobytes() + data.astype(stored).tobytes(order="F")
    if case.suffix == ".nii.gz":
        content = gzip.compress(content, compresslevel=1, mtime=0)
    path.write_bytes(content)
    return path


# ------------------------------------------------------------------------------------------------- reading


def _distances(
    labels: np.ndarray, affine: np.ndarray, centres_mm: np.ndarray, where: str
) -> tuple[float, float, list[str]]:
    """Largest distance of a landmark from its place in mm and in voxels along an axis, and what is wrong."""
    problems = []
    present = set(np.unique(labels).tolist())
    if present != {0, *IDS.values()}:
        problems.append(f"{where}: the labels are {sorted(present)}, expected {[0, *IDS.values()]}")
    inverse = np.linalg.inv(affine[:3, :3])
    worst_mm = worst_voxels = 0.0
    for (name, label_id), centre in zip(IDS.items(), centres_mm, strict=True):
        if label_id not in present:
            continue
        found = np.array(ndimage.center_of_mass(labels == label_id))
        away_mm = affine[:3, :3] @ found + affine[:3, 3] - centre
        voxels = float(np.abs(inverse @ away_mm).max())
        worst_mm, worst_voxels = max(worst_mm, float(np.linalg.norm(away_mm))), max(worst_voxels, voxels)
        if voxels > 0.5:
            problems.append(f"{where}: {name} lies {voxels:.2f} voxels from its place")
    return worst_mm, worst_voxels, problems


def check(case: Case, folder: Path) -> Outcome:
    """Write, segment, read again, compare."""
    path = write_scan(case, folder)
    truth = stored_affine(case)
    centres_mm = places(truth, case.shape)
    volume = load_volume(path)
    result = segment(volume, MODEL, "cpu", Options(mixed_precision=False, quality=False, keep_posteriors=True))
    target = folder / f"labels{case.suffix}"
    save_label_map(target, result.labels, volume, [*IDS.values()])
    written = nib.load(target)
    affine = np.array(written.affine, dtype=np.float64)
    if isinstance(written, nib.Nifti1Image):
        affine[:3] *= MM_PER_UNIT[written.header.get_xyzt_units()[0]]
    problems = []
    if written.shape != case.shape:
        problems.append(f"the label map is {written.shape}, expected {case.shape}")
    if not np.allclose(affine, truth, rtol=1e-5, atol=1e-5 * (1 + np.abs(truth).max())):
        problems.append("the affine of the label map is not that of the scan")
    worst_mm, worst_voxels, found = _distances(np.asarray(written.dataobj), affine, centres_mm, "own grid")
    grid = spacing_grid(volume, case.other_mm)
    assert result.posteriors is not None  # asked for
    other = result.posteriors.labels_on(grid).labels
    other_mm, other_voxels, found_other = _distances(other, grid.affine, centres_mm, f"{case.other_mm:.2f} mm grid")
    axcodes = "".join(map(str, nib.aff2axcodes(truth)))
    return Outcome(max(worst_mm, other_mm), worst_voxels, other_voxels, (*problems, *found, *found_other), axcodes)


# ------------------------------------------------------------------------------------------------- drawing


def draw(index: int, rng: np.random.Generator) -> Case:
    """A random case; orientations in turn."""
    suffix = str(rng.choice(FORMATS))
    nifti = suffix != ".mgz"
    header = str(rng.choice(["sform", "qform", "both", "disagree"])) if nifti else "sform"
    spacing = np.exp(rng.uniform(np.log(0.9), np.log(4.5), 3))
    if rng.random() < 0.3:
        spacing[:] = spacing[0]  # isotropic
    oblique = rng.uniform(-1, 1, 3) * rng.choice([0.0, 10.0, 40.0])
    sheared = header == "sform" and rng.random() < 0.4
    shear = rng.uniform(-0.35, 0.35, 3) if sheared else np.zeros(3)
    return Case(
        orientation=index % 48,
        angles_deg=_triple(oblique),
        shear=_triple(shear),
        spacing_mm=_triple(spacing),
        offset_mm=_triple(rng.uniform(-1, 1, 3) * rng.choice([0.0, 200.0, 1e5])),
        header=header,
        unit=str(rng.choice(list(MM_PER_UNIT))) if nifti else "mm",
        suffix=suffix,
        dtype=str(rng.choice(TYPES if nifti else MGH_TYPES)),
        big_endian=bool(nifti and rng.random() < 0.3),
        slope=float(rng.choice([1.0, 0.01, 37.5])) if nifti else 1.0,
        inter=float(rng.choice([0.0, -1024.0, 5.0])) if nifti else 0.0,
        other_mm=float(np.exp(rng.uniform(np.log(0.9), np.log(3.0)))),
    )


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    a, b, c = (float(v) for v in values)
    return a, b, c


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500, help="cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write every case and its outcome as JSON")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for index in range(options.n):
            case = draw(index, rng)
            outcome = check(case, Path(folder))
            rows.append({"case": asdict(case), **asdict(outcome)})
            for problem in outcome.problems:
                print(f"case {index}: {problem}; {case}", flush=True)
    wrong = sum(bool(row["problems"]) for row in rows)
    summary = {
        "cases": len(rows),
        "wrong": wrong,
        "orientations": len({row["axcodes"] for row in rows}),
        "worst_mm": round(max(row["worst_mm"] for row in rows), 3),
        "worst_voxels": round(max(row["worst_voxels"] for row in rows), 3),
        "worst_voxels_other_grid": round(max(row["worst_voxels_other"] for row in rows), 3),
        "median_mm": round(float(np.median([row["worst_mm"] for row in rows])), 3),
    }
    print(json.dumps(summary, indent=2))
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**summary, "seed": options.seed, "rows": rows}, indent=1) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
