"""Seconds and peak memory of `synthseg segment`, as a whole process, for scans of several sizes.

    python benchmarks/bench_segment.py [SCAN ...] [--threads 2] [--out FILE.json]

Without a scan: the bundled Colin27, and the same resampled to 256 x 256 x 256 voxels of 1 mm. Each is segmented by
the command in a fresh process; the ratio is its time over the time to read and write the scan alone with nibabel.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from synthseg.paths import data_dir


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


def measured(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident GB of a child process."""
    start = time.perf_counter()
    child = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6  # kilobytes on Linux


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
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sample = data_dir("samples") / "colin27_t1.nii.gz"
        for scan in options.scans or [sample, padded(sample, Path(folder) / "colin27_256.nii.gz")]:
            bound = copy_seconds(scan, Path(folder) / "copy.nii.gz")
            command = [sys.executable, "-m", "synthseg", "segment", str(scan), "-o", f"{folder}/seg.nii.gz"]
            command += ["--overwrite", "--threads", str(options.threads), "--model", options.model, "--device", "cpu"]
            seconds, peak_gb = measured(command)
            shape = nib.load(scan).shape
            rows.append(
                {"scan": scan.name, "shape": shape, "seconds": round(seconds, 1), "peak_gb": round(peak_gb, 2),
                 "copy_seconds": round(bound, 2), "ratio": round(seconds / bound, 1)}
            )  # fmt: skip
            print(
                f"{scan.name} {shape}: {seconds:.1f} s, {peak_gb:.2f} GB, "
                f"{seconds / bound:.1f} times reading and writing",
                flush=True,
            )
    if options.out:
        from synthseg.networks.checkpoint import load_model

        record = {"sha256": load_model(options.model).sha256, "threads": options.threads, "rows": rows}
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
