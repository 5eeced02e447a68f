"""Seconds, peak memory and share of each step of `synthseg segment`, as a whole process, for modes and sizes of scan.

    python benchmarks/bench_segment.py [SCAN ...] [--modes default fast robust] [--sizes 1 8 64 134] [--threads 2]
                                       [--package DIR] [--out FILE.json]

Without a scan: the bundled Colin27, the same in the middle of 256 x 256 x 256 voxels of 1 mm, and with ``--sizes`` the
same field of view in so many millions of voxels. Each is segmented by the command in a fresh process; the ratio is its
time over the time to read and write the scan alone with nibabel. ``--package`` names another checkout whose command is
timed in its place, such as an older one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from synthseg.paths import data_dir

ROOT = Path(__file__).resolve().parents[1]
START = "import sys; sys.path.insert(0, {path!r}); from synthseg.cli import main; main()"


def padded(scan: Path, target: Path, size: int = 256) -> Path:
    """The scan in the middle of a cube of ``size`` voxels."""
    image = nib.load(scan)
    data = np.asarray(image.dataobj)
    before = [(size - n) // 2 for n in data.shape]
    cube = np.pad(data, [(b, size - n - b) for b, n in zip(before, data.shape, strict=True)])
    affine = image.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ before
    nib.save(nib.Nifti1Image(cube, affine), target)
    return target


def resized(scan: Path, target: Path, million_voxels: float) -> Path:
    """The field of view of the scan in about so many voxels."""
    image = nib.load(scan)
    data = np.asarray(image.dataobj)
    zoom = (million_voxels * 1e6 / data.size) ** (1 / 3)
    finer = ndimage.zoom(data, zoom, order=1, grid_mode=True, mode="nearest")
    step = np.array(data.shape) / finer.shape
    affine = image.affine @ np.diag([*step, 1.0])
    affine[:3, 3] = (image.affine @ [*((step - 1) / 2), 1.0])[:3]
    nib.save(nib.Nifti1Image(finer, affine), target)
    return target


def measured(command: list[str], log: Path | None = None) -> tuple[float, float]:
    """Wall seconds and peak resident GB of a child process; what it says on stderr goes to ``log``."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    actions = [] if log is None else [(os.POSIX_SPAWN_OPEN, 2, str(log), flags, 0o600)]
    start = time.perf_counter()
    child = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed{'' if log is None else ': ' + log.read_text()}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6  # kilobytes on Linux


def steps_of(log: Path) -> dict[str, float]:
    """Seconds of each step, from the line that the command prints for a scan."""
    (inside,) = re.findall(r" s \((.*)\)", log.read_text())
    return {name: float(seconds) for name, seconds in (step.rsplit(" ", 1) for step in inside.split(", "))}


def copy_seconds(scan: Path, target: Path) -> float:
    """The bound: read the scan and write it back compressed."""
    start = time.perf_counter()
    image = nib.load(scan)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), target)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="*", type=Path)
    parser.add_argument("--model", default="siam16")
    parser.add_argument("--modes", nargs="+", default=["default"], choices=["default", "fast", "robust"])
    parser.add_argument("--sizes", nargs="*", type=float, default=[], help="millions of voxels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--package", type=Path, help="another checkout, whose command is timed")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        sample = data_dir("samples") / "colin27_t1.nii.gz"
        scans = options.scans or [sample, padded(sample, folder / "colin27_256.nii.gz")]
        scans += [resized(sample, folder / f"colin27_{size:g}M.nii.gz", size) for size in options.sizes]
        for scan, mode in [(scan, mode) for scan in scans for mode in options.modes]:
            bound = copy_seconds(scan, folder / "copy.nii.gz")
            command = [sys.executable, "-c", START.format(path=str(options.package or ROOT)), "segment", str(scan)]
            command += ["-o", f"{folder}/seg.nii.gz"]
            command += ["--overwrite", "--threads", str(options.threads), "--model", options.model, "--device", "cpu"]
            command += [] if mode == "default" else [f"--{mode}"]
            log = folder / "log.txt"
            seconds, peak_gb = measured(command, log)
            shape = nib.load(scan).shape
            row = {"scan": scan.name, "mode": mode, "shape": shape, "seconds": round(seconds, 1)}
            row |= {"peak_gb": round(peak_gb, 2), "copy_seconds": round(bound, 2), "ratio": round(seconds / bound, 1)}
            rows.append({**row, "steps_s": steps_of(log)})
            steps = ", ".join(f"{name} {spent:.1f}" for name, spent in rows[-1]["steps_s"].items())
            print(
                f"{scan.name} {shape} {mode}: {seconds:.1f} s ({steps}), {peak_gb:.2f} GB, "
                f"{seconds / bound:.1f} times reading and writing",
                flush=True,
            )
    if options.out:
        from synthseg.networks.checkpoint import model_path

        own = (options.package or ROOT) / "synthseg" / "weights" / f"{options.model}.safetensors"
        weights = own if own.is_file() else model_path(options.model)
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        record = {"sha256": digest, "threads": options.threads, "rows": rows}
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
