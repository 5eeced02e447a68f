"""CPU seconds and size of what `synthseg segment` writes, against nibabel's own writing with the standard library.

    python benchmarks/bench_writing.py [SCAN] [--size 256] [--repeats 5] [--out FILE.json]

Written are the scan as float32 and as the integers of its file, a label map made from it (its intensities in 17
steps), and the probabilities of 17 classes; all cut or padded to a cube. The ratio is nibabel's time over ours.
The probabilities of the scan itself (mode ``fast``) are judged as whole numbers of one and two bytes and as float16, as
docs/outputs.md has it: largest error, how often the likeliest class changes, the largest change of a soft volume, and
the size of the file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

import synthseg
from synthseg.paths import data_dir
from synthseg.volume import Volume, load_volume, save_class_images, save_image, save_label_map, save_scan

CLASSES = 17
LEVELS = 65535


def cube(volume: Volume, size: int) -> Volume:
    """The middle of a scan, or the scan in the middle of air; a cube of ``size`` voxels."""
    pad = [max(0, size - n) for n in volume.data.shape]
    data = np.pad(volume.data, [(p // 2, p - p // 2) for p in pad])
    middle = tuple(slice((n - size) // 2, (n - size) // 2 + size) for n in data.shape)
    return Volume(np.ascontiguousarray(data[middle]), volume.affine, volume.header)


def best(write: Callable[[Path], None], path: Path, repeats: int) -> tuple[float, float]:
    """Least CPU seconds, and size in MiB."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        write(path)
        seconds.append(time.process_time() - start)
    return min(seconds), path.stat().st_size / 2**20


def probabilities(labels: np.ndarray) -> np.ndarray:
    """Blurred one-hot labels, float32 (C, D, H, W)."""
    return np.stack([ndimage.gaussian_filter((labels == c).astype(np.float32), 0.7) for c in range(CLASSES)])


def precision(exact: np.ndarray, folder: Path) -> dict[str, dict[str, float]]:
    """Error and size of each way to store probabilities (C, D, H, W), halfway between neighbouring voxels."""
    exact = (exact[:, 1:] + exact[:, :-1]) / 2
    exact /= exact.sum(0)
    winner, soft = exact.argmax(0), exact.sum((1, 2, 3), dtype=np.float64)
    n_classes, *shape = exact.shape
    like, path = Volume(np.zeros(shape, np.float32), np.eye(4)), folder / "probabilities.nii.gz"
    rows = {}
    for name, dtype, levels in (("1 byte", np.uint8, 255), ("2 bytes", np.uint16, LEVELS), ("float16", np.float32, 1)):
        raw = np.rint(exact * levels).astype(dtype) if levels > 1 else exact.astype(np.float16).astype(dtype)
        save_class_images(path, [(slice(0, shape[0]), raw)], (*shape, n_classes), dtype, 1 / levels, like)
        stored = raw / np.float32(levels)
        change = np.abs(stored.sum((1, 2, 3), dtype=np.float64) - soft)
        rows[name] = {
            "largest_error": float(np.abs(stored - exact).max()),
            "changed_winners": float((stored.argmax(0) != winner).mean()),
            "soft_volume_change": float((change[soft > 0] / soft[soft > 0]).max()),
            "mib": path.stat().st_size / 2**20,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", nargs="?", type=Path, default=data_dir("samples") / "colin27_t1.nii.gz")
    parser.add_argument("--size", type=int, default=256, help="voxels a side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    found = synthseg.segment(arguments.scan, mode="fast", quality=False, keep_posteriors=True).posteriors
    with tempfile.TemporaryDirectory() as folder:
        errors = precision(found.values.float().numpy(), Path(folder))
    scan = cube(load_volume(arguments.scan), arguments.size)
    steps = np.quantile(scan.data[scan.data > scan.data.min()], np.linspace(0, 1, CLASSES))[:-1]
    labels = np.digitize(ndimage.gaussian_filter(scan.data, 1.0), steps).astype(np.uint8)
    shares = probabilities(labels)
    whole = np.rint(shares * LEVELS).astype(np.uint16)

    def nibabel(data: np.ndarray) -> Callable[[Path], None]:
        return lambda path: nib.save(nib.Nifti1Image(data, scan.affine), path)

    def classes(path: Path) -> None:
        slabs = ((slice(i, i + 16), whole[:, i : i + 16]) for i in range(0, whole.shape[1], 16))
        save_class_images(path, slabs, (*whole.shape[1:], CLASSES), np.uint16, 1 / LEVELS, scan)

    integers = scan.data.astype(scan.header.get_data_dtype() if scan.header else np.int16)
    cases: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
        "label map": (nibabel(labels), lambda path: save_label_map(path, labels, scan, range(CLASSES))),
        "integer image": (nibabel(integers), lambda path: save_scan(path, scan.data, scan)),
        "float image": (nibabel(scan.data), lambda path: save_image(path, scan)),
        "probabilities": (nibabel(np.moveaxis(whole, 0, -1)), classes),
    }
    result: dict[str, object] = {"size": arguments.size, "precision": errors}
    print(f"{'':16s}{'nibabel':>18s}{'synthseg':>18s}   ratio")
    with tempfile.TemporaryDirectory() as folder:
        for name, (theirs, ours) in cases.items():
            theirs_s, theirs_mib = best(theirs, Path(folder) / "a.nii.gz", arguments.repeats)
            ours_s, ours_mib = best(ours, Path(folder) / "b.nii.gz", arguments.repeats)
            print(
                f"{name:16s}{theirs_s:7.2f} s {theirs_mib:5.1f} MiB{ours_s:7.2f} s {ours_mib:5.1f} MiB"
                f"{theirs_s / ours_s:7.1f}x"
            )
            result[name] = {
                "nibabel_s": theirs_s, "nibabel_mib": theirs_mib, "synthseg_s": ours_s, "synthseg_mib": ours_mib
            }  # fmt: skip
    for name, row in errors.items():
        print(f"probabilities as {name}: wrong by up to {row['largest_error']:.1e}, "
              f"{row['changed_winners']:.1e} of the voxels change their likeliest class, soft volumes change by up to "
              f"{row['soft_volume_change']:.1e}, {row['mib']:.1f} MiB")  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
